// Tasks of the CPU ops and what becomes of their results: lists joined, sums added up and delivered.
#pragma once

#include "sparse_backend/walks.h"
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
        Tensor out = empty_if(wanted_, like, {neurons});
        T* const to = output<T>(out);
        for (int64_t j = 0; wanted_ && j < neurons; ++j) {
            T sum = T(0);
            for (int64_t k = 0; k < groups_; ++k) sum += sums_.get()[k * width_ + j];
            to[j] = sum;
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
    Span of(int64_t n) const { return {index * n / count, (index + 1) * n / count}; }
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

// [M, `stride`], sums of a weight gradient with a row per input, as columns `first` to `first + columns` of [N, M].
template <typename T>
void deliver(const T* from, int64_t inputs, int64_t stride, int64_t first, int64_t columns, const Tensor& grad) {
    if (columns > 0) transpose<T>(from, inputs, columns, stride, 1, output<T>(grad) + first * inputs, inputs);
}

// The sums of a weight gradient, a row per input, [M, width] for each block of columns, and their delivery as [N, M].
// Blocks lie apart: cores must not share neighbouring cache lines.
template <typename T>
class WeightSums {
  public:
    WeightSums(bool need_weight, bool need_bias, int64_t inputs, const Tiling& tiling)
        : inputs_(inputs),
          tiling_(tiling),
          need_weight_(need_weight),
          need_bias_(need_bias),
          weight_(need_weight ? tiling.blocks * inputs * tiling.width : 0),
          bias_(need_bias ? padded(tiling.neurons) : 0) {}
    int64_t stride() const { return tiling_.width; }
    // Where row 0 of all columns would begin, for the block that starts at `first_column`.
    T* weight(int64_t first_column) {
        return need_weight_ ? weight_.get() + first_column * inputs_ - first_column : nullptr;
    }
    // For the share that adds it up.
    T* bias(const Share& share) { return need_bias_ && share.index == 0 ? bias_.get() : nullptr; }
    Tensor weight_grad(const Tensor& like) {
        Tensor out = empty_if(need_weight_, like, {tiling_.neurons, inputs_});
        for (int64_t k = 0; need_weight_ && k < tiling_.blocks; ++k) {
            const int64_t first = k * tiling_.width;
            deliver(weight(first) + first, inputs_, stride(), first, std::min(tiling_.width, tiling_.neurons - first),
                    out);
        }
        return out;
    }
    Tensor bias_grad(const Tensor& like) {
        Tensor out = empty_if(need_bias_, like, {tiling_.neurons});
        if (need_bias_ && tiling_.neurons > 0)
            std::memcpy(output<T>(out), bias_.get(), static_cast<size_t>(tiling_.neurons) * sizeof(T));
        return out;
    }

  private:
    int64_t inputs_;
    Tiling tiling_;
    bool need_weight_, need_bias_;
    Scratch<T> weight_, bias_;
};

// run(share, group) for all groups of samples, which tasks take in shares, one group after the other.
template <typename Run>
void for_shares(int64_t shares, int64_t groups, Run&& run) {
    parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        for (int64_t share = begin; share < end; ++share) {
            const Span span = Share{share, shares}.of(groups);
            for (int64_t group = span.begin; group < span.end; ++group) run(share, group);
        }
    });
}

// The sums of a weight gradient so small that several shares of the samples may have one each, [M, padded(N)], and one
// walk serves them and whatever else is wanted. How many shares there are depends on sizes alone.
template <typename T>
class SharedSums {
  public:
    // Shares for weights of this many inputs together. 0 where there would be few because their sums are large, or cost
    // more than another walk over the rows.
    static int64_t shares_for(int64_t inputs, int64_t neurons, int64_t steps, int64_t batch) {
        constexpr int64_t most_entries = 1 << 18, fewest = 4;
        const int64_t group = Tiling::fixed_group(batch), groups = (batch + group - 1) / group;
        const int64_t columns = std::max<int64_t>(inputs, 1), entries = columns * padded(neurons);
        const int64_t shares =
            std::min({groups, most_entries / std::max<int64_t>(entries, 1), steps * batch / columns});
        return shares < fewest ? 0 : shares;
    }
    SharedSums(int64_t shares, bool need_weight, bool need_bias, int64_t inputs, int64_t neurons)
        : shares_(shares),
          inputs_(inputs),
          neurons_(neurons),
          width_(padded(neurons)),
          need_weight_(need_weight && shares > 0),
          need_bias_(need_bias && shares > 0),
          weight_(need_weight_ ? shares * inputs_ * width_ : 0),
          bias_(need_bias_, shares, neurons) {}
    SharedSums() : SharedSums(0, false, false, 0, 0) {}  // nothing is wanted
    explicit operator bool() const { return need_weight_ || need_bias_; }
    int64_t shares() const { return shares_; }
    Outer<T> outer(int64_t share, const Events<T>& events) {
        return {events, {0, inputs_}, need_weight_ ? weight_.get() + share * inputs_ * width_ : nullptr, width_};
    }
    T* bias(int64_t share) { return bias_.of(share); }
    Tensor weight_grad(const Tensor& like) {
        Tensor out = empty_if(need_weight_, like, {neurons_, inputs_});
        if (!need_weight_) return out;
        const int64_t entries = inputs_ * width_;
        T* const sum = weight_.get();
        parallel_for(0, entries, kWorthAThread, [&](int64_t begin, int64_t end) {
            const NoDenormals guard;  // on every thread, whatever the caller has set for its own
            for (int64_t k = 1; k < shares_; ++k)
                for (int64_t i = begin; i < end; ++i) sum[i] += sum[k * entries + i];
        });
        deliver(sum, inputs_, width_, 0, neurons_, out);
        return out;
    }
    Tensor bias_grad(const Tensor& like) { return bias_.total(like, neurons_); }

  private:
    int64_t shares_, inputs_, neurons_, width_;
    bool need_weight_, need_bias_;
    Scratch<T> weight_;
    GroupSums<T> bias_;
};

}  // namespace sparse_backend
