// The two-state neuron: forward over a block of columns for a group of samples, and the reverse walk of its adjoint.
// Specification: sparse_backend/reference/lif.py.
#pragma once

#include <cmath>
#include <limits>

#include "sparse_backend/rows.h"

namespace sparse_backend {

// Rows [samples, width] out of [B, N], the padding left as it is.
template <typename T>
inline void load_block(const T* from, int64_t neurons, const Block& block, T* to, int64_t width) {
    for (int64_t s = 0; s < block.last_sample - block.first_sample; ++s)
        std::memcpy(to + s * width, from + (block.first_sample + s) * neurons + block.first_column,
                    static_cast<size_t>(block.last_column - block.first_column) * sizeof(T));
}

template <typename T>
inline void store_block(const T* from, int64_t neurons, const Block& block, T* to, int64_t width) {
    for (int64_t s = 0; s < block.last_sample - block.first_sample; ++s)
        std::memcpy(to + (block.first_sample + s) * neurons + block.first_column, from + s * width,
                    static_cast<size_t>(block.last_column - block.first_column) * sizeof(T));
}

// The current of one row, from the block's first column on: written to `current`, or where it is.
template <typename T>
__attribute__((noinline)) const T* lif_current(const LifForward<T>& a, const Block& block, int64_t row, int64_t vecs,
                                               const T* bias, T* current) {
    if (a.from_events) {
        const int64_t e = a.input.row_ptr[row], n = a.input.row_ptr[row + 1] - e;
        if (n == 0) return bias;
        accumulate_rows(bias, current, a.weight, block.first_column, vecs, a.input.indices + e,
                        a.input.values == nullptr ? nullptr : a.input.values + e, n);
    } else {
        std::memcpy(current, a.current + row * a.neurons + block.first_column,
                    static_cast<size_t>(block.last_column - block.first_column) * sizeof(T));
    }
    return current;
}

// `to` is `from` and what the spikes of the step before add to it.
template <typename T>
__attribute__((noinline)) void lif_recurrence(const LifForward<T>& a, int64_t vecs, const int32_t* fired, int64_t n,
                                              const T* from, T* to) {
    accumulate_rows(from, to, a.recurrent, int64_t{0}, vecs, fired, static_cast<const T*>(nullptr), n);
}

// The coefficients of a block of columns, a vector of each in turn: a loop over vectors needs one address for all.
template <typename T>
class LifCoefficients {
  public:
    using V = Vec<T>;
    LifCoefficients(const LifForward<T>& a, const Block& block, int64_t width) : of_(kHowMany * width) {
        const T* const from[kHowMany] = {a.mem_gain, a.leak, a.threshold, a.reset_to, a.syn_decay};
        for (int k = 0; k < kHowMany; ++k)
            for (int64_t j = 0; from[k] != nullptr && j < width; j += V::width)
                V::load(from[k] + block.first_column + j).store(of_.get() + kHowMany * j + k * V::width);
    }
    V gain(int64_t j) const { return at(j, 0); }
    V leak(int64_t j) const { return at(j, 1); }
    V threshold(int64_t j) const { return at(j, 2); }
    V reset_to(int64_t j) const { return at(j, 3); }
    V syn_decay(int64_t j) const { return at(j, 4); }

