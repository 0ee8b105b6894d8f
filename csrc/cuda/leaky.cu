// The leaky neuron over a chunk of steps: a thread per neuron of a sample, its state in registers, a warp per word of
// 32 neurons, whose spikes and active entries are ballots. Specification: sparse_backend/reference/leaky.py.
//
// A step hangs on the one before by a dozen instructions, its loads do not: they are issued kAhead steps early.
#include "scan.cuh"

namespace sparse_backend {

// What few networks have: the membrane of every step, and what the gradient of beta needs.
template <typename T>
SPARSE_BACKEND_BOTH bool strip(ForwardScan<T>& a) {
    return take(a.mem_seq) | take(a.p);
}

// What few networks have: a gradient on the membrane of every step, and one of beta.
template <typename T>
SPARSE_BACKEND_BOTH bool strip(BackwardScan<T>& a) {
    const bool had = take(a.grad_mem_seq) | take(a.beta_sum);
    take(a.p), take(a.p_last);  // which only beta's gradient reads
    return had;
}

namespace {

template <typename T>
__device__ __forceinline__ T second_reset(T v, T jump, bool fires, bool r) {
    if (fires && !r) v -= jump;
    if (r && !fires) v += jump;
    return v;
}

template <typename T, int RESET, bool DOUBLE, bool USUAL>
__global__ void __launch_bounds__(kScanThreads) forward_kernel(const __grid_constant__ ForwardScan<T> given) {
    constexpr int kAhead = USUAL ? 8 : 6;                 // what is kept beside takes registers
    constexpr bool kDelayed = RESET != kNone && !DOUBLE;  // r is then what spiked a step before, but for the first step
    const ForwardScan<T> a = known<USUAL>(given);
    const bool keep_p = a.p != nullptr;
    const Place place(a);
    if (!place.in_batch) return;
    const int lane = lane_id();
    const bool real = place.real;
    const int64_t j = place.j, at = place.at, step = a.batch * a.neurons, words = words_of(a.neurons);
    const Global<const T> current(a.current);
    const Global<T> x_out(a.x), p_out(a.p), mem_seq(a.mem_seq);
    const Global<uint32_t> spikes(a.spikes), active(a.active), resets(a.resets);

    const T beta = real ? of_neuron(a.beta, j) : T(0), threshold = real ? of_neuron(a.threshold, j) : T(0);
    T v = real && a.mem_before != nullptr ? in(a.mem_before)[at] : T(0);
    T p = keep_p && real && a.p_before != nullptr ? in(a.p_before)[at] : T(0);
    if (kDelayed && a.reset_steps > 0) {
        const uint32_t word = __ballot_sync(kWarp, real && v > threshold);
        if (lane == 0) resets[place.sample * words + place.word] = word;
    }
    T next[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) next[k] = real && k < a.steps ? current[k * step + at] : T(0);
    for (int64_t t0 = 0; t0 < a.steps; t0 += kAhead) {
        T now[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) now[k] = next[k];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 + kAhead + k;
            if (real && t < a.steps) next[k] = current[t * step + at];
        }
        uint32_t spike_word = 0, active_word = 0, reset_word = 0;  // lane k keeps those of step t0 + k
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 + k;
            if (t >= a.steps) break;
            const bool r = v > threshold;
            if (RESET == kZero && r) v -= v;  // not 0: what is not finite stays so
            if (keep_p) {
                if (RESET == kZero && r) p -= p;
                p = beta * p + v;
            }
            v = beta * v + now[k];
            if (RESET == kSubtract && r) v -= threshold;
            const T x = v - threshold;
            const bool fires = x > T(0);
            const bool is_active = !(x >= a.b_th || -x >= a.b_th) || (a.cover_spikes && fires);
            if (DOUBLE) v = second_reset(v, RESET == kSubtract ? threshold : v, fires, r);
            if (real) {
                if (is_active) {
                    x_out[t * step + at] = x;
                    if (keep_p) p_out[t * step + at] = p;
                }
                if (mem_seq) mem_seq[t * step + at] = v;
            }
            const uint32_t fire_bits = __ballot_sync(kWarp, real && fires);
            const uint32_t active_bits = __ballot_sync(kWarp, real && is_active);
            const uint32_t reset_bits = !kDelayed && t < a.reset_steps ? __ballot_sync(kWarp, real && r) : 0u;
            if (lane == k) spike_word = fire_bits, active_word = active_bits, reset_word = reset_bits;
        }
        const int64_t t = t0 + lane;
        if (lane < kAhead && t < a.steps) {
            const int64_t to = (t * a.batch + place.sample) * words + place.word;
            spikes[to] = spike_word;
            active[to] = active_word;
            if (!kDelayed && t < a.reset_steps) resets[to] = reset_word;
        }
    }
    if (real) {
        out(a.mem)[at] = v;
        if (keep_p) out(a.p_after)[at] = p;
    }
}

