// What is made of delta while an adjoint walks backwards in time.
//
// `walk(block, visit)` is a neuron's adjoint: it calls visit(t, b, delta, nonzero) with every finished row delta[t, b]
// of the block, from the block's first column on, in one order of (t, b).
#pragma once

#include <algorithm>

#include "sparse_backend/rows.h"

namespace sparse_backend {

// A block's share of the weights of some 800 inputs stays in a 1 MB cache.
constexpr int64_t kColumnsInCache = 320;

// One group of samples, all columns, `columns_at_once` of them at a time: delta out, and the input's gradient at the
// wanted entries.
template <typename T, typename Walk>
void rows_of_walk(int64_t batch, int64_t neurons, const Block& group, int64_t columns_at_once, T* delta_out,
                  const Weight<T>& w, const Rows& wanted, T* grad_input, Walk&& walk) {
    T* const out = grad_input == nullptr ? nullptr : grad_input - wanted.row_ptr[0];
    for (int64_t column = 0; column < neurons; column += columns_at_once) {
        const int64_t columns = neurons - column < columns_at_once ? neurons - column : columns_at_once;
        const Block block{group.first_sample, group.last_sample, column, column + columns};
        walk(block, [&](int64_t t, int64_t b, const T* delta, bool nonzero) {
            const int64_t row = t * batch + b;
            if (delta_out != nullptr)
                std::memcpy(delta_out + row * neurons + column, delta, static_cast<size_t>(columns) * sizeof(T));
            if (out == nullptr) return;
            const Span span = row_of(wanted, row);
            if (nonzero)
                dots_of_rows(w, column, wanted.indices + span.begin, span.end - span.begin, delta, columns, column > 0,
                             out + span.begin);
            else if (column == 0)
                std::fill(out + span.begin, out + span.end, T(0));
        });
    }
}

// A weight's gradient as delta meets events: the rows of events, a range of their inputs, and its sums, given by where
// row 0 of all columns would begin; null where not wanted.
template <typename T>
struct Outer {
    Events<T> events;
    Span inputs;
    T* sum;
    int64_t stride;
};

// Weight and bias gradients of a block of columns, over all samples in a fixed order: no other task touches these sums,
// so they do not depend on how many tasks or threads there are.
template <typename T, int N, typename Walk>
void sums_of_walk(int64_t batch, int64_t group, const Block& columns, const Outer<T> (&outers)[N], T* bias_sum,
                  Walk&& walk) {
    using V = Vec<T>;
    const int64_t vecs = (columns.last_column - columns.first_column + V::width - 1) / V::width;
    Scratch<T> bias(bias_sum != nullptr ? vecs * V::width : 0);  // of its own: bias_sum is shared with other cores
    for (int64_t b0 = 0; b0 < batch; b0 += group) {
        const Block block{b0, b0 + group < batch ? b0 + group : batch, columns.first_column, columns.last_column};
        walk(block, [&](int64_t t, int64_t b, const T* delta, bool nonzero) {
            if (!nonzero) return;
            const int64_t row = t * batch + b;
            if (bias_sum != nullptr)
                for (int64_t k = 0; k < vecs; ++k) {
                    T* to = bias.get() + k * V::width;
                    (V::load(to) + V::load(delta + k * V::width)).store(to);
                }
            for (const Outer<T>& outer : outers) {
                if (outer.sum == nullptr) continue;
                const Events<T>& events = outer.events;
                Span span = row_of(events, row);
                clip(events.indices, span.begin, span.end, outer.inputs.begin, outer.inputs.end);
                add_outer(outer.sum + columns.first_column, outer.stride, vecs, events.indices + span.begin,
                          events.values == nullptr ? nullptr : events.values + span.begin, span.end - span.begin,
                          delta);
            }
        });
    }
    for (int64_t j = columns.first_column; bias_sum != nullptr && j < columns.last_column; ++j)
        bias_sum[j] = bias.get()[j - columns.first_column];
}

}  // namespace sparse_backend
