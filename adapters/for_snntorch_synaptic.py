"""snnTorch's neurons with more state than a membrane: one call of a `Synaptic`, `RLeaky` or `RSynaptic` on the engine.

What a call accepts and returns, and what the module holds afterwards, is snnTorch's to the letter.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_backend import autocasting, policy
from sparse_backend.deferred import DeferredCurrent, WeightHub, unusual
from sparse_backend.execute_lif import LIFResult, run_lif
from sparse_backend.layer_state import LayerState
from sparse_backend.tensorlike import dense_of, learns_of, shaped, under_saved_tensor_hooks

from .for_snntorch_plan import (
    ONE_TO_ONE,
    Kind,
    SynapticPlan,
    synaptic_plan_for,
)
from .shared import check_weight, count, goes_dense, run_own_forward, taken


def call_now(module: Any, kind: Kind, state: LayerState, input_: Any, given: tuple[Any, ...]) -> Any:
    """One call, on the engine or as snnTorch has it. given: the states it was given, None where it was not."""
    own, buffers = module.__dict__, module._buffers
    input_ = taken(state, input_)
    if type(input_) not in (DeferredCurrent, Tensor, Parameter):
        return run_own_forward(module, state, f"its current is a {type(input_).__name__}", input_, *given)
    before = {name: buffers.get(name) if part is None else part for name, part in zip(kind.states, given, strict=True)}
    spk = before.pop("spk", None)  # events, as recurrent weights are best multiplied with
    before = {name: dense_of(part) for name, part in before.items()}
    reason = unusual()
    for name, part in before.items():
        if reason is None and type(part) is not Tensor and type(part) is not Parameter:
            reason = f"its {name} is a {type(part).__name__}"
    if reason is None and kind.recurrent and not isinstance(spk, Tensor):
        reason = f"its spk is a {type(spk).__name__}"
    if reason is not None or (own["init_hidden"] and any(part is not None for part in given)):
        return run_own_forward(module, state, reason, input_, *given)

    shape, dtype = input_.shape, input_.dtype
    begins = state.last_mem is None or state.last_mem() is not before["mem"]  # not what was handed out last
    again = begins and policy.reads_at_once(input_.device)
    plan = synaptic_plan_for(module, kind, state, shape, dtype, again=again)
    parts = plan.parts
    reason = plan.why_framework
    states: dict[str, Tensor | None] = {}
    for name, part in before.items():
        states[name] = part if part.shape == shape else None
        if states[name] is None and under_saved_tensor_hooks():  # a checkpoint's second run must save as much
            states[name] = torch.zeros(shape, dtype=dtype, device=input_.device)
        elif states[name] is not None and part.dtype is not dtype and reason is None:
            reason = f"its {name} is {part.dtype}, its current {dtype}"
        if part.device != input_.device and reason is None:
            reason = f"its {name} is on another device than its current"
    if reason is None and parts.common.beta.device != input_.device:
        reason = "its beta is on another device than its current"
    if reason is not None:
        return run_own_forward(module, state, reason, input_, *given)

    if kind.recurrent and type(parts.recurrent) in ONE_TO_ONE and spk.shape == shape:
        assert parts.weight is not None
        product = torch.promote_types(spk.dtype, parts.weight.dtype)
        if product is not dtype:
            return run_own_forward(module, state, f"its spk times V is {product}, its current {dtype}", input_, *given)

    state.begins |= begins
    if kind.recurrent and spk.shape != shape:
        spk = None
    result = run_step(state, kind, plan, input_, {**states, "spk": spk})
    if state.tally.reason is None:
        state.tally.reason = plan.why_in_steps
    after = {"spk": result.spikes, "mem": shaped(result.v_last, shape)}
    if kind.synaptic:
        after["syn"] = shaped(result.i_last, shape)
    state.last_mem = weakref.ref(after["mem"])
    for name in kind.states:
        if name in buffers:
            buffers[name] = after[name]
        else:
            setattr(module, name, after[name])
    return handed_out(own, [after[name] for name in kind.outputs])


def handed_out(own: dict[str, Any], outputs: list[Any]) -> Any:
    """What a call of the module with these attributes returns."""
    return tuple(outputs) if own["output"] or not own["init_hidden"] else outputs[0]


def run_step(state: LayerState, kind: Kind, plan: SynapticPlan, current: Any, before: dict[str, Any]) -> LIFResult:
    """One call on the engine; before: its states by their names, None where they are zeros."""
    inflow = None
    if kind.recurrent:  # gathered over the steps, as the weights of a linear layer are
        spk = before["spk"]
        if spk is None:
            spk = torch.zeros(plan.shape, dtype=plan.dtype, device=current.device)
        inflow = dense_of(plan.parts.recurrent(spk))
    return run(state, kind, plan, current, None, before["mem"], before.get("syn"), inflow=inflow)


def run(
    state: LayerState,
    kind: Kind,
    plan: SynapticPlan,
    current: Any,
    steps: int | None,  # None: one call alone
    mem: Tensor | None,
    syn: Tensor | None,
    *,
    inflow: Tensor | None = None,
    spk: Any = None,
    keep_states: bool = False,
) -> LIFResult:
    """One call, or all of a sequence."""
    if type(current) is DeferredCurrent and steps is None:
        check_weight(state, current)
    recurrent = None
    if kind.recurrent and steps is not None:
        recurrent, bias = plan.recurrent()
        assert recurrent is not None
        recurrent = autocasting.rounded(recurrent)
        if bias is not None:
            current = _with_bias(current, bias)
    asked_dense = plan.why_dense is not None or goes_dense(state)
    sizes = steps or 1, *plan.flat
    result = run_lif(
        current,
        sizes,
        plan.neuron(),
        _flat(mem, plan),
        _flat(syn, plan),
        plan.parts.common.spike_grad,
        plan.b_th,
        recurrent=recurrent,
        z=_flat(spk, plan),
        inflow=_flat(inflow, plan),
        keep_states=keep_states,
        max_active=policy.max_active(current.device),
        dense=asked_dense,
    )
    count(
        state, result, sizes[0], sizes[0] * sizes[1] * sizes[2], plan.b_th, plan.why_dense, plan.dtype.itemsize,
        in_time=steps is not None, asked_dense=asked_dense,
        of_events=type(current) is DeferredCurrent or recurrent is not None,
    )  # fmt: skip
    if not kind.synaptic or kind.recurrent or current_learns(plan, current, syn):
        return result
    return result._replace(
        i_last=None if result.i_last is None else result.i_last.detach(),
        i_seq=None if result.i_seq is None else result.i_seq.detach(),
    )


def _with_bias(current: Any, bias: Tensor) -> Any:
    """A sequence's current with what is added to it at every step."""
    if type(current) is not DeferredCurrent:
        return current + bias
    hub = current.hub
    bias = bias if hub.bias is None else hub.bias + bias
    return DeferredCurrent(current.events, WeightHub(hub.given, bias, None, 0, None, hub.narrow))


def _flat(part: Any, plan: SynapticPlan) -> Any:
    """A state as the engine takes it, [B, N]."""
    return part if part is None or part.shape == plan.flat else dense_of(part).reshape(plan.flat)


def current_learns(plan: SynapticPlan, *causes: Any) -> bool:
    """Whether a synaptic current that no spikes flow into has a gradient: the membrane is no cause of it."""
    return any(cause is not None and learns_of(cause) for cause in (*causes, plan.parts.alpha))
