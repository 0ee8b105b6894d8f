// What events cost: rows of a transposed weight gathered for currents and for the input's gradient, rows of delta
// gathered for the weight's. Sums are taken in one order by one owner: no float atomics.
#include "device.cuh"

namespace sparse_backend {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kGroup = 16;  // lanes of 16 bytes that read 256 bytes of a row together
constexpr int kGroups = kThreads / kGroup;

template <typename T>
constexpr int kSlice = kGroup * Pack<T>::width;  // columns of one group

template <typename T, typename W>
constexpr int kPieces = Pack<W>::width / Pack<T>::width;  // packs of sums to a pack of weights

// to[c, r] = from[r, c], tile by tile through shared memory; columns of `to` past `rows` are zero.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    transpose_kernel(const T* from_, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, T* to_,
                     int64_t width) {
    __shared__ T tile[32][33];
    const Global<const T> from(from_);
    const Global<T> to(to_);
    const int x = lane_id(), y = static_cast<int>(threadIdx.x) / kLanes;
    const int64_t r0 = int64_t{blockIdx.x} * 32, c0 = int64_t{blockIdx.y} * 32;
    const bool by_rows = column_stride == 1;  // lanes run along whichever dimension lies together
    for (int k = y; k < 32; k += kWarps) {
        const int64_t r = r0 + (by_rows ? k : x), c = c0 + (by_rows ? x : k);
        const T value = r < rows && c < columns ? __ldg(&from[r * row_stride + c * column_stride]) : T(0);
        tile[by_rows ? k : x][by_rows ? x : k] = value;
    }
    __syncthreads();
    for (int k = y; k < 32; k += kWarps)
        if (c0 + k < columns && r0 + x < width) to[(c0 + k) * width + r0 + x] = tile[x][k];
}

// A group per row and slice of columns; blockIdx.y is the slice, so that all blocks in flight share one slice of the
// weight, which then stays in the first-level caches.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 4)
    currents_kernel(const Events<T> input, int64_t first, int64_t rows, const Weight<W> weight, const T* bias_,
                    int64_t neurons, T* current_, bool aligned) {
    constexpr int kAhead = 4;
    using P = Pack<T>;
    const int64_t row = int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup;
    const int64_t column = int64_t{blockIdx.y} * kSlice<W> + threadIdx.x % kGroup * Pack<W>::width;
    if (row >= rows || column >= neurons) return;
    const Global<const int32_t> row_ptr(input.row_ptr), indices(input.indices);
    const Global<const T> values(input.values);
    const Global<const W> w = in(weight.data) + column;
    P sum[kPieces<T, W>] = {};
#pragma unroll
    for (int h = 0; h < kPieces<T, W>; ++h) {
        const int64_t at = column + h * P::width;
        if (bias_ != nullptr) sum[h] = load_part<T>(in(bias_), at, neurons - at);
    }
    const int32_t end = __ldg(&row_ptr[first + row + 1]);
    for (int32_t e0 = __ldg(&row_ptr[first + row]); e0 < end; e0 += kAhead) {
        Pack<W> part[kAhead];
        T value[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            // Past the end the first row again, not added: behind a branch each row would wait for an index of its own.
            const int32_t e = e0 + k < end ? e0 + k : e0;
            part[k] = load_pack<W>(w, __ldg(&indices[e]) * weight.stride);
            value[k] = values ? __ldg(&values[e]) : T(1);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (e0 + k >= end) continue;
#pragma unroll
            for (int i = 0; i < Pack<W>::width; ++i)
                sum[i / P::width].v[i % P::width] += value[k] * widen(part[k].v[i]);
        }
    }
#pragma unroll
    for (int h = 0; h < kPieces<T, W>; ++h) {
        const int64_t at = column + h * P::width;
        store_some<T>(out(current_), row * neurons + at, neurons - at, aligned, sum[h]);
    }
}

