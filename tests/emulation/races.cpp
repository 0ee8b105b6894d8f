// What compute-sanitizer's racecheck and initcheck see, on the emulated device: compiled with -fsanitize=thread, which
// calls the functions below for every access, and linked without the library that usually answers them.
//
// Two accesses to one place, one of them a write, must be ordered: by the thread, a barrier of the block, or a
// __syncwarp of the warp between them. A shuffle or a ballot orders nothing. Blocks of a launch are never ordered,
// launches always. What is read by __ldg no thread may write in that launch. Shared memory holds nothing when a block
// begins.
#ifdef __SANITIZE_THREAD__

#define UNCHECKED __attribute__((no_sanitize_thread))  // this file is compiled so too

extern "C" char __bss_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

namespace emulation {
namespace {

constexpr uint32_t kNobody = ~0u;

struct By {
    Access how = Access::read;
    uint32_t block = 0, thread = kNobody, barriers = 0, syncs = 0;
};

// A word of memory, or half of one where halves are what is accessed: who wrote it last, and who read it lately, in
// three slots: the last of all, the last of another thread than that, and the last of another warp.
struct Place {
    uintptr_t at = 0;
    int64_t launch = 0, block = 0;  // that this is about; no block for global memory
    By writer, readers[3];
};

// The places of a launch: a table that is looked through from where an address would lie to where it does. Those of
// other launches are free.
class Places {
  public:
    UNCHECKED Place& at(uintptr_t address, int64_t launch) {
        if (launch != launch_) launch_ = launch, used_ = 0;
        if (2 * used_ >= size_) grow();
        Place& place = find(address);
        if (place.launch != launch) place = Place{address, launch, 0, {}, {}}, ++used_;
        return place;
    }

  private:
    UNCHECKED Place& find(uintptr_t address) {
        for (size_t i = address * 0x9e3779b97f4a7c15u >> 20;; ++i) {
            Place& place = table_[i & (size_ - 1)];
            if (place.at == address || place.launch != launch_) return place;
        }
    }
    UNCHECKED void grow() {
        Place* const old = table_;
        const size_t n = std::exchange(size_, size_ == 0 ? 1 << 12 : 2 * size_);
        table_ = new Place[size_];
        for (size_t i = 0; i < n; ++i)
            if (old[i].launch == launch_) find(old[i].at) = old[i];
        delete[] old;
    }

