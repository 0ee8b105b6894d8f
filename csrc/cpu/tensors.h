// What the CPU ops share between torch's stable ABI and the kernels: checked pointers, padded copies, tasks.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "../torch_types.h"
#include "sparse_backend/buffer.h"
#include "sparse_backend/params.h"

namespace sparse_backend {

template <typename T>
const T* pointer(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == scalar_type<T>(), name, ": expected a tensor of the other tensors' dtype");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
    return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
const T* pointer(const MaybeTensor& tensor, const char* name) {
    return tensor.has_value() ? pointer<T>(*tensor, name) : nullptr;
}

template <typename T>
T* output(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

inline Rows rows(const MaybeTensor& row_ptr, const MaybeTensor& indices) {
    return {pointer<int32_t>(row_ptr, "row_ptr"), pointer<int32_t>(indices, "indices")};
}

template <typename T>
Events<T> events(const Tensor& row_ptr, const Tensor& indices, const MaybeTensor& values) {
    Events<T> out;
    static_cast<Rows&>(out) = {pointer<int32_t>(row_ptr, "row_ptr"), pointer<int32_t>(indices, "indices")};
    out.values = pointer<T>(values, "values");
    return out;
}

inline void check_events(const Tensor& row_ptr, const Tensor& indices, int64_t n_rows, int64_t columns,
                         const char* name) {
    STD_TORCH_CHECK(row_ptr.numel() == n_rows + 1, name, ": expected ", n_rows + 1, " row pointers, got ",
                    row_ptr.numel());
#ifdef SPARSE_BACKEND_CHECK_INDICES
    const int32_t* ptr = pointer<int32_t>(row_ptr, name);
    const int32_t* index = pointer<int32_t>(indices, name);
    for (int64_t r = 0; r < n_rows; ++r)
        STD_TORCH_CHECK(0 <= ptr[r] && ptr[r] <= ptr[r + 1] && ptr[r + 1] <= indices.numel(), name, ": row ", r,
                        " is broken");
    for (int64_t e = ptr[0]; e < ptr[n_rows]; ++e)
        STD_TORCH_CHECK(0 <= index[e] && index[e] < columns, name, ": index ", index[e], " outside 0..", columns - 1);
#else
    (void)indices;
    (void)columns;
#endif
}

// A parameter of one or N entries as padded(N) entries.
template <typename T>
std::vector<T> per_neuron(const Tensor& tensor, int64_t neurons, T padding, const char* name) {
    const Tensor whole = in_order(tensor);
    const T* from = pointer<T>(whole, name);
    const int64_t entries = tensor.numel();
    STD_TORCH_CHECK(entries == 1 || entries == neurons, name, ": expected one entry or ", neurons, ", got ", entries);
    std::vector<T> out(static_cast<size_t>(padded(neurons)), padding);
    if (entries == neurons)
        std::copy_n(from, neurons, out.begin());
    else
        std::fill_n(out.begin(), neurons, *from);
    return out;
}

// Entries below which waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 15;

// to[c, r] = from[r, c]; rows of `to` are `to_stride` apart.
template <typename T>
void transpose(const T* from, int64_t n_rows, int64_t columns, int64_t row_stride, int64_t column_stride, T* to,
               int64_t to_stride) {
    constexpr int64_t tile = 32;
    const int64_t grain = std::max<int64_t>(kWorthAThread / (tile * std::max<int64_t>(n_rows, 1)), 1);
    torch::stable::parallel_for(0, (columns + tile - 1) / tile, grain, [&](int64_t first, int64_t last) {
        for (int64_t c0 = first * tile; c0 < std::min(last * tile, columns); c0 += tile)
            for (int64_t r0 = 0; r0 < n_rows; r0 += tile)
                for (int64_t c = c0; c < std::min(c0 + tile, columns); ++c)
                    for (int64_t r = r0; r < std::min(r0 + tile, n_rows); ++r)
                        to[c * to_stride + r] = from[r * row_stride + c * column_stride];
    });
}

// A weight [N, M] as kernels want it: a row per input, padded(N) apart. Taken as it is where it already lies so, which
// is how step form keeps one transpose per weight version. What stands in the padding is never used.
template <typename T>
class PaddedWeight {
  public:
    explicit PaddedWeight(const Tensor& weight) {
        STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == scalar_type<T>(),
                        "weight: expected [N, M] of the other tensors' dtype");
        const int64_t neurons = weight.size(0), inputs = weight.size(1), width = padded(neurons);
        const T* data = static_cast<const T*>(weight.data_ptr());
        if (weight.stride(0) == 1 && weight.stride(1) == width &&
            reaches(weight, inputs * width * static_cast<int64_t>(sizeof(T)))) {
            view_ = {data, width};
            return;
        }
        owned_ = std::make_unique<Scratch<T>>(inputs * width);
        transpose(data, neurons, inputs, weight.stride(0), weight.stride(1), owned_->get(), width);
        view_ = {owned_->get(), width};
    }
    const Weight<T>& get() const { return view_; }

  private:
    std::unique_ptr<Scratch<T>> owned_;
    Weight<T> view_;
};

// How samples and columns are cut into tasks. Where a task adds up over samples, its group must not depend on the
// number of threads: groups of 16, whose states fit the first cache.
struct Tiling {
    int64_t group, groups, width, blocks, batch, neurons;

