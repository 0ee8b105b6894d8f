"""snnTorch: `Leaky` runs on the engine. Every other neuron, and every option not named here, runs snnTorch's own code.

What a call accepts and returns, and what `module.mem` holds afterwards, is snnTorch's to the letter.
"""

from __future__ import annotations

import math
import operator
import weakref
from typing import Any, NamedTuple

import snntorch
import torch
from snntorch import Leaky, SpikingNeuron
from torch import Tensor
from torch.nn import Parameter

from sparse_backend import autocasting, dynamics, policy, surrogate
from sparse_backend.deferred import DeferredCurrent, WeightCache, unusual
from sparse_backend.enabling import STATE, LayerState
from sparse_backend.execute import can_trace, run_leaky, run_leaky_traced
from sparse_backend.tensorlike import TensorLike
from sparse_backend.timefusion import recorder

from .shared import count, goes_dense, own_forward, under_saved_tensor_hooks

_FLOATS = (torch.float32, torch.float64)
_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}  # Leaky's state functions
_METHODS = ("fire", "mem_reset", "_base_state_function", *_RESETS)
_own_forward = Leaky.forward


# What `enabling` asks of an adapter.


def is_neuron(module: torch.nn.Module) -> bool:
    """Whether the report should list it."""
    return isinstance(module, SpikingNeuron)


def why_not(module: torch.nn.Module) -> str | None:
    """Why a neuron is never accelerated; None where it may be."""
    if type(module) is Leaky:
        return None
    name = type(module).__name__
    if isinstance(module, Leaky):
        return f"{name} is a subclass of snntorch.Leaky and may differ from it"
    known = getattr(snntorch, name, None) is type(module)
    return f"snntorch.{name} is not accelerated yet" if known else f"{name} is not snntorch.Leaky"


def has_spikes(module: torch.nn.Module) -> bool:
    """Whether a neuron that may be accelerated spikes, so that there is a b_th to choose."""
    return True


def spike_grad(module: Any) -> surrogate.SpikeGrad:
    return module.spike_grad


def lowest_threshold(module: Any) -> float:
    return float(module.threshold.detach().min()) if module.threshold.numel() else math.inf


def forward(module: Any, input_: Any, mem: Any = None) -> Any:
    """An enabled `Leaky`'s forward."""
    if torch.compiler.is_compiling():
        return _compiled_forward(module, input_, mem)
    state = module.__dict__[STATE]
    if autocasting.is_on():
        input_, mem = _wide(module, input_, mem)
    into = recorder.enclosing()
    if into is not None:
        recorded = record(into, module, state, input_, mem) if into.accepts() else None
        if recorded is not None:
            return recorded
        into.settle(module)
    return _forward(module, state, input_, mem)


def _patched_forward(state_for: Any, module: Any, input_: Any, mem: Any = None) -> Any:
    if torch.compiler.is_compiling():
        return _own_forward(module, input_, mem)
    if autocasting.is_on():
        input_, mem = _wide(module, input_, mem)
    return _forward(module, state_for(module), input_, mem)


def _wide(module: Any, input_: Any, mem: Any) -> tuple[Any, Any]:
    """A call's current and membrane in the precision of its parameters, where autocast has made them narrow."""
    buffers = module._buffers
    if "mem" in buffers:
        buffers["mem"] = autocasting.widened(buffers["mem"])
    return autocasting.widened(input_), autocasting.widened(mem)


#: modules that are not neurons but run better for them: class -> forward and state
CONTAINERS: dict[type, Any] = {}

#: classes whose `forward` is replaced by `patch`, and by what: called with how to find a module's state first
PATCHED = {Leaky: _patched_forward}


# What a call needs to know of a module.


class _Parts(NamedTuple):
    """Everything a user may change between calls that a plan depends on."""

    beta: Tensor
    threshold: Tensor
    graded: Tensor
    spike_grad: surrogate.SpikeGrad
    reset_number: Any
    state_function: Any  # the plain function, and whether it is bound to the module: a plan must not keep its module
    is_bound: bool
    reset_delay: bool
    state_quant: Any
    inhibition: bool


