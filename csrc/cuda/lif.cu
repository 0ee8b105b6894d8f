// The two-state neuron over a chunk of steps: a thread per neuron of a sample, v and i in registers, as in leaky.cu.
// Recurrent layers need a sample's spikes before its next step: there a block walks one sample, and its states lie in
// memory. DISCRETE: snnTorch's equations. Specification: sparse_backend/reference/lif.py.
#include "scan.cuh"

namespace sparse_backend {

// What few networks have: a dense layer, and the states of every step.
template <typename T>
SPARSE_BACKEND_BOTH bool strip(LifForwardScan<T>& a) {
    const bool had = a.dense;
    a.dense = false;
    return had | take(a.v_seq) | take(a.i_seq) | take(a.drive) | take(a.inflow);
}

// What few networks have: a dense layer, a gradient on the states of every step, and one of a time constant.
template <typename T>
SPARSE_BACKEND_BOTH bool strip(LifBackwardScan<T>& a) {
    const bool had = a.dense;
    a.dense = false;
    return had | take(a.grad_v_seq) | take(a.grad_i_seq) | take(a.drive) | take(a.inflow);
}

namespace {

constexpr int kBlockThreads = 256;  // of a block that walks a sample
constexpr int kBlockWarps = kBlockThreads / kLanes;

template <typename T>
struct Coefficients {
    T mem_gain, syn_decay, leak, threshold, reset_to;
};

template <typename T, typename Scan>
__device__ __forceinline__ Coefficients<T> coefficients(const Scan& a, const PerNeuron<T>& leak, int64_t j) {
    return {of_neuron(a.mem_gain, j), of_neuron(a.syn_decay, j), of_neuron(leak, j), of_neuron(a.threshold, j),
            of_neuron(a.reset_to, j)};
}

template <typename T>
struct Step {
    T inflow, drive, x;
    T i;  // as handed out
    bool fires, is_active;
};

// One step: v and i become those that enter the next.
template <bool DISCRETE, typename T>
__device__ __forceinline__ Step<T> step_of(const LifForwardScan<T>& a, const Coefficients<T>& c, T current, T& v,
                                           T& i) {
    Step<T> s;
    s.inflow = i + current;
    if constexpr (DISCRETE) {
        const bool r = v - c.threshold > T(0);
        s.drive = v;
        v = c.mem_gain * v + s.inflow;
        if (a.reset == kSubtract && r) v -= c.threshold;
        if (a.reset == kZero) v = v - (r ? T(1) : T(0)) * v;  // NaN if infinite, as snnTorch has it
    } else {
        s.drive = a.leak.data != nullptr ? (c.leak - v) + s.inflow : s.inflow;
        v = v + c.mem_gain * s.drive;
    }
    s.x = v - c.threshold;
    s.fires = s.x > T(0);
    s.is_active = !(s.x >= a.b_th || -s.x >= a.b_th);
    if (!DISCRETE && a.reset != kNone) {
        const T z = s.fires ? T(1) : T(0);
        v = (T(1) - z) * v + z * (a.reset == kValue ? c.reset_to : s.x);
    }
    i = a.syn_decay.data != nullptr ? c.syn_decay * s.inflow : T(0);
    s.i = DISCRETE ? s.inflow : i;
    return s;
}

template <typename T>
__device__ __forceinline__ void keep(const LifForwardScan<T>& a, const Step<T>& s, T v, int64_t to) {
    if (a.dense || s.is_active) out(a.x)[to] = s.x;
    if (a.v_seq != nullptr) out(a.v_seq)[to] = v;
    if (a.i_seq != nullptr) out(a.i_seq)[to] = s.i;
    if (a.drive != nullptr) out(a.drive)[to] = s.drive;
    if (a.inflow != nullptr) out(a.inflow)[to] = s.inflow;
}

template <typename T, bool DISCRETE, bool USUAL>
__global__ void __launch_bounds__(kScanThreads) forward_kernel(const __grid_constant__ LifForwardScan<T> given) {
    constexpr int kAhead = 8;
    const LifForwardScan<T> a = known<USUAL>(given);
    const Place place(a);
    if (!place.in_batch) return;
    const int lane = lane_id();
    const bool real = place.real;
    const int64_t j = place.j, at = place.at, step = a.batch * a.neurons, words = words_of(a.neurons);
    const Global<const T> current(a.current);
    const Coefficients<T> c = coefficients<T>(a, a.leak, real ? j : 0);
    T v = !real ? T(0) : a.v_before != nullptr ? in(a.v_before)[at] : c.leak;
    T i = real && a.i_before != nullptr ? in(a.i_before)[at] : T(0), last_i = i;
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
        uint32_t spike_word = 0, active_word = 0;  // lane k keeps those of step t0 + k
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 + k;
            if (t >= a.steps) break;
            const Step<T> s = step_of<DISCRETE>(a, c, now[k], v, i);
            last_i = s.i;
            if (real) keep(a, s, v, t * step + at);
            const uint32_t fire_bits = __ballot_sync(kWarp, real && s.fires);
            const uint32_t active_bits = __ballot_sync(kWarp, real && s.is_active);
            if (lane == k) spike_word = fire_bits, active_word = active_bits;
        }
        const int64_t t = t0 + lane;
        if (lane < kAhead && t < a.steps) {
            const int64_t to = (t * a.batch + place.sample) * words + place.word;
            if (a.spikes != nullptr) out(a.spikes)[to] = spike_word;
            if (a.active != nullptr) out(a.active)[to] = active_word;
        }
    }
    if (!real) return;
    out(a.v)[at] = v;
    if (a.i != nullptr) out(a.i)[at] = last_i;
    if (DISCRETE && a.i_state != nullptr) out(a.i_state)[at] = i;
}

