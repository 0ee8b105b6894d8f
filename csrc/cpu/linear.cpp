// CPU ops of a linear layer fed with events, its current dense; schemas in sparse_backend/ops/{event_linear,hub}.py.
#include "sparse_backend/events.h"

#include <tuple>

#include "sparse_backend/walks.h"
#include "tasks.h"

namespace sparse_backend {
namespace {

int64_t rows_per_thread(int64_t neurons) {
    return std::max<int64_t>(kWorthAThread / 2 / std::max<int64_t>(neurons, 1), 1);
}

Tensor event_linear(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values, MaybeTensor, MaybeTensor,
                    MaybeTensor, const Tensor& weight, MaybeTensor bias, MaybeTensor, int64_t) {
    const int64_t n_rows = row_ptr.numel() - 1, neurons = weight.size(0);
    check_events(row_ptr, indices, n_rows, weight.size(1), "events");
    Tensor current = empty(weight, {n_rows, neurons});
    if (current.numel() == 0) return current;
    SPARSE_BACKEND_DISPATCH(weight, "event_linear", [&] {
        const PaddedWeight<scalar_t> padded_weight(weight);
        const auto bias_padded = padded_bias<scalar_t>(bias, neurons);
        const auto input = events<scalar_t>(row_ptr, indices, values);
        parallel_for(0, n_rows, rows_per_thread(neurons), [&](int64_t first, int64_t last) {
            event_linear_rows<scalar_t>(input, padded_weight.get(), bias.has_value() ? bias_padded.data() : nullptr,
                                        neurons, first, last, output<scalar_t>(current));
        });
    });
    return current;
}

std::tuple<Tensor, Tensor, Tensor> event_linear_backward(const Tensor& given, const Tensor& row_ptr,
                                                         const Tensor& indices, MaybeTensor values,
                                                         MaybeTensor active_ptr, MaybeTensor active_indices,
                                                         const Tensor& weight, int64_t need_input, bool need_weight,
                                                         bool need_bias) {
    const Tensor delta = in_order(given);
    const int64_t n_rows = delta.size(0), neurons = weight.size(0), inputs = weight.size(1);
    check_events(row_ptr, indices, n_rows, inputs, "events");
    return SPARSE_BACKEND_DISPATCH(delta, "event_linear_backward", [&]() -> std::tuple<Tensor, Tensor, Tensor> {
        using T = scalar_t;
        const T* d = pointer<T>(delta, "delta");
        Tensor grad_input = empty(delta, {0});
        if (need_input == 1) {
            grad_input = empty(delta, {active_indices->numel()});
            const PaddedWeight<T> padded_weight(weight);
            const Rows wanted = rows(active_ptr, active_indices);
            parallel_for(0, n_rows, rows_per_thread(neurons), [&](int64_t first, int64_t last) {
                input_rows<T>(d, neurons, padded_weight.get(), wanted, first, last, output<T>(grad_input));
            });
        } else if (need_input == 2) {
            grad_input = torch::stable::matmul(delta, weight);
        }
        const Tiling tiling(n_rows, neurons, kWeightColumns);
        WeightSums<T> sums(need_weight, need_bias, inputs, tiling);
        if (need_weight || need_bias) {
            const auto input = events<T>(row_ptr, indices, values);
            for_weight_tasks(tiling, inputs, indices.numel(), [&](const Block& columns, const Share& share) {
                const Span range = share.of(inputs);
                outer_rows<T>(d, n_rows, neurons, columns, range.begin, range.end, input,
                              sums.weight(columns.first_column), sums.stride(), sums.bias(share));
            });
        }
        return {grad_input, sums.weight_grad(delta), sums.bias_grad(delta)};
    });
}

void outer_accumulate(Tensor weight_sum, Tensor bias_sum, const Tensor& given, const Tensor& row_ptr,
                      const Tensor& indices, MaybeTensor values) {
    const Tensor delta = in_order(given);
    const int64_t n_rows = delta.size(0), neurons = delta.size(1), inputs = weight_sum.size(0);
    check_events(row_ptr, indices, n_rows, inputs, "events");
    STD_TORCH_CHECK(weight_sum.size(1) == padded(neurons) && bias_sum.numel() == padded(neurons),
                    "weight_sum: expected [M, ", padded(neurons), "]");
    SPARSE_BACKEND_DISPATCH(delta, "outer_accumulate", [&] {
        const auto input = events<scalar_t>(row_ptr, indices, values);
        // One block: the sums' rows lie whole, so only ranges of inputs keep the cores' cache lines apart.
        for_weight_tasks(Tiling(n_rows, neurons, std::numeric_limits<int32_t>::max()), inputs,
                         input.row_ptr[n_rows] - input.row_ptr[0], [&](const Block& columns, const Share& share) {
                             const Span range = share.of(inputs);
                             outer_rows<scalar_t>(pointer<scalar_t>(delta, "delta"), n_rows, neurons, columns,
                                                  range.begin, range.end, input, output<scalar_t>(weight_sum),
                                                  padded(neurons),
                                                  share.index == 0 ? output<scalar_t>(bias_sum) : nullptr);
                         });
    });
}

}  // namespace
}  // namespace sparse_backend

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
    using namespace sparse_backend;
    m.impl("event_linear", TORCH_BOX(&event_linear));
    m.impl("event_linear_backward", TORCH_BOX(&event_linear_backward));
    m.impl("outer_accumulate", TORCH_BOX(&outer_accumulate));
}
