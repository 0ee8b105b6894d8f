// A convolution of events, with the pooling behind it: what one event costs is its kernel, not the image.
//
// Between events and output lies the plane of one row, [y, x, o] with the output channels o innermost: the places an
// event reaches in one line of the output, and the weights it reaches them with, are then each one run of memory.
#pragma once

#include <algorithm>

#include "sparse_backend/rows.h"

namespace sparse_backend {

enum Pool : int { kNoPool = 0, kMaxPool = 1, kAveragePool = 2 };

struct ConvShape {
    int64_t channels, height, width;              // of the input, a row of C * H * W columns
    int64_t out_channels, out_height, out_width;  // of the convolution
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int pool;
    int64_t pool_h, pool_w, pooled_h, pooled_w;  // windows side by side; 1 and the convolution's size without

    int64_t plane() const { return out_height * out_width * out_channels; }
    int64_t weights() const { return channels * kernel_h * kernel_w * out_channels; }
    int64_t pooled() const { return pooled_h * pooled_w; }
    int64_t outputs() const { return out_channels * pooled(); }
};

// Calls run(at, from, n) for every run of n places of the plane, from `at` on, that input `index` reaches with the
// packed weights [c, ky, kernel_w - 1 - kx, o] from `from` on.
template <typename Run>
inline void for_reached(const ConvShape& s, int64_t index, Run&& run) {
    const int32_t width = static_cast<int32_t>(s.width), area = static_cast<int32_t>(s.height * s.width);
    const int32_t i = static_cast<int32_t>(index), c = i / area, y = (i - c * area) / width;
    const int64_t x = i - c * area - y * width;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int64_t down = y + s.padding_h - ky * s.dilation_h, oy = s.stride_h == 1 ? down : down / s.stride_h;
        if (down < 0) break;
        if (oy >= s.out_height || oy * s.stride_h != down) continue;
        const int64_t line = oy * s.out_width, weights = (c * s.kernel_h + ky) * s.kernel_w;
        if (s.stride_w == 1 && s.dilation_w == 1) {
            const int64_t left = x + s.padding_w - (s.kernel_w - 1);
            const int64_t first = std::max<int64_t>(left, 0), last = std::min(left + s.kernel_w, s.out_width);
            if (first < last)
                run((line + first) * s.out_channels, (weights + first - left) * s.out_channels,
                    (last - first) * s.out_channels);
            continue;
        }
        for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
            const int64_t right = x + s.padding_w - kx * s.dilation_w, ox = right / s.stride_w;
            if (right < 0) break;
            if (ox >= s.out_width || ox * s.stride_w != right) continue;
            run((line + ox) * s.out_channels, (weights + s.kernel_w - 1 - kx) * s.out_channels, s.out_channels);
        }
    }
}

// weight [O, C, kh, kw] -> packed [C, kh, kw, O], kernels mirrored in x; `unpack_weight` undoes it.
template <typename T>
void pack_weight(const ConvShape& s, const T* weight, T* packed) {
    const int64_t taps = s.channels * s.kernel_h * s.kernel_w;
    for (int64_t o = 0; o < s.out_channels; ++o)
        for (int64_t k = 0; k < taps; ++k)
            packed[(k / s.kernel_w * s.kernel_w + s.kernel_w - 1 - k % s.kernel_w) * s.out_channels + o] =
                weight[o * taps + k];
}
template <typename T>
void unpack_weight(const ConvShape& s, const T* packed, T* weight) {
    const int64_t taps = s.channels * s.kernel_h * s.kernel_w;
    for (int64_t o = 0; o < s.out_channels; ++o)
        for (int64_t k = 0; k < taps; ++k)
            weight[o * taps + k] =
                packed[(k / s.kernel_w * s.kernel_w + s.kernel_w - 1 - k % s.kernel_w) * s.out_channels + o];
}

// to += scale * from, n entries of each
template <typename T>
inline void add_run(T* to, const T* from, int64_t n, T scale) {
    using V = Vec<T>;
    const V factor = V::all(scale);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) (V::load(to + i) + factor * V::load(from + i)).store(to + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        (V::load(to + i, rest) + factor * V::load(from + i, rest)).store(to + i, rest);
    }
}

