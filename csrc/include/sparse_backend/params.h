// What kernels are given: raw pointers and sizes in small structs. No torch headers here or in any file of include/.
//
// Letters as in docs/design.md: T steps, B samples, N neurons, M inputs, R = T * B rows; row of (t, b) is t * B + b.
#pragma once

#include <cstdint>

namespace sparse_backend {

enum Reset : int { kSubtract = 0, kZero = 1, kNone = 2, kValue = 3 };

// Rows of a padded matrix are a multiple of this many entries: one AVX-512 register of floats.
constexpr int64_t kPad = 16;

constexpr int64_t padded(int64_t n) {
    return (n + kPad - 1) / kPad * kPad;
}

// Events in CSR form; see sparse_backend/events.py. Row r holds entries row_ptr[r] .. row_ptr[r + 1].
struct Rows {
    const int32_t* row_ptr = nullptr;  // [R + 1], null where there are none
    const int32_t* indices = nullptr;  // [nnz], ascending within a row
};

template <typename T>
struct Events : Rows {
    const T* values = nullptr;  // [nnz], null where every event is 1
};

// A weight laid out for events: row i holds the weights from input i to every neuron.
template <typename T>
struct Weight {
    const T* data = nullptr;  // [M, stride]
    int64_t stride = 0;       // padded(N), the padding zero
};

// A task's share: samples [first_sample, last_sample) and columns [first_column, last_column).
// first_column is a multiple of kPad.
struct Block {
    int64_t first_sample, last_sample, first_column, last_column;
};

// What a walk of the adjoint adds up per neuron, where asked: pointers to [padded(N)] or null.
template <typename T>
struct NeuronSums {
    T* beta = nullptr;
    T* threshold = nullptr;
};

template <typename T>
struct LeakyForward {
    int64_t steps, batch, neurons;
    bool from_events;  // the current is computed from `input`, `weight` and `bias`, not given
    Events<T> input;   // with `weight`, where no current is given
    Weight<T> weight;
    const T* bias = nullptr;     // [padded(N)]
    const T* current = nullptr;  // [T, B, N]: given, or null to be computed
    bool same_current = false;   // [B, N], the same at every step
    const T* beta;               // [padded(N)], padding 0
    const T* threshold;          // [padded(N)], padding infinite: padded neurons never fire
    const T* mem = nullptr;      // [B, N], zeros if null
    int reset;
    bool reset_delay;
    T b_th;
    bool cover_spikes;  // spikes outside the band count as active too
    bool keep_reset;
    bool keep_p;
    T* mem_last;           // [B, N]
    T* mem_seq = nullptr;  // [T, B, N]
    T* p_last = nullptr;   // [B, N]
};

template <typename T>
struct LeakyBackward {
    int64_t steps, batch, neurons;
    const T* grad_x = nullptr;         // [n_active]
    const T* grad_mem_last = nullptr;  // [B, N]
    const T* grad_mem_seq = nullptr;   // [T, B, N]
    const T* x = nullptr;              // [n_active], second reset to zero alone
    const T* g = nullptr;              // [n_active] with `has_g`: null too where nothing is active
    bool has_g = false;                // a second reset's gradient runs through the surrogate
    Rows active;
    Rows spikes;                 // where resets are needed
    Rows resets;                 // r: its first step with reset_delay, else every step
    const T* p = nullptr;        // [n_active] dV/dbeta
    const T* p_last = nullptr;   // [B, N]
    const T* mem_seq = nullptr;  // [T, B, N], beta's gradient without p
    const T* mem = nullptr;      // [B, N]
    const T* beta;               // [padded(N)]
    const T* threshold;          // [padded(N)]
    int reset;
    bool reset_delay;

