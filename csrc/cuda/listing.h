// A sequence run chunk by chunk, and the lists of events made of the bits it leaves: what sparse forwards share.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "tensors.h"

namespace sparse_backend {

enum List { kActive = 0, kSpikes = 1, kResets = 2 };
using Counts = std::array<int64_t, kLists>;

// How many events sequences of one shape had of late: what room the next one is given where it cannot be asked. Layers
// of one shape share it, so each list keeps the most of them, which fades as sequences go by.
class Memory {
  public:
    using Key = std::tuple<int32_t, int64_t, int64_t, int64_t>;
    std::optional<Counts> of(const Key& key) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = kept_.find(key);
        return found == kept_.end() ? std::nullopt : std::optional<Counts>(found->second);
    }
    void keep(const Key& key, const Counts& counts) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (kept_.size() > 4096) kept_.clear();
        Counts& kept = kept_[key];  // zeros at first
        for (size_t i = 0; i < kept.size(); ++i) kept[i] = std::max(counts[i], kept[i] - kept[i] / kFading);
    }

  private:
    static constexpr int64_t kFading = 32;
    std::mutex mutex_;
    std::map<Key, Counts> kept_;
};

inline Memory& memory() {
    static Memory one;
    return one;
}

// The lists a forward returns, its scratch, and how it is cut into chunks. Rows of a list are those of a prefix of the
// sequence: `rows[i]`, 0 where list i is not wanted.
template <typename T>
class Listing {
  public:
    struct Chunk {
        int64_t index, first_step, steps;
    };

    std::array<Tensor, kLists> row_ptr, indices;
    Tensor x, p;             // values beside the active list
    T* x_scratch = nullptr;  // [chunk, B, N]
    T* p_scratch = nullptr;

    Listing(const Device& on, int64_t steps, int64_t batch, int64_t neurons, const Counts& rows, bool wants_x,
            bool wants_p)
        : row_ptr{row_ptr_for(on, rows[0]), row_ptr_for(on, rows[1]), row_ptr_for(on, rows[2])},
          indices{on.ints({0}), on.ints({0}), on.ints({0})},
          x(on.make<T>({0})),
          p(on.make<T>({0})),
          on_(on),
          steps_(steps),
          batch_(batch),
          neurons_(neurons),
          rows_(rows),
          wants_p_(wants_p),
          chunk_(on.steps_in_cache(steps, batch * neurons * static_cast<int64_t>(sizeof(T)) * (wants_p ? 2 : 1))),
          chunks_((steps + chunk_ - 1) / chunk_) {
        const int64_t chunk_rows = chunk_ * batch;
        kept_ = {on.make<T>({wants_x ? chunk_rows : 0, neurons}), on.make<T>({wants_p ? chunk_rows : 0, neurons}),
                 on.ints({kLists, chunk_rows, words_of(neurons)}), on.ints({kLists, tiles_of(chunk_rows, neurons)}),
                 on.longs({kLists, chunks_ + 1})};
        if (wants_x) x_scratch = on.write<T>(kept_[0]);
        if (wants_p) p_scratch = on.write<T>(kept_[1]);
        bits_ = reinterpret_cast<uint32_t*>(on.write<int32_t>(kept_[2]));
        sums_ = on.write<int32_t>(kept_[3]);
        carried_ = on.write<int64_t>(kept_[4]);
    }
    Listing(const Listing&) = delete;

    uint32_t* bits(List list) const { return rows_[list] > 0 ? bits_ + list * words_in_chunk() : nullptr; }
    // Rows of a list in this chunk.
    int64_t rows_in(List list, const Chunk& chunk) const {
        return std::clamp<int64_t>(rows_[list] - chunk.first_step * batch_, 0, chunk.steps * batch_);
    }

