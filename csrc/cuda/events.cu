// Between dense tensors, bits and lists of events. Stream compaction without atomics on lists: bits, their counts, and
// sums of counts give every event its place, whatever the order in which blocks run.
#include "device.cuh"

namespace sparse_backend {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kPerThread = static_cast<int>(kTileWords) / kThreads;

// A warp per row, a lane per column: 32 consecutive entries make one word.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    mark_nonzero_kernel(const T* dense_, int64_t rows, int64_t columns, uint32_t* bits_, int32_t* not_one_) {
    constexpr int kAhead = sizeof(T) <= 2 ? 8 : 4;  // words whose loads are in flight together
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
    if (row >= rows) return;
    const int lane = lane_id();
    const int64_t words = words_of(columns);
    const Global<const T> dense = in(dense_) + row * columns;
    const Global<uint32_t> bits = out(bits_) + row * words;
    bool other = false;
    for (int64_t w0 = 0; w0 < words; w0 += kAhead) {
        T value[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t column = (w0 + k) * 32 + lane;
            value[k] = column < columns ? load(&dense[column]) : T{};
        }
        uint32_t mine = 0;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const auto number = widen(value[k]);
            const bool event = number != 0;
            other |= event && number != 1;
            const uint32_t word = __ballot_sync(kWarp, event);
            if (lane == k) mine = word;
        }
        if (lane < kAhead && w0 + lane < words) bits[w0 + lane] = mine;
    }
    if (__ballot_sync(kWarp, other) != 0 && lane == 0) store_same(out(not_one_), 1);
}

// Sum of a block's integers before each thread; `total` is that of all. Once in a kernel: a second use would need a
// barrier before it.
__device__ __forceinline__ int block_sum_before(int value, int& total) {
    __shared__ int of_warp[kWarps];
    int in_warp;
    const int before = sum_before(value, in_warp);
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    if (lane_id() == 0) of_warp[warp] = in_warp;
    __syncthreads();
    int base = 0;
    total = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
        if (k < warp) base += of_warp[k];
        total += of_warp[k];
    }
    return base + before;
}

template <typename T>
__device__ __forceinline__ const Emission<T>& chosen(const Emissions<T>& lists) {
    return blockIdx.y == 0 ? lists.list[0] : blockIdx.y == 1 ? lists.list[1] : lists.list[2];
}

// A block per tile of words: how many events it holds.
template <typename T>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Emissions<T> lists) {
    const Emission<T>& a = chosen(lists);
    const int64_t words = a.rows * words_of(a.columns), first = int64_t{blockIdx.x} * kTileWords;
    if (first >= words) return;
    const Global<const uint32_t> bits(a.bits);
    int n = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        const int64_t word = first + k * kThreads + threadIdx.x;
        if (word < words) n += __popc(__ldg(&bits[word]));
    }
    int total;
    block_sum_before(n, total);
    if (threadIdx.x == 0) out(a.sums)[blockIdx.x] = total;
}

