// What tests set and ask of the emulated device, through ctypes; kernels that are wrong, which it must notice; and the
// one symbol of libtorch_cuda the ops refer to.
#include <cstdint>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

void reads_past_the_end(const int* data_, int* out_) {
    const Global<const int> data(data_);
    const Global<int> out(out_);
    const int got = data[threadIdx.x];
    if (threadIdx.x == 0) out[0] = got;
}

void writes_before_the_beginning(const int*, int* out_) {
    const Global<int> out(out_);
    out[static_cast<int>(threadIdx.x) - 1] = 0;
}

void loads_16_bytes_at_an_odd_place(const int* data_, int* out_) {
    const Global<int> out(out_);
    out[0] = *span(Global<const int>(data_), 1, 4);
}

void not_all_reach_the_barrier(const int*, int*) {
    if (threadIdx.x == 0) __syncwarp();
}

void shuffles_from_outside_the_mask(const int*, int* out_) {
    const int got = threadIdx.x < 16 ? __shfl_sync(0xffffu, 1, 20) : 0;
    const Global<int> out(out_);
    out[0] = got;
}

void hangs_on_the_order_of_threads(const int*, int* out_) {
    static int last;
    last = static_cast<int>(threadIdx.x);
    const Global<int> out(out_);
    out[0] = last;
}

// What orders the last thread's read after the first one's write.
enum class Order { nothing, ballot, warp, block };
template <Order ORDER>
void hands_over(const int*, int* out_) {
    __shared__ int of_thread[64];
    of_thread[threadIdx.x] = 1;
    if (ORDER == Order::ballot) __ballot_sync(0xffffffffu, true);
    if (ORDER == Order::warp) __syncwarp();
    if (ORDER == Order::block) __syncthreads();
    const Global<int> out(out_);
    if (threadIdx.x + 1 == blockDim.x) out[0] = of_thread[0];
}

void reads_shared_memory_as_it_comes(const int*, int* out_) {
    __shared__ int numbers[32];
    const Global<int> out(out_);
    if (threadIdx.x == 0) out[0] = numbers[0];
    __syncthreads();
    numbers[threadIdx.x] = 1;
}

void writes_in_every_block(const int*, int* out_) {
    const Global<int> out(out_);
    if (threadIdx.x == 0) out[0] = 1;
}

void all_write_the_same(const int*, int* out_) {
    store_same(Global<int>(out_), 1);
}

void loads_what_it_wrote(const int*, int* out_) {
    const Global<int> out(out_);
    if (threadIdx.x == 0) out[0] = 1, out[0] = __ldg(&out[0]);
}

}  // namespace

EXPORTED void emulation_set(int order, int64_t l2_bytes) {
    emulation::state().order = static_cast<emulation::Order>(order);
    emulation::state().l2_bytes = l2_bytes;
}

// Work still runs at once, but waiting for it is an error.
EXPORTED void emulation_capture(int on) {
    emulation::state().capturing = on != 0;
}

EXPORTED int64_t emulation_launches() {
    return emulation::state().launches;
}

EXPORTED int64_t emulation_synchronisations() {
    return emulation::state().synchronisations;
}

// The error a later call would be blamed for; 0 where there is none.
EXPORTED int emulation_last_error() {
    return emulation::state().last_error;
}

// Whether kernels of the op that ran last may reach this address.
EXPORTED bool emulation_reaches(const char* data) {
    const auto& buffers = emulation::state().buffers;
    const auto after = buffers.upper_bound(data);
    return after != buffers.begin() && std::prev(after)->second > data;
}

// Runs a kernel that is wrong, or may be, over 32 entries; what the device says of it, "" where it is content.
EXPORTED const char* emulation_run(int which, int blocks, int threads, int* out) {
    using Kernel = void (*)(const int*, int*);
    constexpr Kernel kernels[] = {reads_past_the_end,
                                  writes_before_the_beginning,
                                  loads_16_bytes_at_an_odd_place,
                                  not_all_reach_the_barrier,
                                  shuffles_from_outside_the_mask,
                                  hangs_on_the_order_of_threads,
                                  hands_over<Order::nothing>,
                                  hands_over<Order::ballot>,
                                  hands_over<Order::warp>,
                                  hands_over<Order::block>,
                                  reads_shared_memory_as_it_comes,
                                  writes_in_every_block,
                                  all_write_the_same,
                                  loads_what_it_wrote};
    alignas(16) int data[32] = {};
    emulation::announce(data, sizeof data);
    emulation::announce(out, sizeof *out);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(threads));
    const int code = cudaLaunchKernelEx(&config, kernels[which], static_cast<const int*>(data), out);
    if (code == cudaSuccess) return "";
    cudaGetLastError();
    return cudaGetErrorString(code);
}

EXPORTED int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
