// A convolution of events, with the pooling behind it: what one event costs is its kernel, not the image.
//
// Between events and output lies the plane of one row, [y, x, o] with the output channels o innermost: the places an
// event reaches in one line of the output, and the weights it reaches them with, are then each one run of memory.
#pragma once

#include <algorithm>
#include <vector>

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

// Calls run(y, x, n, from) for every run of n places of the plane, from [y, x] on, that input `index` reaches with the
// packed weights [c, ky, kernel_w - 1 - kx, o] from `from` on.
template <typename Run>
inline void for_reached(const ConvShape& s, int64_t index, Run&& run) {
    const int32_t width = static_cast<int32_t>(s.width), area = static_cast<int32_t>(s.height * s.width);
    const int32_t i = static_cast<int32_t>(index), c = i / area, row = (i - c * area) / width;
    const int64_t column = i - c * area - row * width;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int64_t down = row + s.padding_h - ky * s.dilation_h, y = s.stride_h == 1 ? down : down / s.stride_h;
        if (down < 0) break;
        if (y >= s.out_height || y * s.stride_h != down) continue;
        const int64_t taps = (c * s.kernel_h + ky) * s.kernel_w;
        if (s.stride_w == 1 && s.dilation_w == 1) {
            const int64_t left = column + s.padding_w - (s.kernel_w - 1);
            const int64_t first = std::max<int64_t>(left, 0), last = std::min(left + s.kernel_w, s.out_width);
            if (first < last) run(y, first, last - first, (taps + first - left) * s.out_channels);
            continue;
        }
        for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
            const int64_t right = column + s.padding_w - kx * s.dilation_w, x = right / s.stride_w;
            if (right < 0) break;
            if (x >= s.out_width || x * s.stride_w != right) continue;
            run(y, x, int64_t{1}, (taps + s.kernel_w - 1 - kx) * s.out_channels);
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

// The plane of one row, and which of its windows matter: those that an event reaches.
template <typename T>
class Plane {
  public:
    explicit Plane(const ConvShape& s)
        : s_(s),
          places_(s.pooled()),
          values_(s.plane()),
          entries_(s.pool_h * s.pool_w),
          corners_(places_),
          stride_(padded(s.out_channels)),
          best_(kBatch * stride_),
          chosen_(kBatch * stride_),
          marks_((places_ + 63) / 64) {
        for (int64_t k = 0; k < s.pool_h * s.pool_w; ++k)
            entries_.get()[k] = (k / s.pool_w * s.out_width + k % s.pool_w) * s.out_channels;
        for (int64_t p = 0; p < places_; ++p)
            corners_.get()[p] = (p / s.pooled_w * s.pool_h * s.out_width + p % s.pooled_w * s.pool_w) * s.out_channels;
        for (int64_t y = 0; y < s.out_height; ++y) rows_.push_back(y / s.pool_h);
        for (int64_t x = 0; x < s.out_width; ++x) columns_.push_back(x / s.pool_w);
        // of the windows an input reaches, at most
        span_ = (s.kernel_h * s.dilation_h / s.pool_h + 2) * (s.kernel_w * s.dilation_w / s.pool_w + 2);
    }
    T* at(int64_t y, int64_t x) { return values_.get() + (y * s_.out_width + x) * s_.out_channels; }
    // Marks what the inputs begin .. end reach: all windows, where they are many.
    void mark(const int32_t* inputs, int64_t begin, int64_t end) {
        if (all_) return;
        if ((end - begin) * span_ >= 4 * places_) return mark_all();
        for (int64_t e = begin; e < end; ++e)
            for_reached(s_, inputs[e], [&](int64_t y, int64_t x, int64_t n, int64_t) {
                const int64_t row = rows_[static_cast<size_t>(y)];
                if (row >= s_.pooled_h) return;
                const int64_t last = std::min(columns_[static_cast<size_t>(x + n - 1)], s_.pooled_w - 1);
                for (int64_t k = columns_[static_cast<size_t>(x)]; k <= last; ++k) {
                    const int64_t p = row * s_.pooled_w + k;
                    marks_.get()[p / 64] |= uint64_t{1} << (p % 64);
                }
            });
    }
    void mark_all() { all_ = true; }
    // Unmarks all windows, and gives them back what `from` has there, zeros if null.
    void restore(const T* from) {
        const auto copy = [&](int64_t at, int64_t n) {
            const size_t bytes = static_cast<size_t>(n) * sizeof(T);
            if (from == nullptr)
                std::memset(static_cast<void*>(values_.get() + at), 0, bytes);
            else
                std::memcpy(values_.get() + at, from + at, bytes);
        };
        if (all_) {
            copy(0, s_.plane());
        } else {
            each([&](const int64_t* places, int64_t n) {
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t y = 0; y < s_.pool_h; ++y)
                        copy(corners_.get()[places[i]] + entries_.get()[y * s_.pool_w], s_.pool_w * s_.out_channels);
            });
        }
        all_ = false;
        std::memset(marks_.get(), 0, static_cast<size_t>((places_ + 63) / 64) * sizeof(uint64_t));
    }
    // Pools the marked windows into [o, y, x]. chosen: where in its window the maximum is, line by line, or null.
    void pool(T* out, uint8_t* chosen) {
        const int64_t channels = s_.out_channels;
        each([&](const int64_t* places, int64_t n) {
            for (int64_t i = 0; i < n; ++i)
                pool_window(values_.get() + corners_.get()[places[i]], best_.get() + i * stride_,
                            chosen_.get() + i * stride_);
            for (int64_t o = 0; o < channels; ++o)
                for (int64_t i = 0; i < n; ++i) out[o * places_ + places[i]] = best_.get()[i * stride_ + o];
            if (chosen == nullptr) return;
            for (int64_t o = 0; o < channels; ++o)
                for (int64_t i = 0; i < n; ++i)
                    chosen[o * places_ + places[i]] = static_cast<uint8_t>(chosen_.get()[i * stride_ + o]);
        });
    }
    // The reverse, for a gradient [o, y, x] of what was pooled: marked windows of a plane of zeros.
    void unpool(const T* grad, const uint8_t* chosen) {
        const int64_t entries = s_.pool_h * s_.pool_w;
        each([&](const int64_t* places, int64_t n) {
            for (int64_t o = 0; o < s_.out_channels; ++o)
                for (int64_t i = 0; i < n; ++i) {
                    T* corner = values_.get() + corners_.get()[places[i]] + o;
                    const int64_t from = o * places_ + places[i];
                    if (s_.pool == kMaxPool)
                        corner[entries_.get()[chosen[from]]] = grad[from];
                    else
                        for (int64_t k = 0; k < entries; ++k)
                            corner[entries_.get()[k]] = grad[from] / static_cast<T>(entries);
                }
        });
    }

  private:
    // Windows whose results are written together: neighbours share cache lines of the output.
    static constexpr int64_t kBatch = 16;

    // Calls visit(places, n) for the marked windows in ascending order.
    template <typename Visit>
    void each(Visit&& visit) {
        int64_t places[kBatch], n = 0;
        const auto add = [&](int64_t p) {
            places[n++] = p;
            if (n == kBatch) visit(places, n), n = 0;
        };
        for (int64_t p = 0; all_ && p < places_; ++p) add(p);
        for (int64_t k = 0; !all_ && k < (places_ + 63) / 64; ++k)
            for (uint64_t word = marks_.get()[k]; word != 0; word &= word - 1) add(k * 64 + __builtin_ctzll(word));
        if (n > 0) visit(places, n);
    }
    void pool_window(const T* corner, T* best_of, T* chosen_of) {
        using V = Vec<T>;
        const int64_t channels = s_.out_channels, entries = s_.pool_h * s_.pool_w;
        const V zero = V::all(T(0));
        for (int64_t o = 0; o < channels; o += V::width) {
            const int n = static_cast<int>(std::min<int64_t>(V::width, channels - o));
            V best = V::load(corner + o, n), chosen = zero;
            for (int64_t k = 1; k < entries; ++k) {
                const V value = V::load(corner + entries_.get()[k] + o, n);
                if (s_.pool == kAveragePool) {
                    best = best + value;
                    continue;
                }
                const typename V::Mask better = V::either(value > best, inside(value, zero));  // or no number
                best = V::where(better, value, best);
                chosen = V::where(better, V::all(static_cast<T>(k)), chosen);
            }
            best.store(best_of + o);
            chosen.store(chosen_of + o);
        }
        for (int64_t o = 0; s_.pool == kAveragePool && o < channels; ++o) best_of[o] /= static_cast<T>(entries);
    }

    const ConvShape& s_;
    int64_t places_;
    Scratch<T> values_;
    Scratch<int64_t> entries_, corners_;  // of a window from its first on, line by line; first ones of windows
    int64_t stride_;
    Scratch<T> best_, chosen_;  // of a batch of windows: a row of channels each
    Scratch<uint64_t> marks_;
    bool all_ = false;  // every window is marked
    std::vector<int64_t> rows_, columns_;
    int64_t span_;
};

