// CPU ops of the leaky neuron, alone and behind a linear layer; schemas in sparse_backend/ops/{leaky,linear_leaky}.py.
#include "sparse_backend/leaky.h"

#include <atomic>
#include <tuple>

#include "sparse_backend/events.h"
#include "sparse_backend/walks.h"
#include "tasks.h"

namespace sparse_backend {
namespace {

// ---- forward ----

using LeakyResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
LeakyResult forward(LeakyForward<T>& a, const Tensor& like, const Tensor& beta, const Tensor& threshold,
                    const MaybeTensor& mem, bool keep_mem, double max_active) {
    const int64_t steps = a.steps, batch = a.batch, neurons = a.neurons, n_rows = steps * batch;
    const std::vector<T> beta_padded = per_neuron<T>(beta, neurons, T(0), "beta");
    const std::vector<T> threshold_padded =
        per_neuron<T>(threshold, neurons, std::numeric_limits<T>::infinity(), "threshold");
    a.beta = beta_padded.data();
    a.threshold = threshold_padded.data();
    check_state(mem, batch, neurons, "mem");
    a.mem = pointer<T>(mem, "mem");
    Tensor mem_last = empty(like, {batch, neurons});
    Tensor mem_seq = empty_if(keep_mem, like, {steps, batch, neurons});
    Tensor p_last = empty_if(a.keep_p, like, {batch, neurons});
    a.mem_last = output<T>(mem_last);
    a.mem_seq = keep_mem ? output<T>(mem_seq) : nullptr;
    a.p_last = a.keep_p ? output<T>(p_last) : nullptr;

    const Tiling tiling(batch, neurons, kColumnsInCache, Tiling::free_group(batch, steps, neurons));
    const int64_t reset_steps = !a.keep_reset ? 0 : a.reset_delay ? std::min<int64_t>(steps, 1) : steps;
    const int64_t reset_rows = reset_steps * batch;
    Scratch<int32_t> n_spikes(tiling.blocks * n_rows), n_active(tiling.blocks * n_rows);
    Scratch<int32_t> n_resets(a.keep_reset ? tiling.blocks * n_rows : 0);
    std::vector<Found<T>> found(static_cast<size_t>(tiling.tasks()));
    const int64_t most = static_cast<int64_t>(max_active * static_cast<double>(n_rows * neurons));
    std::atomic<int64_t> total{0};
    parallel_for(0, tiling.tasks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end && total.load(std::memory_order_relaxed) <= most; ++i) {
            const int64_t offset = i / tiling.groups * n_rows;
            Found<T>& here = found[static_cast<size_t>(i)];
            leaky_forward<T>(a, tiling.task(i), n_spikes.get() + offset, n_active.get() + offset,
                             a.keep_reset ? n_resets.get() + i / tiling.groups * reset_rows : nullptr, here);
            total += here.active.size();
        }
    });
    if (total > most)
        return {empty(like, {0}),    empty(like, {0}),    empty(like, {0}),    empty_ints(like, 0),
                empty_ints(like, 0), empty_ints(like, 0), empty_ints(like, 0), empty_ints(like, 0),
                empty_ints(like, 0), empty(like, {0}),    empty(like, {0})};

    const auto lists = [&](Scratch<int32_t>& counts, int64_t list_steps, Growable<int32_t> Found<T>::* member) {
        return join_lists(like, tiling, list_steps, counts.get(),
                          [&](int64_t i) { return (found[static_cast<size_t>(i)].*member).data(); });
    };
    const Lists spikes = lists(n_spikes, steps, &Found<T>::spikes);
    const Lists active = lists(n_active, steps, &Found<T>::active);
    const Lists resets = a.keep_reset ? lists(n_resets, reset_steps, &Found<T>::resets)
                                      : Lists{empty_ints(like, 0), empty_ints(like, 0)};
    const auto beside_active = [&](Growable<T> Found<T>::* member) {
        return join_values<T>(like, tiling, steps, n_active.get(), active,
                              [&](int64_t i) { return (found[static_cast<size_t>(i)].*member).data(); });
    };
    return {beside_active(&Found<T>::x),
            mem_last,
            mem_seq,
            spikes.row_ptr,
            spikes.indices,
            active.row_ptr,
            active.indices,
            resets.row_ptr,
            resets.indices,
            a.keep_p ? beside_active(&Found<T>::p) : empty(like, {0}),
            p_last};
}

