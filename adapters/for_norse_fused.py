"""Norse under time fusion: calls of cells recorded, and a run of them executed as one sequence."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparse_backend import autocasting, surrogate
from sparse_backend.convolution import DeferredConvolution
from sparse_backend.deferred import DeferredCurrent
from sparse_backend.execute_lif import LIResult
from sparse_backend.layer_state import LayerState
from sparse_backend.layers import record_linear
from sparse_backend.tensorlike import TensorLike, dense_of, learns_of
from sparse_backend.timefusion.recorder import Placeholder, Recording, is_watchable, take, use
from sparse_backend.timefusion.sites import NeuronSite

from .for_norse_call import (
    Call,
    OwnWeights,
    begins_as_norse,
    fitting,
    initial_state,
    is_initial,
    shaped,
    why_not_recurrent,
)
from .for_norse_plan import Kind, Plan, make_plan, parts_of
from .shared import limit_steps


def record(into: Recording, module: Any, layer: LayerState, kind: Kind, input_: Any, state: Any) -> Any:
    """Record one call of an enabled cell; None where it has to be run now."""
    current = input_
    if kind.weighted:
        if layer.weights is None:
            layer.weights = OwnWeights()
        current = record_linear(into, layer.weights.input, module.input_weights, None, input_)
        if current is None:
            return None
    site = layer.site
    if (
        site is not None
        and type(current) is Placeholder
        and current.spec is site.input_spec
        and type(state) is kind.state
        and all([type(x) is Placeholder and x.spec is spec for x, spec in zip(state, site.state_specs, strict=True)])
        and site.is_of(module)
    ):  # the next call of the last one's layer with the next step of its input
        outputs = site.add((use(current.ref),), tuple([take(x.ref) for x in state]))
    else:
        recorded = _record_first(into, module, layer, kind, current, state)
        if recorded is None:
            return None
        outputs = recorded
    return outputs[0], kind.state(*outputs) if len(outputs) == len(kind.state._fields) else kind.state(*outputs[1:])


def _record_first(
    into: Recording, module: Any, layer: LayerState, kind: Kind, current: Any, state: Any
) -> list[Placeholder] | None:
    """The same for a call that is not just one more of the last one's kind: it is looked at closely."""
    if type(current) is DeferredConvolution:
        current = current.to_dense()
    if type(current) is Tensor:
        if current.layout is not torch.strided or not is_watchable(current):
            return None
    elif type(current) is not Placeholder and type(current) is not DeferredCurrent:
        return None
    shape, dtype, device = current.shape, current.dtype, current.device
    if device.type == "meta" or (state is None and not begins_as_norse(module)):
        return None
    before = initial_state(module, current, False) if state is None else state
    if not kind.takes(before):
        return None
    of_norse = state is None or is_initial(module, state, dtype)
    states = []
    for part in before:
        if type(part) is Placeholder and part.shape == shape and part.dtype is dtype and part.device == device:
            states.append(part)
            continue
        part = fitting(part, shape, dtype, device, of_norse=of_norse)
        if part is None:
            return None
        states.append(part if is_watchable(part) else part.clone())
    recurrent = module.recurrent_weights if kind.recurrent else None
    if recurrent is not None and why_not_recurrent(recurrent, shape, current, in_time=True) is not None:
        return None
    known = shape, dtype, device, len(shape) == 2
    parts = parts_of(module, kind)
    plan: Plan | None = layer.plan
    if plan is None or not plan.is_for(parts, *known):
        plan = layer.plan = make_plan(layer, kind, parts, *known)
    if plan.why_framework is not None:
        return None

    key = (id(module), id(plan), id(recurrent), into.mode(), autocasting.state())
    site: Any = into.sites.get(key)
    if site is None:
        site = into.sites[key] = CellSite(into, module, layer, kind, plan, recurrent)
    elif not site.queue:
        site.read_again()
    site.outputs(device, *_outputs(kind, plan, site, current, states))
    if kind.spikes and recurrent is None:
        limit_steps(site, layer, current, plan.b_th, plan.why_dense)
    starts = []
    for part in states:
        ref = into.state_ref(part)
        if isinstance(ref, Tensor) and not isinstance(ref, TensorLike) and state is not None:
            into.watch(ref)
        starts.append(ref)
    ref = into.tensor_ref(site, current) if type(current) is Tensor else into.input_ref(current)
    if type(ref) is tuple and all([type(start) is tuple for start in starts]):
        site.input_spec, site.state_specs = current.spec, tuple([part.spec for part in states])
        into.hold(layer, site)
    return site.add((ref,), tuple(starts))


