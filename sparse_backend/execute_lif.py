"""Runs a two-state neuron or a leaky integrator over a sequence: picks sparse or dense, calls the op, applies the
model's own surrogate. The counterpart of `execute.py` for the ops `lif` and `linear_lif`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_backend import _native, surrogate
from sparse_backend.deferred import DeferredCurrent
from sparse_backend.dynamics import LI, LIF
from sparse_backend.events import EventTensor
from sparse_backend.ops import keeping
from sparse_backend.ops._library import exactly
from sparse_backend.ops.events import events_to_dense
from sparse_backend.ops.leaky import NONE
from sparse_backend.ops.lif import VALUE, LIFOutput, call_lif, lif
from sparse_backend.ops.linear_lif import call_linear_lif
from sparse_backend.tensorlike import dense as dense_of
from sparse_backend.tensorlike import shaped


class LIFResult(NamedTuple):
    """One layer over one sequence. Fractions are of all T * B * N entries."""

    spikes: EventTensor | Tensor  #: shape of the current; a plain tensor in the dense regime
    v_last: Tensor  #: [B, N] membrane after the last step
    i_last: Tensor | None  #: [B, N] synaptic current after the last step; None where the neuron has none
    v_seq: Tensor | None  #: [T, B, N] where `keep_states`
    i_seq: Tensor | None  #: [T, B, N] where `keep_states` and the neuron has one
    n_active: int | None  #: None where nobody has counted
    n_spikes: int | None
    kept: int  #: bytes this layer keeps for the backward pass: see `reporting.py`
    x: Tensor | None = None  #: [T, B, N] u - threshold in the dense regime, None in the sparse one


class LIResult(NamedTuple):
    """A leaky integrator over one sequence."""

    v_seq: Tensor  #: shape of the current
    v_last: Tensor  #: [B, N]
    i_last: Tensor | None  #: [B, N]; None where there is no synaptic current
    i_seq: Tensor | None  #: [T, B, N] where `keep_states` and there is a synaptic current
    kept: int


def run_lif(
    current: Tensor | DeferredCurrent,  # T * B rows of N, of any shape
    shape: tuple[int, int, int],  # (T, B, N)
    neuron: LIF,
    v: Tensor | None,  # [B, N], leak (or 0) everywhere if None, and then a constant
    i: Tensor | None,  # [B, N], zeros if None; without a synaptic current it joins the first step's current
    spike_grad: surrogate.SpikeGrad,
    b_th: float,
    *,
    recurrent: Tensor | None = None,  # [N, N] weights from the spikes of the step before
    z: Tensor | None = None,  # [B, N] spikes before the first step, zeros if None; only with `recurrent`
    inflow: Tensor | None = None,  # [B, N], what else joins the first step's current
    keep_states: bool = False,
    max_active: float = 1.0,
    dense: bool = False,
) -> LIFResult:
    """Run `neuron`; its spikes have the shape of `current`. Gradients reach whatever of the arguments requires them.

    Of a discrete neuron, i decays before the first step too, as it does after every one. Dense regime if `dense`, if
    b_th is infinite, or if more than `max_active` of all entries are active.
    """
    _native.load()
    if recurrent is not None and z is None and shape[0] == 1 and torch.is_grad_enabled() and recurrent.requires_grad:
        z = recurrent.detach().new_zeros(shape[1:])  # their gradient is zeros, not absent
    from_spikes = None if recurrent is None or z is None else _from_spikes(z, recurrent)
    i = _joining_first(neuron, shape, i, inflow, from_spikes)
    if shape[0] == 1:
        recurrent = None  # no step has one before it
        if neuron.discrete and neuron.syn_decay is not None:
            neuron = neuron._replace(syn_decay=neuron.syn_decay.detach())  # nor one after it
    arguments = _Arguments(current, shape, neuron, v, i, recurrent, keep_states)
    if not (dense or math.isinf(b_th)):
        result = _run_sparse(arguments, spike_grad, b_th, max_active)
        if result is not None:
            return result
    return _run_dense(arguments, spike_grad, b_th)


def _joining_first(neuron: LIF, shape: tuple[int, int, int], i: Tensor | None, *parts: Tensor | None) -> Tensor | None:
    """[B, N], what joins the first step's current: the synaptic current before it and these parts."""
    if neuron.discrete and neuron.syn_decay is not None:
        if i is not None:
            i = neuron.syn_decay * i
        elif shape[0] == 1 and torch.is_grad_enabled() and neuron.syn_decay.requires_grad:
            i = neuron.syn_decay * neuron.mem_gain.detach().new_zeros(shape[1:])  # it has a gradient, of zeros
    for part in parts:
        if part is not None:
            i = part if i is None else i + part
    return i


