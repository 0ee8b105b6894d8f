// CPU ops of the two-state neuron, alone and behind a linear layer; schemas in sparse_backend/ops/{lif,linear_lif}.py.
#include "sparse_backend/lif.h"

#include <atomic>
#include <tuple>

#include "sparse_backend/events.h"
#include "sparse_backend/walks.h"
#include "tasks.h"

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
LifResult forward(LifForward<T>& a, const Tensor& like, const LifNeuron& neuron) {
    const int64_t steps = a.steps, batch = a.batch, neurons = a.neurons, n_rows = steps * batch;
    const auto coefficient = [&](const Tensor& tensor, const char* name) {
        return per_neuron<T>(tensor, neurons, T(0), name);
    };
    const auto mem_gain = coefficient(neuron.mem_gain, "mem_gain"),
               threshold = coefficient(neuron.threshold, "threshold"),
               reset_to = coefficient(neuron.reset_to, "reset_to");
    a.leaks = neuron.leak.has_value();
    const auto leak = a.leaks ? coefficient(*neuron.leak, "leak") : std::vector<T>(mem_gain.size());
    const bool synaptic = neuron.syn_decay.has_value();
    const auto syn_decay = synaptic ? coefficient(*neuron.syn_decay, "syn_decay") : std::vector<T>(1);
    a.mem_gain = mem_gain.data(), a.leak = leak.data(), a.threshold = threshold.data(), a.reset_to = reset_to.data();
    a.syn_decay = synaptic ? syn_decay.data() : nullptr;
    check_state(neuron.v, batch, neurons, "v"), check_state(neuron.i, batch, neurons, "i");
    const MaybeTensor v = in_order(neuron.v), i = in_order(neuron.i);
    a.v = pointer<T>(v, "v"), a.i = pointer<T>(i, "i");
    std::optional<PaddedWeight<T>> recurrent;
    a.is_recurrent = neuron.recurrent.has_value();
    if (a.is_recurrent) {
        STD_TORCH_CHECK(neuron.recurrent->size(0) == neurons && neuron.recurrent->size(1) == neurons,
                        "recurrent: expected [", neurons, ", ", neurons, "]");
        a.recurrent = recurrent.emplace(*neuron.recurrent).get();
    }
    a.reset = static_cast<int>(neuron.reset), a.discrete = neuron.discrete;
    a.b_th = static_cast<T>(neuron.b_th), a.dense = neuron.dense;
    const auto sequence = [&](bool wanted, T*& to) {
        Tensor out = empty_if(wanted, like, {steps, batch, neurons});
        to = wanted ? output<T>(out) : nullptr;
        return out;
    };
    const Tensor v_last = empty(like, {batch, neurons});
    const Tensor i_last = empty_if(synaptic, like, {batch, neurons});
    a.v_last = output<T>(v_last), a.i_last = output<T>(i_last);
    const Tensor dense_x = sequence(neuron.dense, a.x), v_seq = sequence(neuron.keep_states, a.v_seq),
                 i_seq = sequence(neuron.keep_states && synaptic, a.i_seq),
                 drive = sequence(neuron.keep_drive, a.drive), inflow = sequence(neuron.keep_inflow, a.inflow);

    // Recurrence needs a sample's spikes of all columns before its next step.
    const int64_t widest = a.is_recurrent ? std::numeric_limits<int32_t>::max() : kColumnsInCache;
    const Tiling tiling(batch, neurons, widest, Tiling::free_group(batch, steps, neurons));
    const bool list_spikes = !neuron.dense || a.is_recurrent;
    Scratch<int32_t> n_spikes(list_spikes ? tiling.blocks * n_rows : 0);
    Scratch<int32_t> n_active(neuron.dense ? 0 : tiling.blocks * n_rows);
    std::vector<Found<T>> found(static_cast<size_t>(tiling.tasks()));
    const int64_t most = static_cast<int64_t>(neuron.max_active * static_cast<double>(n_rows * neurons));
    std::atomic<int64_t> total{0};
    parallel_for(0, tiling.tasks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end && total.load(std::memory_order_relaxed) <= most; ++k) {
            const int64_t offset = k / tiling.groups * n_rows;
            Found<T>& here = found[static_cast<size_t>(k)];
            lif_forward<T>(a, tiling.task(k), list_spikes ? n_spikes.get() + offset : nullptr,
                           neuron.dense ? nullptr : n_active.get() + offset, here);
            total += here.active.size();
        }
    });
    if (total > most)
        return {empty(like, {0}),    empty(like, {0}),    empty(like, {0}),    empty(like, {0}),
                empty(like, {0}),    empty_ints(like, 0), empty_ints(like, 0), empty_ints(like, 0),
                empty_ints(like, 0), empty(like, {0}),    empty(like, {0})};
    const auto list = [&](auto Found<T>::* member) {
        return [&found, member](int64_t k) { return (found[static_cast<size_t>(k)].*member).data(); };
    };
    Lists spikes{empty_ints(like, 0), empty_ints(like, 0)}, active{empty_ints(like, 0), empty_ints(like, 0)};
    Tensor x = dense_x;
    if (list_spikes) spikes = join_lists(like, tiling, steps, n_spikes.get(), list(&Found<T>::spikes));
    if (!neuron.dense) {
        active = join_lists(like, tiling, steps, n_active.get(), list(&Found<T>::active));
        x = join_values<T>(like, tiling, steps, n_active.get(), active, list(&Found<T>::x));
    }
    return {x,     v_last, i_last, v_seq, i_seq, spikes.row_ptr, spikes.indices, active.row_ptr, active.indices,
            drive, inflow};
}

