"""The leaky neuron over a sequence of dense currents, keeping only what its sparse backward needs.

The differentiable output is `x = V - threshold` at the active entries, a 1-D tensor; the caller applies the model's
own surrogate to it, so that the gradient arriving here is already epsilon * g (docs/design.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_backend.ops import keeping
from sparse_backend.ops._library import autograd, define, dynamic_size
from sparse_backend.reference import leaky as reference
from sparse_backend.reference.leaky import NONE, SUBTRACT, ZERO

__all__ = ["NONE", "SUBTRACT", "ZERO", "LeakyOutput", "call_leaky", "leaky", "leaky_backward"]


class LeakyOutput(NamedTuple):
    """What the forward of a leaky sequence returns. R = T * B rows, N neurons."""

    x: Tensor  #: [n_active] V - threshold at the active entries, before any second reset; differentiable
    mem_last: Tensor  #: [B, N] final membrane; differentiable
    mem_seq: Tensor  #: [T, B, N] all membranes where `keep_mem`, else [0]; differentiable
    spike_ptr: Tensor  #: [R + 1] int32
    spike_indices: Tensor  #: [n_spikes] int32
    active_ptr: Tensor  #: [R + 1] int32, or [0] where more than `max_active` of all entries are active: nothing is kept
    active_indices: Tensor  #: [n_active] int32
    reset_ptr: (
        Tensor  #: rows of r where `keep_reset`: t = 0 alone with reset_delay (later ones are the spikes), else all
    )
    reset_indices: Tensor
    p: Tensor  #: [n_active] dV/dbeta at the active entries where `keep_p`, else [0]
    p_last: Tensor  #: [B, N] dV/dbeta at the last step where `keep_p`, else [0]


def fake_output(like: Tensor, steps: int, batch: int, neurons: int, options: tuple[Any, ...]) -> LeakyOutput:
    """Shapes of the forward's outputs. options: the op's arguments from `reset` on."""
    _, reset_delay, _, _, keep_mem, keep_reset, keep_p, _ = options
    rows = steps * batch
    active, spikes = dynamic_size(), dynamic_size()

    def ints(size: Any) -> Tensor:
        return like.new_empty(size, dtype=torch.int32)

    return LeakyOutput(
        x=like.new_empty(active),
        mem_last=like.new_empty(batch, neurons),
        mem_seq=like.new_empty(steps, batch, neurons) if keep_mem else like.new_empty(0),
        spike_ptr=ints(rows + 1),
        spike_indices=ints(spikes),
        active_ptr=ints(rows + 1),
        active_indices=ints(active),
        reset_ptr=ints((batch if reset_delay else rows) + 1) if keep_reset else ints(0),
        reset_indices=ints(dynamic_size()) if keep_reset else ints(0),
        p=like.new_empty(active) if keep_p else like.new_empty(0),
        p_last=like.new_empty(batch, neurons) if keep_p else like.new_empty(0),
    )


def _fake(current: Tensor, beta: Any, threshold: Any, mem: Any, g: Any, *options: Any) -> LeakyOutput:
    steps, batch, neurons = current.shape
    return fake_output(current, steps, batch, neurons, options)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    beta, (steps, batch, neurons, _, _, *need) = args[15], args[17:]
    sizes = ((batch, neurons), (neurons,), (neurons,))
    return (
        beta.new_empty(steps, batch, neurons),
        *(beta.new_empty(size if needed else (0,)) for size, needed in zip(sizes, need, strict=True)),
    )


OPTIONS = (
    "int reset, bool reset_delay, float b_th, bool cover_spikes, bool keep_mem, bool keep_reset, bool keep_p,"
    " float max_active"
)
SAVED = (
    "Tensor? x, Tensor? g, Tensor? spike_ptr, Tensor? spike_indices, Tensor active_ptr, Tensor active_indices,"
    " Tensor? reset_ptr, Tensor? reset_indices, Tensor? p, Tensor? p_last, Tensor? mem_seq, Tensor? mem,"
    " Tensor beta, Tensor threshold"
)

#: current [T, B, N], beta and threshold [] or [N], mem [B, N] -> LeakyOutput
leaky = define(
    f"leaky(Tensor current, Tensor beta, Tensor threshold, Tensor? mem, Tensor? g, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.leaky,
    _fake,
)

#: -> delta [T, B, N] and the gradients of mem [B, N], beta [N], threshold [N], empty where not needed
leaky_backward = define(
    f"leaky_backward(Tensor? grad_x, Tensor? grad_mem_last, Tensor? grad_mem_seq, {SAVED}, int steps, int batch,"
    " int neurons, int reset, bool reset_delay, bool need_mem, bool need_beta, bool need_threshold)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.leaky_backward,
    _backward_fake,
)


def saved_for_backward(
    out: LeakyOutput,
    beta: Tensor,
    threshold: Tensor,
    mem: Tensor | None,
    g: Tensor | None,
    reset: int,
    reset_delay: bool,
    need_beta: bool,
    need_threshold: bool,
) -> tuple[Tensor | None, ...]:
    """The tensors of `SAVED`, and no more than this layer's backward reads."""
    keeping.made(
        out.mem_last.shape[-1],
        (out.spike_ptr, out.spike_indices),
        (out.active_ptr, out.active_indices),
        (out.reset_ptr, out.reset_indices),
    )
    double_reset = not reset_delay and reset != NONE
    need_reset = reset == ZERO or double_reset or (need_threshold and reset == SUBTRACT)
    keep_p = out.p_last.dim() == 2
    need_mem = need_beta and not keep_p
    return (
        out.x if double_reset and reset == ZERO else None,
        g,
        out.spike_ptr if need_reset else None,
        out.spike_indices if need_reset else None,
        out.active_ptr,
        out.active_indices,
        out.reset_ptr if need_reset else None,
        out.reset_indices if need_reset else None,
        out.p if keep_p else None,
        out.p_last if keep_p else None,
        out.mem_seq if need_mem and out.mem_seq.dim() == 3 else None,
        mem if need_mem else None,
        beta,
        threshold,
    )


