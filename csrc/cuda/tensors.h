// What the CUDA ops share between torch's stable ABI and the launchers: the device, checked pointers, laid-out weights.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../torch_types.h"
#include "launch.h"

// Where kernels run on the CPU (tests/emulation), these say so, and every buffer an op may touch is made known.
#ifndef SPARSE_BACKEND_LIBRARY
#define SPARSE_BACKEND_LIBRARY sparse_backend
#define SPARSE_BACKEND_KEY CUDA
#define SPARSE_BACKEND_IS_OURS(tensor) (tensor).is_cuda()
#define SPARSE_BACKEND_ANNOUNCE(data, bytes) (void)0
#define SPARSE_BACKEND_FORGET() (void)0
#endif

namespace sparse_backend {

// Products with a weight of 16 bits are summed in float, as the neuron's state is float.
inline bool has_16_bits(ScalarType type) {
    return type == ScalarType::Half || type == ScalarType::BFloat16;
}
inline ScalarType sums_type(const Tensor& weight) {
    return has_16_bits(weight.scalar_type()) ? ScalarType::Float : weight.scalar_type();
}

inline std::string device_name(const Tensor& tensor) {
    return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : tensor.is_cpu() ? "cpu" : "another";
}

// The device of an op's tensors: torch's current one while this lives, its work on torch's current stream there.
class Device {
  public:
    Device(const Tensor& like, const char* name) : like_(like), index_(like.get_device_index()) {
        STD_TORCH_CHECK(SPARSE_BACKEND_IS_OURS(like), name, ": expected a CUDA tensor, as another one is, got one on ",
                        device_name(like), ". Move it with .to()");
        SPARSE_BACKEND_FORGET();
        if (like.is_cuda()) guard_.emplace(index_);
        if (like.is_cuda()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
    }
    Stream stream() const { return stream_; }
    int32_t index() const { return index_; }

    // Whether work is being captured into a CUDA graph: then nothing may wait for the device.
    bool capturing() const {
        bool yes = false;
        check(is_capturing(stream_, yes));
        return yes;
    }

    // Raises for what a launcher returned.
    void check(int code) const { STD_TORCH_CHECK(code == 0, "CUDA: ", take_error(code)); }

    void expect_here(const Tensor& tensor, const char* name) const {
        STD_TORCH_CHECK(tensor.is_cuda() == like_.is_cuda() && tensor.get_device_index() == index_, name,
                        ": expected a tensor on ", device_name(like_), " as the other tensors, got ",
                        device_name(tensor), ". Move it with .to()");
    }

    template <typename T>
    const T* read(const Tensor& tensor, const char* name) const {
        const T* data = read<T>(tensor, tensor.numel(), name);
        STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
        return data;
    }
    // As many entries as there are from its first to its last.
    template <typename T>
    const T* read(const Tensor& tensor, int64_t entries, const char* name) const {
        expect_here(tensor, name);
        STD_TORCH_CHECK(tensor.scalar_type() == scalar_type<T>(), name,
                        ": expected a tensor of the other tensors' dtype");
        return announced<T>(tensor, entries);
    }
    template <typename T>
    const T* read(const MaybeTensor& tensor, const char* name) const {
        return tensor.has_value() ? read<T>(*tensor, name) : nullptr;
    }

    // Of a contiguous tensor made here, or checked.
    template <typename T>
    T* write(const Tensor& tensor) const {
        return announced<T>(tensor, tensor.numel());
    }

    Tensor ints(const std::vector<int64_t>& shape) const { return make(shape, ScalarType::Int); }
    Tensor longs(const std::vector<int64_t>& shape) const { return make(shape, ScalarType::Long); }
    Tensor make(const std::vector<int64_t>& shape, ScalarType type) const { return new_tensor(like_, shape, type); }
    template <typename T>
    Tensor make(const std::vector<int64_t>& shape) const {
        return make(shape, scalar_type<T>());
    }
    // What stands for a result that nobody asked for has no entries.
    template <typename T>
    Tensor make_if(bool wanted, const std::vector<int64_t>& shape) const {
        return make<T>(wanted ? shape : std::vector<int64_t>{0});
    }
    template <typename T>
    Tensor zeros(const std::vector<int64_t>& shape) const {
        Tensor out = make<T>(shape);
        check(zero(write<T>(out), out.numel() * static_cast<int64_t>(sizeof(T)), stream_));
        return out;
    }

    // Steps of a sequence whose scratch of `bytes_per_step` stays in half the second-level cache.
    int64_t steps_in_cache(int64_t steps, int64_t bytes_per_step) const {
        int64_t bytes = 0;
        check(l2_bytes(bytes));
        if (bytes == 0) bytes = 32 << 20;  // a driver that does not tell
        const int64_t fit = bytes / 2 / (bytes_per_step > 0 ? bytes_per_step : 1);
        return fit < 1 ? 1 : fit < steps ? fit : steps;
    }

  private:
    template <typename T>
    static T* announced(const Tensor& tensor, [[maybe_unused]] int64_t entries) {
        auto* data = static_cast<T*>(tensor.data_ptr());
        SPARSE_BACKEND_ANNOUNCE(data, static_cast<size_t>(entries) * sizeof(T));
        return data;
    }

    const Tensor& like_;
    int32_t index_;
    Stream stream_ = nullptr;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline Rows rows(const Device& on, const MaybeTensor& row_ptr, const MaybeTensor& indices) {
    return {on.read<int32_t>(row_ptr, "row_ptr"), on.read<int32_t>(indices, "indices")};
}

template <typename T>
Events<T> events(const Device& on, const Tensor& row_ptr, const Tensor& indices, const MaybeTensor& values) {
    Events<T> out;
    static_cast<Rows&>(out) = {on.read<int32_t>(row_ptr, "row_ptr"), on.read<int32_t>(indices, "indices")};
    out.values = on.read<T>(values, "values");
    return out;
}

// Ranges of indices are on the device and are trusted, as in release builds of the CPU kernels.
inline void check_events(const Tensor& row_ptr, int64_t n_rows, const char* name) {
    STD_TORCH_CHECK(row_ptr.numel() == n_rows + 1, name, ": expected ", n_rows + 1, " row pointers, got ",
                    row_ptr.numel());
}

// Kernels count words of bits in 32 bits.
inline void check_size(int64_t n_rows, int64_t columns, const char* name) {
    STD_TORCH_CHECK(n_rows < int64_t{1} << 31 && n_rows * words_of(columns) < int64_t{1} << 32, name,
                    ": expected fewer than 2**31 rows and 2**32 words of 32 columns, got ", n_rows, " rows of ",
                    columns, ". Split the batch");
}

template <typename T>
PerNeuron<T> per_neuron(const Device& on, const Tensor& tensor, int64_t neurons, const char* name) {
    STD_TORCH_CHECK(tensor.numel() == 1 || tensor.numel() == neurons, name, ": expected one entry or ", neurons,
                    ", got ", tensor.numel());
    if (tensor.numel() == 1) return {on.read<T>(tensor, 1, name), 0};
    if (tensor.dim() != 1 || neurons == 0) return {on.read<T>(tensor, name), 1};
    const int64_t stride = tensor.stride(0);
    return {on.read<T>(tensor, (neurons - 1) * stride + 1, name), stride};
}

template <typename T>
const T* read_bias(const Device& on, MaybeTensor& bias, int64_t neurons) {
    STD_TORCH_CHECK(!bias.has_value() || bias->numel() == neurons, "bias: expected ", neurons, " entries, got ",
                    bias.has_value() ? bias->numel() : 0);
    bias = in_order(bias);
    return on.read<T>(bias, "bias");
}

// A weight [N, M] as kernels want it: a row per input, padded(N) apart, 16-byte aligned. Taken as it is where it
// already lies so. What stands in the padding is never used. Beside sums in float it may have 16 bits, and keeps them.
template <typename T>
class PaddedWeight {
  public:
    PaddedWeight(const Device& on, const Tensor& weight) {
        const ScalarType type = weight.scalar_type();
        const bool narrow = std::is_same_v<T, float> && has_16_bits(type);
        STD_TORCH_CHECK(weight.dim() == 2 && (type == scalar_type<T>() || narrow),
                        "weight: expected [N, M] of the other tensors' dtype");
        on.expect_here(weight, "weight");
        if (weight.numel() == 0) return;
        if (narrow) {
            lay_out<uint16_t>(on, weight);
            view_.storage = type == ScalarType::Half ? Storage::kHalf : Storage::kBFloat16;
        } else {
            lay_out<T>(on, weight);
        }
    }
    const StoredWeight& get() const { return view_; }
    Weight<T> of_sums() const {
        STD_TORCH_CHECK(view_.storage == Storage::kOfSums, "recurrent: expected the dtype of the state");
        return {static_cast<const T*>(view_.data), view_.stride};
    }

  private:
    template <typename E>  // of the weight's size
    void lay_out(const Device& on, const Tensor& weight) {
        const int64_t neurons = weight.size(0), inputs = weight.size(1), width = padded(neurons);
        const auto* data = static_cast<const E*>(weight.data_ptr());
        const int64_t bytes = inputs * width * static_cast<int64_t>(sizeof(E));
        if (weight.stride(0) == 1 && weight.stride(1) == width && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
            reaches(weight, bytes)) {
            SPARSE_BACKEND_ANNOUNCE(data, static_cast<size_t>(bytes));
            view_ = {data, width};
            return;
        }
        SPARSE_BACKEND_ANNOUNCE(data, sizeof(E) * static_cast<size_t>((neurons - 1) * weight.stride(0) +
                                                                      (inputs - 1) * weight.stride(1) + 1));
        owned_ = on.make({inputs, width}, weight.scalar_type());
        auto* const to = on.write<E>(*owned_);
        view_ = {to, width};
        on.check(transpose(data, neurons, inputs, weight.stride(0), weight.stride(1), to, on.stream()));
    }

    MaybeTensor owned_;
    StoredWeight view_;
};

}  // namespace sparse_backend
