// Sums of delta that every backward ends in: over samples, over rows, and over the events of each input.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace sparse_backend {

// The sum over samples of [B, N], or what stands for a gradient that nobody asked for.
template <typename T>
Tensor over_samples(const Device& on, const Tensor& sums, bool wanted) {
    if (!wanted) return on.make<T>({0});
    const int64_t batch = sums.size(0), neurons = sums.size(1);
    Tensor out = on.zeros<T>({neurons});
    if (batch > 0) on.check(sum_rows(on.write<T>(sums), batch, neurons, 1, on.write<T>(out), false, on.stream()));
    return out;
}

// Adds the column sums of delta [rows, neurons] to `to` [neurons].
template <typename T>
void add_rows(const Device& on, const T* delta, int64_t n_rows, int64_t neurons, T* to) {
    if (n_rows * neurons == 0) return;
    const int64_t blocks = std::clamp<int64_t>(n_rows / 256, 1, 128);
    if (blocks == 1) return on.check(sum_rows(delta, n_rows, neurons, blocks, to, true, on.stream()));
    Tensor parts = on.make<T>({blocks, neurons});
    on.check(sum_rows(delta, n_rows, neurons, blocks, on.write<T>(parts), false, on.stream()));
    on.check(sum_rows(on.write<T>(parts), blocks, neurons, int64_t{1}, to, true, on.stream()));
}

// delta [R, N] x weight [N, M], a product in the weight's dtype: what goes to an input of 16 bits has no more.
inline Tensor dense_input_gradient(const Tensor& delta, const Tensor& weight) {
    const ScalarType type = weight.scalar_type();
    return torch::stable::matmul(delta.scalar_type() == type ? delta : torch::stable::to(delta, type), weight);
}

// The weight's gradient, gathered over blocks of rows of delta.
template <typename T>
class WeightGradient {
  public:
    // into: [inputs, padded(neurons)] sums to add to; or sums of its own, which `deliver` hands over
    WeightGradient(const Device& on, bool wanted, const Events<T>& input, int64_t inputs, int64_t neurons,
                   int64_t most_rows, const MaybeTensor& into = {})
        : on_(on), wanted_(wanted && inputs * neurons > 0), input_(input), inputs_(inputs), neurons_(neurons) {
        if (!wanted_) return;
        // Few inputs are cut into parts of the rows, so that enough warps run; by sizes alone, for the same sums.
        const int64_t warps = inputs * ((neurons * static_cast<int64_t>(sizeof(T)) + 255) / 256);
        parts_ = into ? 1 : std::clamp<int64_t>(8192 / warps, 1, std::clamp<int64_t>(most_rows / 4096, 1, 16));
        sums_ = into ? into : on.zeros<T>({parts_, inputs, padded(neurons)});
        at_once_ = std::max<int64_t>((kMostBits / inputs) / 1024 * 1024, 1024);
        bits_ = on.ints({inputs, segments_of(std::min(most_rows, at_once_))});
    }
    void add(int64_t first, int64_t n_rows, const T* delta) {
        if (!wanted_) return;
        auto* const bits = reinterpret_cast<uint32_t*>(on_.write<int32_t>(*bits_));
        for (int64_t done = 0; done < n_rows; done += at_once_) {
            const int64_t here = std::min(at_once_, n_rows - done);
            on_.check(transpose_bits(input_, first + done, here, inputs_, bits, on_.stream()));
            on_.check(weight_gradient(input_, bits, first + done, here, inputs_, delta + done * neurons_, neurons_,
                                      on_.write<T>(*sums_), parts_, on_.stream()));
        }
    }
    Tensor deliver(bool need_weight) {
        if (!need_weight) return on_.make<T>({0});
        Tensor grad = on_.make<T>({neurons_, inputs_});
        if (wanted_)
            on_.check(
                deliver_weight(on_.write<T>(*sums_), parts_, inputs_, neurons_, on_.write<T>(grad), on_.stream()));
        return grad;
    }

  private:
    static constexpr int64_t kMostBits = int64_t{1} << 27;  // 16 MB, however many inputs there are

    const Device& on_;
    bool wanted_;
    Events<T> input_;
    int64_t inputs_, neurons_, parts_ = 1, at_once_ = 0;
    MaybeTensor sums_, bits_;
};

}  // namespace sparse_backend