  private:
    static constexpr int kHowMany = 5;
    V at(int64_t j, int k) const { return V::load(of_.get() + kHowMany * j + k * V::width); }
    Scratch<T> of_;
};

template <typename T, bool SYNAPTIC, bool DISCRETE, int RESET>
void lif_forward_block(const LifForward<T>& a, const Block& block, int32_t* n_spikes, int32_t* n_active,
                       Found<T>& found) {
    using V = Vec<T>;
    const int64_t samples = block.last_sample - block.first_sample;
    const int64_t columns = block.last_column - block.first_column;
    const int64_t vecs = (columns + V::width - 1) / V::width, width = vecs * V::width;
    const size_t row_bytes = static_cast<size_t>(columns) * sizeof(T);
    Scratch<T> v_scratch(samples * width), i_scratch(a.i != nullptr || SYNAPTIC ? samples * width : 0);
    Scratch<T> current_scratch(width), drive_scratch(width), inflow_scratch(width), no_bias(width);
    Scratch<int32_t> fired(a.is_recurrent ? samples * width : 0), n_fired(a.is_recurrent ? samples : 0);
    T *const current = current_scratch.get(), *const drives = drive_scratch.get();
    T* const inflows = inflow_scratch.get();
    const LifCoefficients<T> of(a, block, width);
    const T* const bias = a.bias == nullptr ? no_bias.get() : a.bias + block.first_column;
    if (a.v != nullptr)
        load_block(a.v, a.neurons, block, v_scratch.get(), width);
    else
        for (int64_t s = 0; s < samples; ++s)
            std::memcpy(v_scratch.get() + s * width, a.leak + block.first_column, row_bytes);
    if (a.i != nullptr) load_block(a.i, a.neurons, block, i_scratch.get(), width);
    const V zero = V::all(T(0)), one = V::all(T(1)), b_th = V::all(a.b_th);
    const V lowest = !a.dense && a.b_th > T(0) ? zero - b_th : zero;  // above it lies what is looked for
    const bool leaky = a.leaks, keep_drive = a.drive != nullptr;
    const bool keep_inflow = a.inflow != nullptr || (SYNAPTIC && DISCRETE);
    const bool look = !a.dense || a.is_recurrent;  // for spikes; dense entries are all active
    const int32_t first = static_cast<int32_t>(block.first_column);
    for (int64_t t = 0; t < a.steps; ++t) {
        int32_t* const spike_out = found.spikes.room(look ? samples * width + V::width : 0);
        int32_t* const active_out = found.active.room(a.dense ? 0 : samples * width + V::width);
        T* const x_out = found.x.room(a.dense ? 0 : samples * width + V::width);
        int64_t spikes = 0, active = 0;
        for (int64_t s = 0; s < samples; ++s) {
            const int64_t row = t * a.batch + block.first_sample + s;
            const T* input = lif_current(a, block, row, vecs, bias, current);
            int32_t* const fired_here = fired.get() + (a.is_recurrent ? s * width : 0);
            if (a.is_recurrent && t > 0 && n_fired.get()[s] > 0) {
                lif_recurrence(a, vecs, fired_here, n_fired.get()[s], input, current);
                input = current;
            }
            T* const v_row = v_scratch.get() + s * width;
            T* const i_row = i_scratch.get() + (a.i != nullptr || SYNAPTIC ? s * width : 0);
            if (!SYNAPTIC && a.i != nullptr && t == 0) {
                for (int64_t j = 0; j < width; j += V::width)
                    (V::load(i_row + j) + V::load(input + j)).store(current + j);
                input = current;
            }
            const int64_t spikes_before = spikes, active_before = active;
            for (int64_t j = 0; j < columns; j += V::width) {
                V inflow = V::load(input + j);
                if constexpr (SYNAPTIC) {
                    inflow = V::load(i_row + j) + inflow;
                    (of.syn_decay(j) * inflow).store(i_row + j);
                }
                V v = V::load(v_row + j), drive = v;
                const V threshold = of.threshold(j);
                if constexpr (DISCRETE) {
                    const typename V::Mask r = v - threshold > zero;
                    v = of.gain(j) * v + inflow;
                    if constexpr (RESET == kSubtract) v = v - V::where(r, threshold);
                    if constexpr (RESET == kZero) v = v - V::where(r, one) * v;  // NaN if infinite, as snnTorch has it
                } else {
                    drive = leaky ? (of.leak(j) - v) + inflow : inflow;
                    v = v + of.gain(j) * drive;
                }
                const V x = v - threshold;
                const typename V::Mask fires = x > zero;
                if constexpr (!DISCRETE && RESET != kNone) {
                    const V z = V::where(fires, one);
                    v = (one - z) * v + z * (RESET == kValue ? of.reset_to(j) : x);
                }
                v.store(v_row + j);
                if (keep_drive) drive.store(drives + j);
                if (keep_inflow) inflow.store(inflows + j);
                if (a.dense) x.store(current + j);
                if (!look) continue;
                const uint32_t some = V::bits(exceeds(x, lowest)) & first_lanes<T>(lanes_at<T>(j, columns));
                if (some == 0) continue;
                const int32_t column = first + static_cast<int32_t>(j);
                const uint32_t spiking = V::bits(fires) & some;
                V::pack(spiking, column, spike_out + spikes);
                spikes += __builtin_popcount(spiking);
                if (a.dense) continue;
                const uint32_t in_band = V::bits(inside(x, b_th)) & some;
                V::pack(in_band, column, active_out + active);
                V::pack(in_band, x, x_out + active);
                active += __builtin_popcount(in_band);
            }
            if (a.is_recurrent) {
                n_fired.get()[s] = static_cast<int32_t>(spikes - spikes_before);
                std::memcpy(fired_here, spike_out + spikes_before, static_cast<size_t>(spikes - spikes_before) * 4);
            }
            const int64_t at = row * a.neurons + block.first_column;
            if (look) n_spikes[row] = static_cast<int32_t>(spikes - spikes_before);
            if (a.dense)
                std::memcpy(a.x + at, current, row_bytes);
            else
                n_active[row] = static_cast<int32_t>(active - active_before);
            if (a.v_seq != nullptr) std::memcpy(a.v_seq + at, v_row, row_bytes);
            if (a.i_seq != nullptr) std::memcpy(a.i_seq + at, SYNAPTIC && DISCRETE ? inflows : i_row, row_bytes);
            if (keep_drive) std::memcpy(a.drive + at, drives, row_bytes);
            if (a.inflow != nullptr) std::memcpy(a.inflow + at, inflows, row_bytes);
            if (SYNAPTIC && DISCRETE && t + 1 == a.steps) std::memcpy(i_row, inflows, row_bytes);
        }
        found.spikes.advance(spikes);
        found.active.advance(active);
        found.x.advance(active);
    }
    store_block(v_scratch.get(), a.neurons, block, a.v_last, width);
    if (SYNAPTIC) store_block(i_scratch.get(), a.neurons, block, a.i_last, width);
}

template <typename T>
void lif_forward(const LifForward<T>& a, const Block& block, int32_t* n_spikes, int32_t* n_active, Found<T>& found) {
    const NoDenormals guard;
    const auto run = [&]<bool DISCRETE, int RESET>() {
        if (a.syn_decay != nullptr)
            lif_forward_block<T, true, DISCRETE, RESET>(a, block, n_spikes, n_active, found);
        else
            lif_forward_block<T, false, DISCRETE, RESET>(a, block, n_spikes, n_active, found);
    };
    if (a.discrete) {
        if (a.reset == kSubtract) return run.template operator()<true, kSubtract>();
        if (a.reset == kZero) return run.template operator()<true, kZero>();
        return run.template operator()<true, kNone>();
    }
    if (a.reset == kSubtract) return run.template operator()<false, kSubtract>();
    if (a.reset == kValue) return run.template operator()<false, kValue>();
    return run.template operator()<false, kNone>();
}

// ---- the adjoint ----

// The jumps of one row at its spikes and active entries, from dL/dv after the reset to dL/du before it. The row of
// delta is still that of the step after: what comes back through the recurrent weights. Returns whether anything came.
template <typename T>
inline bool lif_jumps(const LifBackward<T>& a, const Block& block, int64_t t, int64_t row, const LifSums<T>& sums,
                      bool nonzero, T* lambda, const T* delta, T* through) {
    const int64_t first = block.first_column, last = block.last_column;
    Span active = row_of(a.active, row), spike = row_of(a.spikes, row);
    clip(a.active.indices, active.begin, active.end, first, last);
    const bool back = a.is_recurrent && nonzero && t + 1 < a.steps, reset = a.attached && nonzero;
    const bool comes = active.begin < active.end && (a.grad_x != nullptr || back || reset);
    if (comes) {
        if (back)
            dots_of_rows(a.recurrent, int64_t{0}, a.active.indices + active.begin, active.end - active.begin, delta,
                         a.neurons, false, through);
        for (int64_t e = active.begin; e < active.end; ++e) {
            const int64_t column = a.active.indices[e], j = column - first, k = e - a.active.row_ptr[0];
            T sum = a.grad_x != nullptr ? a.grad_x[k] : T(0);
            if (back) sum += through[e - active.begin] * a.g[k];
            if (reset) {
                const T jump =
                    a.reset == kValue ? a.reset_to[column] - (a.x[k] + a.threshold[column]) : -a.threshold[column];
                sum += lambda[j] * jump * a.g[k];
            }
            through[e - active.begin] = sum;
            if (sums.threshold != nullptr) sums.threshold[column] -= sum;
        }
        if (a.through != nullptr)
            std::memcpy(a.through + (active.begin - a.active.row_ptr[0]), through,
                        static_cast<size_t>(active.end - active.begin) * sizeof(T));
    } else if (a.through != nullptr) {
        for (int64_t e = active.begin; e < active.end; ++e) a.through[e - a.active.row_ptr[0]] = T(0);
    }
    if (nonzero && !a.discrete && spike.begin < spike.end) {
        clip(a.spikes.indices, spike.begin, spike.end, first, last);
        for (int64_t e = spike.begin; e < spike.end; ++e) {
            const int64_t column = a.spikes.indices[e];
            if (a.reset == kSubtract && sums.threshold != nullptr) sums.threshold[column] -= lambda[column - first];
            if (a.reset != kValue) continue;
            if (sums.reset_to != nullptr) sums.reset_to[column] += lambda[column - first];
            lambda[column - first] = T(0);
        }
    }
    if (comes)
        for (int64_t e = active.begin; e < active.end; ++e)
            lambda[a.active.indices[e] - first] += through[e - active.begin];
    return comes;
}

// The resets of one row where they are discrete, of what spiked in the step before: from dL/du to dL/d(u before its
// reset). Detached, so nothing runs through the spikes.
template <typename T>
inline void lif_discrete_resets(const LifBackward<T>& a, const Block& block, int64_t t, int64_t b,
                                const LifSums<T>& sums, T* lambda) {
    const int64_t first = block.first_column, last = block.last_column;
    if (a.reset == kNone || (a.reset == kSubtract && sums.threshold == nullptr)) return;
    const auto reset = [&](int64_t column) {
        if (a.reset == kSubtract)
            sums.threshold[column] -= lambda[column - first];
        else
            lambda[column - first] = T(0);
    };
    if (t > 0) {
        Span spike = row_of(a.spikes, (t - 1) * a.batch + b);
        clip(a.spikes.indices, spike.begin, spike.end, first, last);
        for (int64_t e = spike.begin; e < spike.end; ++e) reset(a.spikes.indices[e]);
    } else {
        for (int64_t j = first; j < last; ++j)
            if (a.first_reset != nullptr ? a.first_reset[b * a.neurons + j] != 0 : T(0) - a.threshold[j] > T(0))
                reset(j);
    }
}

// n flags as ones and zeros.
template <typename T>
inline Vec<T> load_flags(const uint8_t* flags, int n) {
    T ones[Vec<T>::width] = {};
    for (int k = 0; k < n; ++k) ones[k] = flags[k] != 0 ? T(1) : T(0);
    return Vec<T>::load(ones);
}

// The jumps of a dense row.
template <typename T>
inline void lif_dense_jumps(const LifBackward<T>& a, const Block& block, int64_t t, int64_t b, const LifSums<T>& sums,
                            T* lambda) {
    using V = Vec<T>;
    const int64_t columns = block.last_column - block.first_column;
    const int64_t at = (t * a.batch + b) * a.neurons + block.first_column,
                  of_sample = b * a.neurons + block.first_column;
    const T* const before = t > 0 && a.x != nullptr ? a.x + (at - a.batch * a.neurons)
                            : a.x_before != nullptr ? a.x_before + of_sample
                                                    : nullptr;
    const bool masked = a.b_th < std::numeric_limits<T>::infinity();
    const V b_th = V::all(a.b_th), zero = V::all(T(0)), one = V::all(T(1));
    for (int64_t j = 0; j < columns; j += V::width) {
        const int n = static_cast<int>(columns - j < V::width ? columns - j : V::width);
        const auto load = [n](const T* from) { return n == V::width ? V::load(from) : V::load(from, n); };
        const int64_t column = block.first_column + j;
        const V x = a.x != nullptr ? load(a.x + at + j) : zero;
        const typename V::Mask in_band = inside(x, b_th);
        V l = V::load(lambda + j), through = a.grad_x != nullptr ? load(a.grad_x + at + j) : zero;
        if (masked) through = V::where(in_band, through);
        if (a.attached || a.back != nullptr) {
            V g = load(a.g + at + j);
            if (masked) g = V::where(in_band, g);
            if (a.back != nullptr) through = through + load(a.back + at + j) * g;
            const V threshold = V::load(a.threshold + column);
            const V jump = a.reset == kValue ? V::load(a.reset_to + column) - (x + threshold) : zero - threshold;
            if (a.attached) through = through + l * jump * g;
        }
        V of_threshold = zero - through;
        if (a.discrete && a.reset != kNone && a.x != nullptr) {
            V r = V::where(zero - V::load(a.threshold + column) > zero, one);
            if (before != nullptr)
                r = V::where(load(before + j) > zero, one);
            else if (a.first_reset != nullptr)
                r = load_flags<T>(a.first_reset + of_sample + j, n);
            const V jumped = (through + l) * r;
            if (a.reset == kSubtract) of_threshold = of_threshold - jumped;
            if (a.reset == kZero) l = l - jumped;
        } else if (a.reset != kNone && a.x != nullptr) {
            const V z = V::where(x > zero, one), jumped = l * z;
            if (a.reset == kSubtract) of_threshold = of_threshold - jumped;
            if (a.reset == kValue && sums.reset_to != nullptr)
                (V::load(sums.reset_to + column) + jumped).store(sums.reset_to + column);
            if (a.reset == kValue) l = l * (one - z);
        }
        if (sums.threshold != nullptr) (V::load(sums.threshold + column) + of_threshold).store(sums.threshold + column);
        (through + l).store(lambda + j);
    }
}

template <typename T, bool SYNAPTIC, bool DENSE, typename Visit>
void lif_adjoint_block(const LifBackward<T>& a, const Block& block, const LifSums<T>& sums, T* grad_v, T* grad_i,
                       Visit&& visit) {
    using V = Vec<T>;
    const int64_t samples = block.last_sample - block.first_sample;
    const int64_t columns = block.last_column - block.first_column;
    const int64_t vecs = (columns + V::width - 1) / V::width, width = vecs * V::width;
    const int64_t first = block.first_column;
    // dL/dv and, where there is a synaptic current, dL/di, which after a step is delta
    Scratch<T> lambda_scratch(samples * width), delta_scratch(samples * width), through_scratch(DENSE ? 0 : width);
    Scratch<int32_t> nonzero(samples);
    if (a.grad_v_last != nullptr) load_block(a.grad_v_last, a.neurons, block, lambda_scratch.get(), width);
    const T* const delta_after = SYNAPTIC && !a.discrete && a.grad_i_last != nullptr ? a.grad_i_last : a.delta_after;
    if (SYNAPTIC && delta_after != nullptr) load_block(delta_after, a.neurons, block, delta_scratch.get(), width);
    if (a.grad_v_last != nullptr || (SYNAPTIC && (delta_after != nullptr || a.grad_i_last != nullptr)))
        for (int64_t s = 0; s < samples; ++s) nonzero.get()[s] = 1;
    const bool adds_up = sums.leak != nullptr || sums.mem_gain != nullptr || sums.syn_decay != nullptr;
    for (int64_t t = a.steps - 1; t >= 0; --t) {
        // Jumps write single entries, which whole vectors read soonest after the other samples' turn.
        for (int64_t s = 0; s < samples; ++s) {
            const int64_t row = t * a.batch + block.first_sample + s, at = row * a.neurons + first;
            T *const lambda = lambda_scratch.get() + s * width, *const delta = delta_scratch.get() + s * width;
            int32_t& some = nonzero.get()[s];
            if (a.grad_v_seq != nullptr) {
                for (int64_t j = 0; j < columns; ++j) lambda[j] += a.grad_v_seq[at + j];
                some = 1;
            }
            if constexpr (DENSE) {
                lif_dense_jumps(a, block, t, row - t * a.batch, sums, lambda);
                some = 1;
            } else {
                if (lif_jumps(a, block, t, row, sums, some != 0, lambda, delta, through_scratch.get())) some = 1;
                if (a.discrete && some) lif_discrete_resets(a, block, t, row - t * a.batch, sums, lambda);
            }
            if (SYNAPTIC && a.grad_i_seq != nullptr) {
                if (!a.discrete)
                    for (int64_t j = 0; j < columns; ++j) delta[j] += a.grad_i_seq[at + j];
                some = 1;
            }
        }
        for (int64_t s = 0; s < samples; ++s) {
            const int64_t b = block.first_sample + s, at = (t * a.batch + b) * a.neurons + first;
            T *const lambda = lambda_scratch.get() + s * width, *const delta = delta_scratch.get() + s * width;
            const bool some = nonzero.get()[s] != 0;
            const bool handed_out = SYNAPTIC && a.discrete;  // the inflow itself
            const T* const grad_seq = handed_out && a.grad_i_seq != nullptr ? a.grad_i_seq + at : nullptr;
            const T* const grad_last = handed_out && a.grad_i_last != nullptr && t + 1 == a.steps
                                           ? a.grad_i_last + (b * a.neurons + first)
                                           : nullptr;
            for (int64_t j = 0; some && j < width; j += V::width) {
                const V of_u = V::load(lambda + j), through_u = V::load(a.mem_gain + first + j) * of_u;
                V of_current = through_u;
                if constexpr (SYNAPTIC) {
                    of_current = through_u + V::load(a.syn_decay + first + j) * V::load(delta + j);
                    const int n = static_cast<int>(columns - j < V::width ? columns - j : V::width);
                    if (grad_seq != nullptr) of_current = of_current + V::load(grad_seq + j, n);
                    if (grad_last != nullptr) of_current = of_current + V::load(grad_last + j, n);
                }
                if (adds_up) {
                    const int n = static_cast<int>(columns - j < V::width ? columns - j : V::width);
                    const auto add = [n](T* sum, V factor, const T* from) {
                        (V::load(sum) + factor * (n == V::width ? V::load(from) : V::load(from, n))).store(sum);
                    };
                    if (sums.leak != nullptr) (V::load(sums.leak + first + j) + through_u).store(sums.leak + first + j);
                    if (sums.mem_gain != nullptr) add(sums.mem_gain + first + j, of_u, a.drive + at + j);
                    if (SYNAPTIC && sums.syn_decay != nullptr)
                        add(sums.syn_decay + first + j, V::load(delta + j), a.inflow + at + j);
                }
                of_current.store(delta + j);
                (V::load(a.keep + first + j) * of_u).store(lambda + j);
            }
            visit(t, b, static_cast<const T*>(delta), some);
        }
    }
    if (grad_v != nullptr) store_block(lambda_scratch.get(), a.neurons, block, grad_v, width);
    if (grad_i != nullptr) store_block(delta_scratch.get(), a.neurons, block, grad_i, width);
}

// Walks delta backwards in time for a block and calls visit(t, b, delta, nonzero) with the finished delta[t, b] row,
// from the block's first column on. What is left at the end are the gradients of the initial v and i.
template <typename T, typename Visit>
void lif_adjoint(const LifBackward<T>& a, const Block& block, const LifSums<T>& sums, T* grad_v, T* grad_i,
                 Visit&& visit) {
    const NoDenormals guard;
    if (a.dense)
        return a.syn_decay != nullptr ? lif_adjoint_block<T, true, true>(a, block, sums, grad_v, grad_i, visit)
                                      : lif_adjoint_block<T, false, true>(a, block, sums, grad_v, grad_i, visit);
    return a.syn_decay != nullptr ? lif_adjoint_block<T, true, false>(a, block, sums, grad_v, grad_i, visit)
                                  : lif_adjoint_block<T, false, false>(a, block, sums, grad_v, grad_i, visit);
}

}  // namespace sparse_backend
