// A CUDA runtime that runs kernels on the CPU: what csrc/cuda uses of the real one, and no more.
//
// Every thread of a block is a fiber with a stack of its own; blocks run one after another. A thread that reaches a
// barrier or a warp operation waits until all that take part have arrived; where they never do, the launch fails. So
// does any access outside the buffers the op at hand has announced: kernels reach global memory through `Global`, a
// pointer that knows its bounds. As on a device, the last failure stays until somebody takes it. Blocks and threads can
// be run in other orders (`emulation::state().order`), which shows up results that hang on one. Compiled with
// -fsanitize=thread, every access is reported to races.cpp, which knows what orders two threads' accesses.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define SPARSE_BACKEND_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = struct EmulatedStream*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrL2CacheSize = 38 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

namespace emulation {

constexpr size_t kStack = 256 << 10;
enum class Order { ascending, descending, shuffled };

struct Thread {
    enum State { kNew, kReady, kAtBarrier, kAtWarp, kDone } state = kNew;
    jmp_buf where;
    unsigned index = 0;
    unsigned mask = 0;       // of the warp operation it waits in
    uint64_t value = 0;      // what it brings there
    uint64_t seen[32] = {};  // what the lanes of the mask brought
    uint32_t syncs = 0;      // __syncwarps it has passed in this block
    std::unique_ptr<char[]> stack{new char[kStack]};
};

struct State {
    Order order = Order::ascending;
    int64_t l2_bytes = 32 << 20;
    int64_t launches = 0, synchronisations = 0;
    bool capturing = false;
    std::map<const char*, const char*> buffers;  // begin -> end
    std::vector<std::unique_ptr<Thread>> threads;
    unsigned count = 0;
    Thread* current = nullptr;
    jmp_buf scheduler;
    const std::function<void()>* body = nullptr;
    std::string fault;         // that of the launch or copy at hand
    int last_error = 0;        // a cudaError_t
    uint32_t block = 0;        // of this launch, by number
    int64_t blocks_begun = 0;  // of all launches
    uint32_t barriers = 0;     // that the block has passed
};

inline State& state() {
    static State one;
    return one;
}

// While one lives, what is accessed is this runtime's affair and not the kernel's.
inline bool in_kernel = false;
class Runtime {
  public:
    __attribute__((no_sanitize_thread)) Runtime() : before_(in_kernel) { in_kernel = false; }
    __attribute__((no_sanitize_thread)) ~Runtime() { in_kernel = before_; }
    Runtime(const Runtime&) = delete;

  private:
    bool before_;
};

// The host code tells which memory a kernel may touch; a newer buffer replaces what it overlaps.
inline void announce(const void* data, size_t bytes) {
    auto& buffers = state().buffers;
    const char *begin = static_cast<const char*>(data), *end = begin + bytes;
    if (begin == nullptr || bytes == 0) return;
    auto at = buffers.lower_bound(begin);
    if (at != buffers.begin() && std::prev(at)->second > begin) --at;
    while (at != buffers.end() && at->first < end) at = buffers.erase(at);
    buffers[begin] = end;
}

inline void forget_buffers() {  // an op begins: what earlier ones could reach may be gone
    state().buffers.clear();
}

inline void leave() {  // from a thread back to the scheduler
    if (_setjmp(state().current->where) == 0) _longjmp(state().scheduler, 1);
}

[[noreturn]] __attribute__((no_sanitize_thread)) inline void fail(const std::string& text) {
    in_kernel = false;
    State& s = state();
    char where[128];
    std::snprintf(where, sizeof where, " (block %u,%u,%u thread %u)", blockIdx.x, blockIdx.y, blockIdx.z,
                  s.current == nullptr ? 0 : s.current->index);
    s.fault = text + where;
    s.current->state = Thread::kDone;
    _longjmp(s.scheduler, 1);
}

__attribute__((no_sanitize_thread)) inline void first_entry() {
    const std::function<void()>& body = *state().body;
    in_kernel = true;
    body();
    in_kernel = false;
    state().current->state = Thread::kDone;
    _longjmp(state().scheduler, 1);
}

inline void resume(Thread& thread) {
    State& s = state();
    s.current = &thread;
    const unsigned xy = blockDim.x * blockDim.y;
    threadIdx = dim3(thread.index % blockDim.x, thread.index % xy / blockDim.x, thread.index / xy);
    if (_setjmp(s.scheduler) != 0) return;
    if (thread.state == Thread::kNew) {
        thread.state = Thread::kReady;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = thread.stack.get();
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, first_entry, 0);
        setcontext(&context);
    }
    _longjmp(thread.where, 1);
}

inline unsigned place(unsigned k, unsigned count) {  // the k-th to run
    switch (state().order) {
        case Order::ascending:
            return k;
        case Order::descending:
            return count - 1 - k;
        default:  // a step that shares no factor with the count reaches everyone
            for (unsigned step = count / 2 + 3;; ++step) {
                unsigned a = step, b = count;
                while (b != 0) std::swap(a %= b, b);
                if (a == 1) return static_cast<unsigned>((uint64_t{k} * step + 1) % count);
            }
    }
}

