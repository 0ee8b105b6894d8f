// Row operations: what one event costs.
//
// A block of columns is `vecs` vectors wide; up to kMaxVecs of them stay in registers over all events of a row.
#pragma once

#include <algorithm>

#include "sparse_backend/buffer.h"
#include "sparse_backend/params.h"
#include "sparse_backend/simd.h"

namespace sparse_backend {

constexpr int kMaxVecs = kVectorRegisters / 2;

// out[0 .. NV vectors) = start + sum over events of value * weight row
template <int NV, typename T>
inline void gather_rows(const T* start, T* out, const Weight<T>& w, int64_t column, const int32_t* index,
                        const T* value, int64_t n) {
    using V = Vec<T>;
    V acc[NV];
    for (int k = 0; k < NV; ++k) acc[k] = V::load(start + k * V::width);
    const T* base = w.data + column;
    if (value == nullptr) {
        for (int64_t e = 0; e < n; ++e) {
            const T* row = base + index[e] * w.stride;
            for (int k = 0; k < NV; ++k) acc[k] = acc[k] + V::load(row + k * V::width);
        }
    } else {
        for (int64_t e = 0; e < n; ++e) {
            const T* row = base + index[e] * w.stride;
            const V scale = V::all(value[e]);
            for (int k = 0; k < NV; ++k) acc[k] = acc[k] + scale * V::load(row + k * V::width);
        }
    }
    for (int k = 0; k < NV; ++k) acc[k].store(out + k * V::width);
}

// sums row of every event += value * delta[0 .. NV vectors)
template <int NV, typename T>
inline void scatter_rows(T* sums, int64_t stride, const int32_t* index, const T* value, int64_t n, const T* delta) {
    using V = Vec<T>;
    V d[NV];
    for (int k = 0; k < NV; ++k) d[k] = V::load(delta + k * V::width);
    for (int64_t e = 0; e < n; ++e) {
        T* row = sums + index[e] * stride;
        if (value == nullptr) {
            for (int k = 0; k < NV; ++k) (V::load(row + k * V::width) + d[k]).store(row + k * V::width);
        } else {
            const V scale = V::all(value[e]);
            for (int k = 0; k < NV; ++k) (V::load(row + k * V::width) + scale * d[k]).store(row + k * V::width);
        }
    }
}

// Calls f<N>() for the run-time number 1 .. N.
template <int N, typename F>
inline void with_count(int count, F&& f) {
    if constexpr (N > 1) {
        if (count < N) return with_count<N - 1>(count, static_cast<F&&>(f));
    }
    f.template operator()<N>();
}

// How many of `vecs` vectors to take at once: all that fit into registers, the last two rounds evenly.
inline int vecs_at_once(int64_t vecs) {
    return static_cast<int>(vecs <= kMaxVecs ? vecs : vecs < 2 * kMaxVecs ? (vecs + 1) / 2 : kMaxVecs);
}

// out = start + sum over events of value * weight row, from `column` on
template <typename T>
inline void accumulate_rows(const T* start, T* out, const Weight<T>& w, int64_t column, int64_t vecs,
                            const int32_t* index, const T* value, int64_t n) {
    while (vecs > 0) {
        const int now = vecs_at_once(vecs);
        with_count<kMaxVecs>(now, [&]<int NV>() { gather_rows<NV>(start, out, w, column, index, value, n); });
        start += now * Vec<T>::width;
        out += now * Vec<T>::width;
        column += now * Vec<T>::width;
        vecs -= now;
    }
}

template <typename T>
inline void add_outer(T* sums, int64_t stride, int64_t vecs, const int32_t* index, const T* value, int64_t n,
                      const T* delta) {
    if (n == 0) return;
    while (vecs > 0) {
        const int now = vecs_at_once(vecs);
        with_count<kMaxVecs>(now, [&]<int NV>() { scatter_rows<NV>(sums, stride, index, value, n, delta); });
        sums += now * Vec<T>::width;
        delta += now * Vec<T>::width;
        vecs -= now;
    }
}

// out = dot products of ROWS rows of a weight, from `column` on, with a row `b` of n columns that is padded with zeros;
// added to what is there if `adds`. b is read once for all rows.
template <int ROWS, typename T>
inline void dot_rows(const Weight<T>& w, int64_t column, const int32_t* index, const T* b, int64_t n, bool adds,
                     T* out) {
    using V = Vec<T>;
    const T* rows[ROWS];
    V sums[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = w.data + index[r] * w.stride + column, sums[r] = V::all(T(0));
    int64_t j = 0;
    for (; j + V::width <= n; j += V::width) {
        const V of_b = V::load(b + j);
        for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + V::load(rows[r] + j) * of_b;
    }
    if (j < n) {
        const V of_b = V::load(b + j);
        for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + V::load(rows[r] + j, static_cast<int>(n - j)) * of_b;
    }
    for (int r = 0; r < ROWS; ++r) out[r] = adds ? out[r] + sums[r].sum() : sums[r].sum();
}

// The same for any number of rows.
template <typename T>
inline void dots_of_rows(const Weight<T>& w, int64_t column, const int32_t* index, int64_t rows, const T* b, int64_t n,
                         bool adds, T* out) {
    constexpr int kAtOnce = 4;
    for (int64_t k = 0; k < rows; k += kAtOnce)
        with_count<kAtOnce>(static_cast<int>(rows - k < kAtOnce ? rows - k : kAtOnce),
                            [&]<int ROWS>() { dot_rows<ROWS>(w, column, index + k, b, n, adds, out + k); });
}

struct Span {
    int64_t begin, end;
};

inline Span row_of(const Rows& rows, int64_t row) {
    if (rows.row_ptr == nullptr) return {0, 0};
    return {rows.row_ptr[row], rows.row_ptr[row + 1]};
}

// The part of a row's entries whose index lies in [lo, hi): rows are sorted, and most of them short.
inline void clip(const int32_t* index, int64_t& begin, int64_t& end, int64_t lo, int64_t hi) {
    constexpr int64_t kShort = 32;
    if (end - begin > kShort) {
        begin = std::lower_bound(index + begin, index + end, lo) - index;
        end = std::lower_bound(index + begin, index + end, hi) - index;
        return;
    }
    while (begin < end && index[begin] < lo) ++begin;
    while (end > begin && index[end - 1] >= hi) --end;
}

}  // namespace sparse_backend