LifResult lif(const Tensor& given, const Tensor& mem_gain, MaybeTensor syn_decay, MaybeTensor leak,
              const Tensor& threshold, const Tensor& reset_to, MaybeTensor v, MaybeTensor i, MaybeTensor recurrent,
              MaybeTensor, int64_t reset, bool discrete, bool, double b_th, bool dense, bool keep_states,
              bool keep_drive, bool keep_inflow, double max_active) {
    const Tensor current = in_order(given);
    const auto neuron = make<LifNeuron>(mem_gain, syn_decay, leak, threshold, reset_to, v, i, recurrent, reset,
                                        discrete, b_th, dense, keep_states, keep_drive, keep_inflow, max_active);
    return SPARSE_BACKEND_DISPATCH(current, "lif", [&] {
        LifForward<scalar_t> a{};
        a.steps = current.size(0), a.batch = current.size(1), a.neurons = current.size(2);
        a.current = pointer<scalar_t>(current, "current");
        return forward<scalar_t>(a, current, neuron);
    });
}

LifResult linear_lif(const Tensor& row_ptr, const Tensor& indices, MaybeTensor values, MaybeTensor, MaybeTensor,
                     MaybeTensor, const Tensor& weight, MaybeTensor bias, MaybeTensor, int64_t, int64_t steps,
                     int64_t batch, const Tensor& mem_gain, MaybeTensor syn_decay, MaybeTensor leak,
                     const Tensor& threshold, const Tensor& reset_to, MaybeTensor v, MaybeTensor i,
                     MaybeTensor recurrent, MaybeTensor, int64_t reset, bool discrete, bool, double b_th, bool dense,
                     bool keep_states, bool keep_drive, bool keep_inflow, double max_active) {
    check_events(row_ptr, indices, steps * batch, weight.size(1), "input events");
    const auto neuron = make<LifNeuron>(mem_gain, syn_decay, leak, threshold, reset_to, v, i, recurrent, reset,
                                        discrete, b_th, dense, keep_states, keep_drive, keep_inflow, max_active);
    return SPARSE_BACKEND_DISPATCH(weight, "linear_lif", [&] {
        LifForward<scalar_t> a{};
        const PaddedWeight<scalar_t> padded_weight(weight);
        const auto bias_padded = padded_bias<scalar_t>(bias, weight.size(0));
        a.steps = steps, a.batch = batch, a.neurons = weight.size(0);
        a.from_events = true;
        a.input = events<scalar_t>(row_ptr, indices, values);
        a.weight = padded_weight.get();
        a.bias = bias.has_value() ? bias_padded.data() : nullptr;
        return forward<scalar_t>(a, weight, neuron);
    });
}

// ---- backward ----