// Output rows first .. last. start: a plane full of the bias; out: [R, outputs]; chosen: the same or null.
template <typename T>
void conv_rows(const ConvShape& s, const Events<T>& input, const T* packed, const T* start, int64_t first, int64_t last,
               T* out, uint8_t* chosen) {
    Plane<T> plane(s);
    const int64_t outputs = s.outputs();
    Scratch<T> blank(outputs);  // the output of a row without events
    Scratch<uint8_t> blank_chosen(outputs);
    std::memcpy(plane.at(0, 0), start, static_cast<size_t>(s.plane()) * sizeof(T));
    plane.mark_all();
    plane.pool(blank.get(), blank_chosen.get());
    plane.restore(start);
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = input.row_ptr[row], end = input.row_ptr[row + 1];
        plane.mark(input.indices, begin, end);
        for (int64_t e = begin; e < end; ++e) {
            const T value = input.values == nullptr ? T(1) : input.values[e];
            for_reached(s, input.indices[e], [&](int64_t y, int64_t x, int64_t n, int64_t from) {
                add_run(plane.at(y, x), packed + from, n * s.out_channels, value);
            });
        }
        std::memcpy(out + row * outputs, blank.get(), static_cast<size_t>(outputs) * sizeof(T));
        if (chosen != nullptr) std::memcpy(chosen + row * outputs, blank_chosen.get(), static_cast<size_t>(outputs));
        plane.pool(out + row * outputs, chosen == nullptr ? nullptr : chosen + row * outputs);
        plane.restore(start);
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
    Plane<T> plane(s);
    const V zero = V::all(T(0));
    const int64_t places = s.pooled();
    for (int64_t row = first; row < last; ++row) {
        const T* of_row = grad + row * s.outputs();
        const Span events = row_of(input, row);
        const Span wanted = grads.input == nullptr ? Span{0, 0} : row_of(grads.wanted, row);
        if (grads.weight != nullptr) plane.mark(input.indices, events.begin, events.end);
        plane.mark(grads.wanted.indices, wanted.begin, wanted.end);
        plane.unpool(of_row, chosen == nullptr ? nullptr : chosen + row * s.outputs());
        for (int64_t e = wanted.begin; e < wanted.end; ++e) {
            V sums[4] = {zero, zero, zero, zero};
            for_reached(s, grads.wanted.indices[e], [&](int64_t y, int64_t x, int64_t n, int64_t from) {
                add_products(plane.at(y, x), packed + from, n * s.out_channels, sums);
            });
            grads.input[e - grads.wanted.row_ptr[0]] = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
        }
        if (grads.weight != nullptr)
            for (int64_t e = events.begin; e < events.end; ++e) {
                const T value = input.values == nullptr ? T(1) : input.values[e];
                for_reached(s, input.indices[e], [&](int64_t y, int64_t x, int64_t n, int64_t from) {
                    add_run(grads.weight + from, static_cast<const T*>(plane.at(y, x)), n * s.out_channels, value);
                });
            }
        plane.restore(nullptr);
        if (grads.bias == nullptr) continue;
        for (int64_t o = 0; o < s.out_channels; ++o) {
            V sum = zero;
            for (int64_t p = 0; p < places; p += V::width)
                sum = sum + V::load(of_row + o * places + p, static_cast<int>(std::min<int64_t>(V::width, places - p)));
            grads.bias[o] += sum.sum();
        }
    }
}

}  // namespace sparse_backend
