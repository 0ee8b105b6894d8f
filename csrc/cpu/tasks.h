// Tasks of the CPU ops and what becomes of their results: lists joined, sums added up and delivered.
#pragma once

#include "sparse_backend/rows.h"
#include "tensors.h"

namespace sparse_backend {

using torch::stable::parallel_for;

constexpr int64_t kWeightColumns = 128;  // delta of a row in half the registers

// An aggregate of these members, which formatters write on fewer lines than one each.
template <typename Aggregate, typename... Members>
Aggregate make(const Members&... members) {
    return Aggregate{members...};
}

// Events of all rows.
struct Lists {
    Tensor row_ptr, indices;
};

// Joins the tasks' lists: rows in order, and within a row the blocks of columns in order.
template <typename T, typename List>
void join(const Tiling& tiling, int64_t steps, const int32_t* counts, const int32_t* row_ptr, List&& list_of, T* out) {
    const int64_t n_rows = steps * tiling.batch;
    parallel_for(0, tiling.tasks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Block block = tiling.task(i);
            const int64_t k = i / tiling.groups;
            const T* from = list_of(i);
            for (int64_t t = 0; t < steps; ++t) {
                const int64_t first = t * tiling.batch + block.first_sample,
                              last = t * tiling.batch + block.last_sample;
                if (tiling.blocks == 1) {
                    const int64_t n = row_ptr[last] - row_ptr[first];
                    if (n > 0) std::memcpy(out + row_ptr[first], from, static_cast<size_t>(n) * sizeof(T));
                    from += n;
                    continue;
                }
                for (int64_t row = first; row < last; ++row) {
                    int64_t at = row_ptr[row];
                    for (int64_t other = 0; other < k; ++other) at += counts[other * n_rows + row];
                    const int64_t n = counts[k * n_rows + row];
                    if (n > 0) std::memcpy(out + at, from, static_cast<size_t>(n) * sizeof(T));
                    from += n;
                }
            }
        }
    });
}

// The joined lists of indices. counts: [blocks, steps * B] entries of every row.
template <typename List>
Lists join_lists(const Tensor& like, const Tiling& tiling, int64_t steps, const int32_t* counts, List&& list_of) {
    Lists out{empty_ints(like, steps * tiling.batch + 1), empty_ints(like, 0)};
    int32_t* row_ptr = output<int32_t>(out.row_ptr);
    out.indices = empty_ints(like, prefix(counts, tiling.blocks, steps * tiling.batch, row_ptr));
    join<int32_t>(tiling, steps, counts, row_ptr, list_of, output<int32_t>(out.indices));
    return out;
}

// Values found beside joined lists.
template <typename T, typename List>
Tensor join_values(const Tensor& like, const Tiling& tiling, int64_t steps, const int32_t* counts, const Lists& lists,
                   List&& list_of) {
    Tensor out = empty(like, {lists.indices.numel()});
    join<T>(tiling, steps, counts, output<int32_t>(lists.row_ptr), list_of, output<T>(out));
    return out;
}

// A bias [N] as padded(N) entries, nothing if there is none.
template <typename T>
std::vector<T> padded_bias(const MaybeTensor& bias, int64_t neurons) {
    return bias.has_value() ? per_neuron<T>(*bias, neurons, T(0), "bias") : std::vector<T>();
}

// Sums per group of samples, added up in the order of the groups.
template <typename T>
class GroupSums {
  public:
    GroupSums(bool wanted, int64_t groups, int64_t neurons)
        : wanted_(wanted), groups_(groups), width_(padded(neurons)), sums_(wanted ? groups * padded(neurons) : 0) {}
    T* of(int64_t group) { return wanted_ ? sums_.get() + group * width_ : nullptr; }
    Tensor total(const Tensor& like, int64_t neurons) {
        Tensor out = empty(like, {wanted_ ? neurons : 0});
        for (int64_t j = 0; wanted_ && j < neurons; ++j) {
            T sum = T(0);
            for (int64_t k = 0; k < groups_; ++k) sum += sums_.get()[k * width_ + j];
            output<T>(out)[j] = sum;
        }
        return out;
    }

