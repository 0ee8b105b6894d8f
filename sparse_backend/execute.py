"""Runs a neuron over a sequence: picks sparse or dense, calls the op, applies the model's own surrogate.

Everything above (functional API, adapters) comes through `run_leaky`; everything below is an op.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_backend import _native, surrogate
from sparse_backend.deferred import DeferredCurrent
from sparse_backend.dynamics import Leaky
from sparse_backend.events import EventTensor
from sparse_backend.ops import keeping
from sparse_backend.ops.events import events_to_dense
from sparse_backend.ops.leaky import NONE, SUBTRACT, ZERO, LeakyOutput, call_leaky, leaky
from sparse_backend.ops.leaky_dense import call_leaky_dense, leaky_dense
from sparse_backend.ops.linear_leaky import call_linear_leaky
from sparse_backend.tensorlike import shaped


class Result(NamedTuple):
    """One layer over one sequence. Fractions are of all T * B * N entries."""

    spikes: EventTensor | Tensor  #: shape of the current; a plain tensor in the dense regime
    mem_last: Tensor  #: [B, N]
    mem_seq: Tensor | None  #: [T, B, N] where asked for
    n_active: int | None  #: None where nobody has counted
    n_spikes: int | None
    kept: int  #: bytes this layer keeps for the backward pass: see `reporting.py`
    x: Tensor | None = None  #: [T, B, N] V - threshold in the dense regime, None in the sparse one


def run_leaky(
    current: Tensor | DeferredCurrent,  # T * B rows of N, of any shape
    shape: tuple[int, int, int],  # (T, B, N)
    neuron: Leaky,
    mem: Tensor | None,  # [B, N]
    spike_grad: surrogate.SpikeGrad,
    b_th: float,
    *,
    keep_mem: bool = False,
    max_active: float = 1.0,
    dense: bool = False,
) -> Result:
    """Run `neuron`; its spikes have the shape of `current`.

    Dense regime if `dense`, if b_th is infinite, or if more than `max_active` of all entries are active.
    """
    _native.load()
    if not (dense or math.isinf(b_th)):
        result = _run_sparse(current, shape, neuron, mem, spike_grad, b_th, keep_mem, max_active)
        if result is not None:
            return result
    return _run_dense(current, shape, neuron, mem, spike_grad, b_th, keep_mem)


def _run_sparse(
    current: Tensor | DeferredCurrent,
    shape: tuple[int, int, int],
    neuron: Leaky,
    mem: Tensor | None,
    spike_grad: surrogate.SpikeGrad,
    b_th: float,
    keep_mem: bool,
    max_active: float,
) -> Result | None:
    beta, threshold, reset, reset_delay, graded = neuron
    steps, batch, neurons = shape
    recording = torch.is_grad_enabled()
    beta_learns = recording and beta.requires_grad
    threshold_learns = recording and threshold.requires_grad
    double_reset = not reset_delay and reset != NONE
    cover_spikes = _learns(graded)
    options = (
        reset,
        reset_delay,
        b_th,
        cover_spikes,
        keep_mem or (beta_learns and double_reset and steps > 1),
        reset == ZERO or double_reset or (threshold_learns and reset == SUBTRACT),
        beta_learns and steps > 1 and not keep_mem and not double_reset,
        max_active,
    )

    def arguments(g: Tensor | None) -> tuple[Any, ...]:
        neuron_arguments = beta, threshold, mem, g
        if type(current) is DeferredCurrent:
            events, hub = current.events, current.hub
            hub.check_unchanged()
            return (
                events.row_ptr, events.indices, events.values, events.handle, events.active_ptr, events.active_indices,
                hub.weight, hub.bias, *neuron_arguments, hub.token, hub.id, steps, batch, *options,
            )  # fmt: skip
        return sequence, *neuron_arguments, *options

    call = call_linear_leaky
    if type(current) is not DeferredCurrent:
        call, sequence = call_leaky, current.reshape(shape)
    if double_reset and recording:
        # The reset's gradient runs through the surrogate inside the recursion, so the backward must be given g.
        out = LeakyOutput(*call.plain(*arguments(None)))
        g = surrogate.derivative(spike_grad, out.x)
        out = LeakyOutput(*call.attach(arguments(torch.where(out.x.abs() < b_th, g, 0) if cover_spikes else g), out))
    else:
        out = LeakyOutput(*call(*arguments(None)))
    if out.active_ptr.numel() == 0:
        return None
    learns = out.x.requires_grad
    handle, dtype, values = None, None, None
    if learns or graded is not None:
        handle, values = _spiking(out, spike_grad, graded, b_th)
    else:
        dtype = surrogate.spike_dtype(spike_grad, out.x)
    spikes = EventTensor(
        current.shape,
        out.spike_ptr,
        out.spike_indices,
        values,
        handle=handle,
        active_ptr=out.active_ptr,
        active_indices=out.active_indices,
        dtype=dtype,
        columns=neurons,
        check=False,
    )
    kept = 0
    if learns:
        kept = _kept(out, neurons, double_reset)
        if beta_learns and out.p_last.dim() != 2:  # from the membranes
            kept += sum([part.numel() for part in (out.mem_seq, mem) if part is not None]) * out.x.element_size()
    n_active, n_spikes = out.active_indices.shape[0], out.spike_indices.shape[0]
    return Result(spikes, out.mem_last, out.mem_seq if keep_mem else None, n_active, n_spikes, kept)


def _learns(graded: Tensor | None) -> bool:
    """Whether spikes outside the band join the active entries: a factor of the spikes learns from all of them."""
    return graded is not None and torch.is_grad_enabled() and graded.requires_grad


def _spiking(
    out: LeakyOutput, spike_grad: surrogate.SpikeGrad, graded: Tensor | None, b_th: float
) -> tuple[Tensor, Tensor | None]:
    """Through which gradients reach the active entries, and what the spikes are worth if not 1."""
    handle = spike_grad(out.x)
    if graded is None:
        return handle, None
    if _learns(graded):
        handle = torch.where(out.x.detach().abs() < b_th, handle, handle.detach())
    handle = handle * graded
    return handle, graded.detach().to(handle.dtype).repeat(out.spike_indices.shape)  # a copy: the factor learns


def _kept(out: LeakyOutput, neurons: int, double_reset: bool) -> int:
    """Bytes of these outputs that wait for the backward."""
    lists = (
        (out.active_ptr, out.active_indices),
        (out.spike_ptr, out.spike_indices),
        (out.reset_ptr, out.reset_indices),
    )
    numbers = out.x.numel() * (2 if double_reset else 1) + out.p.numel() + out.p_last.numel()
    return keeping.bytes_of(neurons, *lists) + numbers * out.x.element_size()


def _run_dense(
    current: Tensor | DeferredCurrent,
    shape: tuple[int, int, int],
    neuron: Leaky,
    mem: Tensor | None,
    spike_grad: surrogate.SpikeGrad,
    b_th: float,
    keep_mem: bool,
) -> Result:
    beta, threshold, reset, reset_delay, graded = neuron
    tensor = (current.to_dense() if type(current) is DeferredCurrent else current).reshape(shape)
    reset_delay = reset_delay or reset == NONE
    keeps = keep_mem or not reset_delay
    learns = torch.is_grad_enabled() and torch._C._any_requires_grad(tensor, beta, threshold, mem)
    options = (reset, reset_delay)
    if shape[0] == 1 and reset_delay:  # of one step the surrogate's intermediate results are in cache anyway
        x, mem_last, mem_seq = call_leaky_dense(tensor, beta, threshold, mem, None, *options, b_th, keeps)
        spikes, kept = spike_grad(x), 2
    else:
        out = call_leaky_dense.plain(tensor, beta, threshold, mem, None, *options, b_th, keeps)
        g, kept = None, 2
        if learns:
            g = surrogate.derivative_in_pieces(spike_grad, out[0], b_th)  # the band is in it
            of_reset = None if reset_delay else g
            out = call_leaky_dense.attach((tensor, beta, threshold, mem, of_reset, *options, math.inf, keeps), out)
            kept += not reset_delay or reset == ZERO or beta.requires_grad or threshold.requires_grad
        x, mem_last, mem_seq = out
        spikes = surrogate.spikes(spike_grad, x, g)
    if graded is not None:
        spikes = spikes * graded
    spikes = shaped(spikes, current.shape)
    kept = kept * x.numel() * x.element_size() if x.requires_grad else 0
    if kept and mem_seq.dim() == 3 and not keep_mem:
        kept += mem_seq.numel() * x.element_size()
    n_active = x.numel() if math.isinf(b_th) else None
    return Result(spikes, mem_last, mem_seq if keep_mem else None, n_active, None, kept, x)


def can_trace(neuron: Leaky) -> bool:
    """Whether `run_leaky_traced` serves this neuron now: a second reset's gradient needs g inside the op."""
    return neuron.reset_delay or neuron.reset == NONE or not torch.is_grad_enabled()