__device__ __forceinline__ int64_t sum_of_tiles(Global<const int32_t> sums, int64_t tiles) {
    __shared__ int64_t of_thread[kThreads];
    int64_t sum = 0;
    for (int64_t k = threadIdx.x; k < tiles; k += kThreads) sum += __ldg(&sums[k]);
    of_thread[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
    }
    __syncthreads();
    return of_thread[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) totals_kernel(const __grid_constant__ Emissions<T> lists) {
    const Emission<T>& a = chosen(lists);
    const int64_t found = sum_of_tiles(in(a.sums), tiles_of(a.rows, a.columns));
    if (threadIdx.x == 0) out(a.after)[0] = __ldg(&in(a.before)[0]) + found;
}

// A block per tile of words, kPerThread of them per thread.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) emit_kernel(const __grid_constant__ Emissions<T> lists) {
    const Emission<T>& a = chosen(lists);
    const int64_t per_row = words_of(a.columns), words = a.rows * per_row;
    const int64_t tile = int64_t{blockIdx.x} * kTileWords;
    if (tile >= words) return;
    const int64_t first = tile + int64_t{threadIdx.x} * kPerThread;
    const Global<const uint32_t> bits(a.bits);
    uint32_t word[kPerThread];
    int n = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        word[k] = first + k < words ? __ldg(&bits[first + k]) : 0u;
        n += __popc(word[k]);
    }
    int total;
    int64_t at = block_sum_before(n, total);
    at += sum_of_tiles(in(a.sums), blockIdx.x) + __ldg(&in(a.before)[0]);
    if (first >= words) return;
    const Global<int32_t> row_ptr(a.row_ptr), indices(a.indices);
    const Global<const T> from0(a.from[0]), from1(a.from[1]);
    const Global<const uint8_t> bytes(a.from_bytes);
    const Global<T> to0(a.to[0]), to1(a.to[1]);
    int64_t row = static_cast<uint32_t>(first) / static_cast<uint32_t>(per_row);  // words < 2^32
    int64_t w = first - row * per_row;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        if (first + k >= words) break;
        if (w == 0) row_ptr[row] = static_cast<int32_t>(at < a.capacity ? at : a.capacity);
        for (uint32_t left = word[k]; left != 0; left &= left - 1, ++at) {
            if (at >= a.capacity) continue;
            const int64_t column = w * 32 + __ffs(static_cast<int>(left)) - 1;
            indices[at] = static_cast<int32_t>(column);
            if (to0)
                to0[at] = bytes ? static_cast<T>(bytes[row * a.columns + column]) : from0[row * a.columns + column];
            if (to1) to1[at] = from1[row * a.columns + column];
        }
        if (++w == per_row) w = 0, ++row;
        if (first + k == words - 1) {
            row_ptr[row] = static_cast<int32_t>(at < a.capacity ? at : a.capacity);
            out(a.after)[0] = at;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) seal_kernel(const __grid_constant__ Emissions<T> lists, int n_lists) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (int k = 0; k < n_lists; ++k) {
        const Emission<T>& a = lists.list[k];
        const int64_t found = __ldg(&in(a.after)[0]);
        if (found > a.capacity) __trap();
        if (i < found || i >= a.capacity) continue;
        out(a.indices)[i] = 0;
        for (int v = 0; v < 2; ++v)
            if (a.to[v] != nullptr) out(a.to[v])[i] = T(0);
    }
}

// The first of a row's entries, ascending, whose index is not below `index`.
__device__ __forceinline__ int32_t lower_bound(Global<const int32_t> indices, int32_t begin, int32_t end,
                                               int64_t index) {
    while (begin < end) {
        const int32_t middle = begin + (end - begin) / 2;
        if (__ldg(&indices[middle]) < index)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

// A thread per word.
__global__ void __launch_bounds__(kThreads) locate_kernel(const __grid_constant__ Locations lists, int64_t columns) {
    const Location& a = blockIdx.y == 0 ? lists.list[0] : blockIdx.y == 1 ? lists.list[1] : lists.list[2];
    const int64_t per_row = words_of(columns), word = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (word >= a.n_rows * per_row) return;
    const int64_t row = static_cast<uint32_t>(word) / static_cast<uint32_t>(per_row);
    const int64_t first = (word - row * per_row) * 32;
    const Global<const int32_t> row_ptr(a.rows.row_ptr), indices(a.rows.indices);
    const int32_t end = __ldg(&row_ptr[row + 1]);
    int32_t e = lower_bound(indices, __ldg(&row_ptr[row]), end, first);
    if (a.offset != nullptr) out(a.offset)[word] = e - __ldg(&row_ptr[0]);
    uint32_t bits = 0;
    for (; e < end; ++e) {
        const int64_t bit = __ldg(&indices[e]) - first;
        if (bit >= 32) break;
        bits |= 1u << bit;
    }
    out(a.bits)[word] = bits;
}

// A warp per row: zeros, then its events.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_kernel(const Events<T> events, int64_t rows, int64_t columns, T* dense_) {
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
    if (row >= rows) return;
    const Global<const int32_t> row_ptr(events.row_ptr), indices(events.indices);
    const Global<const T> values(events.values);
    const Global<T> dense = out(dense_) + row * columns;
    for (int64_t j = lane_id(); j < columns; j += kLanes) dense[j] = T(0);
    __syncwarp();
    const int32_t end = __ldg(&row_ptr[row + 1]);
    for (int32_t e = __ldg(&row_ptr[row]) + lane_id(); e < end; e += kLanes)
        dense[__ldg(&indices[e])] = values ? __ldg(&values[e]) : T(1);
}

constexpr int kSumColumns = 512;

// A block per row of the sum and tile of columns; its warps take every kWarps-th step, and are added up in order.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    sum_steps_kernel(const Events<T> events, int64_t steps, int64_t rows_per_step, int64_t columns, T* sum_) {
    __shared__ T sums[kWarps][kSumColumns];
    const int64_t row = blockIdx.x, first = int64_t{blockIdx.y} * kSumColumns;
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const Global<const int32_t> row_ptr(events.row_ptr), indices(events.indices);
    const Global<const T> values(events.values);
    for (int j = lane_id(); j < kSumColumns; j += kLanes) sums[warp][j] = T(0);
    __syncwarp();
    for (int64_t t = warp; t < steps; t += kWarps) {
        const int32_t end = __ldg(&row_ptr[t * rows_per_step + row + 1]);
        for (int32_t e = __ldg(&row_ptr[t * rows_per_step + row]) + lane_id(); e < end; e += kLanes) {
            const int64_t j = __ldg(&indices[e]) - first;
            if (j >= 0 && j < kSumColumns) sums[warp][j] += values ? __ldg(&values[e]) : T(1);
        }
        __syncwarp();  // no column twice in one row, but perhaps in the next
    }
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < kSumColumns && first + j < columns; j += kThreads) {
        T sum = T(0);
#pragma unroll
        for (int k = 0; k < kWarps; ++k) sum += sums[k][j];
        out(sum_)[row * columns + first + j] = sum;
    }
}

