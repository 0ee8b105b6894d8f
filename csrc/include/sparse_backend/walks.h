// What is made of delta while an adjoint walks backwards in time.
//
// `walk(block, visit)` is a neuron's adjoint: it calls visit(t, b, delta, nonzero) with every finished row delta[t, b]
// of the block, from the block's first column on, in one order of (t, b).
#pragma once

#include <algorithm>
#include <span>

#include "sparse_backend/rows.h"

namespace sparse_backend {

// A block's share of the weights of some 800 inputs stays in a 1 MB cache.
constexpr int64_t kColumnsInCache = 320;

// A weight's gradient as delta meets events: the rows of events, a range of their inputs, and its sums, given by where
// row 0 of all columns would begin; null where not wanted.
template <typename T>
struct Outer {
    Events<T> events;
    Span inputs;
    T* sum;
    int64_t stride;
};

// Adds one row of delta, of the columns from `column` on, to its weights' sums and to the bias's, null if not wanted.
template <typename T>
void add_row(std::span<const Outer<T>> outers, int64_t column, int64_t columns, int64_t row, const T* delta, T* bias) {
    using V = Vec<T>;
    const int64_t vecs = (columns + V::width - 1) / V::width;
    for (int64_t k = 0; bias != nullptr && k < vecs; ++k)
        (V::load(bias + k * V::width) + V::load(delta + k * V::width)).store(bias + k * V::width);
    for (const Outer<T>& outer : outers) {
        if (outer.sum == nullptr) continue;
        const Events<T>& events = outer.events;
        Span span = row_of(events, row);
        clip(events.indices, span.begin, span.end, outer.inputs.begin, outer.inputs.end);
        add_outer(outer.sum + column, outer.stride, vecs, events.indices + span.begin,
                  events.values == nullptr ? nullptr : events.values + span.begin, span.end - span.begin, delta);
    }
}

// What one walk over a group of samples and all columns gives, null where not wanted.
template <typename T>
struct RowsOut {
    T* delta = nullptr;     // [T * B, N]
    Weight<T> weight = {};  // for the input's gradient at the wanted entries
    Rows wanted = {};
    T* grad_input = nullptr;
    std::span<const Outer<T>> outers = {};  // sums of this task's samples
    T* bias = nullptr;                      // [padded(N)]
};

// One group of samples, all columns, `columns_at_once` of them at a time.
template <typename T, typename Walk>
void rows_of_walk(int64_t batch, int64_t neurons, const Block& group, int64_t columns_at_once, const RowsOut<T>& to,
                  Walk&& walk) {
    T* const out = to.grad_input == nullptr ? nullptr : to.grad_input - to.wanted.row_ptr[0];
    for (int64_t column = 0; column < neurons; column += columns_at_once) {
        const int64_t columns = neurons - column < columns_at_once ? neurons - column : columns_at_once;
        const Block block{group.first_sample, group.last_sample, column, column + columns};
        walk(block, [&](int64_t t, int64_t b, const T* delta, bool nonzero) {
            const int64_t row = t * batch + b;
            if (to.delta != nullptr)
                std::memcpy(to.delta + row * neurons + column, delta, static_cast<size_t>(columns) * sizeof(T));
            if (nonzero)
                add_row<T>(to.outers, column, columns, row, delta, to.bias == nullptr ? nullptr : to.bias + column);
            if (out == nullptr) return;
            const Span span = row_of(to.wanted, row);
            if (nonzero)
                dots_of_rows(to.weight, column, to.wanted.indices + span.begin, span.end - span.begin, delta, columns,
                             column > 0, out + span.begin);
            else if (column == 0)
                std::fill(out + span.begin, out + span.end, T(0));
        });
    }
}

// Weight and bias gradients of a block of columns, over all samples in a fixed order: no other task touches these sums,
// so they do not depend on how many tasks or threads there are.
template <typename T, typename Walk>
void sums_of_walk(int64_t batch, int64_t group, const Block& columns, std::span<const Outer<T>> outers, T* bias_sum,
                  Walk&& walk) {
    const int64_t first = columns.first_column, n = columns.last_column - first;
    Scratch<T> bias(bias_sum != nullptr ? padded(n) : 0);  // of its own: bias_sum is shared with other cores
    for (int64_t b0 = 0; b0 < batch; b0 += group) {
        const Block block{b0, b0 + group < batch ? b0 + group : batch, first, columns.last_column};
        walk(block, [&](int64_t t, int64_t b, const T* delta, bool nonzero) {
            if (nonzero) add_row(outers, first, n, t * batch + b, delta, bias_sum == nullptr ? nullptr : bias.get());
        });
    }
    for (int64_t j = 0; bias_sum != nullptr && j < n; ++j) bias_sum[first + j] = bias.get()[j];
}

}  // namespace sparse_backend