LeakyResult leaky(const Tensor& given, const Tensor& beta, const Tensor& threshold, MaybeTensor mem, MaybeTensor,
                  int64_t reset, bool reset_delay, double b_th, bool cover_spikes, bool keep_mem, bool keep_reset,
                  bool keep_p, double max_active) {
    const Current of(given);
    const Tensor& current = of.tensor;
    mem = in_order(mem);
    return SPARSE_BACKEND_DISPATCH(current, "leaky", [&] {
        LeakyForward<scalar_t> a{};
        a.steps = given.size(0), a.batch = given.size(1), a.neurons = given.size(2);
        a.current = pointer<scalar_t>(current, "current"), a.same_current = of.same;
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay, a.b_th = static_cast<scalar_t>(b_th);
        a.cover_spikes = cover_spikes, a.keep_reset = keep_reset, a.keep_p = keep_p;
        return forward<scalar_t>(a, current, beta, threshold, mem, keep_mem, max_active);
    });
}

LeakyResult linear_leaky(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values, MaybeTensor, MaybeTensor,
                         MaybeTensor, const Tensor& weight, MaybeTensor bias, const Tensor& beta,
                         const Tensor& threshold, MaybeTensor mem, MaybeTensor, MaybeTensor, int64_t, int64_t steps,
                         int64_t batch, int64_t reset, bool reset_delay, double b_th, bool cover_spikes, bool keep_mem,
                         bool keep_reset, bool keep_p, double max_active) {
    check_events(row_ptr, indices, steps * batch, weight.size(1), "input events");
    mem = in_order(mem);
    return SPARSE_BACKEND_DISPATCH(weight, "linear_leaky", [&] {
        LeakyForward<scalar_t> a{};
        const PaddedWeight<scalar_t> padded_weight(weight);
        const std::vector<scalar_t> bias_padded = padded_bias<scalar_t>(bias, weight.size(0));
        a.steps = steps, a.batch = batch, a.neurons = weight.size(0);
        a.input = events<scalar_t>(row_ptr, indices, values);
        a.from_events = true;
        a.weight = padded_weight.get();
        a.bias = bias.has_value() ? bias_padded.data() : nullptr;
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay, a.b_th = static_cast<scalar_t>(b_th);
        a.cover_spikes = cover_spikes, a.keep_reset = keep_reset, a.keep_p = keep_p;
        return forward<scalar_t>(a, weight, beta, threshold, mem, keep_mem, max_active);
    });
}

// ---- backward ----

// The tensors every backward of the sparse leaky neuron is given, and the struct made of them.
struct Saved {
    MaybeTensor grad_x, grad_mem_last, grad_mem_seq, x, g, spike_ptr, spike_indices;
    Tensor active_ptr, active_indices;
    MaybeTensor reset_ptr, reset_indices, p, p_last, mem_seq, mem;

    template <typename T>
    LeakyBackward<T> view(int64_t steps, int64_t batch, int64_t neurons, int64_t reset, bool reset_delay) {
        for (MaybeTensor* tensor : {&grad_x, &grad_mem_last, &grad_mem_seq, &x, &g, &p, &p_last, &mem_seq, &mem})
            *tensor = in_order(*tensor);
        LeakyBackward<T> a{};
        a.steps = steps, a.batch = batch, a.neurons = neurons;
        a.grad_x = pointer<T>(grad_x, "grad_x");
        a.grad_mem_last = pointer<T>(grad_mem_last, "grad_mem_last");
        a.grad_mem_seq = pointer<T>(grad_mem_seq, "grad_mem_seq");
        a.x = pointer<T>(x, "x");
        a.g = pointer<T>(g, "g");
        a.has_g = g.has_value();
        a.active = rows(active_ptr, active_indices);
        a.spikes = rows(spike_ptr, spike_indices);
        a.resets = rows(reset_ptr, reset_indices);
        a.p = pointer<T>(p, "p");
        a.p_last = pointer<T>(p_last, "p_last");
        a.mem_seq = pointer<T>(mem_seq, "mem_seq");
        a.mem = pointer<T>(mem, "mem");
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay;
        return a;
    }
};