// A group per row: for each of its entries, the dot product of a weight row with delta's.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 4)
    input_gradient_kernel(const T* delta_, int64_t neurons, const Weight<W> weight, const Rows wanted, int64_t first,
                          int64_t rows, T* grad_, bool aligned) {
    constexpr int kAtOnce = 2;
    using P = Pack<T>;
    const int64_t row = int64_t{blockIdx.x} * kGroups + threadIdx.x / kGroup;
    if (row >= rows) return;
    const int lane = static_cast<int>(threadIdx.x) % kGroup;
    const Global<const int32_t> row_ptr(wanted.row_ptr), indices(wanted.indices);
    const Global<const T> delta = in(delta_) + row * neurons;
    const Global<const W> w = in(weight.data);
    const Global<T> grad(grad_);
    const int32_t origin = __ldg(&row_ptr[0]), end = __ldg(&row_ptr[first + row + 1]);
    for (int32_t e0 = __ldg(&row_ptr[first + row]); e0 < end; e0 += kAtOnce) {
        int64_t at[kAtOnce];
        T sum[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            at[k] = __ldg(&indices[e0 + k < end ? e0 + k : e0]) * weight.stride;
            sum[k] = T(0);
        }
        for (int64_t column = lane * Pack<W>::width; column < neurons; column += kSlice<W>) {
            const int64_t left = neurons - column;  // the padding of a weight is never looked at
            P d[kPieces<T, W>];
#pragma unroll
            for (int h = 0; h < kPieces<T, W>; ++h)
                d[h] = load_some<T>(delta, column + h * P::width, left - h * P::width, aligned);
            Pack<W> part[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) part[k] = load_some<W>(w, at[k] + column, left, true);
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
                for (int i = 0; i < Pack<W>::width; ++i)
                    sum[k] += widen(part[k].v[i]) * d[i / P::width].v[i % P::width];
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const T total = sum_of_16(sum[k]);
            if (lane == 0 && e0 + k < end) grad[e0 + k - origin] = total;
        }
    }
}

constexpr int kTile = 1024;  // columns whose bits a block gathers in shared memory

// A block per 256 rows, a warp per 32 of them: for every column one word of the rows in which it has an event.
__global__ void __launch_bounds__(kThreads, 4)
    transpose_bits_kernel(const Rows events, int64_t first, int64_t rows, int64_t columns, uint32_t* bits_) {
    __shared__ uint32_t found[kWarps][kTile + 4];  // so that eight rows of four columns lie in 32 banks
    const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kLanes;
    const int64_t segments = segments_of(rows), c0 = int64_t{blockIdx.y} * kTile;
    for (int j = lane; j < kTile; j += kLanes) found[warp][j] = 0;
    __syncwarp();
    const Global<const int32_t> row_ptr(events.row_ptr), indices(events.indices);
    const int64_t r0 = (int64_t{blockIdx.x} * kWarps + warp) * 32;
    if (r0 < rows) {
        const int64_t mine = r0 + lane < rows ? r0 + lane : rows;
        const int32_t begins = __ldg(&row_ptr[first + mine]);  // lane r: where row r0 + r begins
        const int64_t last = r0 + 32 < rows ? r0 + 32 : rows;
        const int32_t end = __ldg(&row_ptr[first + last]), begin = __shfl_sync(kWarp, begins, 0);
        for (int32_t e0 = begin; e0 < end; e0 += kLanes) {
            const int32_t e = e0 + lane;
            int row = 0;  // the last row that does not begin after e
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                const int32_t other = __shfl_sync(kWarp, begins, row + step);
                if (other <= e) row += step;
            }
            if (e >= end) continue;
            const int64_t j = __ldg(&indices[e]) - c0;
            if (j >= 0 && j < kTile) atomicOr(&found[warp][j], 1u << row);
        }
    }
    __syncthreads();
    // Eight words of one column lie together: 32 bytes written by eight lanes.
    const Global<uint32_t> bits(bits_);
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kWarps; i += kThreads) {
        const int64_t column = c0 + i / kWarps;
        if (column >= columns) break;
        bits[column * segments + int64_t{blockIdx.x} * kWarps + i % kWarps] = found[i % kWarps][i / kWarps];
    }
}

constexpr int kGradThreads = 128;
constexpr int kGradWarps = kGradThreads / kLanes;

template <typename T>
__device__ __forceinline__ T value_at(const Events<T>& input, int64_t row, int64_t column) {
    const Global<const int32_t> row_ptr(input.row_ptr), indices(input.indices);
    int32_t begin = __ldg(&row_ptr[row]), end = __ldg(&row_ptr[row + 1]) - 1;  // it is there
    while (begin < end) {
        const int32_t middle = begin + (end - begin) / 2;
        if (__ldg(&indices[middle]) < column)
            begin = middle + 1;
        else
            end = middle;
    }
    return __ldg(&in(input.values)[begin]);
}