// What a step of the adjoint reads, fetched in two stages: the bits, and what they point to.
template <typename T>
struct Bits {
    uint32_t active = 0, r = 0, spikes = 0;
    int32_t offset = 0;
};

template <typename T, int RESET, bool DOUBLE, bool USUAL>
__global__ void __launch_bounds__(kScanThreads) backward_kernel(const __grid_constant__ BackwardScan<T> given) {
    constexpr int kAhead = 4;
    const BackwardScan<T> a = known<USUAL>(given);
    const Place place(a);
    if (!place.in_batch || !place.real) return;  // no lane needs another here
    const int lane = lane_id();
    const int64_t j = place.j, at = place.at, step = a.batch * a.neurons, words = words_of(a.neurons);
    const int64_t word = place.sample * words + place.word;  // of the bits of one step
    const Global<const uint32_t> active(a.active), spikes(a.spikes), resets(a.resets);
    const Global<const int32_t> active_offset(a.active_offset);
    const Global<const T> grad_x(a.grad_x), p(a.p), grad_mem_seq(a.grad_mem_seq), mem_seq(a.mem_seq), mem(a.mem);
    const Global<T> delta_out(a.delta);
    const bool through_reset = DOUBLE && a.has_g, beta_by_mem = a.beta_sum != nullptr && a.p_last == nullptr;

    // Steps count backwards: s = 0 is the chunk's last. Past its first that is fetched again, and not used.
    const auto step_of = [&](int64_t s) { return a.first_step + (s < a.steps ? a.steps - 1 - s : 0); };
    const auto fetch_bits = [&](int64_t s) {
        Bits<T> got;
        const int64_t t = step_of(s);
        const int64_t row = t * a.batch * words + word;
        got.active = __ldg(&active[row]);
        got.offset = __ldg(&active_offset[row]);
        if (RESET != kNone && spikes) {
            if (a.reset_delay && t > 0)
                got.r = __ldg(&spikes[row - a.batch * words]);
            else if (resets)
                got.r = __ldg(&resets[a.reset_delay ? word : row]);
            if (DOUBLE) got.spikes = __ldg(&spikes[row]);
        }
        return got;
    };
    struct Values {
        T grad_x, p, grad_mem;
    };
    const auto entry = [&](const Bits<T>& bits) { return bits.offset + __popc(bits.active & below(lane)); };
    const auto fetch_values = [&](const Bits<T>& bits, int64_t s) {
        Values got{T(0), T(0), T(0)};
        if ((bits.active >> lane & 1) != 0) {
            if (grad_x) got.grad_x = __ldg(&grad_x[entry(bits)]);
            if (p) got.p = __ldg(&p[entry(bits)]);
        }
        if (grad_mem_seq) got.grad_mem = __ldg(&grad_mem_seq[step_of(s) * step + at]);
        return got;
    };

    const T beta = of_neuron(a.beta, j), threshold = of_neuron(a.threshold, j);
    T carried = T(0), bias_sum = T(0), beta_sum = T(0), threshold_sum = T(0);
    if (!a.begins) {
        carried = out(a.carried)[at];
        if (a.bias_sum != nullptr) bias_sum = out(a.bias_sum)[at];
        if (a.beta_sum != nullptr) beta_sum = out(a.beta_sum)[at];
        if (a.threshold_sum != nullptr) threshold_sum = out(a.threshold_sum)[at];
    } else if (a.grad_mem_last != nullptr) {
        carried = in(a.grad_mem_last)[at];
        if (a.beta_sum != nullptr && a.p_last != nullptr) beta_sum = carried * in(a.p_last)[at];
    }
    Bits<T> later[kAhead], bits[kAhead];
    Values values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) later[k] = fetch_bits(k);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) bits[k] = later[k], values[k] = fetch_values(bits[k], k);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) later[k] = fetch_bits(kAhead + k);
    for (int64_t s0 = 0; s0 < a.steps; s0 += kAhead) {
        Values ahead[kAhead];
        Bits<T> far[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) ahead[k] = fetch_values(later[k], s0 + kAhead + k);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) far[k] = fetch_bits(s0 + 2 * kAhead + k);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t s = s0 + k, t = a.first_step + a.steps - 1 - s;
            if (s >= a.steps) break;
            const bool r = RESET != kNone && (bits[k].r >> lane & 1) != 0;
            const T lambda = carried + values[k].grad_mem;
            T through = values[k].grad_x, delta = lambda;
            if (through_reset) {
                const bool fires = (bits[k].spikes >> lane & 1) != 0;
                if ((bits[k].active >> lane & 1) != 0) {
                    const int32_t e = entry(bits[k]);
                    const T jump = RESET == kSubtract ? threshold : __ldg(&in(a.x)[e]) + threshold;
                    through -= lambda * jump * __ldg(&in(a.g)[e]);
                }
                if (RESET == kZero) delta = second_reset(delta, lambda, fires, r);
                if (RESET == kSubtract) threshold_sum = second_reset(threshold_sum, lambda, fires, r);
            }
            delta += through;
            threshold_sum -= through;
            if (RESET == kSubtract && r) threshold_sum -= delta;
            bias_sum += delta;
            if (a.p_last != nullptr) beta_sum += values[k].grad_x * values[k].p;
            if (beta_by_mem && !(RESET == kZero && r)) {
                const T before = t > 0 ? __ldg(&mem_seq[(t - 1) * step + at]) : mem ? __ldg(&mem[at]) : T(0);
                beta_sum += delta * before;
            }
            delta_out[(t - a.first_step) * step + at] = delta;
            carried = RESET == kZero && r ? T(0) : beta * delta;
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) bits[k] = later[k], values[k] = ahead[k], later[k] = far[k];
    }
    out(a.carried)[at] = carried;
    if (a.bias_sum != nullptr) out(a.bias_sum)[at] = bias_sum;
    if (a.beta_sum != nullptr) out(a.beta_sum)[at] = beta_sum;
    if (a.threshold_sum != nullptr) out(a.threshold_sum)[at] = threshold_sum;
}

