// CUDA ops of the two-state neuron, alone and behind a linear layer; schemas in sparse_backend/ops/{lif,linear_lif}.py.
// How the kernels work together: docs/cuda.md.
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "gradients.h"
#include "listing.h"

namespace sparse_backend {
namespace {

// ---- forward ----

using LifResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A forward's arguments beside its current.
struct LifNeuron {
    Tensor mem_gain;
    MaybeTensor syn_decay, leak;
    Tensor threshold, reset_to;
    MaybeTensor v, i, recurrent;
    int64_t reset;
    bool discrete;
    double b_th;
    bool dense, keep_states, keep_drive, keep_inflow;
    double max_active;
};

template <typename T>
PerNeuron<T> coefficient(const Device& on, const MaybeTensor& tensor, int64_t neurons, const char* name) {
    return tensor.has_value() ? per_neuron<T>(on, *tensor, neurons, name) : PerNeuron<T>{};
}

// The sequence, chunk by chunk: `current_of(first_step, steps, scratch)` gives a chunk's currents.
template <typename T, typename CurrentOf>
LifResult forward(const Device& on, int64_t steps, int64_t batch, int64_t neurons, LifNeuron& neuron,
                  CurrentOf&& current_of) {
    const int64_t n_rows = steps * batch, step = batch * neurons;
    LifForwardScan<T> scan{};
    scan.batch = batch, scan.neurons = neurons;
    scan.mem_gain = per_neuron<T>(on, neuron.mem_gain, neurons, "mem_gain");
    scan.syn_decay = coefficient<T>(on, neuron.syn_decay, neurons, "syn_decay");
    scan.leak = coefficient<T>(on, neuron.leak, neurons, "leak");
    scan.threshold = per_neuron<T>(on, neuron.threshold, neurons, "threshold");
    scan.reset_to = per_neuron<T>(on, neuron.reset_to, neurons, "reset_to");
    scan.reset = static_cast<int>(neuron.reset), scan.discrete = neuron.discrete;
    scan.b_th = static_cast<T>(neuron.b_th), scan.dense = neuron.dense;
    check_state(neuron.v, batch, neurons, "v"), check_state(neuron.i, batch, neurons, "i");
    neuron.v = in_order(neuron.v), neuron.i = in_order(neuron.i);
    const T *const v_given = on.read<T>(neuron.v, "v"), *const i_given = on.read<T>(neuron.i, "i");
    const bool synaptic = neuron.syn_decay.has_value(), is_recurrent = neuron.recurrent.has_value();
    std::optional<PaddedWeight<T>> recurrent;
    if (is_recurrent) {
        STD_TORCH_CHECK(neuron.recurrent->size(0) == neurons && neuron.recurrent->size(1) == neurons,
                        "recurrent: expected [", neurons, ", ", neurons, "]");
        scan.recurrent = recurrent.emplace(on, *neuron.recurrent).of_sums();
    }
    const auto sequence = [&](bool wanted) { return on.make_if<T>(wanted, {steps, batch, neurons}); };
    const auto state = [&](bool wanted) { return on.make_if<T>(wanted, {batch, neurons}); };
    const bool apart = synaptic ? neuron.discrete : is_recurrent;  // what i goes on with is not what is handed out
    const Tensor v_last = state(true), i_last = state(synaptic), i_scratch = state(apart);
    const Tensor dense_x = sequence(neuron.dense), v_seq = sequence(neuron.keep_states);
    const Tensor i_seq = sequence(neuron.keep_states && synaptic), drive = sequence(neuron.keep_drive);
    const Tensor inflow = sequence(neuron.keep_inflow);
    const Tensor fired = on.zeros<int32_t>({is_recurrent ? batch : 0, words_of(neurons)});
    scan.v = on.write<T>(v_last);
    scan.i = synaptic ? on.write<T>(i_last) : nullptr;
    scan.i_state = apart ? on.write<T>(i_scratch) : scan.i;
    scan.fired = is_recurrent ? reinterpret_cast<uint32_t*>(on.write<int32_t>(fired)) : nullptr;

    const auto run = [&](int64_t first_step, int64_t here, T* scratch) {
        const auto part = [&](const Tensor& of, bool wanted) {
            return wanted ? on.write<T>(of) + first_step * step : nullptr;
        };
        const bool begins = first_step == 0;
        scan.steps = here;
        scan.x = neuron.dense ? part(dense_x, true) : scratch;
        scan.current = current_of(first_step, here, scan.x);
        scan.v_before = begins ? v_given : scan.v, scan.i_before = begins ? i_given : scan.i_state;
        scan.v_seq = part(v_seq, neuron.keep_states), scan.i_seq = part(i_seq, neuron.keep_states && synaptic);
        scan.drive = part(drive, neuron.keep_drive), scan.inflow = part(inflow, neuron.keep_inflow);
        on.check(lif_forward(scan, on.stream()));
    };
    const bool list_spikes = !neuron.dense || is_recurrent;
    if (n_rows * neurons == 0 || !list_spikes) {
        if (step > 0) run(0, steps, nullptr);
        const auto ptr = [&](bool wanted) { return wanted ? on.zeros<int32_t>({n_rows + 1}) : on.ints({0}); };
        return {neuron.dense ? dense_x : on.make<T>({0}),
                v_last,
                i_last,
                v_seq,
                i_seq,
                ptr(list_spikes),
                on.ints({0}),
                ptr(!neuron.dense),
                on.ints({0}),
                drive,
                inflow};
    }
    Listing<T> lists(on, steps, batch, neurons, {neuron.dense ? 0 : n_rows, n_rows, 0}, !neuron.dense, false);
    const int64_t most = static_cast<int64_t>(neuron.max_active * static_cast<double>(n_rows * neurons));
    const bool few = lists.run(most, [&](const typename Listing<T>::Chunk& chunk) {
        scan.spikes = lists.bits(kSpikes), scan.active = lists.bits(kActive);
        if (is_recurrent && chunk.first_step == 0)
            on.check(zero(scan.fired, batch * words_of(neurons) * static_cast<int64_t>(sizeof(uint32_t)), on.stream()));
        run(chunk.first_step, chunk.steps, lists.x_scratch);
    });
    if (!few) {
        const auto none = [&] { return on.make<T>({0}); };
        return {none(),       none(),       none(),       none(), none(), on.ints({0}),
                on.ints({0}), on.ints({0}), on.ints({0}), none(), none()};
    }
    return {neuron.dense ? dense_x : lists.x,
            v_last,
            i_last,
            v_seq,
            i_seq,
            lists.row_ptr[kSpikes],
            lists.indices[kSpikes],
            lists.row_ptr[kActive],
            lists.indices[kActive],
            drive,
            inflow};
}

LifResult lif(const Tensor& given, const Tensor& mem_gain, MaybeTensor syn_decay, MaybeTensor leak,
              const Tensor& threshold, const Tensor& reset_to, MaybeTensor v, MaybeTensor i, MaybeTensor recurrent,
              MaybeTensor, int64_t reset, bool discrete, bool, double b_th, bool dense, bool keep_states,
              bool keep_drive, bool keep_inflow, double max_active) {
    check_size(given.size(0) * given.size(1), given.size(2), "lif");
    const Tensor current = in_order(given);
    LifNeuron neuron{mem_gain, syn_decay, leak, threshold, reset_to,    v,          i,           recurrent,
                     reset,    discrete,  b_th, dense,     keep_states, keep_drive, keep_inflow, max_active};
    return SPARSE_BACKEND_DISPATCH(current, "lif", [&] {
        const Device on(current, "current");
        const int64_t batch = current.size(1), neurons = current.size(2);
        const auto* data = on.read<scalar_t>(current, "current");
        return forward<scalar_t>(
            on, current.size(0), batch, neurons, neuron,
            [&](int64_t first_step, int64_t, scalar_t*) { return data + first_step * batch * neurons; });
    });
}

LifResult linear_lif(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values, MaybeTensor, MaybeTensor,
                     MaybeTensor, const Tensor& weight, MaybeTensor bias, MaybeTensor, int64_t, int64_t steps,
                     int64_t batch, const Tensor& mem_gain, MaybeTensor syn_decay, MaybeTensor leak,
                     const Tensor& threshold, const Tensor& reset_to, MaybeTensor v, MaybeTensor i,
                     MaybeTensor recurrent, MaybeTensor, int64_t reset, bool discrete, bool, double b_th, bool dense,
                     bool keep_states, bool keep_drive, bool keep_inflow, double max_active) {
    check_events(row_ptr, steps * batch, "input events");
    check_size(steps * batch, weight.size(0), "linear_lif");
    LifNeuron neuron{mem_gain, syn_decay, leak, threshold, reset_to,    v,          i,           recurrent,
                     reset,    discrete,  b_th, dense,     keep_states, keep_drive, keep_inflow, max_active};
    return SPARSE_BACKEND_DISPATCH(mem_gain, "linear_lif", [&] {
        const Device on(weight, "weight");
        const int64_t neurons = weight.size(0);
        const PaddedWeight<scalar_t> padded_weight(on, weight);
        const auto* bias_data = read_bias<scalar_t>(on, bias, neurons);
        const auto input = events<scalar_t>(on, row_ptr, indices, values);
        return forward<scalar_t>(on, steps, batch, neurons, neuron,
                                 [&](int64_t first_step, int64_t n, scalar_t* scratch) {
                                     on.check(currents(input, first_step * batch, n * batch, padded_weight.get(),
                                                       bias_data, neurons, scratch, on.stream()));
                                     return static_cast<const scalar_t*>(scratch);
                                 });
    });
}

// ---- backward ----

// What a backward can be asked for; the order of NEEDS in sparse_backend/reference/lif.py.
enum Needs : int64_t { kV, kI, kMemGain, kSynDecay, kLeak, kThreshold, kResetTo, kRecurrent };

// The arguments every backward of this neuron is given.
struct LifSaved {
    MaybeTensor grad_x, grad_v_last, grad_i_last, grad_v_seq, grad_i_seq, x, g, spike_ptr, spike_indices, active_ptr,
        active_indices, drive, inflow, first_reset;
    Tensor mem_gain;
    MaybeTensor syn_decay;
    Tensor threshold, reset_to;
    MaybeTensor recurrent;
    int64_t steps, batch, neurons;
    bool leaks;
    int64_t reset;
    bool discrete, detached;
    double b_th;
    bool dense;
    int64_t needs;

