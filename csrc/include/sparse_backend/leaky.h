// The leaky neuron: forward over a block of columns for a group of samples, and the reverse walk of its adjoint.
// Specification: sparse_backend/reference/leaky.py.
#pragma once

#include <cmath>
#include <limits>

#include "sparse_backend/rows.h"

namespace sparse_backend {

// Lists the columns of a row whose membrane is above its threshold; returns how many there are. Writes a vector more.
template <typename T>
inline int64_t list_above(const T* mem, const T* thresholds, int64_t columns, int32_t first, int32_t* out) {
    using V = Vec<T>;
    int64_t n = 0;
    for (int64_t j = 0; j < columns; j += V::width) {
        const int lanes = lanes_at<T>(j, columns);
        const V threshold = load_some(thresholds + j, lanes);
        const uint32_t above = V::bits(load_some(mem + j, lanes) > threshold) & first_lanes<T>(lanes);
        V::pack(above, first + static_cast<int32_t>(j), out + n);
        n += __builtin_popcount(above);
    }
    return n;
}

template <typename T, int RESET, bool DOUBLE, bool KEEP_P>
void leaky_forward_block(const LeakyForward<T>& a, const Block& block, int32_t* n_spikes, int32_t* n_active,
                         int32_t* n_resets, Found<T>& found) {
    using V = Vec<T>;
    const int64_t samples = block.last_sample - block.first_sample;
    const int64_t columns = block.last_column - block.first_column;
    const int64_t vecs = (columns + V::width - 1) / V::width;
    const int64_t width = vecs * V::width, room = samples * width + V::width;
    // Of one step the state is written where it ends up; of several it is kept close together.
    const bool alone = a.steps == 1;
    Scratch<T> mem_scratch(alone ? 0 : samples * width), p_scratch(KEEP_P && !alone ? samples * width : 0);
    Scratch<T> current(a.from_events ? width : 0), zeros(width);
    const int64_t stride = alone ? a.neurons : width, corner = block.first_sample * a.neurons + block.first_column;
    T* const mems = alone ? a.mem_last + corner : mem_scratch.get();
    T* const ps = !KEEP_P ? nullptr : alone ? a.p_last + corner : p_scratch.get();
    const V b_th = V::all(a.b_th), zero = V::all(T(0));
    const V lowest = a.b_th > T(0) ? zero - b_th : zero;  // above it lies what spikes or is active
    const T* const betas = a.beta + block.first_column;
    const T* const thresholds = a.threshold + block.first_column;
    const T* const bias = a.bias == nullptr ? zeros.get() : a.bias + block.first_column;
    const bool cover_spikes = a.cover_spikes;
    const int32_t first = static_cast<int32_t>(block.first_column);
    for (int64_t t = 0; t < a.steps; ++t) {
        const bool keep_reset = a.keep_reset && (t == 0 || !a.reset_delay);
        int32_t* const spike_out = found.spikes.room(room);
        int32_t* const active_out = found.active.room(room);
        T* const x_out = found.x.room(room);
        T* const p_out = KEEP_P ? found.p.room(room) : nullptr;
        int32_t* const reset_out = keep_reset ? found.resets.room(room) : nullptr;
        int64_t all_spikes = 0, all_active = 0, all_resets = 0;
        for (int64_t s = 0; s < samples; ++s) {
            const int64_t row = t * a.batch + block.first_sample + s;
            const T* inflow = bias;
            if (a.from_events) {
                const int64_t e = a.input.row_ptr[row], n = a.input.row_ptr[row + 1] - e;
                if (n > 0) {
                    accumulate_rows(bias, current.get(), a.weight, block.first_column, vecs, a.input.indices + e,
                                    a.input.values == nullptr ? nullptr : a.input.values + e, n);
                    inflow = current.get();
                }
            } else {
                inflow = a.current + (a.same_current ? 0 : t * a.batch * a.neurons) + corner + s * a.neurons;
            }
            T* const mem = mems + s * stride;
            T* const p = KEEP_P ? ps + s * stride : nullptr;
            const T* const mem_before = t > 0 ? mem : a.mem != nullptr ? a.mem + corner + s * a.neurons : zeros.get();
            const T* const p_before = t > 0 ? p : zeros.get();
            if (keep_reset) {
                const int64_t resets = list_above(mem_before, thresholds, columns, first, reset_out + all_resets);
                n_resets[row] = static_cast<int32_t>(resets);
                all_resets += resets;
            }
            int64_t spikes = all_spikes, active = all_active;
            for (int64_t j = 0; j < columns; j += V::width) {
                const int lanes = lanes_at<T>(j, columns);
                const V threshold = V::load(thresholds + j), beta = V::load(betas + j);
                V v = load_some(mem_before + j, lanes), q = zero;
                const typename V::Mask r = v > threshold;
                if constexpr (RESET == kZero) v = v - V::where(r, v);
                if constexpr (KEEP_P) {
                    q = load_some(p_before + j, lanes);
                    if constexpr (RESET == kZero) q = q - V::where(r, q);
                    q = beta * q + v;
                    store_some(q, p + j, lanes);
                }
                v = beta * v + load_some(inflow + j, lanes);
                if constexpr (RESET == kSubtract) v = v - V::where(r, threshold);
                const V x = v - threshold;
                const typename V::Mask fires = x > zero;
                if constexpr (DOUBLE) {
                    const V jump = RESET == kSubtract ? threshold : v;
                    v = v - V::where(V::without(fires, r), jump);
                    v = v + V::where(V::without(r, fires), jump);
                }
                store_some(v, mem + j, lanes);
                // The padding never counts: there NaN, which is active, comes of 0 * inf and inf - inf.
                const uint32_t some = V::bits(exceeds(x, lowest)) & first_lanes<T>(lanes);
                if (some == 0) continue;
                const uint32_t spiking = V::bits(fires) & some;
                const uint32_t in_band = (V::bits(inside(x, b_th)) & some) | (cover_spikes ? spiking : 0);
                const int32_t column = first + static_cast<int32_t>(j);
                V::pack(spiking, column, spike_out + spikes);
                spikes += __builtin_popcount(spiking);
                V::pack(in_band, column, active_out + active);
                V::pack(in_band, x, x_out + active);
                if constexpr (KEEP_P) V::pack(in_band, q, p_out + active);
                active += __builtin_popcount(in_band);
            }
            n_spikes[row] = static_cast<int32_t>(spikes - all_spikes);
            n_active[row] = static_cast<int32_t>(active - all_active);
            all_spikes = spikes, all_active = active;
            if (a.mem_seq != nullptr)
                std::memcpy(a.mem_seq + row * a.neurons + block.first_column, mem,
                            static_cast<size_t>(columns) * sizeof(T));
        }
        found.spikes.advance(all_spikes);
        found.active.advance(all_active);
        found.x.advance(all_active);
        if (KEEP_P) found.p.advance(all_active);
        if (keep_reset) found.resets.advance(all_resets);
    }
    if (alone) return;
    for (int64_t s = 0; s < samples; ++s) {
        const int64_t at = corner + s * a.neurons;
        const T* const from = a.steps == 0 && a.mem != nullptr ? a.mem + at : mems + s * width;
        std::memcpy(a.mem_last + at, from, static_cast<size_t>(columns) * sizeof(T));
        if (KEEP_P) std::memcpy(a.p_last + at, ps + s * width, static_cast<size_t>(columns) * sizeof(T));
    }
}

template <typename T>
void leaky_forward(const LeakyForward<T>& a, const Block& block, int32_t* n_spikes, int32_t* n_active,
                   int32_t* n_resets, Found<T>& found) {
    const NoDenormals guard;
    const auto run = [&]<int RESET, bool DOUBLE>() {
        if (a.keep_p)
            leaky_forward_block<T, RESET, DOUBLE, true>(a, block, n_spikes, n_active, n_resets, found);
        else
            leaky_forward_block<T, RESET, DOUBLE, false>(a, block, n_spikes, n_active, n_resets, found);
    };
    if (a.reset == kNone) return run.template operator()<kNone, false>();
    if (a.reset == kZero)
        return a.reset_delay ? run.template operator()<kZero, false>() : run.template operator()<kZero, true>();
    return a.reset_delay ? run.template operator()<kSubtract, false>() : run.template operator()<kSubtract, true>();
}

// ---- the adjoint ----

// r[t] of sample b: with a delayed reset the spikes of the step before, at t = 0 what the initial membrane asked for.
template <typename T>
inline const int32_t* reset_row(const LeakyBackward<T>& a, int64_t t, int64_t b, Span& span) {
    if (a.reset_delay && t > 0) {
        span = row_of(a.spikes, (t - 1) * a.batch + b);
        return a.spikes.indices;
    }
    span = row_of(a.resets, t * a.batch + b);
    return a.resets.indices;
}

// Walks delta backwards in time for a block and calls visit(t, b, delta, nonzero) with the finished delta[t, b] row,
// from the block's first column on. What is left at the end is the gradient of the initial membrane.
template <typename T, typename Visit>
void leaky_adjoint(const LeakyBackward<T>& a, const Block& block, NeuronSums<T> sums, T* grad_mem, Visit&& visit) {
    using V = Vec<T>;
    const NoDenormals guard;
    const int64_t samples = block.last_sample - block.first_sample;
    const int64_t columns = block.last_column - block.first_column;
    const int64_t vecs = (columns + V::width - 1) / V::width;
    const int64_t width = vecs * V::width;
    const int64_t first = block.first_column, last = block.last_column;
    const bool twice = a.double_reset() && a.has_g;
    Scratch<T> delta_scratch(samples * width), lambda_scratch(twice ? width : 0), through_scratch(twice ? width : 0);
    Scratch<int32_t> nonzero(samples);
    const T* beta = a.beta + first;
    const T* threshold = a.threshold + first;
    if (a.grad_mem_last != nullptr) {
        for (int64_t s = 0; s < samples; ++s) {
            const T* from = a.grad_mem_last + (block.first_sample + s) * a.neurons + first;
            std::memcpy(delta_scratch.get() + s * width, from, static_cast<size_t>(columns) * sizeof(T));
            nonzero.get()[s] = 1;
            if (sums.beta != nullptr && a.p_last != nullptr) {
                const T* p = a.p_last + (block.first_sample + s) * a.neurons + first;
                for (int64_t j = 0; j < columns; ++j) sums.beta[first + j] += from[j] * p[j];
            }
        }
    }
    for (int64_t t = a.steps - 1; t >= 0; --t) {
        for (int64_t s = 0; s < samples; ++s) {
            const int64_t b = block.first_sample + s, row = t * a.batch + b;
            T* delta = delta_scratch.get() + s * width;
            if (a.grad_mem_seq != nullptr) {
                const T* from = a.grad_mem_seq + row * a.neurons + first;
                for (int64_t j = 0; j < columns; ++j) delta[j] += from[j];
                nonzero.get()[s] = 1;
            }
            Span active = row_of(a.active, row);
            clip(a.active.indices, active.begin, active.end, first, last);
            Span reset;
            const int32_t* reset_index = reset_row(a, t, b, reset);
            clip(reset_index, reset.begin, reset.end, first, last);
            if (twice && nonzero.get()[s]) {
                // V = u - d (threshold or u) with d = S - r: its gradient, lambda, also runs through the surrogate.
                T* lambda = lambda_scratch.get();
                T* through = through_scratch.get();
                std::memcpy(lambda, delta, static_cast<size_t>(width) * sizeof(T));
                Span spike = row_of(a.spikes, row);
                clip(a.spikes.indices, spike.begin, spike.end, first, last);
                for (int64_t e = active.begin; e < active.end; ++e) {
                    const int64_t j = a.active.indices[e] - first, k = e - a.active.row_ptr[0];
                    const T jump = a.reset == kSubtract ? threshold[j] : a.x[k] + threshold[j];
                    through[e - active.begin] = -lambda[j] * jump * a.g[k];
                }
                for (int64_t e = spike.begin; e < spike.end; ++e) {
                    const int64_t j = a.spikes.indices[e] - first;
                    if (a.reset == kZero) delta[j] -= lambda[j];
                    if (a.reset == kSubtract && sums.threshold != nullptr) sums.threshold[first + j] -= lambda[j];
                }
                for (int64_t e = reset.begin; e < reset.end; ++e) {
                    const int64_t j = reset_index[e] - first;
                    if (a.reset == kZero) delta[j] += lambda[j];
                    if (a.reset == kSubtract && sums.threshold != nullptr) sums.threshold[first + j] += lambda[j];
                }
                for (int64_t e = active.begin; e < active.end; ++e) {
                    const int64_t j = a.active.indices[e] - first;
                    delta[j] += through[e - active.begin];
                    if (sums.threshold != nullptr) sums.threshold[first + j] -= through[e - active.begin];
                }
            }
            if (a.grad_x != nullptr && active.begin < active.end) {
                const T* grad_x = a.grad_x - a.active.row_ptr[0];
                for (int64_t e = active.begin; e < active.end; ++e) delta[a.active.indices[e] - first] += grad_x[e];
                if (sums.threshold != nullptr)
                    for (int64_t e = active.begin; e < active.end; ++e)
                        sums.threshold[a.active.indices[e]] -= grad_x[e];
                if (sums.beta != nullptr && a.p != nullptr) {
                    const T* p = a.p - a.active.row_ptr[0];
                    for (int64_t e = active.begin; e < active.end; ++e)
                        sums.beta[a.active.indices[e]] += grad_x[e] * p[e];
                }
                nonzero.get()[s] = 1;
            }
            if (sums.threshold != nullptr && a.reset == kSubtract)
                for (int64_t e = reset.begin; e < reset.end; ++e)
                    sums.threshold[reset_index[e]] -= delta[reset_index[e] - first];
            if (sums.beta != nullptr && a.p_last == nullptr) {  // p itself is null too where nothing was active
                const T* before = t > 0              ? a.mem_seq + (row - a.batch) * a.neurons
                                  : a.mem == nullptr ? nullptr
                                                     : a.mem + b * a.neurons;
                if (before != nullptr) {
                    for (int64_t j = first; j < last; ++j) sums.beta[j] += delta[j - first] * before[j];
                    if (a.reset == kZero)
                        for (int64_t e = reset.begin; e < reset.end; ++e)
                            sums.beta[reset_index[e]] -= delta[reset_index[e] - first] * before[reset_index[e]];
                }
            }
            visit(t, b, static_cast<const T*>(delta), nonzero.get()[s] != 0);
            if (nonzero.get()[s]) {
                for (int64_t k = 0; k < vecs; ++k)
                    (V::load(beta + k * V::width) * V::load(delta + k * V::width)).store(delta + k * V::width);
                if (a.reset == kZero)
                    for (int64_t e = reset.begin; e < reset.end; ++e) delta[reset_index[e] - first] = T(0);
            }
        }
    }
    if (grad_mem != nullptr)
        for (int64_t s = 0; s < samples; ++s)
            std::memcpy(grad_mem + (block.first_sample + s) * a.neurons + first, delta_scratch.get() + s * width,
                        static_cast<size_t>(columns) * sizeof(T));
}

// The same gradient summed the other way round, over the active entries: sum of grad_x[t, b, j] trace[t, b], where
// trace[t] = beta trace[t-1] + s[t]. Right where one decay carries every delta back unchanged: scalar beta, no reset
// to zero, no second reset, and no gradient on a membrane. For inputs [first_input, last_input), all samples in a
// fixed order. weight_sum: [N, stride], from the first input on; bias_sum: [N]; null where not wanted
template <typename T>
void leaky_backward_weight_active(const LeakyBackward<T>& a, int64_t group, int64_t first_input, int64_t last_input,
                                  const Events<T>& input, T* weight_sum, int64_t stride, T* bias_sum) {
    using V = Vec<T>;
    const int64_t vecs = (last_input - first_input + V::width - 1) / V::width, width = vecs * V::width;
    const V beta = V::all(a.beta[0]);
    Scratch<T> traces(group * width);
    const T* const grad_x = a.grad_x - a.active.row_ptr[0];
    for (int64_t b0 = 0; b0 < a.batch; b0 += group) {
        const int64_t b1 = b0 + group < a.batch ? b0 + group : a.batch;
        std::memset(static_cast<void*>(traces.get()), 0, static_cast<size_t>(group * width) * sizeof(T));
        T bias_trace = T(0);
        for (int64_t t = 0; t < a.steps; ++t) {
            bias_trace = a.beta[0] * bias_trace + T(1);
            for (int64_t b = b0; b < b1; ++b) {
                const int64_t row = t * a.batch + b;
                T* const trace = traces.get() + (b - b0) * width;
                if (t > 0)
                    for (int64_t k = 0; k < width; k += V::width) (beta * V::load(trace + k)).store(trace + k);
                int64_t begin = input.row_ptr[row], end = input.row_ptr[row + 1];
                clip(input.indices, begin, end, first_input, last_input);
                for (int64_t e = begin; e < end; ++e)
                    trace[input.indices[e] - first_input] += input.values == nullptr ? T(1) : input.values[e];
                const Span active = row_of(a.active, row);
                for (int64_t e = active.begin; e < active.end; ++e) {
                    const int64_t j = a.active.indices[e];
                    if (bias_sum != nullptr) bias_sum[j] += grad_x[e] * bias_trace;
                    if (weight_sum == nullptr) continue;
                    T* const to = weight_sum + j * stride;
                    const V scale = V::all(grad_x[e]);
                    for (int64_t k = 0; k < width; k += V::width)
                        (V::load(to + k) + scale * V::load(trace + k)).store(to + k);
                }
            }
        }
    }
}

// ---- every entry active ----

template <typename T>
void leaky_dense_forward_block(const DenseForward<T>& a, const Block& block) {
    using V = Vec<T>;
    const int64_t columns = block.last_column - block.first_column;
    const NoDenormals guard;
    const bool twice = !a.reset_delay && a.reset != kNone;
    const V zero = V::all(T(0));
    for (int64_t b = block.first_sample; b < block.last_sample; ++b) {
        const int64_t row = b * a.neurons + block.first_column;
        T* const mem = a.mem_last + row;  // at every step
        if (a.mem == nullptr || a.steps == 0) {
            if (a.mem != nullptr)
                std::memcpy(mem, a.mem + row, static_cast<size_t>(columns) * sizeof(T));
            else
                std::memset(mem, 0, static_cast<size_t>(columns) * sizeof(T));
        }
        for (int64_t t = 0; t < a.steps; ++t) {
            const int64_t at = t * a.batch * a.neurons + row;
            const T* const current = a.current + (a.same_current ? row : at);
            const T* const before = t == 0 && a.mem != nullptr ? a.mem + row : mem;
            for (int64_t j = 0; j < columns; j += V::width) {
                const int n = static_cast<int>(columns - j < V::width ? columns - j : V::width);
                const bool whole = n == V::width;
                const V threshold = V::load(a.threshold + block.first_column + j),
                        beta = V::load(a.beta + block.first_column + j);
                V v = whole ? V::load(before + j) : V::load(before + j, n);
                const typename V::Mask r = v > threshold;
                if (a.reset == kZero) v = v - V::where(r, v);
                v = beta * v + (whole ? V::load(current + j) : V::load(current + j, n));
                if (a.reset == kSubtract) v = v - V::where(r, threshold);
                const V x = v - threshold;
                if (twice) {
                    const typename V::Mask fires = x > zero;
                    const V jump = a.reset == kSubtract ? threshold : v;
                    v = v - V::where(V::without(fires, r), jump);
                    v = v + V::where(V::without(r, fires), jump);
                }
                if (whole) {
                    v.store(mem + j);
                    x.store(a.x + at + j);
                } else {
                    v.store(mem + j, n);
                    x.store(a.x + at + j, n);
                }
            }
            if (a.mem_seq != nullptr) std::memcpy(a.mem_seq + at, mem, static_cast<size_t>(columns) * sizeof(T));
        }
    }
}

template <typename T>
void leaky_dense_backward_block(const DenseBackward<T>& a, const Block& block, NeuronSums<T> sums) {
    using V = Vec<T>;
    const int64_t columns = block.last_column - block.first_column;
    const bool twice = a.double_reset();
    const bool need_reset = a.reset == kZero || twice || (a.reset == kSubtract && sums.threshold != nullptr);
    const NoDenormals guard;
    const bool masked = a.b_th < std::numeric_limits<T>::infinity();
    const V b_th = V::all(a.b_th);
    Scratch<T> scratch(a.grad_mem == nullptr ? columns : 0);
    const V zero = V::all(T(0)), one = V::all(T(1));
    for (int64_t b = block.first_sample; b < block.last_sample; ++b) {
        const int64_t row = b * a.neurons + block.first_column;
        T* const carried = a.grad_mem != nullptr ? a.grad_mem + row : scratch.get();
        const T* arriving = a.grad_mem_last != nullptr ? a.grad_mem_last + row : nullptr;
        if (arriving == nullptr || a.steps == 0) {
            if (arriving != nullptr)
                std::memcpy(carried, arriving, static_cast<size_t>(columns) * sizeof(T));
            else
                std::memset(carried, 0, static_cast<size_t>(columns) * sizeof(T));
        }
        for (int64_t t = a.steps - 1; t >= 0; --t) {
            const int64_t at = t * a.batch * a.neurons + row;
            const int64_t before = at - a.batch * a.neurons;
            const T* const later = t == a.steps - 1 && arriving != nullptr ? arriving : carried;
            for (int64_t j = 0; j < columns; j += V::width) {
                const int n = static_cast<int>(columns - j < V::width ? columns - j : V::width);
                const auto load = [n](const T* from) { return n == V::width ? V::load(from) : V::load(from, n); };
                const int64_t column = block.first_column + j;
                const V threshold = V::load(a.threshold + column), beta = V::load(a.beta + column);
                V past = zero;  // V[t-1] as the next step saw it
                typename V::Mask r = zero > zero;
                if (need_reset || sums.beta != nullptr) {
                    if (t == 0)
                        past = a.mem == nullptr ? zero : load(a.mem + row + j);
                    else
                        past = a.mem_seq != nullptr ? load(a.mem_seq + before + j) : load(a.x + before + j) + threshold;
                    if (t > 0 && a.mem_seq == nullptr)
                        r = load(a.x + before + j) > zero;
                    else
                        r = past > threshold;
                }
                V lambda = load(later + j);
                if (a.grad_mem_seq != nullptr) lambda = lambda + load(a.grad_mem_seq + at + j);
                V through = a.grad_x != nullptr ? load(a.grad_x + at + j) : zero;
                if (masked) through = V::where(inside(load(a.x + at + j), b_th), through);
                V delta = lambda;
                V of_threshold = zero;
                if (twice && a.g != nullptr) {
                    const V x = load(a.x + at + j);
                    const typename V::Mask fires = x > zero;
                    const V d = V::where(fires, one) - V::where(r, one);
                    const V jump = a.reset == kSubtract ? threshold : x + threshold;
                    through = through - lambda * jump * load(a.g + at + j);
                    if (a.reset == kSubtract)
                        of_threshold = of_threshold - lambda * d;
                    else
                        delta = lambda - lambda * d;
                }
                delta = delta + through;
                of_threshold = of_threshold - through;
                if (a.reset == kSubtract) of_threshold = of_threshold - V::where(r, delta);
                const V passed = a.reset == kZero ? delta - V::where(r, delta) : delta;
                if (n == V::width)
                    delta.store(a.delta + at + j);
                else
                    delta.store(a.delta + at + j, n);
                if (sums.threshold != nullptr) {
                    T* to = sums.threshold + column;
                    (V::load(to, n) + of_threshold).store(to, n);
                }
                if (sums.beta != nullptr) {
                    T* to = sums.beta + column;
                    (V::load(to, n) + passed * past).store(to, n);
                }
                if (n == V::width)
                    (beta * passed).store(carried + j);
                else
                    (beta * passed).store(carried + j, n);
            }
        }
    }
}

}  // namespace sparse_backend