// What a backward can be asked for; the order of NEEDS in sparse_backend/reference/lif.py.
enum Needs : int64_t { kV, kI, kMemGain, kSynDecay, kLeak, kThreshold, kResetTo, kRecurrent };

// The arguments every backward of this neuron is given, and the struct made of them.
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

    bool need(Needs which) const { return needs >> which & 1; }
};

template <typename T>
class LifWalk {
  public:
    LifBackward<T> a{};

    explicit LifWalk(const LifSaved& saved) : saved_(saved) {
        for (MaybeTensor* tensor :
             {&saved_.grad_x, &saved_.grad_v_last, &saved_.grad_i_last, &saved_.grad_v_seq, &saved_.grad_i_seq,
              &saved_.x, &saved_.g, &saved_.drive, &saved_.inflow, &saved_.first_reset})
            *tensor = in_order(*tensor);
        const int64_t neurons = saved_.neurons;
        const int64_t entries = saved_.steps * saved_.batch * neurons;
        check_sequence(saved_.drive, saved_.need(kMemGain), entries, "drive");
        check_sequence(saved_.inflow, saved_.need(kSynDecay), entries, "inflow");
        mem_gain_ = per_neuron<T>(saved_.mem_gain, neurons, T(0), "mem_gain");
        threshold_ = per_neuron<T>(saved_.threshold, neurons, T(0), "threshold");
        reset_to_ = per_neuron<T>(saved_.reset_to, neurons, T(0), "reset_to");
        if (saved_.discrete) {
            keep_.assign(mem_gain_.size(), T(1));
            keep_.swap(mem_gain_);
        } else {
            for (const T gain : mem_gain_) keep_.push_back(saved_.leaks ? T(1) - gain : T(1));
        }
        a.steps = saved_.steps, a.batch = saved_.batch, a.neurons = neurons;
        a.grad_x = pointer<T>(saved_.grad_x, "grad_x");
        a.grad_v_last = pointer<T>(saved_.grad_v_last, "grad_v_last");
        a.grad_i_last = pointer<T>(saved_.grad_i_last, "grad_i_last");
        a.grad_v_seq = pointer<T>(saved_.grad_v_seq, "grad_v_seq");
        a.grad_i_seq = pointer<T>(saved_.grad_i_seq, "grad_i_seq");
        a.x = pointer<T>(saved_.x, "x"), a.g = pointer<T>(saved_.g, "g");
        a.active = rows(saved_.active_ptr, saved_.active_indices);
        a.spikes = rows(saved_.spike_ptr, saved_.spike_indices);
        a.drive = pointer<T>(saved_.drive, "drive"), a.inflow = pointer<T>(saved_.inflow, "inflow");
        a.first_reset = pointer<uint8_t>(saved_.first_reset, "first_reset");
        a.mem_gain = mem_gain_.data(), a.keep = keep_.data();
        if (saved_.syn_decay.has_value()) {
            syn_decay_ = per_neuron<T>(*saved_.syn_decay, neurons, T(0), "syn_decay");
            a.syn_decay = syn_decay_.data();
        }
        a.threshold = threshold_.data(), a.reset_to = reset_to_.data();
        a.reset = static_cast<int>(saved_.reset), a.discrete = saved_.discrete;
        a.b_th = static_cast<T>(saved_.b_th), a.dense = saved_.dense;
        a.attached = !saved_.detached && !a.discrete && a.reset != kNone && saved_.g.has_value();
        a.is_recurrent = saved_.recurrent.has_value() && saved_.g.has_value() && !a.dense;
        if (a.is_recurrent) {
            a.recurrent = recurrent_.emplace(*saved_.recurrent).get();
            through_ = empty(saved_.mem_gain, {saved_.active_indices->numel()});
            a.through = output<T>(*through_);
        }
    }
    LifWalk(const LifWalk&) = delete;