template <typename T>
struct NeuronGrads {
    Tensor mem, beta, threshold;
};

// The walk over groups of samples with all columns: what is in `to`, and `sums` with the events of the input.
template <typename T>
NeuronGrads<T> walk_groups(const LeakyBackward<T>& a, const Tensor& like, RowsOut<T> to, const Events<T>& input,
                           SharedSums<T>& sums, bool need_mem, bool need_beta, bool need_threshold) {
    STD_TORCH_CHECK(
        !need_beta || a.p_last != nullptr || a.mem_seq != nullptr || a.steps <= 1 || a.batch * a.neurons == 0,
        "beta: expected p or mem_seq to have been kept for its gradient, got neither");
    const bool adds_up = need_beta || need_threshold || sums;
    const int64_t group = adds_up ? Tiling::fixed_group(a.batch) : Tiling::free_group(a.batch, a.steps, a.neurons);
    const Tiling tiling(a.batch, a.neurons, std::numeric_limits<int32_t>::max(), group);
    GroupSums<T> beta_sums(need_beta, tiling.groups, a.neurons),
        threshold_sums(need_threshold, tiling.groups, a.neurons);
    Tensor grad_mem = empty_if(need_mem, like, {a.batch, a.neurons});
    for_shares(sums ? sums.shares() : tiling.groups, tiling.groups, [&](int64_t share, int64_t k) {
        const Outer<T> outers[] = {sums.outer(share, input)};
        RowsOut<T> here = to;
        if (sums) here.outers = outers, here.bias = sums.bias(share);
        const NeuronSums<T> neuron_sums{beta_sums.of(k), threshold_sums.of(k)};
        rows_of_walk(a.batch, a.neurons, tiling.task(k), kColumnsInCache, here, [&](const Block& block, auto&& visit) {
            leaky_adjoint(a, block, neuron_sums, need_mem ? output<T>(grad_mem) : nullptr, visit);
        });
    });
    return {grad_mem, beta_sums.total(like, a.neurons), threshold_sums.total(like, a.neurons)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> leaky_backward(
    MaybeTensor grad_x, MaybeTensor grad_mem_last, MaybeTensor grad_mem_seq, MaybeTensor x, MaybeTensor g,
    MaybeTensor spike_ptr, MaybeTensor spike_indices, const Tensor& active_ptr, const Tensor& active_indices,
    MaybeTensor reset_ptr, MaybeTensor reset_indices, MaybeTensor p, MaybeTensor p_last, MaybeTensor mem_seq,
    MaybeTensor mem, const Tensor& beta, const Tensor& threshold, int64_t steps, int64_t batch, int64_t neurons,
    int64_t reset, bool reset_delay, bool need_mem, bool need_beta, bool need_threshold) {
    return SPARSE_BACKEND_DISPATCH(beta, "leaky_backward", [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
        Saved saved = make<Saved>(grad_x, grad_mem_last, grad_mem_seq, x, g, spike_ptr, spike_indices, active_ptr,
                                  active_indices, reset_ptr, reset_indices, p, p_last, mem_seq, mem);
        LeakyBackward<scalar_t> a = saved.view<scalar_t>(steps, batch, neurons, reset, reset_delay);
        const auto beta_padded = per_neuron<scalar_t>(beta, neurons, scalar_t(0), "beta");
        const auto threshold_padded = per_neuron<scalar_t>(threshold, neurons, scalar_t(0), "threshold");
        a.beta = beta_padded.data(), a.threshold = threshold_padded.data();
        Tensor delta = empty(beta, {steps, batch, neurons});
        SharedSums<scalar_t> none;
        const auto grads = walk_groups<scalar_t>(a, beta, {.delta = output<scalar_t>(delta)}, {}, none, need_mem,
                                                 need_beta, need_threshold);
        return {delta, grads.mem, grads.beta, grads.threshold};
    });
}

// The two exact formulas of the weight's gradient, docs/design.md; numbers as in sparse_backend/ops/linear_leaky.py.
enum WeightRule : int64_t { kByCounts = 0, kOverSpikes = 1, kOverActive = 2 };

// Whether to sum over active entries and traces rather than over input spikes and deltas. Costs in vector operations:
// a row added to a sum in cache about 4, one step of a decaying row about 2.5, a spike added to a trace about 3.
// walked: the deltas are there anyway.
template <typename T>
bool over_active(const LeakyBackward<T>& a, const Events<T>& input, int64_t inputs, bool scalar_beta, int64_t rule,
                 bool walked) {
    const bool exact = scalar_beta && a.grad_x != nullptr && a.grad_mem_last == nullptr && a.grad_mem_seq == nullptr &&
                       a.reset != kZero && !a.double_reset();
    if (!exact || rule == kOverSpikes) return false;
    if (rule == kOverActive) return true;
    const int64_t n_rows = a.steps * a.batch;
    const double spikes = input.row_ptr[n_rows] - input.row_ptr[0],
                 active = a.active.row_ptr[n_rows] - a.active.row_ptr[0];
    const double per_spike = static_cast<double>(padded(a.neurons)) / Vec<T>::width;
    const double per_active = static_cast<double>(padded(inputs)) / Vec<T>::width;
    const double decays = 2.5 * static_cast<double>(n_rows);
    return (4 * active + decays) * per_active + 3 * spikes < (4 * spikes + (walked ? 0 : decays)) * per_spike;
}

// The gradients of weight and bias by that formula. Tasks sum up ranges of inputs, each in memory of its own.
template <typename T>
std::pair<Tensor, Tensor> weight_over_active(const LeakyBackward<T>& a, const Tensor& weight, const Events<T>& input,
                                             bool need_weight, bool need_bias) {
    const int64_t neurons = weight.size(0), inputs = weight.size(1);
    Tensor grad_weight = empty_if(need_weight, weight, {neurons, inputs});
    Tensor grad_bias = empty_if(need_bias, weight, {neurons});
    const int64_t blocks = std::max<int64_t>(padded(inputs) / kPad, 1);
    parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kPad, last = std::min(end * kPad, inputs), width = padded(last - first);
        Scratch<T> sums(need_weight ? neurons * width : 0), bias(need_bias && begin == 0 ? neurons : 0);
        leaky_backward_weight_active<T>(a, Tiling::fixed_group(a.batch), first, last, input,
                                        need_weight ? sums.get() : nullptr, width,
                                        need_bias && begin == 0 ? bias.get() : nullptr);
        const auto copy = [](const T* from, int64_t n, T* to) {
            if (n > 0) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
        };
        for (int64_t j = 0; need_weight && j < neurons; ++j)
            copy(sums.get() + j * width, last - first, output<T>(grad_weight) + j * inputs + first);
        if (need_bias && begin == 0) copy(bias.get(), neurons, output<T>(grad_bias));
    });
    return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_leaky_backward(
    MaybeTensor grad_x, MaybeTensor grad_mem_last, MaybeTensor grad_mem_seq, const Tensor& row_ptr,
    const Tensor& indices, MaybeTensor values, MaybeTensor in_active_ptr, MaybeTensor in_active_indices,
    const Tensor& weight, MaybeTensor x, MaybeTensor g, MaybeTensor spike_ptr, MaybeTensor spike_indices,
    const Tensor& active_ptr, const Tensor& active_indices, MaybeTensor reset_ptr, MaybeTensor reset_indices,
    MaybeTensor p, MaybeTensor p_last, MaybeTensor mem_seq, MaybeTensor mem, const Tensor& beta,
    const Tensor& threshold, int64_t steps, int64_t batch, int64_t reset, bool reset_delay, int64_t weight_rule,
    int64_t need_input, bool need_weight, bool need_bias, bool need_mem, bool need_beta, bool need_threshold) {
    using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    return SPARSE_BACKEND_DISPATCH(weight, "linear_leaky_backward", [&]() -> Grads {
        using T = scalar_t;
        const int64_t neurons = weight.size(0), inputs = weight.size(1);
        Saved saved = make<Saved>(grad_x, grad_mem_last, grad_mem_seq, x, g, spike_ptr, spike_indices, active_ptr,
                                  active_indices, reset_ptr, reset_indices, p, p_last, mem_seq, mem);
        LeakyBackward<T> a = saved.view<T>(steps, batch, neurons, reset, reset_delay);
        const auto beta_padded = per_neuron<T>(beta, neurons, T(0), "beta");
        const auto threshold_padded = per_neuron<T>(threshold, neurons, T(0), "threshold");
        a.beta = beta_padded.data(), a.threshold = threshold_padded.data();
        const Events<T> input = events<T>(row_ptr, indices, values);

        Tensor grad_input = empty(weight, {0});
        std::optional<PaddedWeight<T>> padded_weight;
        std::optional<Tensor> delta;
        Rows wanted;
        if (need_input == 1) {
            wanted = rows(in_active_ptr, in_active_indices);
            grad_input = empty(weight, {in_active_indices->numel()});
            if (neurons == 0) torch::stable::zero_(grad_input);
            padded_weight.emplace(weight);
        } else if (need_input == 2) {
            delta = empty(weight, {steps * batch, neurons});
        }
        const bool need_walk = need_input || need_mem || need_beta || need_threshold;
        const int64_t shares = SharedSums<T>::shares_for(need_weight ? inputs : 0, neurons, steps, batch);
        const bool traces = (need_weight || need_bias) &&
                            over_active(a, input, inputs, beta.numel() == 1, weight_rule, need_walk && shares > 0);
        SharedSums<T> shared(traces ? 0 : shares, need_weight, need_bias, inputs, neurons);
        NeuronGrads<T> grads{empty(weight, {0}), empty(weight, {0}), empty(weight, {0})};
        if (need_walk || shared)
            grads = walk_groups<T>(a, weight,
                                   {.delta = delta ? output<T>(*delta) : nullptr,
                                    .weight = padded_weight ? padded_weight->get() : Weight<T>{},
                                    .wanted = wanted,
                                    .grad_input = need_input == 1 ? output<T>(grad_input) : nullptr},
                                   input, shared, need_mem, need_beta, need_threshold);
        if (need_input == 2) grad_input = torch::stable::matmul(*delta, weight);

        const auto with = [&](const Tensor& grad_weight, const Tensor& grad_bias) -> Grads {
            return {grad_input, grad_weight, grad_bias, grads.mem, grads.beta, grads.threshold};
        };
        if (shared) return with(shared.weight_grad(weight), shared.bias_grad(weight));
        if (traces) {
            const auto [grad_weight, grad_bias] = weight_over_active(a, weight, input, need_weight, need_bias);
            return with(grad_weight, grad_bias);
        }
        const Tiling tiling(batch, neurons, kWeightColumns);
        WeightSums<T> sums(need_weight, need_bias, inputs, tiling);
        if (need_weight || need_bias)
            for_weight_tasks(tiling, inputs, indices.numel(), [&](const Block& columns, const Share& share) {
                const Outer<T> outer[] = {{input, share.of(inputs), sums.weight(columns.first_column), sums.stride()}};
                sums_of_walk<T>(a.batch, tiling.group, columns, outer, sums.bias(share),
                                [&](const Block& block, auto&& visit) {
                                    leaky_adjoint(a, block, NeuronSums<T>{}, static_cast<T*>(nullptr), visit);
                                });
            });
        return with(sums.weight_grad(weight), sums.bias_grad(weight));
    });
}

}  // namespace
}  // namespace sparse_backend

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
    using namespace sparse_backend;
    m.impl("leaky", TORCH_BOX(&leaky));
    m.impl("leaky_backward", TORCH_BOX(&leaky_backward));
    m.impl("linear_leaky", TORCH_BOX(&linear_leaky));
    m.impl("linear_leaky_backward", TORCH_BOX(&linear_leaky_backward));
}