// Adds the products of n entries of each to four sums, which hide each other's latency.
template <typename T>
inline void add_products(const T* a, const T* b, int64_t n, Vec<T> (&sums)[4]) {
    using V = Vec<T>;
    int64_t i = 0;
    for (; i + 4 * V::width <= n; i += 4 * V::width)
        for (int k = 0; k < 4; ++k) sums[k] = sums[k] + V::load(a + i + k * V::width) * V::load(b + i + k * V::width);
    for (; i + V::width <= n; i += V::width) sums[0] = sums[0] + V::load(a + i) * V::load(b + i);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        sums[1] = sums[1] + V::load(a + i, rest) * V::load(b + i, rest);
    }
}

// Memory for one row: its plane, what pooling finds there, and where in the plane a window's entries lie from its
// corner on, line by line.
template <typename T>
struct ConvScratch {
    explicit ConvScratch(const ConvShape& s)
        : plane(s.plane()),
          pooled(s.pool == kNoPool ? 0 : s.outputs()),
          place(s.pool == kMaxPool ? s.outputs() : 0),
          window(s.pool_h * s.pool_w) {
        for (int64_t k = 0; k < s.pool_h * s.pool_w; ++k)
            window.get()[k] = (k / s.pool_w * s.out_width + k % s.pool_w) * s.out_channels;
    }
    Scratch<T> plane, pooled, place;
    Scratch<int64_t> window;
};

// Calls visit(p, corner) for every window p, whose first entry is the plane's `corner`.
template <typename Visit>
inline void for_windows(const ConvShape& s, Visit&& visit) {
    for (int64_t y = 0, p = 0; y < s.pooled_h; ++y)
        for (int64_t x = 0; x < s.pooled_w; ++x, ++p)
            visit(p, (y * s.pool_h * s.out_width + x * s.pool_w) * s.out_channels);
}

// Pools the plane of one row into [o, y, x]. chosen: where in its window the maximum is, line by line, or null.
template <typename T>
void pool_plane(const ConvShape& s, ConvScratch<T>& scratch, T* out, uint8_t* chosen) {
    using V = Vec<T>;
    const int64_t channels = s.out_channels, places = s.pooled(), entries = s.pool_h * s.pool_w;
    const int64_t* window = scratch.window.get();
    const T *plane = scratch.plane.get(), *tile = plane;
    T *pooled = scratch.pooled.get(), *place = scratch.place.get();
    const V zero = V::all(T(0));
    if (s.pool != kNoPool) {
        tile = pooled;
        for_windows(s, [&](int64_t p, int64_t corner) {
            for (int64_t o = 0; o < channels; o += V::width) {
                const int n = static_cast<int>(std::min<int64_t>(V::width, channels - o));
                const T* from = plane + corner + o;
                V best = V::load(from, n), at = zero;
                for (int64_t k = 1; k < entries; ++k) {
                    const V value = V::load(from + window[k], n);
                    if (s.pool == kAveragePool) {
                        best = best + value;
                        continue;
                    }
                    const typename V::Mask better = V::either(value > best, inside(value, zero));  // or no number
                    best = V::where(better, value, best);
                    at = V::where(better, V::all(static_cast<T>(k)), at);
                }
                best.store(pooled + p * channels + o, n);
                if (s.pool == kMaxPool) at.store(place + p * channels + o, n);
            }
        });
    }
    for (int64_t o = 0; o < channels; ++o)
        for (int64_t p = 0; p < places; ++p) out[o * places + p] = tile[p * channels + o];
    if (s.pool == kAveragePool)
        for (int64_t i = 0; i < s.outputs(); ++i) out[i] /= static_cast<T>(entries);
    if (chosen != nullptr)
        for (int64_t o = 0; o < channels; ++o)
            for (int64_t p = 0; p < places; ++p) chosen[o * places + p] = static_cast<uint8_t>(place[p * channels + o]);
}