    // The sums of the wanted weights, where all of them together are small enough.
    struct Shared {
        SharedSums<T> input, recurrent;
        explicit operator bool() const { return input || recurrent; }
    };
    Shared shared_sums(bool need_weight, bool need_bias, int64_t inputs) const {
        const bool need_recurrent = saved_.need(kRecurrent);
        const int64_t together = (need_weight ? inputs : 0) + (need_recurrent ? a.neurons : 0);
        const int64_t shares = SharedSums<T>::shares_for(together, a.neurons, a.steps, a.batch);
        return {SharedSums<T>(shares, need_weight, need_bias, inputs, a.neurons),
                SharedSums<T>(shares, need_recurrent, false, a.neurons, a.neurons)};
    }

    // The walk over groups of samples with all columns: delta, what is in `to`, the sums `shared` with events of the
    // input, and the gradients of `needs` but the last.
    std::vector<Tensor> walk_groups(const std::optional<Tensor>& delta, RowsOut<T> to, const Events<T>& input,
                                    Shared& shared) {
        const bool adds_up = shared || saved_.needs >> kMemGain & ((1 << (kRecurrent - kMemGain)) - 1);
        const bool in_steps = saved_.dense && saved_.recurrent.has_value() && saved_.g.has_value() && a.steps > 0;
        const Tensor& like = saved_.mem_gain;
        const int64_t batch = a.batch, neurons = a.neurons;
        const Tiling tiling(
            batch, neurons, std::numeric_limits<int32_t>::max(),
            adds_up ? Tiling::fixed_group(batch) : Tiling::free_group(batch, in_steps ? 1 : a.steps, neurons));
        const auto sums_of = [&](Needs which) { return GroupSums<T>(saved_.need(which), tiling.groups, neurons); };
        GroupSums<T> sums[] = {sums_of(kMemGain), sums_of(kSynDecay), sums_of(kLeak), sums_of(kThreshold),
                               sums_of(kResetTo)};
        const auto state = [&](Needs which) { return empty_if(saved_.need(which), like, {batch, neurons}); };
        std::vector<Tensor> grads{state(kV), state(kI)};
        T* const grad_v = saved_.need(kV) ? output<T>(grads[0]) : nullptr;
        T* const grad_i = saved_.need(kI) ? output<T>(grads[1]) : nullptr;
        const Before before(a, static_cast<bool>(shared.recurrent));
        // What comes back through recurrent weights comes from all columns.
        const int64_t at_once = a.is_recurrent ? std::max<int64_t>(neurons, 1) : kColumnsInCache;
        const auto run = [&](const LifBackward<T>& now, T* to_delta, T* to_grad_v, T* to_grad_i) {
            for_shares(shared ? shared.input.shares() : tiling.groups, tiling.groups, [&](int64_t share, int64_t k) {
                const LifSums<T> here{sums[0].of(k), sums[1].of(k), sums[2].of(k), sums[3].of(k), sums[4].of(k)};
                const Outer<T> outers[] = {shared.input.outer(share, input),
                                           shared.recurrent.outer(share, before.events)};
                RowsOut<T> out = to;
                out.delta = to_delta;
                if (shared) out.outers = outers, out.bias = shared.input.bias(share);
                rows_of_walk(batch, neurons, tiling.task(k), at_once, out, [&](const Block& block, auto&& visit) {
                    lif_adjoint(now, block, here, to_grad_v, to_grad_i, visit);
                });
            });
        };
        if (in_steps)
            walk_steps(*delta, grad_v, grad_i, run);
        else
            run(a, delta ? output<T>(*delta) : nullptr, grad_v, grad_i);
        for (GroupSums<T>& sum : sums) grads.push_back(sum.total(like, neurons));
        if (a.is_recurrent) {  // resolved: from now on the neuron is one without recurrence
            a.grad_x = a.through, a.through = nullptr;
            a.is_recurrent = a.attached = false;
        }
        return grads;
    }

    // Gradients of the weight [N, M], the bias and the recurrent weights.
    std::tuple<Tensor, Tensor, Tensor> weights_of(Shared& shared) const {
        const Tensor& like = saved_.mem_gain;
        return {shared.input.weight_grad(like), shared.input.bias_grad(like), shared.recurrent.weight_grad(like)};
    }

