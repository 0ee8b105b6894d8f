// CUDA ops of the leaky neuron, alone and behind a linear layer; schemas in sparse_backend/ops/{leaky,linear_leaky,
// event_linear,hub,leaky_dense}.py. How the kernels work together: docs/cuda.md.
#include <algorithm>
#include <tuple>

#include "gradients.h"
#include "listing.h"

namespace sparse_backend {
namespace {

// ---- forward ----

using LeakyResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a leaky forward is asked, apart from where its currents come from.
struct Request {
    int64_t steps, batch, neurons;
    const Tensor &beta, &threshold;
    MaybeTensor mem;
    int64_t reset;
    bool reset_delay;
    double b_th;
    bool cover_spikes, keep_mem, keep_reset, keep_p;
    double max_active;
};

LeakyResult too_many(const Device& on, ScalarType type) {
    const auto none = [&] { return on.make({0}, type); };
    return {none(),       none(),       none(),       on.ints({0}), on.ints({0}), on.ints({0}),
            on.ints({0}), on.ints({0}), on.ints({0}), none(),       none()};
}

// The sequence, chunk by chunk: `current_of(first_step, steps, scratch)` gives a chunk's currents.
template <typename T, typename CurrentOf>
LeakyResult forward(const Device& on, const Request& ask, CurrentOf&& current_of) {
    const int64_t steps = ask.steps, batch = ask.batch, neurons = ask.neurons;
    const int64_t n_rows = steps * batch, entries = n_rows * neurons;
    check_state(ask.mem, batch, neurons, "mem");
    const T* const mem_given = on.read<T>(ask.mem, "mem");
    ForwardScan<T> scan{};
    scan.beta = per_neuron<T>(on, ask.beta, neurons, "beta");
    scan.threshold = per_neuron<T>(on, ask.threshold, neurons, "threshold");
    scan.batch = batch, scan.neurons = neurons;
    scan.b_th = static_cast<T>(ask.b_th), scan.cover_spikes = ask.cover_spikes;
    scan.reset = static_cast<int>(ask.reset), scan.reset_delay = ask.reset_delay;

    Tensor mem_last = on.make<T>({batch, neurons});
    Tensor mem_seq = on.make_if<T>(ask.keep_mem, {steps, batch, neurons});
    Tensor p_last = on.make_if<T>(ask.keep_p, {batch, neurons});
    const int64_t reset_steps = !ask.keep_reset ? 0 : ask.reset_delay ? std::min<int64_t>(steps, 1) : steps;
    const Counts list_rows{n_rows, n_rows, reset_steps * batch};
    if (entries == 0) {
        const auto ptr = [&](int i) {
            return i < kResets || ask.keep_reset ? on.zeros<int32_t>({list_rows[i] + 1}) : on.ints({0});
        };
        if (batch * neurons > 0) {  // no steps
            const int64_t bytes = batch * neurons * static_cast<int64_t>(sizeof(T));
            on.check(mem_given == nullptr ? zero(on.write<T>(mem_last), bytes, on.stream())
                                          : copy(on.write<T>(mem_last), mem_given, bytes, on.stream()));
            if (ask.keep_p) on.check(zero(on.write<T>(p_last), bytes, on.stream()));
        }
        return {on.make<T>({0}), mem_last,     mem_seq,      ptr(kSpikes),    on.ints({0}), ptr(kActive),
                on.ints({0}),    ptr(kResets), on.ints({0}), on.make<T>({0}), p_last};
    }
    Listing<T> lists(on, steps, batch, neurons, list_rows, true, ask.keep_p);
    const int64_t most = static_cast<int64_t>(ask.max_active * static_cast<double>(entries));
    const bool few = lists.run(most, [&](const typename Listing<T>::Chunk& chunk) {
        const bool begins = chunk.first_step == 0;
        scan.steps = chunk.steps;
        scan.x = lists.x_scratch, scan.p = lists.p_scratch;
        scan.current = current_of(chunk.first_step, chunk.steps, lists.x_scratch);
        scan.mem = on.write<T>(mem_last), scan.mem_before = begins ? mem_given : scan.mem;
        scan.p_after = ask.keep_p ? on.write<T>(p_last) : nullptr, scan.p_before = begins ? nullptr : scan.p_after;
        scan.mem_seq = ask.keep_mem ? on.write<T>(mem_seq) + chunk.first_step * batch * neurons : nullptr;
        scan.active = lists.bits(kActive), scan.spikes = lists.bits(kSpikes), scan.resets = lists.bits(kResets);
        scan.reset_steps = lists.rows_in(kResets, chunk) / batch;
        on.check(leaky_forward(scan, on.stream()));
    });
    if (!few) return too_many(on, scalar_type<T>());
    return {lists.x,
            mem_last,
            mem_seq,
            lists.row_ptr[kSpikes],
            lists.indices[kSpikes],
            lists.row_ptr[kActive],
            lists.indices[kActive],
            lists.row_ptr[kResets],
            lists.indices[kResets],
            lists.p,
            p_last};
}

LeakyResult leaky(const Tensor& given, const Tensor& beta, const Tensor& threshold, MaybeTensor mem, MaybeTensor,
                  int64_t reset, bool reset_delay, double b_th, bool cover_spikes, bool keep_mem, bool keep_reset,
                  bool keep_p, double max_active) {
    check_size(given.size(0) * given.size(1), given.size(2), "leaky");
    const Tensor current = in_order(given);
    return SPARSE_BACKEND_DISPATCH(current, "leaky", [&] {
        const Device on(current, "current");
        const int64_t batch = current.size(1), neurons = current.size(2);
        const Request ask{current.size(0), batch, neurons,      beta,     threshold,  in_order(mem), reset,
                          reset_delay,     b_th,  cover_spikes, keep_mem, keep_reset, keep_p,        max_active};
        const auto* data = on.read<scalar_t>(current, "current");
        return forward<scalar_t>(
            on, ask, [&](int64_t first_step, int64_t, scalar_t*) { return data + first_step * batch * neurons; });
    });
}

LeakyResult linear_leaky(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values, MaybeTensor, MaybeTensor,
                         MaybeTensor, const Tensor& weight, MaybeTensor bias, const Tensor& beta,
                         const Tensor& threshold, MaybeTensor mem, MaybeTensor, MaybeTensor, int64_t, int64_t steps,
                         int64_t batch, int64_t reset, bool reset_delay, double b_th, bool cover_spikes, bool keep_mem,
                         bool keep_reset, bool keep_p, double max_active) {
    check_events(row_ptr, steps * batch, "input events");
    check_size(steps * batch, weight.size(0), "linear_leaky");
    return SPARSE_BACKEND_DISPATCH(beta, "linear_leaky", [&] {
        const Device on(weight, "weight");
        const int64_t neurons = weight.size(0);
        const PaddedWeight<scalar_t> padded_weight(on, weight);
        const auto* bias_data = read_bias<scalar_t>(on, bias, neurons);
        const auto input = events<scalar_t>(on, row_ptr, indices, values);
        const Request ask{steps,       batch, neurons,      beta,     threshold,  in_order(mem), reset,
                          reset_delay, b_th,  cover_spikes, keep_mem, keep_reset, keep_p,        max_active};
        return forward<scalar_t>(on, ask, [&](int64_t first_step, int64_t n, scalar_t* scratch) {
            on.check(currents(input, first_step * batch, n * batch, padded_weight.get(), bias_data, neurons, scratch,
                              on.stream()));
            return static_cast<const scalar_t*>(scratch);
        });
    });
}

// ---- backward ----

// The tensors every backward of the sparse leaky neuron is given.
struct Saved {
    MaybeTensor grad_x, grad_mem_last, grad_mem_seq, x, g, spike_ptr, spike_indices;
    Tensor active_ptr, active_indices;
    MaybeTensor reset_ptr, reset_indices, p, p_last, mem_seq, mem;
    int64_t steps, batch, neurons, reset;
    bool reset_delay;