    // Runs the chunks and makes the lists; false where more than `most` entries are active. `run_chunk` may be called
    // again from the first chunk on.
    template <typename RunChunk>
    bool run(int64_t most, RunChunk&& run_chunk) {
        on_.check(zero(carried_, kept_[4].numel() * static_cast<int64_t>(sizeof(int64_t)), on_.stream()));
        const Memory::Key key{on_.index(), steps_, batch_, neurons_};
        const bool capturing = on_.capturing();
        const auto run_and_count = [&](const Chunk& chunk) {
            run_chunk(chunk);
            const Present present = lists_of(chunk);
            on_.check(count(present.lists, present.n, on_.stream()));
        };
        if (chunks_ == 1 && !capturing) {
            run_and_count(chunk_of(0));
            const Present counted = lists_of(chunk_of(0));
            on_.check(totals(counted.lists, counted.n, on_.stream()));
            const Counts found = ask();
            memory().keep(key, found);
            if (found[kActive] > most) return false;
            make_room(found);
            const Present roomy = lists_of(chunk_of(0));
            on_.check(emit(roomy.lists, roomy.n, on_.stream()));
            return true;
        }
        // Bits and values of a chunk make way for the next: room is guessed, and made again where it was too little.
        const std::optional<Counts> kept = memory().of(key);
        STD_TORCH_CHECK(kept || !capturing,
                        "sparse_backend: expected sequences of this shape to have been run before "
                        "the capture: how many events they have decides the room the graph has");
        const int64_t entries = steps_ * batch_ * neurons_, quarters = capturing ? 8 : 5;  // a graph gets no more
        Counts room;
        for (int i = 0; i < kLists; ++i)
            room[i] = std::min(rows_[i] * neurons_, kept ? (*kept)[i] * quarters / 4 + 1024 : entries / 16 + 1024);
        if (!capturing) room[kActive] = std::min(room[kActive], most + 1);
        for (;;) {
            make_room(room);
            for (int64_t c = 0; c < chunks_; ++c) {
                const Chunk chunk = chunk_of(c);
                run_and_count(chunk);
                const Present present = lists_of(chunk);
                on_.check(emit(present.lists, present.n, on_.stream()));
                for (int i = 0; i < kLists; ++i)  // nothing more to come: the count stands
                    if (rows_[i] > 0 && rows_in(static_cast<List>(i), chunk) == 0)
                        on_.check(copy(carried(i, c + 1), carried(i, c), sizeof(int64_t), on_.stream()));
            }
            if (capturing) {
                const Present all = lists_of(chunk_of(chunks_ - 1), true);
                on_.check(seal(all.lists, all.n, on_.stream()));
                return true;
            }
            const Counts found = ask();
            memory().keep(key, found);
            if (found[kActive] > most) return false;
            bool fits = true;
            for (int i = 0; i < kLists; ++i) fits = fits && found[i] <= room[i];
            room = found;
            if (fits) break;
        }
        const auto cut = [&](Tensor& list, int64_t n) {  // what is kept for the backward is as long as it needs to be
            if (list.numel() > n) list = torch::stable::clone(torch::stable::narrow(list, 0, 0, n));
        };
        for (int i = 0; i < kLists; ++i) cut(indices[i], room[i]);
        cut(x, room[kActive]);
        cut(p, room[kActive]);
        return true;
    }

  private:
    static Tensor row_ptr_for(const Device& on, int64_t n_rows) {
        return on.make_if<int32_t>(n_rows > 0, {n_rows + 1});
    }
    int64_t words_in_chunk() const { return chunk_ * batch_ * words_of(neurons_); }
    int64_t* carried(int list, int64_t chunk) const { return carried_ + list * (chunks_ + 1) + chunk; }
    Chunk chunk_of(int64_t c) const { return {c, c * chunk_, std::min(chunk_, steps_ - c * chunk_)}; }

    void make_room(const Counts& room) {
        room_ = room;
        for (int i = 0; i < kLists; ++i) indices[i] = on_.make_if<int32_t>(rows_[i] > 0, {room[i]});
        x = on_.make_if<T>(rows_[kActive] > 0, {room[kActive]});
        p = on_.make_if<T>(wants_p_, {room[kActive]});
    }

    struct Present {
        Emissions<T> lists;
        int n = 0;
    };

    // Those lists that have rows in this chunk; to be sealed, all that there are.
    Present lists_of(const Chunk& chunk, bool all = false) const {
        Present out;
        for (int i = 0; i < kLists; ++i) {
            const List which = static_cast<List>(i);
            if (rows_in(which, chunk) == 0 && !(all && rows_[i] > 0)) continue;
            Emission<T>& list = out.lists.list[out.n++];
            list.bits = bits(which);
            list.rows = rows_in(which, chunk), list.columns = neurons_;
            list.capacity = room_[i];
            list.row_ptr = on_.write<int32_t>(row_ptr[i]) + chunk.first_step * batch_;
            list.indices = on_.write<int32_t>(indices[i]);
            list.sums = sums_ + i * tiles_of(chunk_ * batch_, neurons_);
            list.before = carried(i, chunk.index), list.after = carried(i, chunk.index + 1);
            if (which != kActive) continue;
            list.from[0] = x_scratch, list.to[0] = on_.write<T>(x);
            if (wants_p_) list.from[1] = p_scratch, list.to[1] = on_.write<T>(p);
        }
        return out;
    }

    // The one wait for the device.
    Counts ask() const {
        std::vector<int64_t> told(static_cast<size_t>(kLists * (chunks_ + 1)));
        on_.check(fetch(told.data(), carried_, static_cast<int64_t>(told.size() * sizeof(int64_t)), on_.stream()));
        Counts found;
        for (int i = 0; i < kLists; ++i) {
            found[i] = told[static_cast<size_t>((i + 1) * (chunks_ + 1) - 1)];
            STD_TORCH_CHECK(found[i] <= std::numeric_limits<int32_t>::max(),
                            "events: expected fewer than 2**31, got more. Split the batch or use a smaller b_th");
        }
        return found;
    }

    const Device& on_;
    int64_t steps_, batch_, neurons_;
    Counts rows_, room_{};
    bool wants_p_;
    int64_t chunk_, chunks_;
    std::vector<Tensor> kept_;
    uint32_t* bits_;
    int32_t* sums_;
    int64_t* carried_;
};

}  // namespace sparse_backend