constexpr int kGatherLanes = 8;  // per row

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* dense_, int64_t dense_rows, int64_t columns, const Rows rows, int64_t n_rows, T* out_) {
    const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kGatherLanes;
    if (row >= n_rows) return;
    const Global<const int32_t> row_ptr(rows.row_ptr), indices(rows.indices);
    const Global<const T> from = in(dense_) + row % dense_rows * columns;
    const Global<T> to(out_);
    const int32_t origin = __ldg(&row_ptr[0]), end = __ldg(&row_ptr[row + 1]);
    for (int32_t e = __ldg(&row_ptr[row]) + static_cast<int32_t>(threadIdx.x) % kGatherLanes; e < end;
         e += kGatherLanes)
        to[e - origin] = __ldg(&from[__ldg(&indices[e])]);
}

template <typename T>
dim3 grid_of(const Emissions<T>& lists, int n_lists) {
    int64_t tiles = 0;
    for (int i = 0; i < n_lists; ++i) {
        const int64_t n = tiles_of(lists.list[i].rows, lists.list[i].columns);
        tiles = n > tiles ? n : tiles;
    }
    return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(n_lists));
}

}  // namespace

// ---- device ----

const char* take_error(int code) {
    cudaGetLastError();
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int is_capturing(Stream stream, bool& capturing) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const int code = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    capturing = status != cudaStreamCaptureStatusNone;
    return code;
}

int l2_bytes(int64_t& bytes) {
    int device = 0, value = 0;
    int code = cudaGetDevice(&device);
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, device);
    bytes = value;
    return code;
}

int zero(void* data, int64_t bytes, Stream stream) {
    return bytes == 0 ? cudaSuccess
                      : cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
}

int copy(void* to, const void* from, int64_t bytes, Stream stream) {
    if (bytes == 0) return cudaSuccess;
    return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                           static_cast<cudaStream_t>(stream));
}

int fetch(void* host, const void* device, int64_t bytes, Stream stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const int code = cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, on);
    return code != cudaSuccess ? code : static_cast<int>(cudaStreamSynchronize(on));
}

// ---- launchers ----

template <typename T>
int mark_nonzero(const T* dense, int64_t rows, int64_t columns, uint32_t* bits, int32_t* not_one, Stream stream) {
    return launch(mark_nonzero_kernel<T>, dim3(blocks_for(rows, kWarps)), kThreads, stream, dense, rows, columns, bits,
                  not_one);
}

