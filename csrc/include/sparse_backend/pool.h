// Pooling of images that are events: windows side by side, an event or active entry at a time.
#pragma once

#include "sparse_backend/buffer.h"
#include "sparse_backend/params.h"

namespace sparse_backend {

struct Windows {
    int32_t height, width;   // of an image's channel
    int32_t pool_h, pool_w;  // of a window
    int32_t pooled_h, pooled_w;

    // Where every column of an image lies, places: [channels * height * width]. Twice its window, odd for the window's
    // first entry, or -1 where no whole window holds it.
    void find(int32_t channels, int32_t* places) const {
        int32_t before = 0;  // windows of the channels and the lines of windows above
        for (int32_t c = 0; c < channels; ++c, before += pooled_h * pooled_w) {
            for (int32_t y = 0; y < height; ++y) {
                const int32_t down = y / pool_h;
                for (int32_t x = 0, right = 0, in_window = 0; x < width; ++x) {
                    const bool is_first = in_window == 0 && y == down * pool_h,
                               whole = down < pooled_h && right < pooled_w;
                    *places++ = whole ? 2 * (before + down * pooled_w + right) + is_first : -1;
                    if (++in_window == pool_w) ++right, in_window = 0;
                }
            }
        }
    }
};

// A set of windows that knows their order.
class WindowSet {
  public:
    explicit WindowSet(int64_t size) : words_((size + 63) / 64), bits_(words_), before_(words_) {}
    void clear() { std::memset(bits_.get(), 0, static_cast<size_t>(words_) * sizeof(uint64_t)); }
    bool has(int32_t i) { return bits_.get()[i / 64] >> (i % 64) & 1; }
    void add(int32_t i) { bits_.get()[i / 64] |= uint64_t{1} << (i % 64); }
    // Calls visit(i) for every member in order, and makes `rank` right.
    template <typename Visit>
    int32_t each(Visit&& visit) {
        int32_t n = 0;
        for (int64_t k = 0; k < words_; ++k) {
            before_.get()[k] = n;
            for (uint64_t word = bits_.get()[k]; word != 0; word &= word - 1, ++n)
                visit(static_cast<int32_t>(k * 64 + __builtin_ctzll(word)));
        }
        return n;
    }
    int32_t rank(int32_t i) {
        const uint64_t below = bits_.get()[i / 64] & ((uint64_t{1} << (i % 64)) - 1);
        return before_.get()[i / 64] + __builtin_popcountll(below);
    }

  private:
    int64_t words_;
    Scratch<uint64_t> bits_;
    Scratch<int32_t> before_;
};

struct FoundWindows {
    Growable<int32_t> events, counts, active;
};

// Rows first .. last. places: see `Windows::find`. The maximum of a
// window of spikes is its first spike, or its first entry where there is none; only an active entry that is one has a
// window. In an average every one has. slot: [n_active], the place of its window among its row's active ones, -1 for
// none.
inline void pool_rows(const int32_t* places, int64_t columns, bool average, const Rows& spikes, const Rows& active,
                      int64_t first, int64_t last, int32_t* n_events, int32_t* n_active, int64_t* slot,
                      FoundWindows& found) {
    WindowSet spiking(columns), learning(columns);
    Scratch<int32_t> count(columns), chosen(columns);
    for (int64_t row = first; row < last; ++row) {
        spiking.clear();
        for (int64_t e = spikes.row_ptr[row]; e < spikes.row_ptr[row + 1]; ++e) {
            const int32_t place = places[spikes.indices[e]], w = place / 2;
            if (place < 0) continue;
            if (!spiking.has(w)) chosen.get()[w] = spikes.indices[e], count.get()[w] = 0, spiking.add(w);
            ++count.get()[w];
        }
        int32_t *event = found.events.room(columns), *counted = found.counts.room(columns);
        const int32_t n = spiking.each([&](int32_t w) { *event++ = w, *counted++ = count.get()[w]; });
        found.events.advance(n), found.counts.advance(n);
        n_events[row] = n;
        if (active.row_ptr == nullptr) continue;
        learning.clear();
        const int64_t begin = active.row_ptr[row], end = active.row_ptr[row + 1];
        int64_t* out = slot - active.row_ptr[0];
        for (int64_t e = begin; e < end; ++e) {
            const int32_t index = active.indices[e], place = places[index], w = place / 2;
            const bool counts = place >= 0 && (average || (spiking.has(w) ? chosen.get()[w] == index : place % 2 == 1));
            out[e] = counts ? w : -1;
            if (counts) learning.add(w);
        }
        int32_t* learns = found.active.room(columns);
        n_active[row] = learning.each([&](int32_t w) { *learns++ = w; });
        found.active.advance(n_active[row]);
        for (int64_t e = begin; e < end; ++e)
            if (out[e] >= 0) out[e] = learning.rank(static_cast<int32_t>(out[e]));
    }
}

}  // namespace sparse_backend
