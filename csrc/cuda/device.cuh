// Words of every kernel: lanes, 16-byte loads, launches. No torch headers here or in any .cu file.
//
// Kernels reach global memory through `Global`, a plain pointer here; tests/emulation has one that checks its bounds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "launch.h"

namespace sparse_backend {

#ifndef SPARSE_BACKEND_EMULATION
template <typename T>
using Global = T*;

template <typename T>
__device__ __forceinline__ T* span(T* from, int64_t at, int) {
    return from + at;
}

// What every thread stores which stores there at all.
__device__ __forceinline__ void store_same(int32_t* to, int32_t value) {
    *to = value;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}
#endif

template <typename T>
__device__ __forceinline__ Global<const T> in(const T* data) {
    return Global<const T>(data);
}
template <typename T>
__device__ __forceinline__ Global<T> out(T* data) {
    return Global<T>(data);
}

constexpr int kLanes = 32;
constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() {  // blocks are one-dimensional
    return static_cast<int>(threadIdx.x % kLanes);
}

__device__ __forceinline__ unsigned below(int lane) {  // the lanes before this one
    return (1u << lane) - 1u;
}

// A number as it is calculated with.
template <typename T>
__device__ __forceinline__ T widen(T number) {
    return number;
}
__device__ __forceinline__ float widen(Half number) {
    return half_to_float(number.bits);
}
__device__ __forceinline__ float widen(BFloat16 number) {
    const uint32_t bits = uint32_t{number.bits} << 16;
    float widened;
    __builtin_memcpy(&widened, &bits, sizeof bits);
    return widened;
}

// What no kernel writes meanwhile.
template <typename T>
__device__ __forceinline__ T load(const T* from) {
    return __ldg(from);
}
__device__ __forceinline__ Half load(const Half* from) {
    return {__ldg(&from->bits)};
}
__device__ __forceinline__ BFloat16 load(const BFloat16* from) {
    return {__ldg(&from->bits)};
}

// What one thread loads at once.
template <typename T>
struct Pack {
    static constexpr int width = 16 / static_cast<int>(sizeof(T));
    T v[width];
};

// 16 bytes that no kernel writes meanwhile, aligned.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(Global<const T> from, int64_t at) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(span(from, at, Pack<T>::width)));
    Pack<T> out;
    __builtin_memcpy(&out, &bits, sizeof bits);
    return out;
}

// The first n entries, the others zero; whatever lies behind is not read.
template <typename T>
__device__ __forceinline__ Pack<T> load_part(Global<const T> from, int64_t at, int64_t n) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < Pack<T>::width; ++k) out.v[k] = k < n ? load(&from[at + k]) : T{};
    return out;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_some(Global<const T> from, int64_t at, int64_t n, bool aligned) {
    return aligned && n >= Pack<T>::width ? load_pack<T>(from, at) : load_part<T>(from, at, n);
}

template <typename T>
__device__ __forceinline__ void store_some(Global<T> to, int64_t at, int64_t n, bool aligned, const Pack<T>& pack) {
    if (aligned && n >= Pack<T>::width) {
        uint4 bits;
        __builtin_memcpy(&bits, &pack, sizeof bits);
        __stcg(reinterpret_cast<uint4*>(span(to, at, Pack<T>::width)), bits);
    } else {
#pragma unroll
        for (int k = 0; k < Pack<T>::width; ++k)
            if (k < n) to[at + k] = pack.v[k];
    }
}

// Sum of a warp's integers before each lane; `total` is that of all.
__device__ __forceinline__ int sum_before(int value, int& total) {
    const int lane = lane_id();
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
        const int other = __shfl_up_sync(kWarp, sum, distance);
        if (lane >= distance) sum += other;
    }
    total = __shfl_sync(kWarp, sum, kLanes - 1);
    return sum - value;
}

// Sum over 16 lanes, in one order; both halves of a warp may do it on their own.
template <typename T>
__device__ __forceinline__ T sum_of_16(T value) {
    const unsigned half = 0xffffu << (lane_id() & 16);
#pragma unroll
    for (int bits = 8; bits > 0; bits /= 2) value += __shfl_xor_sync(half, value, bits);
    return value;
}

// Launches on a stream; nothing where there is nothing to do. Returns a cudaError_t, as all launchers do.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments&&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace sparse_backend