// A warp per input and slice of columns. It turns 1024 rows' bits into a list in shared memory; its halves take every
// other row of it and add up their 256 bytes of delta in registers.
template <typename T>
__global__ void __launch_bounds__(kGradThreads, 8)
    weight_gradient_kernel(const Events<T> input, const uint32_t* bits_, int64_t first, int64_t rows, int64_t inputs,
                           const T* delta_, int64_t neurons, T* sums_, int64_t width, int64_t per_part, bool aligned) {
    constexpr int kAhead = 4;
    using P = Pack<T>;
    __shared__ uint16_t lists[kGradWarps][1024];
    const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = lane_id(), half = lane / kGroup;
    const int64_t i = int64_t{blockIdx.x} * kGradWarps + warp;
    if (i >= inputs) return;
    const int64_t column = int64_t{blockIdx.y} * kSlice<T> + lane % kGroup * P::width, left = neurons - column;
    uint16_t* const list = lists[warp];
    const int64_t segments = segments_of(rows), begin = int64_t{blockIdx.z} * per_part;
    const int64_t end = begin + per_part < segments ? begin + per_part : segments;
    const Global<const uint32_t> bits = in(bits_) + i * segments;
    const Global<const T> delta(delta_);
    P sum{};
    const auto fetch = [&](int64_t s) { return s + lane < end ? __ldg(&bits[s + lane]) : 0u; };
    uint32_t next = fetch(begin);
    for (int64_t s0 = begin; s0 < end; s0 += kLanes) {
        uint32_t word = next;
        next = fetch(s0 + kLanes);
        int total;
        int at = sum_before(__popc(word), total);
        for (; word != 0; word &= word - 1)
            list[at++] = static_cast<uint16_t>(lane * 32 + __ffs(static_cast<int>(word)) - 1);
        __syncwarp();
        if (left > 0) {
            for (int k0 = half; k0 < total; k0 += 2 * kAhead) {
                P part[kAhead];
                T value[kAhead];
#pragma unroll
                for (int k = 0; k < kAhead; ++k) {
                    if (k0 + 2 * k >= total) continue;
                    const int64_t row = s0 * 32 + list[k0 + 2 * k];
                    part[k] = load_some<T>(delta, row * neurons + column, left, aligned);
                    value[k] = input.values != nullptr ? value_at(input, first + row, i) : T(1);
                }
#pragma unroll
                for (int k = 0; k < kAhead; ++k) {
                    if (k0 + 2 * k >= total) continue;
#pragma unroll
                    for (int c = 0; c < P::width; ++c) sum.v[c] += value[k] * part[k].v[c];
                }
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int c = 0; c < P::width; ++c) sum.v[c] += __shfl_xor_sync(kWarp, sum.v[c], kGroup);
    if (half == 0 && left > 0) {
        const Global<T> sums = out(sums_) + (int64_t{blockIdx.z} * inputs + i) * width + column;
#pragma unroll
        for (int c = 0; c < P::width; ++c)
            if (c < left) sums[c] += sum.v[c];
    }
}

// grad[j, i] = sum over parts of sums[z, i, j]
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    deliver_kernel(const T* sums_, int64_t parts, int64_t inputs, int64_t neurons, int64_t width, T* grad_) {
    __shared__ T tile[32][33];
    const Global<const T> sums(sums_);
    const int x = lane_id(), y = static_cast<int>(threadIdx.x) / kLanes;
    const int64_t i0 = int64_t{blockIdx.x} * 32, j0 = int64_t{blockIdx.y} * 32;
    for (int k = y; k < 32; k += kWarps) {
        T sum = T(0);
        if (i0 + k < inputs && j0 + x < neurons)
            for (int64_t z = 0; z < parts; ++z) sum += __ldg(&sums[(z * inputs + i0 + k) * width + j0 + x]);
        tile[k][x] = sum;
    }
    __syncthreads();
    for (int k = y; k < 32; k += kWarps)
        if (j0 + k < neurons && i0 + x < inputs) out(grad_)[(j0 + k) * inputs + i0 + x] = tile[x][k];
}

// A block per 32 columns and block of rows: its warps take every kWarps-th row and are added up in order.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    sum_rows_kernel(const T* from_, int64_t rows, int64_t columns, int64_t per_block, T* to_, bool add) {
    __shared__ T sums[kWarps][kLanes];
    const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kLanes;
    const int64_t j = int64_t{blockIdx.x} * kLanes + lane, begin = int64_t{blockIdx.y} * per_block;
    const int64_t end = begin + per_block < rows ? begin + per_block : rows;
    const Global<const T> from(from_);
    T sum = T(0);
    if (j < columns) {
#pragma unroll 4
        for (int64_t r = begin + warp; r < end; r += kWarps) sum += __ldg(&from[r * columns + j]);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || j >= columns) return;
    T total = T(0);
#pragma unroll
    for (int k = 0; k < kWarps; ++k) total += sums[k][lane];
    const Global<T> to(to_);
    const int64_t at = int64_t{blockIdx.y} * columns + j;
    to[at] = add ? to[at] + total : total;
}

template <typename T>
bool aligned_rows(const T* data, int64_t columns) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % Pack<T>::width == 0;
}

// Calls run(weight) with the type its numbers are stored in.
template <typename T, typename Run>
int with_storage(const StoredWeight& weight, Run&& run) {
    const auto as = [&](auto number) {
        using W = decltype(number);
        return run(Weight<W>{static_cast<const W*>(weight.data), weight.stride});
    };
    if constexpr (std::is_same_v<T, float>) {
        if (weight.storage == Storage::kHalf) return as(Half{});
        if (weight.storage == Storage::kBFloat16) return as(BFloat16{});
    }
    return as(T{});
}

}  // namespace