def run_leaky_traced(
    current: Tensor,  # [B, N]
    neuron: Leaky,
    mem: Tensor | None,  # [B, N]
    spike_grad: surrogate.SpikeGrad,
    b_th: float,
) -> tuple[Tensor, Tensor]:
    """One step for torch.compile, in plain tensors: spikes [B, N], mem [B, N]."""
    beta, threshold, reset, reset_delay, graded = neuron
    sequence = current.unsqueeze(0)
    if math.isinf(b_th):
        x, mem_last, _ = leaky_dense(
            sequence, beta, threshold, mem, None, reset, reset_delay or reset == NONE, b_th, False
        )
        spikes = spike_grad(x.squeeze(0))
        return spikes if graded is None else spikes * graded, mem_last
    threshold_learns = torch.is_grad_enabled() and threshold.requires_grad
    keep_reset = reset == ZERO or not reset_delay or (threshold_learns and reset == SUBTRACT)
    out = LeakyOutput(*leaky(
        sequence, beta, threshold, mem, None, reset, reset_delay, b_th, _learns(graded), False, keep_reset, False, 1.0
    ))  # fmt: skip
    handle, values = _spiking(out, spike_grad, graded, b_th)
    spikes = events_to_dense(
        handle, out.spike_ptr, out.spike_indices, values, out.active_ptr, out.active_indices, current.shape[1]
    )
    return spikes, out.mem_last