template <typename T>
int count(const Emissions<T>& lists, int n_lists, Stream stream) {
    return launch(count_kernel<T>, grid_of(lists, n_lists), kThreads, stream, lists);
}

template <typename T>
int emit(const Emissions<T>& lists, int n_lists, Stream stream) {
    return launch(emit_kernel<T>, grid_of(lists, n_lists), kThreads, stream, lists);
}

template <typename T>
int totals(const Emissions<T>& lists, int n_lists, Stream stream) {
    return launch(totals_kernel<T>, dim3(1, static_cast<unsigned>(n_lists)), kThreads, stream, lists);
}

template <typename T>
int seal(const Emissions<T>& lists, int n_lists, Stream stream) {
    int64_t most = 1;  // a list without room may be too short as well
    for (int i = 0; i < n_lists; ++i) most = lists.list[i].capacity > most ? lists.list[i].capacity : most;
    return launch(seal_kernel<T>, dim3(blocks_for(most, kThreads)), kThreads, stream, lists, n_lists);
}

int locate(const Locations& lists, int n_lists, int64_t columns, Stream stream) {
    int64_t words = 0;
    for (int i = 0; i < n_lists; ++i) {
        const int64_t n = lists.list[i].n_rows * words_of(columns);
        words = n > words ? n : words;
    }
    return launch(locate_kernel, dim3(blocks_for(words, kThreads), static_cast<unsigned>(n_lists)), kThreads, stream,
                  lists, columns);
}

template <typename T>
int scatter(const Events<T>& events, int64_t rows, int64_t columns, T* dense, Stream stream) {
    return launch(scatter_kernel<T>, dim3(blocks_for(rows, kWarps)), kThreads, stream, events, rows, columns, dense);
}

template <typename T>
int sum_steps(const Events<T>& events, int64_t steps, int64_t rows_per_step, int64_t columns, T* sum, Stream stream) {
    return launch(sum_steps_kernel<T>, dim3(static_cast<unsigned>(rows_per_step), blocks_for(columns, kSumColumns)),
                  kThreads, stream, events, steps, rows_per_step, columns, sum);
}

template <typename T>
int gather(const T* dense, int64_t dense_rows, int64_t columns, const Rows& rows, int64_t n_rows, T* out,
           Stream stream) {
    return launch(gather_kernel<T>, dim3(blocks_for(n_rows, kThreads / kGatherLanes)), kThreads, stream, dense,
                  dense_rows, columns, rows, n_rows, out);
}

template int mark_nonzero(const float*, int64_t, int64_t, uint32_t*, int32_t*, Stream);
template int mark_nonzero(const double*, int64_t, int64_t, uint32_t*, int32_t*, Stream);
template int mark_nonzero(const Half*, int64_t, int64_t, uint32_t*, int32_t*, Stream);
template int mark_nonzero(const BFloat16*, int64_t, int64_t, uint32_t*, int32_t*, Stream);
template int mark_nonzero(const uint8_t*, int64_t, int64_t, uint32_t*, int32_t*, Stream);
#define SPARSE_BACKEND_INSTANTIATE(T)                      \
    template int count(const Emissions<T>&, int, Stream);  \
    template int totals(const Emissions<T>&, int, Stream); \
    template int emit(const Emissions<T>&, int, Stream);
SPARSE_BACKEND_INSTANTIATE(float)
SPARSE_BACKEND_INSTANTIATE(double)
SPARSE_BACKEND_INSTANTIATE(uint16_t)
#undef SPARSE_BACKEND_INSTANTIATE
#define SPARSE_BACKEND_INSTANTIATE(T)                                                \
    template int seal(const Emissions<T>&, int, Stream);                             \
    template int scatter(const Events<T>&, int64_t, int64_t, T*, Stream);            \
    template int sum_steps(const Events<T>&, int64_t, int64_t, int64_t, T*, Stream); \
    template int gather(const T*, int64_t, int64_t, const Rows&, int64_t, T*, Stream);
SPARSE_BACKEND_INSTANTIATE(float)
SPARSE_BACKEND_INSTANTIATE(double)
#undef SPARSE_BACKEND_INSTANTIATE

}  // namespace sparse_backend