// A block per sample, a warp per word of its neurons: what spiked in the step before adds rows of the recurrent
// weights.
template <typename T, bool DISCRETE>
__global__ void __launch_bounds__(kBlockThreads) recurrent_forward_kernel(const __grid_constant__ LifForwardScan<T> a) {
    constexpr int kAtOnce = 4;
    const int64_t sample = blockIdx.x, words = words_of(a.neurons), step = a.batch * a.neurons;
    const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = lane_id();
    const Global<const T> current(a.current), weight(a.recurrent.data);
    const Global<T> v_state(a.v), i_state(a.i_state);
    const Global<uint32_t> spikes(a.spikes), fired = out(a.fired) + sample * words;
    for (int64_t j = threadIdx.x; j < a.neurons; j += kBlockThreads) {
        const int64_t at = sample * a.neurons + j;
        v_state[at] = a.v_before != nullptr ? in(a.v_before)[at] : of_neuron(a.leak, j);
        i_state[at] = a.i_before != nullptr ? in(a.i_before)[at] : T(0);
        if (DISCRETE && a.i != nullptr && a.steps == 0) out(a.i)[at] = i_state[at];
    }  // a thread walks the neurons whose states it has set
    for (int64_t t = 0; t < a.steps; ++t) {
        const int64_t row = (t * a.batch + sample) * words;
        const Global<uint32_t> before = t == 0 ? fired : spikes + (row - a.batch * words);
        for (int64_t word = warp; word < words; word += kBlockWarps) {
            const int64_t j = word * kLanes + lane, at = sample * a.neurons + j;
            const bool real = j < a.neurons;
            T sum = real ? current[t * step + at] : T(0);
            for (int64_t w = 0; w < words; ++w) {
                uint32_t left = before[w];
                while (left != 0) {
                    T part[kAtOnce];
#pragma unroll
                    for (int k = 0; k < kAtOnce; ++k) {
                        part[k] = T(0);
                        if (left == 0) continue;
                        const int64_t from = w * kLanes + __ffs(static_cast<int>(left)) - 1;
                        left &= left - 1;
                        if (real) part[k] = __ldg(&weight[from * a.recurrent.stride + j]);
                    }
#pragma unroll
                    for (int k = 0; k < kAtOnce; ++k) sum += part[k];
                }
            }
            bool fires = false, is_active = false;
            if (real) {
                T v = v_state[at], i = i_state[at];
                const Step<T> s = step_of<DISCRETE>(a, coefficients<T>(a, a.leak, j), sum, v, i);
                keep(a, s, v, t * step + at);
                v_state[at] = v, i_state[at] = i;
                if (DISCRETE && a.i != nullptr && t + 1 == a.steps) out(a.i)[at] = s.i;
                fires = s.fires, is_active = s.is_active;
            }
            const uint32_t fire_bits = __ballot_sync(kWarp, fires), active_bits = __ballot_sync(kWarp, is_active);
            if (lane == 0) {
                spikes[row + word] = fire_bits;
                if (a.active != nullptr) out(a.active)[row + word] = active_bits;
            }
        }
        __syncthreads();
    }
    if (a.steps == 0) return;
    for (int64_t word = threadIdx.x; word < words; word += kBlockThreads)
        fired[word] = spikes[((a.steps - 1) * a.batch + sample) * words + word];
}

