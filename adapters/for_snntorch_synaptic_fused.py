"""`Synaptic`, `RLeaky`, `RSynaptic` under time fusion: calls recorded, a run of them executed as one sequence."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparse_backend import autocasting, policy, surrogate
from sparse_backend.convolution import DeferredConvolution
from sparse_backend.deferred import DeferredCurrent, is_finite, unusual
from sparse_backend.layer_state import LayerState
from sparse_backend.tensorlike import TensorLike, dense_of, learns_of, shaped, under_saved_tensor_hooks
from sparse_backend.timefusion.recorder import Placeholder, Recording, is_watchable, take, use
from sparse_backend.timefusion.sites import NeuronSite

from .for_snntorch_fused import put_back
from .for_snntorch_plan import (
    Kind,
    SynapticParts,
    SynapticPlan,
    connection_of,
    same_objects,
    synaptic_plan_for,
)
from .for_snntorch_synaptic import current_learns, handed_out, run, run_step
from .shared import limit_steps, taken

_ZEROS = object()  #: the state of a layer that begins


def record(into: Recording, module: Any, kind: Kind, state: LayerState, input_: Any, given: tuple[Any, ...]) -> Any:
    """Record one call of an enabled neuron; None where it has to be run now."""
    own, buffers = module.__dict__, module._buffers
    before = [buffers.get(name) if part is None else part for name, part in zip(kind.states, given, strict=True)]
    if own["init_hidden"] and any([part is not None for part in given]):
        return None
    site = state.site
    if (
        site is not None
        and type(input_) is Placeholder
        and input_.spec is site.input_spec
        and all([type(x) is Placeholder and x.spec is spec for x, spec in zip(before, site.state_specs, strict=True)])
        and _same_objects(module, own, buffers, site.plan.parts)
        and ("spk" not in kind.states or autocasting.is_now(site.autocast))  # which rounds recurrent weights
    ):  # the next call of the last one's layer with the next step of its input
        outputs = site.add((use(input_.ref),), tuple([take(x.ref) for x in before]))
    else:
        recorded = _record_first(into, module, kind, state, input_, before)
        if recorded is None:
            return None
        outputs = recorded
    for name, slot in zip(kind.states, kind.slots, strict=True):
        buffers[name] = outputs[slot]
    return handed_out(own, outputs)


def _same_objects(module: Any, own: Any, buffers: Any, parts: SynapticParts) -> bool:
    parameters, modules = module._parameters, module._modules
    if not same_objects(own, buffers, parameters, modules, parts.common):
        return False
    alpha, recurrent = parts.alpha, parts.recurrent
    if alpha is not None and not (buffers.get("alpha") is alpha or parameters.get("alpha") is alpha):
        return False
    if recurrent is None:
        return True
    weight, bias = connection_of(recurrent)
    return modules.get("recurrent") is recurrent and weight is parts.weight and bias is parts.bias


def _record_first(
    into: Recording, module: Any, kind: Kind, state: LayerState, input_: Any, before: list[Any]
) -> list[Placeholder] | None:
    """The same for a call that is not just one more of the last one's kind: it is looked at closely."""
    if type(input_) is DeferredConvolution:
        input_ = input_.to_dense()
    what = type(input_)
    if what is not Placeholder and what is not DeferredCurrent and (what is not Tensor or not is_watchable(input_)):
        return None
    if any(name not in module._buffers for name in kind.states) or unusual() is not None:
        return None
    shape, dtype, device = input_.shape, input_.dtype, input_.device
    again = module not in into.put_back and policy.reads_at_once(device)  # the first call looks at everything
    plan = synaptic_plan_for(module, kind, state, shape, dtype, again=again)
    parts = plan.parts
    if plan.why_framework is not None or plan.why_in_steps is not None or parts.common.beta.device != device:
        return None
    if parts.weight is not None and not (parts.weight.device == device and is_finite(parts.weight)):
        return None  # their products with zeros count
    starts = []
    for name, part in zip(kind.states, before, strict=True):
        if type(part) is not Placeholder and type(part) is not Tensor and (name != "spk" or not _is_events(part)):
            return None
        if part.device != device:
            return None
        if part.shape != shape:
            starts.append(_ZEROS)
        elif part.dtype is not dtype:
            return None
        else:
            start = into.state_ref(part)
            if type(start) is Tensor:
                if is_watchable(start):
                    into.watch(start)
                else:
                    start = start.clone()
            starts.append(start)
    key = (id(module), id(plan), into.mode(), autocasting.state())
    site: Any = into.sites.get(key)
    if site is None:
        site = into.sites[key] = _site(into, kind, state, plan)
    recording = torch.is_grad_enabled()
    learns = recording and (site.learns or learns_of(input_) or any(map(learns_of, before)))
    syn_learns = learns
    if kind.synaptic and not kind.recurrent:
        syn_learns = recording and current_learns(plan, input_, before[kind.states.index("syn")])
    specs = {"spk": (shape, site.spike_dtype, learns), "syn": (shape, dtype, syn_learns), "mem": (shape, dtype, learns)}
    site.outputs(device, *(specs[name] for name in kind.outputs))
    if not kind.recurrent:
        limit_steps(site, state, input_, plan.b_th, plan.why_dense)
    ref = into.tensor_ref(site, input_) if what is Tensor else into.input_ref(input_)
    if type(ref) is tuple and all([type(start) is tuple for start in starts]):
        site.input_spec, site.state_specs = input_.spec, tuple([part.spec for part in before])
        into.hold(state, site)
    into.put_back[module] = functools.partial(put_back, module, state, kind.states)
    return site.add((ref,), tuple(starts))


