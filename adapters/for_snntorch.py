"""snnTorch: `Leaky`, `Synaptic`, `RLeaky` and `RSynaptic` run on the engine, the first one from here.

Every other neuron, and every option not named here, runs snnTorch's own code.

What a call accepts and returns, and what `module.mem` holds afterwards, is snnTorch's to the letter.
"""

from __future__ import annotations

import math
import operator
import weakref
from typing import Any

import snntorch
import torch
from snntorch import Leaky, SpikingNeuron
from torch import Tensor
from torch.nn import Parameter

from sparse_backend import autocasting, dynamics, policy, surrogate
from sparse_backend.deferred import DeferredCurrent, unusual
from sparse_backend.execute import can_trace, run_leaky, run_leaky_traced
from sparse_backend.execute_lif import run_lif_traced
from sparse_backend.layer_state import STATE, LayerState
from sparse_backend.layers import is_surrounded, own_forward
from sparse_backend.ops import FLOATS
from sparse_backend.tensorlike import dense_of, shaped, under_saved_tensor_hooks
from sparse_backend.timefusion import recorder

from .for_snntorch_fused import record
from .for_snntorch_plan import (
    KINDS,
    Kind,
    Plan,
    make_plan,
    neuron_of,
    parts_of,
    prepare_to_trace,
    versions_of,
)
from .for_snntorch_synaptic import call_now
from .for_snntorch_synaptic_fused import record as record_synaptic
from .shared import check_weight, count, goes_dense, run_own_forward, taken

__all__ = [
    "CONTAINERS",
    "PATCHED",
    "forward_of",
    "has_spikes",
    "is_neuron",
    "lowest_threshold",
    "prepare_to_trace",
    "spike_grad",
    "why_not",
]

_own_forward = Leaky.forward


# What `enabling` asks of an adapter.


def is_neuron(module: torch.nn.Module) -> bool:
    """Whether the report should list it."""
    return isinstance(module, SpikingNeuron)


def why_not(module: torch.nn.Module) -> str | None:
    """Why a neuron is never accelerated; None where it may be."""
    if type(module) in PATCHED:
        return None
    name = type(module).__name__
    for base in PATCHED:
        if isinstance(module, base):
            return f"{name} is a subclass of snntorch.{base.__name__} and may differ from it"
    known = getattr(snntorch, name, None) is type(module)
    return f"snntorch.{name} is not accelerated yet" if known else f"{name} is not snnTorch's own"


def has_spikes(module: torch.nn.Module) -> bool:
    """Whether a neuron that may be accelerated spikes, so that there is a b_th to choose."""
    return True


def spike_grad(module: Any) -> surrogate.SpikeGrad:
    return module.spike_grad


def lowest_threshold(module: Any) -> float:
    return float(module.threshold.detach().min()) if module.threshold.numel() else math.inf


def forward_of(module: torch.nn.Module) -> Any:
    """The forward of an enabled neuron."""
    return forward if type(module) is Leaky else forward_with_states


def forward(module: Any, input_: Any, mem: Any = None) -> Any:
    """An enabled `Leaky`'s forward."""
    if torch.compiler.is_compiling():
        return _compiled_forward(module, input_, mem)
    state = module.__dict__[STATE]
    if autocasting.is_on():
        input_, mem = _wide(module, ("mem",), input_, mem)
    into = recorder.enclosing()
    if into is not None:
        waits = into.accepts() and not is_surrounded(module)
        recorded = record(into, module, state, input_, mem) if waits else None
        if recorded is not None:
            return recorded
        into.settle(module)
    return _forward(module, state, input_, mem)


def _patched_forward(state_for: Any, module: Any, input_: Any, mem: Any = None) -> Any:
    if torch.compiler.is_compiling():
        return _own_forward(module, input_, mem)
    if autocasting.is_on():
        input_, mem = _wide(module, ("mem",), input_, mem)
    return _forward(module, state_for(module), input_, mem)


def _wide(module: Any, states: tuple[str, ...], *call: Any) -> tuple[Any, ...]:
    """What a call was given, and the states its module holds, in the precision of its parameters, where autocast has
    made them narrow."""
    buffers = module._buffers
    for name in states:
        if name in buffers:
            buffers[name] = autocasting.widened(buffers[name])
    return tuple(map(autocasting.widened, call))