class _Plan(NamedTuple):
    """What follows from a module's parts, as long as they are the same objects at the same versions."""

    parts: _Parts
    versions: tuple[Any, ...]
    shape: torch.Size  # of the current
    dtype: torch.dtype
    why_framework: str | None
    flat: tuple[int, int]  # (B, N)
    neuron: dynamics.Leaky | None  # None where beta or threshold must be prepared at each call, to learn
    template: dynamics.Leaky | None
    b_th: float
    why_dense: str | None


def _part(module: Any, name: str) -> Any:
    part = module._buffers.get(name)
    if part is None:
        part = module._parameters.get(name)
    return getattr(module, name) if part is None else part  # a replica's or a parametrized one


def _parts(module: Any) -> _Parts:
    own = module.__dict__
    grad = own.get("spike_grad")
    function = own["state_function"]
    return _Parts(
        _part(module, "beta"),
        _part(module, "threshold"),
        _part(module, "graded_spikes_factor"),
        module.spike_grad if grad is None else grad,
        module._buffers.get("reset_mechanism_val"),
        getattr(function, "__func__", function),
        getattr(function, "__self__", None) is module or "_is_replica" in own,  # a replica's is bound to the original
        own["reset_delay"],
        own["state_quant"],
        own["inhibition"],
    )


def _versions(parts: _Parts) -> tuple[Any, ...]:
    beta, threshold, graded, _, reset, *_ = parts
    return (
        beta._version, threshold._version, graded._version, reset._version,
        beta.requires_grad, threshold.requires_grad, graded.requires_grad,
    )  # fmt: skip


def _make_plan(module: Any, state: LayerState, parts: _Parts, shape: torch.Size, dtype: torch.dtype) -> _Plan:
    prepare_to_trace(module, state)
    tail = _tail(shape)
    flat = (shape[0] if len(shape) > 1 else 1, tail.numel())
    reset = getattr(parts.state_function, "__name__", "")
    reason = _why_framework(module, parts, shape, dtype, reset)
    neuron = template = why_dense = None
    b_th = math.inf
    if reason is None:
        beta = _per_neuron(parts.beta, shape, dtype)
        threshold = _per_neuron(parts.threshold, shape, dtype)
        if beta is None or threshold is None:
            name, part = ("beta", parts.beta) if beta is None else ("threshold", parts.threshold)
            reason = f"its {name} {list(part.shape)} is not one number, or one per neuron of {list(tail)}"
        else:
            graded = parts.graded
            learns = graded.requires_grad or float(graded) != 1
            template = dynamics.Leaky(
                beta, threshold, dynamics.RESETS[_RESETS[reset]], parts.reset_delay, graded if learns else None
            )
            as_it_is = beta is parts.beta and threshold is parts.threshold
            if bool(((beta >= 0) & (beta <= 1)).all()):
                neuron = template if as_it_is else None
            if neuron is None and not (beta.requires_grad or threshold.requires_grad):
                neuron = template._replace(beta=beta.clamp(0, 1))
            b_th = policy.resolve_b_th(state.b_th, parts.spike_grad)
            if state.b_th == "auto" and policy.is_broad(b_th, float(threshold.detach().min())):
                why_dense = policy.why_broad(b_th)
    return _Plan(parts, _versions(parts), shape, dtype, reason, flat, neuron, template, b_th, why_dense)