// ---- the adjoint ----

template <typename T>
struct Values {
    T grad_x, g, x, grad_v, grad_i;
    bool is_active, resets;  // DISCRETE: resets for what spiked in the step before
};

template <typename T>
struct State {
    T v, i;  // dL/dv and dL/di after a step; DISCRETE: of i as it enters the next alone, not as handed out
    T bias, mem_gain, syn_decay, leak, threshold, reset_to;
};

// One step backwards; `back` is what comes through the recurrent weights. Returns delta.
template <bool DISCRETE, typename T>
__device__ __forceinline__ T adjoint_step(const LifBackwardScan<T>& a, const Coefficients<T>& c, const Values<T>& here,
                                          T back, int64_t at, State<T>& state) {
    const T lv = state.v + here.grad_v, li = DISCRETE ? state.i : state.i + here.grad_i;
    T through = here.grad_x + back * here.g;
    if (!DISCRETE && a.attached)
        through += lv * (a.reset == kValue ? c.reset_to - (here.x + c.threshold) : -c.threshold) * here.g;
    T jumped, of_u;
    if constexpr (DISCRETE) {
        of_u = through + lv;
        jumped = here.resets ? of_u : T(0);
        if (a.reset == kZero) of_u -= jumped;
    } else {
        jumped = here.resets ? lv : T(0);
        of_u = through + (a.reset == kValue ? lv - jumped : lv);
    }
    state.threshold -= through;
    if (a.reset == kSubtract) state.threshold -= jumped;
    if (a.reset == kValue) state.reset_to += jumped;
    if (a.drive != nullptr) state.mem_gain += of_u * __ldg(&in(a.drive)[at]);
    if (a.inflow != nullptr) state.syn_decay += li * __ldg(&in(a.inflow)[at]);
    const T through_u = DISCRETE ? of_u : c.mem_gain * of_u;
    state.leak += through_u;
    T delta = a.syn_decay.data == nullptr ? through_u : through_u + c.syn_decay * li;
    if (DISCRETE) delta += here.grad_i;
    state.bias += delta;
    if constexpr (DISCRETE)
        state.v = c.mem_gain * of_u;
    else
        state.v = a.leaks ? (T(1) - c.mem_gain) * of_u : of_u;
    state.i = delta;
    return delta;
}

template <bool DISCRETE, typename T>
__device__ __forceinline__ State<T> load_state(const LifBackwardScan<T>& a, int64_t at) {
    State<T> state{};
    if (a.begins) {
        if (a.grad_v_last != nullptr) state.v = in(a.grad_v_last)[at];
        if (!DISCRETE && a.grad_i_last != nullptr) state.i = in(a.grad_i_last)[at];
        return state;
    }
    state.v = out(a.of_v)[at], state.i = out(a.of_i)[at];
    if (a.bias_sum != nullptr) state.bias = out(a.bias_sum)[at];
    if (a.gain_sum != nullptr) state.mem_gain = out(a.gain_sum)[at];
    if (a.decay_sum != nullptr) state.syn_decay = out(a.decay_sum)[at];
    if (a.leak_sum != nullptr) state.leak = out(a.leak_sum)[at];
    if (a.threshold_sum != nullptr) state.threshold = out(a.threshold_sum)[at];
    if (a.reset_sum != nullptr) state.reset_to = out(a.reset_sum)[at];
    return state;
}

template <typename T>
__device__ __forceinline__ void store_state(const LifBackwardScan<T>& a, int64_t at, const State<T>& state) {
    out(a.of_v)[at] = state.v, out(a.of_i)[at] = state.i;
    if (a.bias_sum != nullptr) out(a.bias_sum)[at] = state.bias;
    if (a.gain_sum != nullptr) out(a.gain_sum)[at] = state.mem_gain;
    if (a.decay_sum != nullptr) out(a.decay_sum)[at] = state.syn_decay;
    if (a.leak_sum != nullptr) out(a.leak_sum)[at] = state.leak;
    if (a.threshold_sum != nullptr) out(a.threshold_sum)[at] = state.threshold;
    if (a.reset_sum != nullptr) out(a.reset_sum)[at] = state.reset_to;
}

// The bits of one step, fetched before what they point to.
struct Bits {
    uint32_t active = 0, resets = 0;
    int32_t offset = 0;
};