    // The same where they were not summed up yet; `input` has n_events events of M inputs.
    std::tuple<Tensor, Tensor, Tensor> walk_weights(const Events<T>& input, int64_t inputs, int64_t n_events,
                                                    bool need_weight, bool need_bias) {
        const Before before(a, saved_.need(kRecurrent));
        const Tiling tiling(a.batch, a.neurons, kWeightColumns);
        WeightSums<T> sums(need_weight, need_bias, inputs, tiling);
        WeightSums<T> recurrent(before.wanted, false, a.neurons, tiling);
        if (need_weight || need_bias || before.wanted)
            for_weight_tasks(tiling, std::max(inputs, a.neurons), n_events + before.count,
                             [&](const Block& columns, const Share& share) {
                                 const int64_t first = columns.first_column;
                                 const Outer<T> outers[] = {
                                     {input, share.of(inputs), sums.weight(first), sums.stride()},
                                     {before.events, share.of(a.neurons), recurrent.weight(first), recurrent.stride()}};
                                 sums_of_walk<T>(a.batch, tiling.group, columns, outers, sums.bias(share),
                                                 [&](const Block& block, auto&& visit) {
                                                     lif_adjoint(a, block, {}, static_cast<T*>(nullptr),
                                                                 static_cast<T*>(nullptr), visit);
                                                 });
                             });
        const Tensor& like = saved_.mem_gain;
        return {sums.weight_grad(like), sums.bias_grad(like), recurrent.weight_grad(like)};
    }

    // Gradient of the recurrent weights where delta is at hand.
    Tensor recurrent_grad(const Tensor& delta) {
        const Before before(a, saved_.need(kRecurrent));
        const int64_t n_rows = a.steps * a.batch;
        const Tiling tiling(n_rows, a.neurons, kWeightColumns);
        WeightSums<T> sums(before.wanted, false, a.neurons, tiling);
        if (before.wanted)
            for_weight_tasks(tiling, a.neurons, before.count, [&](const Block& columns, const Share& share) {
                const Span range = share.of(a.neurons);
                outer_rows<T>(output<T>(delta), n_rows, a.neurons, columns, range.begin, range.end, before.events,
                              sums.weight(columns.first_column), sums.stride(), nullptr);
            });
        return sums.weight_grad(saved_.mem_gain);
    }

  private:
    // For each row the spikes of the step before, which recurrent weights meet.
    struct Before {
        bool wanted;
        std::vector<int32_t> row_ptr;
        Events<T> events;
        int64_t count = 0;

        Before(const LifBackward<T>& a, bool wanted) : wanted(wanted) {
            if (!wanted) return;
            const int64_t n_rows = a.steps * a.batch;
            row_ptr.assign(static_cast<size_t>(n_rows + 1), a.spikes.row_ptr[0]);
            for (int64_t r = a.batch; r <= n_rows; ++r) row_ptr[static_cast<size_t>(r)] = a.spikes.row_ptr[r - a.batch];
            events.row_ptr = row_ptr.data(), events.indices = a.spikes.indices;
            count = row_ptr.back() - row_ptr.front();
        }
        Before(const Before&) = delete;
    };

    // Step by step: a dense delta times the recurrent weights is a matrix product.
    template <typename Run>
    void walk_steps(const Tensor& delta, T* grad_v, T* grad_i, Run&& run) {
        const int64_t entries = a.batch * a.neurons;
        const Tensor lambda = empty(delta, {a.batch, a.neurons});  // dL/dv between two steps
        for (int64_t t = a.steps - 1; t >= 0; --t) {
            LifBackward<T> now = a;
            now.steps = 1;
            for (const T** part :
                 {&now.grad_x, &now.grad_v_seq, &now.grad_i_seq, &now.x, &now.g, &now.drive, &now.inflow})
                if (*part != nullptr) *part += t * entries;
            T* const here = output<T>(delta) + t * entries;
            if (t > 0 && a.x != nullptr) now.x_before = a.x + (t - 1) * entries;
            if (t > 0) now.first_reset = nullptr;
            std::optional<Tensor> back;
            if (t + 1 < a.steps) {
                now.grad_v_last = output<T>(lambda);
                now.grad_i_last = nullptr, now.delta_after = here + entries;
                back = torch::stable::matmul(torch::stable::select(delta, 0, t + 1), *saved_.recurrent);
                now.back = pointer<T>(*back, "back");
            }
            run(now, here, t == 0 ? grad_v : output<T>(lambda), t == 0 ? grad_i : nullptr);
        }
    }