def like_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """A per-neuron gradient [N] in the shape of its parameter, [] or [1] or [N]."""
    return grad.view_as(parameter) if parameter.numel() == grad.numel() else grad.sum().view_as(parameter)


def reaches_threshold(grad_x: Tensor | None, reset: int, reset_delay: bool) -> bool:
    """Whether gradients have a way to the threshold: through spikes, or a reset that depends on it. Where they have
    none its gradient is absent, as in torch, and an optimiser leaves it alone."""
    return grad_x is not None or reset == SUBTRACT or (reset == ZERO and not reset_delay)


def mark_non_differentiable(ctx: Any, out: LeakyOutput) -> None:
    ctx.mark_non_differentiable(*(out[3:] if out.mem_seq.dim() == 3 else out[2:]))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    current, beta, threshold, mem, g, reset, reset_delay, *_ = inputs
    out = LeakyOutput(*output)
    mark_non_differentiable(ctx, out)
    _, need_beta, need_threshold, need_mem, *_ = ctx.needs
    keeping.save(ctx, *saved_for_backward(out, beta, threshold, mem, g, reset, reset_delay, need_beta, need_threshold))
    ctx.sizes = (*current.shape, reset, reset_delay, mem is not None and need_mem, need_beta, need_threshold)


def _backward(ctx: Any, grad_x: Any, grad_mem_last: Any, grad_mem_seq: Any, *_: Any) -> tuple[Tensor | None, ...]:
    saved = keeping.saved(ctx)
    beta, threshold = saved[-2:]
    reset, reset_delay, need_mem, need_beta, need_threshold = ctx.sizes[-5:]
    reached = need_threshold and reaches_threshold(grad_x, reset, reset_delay)
    delta, grad_mem, grad_beta, grad_threshold = leaky_backward(grad_x, grad_mem_last, grad_mem_seq, *saved, *ctx.sizes)
    return (
        delta,
        like_parameter(grad_beta, beta) if need_beta else None,
        like_parameter(grad_threshold, threshold) if reached else None,
        grad_mem if need_mem else None,
        *(None,) * 9,
    )


call_leaky = autograd(leaky, _setup, _backward, learns=(0, 1, 2, 3), outputs=3)