def _is_events(x: Any) -> bool:
    return isinstance(x, TensorLike) and type(x) is not Placeholder


def _site(into: Recording, kind: Kind, state: LayerState, plan: SynapticPlan) -> Any:
    common, alpha, _, weight, bias = plan.parts
    reads = [common.beta, common.threshold, common.graded, alpha, weight, bias]
    tensors = [part for part in reads if part is not None]
    site: Any = NeuronSite(
        into, functools.partial(_step, kind, state, plan), functools.partial(_sequence, kind, state, plan), tensors
    )
    site.state_slots = kind.slots
    site.plan = plan  # keeps its id from being used again
    site.learns = any(part.requires_grad for part in tensors)
    site.spike_dtype = surrogate.spike_dtype(common.spike_grad, common.beta.new_empty(0, dtype=plan.dtype))
    return site


def _step(kind: Kind, state: LayerState, plan: SynapticPlan, current: Any, *starts: Any) -> Any:
    """One call alone, with the settings it was recorded under."""
    current = taken(state, current)
    result = run_step(state, kind, plan, current, _before(kind, plan, current, starts))
    last = {"mem": result.v_last, "syn": result.i_last}
    return [result.spikes, *(shaped(last[name], plan.shape) for name in kind.outputs[1:])]


def _sequence(
    kind: Kind, state: LayerState, plan: SynapticPlan, current: Any, starts: Any, keep: list[bool]
) -> tuple[list[Any], list[Any]]:
    """All calls of a run: current [T, ...]. Sequences of all outputs, and the last of each state."""
    steps, shape = current.shape[0], plan.shape
    if shape != plan.flat or type(current) is not DeferredCurrent or not current.is_deferred:
        current = dense_of(current)
    before = _before(kind, plan, current, starts)
    result = run(
        state, kind, plan, current, steps, before["mem"], before.get("syn"), spk=before.get("spk"),
        keep_states=any(keep),
    )  # fmt: skip
    sequences = {"mem": result.v_seq, "syn": result.i_seq}
    last = {"mem": result.v_last, "syn": result.i_last}
    names, whole = kind.outputs[1:], (steps, *shape)
    kept = [None if sequences[name] is None else sequences[name].view(whole) for name in names]  # type: ignore[union-attr]
    return [result.spikes, *kept], [None, *(shaped(last[name], shape) for name in names)]


def _before(kind: Kind, plan: SynapticPlan, current: Any, starts: Any) -> dict[str, Any]:
    """The states by their names, None where a layer begins with zeros."""
    before = {}
    for name, start in zip(kind.states, starts, strict=True):
        if start is not _ZEROS:
            before[name] = start if name == "spk" else dense_of(start)
        elif under_saved_tensor_hooks():
            before[name] = torch.zeros(plan.shape, dtype=plan.dtype, device=current.device)
        else:
            before[name] = None
    return before
