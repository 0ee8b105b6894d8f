// CPU ops of the leaky neuron with every entry active; schemas in sparse_backend/ops/leaky_dense.py.
#include <tuple>

#include "sparse_backend/leaky.h"
#include "sparse_backend/walks.h"
#include "tasks.h"

namespace sparse_backend {
namespace {

std::tuple<Tensor, Tensor, Tensor> leaky_dense(const Tensor& given, const Tensor& beta, const Tensor& threshold,
                                               MaybeTensor mem, MaybeTensor, int64_t reset, bool reset_delay, double,
                                               bool keep_mem) {
    const Current of(given);
    const Tensor& current = of.tensor;
    mem = in_order(mem);
    const int64_t steps = given.size(0), batch = given.size(1), neurons = given.size(2);
    check_state(mem, batch, neurons, "mem");
    Tensor x = empty(current, {steps, batch, neurons}), mem_last = empty(current, {batch, neurons});
    Tensor mem_seq = empty_if(keep_mem, current, {steps, batch, neurons});
    SPARSE_BACKEND_DISPATCH(current, "leaky_dense", [&] {
        const auto beta_padded = per_neuron<scalar_t>(beta, neurons, scalar_t(0), "beta");
        const auto threshold_padded =
            per_neuron<scalar_t>(threshold, neurons, std::numeric_limits<scalar_t>::infinity(), "threshold");
        DenseForward<scalar_t> a{};
        a.steps = steps, a.batch = batch, a.neurons = neurons;
        a.current = pointer<scalar_t>(current, "current"), a.same_current = of.same;
        a.mem = pointer<scalar_t>(mem, "mem");
        a.beta = beta_padded.data(), a.threshold = threshold_padded.data();
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay;
        a.x = output<scalar_t>(x), a.mem_last = output<scalar_t>(mem_last);
        a.mem_seq = keep_mem ? output<scalar_t>(mem_seq) : nullptr;
        const Tiling tiling(batch, neurons, kColumnsInCache);
        parallel_for(0, tiling.tasks(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) leaky_dense_forward_block<scalar_t>(a, tiling.task(i));
        });
    });
    return {x, mem_last, mem_seq};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> leaky_dense_backward(
    MaybeTensor grad_x, MaybeTensor grad_mem_last, MaybeTensor grad_mem_seq, MaybeTensor x, MaybeTensor g,
    MaybeTensor mem_seq, MaybeTensor mem, const Tensor& beta, const Tensor& threshold, int64_t steps, int64_t batch,
    int64_t neurons, int64_t reset, bool reset_delay, double b_th, bool need_mem, bool need_beta, bool need_threshold) {
    for (MaybeTensor* tensor : {&grad_x, &grad_mem_last, &grad_mem_seq, &x, &g, &mem_seq, &mem})
        *tensor = in_order(*tensor);
    Tensor delta = empty(beta, {steps, batch, neurons});
    Tensor grad_mem = empty_if(need_mem, beta, {batch, neurons});
    return SPARSE_BACKEND_DISPATCH(beta, "leaky_dense_backward", [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
        using T = scalar_t;
        const auto beta_padded = per_neuron<T>(beta, neurons, T(0), "beta");
        const auto threshold_padded = per_neuron<T>(threshold, neurons, T(0), "threshold");
        DenseBackward<T> a{};
        a.steps = steps, a.batch = batch, a.neurons = neurons;
        a.grad_x = pointer<T>(grad_x, "grad_x"), a.grad_mem_last = pointer<T>(grad_mem_last, "grad_mem_last");
        a.grad_mem_seq = pointer<T>(grad_mem_seq, "grad_mem_seq");
        a.x = pointer<T>(x, "x"), a.g = pointer<T>(g, "g");
        a.mem_seq = pointer<T>(mem_seq, "mem_seq"), a.mem = pointer<T>(mem, "mem");
        a.beta = beta_padded.data(), a.threshold = threshold_padded.data();
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay;
        a.b_th = static_cast<T>(b_th);
        a.delta = output<T>(delta), a.grad_mem = need_mem ? output<T>(grad_mem) : nullptr;
        const Tiling tiling(batch, neurons, kColumnsInCache);
        GroupSums<T> beta_sums(need_beta, tiling.groups, neurons),
            threshold_sums(need_threshold, tiling.groups, neurons);
        parallel_for(0, tiling.tasks(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                leaky_dense_backward_block<T>(a, tiling.task(i),
                                              {beta_sums.of(i % tiling.groups), threshold_sums.of(i % tiling.groups)});
        });
        return {delta, grad_mem, beta_sums.total(beta, neurons), threshold_sums.total(beta, neurons)};
    });
}

}  // namespace
}  // namespace sparse_backend

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
    using namespace sparse_backend;
    m.impl("leaky_dense", TORCH_BOX(&leaky_dense));
    m.impl("leaky_dense_backward", TORCH_BOX(&leaky_dense_backward));
}