// ---- every entry active: a thread per neuron of a sample, no bits ----

template <typename T, int RESET, bool DOUBLE>
__global__ void __launch_bounds__(kScanThreads) dense_forward_kernel(const __grid_constant__ DenseForwardScan<T> a) {
    constexpr int kAhead = 8;
    const int64_t step = a.batch * a.neurons, at = int64_t{blockIdx.x} * kScanThreads + threadIdx.x;
    if (at >= step) return;
    const int64_t j = at % a.neurons;
    const Global<const T> current(a.current);
    const Global<T> x_out(a.x), mem_seq(a.mem_seq);
    const T beta = of_neuron(a.beta, j), threshold = of_neuron(a.threshold, j);
    T v = a.mem != nullptr ? in(a.mem)[at] : T(0);
    T next[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) next[k] = k < a.steps ? __ldg(&current[k * step + at]) : T(0);
    for (int64_t t0 = 0; t0 < a.steps; t0 += kAhead) {
        T now[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) now[k] = next[k];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 + kAhead + k;
            if (t < a.steps) next[k] = __ldg(&current[t * step + at]);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 + k;
            if (t >= a.steps) break;
            const bool r = v > threshold;
            if (RESET == kZero && r) v -= v;
            v = beta * v + now[k];
            if (RESET == kSubtract && r) v -= threshold;
            const T x = v - threshold;
            if (DOUBLE) v = second_reset(v, RESET == kSubtract ? threshold : v, x > T(0), r);
            x_out[t * step + at] = x;
            if (mem_seq) mem_seq[t * step + at] = v;
        }
    }
    out(a.mem_last)[at] = v;
}