// The reverse: the gradient [o, y, x] of what was pooled, as the plane's. False where all of it is zero.
template <typename T>
bool unpool_plane(const ConvShape& s, const T* grad, const uint8_t* chosen, ConvScratch<T>& scratch) {
    using V = Vec<T>;
    const int64_t channels = s.out_channels, places = s.pooled(), outputs = s.outputs();
    const int64_t* window = scratch.window.get();
    T* plane = scratch.plane.get();
    bool any = false;
    for (int64_t i = 0; i < outputs && !any; i += V::width)
        any = V::bits(V::load(grad + i, static_cast<int>(std::min<int64_t>(V::width, outputs - i))).nonzero()) != 0;
    if (!any) return false;
    if (s.pool == kNoPool) {
        for (int64_t o = 0; o < channels; ++o)
            for (int64_t p = 0; p < places; ++p) plane[p * channels + o] = grad[o * places + p];
        return true;
    }
    std::memset(static_cast<void*>(plane), 0, static_cast<size_t>(s.plane()) * sizeof(T));
    const int64_t entries = s.pool_h * s.pool_w;
    for_windows(s, [&](int64_t p, int64_t corner) {
        T* to = plane + corner;
        for (int64_t o = 0; o < channels; ++o) {
            const T value = grad[o * places + p];
            if (s.pool == kMaxPool)
                to[window[chosen[o * places + p]] + o] = value;
            else
                for (int64_t k = 0; k < entries; ++k) to[window[k] + o] = value / static_cast<T>(entries);
        }
    });
    return true;
}

// Output rows first .. last. start: a plane full of the bias; out: [R, outputs]; chosen: the same or null.
template <typename T>
void conv_rows(const ConvShape& s, const Events<T>& input, const T* packed, const T* start, int64_t first, int64_t last,
               T* out, uint8_t* chosen) {
    ConvScratch<T> scratch(s);
    T* plane = scratch.plane.get();
    for (int64_t row = first; row < last; ++row) {
        std::memcpy(plane, start, static_cast<size_t>(s.plane()) * sizeof(T));
        for (int64_t e = input.row_ptr[row]; e < input.row_ptr[row + 1]; ++e) {
            const T value = input.values == nullptr ? T(1) : input.values[e];
            for_reached(s, input.indices[e],
                        [&](int64_t at, int64_t from, int64_t n) { add_run(plane + at, packed + from, n, value); });
        }
        pool_plane(s, scratch, out + row * s.outputs(), chosen == nullptr ? nullptr : chosen + row * s.outputs());
    }
}

// What the backward adds up and fills in, each null where it is not wanted.
template <typename T>
struct ConvGrads {
    T* weight = nullptr;  // packed, added to
    T* bias = nullptr;    // [O], added to
    T* input = nullptr;   // [n_active], filled in: at the entries `wanted`
    Rows wanted;
};

// The adjoint of rows first .. last. grad: [R, outputs]
template <typename T>
void conv_rows_backward(const ConvShape& s, const Events<T>& input, const T* packed, const T* grad,
                        const uint8_t* chosen, int64_t first, int64_t last, const ConvGrads<T>& grads) {
    using V = Vec<T>;
    ConvScratch<T> scratch(s);
    const T* plane = scratch.plane.get();
    const V zero = V::all(T(0));
    const int64_t places = s.pooled();
    const Rows& wanted = grads.wanted;
    for (int64_t row = first; row < last; ++row) {
        const T* of_row = grad + row * s.outputs();
        const bool any = unpool_plane(s, of_row, chosen == nullptr ? nullptr : chosen + row * s.outputs(), scratch);
        if (grads.input != nullptr)
            for (int64_t e = wanted.row_ptr[row]; e < wanted.row_ptr[row + 1]; ++e) {
                V sums[4] = {zero, zero, zero, zero};
                if (any)
                    for_reached(s, wanted.indices[e], [&](int64_t at, int64_t from, int64_t n) {
                        add_products(plane + at, packed + from, n, sums);
                    });
                grads.input[e - wanted.row_ptr[0]] = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
            }
        if (!any) continue;
        if (grads.bias != nullptr)
            for (int64_t o = 0; o < s.out_channels; ++o)
                for (int64_t p = 0; p < places; ++p) grads.bias[o] += of_row[o * places + p];
        if (grads.weight == nullptr) continue;
        for (int64_t e = input.row_ptr[row]; e < input.row_ptr[row + 1]; ++e) {
            const T value = input.values == nullptr ? T(1) : input.values[e];
            for_reached(s, input.indices[e], [&](int64_t at, int64_t from, int64_t n) {
                add_run(grads.weight + from, plane + at, n, value);
            });
        }
    }
}

}  // namespace sparse_backend