def _why_framework(module: Any, parts: _Parts, shape: torch.Size, dtype: torch.dtype, reset: str) -> str | None:
    """Why calls with these parts run snnTorch's own code; None where they need not."""
    own = module.__dict__
    if parts.state_quant:
        return "state_quant is not accelerated"
    if parts.inhibition:
        return "inhibition is not accelerated"
    if own.get("surrogate_disable"):
        return "surrogate_disable leaves no derivative to be sparse"
    if not parts.is_bound or reset not in _RESETS or parts.state_function is not getattr(Leaky, reset):
        return "its state_function is not its own"
    if SpikingNeuron.reset_dict[_RESETS[reset]] != int(parts.reset_number):
        return "reset_mechanism was changed after it was made, which snnTorch heeds in part"
    replaced = [name for name in _METHODS if name in own]
    if replaced:
        return f"its {replaced[0]} was replaced"
    if dtype not in _FLOATS:
        return f"its current is {dtype}, not float32 or float64"
    if not shape or not shape.numel():
        return f"its current has shape {list(shape)}"
    if parts.graded.numel() != 1 or parts.graded.dim() > 1 or (parts.graded.dim() and parts.graded.dtype != dtype):
        return f"graded_spikes_factor {list(parts.graded.shape)} of {parts.graded.dtype} is not one number"
    graded = float(parts.graded.detach())
    if not math.isfinite(graded) or graded == 0:
        return f"graded_spikes_factor is {graded}"
    if isinstance(parts.spike_grad, torch.nn.Module) and any(p.requires_grad for p in parts.spike_grad.parameters()):
        return "its surrogate has parameters that learn"
    return surrogate.inspect(parts.spike_grad).problem


def _tail(shape: torch.Size) -> torch.Size:
    """The neurons of a current [B, ...], or of one without a batch."""
    return shape[1:] if len(shape) > 1 else shape