    Place* table_ = nullptr;
    size_t size_ = 0, used_ = 0;
    int64_t launch_ = 0;
};

Places places;

UNCHECKED bool writes(Access how) {
    return how != Access::read && how != Access::read_only;
}

UNCHECKED bool is_before(const By& one, const By& other) {
    if (one.block != other.block) return false;
    if (one.thread == other.thread || one.barriers < other.barriers) return true;
    return one.thread / 32 == other.thread / 32 && one.syncs < other.syncs;
}

UNCHECKED bool may_meet(const By& one, const By& other) {  // whatever their order
    return one.how == other.how && (one.how == Access::atomic || one.how == Access::same);
}

[[noreturn]] UNCHECKED void blame(const char* what, bool shared, const By& before, const By& now) {
    constexpr const char* done[] = {"read", "written", "read by __ldg", "changed by an atomic", "written"};
    char text[200], who[60] = "";
    if (before.thread != kNobody)
        std::snprintf(who, sizeof who, " %s by thread %u of block %u, then", done[static_cast<int>(before.how)],
                      before.thread, before.block);
    std::snprintf(text, sizeof text, "%s: %s memory%s %s", what, shared ? "shared" : "global", who,
                  done[static_cast<int>(now.how)]);
    fail(text);
}

UNCHECKED void look(Place& place, const By& now, bool shared, int64_t block) {
    if (place.block != block) place = Place{place.at, place.launch, block, {}, {}};
    if (place.writer.thread != kNobody) {
        if (now.how == Access::read_only) blame("__ldg of what the launch writes", shared, place.writer, now);
        if (!may_meet(place.writer, now) && !is_before(place.writer, now)) blame("race", shared, place.writer, now);
    } else if (shared && !writes(now.how)) {
        blame("never written in this block", shared, {}, now);
    }
    By* const readers = place.readers;
    if (writes(now.how)) {
        for (int k = 0; k < 3; ++k) {
            if (readers[k].thread == kNobody) continue;
            if (readers[k].how == Access::read_only) blame("__ldg of what the launch writes", shared, readers[k], now);
            if (!is_before(readers[k], now)) blame("race", shared, readers[k], now);
        }
        place.writer = now;
        return;
    }
    const bool same_block = readers[0].block == now.block;
    if (!same_block || readers[0].thread / 32 != now.thread / 32) readers[2] = readers[0];
    if (!same_block || readers[0].thread != now.thread) readers[1] = readers[0];
    readers[0] = now;
}

UNCHECKED bool is_index(const char* at) {  // of a thread or a block: each has its own
    for (const dim3* own : {&threadIdx, &blockIdx, &blockDim, &gridDim})
        if (at >= reinterpret_cast<const char*>(own) && at < reinterpret_cast<const char*>(own + 1)) return true;
    return false;
}

}  // namespace

UNCHECKED void accessed(const void* data, size_t bytes, Access how) {
    if (!in_kernel) return;
    const Runtime quiet;
    const State& s = state();
    const char *at = static_cast<const char*>(data), *stack = s.current->stack.get();
    if ((at >= stack && at < stack + kStack) || is_index(at)) return;
    const bool shared = at >= __bss_start && at < _end;
    const int64_t block = shared ? s.blocks_begun : 0;
    const By now{how, s.block, s.current->index, s.barriers, s.current->syncs};
    const size_t grain = bytes < 4 ? 2 : 4;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(at) / grain * grain,
                    end = reinterpret_cast<uintptr_t>(at) + bytes;
    for (uintptr_t k = begin; k < end; k += grain) look(places.at(k, s.launches), now, shared, block);
}

}  // namespace emulation

// What the compiler calls.
#define EXPORTED extern "C" __attribute__((visibility("default"), no_sanitize_thread))
#define ON_ACCESS(bytes)                                          \
    EXPORTED void __tsan_read##bytes(void* at) {                  \
        emulation::accessed(at, bytes, emulation::Access::read);  \
    }                                                             \
    EXPORTED void __tsan_write##bytes(void* at) {                 \
        emulation::accessed(at, bytes, emulation::Access::write); \
    }                                                             \
    EXPORTED void __tsan_unaligned_read##bytes(void* at) {        \
        emulation::accessed(at, bytes, emulation::Access::read);  \
    }                                                             \
    EXPORTED void __tsan_unaligned_write##bytes(void* at) {       \
        emulation::accessed(at, bytes, emulation::Access::write); \
    }
ON_ACCESS(1)
ON_ACCESS(2)
ON_ACCESS(4)
ON_ACCESS(8)
ON_ACCESS(16)
EXPORTED void __tsan_read_range(void* at, size_t bytes) {
    emulation::accessed(at, bytes, emulation::Access::read);
}
EXPORTED void __tsan_write_range(void* at, size_t bytes) {
    emulation::accessed(at, bytes, emulation::Access::write);
}
EXPORTED void __tsan_init() {}
EXPORTED void __tsan_func_entry(void*) {}
EXPORTED void __tsan_func_exit() {}
EXPORTED void __tsan_vptr_update(void**, void*) {}
// Atomics of the host's code, which runs on one thread.
EXPORTED char __tsan_atomic8_load(const volatile char* from, int) {
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}
EXPORTED int __tsan_atomic32_fetch_add(volatile int* to, int more, int) {
    return __atomic_fetch_add(to, more, __ATOMIC_SEQ_CST);
}

#endif
