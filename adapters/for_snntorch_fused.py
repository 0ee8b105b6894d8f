"""snnTorch under time fusion: `Leaky` calls recorded, and a run of them executed as one sequence."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from sparse_backend import policy, surrogate
from sparse_backend.convolution import DeferredConvolution
from sparse_backend.deferred import DeferredCurrent, unusual
from sparse_backend.execute import run_leaky
from sparse_backend.layer_state import LayerState
from sparse_backend.tensorlike import dense_of, learns_of, shaped, under_saved_tensor_hooks
from sparse_backend.timefusion.recorder import Placeholder, Recording, is_watchable, take, use
from sparse_backend.timefusion.sites import NeuronSite

from .for_snntorch_plan import make_plan, neuron_of, parts_of, same_objects, versions_of
from .shared import check_weight, count, goes_dense, limit_steps, taken

_ZEROS = object()  #: the state of a layer that begins


def record(into: Recording, module: Any, state: LayerState, input_: Any, mem: Any) -> Any:
    """Record one call of an enabled `Leaky`; None where it has to be run now."""
    own, buffers = module.__dict__, module._buffers
    before = buffers.get("mem") if mem is None else mem
    site = state.site
    if (
        site is not None
        and type(input_) is Placeholder
        and type(before) is Placeholder
        and input_.spec is site.input_spec
        and before.spec is site.state_specs[0]
        and same_objects(own, buffers, module._parameters, module._modules, site.plan.parts)
        and (mem is None or not own["init_hidden"])
    ):  # the next call of the last one's layer with the next step of its input
        spikes, after = site.add((use(input_.ref),), (take(before.ref),))
    else:
        recorded = _record_first(into, module, state, input_, before, mem)
        if recorded is None:
            return None
        spikes, after = recorded
    buffers["mem"] = after
    if own["output"] or not own["init_hidden"]:
        return spikes, after
    return spikes


def _record_first(
    into: Recording, module: Any, state: LayerState, input_: Any, before: Any, mem: Any
) -> list[Placeholder] | None:
    """The same for a call that is not just one more of the last one's kind: it is looked at closely."""
    own, buffers = module.__dict__, module._buffers
    if type(input_) is DeferredConvolution:
        input_ = input_.to_dense()
    kind = type(input_)
    if kind is not Placeholder and kind is not DeferredCurrent and (kind is not Tensor or not is_watchable(input_)):
        return None
    if type(before) is not Placeholder and type(before) is not Tensor:
        return None
    if (mem is not None and own["init_hidden"]) or "mem" not in buffers or unusual() is not None:
        return None
    shape, dtype = input_.shape, input_.dtype
    plan = state.plan
    if (
        plan is None
        or (module not in into.put_back and policy.reads_at_once(input_.device))
        or plan.shape != shape
        or plan.dtype is not dtype
        or not same_objects(own, buffers, module._parameters, module._modules, plan.parts)
        or versions_of(plan.parts) != plan.versions
    ):
        plan = state.plan = make_plan(module, state, parts_of(module), shape, dtype)
    parts = plan.parts
    if plan.why_framework is not None or parts.beta.device != input_.device or before.device != input_.device:
        return None
    if before.shape != shape:
        start: Any = _ZEROS
    elif before.dtype is not dtype:
        return None
    else:
        start = into.state_ref(before)
        if type(start) is Tensor:
            if not is_watchable(start):
                start = start.clone()
            else:
                into.watch(start)
    key = (id(module), id(plan), into.mode())
    site: Any = into.sites.get(key)
    if site is None:
        site = into.sites[key] = _site(into, state, plan)
    learns = torch.is_grad_enabled() and (site.learns or learns_of(input_) or learns_of(before))
    site.outputs(input_.device, (shape, site.spike_dtype, learns), (shape, dtype, learns))
    limit_steps(site, state, input_, plan.b_th, plan.why_dense)
    ref = into.tensor_ref(site, input_) if kind is Tensor else into.input_ref(input_)
    if type(ref) is tuple and type(start) is tuple:
        site.input_spec, site.state_specs = input_.spec, (before.spec,)
        into.hold(state, site)
    into.put_back[module] = functools.partial(put_back, module, state, ("mem",))
    return site.add((ref,), (start,))


def put_back(module: Any, state: LayerState, names: tuple[str, ...]) -> None:
    """Give a module its states as tensors, zeros if they were never computed; a tensor it has been given stays."""
    for name in names:
        part = module._buffers.get(name)
        if type(part) is Placeholder:
            values = part.to_dense() if part.has_value else torch.zeros(0, device=part.device)
            module._buffers[name] = values
            if name == "mem":
                state.last_mem = weakref.ref(values)


def _site(into: Recording, state: LayerState, plan: Any) -> Any:
    parts = plan.parts
    site: Any = NeuronSite(
        into,
        functools.partial(_step, state, plan),
        functools.partial(_sequence, state, plan),
        [parts.beta, parts.threshold, parts.graded],
    )
    site.state_slots = (1,)
    site.plan = plan  # keeps its id from being used again
    site.learns = parts.beta.requires_grad or parts.threshold.requires_grad or parts.graded.requires_grad
    site.spike_dtype = surrogate.spike_dtype(parts.spike_grad, parts.beta.new_empty(0, dtype=plan.dtype))
    return site


def _step(state: LayerState, plan: Any, current: Any, start: Any) -> tuple[Any, Tensor]:
    """One call alone, with the settings it was recorded under."""
    current = taken(state, current)
    if type(current) is DeferredCurrent:
        check_weight(state, current)
    spikes, mem, _ = _run(state, plan, current, 1, start, False)
    return spikes, mem


def _sequence(
    state: LayerState, plan: Any, current: Any, starts: list[Any], keep: list[bool]
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """All calls of a run: current [T, ...]. Sequences of spikes and membranes, and the last membrane."""
    steps, shape = current.shape[0], plan.shape
    if shape != plan.flat or type(current) is not DeferredCurrent or not current.is_deferred:
        current = dense_of(current)
    spikes, mem_last, mem_seq = _run(state, plan, current, steps, starts[0], keep[0])
    mem_seq = None if mem_seq is None else mem_seq.view(steps, *shape)
    return (spikes, mem_seq), (None, mem_last)


def _run(state: LayerState, plan: Any, current: Any, steps: int, start: Any, keep_mem: bool) -> tuple[Any, Tensor, Any]:
    if start is _ZEROS:
        start = torch.zeros(plan.flat, dtype=plan.dtype, device=current.device) if under_saved_tensor_hooks() else None
    asked_dense = plan.why_dense is not None or goes_dense(state)
    result = run_leaky(
        current,
        (steps, *plan.flat),
        neuron_of(plan),
        None if start is None else start.reshape(plan.flat),
        plan.parts.spike_grad,
        plan.b_th,
        keep_mem=keep_mem,
        max_active=policy.max_active(current.device),
        dense=asked_dense,
    )
    entries = steps * plan.flat[0] * plan.flat[1]
    count(
        state, result, steps, entries, plan.b_th, plan.why_dense, plan.dtype.itemsize,
        in_time=steps > 1, asked_dense=asked_dense, of_events=type(current) is DeferredCurrent,
    )  # fmt: skip
    return result.spikes, shaped(result.mem_last, plan.shape), result.mem_seq