def forward_with_states(module: Any, input_: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an enabled neuron with more state."""
    kind = KINDS[type(module)]
    given = _given(kind, args, kwargs)
    if given is None:
        return own_forward(module)(module, input_, *args, **kwargs)
    if torch.compiler.is_compiling():
        return _compiled_synaptic(module, kind, input_, given)
    state = module.__dict__[STATE]
    if autocasting.is_on():
        input_, *wide = _wide(module, kind.states, input_, *given)
        given = tuple(wide)
    into = recorder.enclosing()
    if into is not None:
        waits = into.accepts() and not is_surrounded(module)
        recorded = record_synaptic(into, module, kind, state, input_, given) if waits else None
        if recorded is not None:
            return recorded
        into.settle(module)
    return call_now(module, kind, state, input_, given)


def _patched_synaptic(state_for: Any, module: Any, input_: Any, *args: Any, **kwargs: Any) -> Any:
    kind = KINDS[type(module)]
    given = _given(kind, args, kwargs)
    if torch.compiler.is_compiling() or given is None:
        return own_forward(module)(module, input_, *args, **kwargs)
    if autocasting.is_on():
        input_, *wide = _wide(module, kind.states, input_, *given)
        given = tuple(wide)
    return call_now(module, kind, state_for(module), input_, given)


def _given(kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The states a call was given, None where it was not; None for a call that snnTorch refuses."""
    n = len(args)
    if n > len(kind.states) or any(name not in kind.states[n:] for name in kwargs):
        return None
    return *args, *(kwargs.get(name) for name in kind.states[n:])


#: modules that are not neurons but run better for them: class -> forward and state
CONTAINERS: dict[type, Any] = {}

#: classes whose `forward` is replaced by `patch`, and by what: called with how to find a module's state first
PATCHED = {Leaky: _patched_forward, **dict.fromkeys(KINDS, _patched_synaptic)}


# One call.


def _forward(module: Any, state: LayerState, input_: Any, mem: Any) -> Any:
    input_ = taken(state, input_)
    kind = type(input_)
    deferred = kind is DeferredCurrent
    if not deferred and kind is not Tensor and kind is not Parameter:
        return run_own_forward(module, state, f"its current is a {kind.__name__}", input_, mem)

    buffers = module._buffers
    before = buffers.get("mem") if mem is None else dense_of(mem)
    reason = unusual()
    if reason is None and (type(before) is not Tensor and type(before) is not Parameter):
        reason = f"its membrane is a {type(before).__name__}"
    if reason is not None or (mem is not None and module.__dict__["init_hidden"]):
        return run_own_forward(module, state, reason, input_, mem)

    shape, dtype, device = input_.shape, input_.dtype, input_.device
    fresh = state.last_mem is None or state.last_mem() is not before  # not what was handed out last: a sequence begins
    parts = parts_of(module)
    plan: Plan | None = state.plan
    if (
        plan is None
        or (fresh and policy.reads_at_once(device))
        or plan.shape != shape
        or plan.dtype is not dtype
        or any(map(operator.is_not, parts, plan.parts))
        or versions_of(parts) != plan.versions
    ):
        plan = state.plan = make_plan(module, state, parts, shape, dtype)
    reason = plan.why_framework
    start = before if before.shape == shape else None
    if start is None and under_saved_tensor_hooks():  # a checkpoint's second run is given zeros, and must save as much
        start = torch.zeros(shape, dtype=dtype, device=device)
    if reason is None:
        if before.device != device or parts.beta.device != device:
            reason = "its membrane or beta is on another device than its current"
        elif start is not None and start.dtype is not dtype:
            reason = f"its membrane is {start.dtype}, its current {dtype}"
    if reason is not None:
        return run_own_forward(module, state, reason, input_, mem)

    neuron = neuron_of(plan)
    flat = plan.flat
    reshaped = shape != flat
    if reshaped and start is not None:
        start = start.reshape(flat)
    state.begins |= fresh
    if deferred:
        check_weight(state, input_)

    go_dense = goes_dense(state)
    result = run_leaky(
        input_,
        (1, *flat),
        neuron,
        start,
        parts.spike_grad,
        plan.b_th,
        max_active=policy.max_active(device),
        dense=go_dense,
    )
    spikes, after = result.spikes, result.mem_last
    if reshaped:
        after = shaped(after, shape)
    count(
        state, result, 1, flat[0] * flat[1], plan.b_th, plan.why_dense, dtype.itemsize,
        asked_dense=go_dense, of_events=deferred,
    )  # fmt: skip
    state.last_mem = weakref.ref(after)
    if "mem" in buffers:
        buffers["mem"] = after
    else:
        module.mem = after
    if module.__dict__["output"] or not module.__dict__["init_hidden"]:
        return spikes, after
    return spikes


def _compiled_forward(module: Any, input_: Any, mem: Any) -> Any:
    """The step that torch.compile sees: one op on plain tensors, or snnTorch's own code."""
    state = getattr(module, STATE)
    beta, threshold = module.beta, module.threshold
    if autocasting.is_on():
        input_, mem = autocasting.widened(input_), autocasting.widened(mem)
    if not _can_trace(module, state, input_, beta, threshold) or (mem is not None and module.init_hidden):
        return _own_forward(module, input_, mem)
    graded = module.graded_spikes_factor if state.traced_graded else None
    neuron = dynamics.Leaky(
        beta.clamp(0, 1), threshold, dynamics.RESETS[state.traced_reset], module.reset_delay, graded
    )
    if not can_trace(neuron):
        return _own_forward(module, input_, mem)
    before = module.mem if mem is None else mem
    start = before if before.shape == input_.shape else None
    spikes, after = run_leaky_traced(input_, neuron, start, module.spike_grad, state.traced_b_th)
    module.mem = after
    if module.output or not module.init_hidden:
        return spikes, after
    return spikes


def _can_trace(module: Any, state: LayerState, input_: Tensor, *parts: Tensor) -> bool:
    """Whether an op of ours serves this call, parts being the module's coefficients."""
    return (
        state.traced_for is module.spike_grad
        and not (module.state_quant or module.inhibition or module.surrogate_disable)
        and input_.dim() == 2
        and input_.dtype in FLOATS
        and all([part.dim() <= 1 and part.dtype == input_.dtype for part in parts])
        and module._reset_mechanism == state.traced_reset
        and module.graded_spikes_factor.dim() == 0
    )


def _compiled_synaptic(module: Any, kind: Kind, input_: Any, given: tuple[Any, ...]) -> Any:
    """The same for neurons with more state."""
    state = getattr(module, STATE)
    if autocasting.is_on():
        input_, given = autocasting.widened(input_), tuple([autocasting.widened(part) for part in given])
    synaptic, recurrent = "syn" in kind.states, "spk" in kind.states
    parts = [module.beta, module.threshold, *([module.alpha] if synaptic else [])]
    before = {name: getattr(module, name) if part is None else part for name, part in zip(kind.states, given)}  # noqa: B905
    refused = module.init_hidden and any([part is not None for part in given])
    if (
        refused
        or not _can_trace(module, state, input_, *parts)
        or state.traced_graded
        or not module.reset_delay
        or any([part.dtype != input_.dtype for part in before.values()])
    ):
        return own_forward(module)(module, input_, *given)
    start = {name: part if part.shape == input_.shape else None for name, part in before.items()}
    inflow = None
    if recurrent:
        spk = start["spk"]
        inflow = module.recurrent(torch.zeros_like(input_) if spk is None else spk)
    alpha = module.alpha.clamp(0, 1) if synaptic else None
    neuron = dynamics.discrete(module.beta.clamp(0, 1), alpha, module.threshold, dynamics.RESETS[state.traced_reset])
    spikes, mem, syn = run_lif_traced(
        input_, neuron, start["mem"], start.get("syn"), inflow, module.spike_grad, state.traced_b_th
    )
    module.mem = mem
    if synaptic:
        module.syn = syn
    if recurrent:
        module.spk = spikes
    outputs = [spikes, syn, mem] if synaptic else [spikes, mem]
    return tuple(outputs) if module.output or not module.init_hidden else spikes