    Tiling(int64_t batch, int64_t neurons, int64_t widest) : Tiling(batch, neurons, widest, fixed_group(batch)) {}
    Tiling(int64_t batch, int64_t neurons, int64_t widest, int64_t group)
        : group(group), batch(batch), neurons(neurons) {
        groups = (batch + group - 1) / group;
        const int64_t all = padded(neurons);
        blocks = std::max<int64_t>((all + widest - 1) / widest, 1);
        width = std::max<int64_t>(padded((all + blocks - 1) / blocks), kPad);
        blocks = std::max<int64_t>((all + width - 1) / width, 1);
    }
    static int64_t fixed_group(int64_t batch) { return std::clamp<int64_t>((batch + 15) / 16, 1, 16); }
    // For tasks that add nothing up: a single step is cut once per thread, and not at all if it is small.
    static int64_t free_group(int64_t batch, int64_t steps, int64_t neurons) {
        if (steps > 1) return fixed_group(batch);
        const int64_t threads = batch * neurons < kWorthAThread ? 1 : torch::stable::get_num_threads();
        return std::max<int64_t>((batch + threads - 1) / threads, 1);
    }
    int64_t tasks() const { return groups * blocks; }
    Block columns(int64_t block) const { return {0, batch, block * width, std::min((block + 1) * width, neurons)}; }
    Block task(int64_t i) const {
        Block out = columns(i / groups);
        out.first_sample = i % groups * group;
        out.last_sample = std::min(out.first_sample + group, batch);
        return out;
    }
};

inline Tensor empty_ints(const Tensor& like, int64_t n) {
    return new_tensor(like, {n}, ScalarType::Int);
}
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
    return new_tensor(like, shape, like.scalar_type());
}
// What stands for a result that nobody asked for has no entries.
inline Tensor empty_if(bool wanted, const Tensor& like, const std::vector<int64_t>& shape) {
    return empty(like, wanted ? shape : std::vector<int64_t>{0});
}

// A current [T, B, N] as kernels take it: contiguous, or one step of it where an expanded tensor has it for all.
struct Current {
    explicit Current(const Tensor& given)
        : same(given.dim() == 3 && given.size(0) > 1 && given.stride(0) == 0),
          tensor(in_order(same ? torch::stable::select(given, 0, 0) : given)) {}
    bool same;
    Tensor tensor;
};

// Turns the counts of rows in counts[block][row] into row pointers; returns their total.
inline int64_t prefix(const int32_t* counts, int64_t blocks, int64_t n_rows, int32_t* row_ptr) {
    int64_t total = 0;
    row_ptr[0] = 0;
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t k = 0; k < blocks; ++k) total += counts[k * n_rows + r];
        STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(),
                        "events: expected fewer than 2**31, got more. Split the batch or use a smaller b_th");
        row_ptr[r + 1] = static_cast<int32_t>(total);
    }
    return total;
}

}  // namespace sparse_backend