def _outputs(kind: Kind, plan: Plan, site: Any, current: Any, states: list[Any]) -> Any:
    """Shape, dtype and whether gradients flow, of what one call gives: its output, and states that are not it."""
    recording = torch.is_grad_enabled()
    by_name = dict(zip(kind.state._fields, states, strict=True))
    current_learns = recording and (
        learns_of(current) or (kind.synaptic and learns_of(by_name["i"])) or site.syn_learns
    )
    learns = recording and (current_learns or site.learns or any(map(learns_of, states)))
    dtype = plan.dtype if plan.spike_grad is None else site.spike_dtype
    outputs = [(plan.shape, dtype, learns)]
    if kind.spikes:
        outputs.append((plan.shape, plan.dtype, learns))
    if kind.synaptic:
        outputs.append((plan.shape, plan.dtype, learns if kind.recurrent else current_learns))
    return outputs


class CellSite(NeuronSite):
    """Calls of one cell. Outputs: what it returns, then v where that is not it, then i where there is one."""

    def __init__(
        self, into: Recording, module: Any, layer: LayerState, kind: Kind, plan: Plan, recurrent: Tensor | None
    ) -> None:
        parts = [part for part in plan.parts if isinstance(part, Tensor)]
        super().__init__(
            into,
            functools.partial(_step, layer, kind, plan, recurrent),
            functools.partial(_sequence, layer, kind, plan, recurrent),
            parts if recurrent is None else [*parts, recurrent],
        )
        n_states = len(kind.state._fields)
        self.state_slots = tuple(range(_n_outputs(kind) - n_states, _n_outputs(kind)))
        self.plan = plan  # keeps its id from being used again
        self._p, self._dt, self._activation, self._recurrent = module.p, module.dt, plan.parts.step, recurrent
        tau = plan.parts.tau_syn_inv
        self.syn_learns = kind.recurrent or (isinstance(tau, Tensor) and tau.requires_grad)
        self.learns = any(part.requires_grad for part in parts) or (recurrent is not None and recurrent.requires_grad)
        if plan.spike_grad is not None:
            self.spike_dtype = surrogate.spike_dtype(
                plan.spike_grad, torch.empty(0, dtype=plan.dtype, device=plan.device)
            )

    def is_of(self, module: Any) -> bool:
        """Whether a module is as it was. What is written into its parameters is seen when the recorded calls run."""
        own = module.__dict__
        return (
            module.p is self._p
            and module.dt is self._dt
            and own.get("activation", self._activation) is self._activation
            and (self._recurrent is None or self._multiplies_as(module))
        )

    def _multiplies_as(self, module: Any) -> bool:
        """Whether spikes meet the same recurrent weights, which autocast rounds."""
        return module.recurrent_weights is self._recurrent and autocasting.is_now(self.autocast)


def _call(kind: Kind, plan: Plan, recurrent: Tensor | None, current: Any, steps: int | None, starts: Any) -> Call:
    fields: tuple[str, ...] = kind.state._fields
    states = {name: x if name == "z" else dense_of(x) for name, x in zip(fields, starts, strict=True)}
    return Call(kind, plan, current, steps, states["v"], states.get("i"), states.get("z"), recurrent, True)


def _step(layer: LayerState, kind: Kind, plan: Plan, recurrent: Tensor | None, current: Any, *starts: Any) -> Any:
    """One call alone, with the settings it was recorded under."""
    output, state = _call(kind, plan, recurrent, current, None, starts).run(layer)
    return (output, *state) if len(state) < _n_outputs(kind) else state


def _n_outputs(kind: Kind) -> int:
    return 1 + kind.spikes + kind.synaptic


def _sequence(
    layer: LayerState, kind: Kind, plan: Plan, recurrent: Tensor | None, current: Any, starts: Any, keep: list[bool]
) -> Any:
    """All calls of a run: current [T, ...]. Sequences of all outputs, and the last of each state."""
    steps, shape = current.shape[0], plan.shape
    call = _call(kind, plan, recurrent, current, steps, starts)
    result = call.run_engine(layer, any(keep))
    if isinstance(result, LIResult):
        sequences, last = [result.v_seq], [result.v_last]
    else:
        sequences, last = [shaped(result.spikes, current.shape), result.v_seq], [None, result.v_last]
    if kind.synaptic:
        i_seq, i_last = result.i_seq, result.i_last
        if not call.current_learns():
            i_seq, i_last = None if i_seq is None else i_seq.detach(), None if i_last is None else i_last.detach()
        sequences.append(i_seq)
        last.append(i_last)
    whole = torch.Size((steps, *shape))
    sequences[1:] = [shaped(x, whole) for x in sequences[1:]]
    if not kind.spikes:
        sequences[0] = shaped(sequences[0], whole)
    return sequences, [shaped(x, shape) for x in last]