inline bool run_block(const std::function<void()>& body, unsigned count) {
    State& s = state();
    s.body = &body;
    s.count = count;
    while (s.threads.size() < count) s.threads.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < count; ++i)
        s.threads[i]->state = Thread::kNew, s.threads[i]->index = i, s.threads[i]->syncs = 0;
    s.barriers = 0, ++s.blocks_begun;
    for (;;) {
        bool progress = false;
        unsigned alive = 0, at_barrier = 0;
        for (unsigned k = 0; k < count; ++k) {
            Thread& thread = *s.threads[place(k, count)];
            if (thread.state == Thread::kNew || thread.state == Thread::kReady) {
                resume(thread);
                progress = true;
                if (!s.fault.empty()) return false;
            }
            alive += thread.state != Thread::kDone;
            at_barrier += thread.state == Thread::kAtBarrier;
        }
        if (alive == 0) return true;
        if (progress) continue;
        if (alive != at_barrier) {
            s.fault = "deadlock: a barrier or a warp operation that not all of its threads reach";
            return false;
        }
        ++s.barriers;
        for (unsigned i = 0; i < count; ++i)
            if (s.threads[i]->state == Thread::kAtBarrier) s.threads[i]->state = Thread::kReady;
    }
}

inline int lane() {
    const Runtime quiet;
    return static_cast<int>(state().current->index % 32);
}

// What a kernel does to memory beside reading and writing it as any C++ does.
enum class Access { read, write, read_only, atomic, same };  // same: a write, of what all write who do

#ifdef __SANITIZE_THREAD__
void accessed(const void* data, size_t bytes, Access how);  // races.cpp
#else
inline void accessed(const void*, size_t, Access) {}
#endif

// Waits for all lanes of `mask` to bring a value to the same operation.
inline const uint64_t* meet(unsigned mask, uint64_t value) {
    const Runtime quiet;
    State& s = state();
    Thread& self = *s.current;
    const unsigned lane = self.index % 32, warp = self.index - lane;
    if ((mask >> lane & 1) == 0) fail("warp operation: the mask lacks the calling lane");
    self.mask = mask, self.value = value, self.state = Thread::kAtWarp;
    bool complete = true;
    for (unsigned i = 0; i < 32 && complete; ++i) {
        if ((mask >> i & 1) == 0) continue;
        if (warp + i >= s.count || s.threads[warp + i]->state == Thread::kDone)
            fail("warp operation: the mask names a lane that is gone");
        complete = s.threads[warp + i]->state == Thread::kAtWarp && s.threads[warp + i]->mask == mask;
    }
    if (!complete) {
        leave();
        return self.seen;
    }
    for (unsigned i = 0; i < 32; ++i) {
        if ((mask >> i & 1) == 0) continue;
        Thread& other = *s.threads[warp + i];
        for (unsigned k = 0; k < 32; ++k) other.seen[k] = mask >> k & 1 ? s.threads[warp + k]->value : ~uint64_t{0};
        other.state = Thread::kReady;
    }
    return self.seen;
}

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

inline void check_copy(const void* data, size_t bytes, const char* what) {
    const auto* begin = static_cast<const char*>(data);
    const auto& buffers = state().buffers;
    auto at = buffers.upper_bound(begin);
    if (bytes != 0 && (at == buffers.begin() || std::prev(at)->second < begin + bytes)) {
        state().fault = std::string(what) + ": outside every buffer";
    }
}

}  // namespace emulation

// A pointer into global memory that faults outside the buffer it was made for.
template <typename T>
class Global {
  public:
    Global() = default;
    explicit Global(T* data) : at_(data), begin_(data), end_(data) {
        if (data == nullptr) return;
        const emulation::Runtime quiet;
        const auto& buffers = emulation::state().buffers;
        const auto* here = reinterpret_cast<const char*>(data);
        auto found = buffers.upper_bound(here);
        if (found == buffers.begin()) return;
        --found;
        if (found->second < here) return;
        begin_ = reinterpret_cast<T*>(const_cast<char*>(found->first));
        end_ = reinterpret_cast<T*>(const_cast<char*>(found->second));
    }
    T& operator[](int64_t i) const { return *checked(i, 1); }
    Global operator+(int64_t i) const {
        Global moved = *this;
        moved.at_ += i;
        return moved;
    }
    Global operator-(int64_t i) const { return *this + -i; }
    explicit operator bool() const { return at_ != nullptr; }
    T* checked(int64_t i, int64_t n) const {
        if (at_ == nullptr) emulation::fail("access through a null pointer");
        if (at_ + i < begin_ || at_ + i + n > end_) {
            char text[160];
            std::snprintf(text, sizeof text, "access to entries %lld..%lld of a buffer of %lld (element size %zu)",
                          static_cast<long long>(at_ - begin_ + i), static_cast<long long>(at_ - begin_ + i + n - 1),
                          static_cast<long long>(end_ - begin_), sizeof(T));
            emulation::fail(text);
        }
        return at_ + i;
    }