    LifSaved saved_;
    std::vector<T> mem_gain_, keep_, syn_decay_, threshold_, reset_to_;
    std::optional<PaddedWeight<T>> recurrent_;
    std::optional<Tensor> through_;
};

using LifGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LifGrads lif_backward(MaybeTensor grad_x, MaybeTensor grad_v_last, MaybeTensor grad_i_last, MaybeTensor grad_v_seq,
                      MaybeTensor grad_i_seq, MaybeTensor x, MaybeTensor g, MaybeTensor spike_ptr,
                      MaybeTensor spike_indices, MaybeTensor active_ptr, MaybeTensor active_indices, MaybeTensor drive,
                      MaybeTensor inflow, MaybeTensor first_reset, const Tensor& mem_gain, MaybeTensor syn_decay,
                      const Tensor& threshold, const Tensor& reset_to, MaybeTensor recurrent, int64_t steps,
                      int64_t batch, int64_t neurons, bool leaks, int64_t reset, bool discrete, bool detached,
                      double b_th, bool dense, int64_t needs) {
    const auto saved =
        make<LifSaved>(grad_x, grad_v_last, grad_i_last, grad_v_seq, grad_i_seq, x, g, spike_ptr, spike_indices,
                       active_ptr, active_indices, drive, inflow, first_reset, mem_gain, syn_decay, threshold, reset_to,
                       recurrent, steps, batch, neurons, leaks, reset, discrete, detached, b_th, dense, needs);
    return SPARSE_BACKEND_DISPATCH(mem_gain, "lif_backward", [&]() -> LifGrads {
        LifWalk<scalar_t> walk(saved);
        const Tensor delta = empty(mem_gain, {steps, batch, neurons});
        LifWalk<scalar_t>::Shared none;
        const auto grads = walk.walk_groups(delta, {}, {}, none);
        return {
            delta, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], walk.recurrent_grad(delta)};
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
    const auto saved =
        make<LifSaved>(grad_x, grad_v_last, grad_i_last, grad_v_seq, grad_i_seq, x, g, spike_ptr, spike_indices,
                       active_ptr, active_indices, drive, inflow, first_reset, mem_gain, syn_decay, threshold, reset_to,
                       recurrent, steps, batch, neurons, leaks, reset, discrete, detached, b_th, dense, needs);
    return SPARSE_BACKEND_DISPATCH(weight, "linear_lif_backward", [&]() -> LinearLifGrads {
        using T = scalar_t;
        STD_TORCH_CHECK(!dense || !recurrent.has_value(), "recurrent: expected lists of active entries, got a dense x");
        LifWalk<T> walk(saved);
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
        const auto input = events<T>(row_ptr, indices, values);
        auto shared = walk.shared_sums(need_weight, need_bias, weight.size(1));
        std::vector<Tensor> grads;
        if (need_input || needs || walk.a.is_recurrent || shared)
            grads = walk.walk_groups(delta,
                                     {.weight = padded_weight ? padded_weight->get() : Weight<T>{},
                                      .wanted = wanted,
                                      .grad_input = need_input == 1 ? output<T>(grad_input) : nullptr},
                                     input, shared);
        else
            for (int k = kV; k < kRecurrent; ++k) grads.push_back(empty(weight, {0}));
        if (need_input == 2) grad_input = torch::stable::matmul(*delta, weight);
        const auto [grad_weight, grad_bias, grad_recurrent] =
            shared ? walk.weights_of(shared)
                   : walk.walk_weights(input, weight.size(1), indices.numel(), need_weight, need_bias);
        return {grad_input, grad_weight, grad_bias, grads[0], grads[1],      grads[2],
                grads[3],   grads[4],    grads[5],  grads[6], grad_recurrent};
    });
}

}  // namespace
}  // namespace sparse_backend

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
    using namespace sparse_backend;
    m.impl("lif", TORCH_BOX(&lif));
    m.impl("lif_backward", TORCH_BOX(&lif_backward));
    m.impl("linear_lif", TORCH_BOX(&linear_lif));
    m.impl("linear_lif_backward", TORCH_BOX(&linear_lif_backward));
}
