"""The leaky neuron over a sequence in plain PyTorch: the specification of `ops/leaky.py`.

Equations: docs/design.md, "One layer of snnTorch". Everything is dense here and compressed at the end; the kernels
never make the dense tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_backend.reference.events import compress, gather, scatter

SUBTRACT, ZERO, NONE = 0, 1, 2


def leaky(
    current: Tensor,  # [T, B, N]
    beta: Tensor,  # [] or [N]
    threshold: Tensor,  # [] or [N]
    mem: Tensor | None,  # [B, N], zeros if None
    g: Tensor | None,  # surrogate derivative at the active entries; only its backward needs it
    reset: int,
    reset_delay: bool,
    b_th: float,
    cover_spikes: bool,
    keep_mem: bool,
    keep_reset: bool,
    keep_p: bool,
    max_active: float,
) -> tuple[Tensor, ...]:
    """Returns x, mem_last, mem_seq, spike_ptr, spike_indices, active_ptr, active_indices, reset_ptr, reset_indices,
    p, p_last; what was not asked for is empty. See `ops.leaky.LeakyOutput`."""
    steps, batch, neurons = current.shape
    v = current.new_zeros(batch, neurons) if mem is None else mem
    p = torch.zeros_like(v)
    xs, mems, resets, ps = [], [], [], []
    for t in range(steps):
        r = (v > threshold).to(v.dtype)
        kept = (1 - r) * v if reset == ZERO else v
        p = beta * ((1 - r) * p if reset == ZERO else p) + kept  # dV[t]/dbeta, resets detached
        v = beta * kept + current[t]
        if reset == SUBTRACT:
            v = v - r * threshold
        x = v - threshold
        if not reset_delay and reset != NONE:
            d = (x > 0).to(v.dtype) - r
            v = v - d * (threshold if reset == SUBTRACT else v)
        xs.append(x)
        mems.append(v)
        resets.append(r)
        ps.append(p)

    def flat(sequence: list[Tensor]) -> Tensor:
        return torch.stack(sequence).reshape(steps * batch, neurons) if sequence else current.new_zeros(0, neurons)

    x = flat(xs)
    spike_ptr, spike_indices = compress(x > 0)
    outside = x.abs() >= b_th
    active_ptr, active_indices = compress(~outside | (x > 0) if cover_spikes else ~outside)

    def empty(dtype: torch.dtype) -> Tensor:
        return current.new_empty(0, dtype=dtype)

    if active_indices.numel() > max_active * x.numel():
        return tuple(empty(current.dtype if i in (0, 1, 2, 9, 10) else torch.int32) for i in range(11))
    reset_ptr, reset_indices = empty(torch.int32), empty(torch.int32)
    if keep_reset:
        rows = flat(resets)[: batch if reset_delay else None]
        reset_ptr, reset_indices = compress(rows > 0)
    return (
        gather(x, active_ptr, active_indices),
        v.clone(),
        flat(mems).view_as(current) if keep_mem else empty(current.dtype),
        spike_ptr,
        spike_indices,
        active_ptr,
        active_indices,
        reset_ptr,
        reset_indices,
        gather(flat(ps), active_ptr, active_indices) if keep_p else empty(current.dtype),
        p.clone() if keep_p else empty(current.dtype),
    )


def leaky_backward(
    grad_x: Tensor | None,  # [n_active]: epsilon * g
    grad_mem_last: Tensor | None,  # [B, N]
    grad_mem_seq: Tensor | None,  # [T, B, N]
    x: Tensor | None,
    g: Tensor | None,
    spike_ptr: Tensor | None,
    spike_indices: Tensor | None,
    active_ptr: Tensor,
    active_indices: Tensor,
    reset_ptr: Tensor | None,
    reset_indices: Tensor | None,
    p: Tensor | None,
    p_last: Tensor | None,
    mem_seq: Tensor | None,
    mem: Tensor | None,
    beta: Tensor,
    threshold: Tensor,
    steps: int,
    batch: int,
    neurons: int,
    reset: int,
    reset_delay: bool,
    need_mem: bool,
    need_beta: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns delta [T, B, N], and the gradients of mem [B, N], beta [N], threshold [N] (empty where not needed)."""
    shape = (steps, batch, neurons)

    def dense(ptr: Tensor | None, indices: Tensor | None, values: Tensor | None = None, steps: int = steps) -> Tensor:
        if ptr is None or indices is None:
            return beta.new_zeros(shape)
        return scatter(ptr, indices, values, neurons, beta.dtype).view(steps, batch, neurons)

    spikes = dense(spike_ptr, spike_indices)
    resets = dense(reset_ptr, reset_indices, steps=min(steps, 1) if reset_delay else steps)
    if reset_delay and spike_ptr is not None and reset_ptr is not None and steps:
        resets = torch.cat([resets, spikes[:-1]])
    grad_x = dense(active_ptr, active_indices, grad_x) if grad_x is not None else beta.new_zeros(shape)
    g = dense(active_ptr, active_indices, g) if g is not None else None
    x = dense(active_ptr, active_indices, x) if x is not None else None
    delta, grad_mem, grad_threshold = adjoint(
        grad_x, grad_mem_last, grad_mem_seq, x, g, spikes, resets, beta, threshold, reset, reset_delay
    )
    grad_beta = beta.new_zeros(neurons)
    if need_beta and p is None:
        grad_beta = beta_from_membrane(delta, mem, mem_seq, resets, reset)
    elif need_beta:  # sum of eps g p over the active entries, p = dV/dbeta
        grad_beta = (grad_x * dense(active_ptr, active_indices, p)).sum((0, 1))
        if grad_mem_last is not None and p_last is not None:
            grad_beta = grad_beta + (grad_mem_last * p_last).sum(0)
    none = beta.new_zeros(0)
    return (
        delta,
        grad_mem if need_mem else none,
        grad_beta if need_beta else none,
        grad_threshold if need_threshold else none,
    )


