// What walks over steps share: a thread per neuron of a sample, a warp per word of 32 of them.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace sparse_backend {

constexpr int kScanThreads = 64;  // small blocks spread few samples over all multiprocessors

// A parameter's entry; 0 where the neuron has no such parameter.
template <typename T>
__device__ __forceinline__ T of_neuron(const PerNeuron<T>& parameter, int64_t j) {
    return parameter.data == nullptr ? T(0) : __ldg(&in(parameter.data)[j * parameter.stride]);
}

// The neuron that a thread walks.
struct Place {
    int64_t sample, word;  // word: of a row's bits
    int64_t j, at;         // at: in [B, N]
    bool in_batch, real;   // whether the sample exists, and the neuron

    template <typename Scan>
    __device__ __forceinline__ explicit Place(const Scan& a) {
        const int64_t words = words_of(a.neurons);
        const int64_t warp = (int64_t{blockIdx.x} * kScanThreads + threadIdx.x) / kLanes;
        sample = warp / words, word = warp - sample * words;
        j = word * kLanes + lane_id(), at = sample * a.neurons + j;
        in_batch = sample < a.batch, real = j < a.neurons;
    }
};

// Takes away a stream that few networks have; says whether there was one.
template <typename T>
SPARSE_BACKEND_BOTH bool take(T*& stream) {
    const bool had = stream != nullptr;
    stream = nullptr;
    return had;
}

// A scan has `strip`, which takes all of these and says whether there were any. Calls run(usual), true at compile time
// where there are none: that spares up to a half of the instructions of a step, of which there are few enough for it to
// show.
template <typename Scan, typename Run>
int with_usual(Scan scan, Run&& run) {
    return strip(scan) ? run(std::false_type()) : run(std::true_type());
}

template <bool USUAL, typename Scan>
__device__ __forceinline__ Scan known(Scan scan) {
    if (USUAL) strip(scan);
    return scan;
}

template <typename Scan>
dim3 scan_grid(const Scan& a) {
    return dim3(blocks_for(a.batch * words_of(a.neurons) * kLanes, kScanThreads));
}

}  // namespace sparse_backend