template <typename T>
int transpose(const T* from, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, T* to,
              Stream stream) {
    const int64_t width = padded(rows);
    return launch(transpose_kernel<T>, dim3(blocks_for(width, 32), blocks_for(columns, 32)), kThreads, stream, from,
                  rows, columns, row_stride, column_stride, to, width);
}

template <typename T>
int currents(const Events<T>& input, int64_t first, int64_t rows, const StoredWeight& weight, const T* bias,
             int64_t neurons, T* current, Stream stream) {
    return with_storage<T>(weight, [&](const auto& w) {
        using W = std::decay_t<decltype(*w.data)>;
        return launch(currents_kernel<T, W>, dim3(blocks_for(rows, kGroups), blocks_for(neurons, kSlice<W>)), kThreads,
                      stream, input, first, rows, w, bias, neurons, current, aligned_rows(current, neurons));
    });
}

template <typename T>
int input_gradient(const T* delta, int64_t neurons, const StoredWeight& weight, const Rows& wanted, int64_t first,
                   int64_t rows, T* grad, Stream stream) {
    return with_storage<T>(weight, [&](const auto& w) {
        using W = std::decay_t<decltype(*w.data)>;
        return launch(input_gradient_kernel<T, W>, dim3(blocks_for(rows, kGroups)), kThreads, stream, delta, neurons, w,
                      wanted, first, rows, grad, aligned_rows(delta, neurons));
    });
}

int transpose_bits(const Rows& events, int64_t first, int64_t rows, int64_t columns, uint32_t* bits, Stream stream) {
    return launch(transpose_bits_kernel, dim3(blocks_for(rows, 32 * kWarps), blocks_for(columns, kTile)), kThreads,
                  stream, events, first, rows, columns, bits);
}

template <typename T>
int weight_gradient(const Events<T>& input, const uint32_t* bits, int64_t first, int64_t rows, int64_t inputs,
                    const T* delta, int64_t neurons, T* sums, int64_t parts, Stream stream) {
    const int64_t words = (segments_of(rows) + kLanes - 1) / kLanes;  // 1024 rows are never cut
    const int64_t per_part = (words + parts - 1) / parts * kLanes;
    const dim3 grid(blocks_for(inputs, kGradWarps), blocks_for(neurons, kSlice<T>), static_cast<unsigned>(parts));
    return launch(weight_gradient_kernel<T>, grid, kGradThreads, stream, input, bits, first, rows, inputs, delta,
                  neurons, sums, padded(neurons), per_part, aligned_rows(delta, neurons));
}

template <typename T>
int deliver_weight(const T* sums, int64_t parts, int64_t inputs, int64_t neurons, T* grad, Stream stream) {
    return launch(deliver_kernel<T>, dim3(blocks_for(inputs, 32), blocks_for(neurons, 32)), kThreads, stream, sums,
                  parts, inputs, neurons, padded(neurons), grad);
}

template <typename T>
int sum_rows(const T* from, int64_t rows, int64_t columns, int64_t blocks, T* to, bool add, Stream stream) {
    return launch(sum_rows_kernel<T>, dim3(blocks_for(columns, kLanes), static_cast<unsigned>(blocks)), kThreads,
                  stream, from, rows, columns, (rows + blocks - 1) / blocks, to, add);
}

template int transpose(const float*, int64_t, int64_t, int64_t, int64_t, float*, Stream);
template int transpose(const double*, int64_t, int64_t, int64_t, int64_t, double*, Stream);
template int transpose(const uint16_t*, int64_t, int64_t, int64_t, int64_t, uint16_t*, Stream);
#define SPARSE_BACKEND_INSTANTIATE(T)                                                                                 \
    template int currents(const Events<T>&, int64_t, int64_t, const StoredWeight&, const T*, int64_t, T*, Stream);    \
    template int input_gradient(const T*, int64_t, const StoredWeight&, const Rows&, int64_t, int64_t, T*, Stream);   \
    template int weight_gradient(const Events<T>&, const uint32_t*, int64_t, int64_t, int64_t, const T*, int64_t, T*, \
                                 int64_t, Stream);                                                                    \
    template int deliver_weight(const T*, int64_t, int64_t, int64_t, T*, Stream);                                     \
    template int sum_rows(const T*, int64_t, int64_t, int64_t, T*, bool, Stream);
SPARSE_BACKEND_INSTANTIATE(float)
SPARSE_BACKEND_INSTANTIATE(double)
#undef SPARSE_BACKEND_INSTANTIATE

}  // namespace sparse_backend