template <typename T, int RESET, bool DOUBLE>
__global__ void __launch_bounds__(kScanThreads) dense_backward_kernel(const __grid_constant__ DenseBackwardScan<T> a) {
    constexpr int kAhead = 4;
    const int64_t step = a.batch * a.neurons, at = int64_t{blockIdx.x} * kScanThreads + threadIdx.x;
    if (at >= step) return;
    const int64_t j = at % a.neurons;
    const Global<const T> grad_x(a.grad_x), grad_mem_seq(a.grad_mem_seq), x_in(a.x), g(a.g), mem_seq(a.mem_seq);
    const Global<const T> mem(a.mem);
    const Global<T> delta_out(a.delta);
    const T beta = of_neuron(a.beta, j), threshold = of_neuron(a.threshold, j);
    const bool need_past =
        RESET == kZero || DOUBLE || (RESET == kSubtract && a.threshold_sum != nullptr) || a.beta_sum != nullptr;
    struct Values {
        T grad_x, grad_mem, x, past, g;
        bool r;
    };
    const auto fetch = [&](int64_t t) {
        Values got{T(0), T(0), T(0), T(0), T(0), false};
        if (t < 0) return got;
        if (grad_x) got.grad_x = __ldg(&grad_x[t * step + at]);
        if (grad_mem_seq) got.grad_mem = __ldg(&grad_mem_seq[t * step + at]);
        if (x_in) got.x = __ldg(&x_in[t * step + at]);
        if (DOUBLE && g) got.g = __ldg(&g[t * step + at]);
        if (!need_past) return got;
        if (t == 0 || mem_seq) {
            if (t > 0)
                got.past = __ldg(&mem_seq[(t - 1) * step + at]);
            else if (mem)
                got.past = __ldg(&mem[at]);
            got.r = got.past > threshold;
        } else {
            const T x = __ldg(&x_in[(t - 1) * step + at]);
            got.past = x + threshold;
            got.r = x > T(0);
        }
        return got;
    };
    T carried = a.grad_mem_last != nullptr ? in(a.grad_mem_last)[at] : T(0);
    T beta_sum = T(0), threshold_sum = T(0);
    Values next[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) next[k] = fetch(a.steps - 1 - k);
    for (int64_t t0 = a.steps - 1; t0 >= 0; t0 -= kAhead) {
        Values now[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) now[k] = next[k];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) next[k] = fetch(t0 - kAhead - k);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 - k;
            if (t < 0) break;
            const Values& here = now[k];
            const T lambda = carried + here.grad_mem;
            const bool counts = !x_in || !(here.x >= a.b_th || -here.x >= a.b_th);
            T through = counts ? here.grad_x : T(0), delta = lambda;
            if (DOUBLE && g) {
                const bool fires = here.x > T(0);
                through -= lambda * (RESET == kSubtract ? threshold : here.x + threshold) * here.g;
                if (RESET == kZero) delta = second_reset(delta, lambda, fires, here.r);
                if (RESET == kSubtract) threshold_sum = second_reset(threshold_sum, lambda, fires, here.r);
            }
            delta += through;
            threshold_sum -= through;
            if (RESET == kSubtract && here.r) threshold_sum -= delta;
            const T passed = RESET == kZero && here.r ? delta - delta : delta;
            beta_sum += passed * here.past;
            delta_out[t * step + at] = delta;
            carried = beta * passed;
        }
    }
    if (a.grad_mem != nullptr) out(a.grad_mem)[at] = carried;
    if (a.beta_sum != nullptr) out(a.beta_sum)[at] = beta_sum;
    if (a.threshold_sum != nullptr) out(a.threshold_sum)[at] = threshold_sum;
}