    void make_contiguous() {
        for (MaybeTensor* tensor : {&grad_x, &grad_mem_last, &grad_mem_seq, &x, &g, &p, &p_last, &mem_seq, &mem})
            *tensor = in_order(*tensor);
    }
};

struct NeuronGrads {
    Tensor mem, beta, threshold, bias;  // empty where not needed
};

struct Needs {
    bool mem, beta, threshold, bias;
};

// Walks delta backwards in time, `chunk` steps at once, and calls visit(first_row, rows) with their delta in `delta`.
template <typename T, typename Visit>
NeuronGrads adjoint(const Device& on, Saved& saved, const Tensor& beta, const Tensor& threshold, Needs need,
                    int64_t chunk, T* delta, Visit&& visit) {
    const int64_t steps = saved.steps, batch = saved.batch, neurons = saved.neurons, n_rows = steps * batch;
    const int64_t words = words_of(neurons);
    saved.make_contiguous();
    BackwardScan<T> a{};
    a.batch = batch, a.neurons = neurons;
    a.grad_x = on.read<T>(saved.grad_x, "grad_x");
    a.grad_mem_last = on.read<T>(saved.grad_mem_last, "grad_mem_last");
    a.grad_mem_seq = on.read<T>(saved.grad_mem_seq, "grad_mem_seq");
    a.x = on.read<T>(saved.x, "x"), a.g = on.read<T>(saved.g, "g");
    a.has_g = saved.g.has_value();
    a.p = on.read<T>(saved.p, "p"), a.p_last = on.read<T>(saved.p_last, "p_last");
    a.mem_seq = on.read<T>(saved.mem_seq, "mem_seq"), a.mem = on.read<T>(saved.mem, "mem");
    a.beta = per_neuron<T>(on, beta, neurons, "beta");
    a.threshold = per_neuron<T>(on, threshold, neurons, "threshold");
    a.reset = static_cast<int>(saved.reset), a.reset_delay = saved.reset_delay;
    STD_TORCH_CHECK(!need.beta || a.p_last != nullptr || a.mem_seq != nullptr || steps <= 1 || batch * neurons == 0,
                    "beta: expected p or mem_seq to have been kept for its gradient, got neither");
    const auto per_sample = [&](bool wanted) { return on.make<T>({wanted ? batch : 0, neurons}); };
    Tensor carried = per_sample(true), bias = per_sample(need.bias), of_beta = per_sample(need.beta),
           of_threshold = per_sample(need.threshold);
    if (n_rows * neurons == 0) {
        if (batch * neurons > 0) {  // no steps
            const int64_t bytes = batch * neurons * static_cast<int64_t>(sizeof(T));
            on.check(a.grad_mem_last == nullptr ? zero(on.write<T>(carried), bytes, on.stream())
                                                : copy(on.write<T>(carried), a.grad_mem_last, bytes, on.stream()));
        }
        const auto none = [&](bool wanted) { return on.zeros<T>({wanted ? neurons : 0}); };
        return {need.mem ? carried : on.make<T>({0}), none(need.beta), none(need.threshold), none(need.bias)};
    }
    const bool has_spikes = saved.spike_ptr.has_value();
    Tensor bits = on.ints({has_spikes ? 3 : 1, n_rows, words}), offset = on.ints({n_rows, words});
    auto* const bit_data = reinterpret_cast<uint32_t*>(on.write<int32_t>(bits));
    Locations lists;
    int n_lists = 1;
    lists.list[0] = {rows(on, saved.active_ptr, saved.active_indices), n_rows, bit_data, on.write<int32_t>(offset)};
    a.active = bit_data, a.active_offset = on.write<int32_t>(offset);
    if (has_spikes) {
        a.spikes = bit_data + n_rows * words;
        lists.list[n_lists++] = {rows(on, saved.spike_ptr, saved.spike_indices), n_rows, bit_data + n_rows * words,
                                 nullptr};
    }
    if (has_spikes && saved.reset_ptr.has_value()) {
        a.resets = bit_data + 2 * n_rows * words;
        lists.list[n_lists++] = {rows(on, saved.reset_ptr, saved.reset_indices), saved.reset_ptr->numel() - 1,
                                 bit_data + 2 * n_rows * words, nullptr};
    }
    on.check(locate(lists, n_lists, neurons, on.stream()));
    a.delta = delta, a.carried = on.write<T>(carried);
    a.bias_sum = need.bias ? on.write<T>(bias) : nullptr;
    a.beta_sum = need.beta ? on.write<T>(of_beta) : nullptr;
    a.threshold_sum = need.threshold ? on.write<T>(of_threshold) : nullptr;
    for (int64_t last = steps; last > 0; last = a.first_step) {
        a.first_step = std::max<int64_t>(last - chunk, 0);
        a.steps = last - a.first_step;
        a.begins = last == steps;
        on.check(leaky_backward(a, on.stream()));
        visit(a.first_step * batch, a.steps * batch);
    }
    return {need.mem ? carried : on.make<T>({0}), over_samples<T>(on, of_beta, need.beta),
            over_samples<T>(on, of_threshold, need.threshold), over_samples<T>(on, bias, need.bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> leaky_backward_op(
    MaybeTensor grad_x, MaybeTensor grad_mem_last, MaybeTensor grad_mem_seq, MaybeTensor x, MaybeTensor g,
    MaybeTensor spike_ptr, MaybeTensor spike_indices, const Tensor& active_ptr, const Tensor& active_indices,
    MaybeTensor reset_ptr, MaybeTensor reset_indices, MaybeTensor p, MaybeTensor p_last, MaybeTensor mem_seq,
    MaybeTensor mem, const Tensor& beta, const Tensor& threshold, int64_t steps, int64_t batch, int64_t neurons,
    int64_t reset, bool reset_delay, bool need_mem, bool need_beta, bool need_threshold) {
    return SPARSE_BACKEND_DISPATCH(beta, "leaky_backward", [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
        const Device on(active_ptr, "active_ptr");
        Saved saved{
            grad_x,         grad_mem_last, grad_mem_seq,  x,          g,      spike_ptr, spike_indices, active_ptr,
            active_indices, reset_ptr,     reset_indices, p,          p_last, mem_seq,   mem,           steps,
            batch,          neurons,       reset,         reset_delay};
        Tensor delta = on.make<scalar_t>({steps, batch, neurons});
        const auto grads =
            adjoint<scalar_t>(on, saved, beta, threshold, {need_mem, need_beta, need_threshold, false},
                              std::max<int64_t>(steps, 1), on.write<scalar_t>(delta), [](int64_t, int64_t) {});
        return {delta, grads.mem, grads.beta, grads.threshold};
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_leaky_backward(
    MaybeTensor grad_x, MaybeTensor grad_mem_last, MaybeTensor grad_mem_seq, const Tensor& row_ptr,
    const Tensor& indices, MaybeTensor values, MaybeTensor in_active_ptr, MaybeTensor in_active_indices,
    const Tensor& weight, MaybeTensor x, MaybeTensor g, MaybeTensor spike_ptr, MaybeTensor spike_indices,
    const Tensor& active_ptr, const Tensor& active_indices, MaybeTensor reset_ptr, MaybeTensor reset_indices,
    MaybeTensor p, MaybeTensor p_last, MaybeTensor mem_seq, MaybeTensor mem, const Tensor& beta,
    const Tensor& threshold, int64_t steps, int64_t batch, int64_t reset, bool reset_delay, int64_t, int64_t need_input,
    bool need_weight, bool need_bias, bool need_mem, bool need_beta, bool need_threshold) {
    using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    return SPARSE_BACKEND_DISPATCH(beta, "linear_leaky_backward", [&]() -> Grads {
        using T = scalar_t;
        const Device on(active_ptr, "active_ptr");
        const int64_t neurons = weight.size(0), inputs = weight.size(1), n_rows = steps * batch;
        Saved saved{
            grad_x,         grad_mem_last, grad_mem_seq,  x,          g,      spike_ptr, spike_indices, active_ptr,
            active_indices, reset_ptr,     reset_indices, p,          p_last, mem_seq,   mem,           steps,
            batch,          neurons,       reset,         reset_delay};
        // A dense input gradient is a product with all of delta; otherwise delta exists a chunk at a time.
        const int64_t chunk = need_input == 2 || n_rows * neurons == 0
                                  ? std::max<int64_t>(steps, 1)
                                  : on.steps_in_cache(steps, batch * neurons * static_cast<int64_t>(sizeof(T)));
        Tensor delta = on.make<T>({std::min(chunk, steps) * batch, neurons});
        T* const delta_data = on.write<T>(delta);
        Tensor grad_input = on.make<T>({0});
        std::optional<PaddedWeight<T>> padded_weight;
        Rows wanted;
        if (need_input == 1) {
            wanted = rows(on, in_active_ptr, in_active_indices);
            grad_input = on.zeros<T>({in_active_indices->numel()});  // the list may be longer than its rows
            padded_weight.emplace(on, weight);
        }
        WeightGradient<T> of_weight(on, need_weight, events<T>(on, row_ptr, indices, values), inputs, neurons,
                                    delta.size(0));
        const auto grads =
            adjoint<T>(on, saved, beta, threshold, {need_mem, need_beta, need_threshold, need_bias}, chunk, delta_data,
                       [&](int64_t first, int64_t here) {
                           if (need_input == 1)
                               on.check(input_gradient(delta_data, neurons, padded_weight->get(), wanted, first, here,
                                                       on.write<T>(grad_input), on.stream()));
                           of_weight.add(first, here, delta_data);
                       });
        if (need_input == 2) grad_input = dense_input_gradient(delta, weight);
        return {grad_input, of_weight.deliver(need_weight), grads.bias, grads.mem, grads.beta, grads.threshold};
    });
}

// ---- linear of events, dense currents ----

Tensor event_linear(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values, MaybeTensor, MaybeTensor,
                    MaybeTensor, const Tensor& weight, MaybeTensor bias, MaybeTensor, int64_t) {
    const int64_t n_rows = row_ptr.numel() - 1, neurons = weight.size(0);
    return SPARSE_BACKEND_DISPATCH_TYPE(sums_type(weight), "event_linear", [&] {
        const Device on(weight, "weight");
        Tensor current = on.make<scalar_t>({n_rows, neurons});
        if (current.numel() == 0) return current;
        const PaddedWeight<scalar_t> padded_weight(on, weight);
        on.check(currents(events<scalar_t>(on, row_ptr, indices, values), int64_t{0}, n_rows, padded_weight.get(),
                          read_bias<scalar_t>(on, bias, neurons), neurons, on.write<scalar_t>(current), on.stream()));
        return current;
    });
}

// Rows of delta that stay in the second-level cache, whole words of bits.
template <typename T>
int64_t rows_in_cache(const Device& on, int64_t n_rows, int64_t neurons) {
    const int64_t rows = on.steps_in_cache(n_rows, neurons * static_cast<int64_t>(sizeof(T)));
    return std::min(n_rows, (rows + 1023) / 1024 * 1024);
}

std::tuple<Tensor, Tensor, Tensor> event_linear_backward(const Tensor& given, const Tensor& row_ptr,
                                                         const Tensor& indices, MaybeTensor values,
                                                         MaybeTensor active_ptr, MaybeTensor active_indices,
                                                         const Tensor& weight, int64_t need_input, bool need_weight,
                                                         bool need_bias) {
    const Tensor delta = in_order(given);
    const int64_t n_rows = delta.size(0), neurons = weight.size(0), inputs = weight.size(1);
    check_events(row_ptr, n_rows, "events");
    return SPARSE_BACKEND_DISPATCH(delta, "event_linear_backward", [&]() -> std::tuple<Tensor, Tensor, Tensor> {
        using T = scalar_t;
        const Device on(delta, "delta");
        const T* d = on.read<T>(delta, "delta");
        Tensor grad_input = on.make<T>({0});
        if (need_input == 1) {
            grad_input = on.zeros<T>({active_indices->numel()});
            const PaddedWeight<T> padded_weight(on, weight);
            if (n_rows * neurons > 0)
                on.check(input_gradient(d, neurons, padded_weight.get(), rows(on, active_ptr, active_indices),
                                        int64_t{0}, n_rows, on.write<T>(grad_input), on.stream()));
        } else if (need_input == 2) {
            grad_input = dense_input_gradient(delta, weight);
        }
        const int64_t chunk = std::max<int64_t>(rows_in_cache<T>(on, n_rows, neurons), 1);
        WeightGradient<T> of_weight(on, need_weight, events<T>(on, row_ptr, indices, values), inputs, neurons, chunk);
        for (int64_t first = 0; first < n_rows; first += chunk)
            of_weight.add(first, std::min(chunk, n_rows - first), d + first * neurons);
        Tensor grad_bias = on.zeros<T>({need_bias ? neurons : 0});
        if (need_bias) add_rows<T>(on, d, n_rows, neurons, on.write<T>(grad_bias));
        return {grad_input, of_weight.deliver(need_weight), grad_bias};
    });
}

void outer_accumulate(Tensor weight_sum, Tensor bias_sum, const Tensor& given, const Tensor& row_ptr,
                      const Tensor& indices, MaybeTensor values) {
    const Tensor delta = in_order(given);
    const int64_t n_rows = delta.size(0), neurons = delta.size(1), inputs = weight_sum.size(0);
    check_events(row_ptr, n_rows, "events");
    STD_TORCH_CHECK(weight_sum.size(1) == padded(neurons) && bias_sum.numel() == padded(neurons),
                    "weight_sum: expected [M, ", padded(neurons), "]");
    SPARSE_BACKEND_DISPATCH(delta, "outer_accumulate", [&] {
        const Device on(delta, "delta");
        const auto* d = on.read<scalar_t>(delta, "delta");
        on.read<scalar_t>(weight_sum, "weight_sum");
        on.read<scalar_t>(bias_sum, "bias_sum");
        WeightGradient<scalar_t>(on, true, events<scalar_t>(on, row_ptr, indices, values), inputs, neurons, n_rows,
                                 weight_sum)
            .add(0, n_rows, d);
        add_rows<scalar_t>(on, d, n_rows, neurons, on.write<scalar_t>(bias_sum));
    });
}

// ---- every entry active ----

std::tuple<Tensor, Tensor, Tensor> leaky_dense(const Tensor& given, const Tensor& beta, const Tensor& threshold,
                                               MaybeTensor mem, MaybeTensor, int64_t reset, bool reset_delay, double,
                                               bool keep_mem) {
    const Tensor current = in_order(given);
    mem = in_order(mem);
    const int64_t steps = current.size(0), batch = current.size(1), neurons = current.size(2);
    check_state(mem, batch, neurons, "mem");
    return SPARSE_BACKEND_DISPATCH(current, "leaky_dense", [&]() -> std::tuple<Tensor, Tensor, Tensor> {
        const Device on(current, "current");
        Tensor x = on.make<scalar_t>({steps, batch, neurons}), mem_last = on.make<scalar_t>({batch, neurons});
        Tensor mem_seq = on.make_if<scalar_t>(keep_mem, {steps, batch, neurons});
        DenseForwardScan<scalar_t> a{};
        a.steps = steps, a.batch = batch, a.neurons = neurons;
        a.current = on.read<scalar_t>(current, "current"), a.mem = on.read<scalar_t>(mem, "mem");
        a.beta = per_neuron<scalar_t>(on, beta, neurons, "beta");
        a.threshold = per_neuron<scalar_t>(on, threshold, neurons, "threshold");
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay;
        a.x = on.write<scalar_t>(x), a.mem_last = on.write<scalar_t>(mem_last);
        a.mem_seq = keep_mem ? on.write<scalar_t>(mem_seq) : nullptr;
        on.check(leaky_dense_forward(a, on.stream()));
        return {x, mem_last, mem_seq};
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> leaky_dense_backward_op(
    MaybeTensor grad_x, MaybeTensor grad_mem_last, MaybeTensor grad_mem_seq, MaybeTensor x, MaybeTensor g,
    MaybeTensor mem_seq, MaybeTensor mem, const Tensor& beta, const Tensor& threshold, int64_t steps, int64_t batch,
    int64_t neurons, int64_t reset, bool reset_delay, double b_th, bool need_mem, bool need_beta, bool need_threshold) {
    for (MaybeTensor* tensor : {&grad_x, &grad_mem_last, &grad_mem_seq, &x, &g, &mem_seq, &mem})
        *tensor = in_order(*tensor);
    return SPARSE_BACKEND_DISPATCH(beta, "leaky_dense_backward", [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
        using T = scalar_t;
        // beta may be a CPU scalar's copy; what arrives from the graph says where the work is.
        const Tensor& like = grad_x ? *grad_x : grad_mem_last ? *grad_mem_last : grad_mem_seq ? *grad_mem_seq : beta;
        const Device on(like, "grad_x");
        Tensor delta = on.make<T>({steps, batch, neurons});
        const auto per_sample = [&](bool wanted) { return on.make<T>({wanted ? batch : 0, neurons}); };
        Tensor grad_mem = on.make_if<T>(need_mem, {batch, neurons});
        Tensor of_beta = per_sample(need_beta), of_threshold = per_sample(need_threshold);
        DenseBackwardScan<T> a{};
        a.steps = steps, a.batch = batch, a.neurons = neurons;
        a.grad_x = on.read<T>(grad_x, "grad_x"), a.grad_mem_last = on.read<T>(grad_mem_last, "grad_mem_last");
        a.grad_mem_seq = on.read<T>(grad_mem_seq, "grad_mem_seq");
        a.x = on.read<T>(x, "x"), a.g = on.read<T>(g, "g");
        a.mem_seq = on.read<T>(mem_seq, "mem_seq"), a.mem = on.read<T>(mem, "mem");
        a.beta = per_neuron<T>(on, beta, neurons, "beta");
        a.threshold = per_neuron<T>(on, threshold, neurons, "threshold");
        a.reset = static_cast<int>(reset), a.reset_delay = reset_delay;
        a.b_th = static_cast<T>(b_th);
        a.delta = on.write<T>(delta), a.grad_mem = need_mem ? on.write<T>(grad_mem) : nullptr;
        a.beta_sum = need_beta ? on.write<T>(of_beta) : nullptr;
        a.threshold_sum = need_threshold ? on.write<T>(of_threshold) : nullptr;
        on.check(leaky_dense_backward(a, on.stream()));
        return {delta, grad_mem, over_samples<T>(on, of_beta, need_beta),
                over_samples<T>(on, of_threshold, need_threshold)};
    });
}

}  // namespace
}  // namespace sparse_backend

STABLE_TORCH_LIBRARY_IMPL(SPARSE_BACKEND_LIBRARY, SPARSE_BACKEND_KEY, m) {
    using namespace sparse_backend;
    m.impl("leaky", TORCH_BOX(&leaky));
    m.impl("leaky_backward", TORCH_BOX(&leaky_backward_op));
    m.impl("linear_leaky", TORCH_BOX(&linear_leaky));
    m.impl("linear_leaky_backward", TORCH_BOX(&linear_leaky_backward));
    m.impl("event_linear", TORCH_BOX(&event_linear));
    m.impl("event_linear_backward", TORCH_BOX(&event_linear_backward));
    m.impl("outer_accumulate", TORCH_BOX(&outer_accumulate));
    m.impl("leaky_dense", TORCH_BOX(&leaky_dense));
    m.impl("leaky_dense_backward", TORCH_BOX(&leaky_dense_backward_op));
}