def adjoint(
    grad_x: Tensor,  # [T, B, N]: epsilon * g where active, else 0
    grad_mem_last: Tensor | None,
    grad_mem_seq: Tensor | None,
    x: Tensor | None,  # [T, B, N] where active, else 0; needed by the second reset alone, as is g
    g: Tensor | None,
    spikes: Tensor,  # [T, B, N] of 0 and 1
    resets: Tensor,  # [T, B, N] r
    beta: Tensor,
    threshold: Tensor,
    reset: int,
    reset_delay: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse recursion: delta [T, B, N], gradients of the initial membrane [B, N] and the threshold [N]."""
    steps, batch, neurons = grad_x.shape
    double_reset = not reset_delay and reset != NONE
    delta = torch.zeros_like(grad_x)
    carried = grad_x.new_zeros(batch, neurons) if grad_mem_last is None else grad_mem_last  # dL/dV[t] from t + 1 on
    grad_threshold = grad_x.new_zeros(neurons)
    for t in reversed(range(steps)):
        lam = carried if grad_mem_seq is None else carried + grad_mem_seq[t]
        through_spike, past_reset = grad_x[t], lam
        if double_reset and g is not None:
            d = spikes[t] - resets[t]
            if reset == SUBTRACT:
                through_spike = through_spike - lam * threshold * g[t]
                grad_threshold -= (lam * d).sum(0)
            else:
                assert x is not None
                through_spike = through_spike - lam * (x[t] + threshold) * g[t]
                past_reset = lam * (1 - d)
        delta[t] = through_spike + past_reset
        grad_threshold -= through_spike.sum(0)
        if reset == SUBTRACT:
            grad_threshold -= (resets[t] * delta[t]).sum(0)
        carried = beta * delta[t] * (1 - resets[t]) if reset == ZERO else beta * delta[t]
    return delta, carried, grad_threshold


def beta_from_membrane(delta: Tensor, mem: Tensor | None, mem_seq: Tensor | None, resets: Tensor, reset: int) -> Tensor:
    """Gradient of beta [N] = sum of delta[t] V[t-1], V as kept: mem [B, N], then mem_seq [T, B, N] but its last."""
    steps, batch, neurons = delta.shape
    before = delta.new_zeros(1, batch, neurons) if mem is None else mem.view(1, batch, neurons)
    if steps > 1:
        assert mem_seq is not None
        before = torch.cat([before, mem_seq[:-1]])
    return (delta * before[:steps] * (1 - resets if reset == ZERO else 1)).sum((0, 1))


def leaky_dense(
    current: Tensor,
    beta: Tensor,
    threshold: Tensor,
    mem: Tensor | None,
    g: Tensor | None,  # [T, B, N]
    reset: int,
    reset_delay: bool,
    b_th: float,  # for the backward alone
    keep_mem: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x [T, B, N], mem_last [B, N], mem_seq [T, B, N] where kept, else [0]."""
    out = leaky(
        current, beta, threshold, mem, None, reset, reset_delay, float("nan"), False, keep_mem, False, False, 1.0
    )
    return out[0].view(current.shape), out[1], out[2]


def leaky_dense_backward(
    grad_x: Tensor | None,  # [T, B, N]
    grad_mem_last: Tensor | None,
    grad_mem_seq: Tensor | None,
    x: Tensor | None,  # [T, B, N]
    g: Tensor | None,
    mem_seq: Tensor | None,
    mem: Tensor | None,
    beta: Tensor,
    threshold: Tensor,
    steps: int,
    batch: int,
    neurons: int,
    reset: int,
    reset_delay: bool,
    b_th: float,
    need_mem: bool,
    need_beta: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `leaky_backward`. x is given where resets or beta's gradient need it, or b_th is finite."""
    shape = (steps, batch, neurons)
    if grad_x is not None and x is not None:
        grad_x = torch.where(x.abs() >= b_th, 0, grad_x)
    spikes = resets = beta.new_zeros(shape)
    if x is not None and steps:
        spikes = (x > 0).to(beta.dtype)
        if mem_seq is None:
            mem_seq = x + threshold
        first = beta.new_zeros(1, batch, neurons) if mem is None else mem.view(1, batch, neurons)
        resets = (torch.cat([first, mem_seq[:-1]]) > threshold).to(beta.dtype)
    delta, grad_mem, grad_threshold = adjoint(
        beta.new_zeros(shape) if grad_x is None else grad_x,
        grad_mem_last, grad_mem_seq, x, g, spikes, resets, beta, threshold, reset, reset_delay,
    )  # fmt: skip
    none = beta.new_zeros(0)
    return (
        delta,
        grad_mem if need_mem else none,
        beta_from_membrane(delta, mem, mem_seq, resets, reset) if need_beta else none,
        grad_threshold if need_threshold else none,
    )