// Calls run(reset, double) with both as compile-time constants.
template <int RESET, bool DOUBLE>
struct Rule {
    static constexpr int reset = RESET;
    static constexpr bool twice = DOUBLE;
};

template <typename Run>
int with_rule(int reset, bool reset_delay, Run&& run) {
    if (reset == kNone) return run(Rule<kNone, false>());
    if (reset == kZero) return reset_delay ? run(Rule<kZero, false>()) : run(Rule<kZero, true>());
    return reset_delay ? run(Rule<kSubtract, false>()) : run(Rule<kSubtract, true>());
}

}  // namespace

template <typename T>
int leaky_forward(const ForwardScan<T>& a, Stream stream) {
    return with_rule(a.reset, a.reset_delay, [&](auto rule) {
        return with_usual(a, [&](auto usual) {
            using R = decltype(rule);
            constexpr auto kernel = forward_kernel<T, R::reset, R::twice, decltype(usual)::value>;
            return launch(kernel, scan_grid(a), kScanThreads, stream, a);
        });
    });
}

template <typename T>
int leaky_backward(const BackwardScan<T>& a, Stream stream) {
    // A delayed reset that subtracts is detached: it shows in the gradient of the threshold alone.
    const bool shows = a.reset != kSubtract || !a.reset_delay || a.threshold_sum != nullptr;
    return with_rule(shows ? a.reset : kNone, a.reset_delay, [&](auto rule) {
        return with_usual(a, [&](auto usual) {
            using R = decltype(rule);
            constexpr auto kernel = backward_kernel<T, R::reset, R::twice, decltype(usual)::value>;
            return launch(kernel, scan_grid(a), kScanThreads, stream, a);
        });
    });
}

template <typename T>
int leaky_dense_forward(const DenseForwardScan<T>& a, Stream stream) {
    const dim3 grid(blocks_for(a.batch * a.neurons, kScanThreads));
    return with_rule(a.reset, a.reset_delay, [&](auto rule) {
        using R = decltype(rule);
        return launch(dense_forward_kernel<T, R::reset, R::twice>, grid, kScanThreads, stream, a);
    });
}

template <typename T>
int leaky_dense_backward(const DenseBackwardScan<T>& a, Stream stream) {
    const dim3 grid(blocks_for(a.batch * a.neurons, kScanThreads));
    return with_rule(a.reset, a.reset_delay, [&](auto rule) {
        using R = decltype(rule);
        return launch(dense_backward_kernel<T, R::reset, R::twice>, grid, kScanThreads, stream, a);
    });
}

#define SPARSE_BACKEND_INSTANTIATE(T)                                     \
    template int leaky_forward(const ForwardScan<T>&, Stream);            \
    template int leaky_backward(const BackwardScan<T>&, Stream);          \
    template int leaky_dense_forward(const DenseForwardScan<T>&, Stream); \
    template int leaky_dense_backward(const DenseBackwardScan<T>&, Stream);
SPARSE_BACKEND_INSTANTIATE(float)
SPARSE_BACKEND_INSTANTIATE(double)
#undef SPARSE_BACKEND_INSTANTIATE

}  // namespace sparse_backend
