// The launchers of all CUDA kernels: raw device pointers and sizes in small structs, a stream, and an error code back.
//
// Neither torch nor the CUDA runtime is seen here. A code other than 0 is a cudaError_t; `take_error` says what it
// means. Letters as in docs/design.md. Bits: row r of a matrix [R, N] has words_of(N) words of 32 columns each; bits of
// columns past N are 0. A chunk is the steps first_step .. first_step + steps of a sequence.
#pragma once

#include <cstdint>

#include "sparse_backend/params.h"

namespace sparse_backend {

using Stream = void*;  // a cudaStream_t

#ifdef __CUDACC__
#define SPARSE_BACKEND_BOTH __host__ __device__
#else
#define SPARSE_BACKEND_BOTH
#endif

SPARSE_BACKEND_BOTH constexpr int64_t words_of(int64_t columns) {
    return (columns + 31) / 32;
}

// Numbers of 16 bits as they lie in memory. Kernels widen them to float, in which alone they calculate.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// A weight laid out for events, its numbers those of the sums it goes into, or 16 bits beside sums in float.
enum class Storage { kOfSums, kHalf, kBFloat16 };
struct StoredWeight {
    const void* data = nullptr;  // [M, stride]
    int64_t stride = 0;
    Storage storage = Storage::kOfSums;
};

// A parameter of one entry or one per neuron.
template <typename T>
struct PerNeuron {
    const T* data = nullptr;
    int64_t stride = 0;  // 0: one entry for all
};

// ---- device ----

const char* take_error(int code);  // its text; the runtime forgets it, so that no later call is blamed for it
int is_capturing(Stream stream, bool& capturing);
int l2_bytes(int64_t& bytes);                                             // of the current device
int zero(void* data, int64_t bytes, Stream stream);                       // on the device
int copy(void* to, const void* from, int64_t bytes, Stream stream);       // on the device
int fetch(void* host, const void* device, int64_t bytes, Stream stream);  // waits: a host synchronisation

// ---- bits and events (events.cu) ----

// bits [rows, words] of the nonzero entries of dense [rows, columns]; `not_one` becomes 1 where one of them is not 1.
template <typename T>  // float, double, Half, BFloat16, uint8_t
int mark_nonzero(const T* dense, int64_t rows, int64_t columns, uint32_t* bits, int32_t* not_one, Stream stream);

// One list of events to be made of bits. Entries past `capacity` are counted, not written; no row reaches past it.
template <typename T>  // float, double, or uint16_t: values are copied as they are
struct Emission {
    const uint32_t* bits = nullptr;  // [rows, words]
    int64_t rows = 0;
    int64_t columns = 0;
    int64_t capacity = 0;
    int32_t* row_ptr = nullptr;           // [rows + 1]
    int32_t* indices = nullptr;           // [capacity]
    const T* from[2] = {};                // dense [rows, columns], read at the events ...
    T* to[2] = {};                        // ... into [capacity]
    const uint8_t* from_bytes = nullptr;  // in place of from[0]
    int32_t* sums = nullptr;              // [tiles_of(rows, columns)] scratch, filled by `count`
    const int64_t* before = nullptr;      // events before the first row
    int64_t* after = nullptr;             // those plus the events found here
};

constexpr int kLists = 3;
template <typename T>
struct Emissions {
    Emission<T> list[kLists];
};

constexpr int64_t kTileWords = 2048;
SPARSE_BACKEND_BOTH constexpr int64_t tiles_of(int64_t rows, int64_t columns) {
    return (rows * words_of(columns) + kTileWords - 1) / kTileWords;
}

template <typename T>
int count(const Emissions<T>& lists, int n_lists, Stream stream);
template <typename T>
int emit(const Emissions<T>& lists, int n_lists, Stream stream);
// Of lists whose room was fixed beforehand, after the last of their chunks: 0 in what is left of it. Where one is too
// short the kernel traps, and the device runs nothing more: a list without its end would pass for a result.
template <typename T>
int seal(const Emissions<T>& lists, int n_lists, Stream stream);
// Only `after`, where it must be known before there is a place to emit to.
template <typename T>
int totals(const Emissions<T>& lists, int n_lists, Stream stream);

// The other way: bits of a CSR structure, and for every word how many entries of the list lie before it.
struct Location {
    Rows rows;
    int64_t n_rows = 0;
    uint32_t* bits = nullptr;   // [n_rows, words]
    int32_t* offset = nullptr;  // [n_rows, words], null where nobody asks
};
struct Locations {
    Location list[kLists];
};
int locate(const Locations& lists, int n_lists, int64_t columns, Stream stream);

template <typename T>
int scatter(const Events<T>& events, int64_t rows, int64_t columns, T* dense, Stream stream);
// sum [rows_per_step, columns] over `steps` blocks of rows
template <typename T>
int sum_steps(const Events<T>& events, int64_t steps, int64_t rows_per_step, int64_t columns, T* sum, Stream stream);
// out[e - row_ptr[0]] = dense[row % dense_rows, index of e]
template <typename T>
int gather(const T* dense, int64_t dense_rows, int64_t columns, const Rows& rows, int64_t n_rows, T* out,
           Stream stream);

// ---- linear (linear.cu) ----

// to [columns, padded(rows)] = from^T, padding zero
template <typename T>  // float, double, or uint16_t for any 16 bits
int transpose(const T* from, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, T* to,
              Stream stream);

// current [rows, neurons] = bias + sum of weight rows, of rows first .. first + rows of the events
template <typename T>
int currents(const Events<T>& input, int64_t first, int64_t rows, const StoredWeight& weight, const T* bias,
             int64_t neurons, T* current, Stream stream);

// grad[e - row_ptr[0]] = weight row of entry e . delta of its row, of rows first .. first + rows. delta: [rows,
// neurons]
template <typename T>
int input_gradient(const T* delta, int64_t neurons, const StoredWeight& weight, const Rows& wanted, int64_t first,
                   int64_t rows, T* grad, Stream stream);

// Events by column: bits [columns, segments], segment s holds rows first + 32 s .. of it
SPARSE_BACKEND_BOTH constexpr int64_t segments_of(int64_t rows) {
    return (rows + 255) / 256 * 8;
}
int transpose_bits(const Rows& events, int64_t first, int64_t rows, int64_t columns, uint32_t* bits, Stream stream);

// sums[z, i] += sum of value x delta of the rows in which input i has an event, z-th part of the rows.
// sums: [parts, inputs, padded(neurons)]; delta: [rows, neurons]; bits of `transpose_bits`
template <typename T>
int weight_gradient(const Events<T>& input, const uint32_t* bits, int64_t first, int64_t rows, int64_t inputs,
                    const T* delta, int64_t neurons, T* sums, int64_t parts, Stream stream);

// grad [neurons, inputs] = sum over parts of sums[z, i, j], transposed
template <typename T>
int deliver_weight(const T* sums, int64_t parts, int64_t inputs, int64_t neurons, T* grad, Stream stream);

// to [blocks, columns] (+)= sums of from [rows, columns] over blocks of rows
template <typename T>
int sum_rows(const T* from, int64_t rows, int64_t columns, int64_t blocks, T* to, bool add, Stream stream);

// ---- the leaky neuron (leaky.cu) ----

template <typename T>
struct ForwardScan {
    int64_t steps, batch, neurons;
    const T* current;  // [steps, B, N]
    T* x;              // [steps, B, N], written at active entries alone; may be `current` itself
    T* p = nullptr;    // the same of dV/dbeta, where kept
    PerNeuron<T> beta, threshold;
    const T* mem_before = nullptr;  // [B, N], zeros if null
    T* mem;                         // [B, N]
    const T* p_before = nullptr;    // [B, N]
    T* p_after = nullptr;           // [B, N]
    T* mem_seq = nullptr;           // [steps, B, N]
    uint32_t* spikes;               // bits [steps * B, words]
    uint32_t* active;
    uint32_t* resets = nullptr;  // bits of the first `reset_steps` steps
    int64_t reset_steps = 0;
    T b_th;
    bool cover_spikes;
    int reset;
    bool reset_delay;
};
template <typename T>
int leaky_forward(const ForwardScan<T>& a, Stream stream);

// Sums per sample and neuron, [B, N] each or null: carried from chunk to chunk, as is dL/dV.
template <typename T>
struct BackwardScan {
    int64_t first_step, steps, batch, neurons;
    bool begins;                // this chunk holds the last step, nothing has been carried yet
    const T* grad_x = nullptr;  // [n_active], from the list's first entry on
    const T* grad_mem_last = nullptr;
    const T* grad_mem_seq = nullptr;  // [T, B, N]
    const T* x = nullptr;
    const T* g = nullptr;  // with `has_g`: null too where nothing is active
    bool has_g = false;    // the second reset's gradient runs through the surrogate
    const T* p = nullptr;
    const T* p_last = nullptr;
    const T* mem_seq = nullptr;
    const T* mem = nullptr;
    const uint32_t* active = nullptr;  // bits [T * B, words]
    const int32_t* active_offset = nullptr;
    const uint32_t* spikes = nullptr;  // null where no resets are needed
    const uint32_t* resets = nullptr;  // of step 0 alone with reset_delay
    PerNeuron<T> beta, threshold;
    int reset;
    bool reset_delay;
    T* delta;    // [steps, B, N]
    T* carried;  // [B, N]
    T* bias_sum = nullptr;
    T* beta_sum = nullptr;
    T* threshold_sum = nullptr;
};
template <typename T>
int leaky_backward(const BackwardScan<T>& a, Stream stream);

template <typename T>
struct DenseForwardScan {
    int64_t steps, batch, neurons;
    const T* current;
    PerNeuron<T> beta, threshold;
    const T* mem = nullptr;
    int reset;
    bool reset_delay;
    T* x;
    T* mem_last;
    T* mem_seq = nullptr;
};
template <typename T>
int leaky_dense_forward(const DenseForwardScan<T>& a, Stream stream);

template <typename T>
struct DenseBackwardScan {
    int64_t steps, batch, neurons;
    const T* grad_x = nullptr;
    const T* grad_mem_last = nullptr;
    const T* grad_mem_seq = nullptr;
    const T* x = nullptr;
    const T* g = nullptr;
    const T* mem_seq = nullptr;
    const T* mem = nullptr;
    PerNeuron<T> beta, threshold;
    int reset;
    bool reset_delay;
    T b_th;
    T* delta;
    T* grad_mem = nullptr;
    T* beta_sum = nullptr;  // [B, N]
    T* threshold_sum = nullptr;
};
template <typename T>
int leaky_dense_backward(const DenseBackwardScan<T>& a, Stream stream);

// ---- the two-state neuron (lif.cu) ----

template <typename T>
struct LifForwardScan {
    int64_t steps, batch, neurons;
    const T* current;  // [steps, B, N]; x may be the same
    PerNeuron<T> mem_gain;
    PerNeuron<T> syn_decay;  // none: no synaptic current
    PerNeuron<T> leak;       // none: nothing leaks
    PerNeuron<T> threshold, reset_to;
    const T* v_before = nullptr;  // [B, N], leak if null
    const T* i_before = nullptr;  // [B, N], zeros if null
    int reset;
    T b_th;
    bool dense;            // x at every entry, else at active ones alone
    bool discrete;         // snnTorch's equations: see LifForward in params.h
    T* x;                  // [steps, B, N]
    T* v;                  // [B, N]
    T* i = nullptr;        // [B, N], where there is a synaptic current: as handed out
    T* i_state = nullptr;  // [B, N], where there is one or recurrence: as it enters the next step; `i` or scratch
    T* v_seq = nullptr;    // [steps, B, N] where kept, as the rest
    T* i_seq = nullptr;
    T* drive = nullptr;
    T* inflow = nullptr;
    uint32_t* spikes = nullptr;  // bits [steps * B, words], null where nobody lists them
    uint32_t* active = nullptr;
    // recurrent layers alone
    Weight<T> recurrent;        // a row per presynaptic neuron
    uint32_t* fired = nullptr;  // bits [B, words] of the step before the chunk, then of its last
};
template <typename T>
int lif_forward(const LifForwardScan<T>& a, Stream stream);

// Sums per sample and neuron, [B, N] each or null: carried from chunk to chunk, as are dL/dv and dL/di.
template <typename T>
struct LifBackwardScan {
    int64_t first_step, steps, total_steps, batch, neurons;
    bool begins;
    const T* grad_x = nullptr;  // from the list's first entry on, as x and g; or [T, B, N] where dense
    const T* grad_v_last = nullptr;
    const T* grad_i_last = nullptr;
    const T* grad_v_seq = nullptr;
    const T* grad_i_seq = nullptr;
    const T* x = nullptr;
    const T* g = nullptr;
    bool has_g = false;
    const uint32_t* active = nullptr;  // bits [T * B, words], null where dense
    const int32_t* active_offset = nullptr;
    const uint32_t* spikes = nullptr;
    const T* drive = nullptr;
    const T* inflow = nullptr;
    const uint8_t* first_reset = nullptr;  // [B, N], discrete: what step 0 resets; null: where threshold < 0
    PerNeuron<T> mem_gain, syn_decay, threshold, reset_to;
    bool leaks;
    int reset;
    bool discrete;
    bool attached;  // gradients run through the spike in the reset
    T b_th;
    bool dense;
    T* delta;  // [steps, B, N]
    T* of_v;   // [B, N]
    T* of_i;
    T* bias_sum = nullptr;
    T* gain_sum = nullptr;
    T* decay_sum = nullptr;
    T* leak_sum = nullptr;
    T* threshold_sum = nullptr;
    T* reset_sum = nullptr;
    // recurrent layers alone
    Weight<T> recurrent;
    Rows active_rows;
    T* back = nullptr;  // [B, N] scratch
};
template <typename T>
int lif_backward(const LifBackwardScan<T>& a, Stream stream);

}  // namespace sparse_backend
