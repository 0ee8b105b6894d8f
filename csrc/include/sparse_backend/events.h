// Between dense tensors and events.
#pragma once

#include "sparse_backend/rows.h"

namespace sparse_backend {

template <typename T>
bool events_from_rows(const T* dense, int64_t columns, int64_t first, int64_t last, int64_t limit, int32_t* counts,
                      Found<T>& found, bool& all_one) {
    using V = Vec<T>;
    bool ones = true;
    for (int64_t row = first; row < last; ++row) {
        const T* from = dense + row * columns;
        int32_t* index = found.active.room(columns + kPad);
        T* value = found.x.room(columns + kPad);
        int n = 0;
        for (int64_t j0 = 0; j0 < columns; j0 += 64) {
            uint64_t bits = 0;
            if (j0 + 64 <= columns) {
                for (int i = 0; i < 64; i += V::width)
                    bits |= static_cast<uint64_t>(V::bits(V::load(from + j0 + i).nonzero())) << i;
            } else {
                for (int64_t i = 0; j0 + i < columns; i += V::width) {
                    const int64_t left = columns - j0 - i;
                    const V x =
                        left < V::width ? V::load(from + j0 + i, static_cast<int>(left)) : V::load(from + j0 + i);
                    bits |= static_cast<uint64_t>(V::bits(x.nonzero())) << i;
                }
            }
            for (; bits != 0; bits &= bits - 1) {
                const int64_t j = j0 + __builtin_ctzll(bits);
                ones &= from[j] == T(1);
                value[n] = from[j];
                index[n++] = static_cast<int32_t>(j);
            }
        }
        found.active.advance(n);
        found.x.advance(n);
        counts[row] = n;
        if (found.active.size() > limit) return false;
    }
    if (!ones) all_one = false;
    return true;
}

inline bool events_from_byte_rows(const uint8_t* dense, int64_t columns, int64_t first, int64_t last, int64_t limit,
                                  int32_t* counts, Found<float>& found, bool& all_one) {
    bool ones = true;
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* from = dense + row * columns;
        int32_t* index = found.active.room(columns + kPad);
        float* value = found.x.room(columns + kPad);
        int n = 0;
        const auto look = [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j)
                if (from[j] != 0) {
                    ones &= from[j] == 1;
                    value[n] = static_cast<float>(from[j]);
                    index[n++] = static_cast<int32_t>(j);
                }
        };
        int64_t j = 0;
        for (; j + 32 <= columns; j += 32) {
            uint64_t word[4];
            std::memcpy(word, from + j, 32);
            if ((word[0] | word[1] | word[2] | word[3]) != 0) look(j, j + 32);
        }
        look(j, columns);
        found.active.advance(n);
        found.x.advance(n);
        counts[row] = n;
        if (found.active.size() > limit) return false;
    }
    if (!ones) all_one = false;
    return true;
}

// current[row] = bias + sum of weight rows, for rows first .. last. current: [R, N]
template <typename T>
void event_linear_rows(const Events<T>& input, const Weight<T>& w, const T* bias, int64_t neurons, int64_t first,
                       int64_t last, T* current) {
    using V = Vec<T>;
    const int64_t vecs = (neurons + V::width - 1) / V::width, width = vecs * V::width;
    Scratch<T> scratch(width), no_bias(width);
    for (int64_t row = first; row < last; ++row) {
        const int64_t e = input.row_ptr[row], n = input.row_ptr[row + 1] - e;
        accumulate_rows(bias == nullptr ? no_bias.get() : bias, scratch.get(), w, int64_t{0}, vecs, input.indices + e,
                        input.values == nullptr ? nullptr : input.values + e, n);
        std::memcpy(current + row * neurons, scratch.get(), static_cast<size_t>(neurons) * sizeof(T));
    }
}

// Adds delta x events of all rows to the sums of a block of columns and a range of inputs. delta: [R, N]
template <typename T>
void outer_rows(const T* delta, int64_t rows, int64_t neurons, const Block& columns, int64_t first_input,
                int64_t last_input, const Events<T>& input, T* weight_sum, int64_t stride, T* bias_sum) {
    using V = Vec<T>;
    const int64_t n = columns.last_column - columns.first_column;
    if (n == 0) return;
    const int64_t vecs = (n + V::width - 1) / V::width;
    Scratch<T> scratch(vecs * V::width);
    for (int64_t row = 0; row < rows; ++row) {
        int64_t begin = input.row_ptr[row], end = input.row_ptr[row + 1];
        clip(input.indices, begin, end, first_input, last_input);
        if (begin == end && bias_sum == nullptr) continue;
        std::memcpy(scratch.get(), delta + row * neurons + columns.first_column, static_cast<size_t>(n) * sizeof(T));
        if (bias_sum != nullptr)
            for (int64_t j = 0; j < n; ++j) bias_sum[columns.first_column + j] += scratch.get()[j];
        if (weight_sum != nullptr)
            add_outer(weight_sum + columns.first_column, stride, vecs, input.indices + begin,
                      input.values == nullptr ? nullptr : input.values + begin, end - begin, scratch.get());
    }
}

// grad[e] = weight row of entry e . delta of its row, for rows first .. last. delta: [R, N]
template <typename T>
void input_rows(const T* delta, int64_t neurons, const Weight<T>& w, const Rows& wanted, int64_t first, int64_t last,
                T* grad) {
    using V = Vec<T>;
    const int64_t vecs = (neurons + V::width - 1) / V::width;
    Scratch<T> scratch(vecs * V::width);
    T* out = grad - wanted.row_ptr[0];
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = wanted.row_ptr[row], end = wanted.row_ptr[row + 1];
        if (begin == end) continue;
        std::memcpy(scratch.get(), delta + row * neurons, static_cast<size_t>(neurons) * sizeof(T));
        dots_of_rows(w, int64_t{0}, wanted.indices + begin, end - begin, scratch.get(), neurons, false, out + begin);
    }
}

}  // namespace sparse_backend