    bool double_reset() const { return !reset_delay && reset != kNone; }
};

// The dense recursion needs no lists: every entry is active.
template <typename T>
struct DenseForward {
    int64_t steps, batch, neurons;
    const T* current;           // [T, B, N]
    bool same_current = false;  // [B, N], the same at every step
    const T* beta;              // [padded(N)]
    const T* threshold;         // [padded(N)]
    const T* mem = nullptr;     // [B, N]
    int reset;
    bool reset_delay;
    T* x;                  // [T, B, N]
    T* mem_last;           // [B, N]
    T* mem_seq = nullptr;  // [T, B, N], where kept
};

template <typename T>
struct DenseBackward {
    int64_t steps, batch, neurons;
    const T* grad_x = nullptr;         // [T, B, N]
    const T* grad_mem_last = nullptr;  // [B, N]
    const T* grad_mem_seq = nullptr;   // [T, B, N]
    const T* x = nullptr;              // [T, B, N], where resets, beta's gradient or a finite b_th need it
    const T* g = nullptr;              // [T, B, N], second reset alone
    const T* mem_seq = nullptr;        // [T, B, N], second reset alone; otherwise V = x + threshold
    const T* mem = nullptr;            // [B, N]
    const T* beta;                     // [padded(N)]
    const T* threshold;                // [padded(N)]
    int reset;
    bool reset_delay;
    T b_th;
    T* delta;               // [T, B, N]
    T* grad_mem = nullptr;  // [B, N]

    bool double_reset() const { return !reset_delay && reset != kNone; }
};

// The two-state neuron. Coefficients are [padded(N)], their padding 0. `discrete`: snnTorch's equations, with mem_gain
// the decay of v and i as handed out the inflow.
template <typename T>
struct LifForward {
    int64_t steps, batch, neurons;
    bool from_events;  // the current is computed from `input`, `weight` and `bias`, not given
    Events<T> input;
    Weight<T> weight;
    const T* bias = nullptr;     // [padded(N)]
    const T* current = nullptr;  // [T, B, N]
    bool is_recurrent;
    Weight<T> recurrent;  // a row per presynaptic neuron
    const T* mem_gain;
    const T* syn_decay = nullptr;  // null: no synaptic current
    const T* leak;                 // zeros where nothing leaks
    bool leaks;                    // else the membrane keeps what it has
    const T* threshold;
    const T* reset_to;
    const T* v = nullptr;  // [B, N], leak if null
    const T* i = nullptr;  // [B, N], zeros if null
    int reset;
    bool discrete;
    T b_th;
    bool dense;           // x of every entry, and no lists
    T* x = nullptr;       // [T, B, N] where dense
    T* v_last;            // [B, N]
    T* i_last = nullptr;  // [B, N], where there is a synaptic current, as i_seq
    T* v_seq = nullptr;   // [T, B, N] where kept, as the rest
    T* i_seq = nullptr;
    T* drive = nullptr;
    T* inflow = nullptr;
};

template <typename T>
struct LifBackward {
    int64_t steps, batch, neurons;
    const T* grad_x = nullptr;       // [n_active], or [T, B, N] where dense
    const T* grad_v_last = nullptr;  // [B, N]
    const T* grad_i_last = nullptr;
    const T* grad_v_seq = nullptr;  // [T, B, N]
    const T* grad_i_seq = nullptr;
    const T* x = nullptr;  // where grad_x is: a reset to a value that is not detached; where dense every reset and b_th
    const T* g = nullptr;  // where grad_x is: a reset that is not detached, recurrence
    Rows active, spikes;   // where not dense; spikes where resets are needed
    const T* drive = nullptr;              // [T, B, N]
    const T* inflow = nullptr;             // [T, B, N]
    const uint8_t* first_reset = nullptr;  // [B, N], discrete: what the first step resets; null: where threshold < 0
    const T* delta_after = nullptr;        // [B, N] where dense, in a walk over one step: delta of the step after
    const T* x_before = nullptr;           // [B, N], discrete and dense: x of the step before the first
    const T* mem_gain;                     // du / dinflow
    const T* keep;                         // how much of v is left after a step
    const T* syn_decay = nullptr;          // null: no synaptic current
    const T* threshold;
    const T* reset_to;
    bool is_recurrent;  // not where dense
    Weight<T> recurrent;
    const T* back = nullptr;  // [B, N] where dense, in a walk over one step: its delta times the recurrent weights
    int reset;
    bool discrete;
    bool attached;  // gradients run through the spike in the reset
    T b_th;
    bool dense;
    T* through = nullptr;  // [n_active] out: gradient for x with what came through reset and recurrence
};

// What a walk of its adjoint adds up per neuron, where asked: pointers to [padded(N)] or null.
template <typename T>
struct LifSums {
    T* mem_gain = nullptr;
    T* syn_decay = nullptr;
    T* leak = nullptr;
    T* threshold = nullptr;
    T* reset_to = nullptr;
};

}  // namespace sparse_backend