def _from_spikes(z: Tensor, recurrent: Tensor) -> Tensor:
    """[B, N], what the spikes before the first step add to its inflow."""
    return dense_of(exactly(torch.nn.functional.linear, z, recurrent))


def run_lif_traced(
    current: Tensor,  # [B, N]
    neuron: LIF,
    v: Tensor | None,  # [B, N]
    i: Tensor | None,
    inflow: Tensor | None,
    spike_grad: surrogate.SpikeGrad,
    b_th: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a discrete neuron for torch.compile, in plain tensors: spikes, v and i, [B, N] each; i is [0] where
    the neuron has none."""
    i = _joining_first(neuron, (1, *current.shape), i, inflow)
    dense = math.isinf(b_th)
    syn_decay = None if neuron.syn_decay is None else neuron.syn_decay.detach()
    states = neuron.mem_gain, syn_decay, None, neuron.threshold, neuron.reset_to, v, i, None, None
    keep_drive = torch.is_grad_enabled() and neuron.mem_gain.requires_grad
    options = neuron.reset, True, True, b_th, dense, False, keep_drive, False, 1.0
    out = LIFOutput(*lif(current.unsqueeze(0), *states, *options))
    spikes = spike_grad(out.x)
    if dense:
        return spikes.squeeze(0), out.v_last, out.i_last
    spikes = events_to_dense(
        spikes, out.spike_ptr, out.spike_indices, None, out.active_ptr, out.active_indices, current.shape[1]
    )
    return spikes, out.v_last, out.i_last


def run_li(
    current: Tensor | DeferredCurrent,  # T * B rows of N, of any shape
    shape: tuple[int, int, int],  # (T, B, N)
    neuron: LI,
    v: Tensor | None,  # as in `run_lif`
    i: Tensor | None,
    *,
    keep_states: bool = False,
) -> LIResult:
    """Run a leaky integrator: LIF with a threshold of 0 and no reset, whose x is v."""
    _native.load()
    zero = neuron.mem_gain.detach().new_zeros(())
    silent = LIF(*neuron, threshold=zero, reset_to=zero, reset=NONE, detached=True)
    out = _Arguments(current, shape, silent, v, i, None, keep_states).forward(math.inf, True, 1.0, None)
    v_seq, synaptic = out.x, neuron.syn_decay is not None
    return LIResult(
        shaped(v_seq, current.shape),
        out.v_last,
        out.i_last if synaptic else None,
        out.i_seq if keep_states and synaptic else None,
        _bytes(out.drive, out.inflow) if v_seq.requires_grad else 0,
    )


class _Arguments:
    """One call's tensors, and the op that takes them."""

    def __init__(
        self,
        current: Tensor | DeferredCurrent,
        shape: tuple[int, int, int],
        neuron: LIF,
        v: Tensor | None,
        i: Tensor | None,
        recurrent: Tensor | None,
        keep_states: bool,
    ) -> None:
        self.neuron, self.shape, self.current_shape = neuron, shape, current.shape
        self.recurrent, self.keep_states = recurrent, keep_states
        self.call: Any
        self.input: tuple[Any, ...]
        if type(current) is DeferredCurrent:
            events, hub = current.events, current.hub
            hub.check_unchanged()
            self.call, self.input = call_linear_lif, (
                events.row_ptr, events.indices, events.values, events.handle, events.active_ptr, events.active_indices,
                hub.weight, hub.bias, hub.token, hub.id, *shape[:2],
            )  # fmt: skip
        else:
            self.call, self.input = call_lif, (current.reshape(shape),)
        self.states = (*neuron[:5], v, i, recurrent)
        self.learns = torch.is_grad_enabled() and torch._C._any_requires_grad(*self.input, *self.states)
        #: whether gradients run through the spikes inside the op
        self.needs_g = self.learns and (recurrent is not None or not (neuron.detached or neuron.reset == NONE))

        self.g: Tensor | None = None  #: the surrogate's derivative at x, where it is needed and the op has run

    def forward(self, b_th: float, dense: bool, max_active: float, spike_grad: surrogate.SpikeGrad | None) -> LIFOutput:
        """spike_grad: the surrogate, None where nothing spikes."""
        neuron = self.neuron
        learns = [self.learns and part is not None and part.requires_grad for part in neuron[:2]]
        options = (neuron.reset, neuron.discrete, neuron.detached, b_th, dense, self.keep_states, *learns, max_active)
        if not self.needs_g or spike_grad is None:
            return LIFOutput(*self.call(*self.input, *self.states, None, *options))
        out = LIFOutput(*self.call.plain(*self.input, *self.states, None, *options))
        if not dense and out.active_ptr.numel() == 0:
            return out
        self.g = surrogate.derivative_in_pieces(spike_grad, out.x)
        return LIFOutput(*self.call.attach((*self.input, *self.states, self.g, *options), out))

    def spikes(self, spike_grad: surrogate.SpikeGrad, x: Tensor) -> Tensor:
        """The differentiable spikes at x."""
        if self.g is None:
            return spike_grad(x)
        return surrogate.spikes(spike_grad, x, self.g)

    def kept(self, out: LIFOutput) -> int:
        """Bytes that the op and the surrogate keep of `out`, its lists aside."""
        twice = self.g is not None and (not self.neuron.detached and self.neuron.reset == VALUE)  # x beside g
        return _bytes(out.x) * (2 if twice else 1) + _bytes(out.drive, out.inflow)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _run_sparse(
    arguments: _Arguments, spike_grad: surrogate.SpikeGrad, b_th: float, max_active: float
) -> LIFResult | None:
    out = arguments.forward(b_th, False, max_active, spike_grad)
    if out.active_ptr.numel() == 0:
        return None
    learns = out.x.requires_grad
    handle = arguments.spikes(spike_grad, out.x) if learns else None
    spikes = EventTensor(
        arguments.current_shape,
        out.spike_ptr,
        out.spike_indices,
        handle=handle,
        active_ptr=out.active_ptr,
        active_indices=out.active_indices,
        dtype=None if learns else surrogate.spike_dtype(spike_grad, out.x),
        columns=arguments.shape[2],
        check=False,
    )
    kept = 0
    if learns:
        lists = (out.spike_ptr, out.spike_indices), (out.active_ptr, out.active_indices)
        kept = keeping.bytes_of(spikes.columns, *lists) + arguments.kept(out)
    return _result(arguments, out, spikes, kept, None)


def _run_dense(arguments: _Arguments, spike_grad: surrogate.SpikeGrad, b_th: float) -> LIFResult:
    out = arguments.forward(b_th, True, 1.0, spike_grad)
    spikes = shaped(arguments.spikes(spike_grad, out.x), arguments.current_shape)
    kept = 0
    if out.x.requires_grad:
        kept = _bytes(spikes) + arguments.kept(out)
    return _result(arguments, out, spikes, kept, out.x.detach(), out.x.numel() if math.isinf(b_th) else None)


def _result(
    arguments: _Arguments, out: LIFOutput, spikes: Any, kept: int, x: Tensor | None, n_active: int | None = None
) -> LIFResult:
    synaptic, states = arguments.neuron.syn_decay is not None, arguments.keep_states
    return LIFResult(
        spikes,
        out.v_last,
        out.i_last if synaptic else None,
        out.v_seq if states else None,
        out.i_seq if states and synaptic else None,
        out.active_indices.shape[0] if x is None else n_active,
        out.spike_indices.shape[0] if out.spike_ptr.numel() else None,
        kept,
        x,
    )