  private:
    bool wanted_;
    int64_t groups_, width_;
    Scratch<T> sums_;
};

// One of `count` equal ranges.
struct Share {
    int64_t index, count;
    Span of(int64_t n) const {
        const int64_t each = (n + count - 1) / count;
        return {std::min(index * each, n), std::min((index + 1) * each, n)};
    }
};

// Tasks of a weight gradient: blocks of columns, and ranges of inputs as far as there are threads to feed. Every sum
// belongs to one task and is added up in one order, so neither matters to the result. run(columns, share)
template <typename Run>
void for_weight_tasks(const Tiling& tiling, int64_t inputs, int64_t events, Run&& run) {
    const int64_t threads = events * tiling.neurons < kWorthAThread ? 1 : torch::stable::get_num_threads();
    const int64_t ranges =
        std::clamp<int64_t>((threads + tiling.blocks - 1) / tiling.blocks, 1, std::max<int64_t>(inputs, 1));
    parallel_for(0, tiling.blocks * ranges, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run(tiling.columns(i / ranges), Share{i % ranges, ranges});
    });
}

// The sums of a weight gradient and their delivery as [N, M]. A row per input, [M, width] for each block of columns, or
// a row per neuron, [N, padded(M)]. Blocks lie apart: cores must not share neighbouring cache lines.
template <typename T>
class WeightSums {
  public:
    WeightSums(bool need_weight, bool need_bias, int64_t inputs, const Tiling& tiling, bool row_per_input)
        : inputs_(inputs),
          tiling_(tiling),
          row_per_input_(row_per_input),
          need_weight_(need_weight),
          need_bias_(need_bias),
          weight_(!need_weight    ? 0
                  : row_per_input ? tiling.blocks * inputs * tiling.width
                                  : tiling.neurons * padded(inputs)),
          bias_(need_bias ? padded(tiling.neurons) : 0) {}
    int64_t stride() const { return row_per_input_ ? tiling_.width : padded(inputs_); }
    // Where row 0 of all columns would begin, for the block that starts at `first_column`.
    T* weight(int64_t first_column) {
        if (!need_weight_) return nullptr;
        return row_per_input_ ? weight_.get() + first_column * inputs_ - first_column : weight_.get();
    }
    T* bias() { return need_bias_ ? bias_.get() : nullptr; }
    T* bias(const Share& share) { return share.index == 0 ? bias() : nullptr; }  // of the share that adds it up
    Tensor weight_grad(const Tensor& like) {
        if (!need_weight_) return empty(like, {0});
        const int64_t neurons = tiling_.neurons;
        Tensor out = empty(like, {neurons, inputs_});
        T* to = output<T>(out);
        for (int64_t k = 0; row_per_input_ && k < tiling_.blocks; ++k) {
            const int64_t first = k * tiling_.width, columns = std::min(tiling_.width, neurons - first);
            if (columns > 0)
                transpose<T>(weight(first) + first, inputs_, columns, stride(), 1, to + first * inputs_, inputs_);
        }
        for (int64_t j = 0; !row_per_input_ && inputs_ > 0 && j < neurons; ++j)
            std::memcpy(to + j * inputs_, weight_.get() + j * stride(), static_cast<size_t>(inputs_) * sizeof(T));
        return out;
    }
    Tensor bias_grad(const Tensor& like) {
        Tensor out = empty(like, {need_bias_ ? tiling_.neurons : 0});
        if (need_bias_ && tiling_.neurons > 0)
            std::memcpy(output<T>(out), bias_.get(), static_cast<size_t>(tiling_.neurons) * sizeof(T));
        return out;
    }

  private:
    int64_t inputs_;
    Tiling tiling_;
    bool row_per_input_, need_weight_, need_bias_;
    Scratch<T> weight_, bias_;
};

}  // namespace sparse_backend