    bool need(int64_t which) const { return (needs >> which & 1) != 0; }
};

// Walks delta backwards in time, `chunk` steps at once, and calls visit(first_row, rows) with their delta in `delta`.
// Returns the gradients of NEEDS, the recurrent weights' included, then that of the bias.
template <typename T, typename Visit>
std::vector<Tensor> adjoint(const Device& on, LifSaved& saved, bool need_bias, int64_t chunk, T* delta, Visit&& visit) {
    const int64_t steps = saved.steps, batch = saved.batch, neurons = saved.neurons, n_rows = steps * batch;
    const int64_t words = words_of(neurons), step = batch * neurons;
    for (MaybeTensor* tensor : {&saved.grad_x, &saved.grad_v_last, &saved.grad_i_last, &saved.grad_v_seq,
                                &saved.grad_i_seq, &saved.x, &saved.g, &saved.drive, &saved.inflow, &saved.first_reset})
        *tensor = in_order(*tensor);
    check_sequence(saved.drive, saved.need(kMemGain), n_rows * neurons, "drive");
    check_sequence(saved.inflow, saved.need(kSynDecay), n_rows * neurons, "inflow");
    LifBackwardScan<T> a{};
    a.total_steps = steps, a.batch = batch, a.neurons = neurons;
    a.grad_x = on.read<T>(saved.grad_x, "grad_x");
    a.grad_v_last = on.read<T>(saved.grad_v_last, "grad_v_last");
    a.grad_i_last = on.read<T>(saved.grad_i_last, "grad_i_last");
    a.grad_v_seq = on.read<T>(saved.grad_v_seq, "grad_v_seq");
    a.grad_i_seq = on.read<T>(saved.grad_i_seq, "grad_i_seq");
    a.x = on.read<T>(saved.x, "x"), a.g = on.read<T>(saved.g, "g");
    a.has_g = saved.g.has_value();
    a.drive = on.read<T>(saved.drive, "drive"), a.inflow = on.read<T>(saved.inflow, "inflow");
    a.first_reset = on.read<uint8_t>(saved.first_reset, "first_reset");
    a.mem_gain = per_neuron<T>(on, saved.mem_gain, neurons, "mem_gain");
    a.syn_decay = coefficient<T>(on, saved.syn_decay, neurons, "syn_decay");
    a.threshold = per_neuron<T>(on, saved.threshold, neurons, "threshold");
    a.reset_to = per_neuron<T>(on, saved.reset_to, neurons, "reset_to");
    a.leaks = saved.leaks, a.reset = static_cast<int>(saved.reset), a.discrete = saved.discrete;
    a.b_th = static_cast<T>(saved.b_th), a.dense = saved.dense;
    a.attached = !saved.detached && !a.discrete && a.reset != kNone && a.has_g;
    const bool comes_back = saved.recurrent.has_value() && a.has_g;

    const auto per_sample = [&](bool wanted) { return on.make<T>({wanted ? batch : 0, neurons}); };
    const Tensor of_v = per_sample(true), of_i = per_sample(true);
    const int64_t summed[] = {kMemGain, kSynDecay, kLeak, kThreshold, kResetTo};
    T** const into[] = {&a.gain_sum, &a.decay_sum, &a.leak_sum, &a.threshold_sum, &a.reset_sum};
    std::vector<Tensor> sums;
    for (int k = 0; k < 5; ++k) {
        sums.push_back(per_sample(saved.need(summed[k])));
        *into[k] = saved.need(summed[k]) ? on.write<T>(sums.back()) : nullptr;
    }
    const Tensor bias = per_sample(need_bias);
    a.bias_sum = need_bias ? on.write<T>(bias) : nullptr;
    a.of_v = on.write<T>(of_v), a.of_i = on.write<T>(of_i), a.delta = delta;

    std::vector<Tensor> kept;  // scratch that kernels read until the walk is over
    const auto keep = [&](Tensor tensor) { return on.write<int32_t>(kept.emplace_back(std::move(tensor))); };
    std::optional<PaddedWeight<T>> recurrent;
    std::optional<WeightGradient<T>> of_recurrent;
    if (saved.need(kRecurrent)) {
        Events<T> spikes;
        static_cast<Rows&>(spikes) = rows(on, saved.spike_ptr, saved.spike_indices);
        of_recurrent.emplace(on, true, spikes, neurons, neurons, std::min(chunk, std::max<int64_t>(steps, 1)) * batch);
    }
    if (n_rows * neurons > 0) {
        Locations lists;
        int n_lists = 0;
        const auto add = [&](const MaybeTensor& row_ptr, const MaybeTensor& indices, int32_t* offset) {
            auto* const bits = reinterpret_cast<uint32_t*>(keep(on.ints({n_rows, words})));
            lists.list[n_lists++] = {rows(on, row_ptr, indices), n_rows, bits, offset};
            return bits;
        };
        if (!a.dense) {
            int32_t* const offset = keep(on.ints({n_rows, words}));
            a.active = add(saved.active_ptr, saved.active_indices, offset), a.active_offset = offset;
            a.active_rows = rows(on, saved.active_ptr, saved.active_indices);
        }
        if (saved.spike_ptr.has_value()) a.spikes = add(saved.spike_ptr, saved.spike_indices, nullptr);
        if (n_lists > 0) on.check(locate(lists, n_lists, neurons, on.stream()));
        if (comes_back) {
            a.recurrent = recurrent.emplace(on, *saved.recurrent).of_sums();
            a.back = on.write<T>(kept.emplace_back(per_sample(true)));
        }
    }
    for (int64_t last = n_rows * neurons > 0 ? steps : 0; last > 0; last = a.first_step) {
        a.first_step = std::max<int64_t>(last - chunk, 0);
        a.steps = last - a.first_step;
        a.begins = last == steps;
        on.check(lif_backward(a, on.stream()));
        visit(a.first_step * batch, a.steps * batch);
        if (of_recurrent) {  // delta of a step meets the spikes of the one before
            const int64_t skipped = a.first_step == 0 ? 1 : 0;
            of_recurrent->add((a.first_step + skipped - 1) * batch, (a.steps - skipped) * batch,
                              delta + skipped * step);
        }
    }
    if (steps == 0 && step > 0) {
        const int64_t bytes = step * static_cast<int64_t>(sizeof(T));
        on.check(a.grad_v_last == nullptr ? zero(a.of_v, bytes, on.stream())
                                          : copy(a.of_v, a.grad_v_last, bytes, on.stream()));
        on.check(a.grad_i_last == nullptr ? zero(a.of_i, bytes, on.stream())
                                          : copy(a.of_i, a.grad_i_last, bytes, on.stream()));
    }
    const bool nothing = n_rows * neurons == 0;
    const auto total = [&](const Tensor& sum, bool wanted) {
        return wanted && nothing ? on.zeros<T>({neurons}) : over_samples<T>(on, sum, wanted);
    };
    std::vector<Tensor> grads{saved.need(kV) ? of_v : on.make<T>({0}), saved.need(kI) ? of_i : on.make<T>({0})};
    for (int k = 0; k < 5; ++k) grads.push_back(total(sums[static_cast<size_t>(k)], saved.need(summed[k])));
    grads.push_back(of_recurrent ? of_recurrent->deliver(true) : on.make<T>({0}));
    grads.push_back(total(bias, need_bias));
    return grads;
}

using LifGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LifGrads lif_backward_op(MaybeTensor grad_x, MaybeTensor grad_v_last, MaybeTensor grad_i_last, MaybeTensor grad_v_seq,
                         MaybeTensor grad_i_seq, MaybeTensor x, MaybeTensor g, MaybeTensor spike_ptr,
                         MaybeTensor spike_indices, MaybeTensor active_ptr, MaybeTensor active_indices,
                         MaybeTensor drive, MaybeTensor inflow, MaybeTensor first_reset, const Tensor& mem_gain,
                         MaybeTensor syn_decay, const Tensor& threshold, const Tensor& reset_to, MaybeTensor recurrent,
                         int64_t steps, int64_t batch, int64_t neurons, bool leaks, int64_t reset, bool discrete,
                         bool detached, double b_th, bool dense, int64_t needs) {
    LifSaved saved{grad_x,        grad_v_last, grad_i_last,    grad_v_seq, grad_i_seq, x,           g,        spike_ptr,
                   spike_indices, active_ptr,  active_indices, drive,      inflow,     first_reset, mem_gain, syn_decay,
                   threshold,     reset_to,    recurrent,      steps,      batch,      neurons,     leaks,    reset,
                   discrete,      detached,    b_th,           dense,      needs};
    return SPARSE_BACKEND_DISPATCH(mem_gain, "lif_backward", [&]() -> LifGrads {
        const Device on(mem_gain, "mem_gain");
        const Tensor delta = on.make<scalar_t>({steps, batch, neurons});
        const auto grads = adjoint<scalar_t>(on, saved, false, std::max<int64_t>(steps, 1), on.write<scalar_t>(delta),
                                             [](int64_t, int64_t) {});
        return {delta, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7]};
    });
}

using LinearLifGrads =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LinearLifGrads linear_lif_backward(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values,
                                   MaybeTensor in_active_ptr, MaybeTensor in_active_indices, const Tensor& weight,
                                   int64_t need_input, bool need_weight, bool need_bias, MaybeTensor grad_x,
                                   MaybeTensor grad_v_last, MaybeTensor grad_i_last, MaybeTensor grad_v_seq,
                                   MaybeTensor grad_i_seq, MaybeTensor x, MaybeTensor g, MaybeTensor spike_ptr,
                                   MaybeTensor spike_indices, MaybeTensor active_ptr, MaybeTensor active_indices,
                                   MaybeTensor drive, MaybeTensor inflow, MaybeTensor first_reset,
                                   const Tensor& mem_gain, MaybeTensor syn_decay, const Tensor& threshold,
                                   const Tensor& reset_to, MaybeTensor recurrent, int64_t steps, int64_t batch,
                                   int64_t neurons, bool leaks, int64_t reset, bool discrete, bool detached,
                                   double b_th, bool dense, int64_t needs) {
    LifSaved saved{grad_x,        grad_v_last, grad_i_last,    grad_v_seq, grad_i_seq, x,           g,        spike_ptr,
                   spike_indices, active_ptr,  active_indices, drive,      inflow,     first_reset, mem_gain, syn_decay,
                   threshold,     reset_to,    recurrent,      steps,      batch,      neurons,     leaks,    reset,
                   discrete,      detached,    b_th,           dense,      needs};
    return SPARSE_BACKEND_DISPATCH(mem_gain, "linear_lif_backward", [&]() -> LinearLifGrads {
        using T = scalar_t;
        const Device on(mem_gain, "mem_gain");
        const int64_t inputs = weight.size(1), n_rows = steps * batch;
        // A dense input gradient is a product with all of delta; otherwise delta exists a chunk at a time.
        const int64_t chunk = need_input == 2 || n_rows * neurons == 0
                                  ? std::max<int64_t>(steps, 1)
                                  : on.steps_in_cache(steps, batch * neurons * static_cast<int64_t>(sizeof(T)));
        const Tensor delta = on.make<T>({std::min(chunk, steps) * batch, neurons});
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
        const auto grads = adjoint<T>(on, saved, need_bias, chunk, delta_data, [&](int64_t first, int64_t here) {
            if (need_input == 1)
                on.check(input_gradient(delta_data, neurons, padded_weight->get(), wanted, first, here,
                                        on.write<T>(grad_input), on.stream()));
            of_weight.add(first, here, delta_data);
        });
        if (need_input == 2) grad_input = dense_input_gradient(delta, weight);
        return {grad_input, of_weight.deliver(need_weight),
                grads[8],   grads[0],
                grads[1],   grads[2],
                grads[3],   grads[4],
                grads[5],   grads[6],
                grads[7]};
    });
}

}  // namespace
}  // namespace sparse_backend

STABLE_TORCH_LIBRARY_IMPL(SPARSE_BACKEND_LIBRARY, SPARSE_BACKEND_KEY, m) {
    using namespace sparse_backend;
    m.impl("lif", TORCH_BOX(&lif));
    m.impl("lif_backward", TORCH_BOX(&lif_backward_op));
    m.impl("linear_lif", TORCH_BOX(&linear_lif));
    m.impl("linear_lif_backward", TORCH_BOX(&linear_lif_backward));
}