def _per_neuron(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """beta or threshold as [] or [N], differentiably; None where it is neither one number nor one per neuron of a
    current of this shape, or has more dimensions than that, which the spikes would then have too."""
    tail = _tail(shape)
    if part.dim() > len(shape):
        return None
    if part.dim() and part.is_floating_point() and part.dtype != dtype:
        return None  # it would promote
    if part.dim() > len(tail) and part.shape[0] != 1:
        return None
    part = part if part.dtype == dtype else part.to(dtype)
    if part.numel() == 1 or (part.dim() == 1 and len(tail) == 1 and part.shape == tail):
        return part if part.dim() <= 1 else part.reshape(())
    try:
        return part.expand(1, *tail).reshape(-1)
    except RuntimeError:
        return None


def _neuron(plan: _Plan) -> dynamics.Leaky:
    """The neuron of a plan, its learnable parts made from the parameters anew."""
    if plan.neuron is not None:
        return plan.neuron
    assert plan.template is not None
    beta, threshold = (_per_neuron(part, plan.shape, plan.dtype) for part in (plan.parts.beta, plan.parts.threshold))
    assert beta is not None and threshold is not None
    return plan.template._replace(beta=beta.clamp(0, 1), threshold=threshold)


# One call.


def _forward(module: Any, state: LayerState, input_: Any, mem: Any) -> Any:
    kind = type(input_)
    if kind is DeferredCurrent and input_.is_deferred and len(input_.shape) == 2:
        if state.weights is None:
            state.weights = WeightCache()
        input_.adopt(state.weights)
        deferred = input_.is_deferred
    else:
        deferred = False
    if not deferred:
        if isinstance(input_, TensorLike):
            input_ = input_.to_dense()
        elif kind is not Tensor and kind is not Parameter:
            return _framework(module, state, f"its current is a {kind.__name__}", input_, mem)

    buffers = module._buffers
    before = buffers.get("mem") if mem is None else mem.to_dense() if isinstance(mem, TensorLike) else mem
    reason = unusual()
    if reason is None and (type(before) is not Tensor and type(before) is not Parameter):
        reason = f"its membrane is a {type(before).__name__}"
    if reason is not None or (mem is not None and module.__dict__["init_hidden"]):
        return _framework(module, state, reason, input_, mem)

    shape, dtype = input_.shape, input_.dtype
    fresh = state.last_mem is None or state.last_mem() is not before  # not what was handed out last: a sequence begins
    parts = _parts(module)
    plan: _Plan | None = state.plan
    if (
        plan is None
        or fresh
        or plan.shape != shape
        or plan.dtype is not dtype
        or any(map(operator.is_not, parts, plan.parts))
        or _versions(parts) != plan.versions
    ):
        plan = state.plan = _make_plan(module, state, parts, shape, dtype)
    reason = plan.why_framework
    start = before if before.shape == shape else None
    if start is None and under_saved_tensor_hooks():  # a checkpoint's second run is given zeros, and must save as much
        start = torch.zeros(shape, dtype=dtype, device=input_.device)
    if reason is None:
        if before.device != input_.device or parts.beta.device != input_.device:
            reason = "its membrane or beta is on another device than its current"
        elif start is not None and start.dtype is not dtype:
            reason = f"its membrane is {start.dtype}, its current {dtype}"
    if reason is not None:
        return _framework(module, state, reason, input_, mem)

    neuron = _neuron(plan)
    flat = plan.flat
    reshaped = shape != flat
    if reshaped and start is not None:
        start = start.reshape(flat)
    state.begins |= fresh
    if deferred:
        if state.begins:
            input_.hub, state.begins = input_.hub.verified(), False
        else:
            input_.hub.used = True

    go_dense = goes_dense(state)
    result = run_leaky(
        input_,
        (1, *flat),
        neuron,
        start,
        parts.spike_grad,
        plan.b_th,
        max_active=policy.max_active(input_.device),
        dense=go_dense,
    )
    spikes, after = result.spikes, result.mem_last
    if reshaped:
        after = torch.ops.aten._unsafe_view(after, shape)
    count(state, result, 1, flat[0] * flat[1], plan.b_th, plan.why_dense, dtype.itemsize, asked_dense=go_dense)
    state.last_mem = weakref.ref(after)
    if "mem" in buffers:
        buffers["mem"] = after
    else:
        module.mem = after
    if module.__dict__["output"] or not module.__dict__["init_hidden"]:
        return spikes, after
    return spikes


def _framework(module: Any, state: LayerState, reason: str | None, input_: Any, mem: Any) -> Any:
    """snnTorch's own forward; `reason` is None where that is about to refuse the call."""
    if reason is not None:
        state.path, state.reason = "framework", reason
        state.tally.framework_steps += 1
    if isinstance(input_, TensorLike):
        input_ = input_.to_dense()
    if isinstance(mem, TensorLike):
        mem = mem.to_dense()
    return own_forward(module)(module, input_, mem)


def _compiled_forward(module: Any, input_: Any, mem: Any) -> Any:
    """The step that torch.compile sees: one op on plain tensors, or snnTorch's own code."""
    state = getattr(module, STATE)
    beta, threshold = module.beta, module.threshold
    if autocasting.is_on():
        input_, mem = autocasting.widened(input_), autocasting.widened(mem)
    if (
        state.traced_for is not module.spike_grad
        or module.state_quant
        or module.inhibition
        or module.surrogate_disable
        or (mem is not None and module.init_hidden)
        or input_.dim() != 2
        or input_.dtype not in _FLOATS
        or beta.dim() > 1
        or threshold.dim() > 1
        or beta.dtype != input_.dtype
        or threshold.dtype != input_.dtype
        or module._reset_mechanism != state.traced_reset
        or module.graded_spikes_factor.dim() > 0
    ):
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


def prepare_to_trace(module: Any, state: LayerState) -> None:
    """What `_compiled_forward` may not find out while it is traced."""
    known = surrogate.inspect(module.spike_grad)
    state.traced_for = module.spike_grad if known.problem is None else None
    state.traced_b_th = policy.resolve_b_th(state.b_th, module.spike_grad)
    state.traced_reset = _RESETS.get(getattr(module.state_function, "__name__", ""), "")
    graded = module.graded_spikes_factor
    state.traced_graded = graded.requires_grad or graded.numel() != 1 or float(graded.detach()) != 1


from .for_snntorch_fused import record  # noqa: E402  (it needs this module)