template <bool DISCRETE, typename T>
__device__ __forceinline__ Bits fetch_bits(const LifBackwardScan<T>& a, int64_t t, int64_t word) {
    Bits got;
    if (t < a.first_step) return got;
    const int64_t step = a.batch * words_of(a.neurons), at = t * step + word;
    if (!a.dense) got.active = __ldg(&in(a.active)[at]), got.offset = __ldg(&in(a.active_offset)[at]);
    if (a.spikes != nullptr && (!DISCRETE || t > 0)) got.resets = __ldg(&in(a.spikes)[DISCRETE ? at - step : at]);
    return got;
}

template <bool DISCRETE, typename T>
__device__ __forceinline__ Values<T> fetch_values(const LifBackwardScan<T>& a, const Bits& bits, int64_t t, int64_t j,
                                                  int64_t at) {
    const int lane = static_cast<int>(j % kLanes);
    Values<T> got{T(0), T(0), T(0), T(0), T(0), false, (bits.resets >> lane & 1) != 0};
    if (t < a.first_step) return got;
    const int64_t step = a.batch * a.neurons, here = t * step + at;
    got.is_active = a.dense || (bits.active >> lane & 1) != 0;
    if (got.is_active) {
        const int64_t e = a.dense ? here : bits.offset + __popc(bits.active & below(lane));
        if (a.grad_x != nullptr) got.grad_x = __ldg(&in(a.grad_x)[e]);
        if (a.has_g) got.g = __ldg(&in(a.g)[e]);
        if (a.x != nullptr) got.x = __ldg(&in(a.x)[e]);
        if (a.dense && a.x != nullptr) {
            if (!DISCRETE && a.spikes == nullptr) got.resets = got.x > T(0);
            if (got.x >= a.b_th || -got.x >= a.b_th) got.grad_x = got.g = T(0);
        }
    }
    if (a.grad_v_seq != nullptr) got.grad_v = __ldg(&in(a.grad_v_seq)[here]);
    if (a.grad_i_seq != nullptr) got.grad_i = __ldg(&in(a.grad_i_seq)[here]);
    if constexpr (DISCRETE) {
        if (t == 0)
            got.resets =
                a.first_reset != nullptr ? __ldg(&in(a.first_reset)[at]) != 0 : T(0) - of_neuron(a.threshold, j) > T(0);
        else if (a.dense && a.spikes == nullptr && a.x != nullptr)
            got.resets = __ldg(&in(a.x)[here - step]) > T(0);
        if (a.grad_i_last != nullptr && t + 1 == a.total_steps) got.grad_i += __ldg(&in(a.grad_i_last)[at]);
    }
    return got;
}

template <typename T, bool DISCRETE, bool USUAL>
__global__ void __launch_bounds__(kScanThreads) backward_kernel(const __grid_constant__ LifBackwardScan<T> given) {
    constexpr int kAhead = sizeof(T) == 4 ? 4 : 2;
    const LifBackwardScan<T> a = known<USUAL>(given);
    const Place place(a);
    if (!place.in_batch || !place.real) return;  // no lane needs another here
    const int64_t j = place.j, at = place.at, step = a.batch * a.neurons, last = a.first_step + a.steps - 1;
    const int64_t word = place.sample * words_of(a.neurons) + place.word;  // of the bits of one step
    const Global<T> delta_out(a.delta);
    const Coefficients<T> c = coefficients<T>(a, {}, j);
    State<T> state = load_state<DISCRETE>(a, at);
    Bits later[kAhead];
    Values<T> values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) later[k] = fetch_bits<DISCRETE>(a, last - k, word);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) values[k] = fetch_values<DISCRETE>(a, later[k], last - k, j, at);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) later[k] = fetch_bits<DISCRETE>(a, last - kAhead - k, word);
    for (int64_t t0 = last; t0 >= a.first_step; t0 -= kAhead) {
        Values<T> ahead[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) ahead[k] = fetch_values<DISCRETE>(a, later[k], t0 - kAhead - k, j, at);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) later[k] = fetch_bits<DISCRETE>(a, t0 - 2 * kAhead - k, word);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int64_t t = t0 - k;
            if (t < a.first_step) break;
            delta_out[(t - a.first_step) * step + at] =
                adjoint_step<DISCRETE>(a, c, values[k], T(0), t * step + at, state);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) values[k] = ahead[k];
    }
    store_state(a, at, state);
}

