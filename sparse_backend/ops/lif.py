"""The two-state neuron (membrane v, synaptic current i) over a sequence of dense currents: Norse's LIF.

As in `leaky`, the differentiable output is `x = u - threshold`, u the membrane before the reset, and the caller applies
the model's own surrogate to it: at the active entries alone, a 1-D tensor, or everywhere where `dense`. A reset through
which gradients flow, and recurrence, need the surrogate's derivative g inside the op: run it (`call_lif.plain`),
evaluate g at x, and attach the backward with g among the arguments (`call_lif.attach`).

A leaky integrator is the dense form with threshold 0 and no reset: there x is v. Where `discrete` is set, the equations
are those of snnTorch's neurons: see the twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_backend.ops import keeping
from sparse_backend.ops._library import autograd, define, dynamic_size
from sparse_backend.reference import lif as reference
from sparse_backend.reference.leaky import NONE, SUBTRACT, ZERO
from sparse_backend.reference.lif import NEEDS, VALUE

__all__ = ["NEEDS", "NONE", "SUBTRACT", "VALUE", "ZERO", "LIFOutput", "call_lif", "lif", "lif_backward"]


class LIFOutput(NamedTuple):
    """What the forward of a sequence returns. R = T * B rows, N neurons; what was not asked for is [0]."""

    x: Tensor  #: [n_active] u - threshold at the active entries, or [T, B, N] where `dense`; differentiable
    v_last: Tensor  #: [B, N] membrane after the last step; differentiable, as are the next three
    i_last: Tensor  #: [B, N] synaptic current after the last step, where there is one
    v_seq: Tensor  #: [T, B, N] where `keep_states`
    i_seq: Tensor  #: [T, B, N] where `keep_states` and there is a synaptic current
    spike_ptr: Tensor  #: [R + 1] int32; [0] where `dense`, unless there are recurrent weights
    spike_indices: Tensor  #: [n_spikes] int32
    active_ptr: Tensor  #: [R + 1] int32; [0] where `dense` or more than `max_active` of all are active: nothing is kept
    active_indices: Tensor  #: [n_active] int32
    drive: Tensor  #: [T, B, N] what mem_gain multiplies, where `keep_drive`: its gradient
    inflow: Tensor  #: [T, B, N] i + current, where `keep_inflow`: syn_decay's gradient


#: how many outputs are differentiable, the first ones
LEARNING_OUTPUTS = 5


def fake_output(like: Tensor, steps: int, batch: int, neurons: int, arguments: tuple[Any, ...]) -> LIFOutput:
    """Shapes of the forward's outputs. arguments: the op's from `mem_gain` on."""
    neuron, (keep_states, keep_drive, keep_inflow, _) = Neuron(*arguments[:14]), arguments[14:]
    dense, synaptic = neuron.dense, neuron.syn_decay is not None
    lists = not dense or neuron.recurrent is not None
    rows, sequence = steps * batch, (steps, batch, neurons)
    active = 0 if dense else dynamic_size()

    def floats(wanted: bool, *size: Any) -> Tensor:
        return like.new_empty(size if wanted else (0,))

    def ints(wanted: bool, size: Any) -> Tensor:
        return like.new_empty(size if wanted else 0, dtype=torch.int32)

    return LIFOutput(
        x=like.new_empty(sequence if dense else active),
        v_last=floats(True, batch, neurons),
        i_last=floats(synaptic, batch, neurons),
        v_seq=floats(keep_states, *sequence),
        i_seq=floats(keep_states and synaptic, *sequence),
        spike_ptr=ints(lists, rows + 1),
        spike_indices=ints(lists, dynamic_size() if lists else 0),
        active_ptr=ints(not dense, rows + 1),
        active_indices=ints(not dense, active),
        drive=floats(keep_drive, *sequence),
        inflow=floats(keep_inflow, *sequence),
    )


def fake_neuron_grads(like: Tensor, batch: int, neurons: int, needs: int) -> tuple[Tensor, ...]:
    """Shapes of the gradients of `NEEDS`."""
    sizes = {"v": (batch, neurons), "i": (batch, neurons), "recurrent": (neurons, neurons)}
    return tuple(
        like.new_empty(sizes.get(name, (neurons,)) if needs >> k & 1 else (0,)) for k, name in enumerate(NEEDS)
    )


def _fake(current: Tensor, *arguments: Any) -> LIFOutput:
    steps, batch, neurons = current.shape
    return fake_output(current, steps, batch, neurons, arguments)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    mem_gain, (steps, batch, neurons), needs = args[14], args[19:22], args[-1]
    return mem_gain.new_empty(steps, batch, neurons), *fake_neuron_grads(mem_gain, batch, neurons, needs)


NEURON = (
    "Tensor mem_gain, Tensor? syn_decay, Tensor? leak, Tensor threshold, Tensor reset_to, Tensor? v, Tensor? i,"
    " Tensor? recurrent, Tensor? g"
)
RESET = "int reset, bool discrete, bool detached, float b_th, bool dense"
OPTIONS = f"{RESET}, bool keep_states, bool keep_drive, bool keep_inflow, float max_active"
GRADS = "Tensor? grad_x, Tensor? grad_v_last, Tensor? grad_i_last, Tensor? grad_v_seq, Tensor? grad_i_seq"
SAVED = (
    "Tensor? x, Tensor? g, Tensor? spike_ptr, Tensor? spike_indices, Tensor? active_ptr, Tensor? active_indices,"
    " Tensor? drive, Tensor? inflow, Tensor? first_reset, Tensor mem_gain, Tensor? syn_decay, Tensor threshold,"
    " Tensor reset_to, Tensor? recurrent"
)
RETURNS = f"({', '.join(['Tensor'] * len(LIFOutput._fields))})"

#: current [T, B, N], coefficients [] or [N], v and i [B, N], recurrent [N, N] -> LIFOutput
lif = define(f"lif(Tensor current, {NEURON}, {OPTIONS}) -> {RETURNS}", reference.lif, _fake)

#: -> delta [T, B, N] and the gradients of `NEEDS`, empty where not needed
lif_backward = define(
    f"lif_backward({GRADS}, {SAVED}, int steps, int batch, int neurons, bool leaks, {RESET}, int needs)"
    f" -> ({', '.join(['Tensor'] * (1 + len(NEEDS)))})",
    reference.lif_backward,
    _backward_fake,
)


class Neuron(NamedTuple):
    """The arguments of a forward from `mem_gain` on."""

    mem_gain: Tensor
    syn_decay: Tensor | None
    leak: Tensor | None
    threshold: Tensor
    reset_to: Tensor
    v: Tensor | None
    i: Tensor | None
    recurrent: Tensor | None
    g: Tensor | None
    reset: int
    discrete: bool
    detached: bool
    b_th: float
    dense: bool


#: where each of `NEEDS` stands in `Neuron`
POSITIONS = tuple(Neuron._fields.index(name) for name in NEEDS)


def needs_of(neuron: Neuron, asked: tuple[bool, ...]) -> int:
    """`needs` of a backward. asked: for each field of `Neuron`, whether autograd wants its gradient."""
    return sum(1 << k for k, at in enumerate(POSITIONS) if neuron[at] is not None and asked[at])


def needs_name(needs: int, name: str) -> bool:
    return bool(needs >> NEEDS.index(name) & 1)


def saved_for_backward(out: LIFOutput, neuron: Neuron, needs: int) -> tuple[Tensor | None, ...]:
    """The tensors of `SAVED`, and no more than this backward reads."""
    keeping.made(out.v_last.shape[-1], (out.spike_ptr, out.spike_indices), (out.active_ptr, out.active_indices))
    reset, dense, recurrent = neuron.reset, neuron.dense, neuron.recurrent
    jumps = reset in (VALUE, ZERO) or (reset == SUBTRACT and needs_name(needs, "threshold"))
    attached = not (neuron.detached or neuron.discrete or reset == NONE)
    need_x = jumps or neuron.b_th != math.inf if dense else attached and reset == VALUE
    lists = needs_name(needs, "recurrent") or (jumps and not dense)
    return (
        out.x if need_x else None,
        neuron.g if attached or recurrent is not None else None,
        out.spike_ptr if lists else None,
        out.spike_indices if lists else None,
        None if dense else out.active_ptr,
        None if dense else out.active_indices,
        out.drive if needs_name(needs, "mem_gain") else None,
        out.inflow if needs_name(needs, "syn_decay") else None,
        first_reset(neuron) if jumps and neuron.discrete else None,
        neuron.mem_gain,
        neuron.syn_decay,
        neuron.threshold,
        neuron.reset_to,
        recurrent,
    )


def first_reset(neuron: Neuron) -> Tensor | None:
    """[B, N] uint8: which neurons the first step resets, because of the membrane they begin with; None where that is
    zero everywhere."""
    return None if neuron.v is None else (neuron.v - neuron.threshold > 0).view(torch.uint8)


def sizes_of(shape: Any, neuron: Neuron, needs: int) -> tuple[Any, ...]:
    """The arguments of a backward from `steps` on. shape: (T, B, N)."""
    options = neuron.reset, neuron.discrete, neuron.detached, neuron.b_th, neuron.dense
    return *shape, neuron.leak is not None, *options, needs


def shapes_of(neuron: Neuron) -> tuple[torch.Size | None, ...]:
    return tuple(part.shape if isinstance(part, Tensor) else None for part in neuron)


def neuron_grads(ctx: Any, came: Sequence[Tensor | None], grads: Any) -> list[Tensor | None]:
    """The gradients of `NEEDS` in the order of `Neuron`'s fields and in their shapes, None where not needed.

    That of the threshold is None too where gradients have no way to it, as in torch: neither through spikes nor through
    a reset that depends on it. came: the gradients of the outputs.
    """
    shapes: tuple[torch.Size | None, ...] = ctx.shapes
    _, _, _, _, reset, _, detached, *_, needs = ctx.sizes
    grad_x, grad_v_last, _, grad_v_seq, *_ = came
    by_reset = reset == SUBTRACT or (reset == VALUE and not detached)
    by_reset = by_reset and (grad_v_last is not None or grad_v_seq is not None)
    reached = grad_x is not None or by_reset or shapes[Neuron._fields.index("recurrent")] is not None
    out: list[Tensor | None] = [None] * len(Neuron._fields)
    for k, (at, grad) in enumerate(zip(POSITIONS, grads, strict=True)):
        if needs >> k & 1 and (reached or NEEDS[k] != "threshold"):
            shape: Any = shapes[at]
            out[at] = grad.view(shape) if shape.numel() == grad.numel() else grad.sum().view(shape)
    return out


def mark_non_differentiable(ctx: Any, out: LIFOutput) -> None:
    """Those of the first `LEARNING_OUTPUTS` that were not asked for."""
    ctx.mark_non_differentiable(*(part for part in out[1:LEARNING_OUTPUTS] if part.dim() == 1), *out[LEARNING_OUTPUTS:])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    current, neuron = inputs[0], Neuron(*inputs[1:15])
    out = LIFOutput(*output)
    mark_non_differentiable(ctx, out)
    needs = needs_of(neuron, ctx.needs[1:])
    keeping.save(ctx, *saved_for_backward(out, neuron, needs))
    ctx.shapes = shapes_of(neuron)
    ctx.sizes = sizes_of(current.shape, neuron, needs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    delta, *of_neuron = lif_backward(*grads[:LEARNING_OUTPUTS], *keeping.saved(ctx), *ctx.sizes)
    return delta, *neuron_grads(ctx, grads, of_neuron), *(None,) * 4


call_lif = autograd(lif, _setup, _backward, learns=tuple(range(9)), outputs=LEARNING_OUTPUTS)