  private:
    T *at_ = nullptr, *begin_ = nullptr, *end_ = nullptr;
};

template <typename T>
T* span(Global<T> from, int64_t at, int n) {
    T* data = from.checked(at, n);
    if (n * sizeof(T) == 16 && reinterpret_cast<uintptr_t>(data) % 16 != 0)
        emulation::fail("misaligned 16-byte access");
    return data;
}

// ---- what kernels call ----

[[noreturn]] inline void __trap() {
    emulation::fail("trap");
}
inline void __syncthreads() {
    const emulation::Runtime quiet;
    emulation::state().current->state = emulation::Thread::kAtBarrier;
    emulation::leave();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    if (mask != 0xffffffffu) emulation::fail("__syncwarp of part of a warp: not emulated");
    emulation::meet(mask, 0);
    const emulation::Runtime quiet;
    ++emulation::state().current->syncs;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const emulation::Runtime quiet;
    const uint64_t* votes = emulation::meet(mask, vote);
    unsigned out = 0;
    for (unsigned i = 0; i < 32; ++i)
        if ((mask >> i & 1) != 0) out |= static_cast<unsigned>(votes[i] & 1) << i;
    return out;
}
template <typename T>
T emulated_shuffle(unsigned mask, T value, int from) {
    const emulation::Runtime quiet;
    if (from < 0 || from > 31 || (mask >> from & 1) == 0) emulation::fail("shuffle from a lane outside the mask");
    return emulation::from_bits<T>(emulation::meet(mask, emulation::to_bits(value))[from]);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
    return emulated_shuffle(mask, value, from & 31);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    const int lane = emulation::lane(), from = lane - static_cast<int>(distance);
    return emulated_shuffle(mask, value, from < 0 ? lane : from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulated_shuffle(mask, value, emulation::lane() ^ bits);
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
template <typename T>
T __ldg(const T* from) {
    emulation::accessed(from, sizeof(T), emulation::Access::read_only);
    const emulation::Runtime quiet;
    return *from;
}
template <typename T>
void __stcg(T* to, T value) {
    *to = value;
}
// A plain store, of a number that every thread stores which stores there at all.
inline void store_same(Global<int32_t> to, int32_t value) {
    int32_t* const at = to.checked(0, 1);
    emulation::accessed(at, sizeof *at, emulation::Access::same);
    const emulation::Runtime quiet;
    *at = value;
}
inline float half_to_float(uint16_t bits) {  // what one instruction of the device does
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                       : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                       : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits >> 15 != 0 ? -size : size;
}
inline unsigned atomicOr(unsigned* to, unsigned bits) {
    emulation::accessed(to, sizeof *to, emulation::Access::atomic);
    const emulation::Runtime quiet;
    const unsigned before = *to;
    *to |= bits;
    return before;
}

// ---- what host code calls ----

inline cudaError_t cudaGetLastError() {
    return std::exchange(emulation::state().last_error, cudaSuccess);
}
namespace emulation {
inline cudaError_t outcome() {  // of a call: fails where there is a fault
    if (state().fault.empty()) return cudaSuccess;
    return state().last_error = cudaErrorLaunchFailure;
}
}  // namespace emulation
inline const char* cudaGetErrorString(cudaError_t) {
    static std::string said;
    said = "emulated device: " + emulation::state().fault;
    emulation::state().fault.clear();
    return said.c_str();
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    if (kind != cudaMemcpyHostToDevice) emulation::check_copy(from, bytes, "copy from the device");
    if (kind != cudaMemcpyDeviceToHost) emulation::check_copy(to, bytes, "copy to the device");
    if (emulation::state().fault.empty()) std::memcpy(to, from, bytes);
    return emulation::outcome();
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    emulation::check_copy(to, bytes, "memset");
    if (emulation::state().fault.empty()) std::memset(to, value, bytes);
    return emulation::outcome();
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    ++emulation::state().synchronisations;
    if (emulation::state().capturing) emulation::state().fault = "a wait for the device while a graph is captured";
    return emulation::outcome();
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = static_cast<int>(emulation::state().l2_bytes);
    return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = emulation::state().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
    emulation::State& s = emulation::state();
    ++s.launches;
    std::tuple<std::decay_t<Parameters>...> arguments(std::forward<Arguments>(given)...);
    const std::function<void()> body = [&] { std::apply(kernel, arguments); };
    gridDim = config->gridDim, blockDim = config->blockDim;
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    if (count == 0 || count > 1024 || blocks == 0 || blocks > 0x7fffffff || gridDim.y > 65535 || gridDim.z > 65535) {
        s.fault = "launch: sizes out of range";
        return emulation::outcome();
    }
    for (unsigned k = 0; k < blocks; ++k) {
        const unsigned i = s.block = emulation::place(k, static_cast<unsigned>(blocks));
        blockIdx = dim3(i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y);
        if (!emulation::run_block(body, count)) return emulation::outcome();
    }
    s.current = nullptr;
    return cudaSuccess;
}