// A block per sample: first what comes back through the recurrent weights, a warp per entry it is wanted at, then the
// step of all neurons.
template <typename T, bool DISCRETE>
__global__ void __launch_bounds__(kBlockThreads, DISCRETE ? 4 : 0)  // to fit more, registers would be spilled
    recurrent_backward_kernel(const __grid_constant__ LifBackwardScan<T> a) {
    const int64_t sample = blockIdx.x, words = words_of(a.neurons), step = a.batch * a.neurons;
    const int64_t first = sample * a.neurons;
    const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = lane_id();
    const Global<const T> weight(a.recurrent.data);
    const Global<const int32_t> row_ptr(a.active_rows.row_ptr), indices(a.active_rows.indices);
    const Global<T> of_i = out(a.of_i) + first, back = out(a.back) + first, delta_out(a.delta);
    for (int64_t j = threadIdx.x; j < a.neurons; j += kBlockThreads)
        store_state(a, first + j, load_state<DISCRETE>(a, first + j));
    LifBackwardScan<T> now = a;
    now.begins = false;  // states lie in memory from here on
    __syncthreads();
    for (int64_t t = a.first_step + a.steps - 1; t >= a.first_step; --t) {
        const bool comes = t + 1 < a.total_steps;
        if (comes) {  // of_i is still delta of the step after
            const int64_t row = t * a.batch + sample;
            const int64_t begin = a.dense ? 0 : __ldg(&row_ptr[row]);
            const int64_t end = a.dense ? a.neurons : __ldg(&row_ptr[row + 1]);
            for (int64_t e = begin + warp; e < end; e += kBlockWarps) {
                const int64_t j = a.dense ? e : __ldg(&indices[e]);
                T sum = T(0);
                for (int64_t k = lane; k < a.neurons; k += kLanes)
                    sum += __ldg(&weight[j * a.recurrent.stride + k]) * of_i[k];
#pragma unroll
                for (int bits = kLanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kWarp, sum, bits);
                if (lane == 0) back[j] = sum;
            }
            __syncthreads();
        }
        for (int64_t j = threadIdx.x; j < a.neurons; j += kBlockThreads) {
            const int64_t at = first + j;
            const Bits bits = fetch_bits<DISCRETE>(a, t, sample * words + j / kLanes);
            const Values<T> here = fetch_values<DISCRETE>(a, bits, t, j, at);
            State<T> state = load_state<DISCRETE>(now, at);
            const T from_spikes = comes && here.is_active ? back[j] : T(0);
            delta_out[(t - a.first_step) * step + at] =
                adjoint_step<DISCRETE>(a, coefficients<T>(a, {}, j), here, from_spikes, t * step + at, state);
            store_state(a, at, state);
        }
        __syncthreads();
    }
}

template <bool DISCRETE, typename T>
int forward(const LifForwardScan<T>& a, Stream stream) {
    const dim3 samples(static_cast<unsigned>(a.batch));
    if (a.fired != nullptr) return launch(recurrent_forward_kernel<T, DISCRETE>, samples, kBlockThreads, stream, a);
    return with_usual(a, [&](auto usual) {
        constexpr auto kernel = forward_kernel<T, DISCRETE, decltype(usual)::value>;
        return launch(kernel, scan_grid(a), kScanThreads, stream, a);
    });
}

template <bool DISCRETE, typename T>
int backward(const LifBackwardScan<T>& a, Stream stream) {
    const dim3 samples(static_cast<unsigned>(a.batch));
    if (a.back != nullptr) return launch(recurrent_backward_kernel<T, DISCRETE>, samples, kBlockThreads, stream, a);
    return with_usual(a, [&](auto usual) {
        constexpr auto kernel = backward_kernel<T, DISCRETE, decltype(usual)::value>;
        return launch(kernel, scan_grid(a), kScanThreads, stream, a);
    });
}

}  // namespace

template <typename T>
int lif_forward(const LifForwardScan<T>& a, Stream stream) {
    return a.discrete ? forward<true>(a, stream) : forward<false>(a, stream);
}

template <typename T>
int lif_backward(const LifBackwardScan<T>& a, Stream stream) {
    return a.discrete ? backward<true>(a, stream) : backward<false>(a, stream);
}

template int lif_forward(const LifForwardScan<float>&, Stream);
template int lif_forward(const LifForwardScan<double>&, Stream);
template int lif_backward(const LifBackwardScan<float>&, Stream);
template int lif_backward(const LifBackwardScan<double>&, Stream);

}  // namespace sparse_backend
