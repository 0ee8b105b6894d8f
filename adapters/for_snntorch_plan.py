"""What follows from a snnTorch neuron's attributes: its dynamics, surrogate and band, or why it stays snnTorch's."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from snntorch import RLeaky, RSynaptic, SpikingNeuron, Synaptic
from snntorch._neurons import rleaky, rsynaptic
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from sparse_backend import dynamics, policy, surrogate
from sparse_backend.layer_state import LayerState
from sparse_backend.ops import FLOATS

RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}  # a neuron's state functions
ONE_TO_ONE = (rleaky.RecurrentOneToOne, rsynaptic.RecurrentOneToOne)
#: parts of a recurrent connection that give the same twice
REPEATABLE = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Sequential, torch.nn.Identity, *ONE_TO_ONE)
MOST_ONE_TO_ONE = 512  # neurons whose one-to-one connection runs as a matrix: measured, twice as many gain half
METHODS = ("fire", "mem_reset", "_base_state_function", "_base_state_reset_zero", *RESETS)


class Parts(NamedTuple):
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


class Plan(NamedTuple):
    """What follows from a module's parts, as long as they are the same objects at the same versions."""

    parts: Parts
    versions: tuple[Any, ...]
    shape: torch.Size  # of the current
    dtype: torch.dtype
    why_framework: str | None
    flat: tuple[int, int]  # (B, N)
    neuron: dynamics.Leaky | None  # None where beta or threshold must be prepared at each call, to learn
    template: dynamics.Leaky | None
    b_th: float
    why_dense: str | None


def part_of(module: Any, name: str) -> Any:
    part = module._buffers.get(name)
    if part is None:
        part = module._parameters.get(name)
    return getattr(module, name) if part is None else part  # a replica's or a parametrized one


def parts_of(module: Any) -> Parts:
    own = module.__dict__
    grad = own.get("spike_grad")
    function = own["state_function"]
    return Parts(
        part_of(module, "beta"),
        part_of(module, "threshold"),
        part_of(module, "graded_spikes_factor"),
        module.spike_grad if grad is None else grad,
        module._buffers.get("reset_mechanism_val"),
        getattr(function, "__func__", function),
        getattr(function, "__self__", None) is module or "_is_replica" in own,  # a replica's is bound to the original
        own["reset_delay"],
        own["state_quant"],
        own["inhibition"],
    )


def versions_of(parts: Parts) -> tuple[Any, ...]:
    beta, threshold, graded, _, reset, *_ = parts
    return (
        beta._version, threshold._version, graded._version, reset._version,
        beta.requires_grad, threshold.requires_grad, graded.requires_grad,
    )  # fmt: skip


def make_plan(module: Any, state: LayerState, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Plan:
    """The plan of a `Leaky`."""
    prepare_to_trace(module, state)
    reset = getattr(parts.state_function, "__name__", "")
    reason = why_framework(module, parts, shape, dtype, reset)
    neuron = template = why_dense = None
    b_th = math.inf
    if reason is None:
        beta, threshold = (per_neuron(part, shape, dtype) for part in (parts.beta, parts.threshold))
        if beta is None or threshold is None:
            reason = _why_not_per_neuron(shape, beta=(parts.beta, beta), threshold=(parts.threshold, threshold))
        else:
            graded = parts.graded
            learns = graded.requires_grad or float(graded) != 1
            template = dynamics.Leaky(
                beta, threshold, dynamics.RESETS[RESETS[reset]], parts.reset_delay, graded if learns else None
            )
            as_it_is = beta is parts.beta and threshold is parts.threshold
            if bool(((beta >= 0) & (beta <= 1)).all()):
                neuron = template if as_it_is else None
            # Asked of the parameters: what is made of them without a graph does not learn, and would be kept.
            learn = parts.beta.requires_grad or parts.threshold.requires_grad
            keeps = policy.reads_at_once(beta.device) and not learn
            if neuron is None and keeps:
                neuron = template._replace(beta=beta.clamp(0, 1))
            b_th, why_dense = _band(state, parts, threshold)
    return Plan(parts, versions_of(parts), shape, dtype, reason, _flat(shape), neuron, template, b_th, why_dense)


def _flat(shape: torch.Size) -> tuple[int, int]:
    """(B, N)"""
    return (shape[0] if len(shape) > 1 else 1, tail_of(shape).numel())


def _band(state: LayerState, parts: Parts, threshold: Tensor) -> tuple[float, str | None]:
    """b_th, and why it means that nothing is sparse, if so."""
    b_th = policy.resolve_b_th(state.b_th, parts.spike_grad)
    broad = state.b_th == "auto" and policy.is_broad(b_th, float(threshold.detach().min()))
    return b_th, policy.why_broad(b_th) if broad else None


def _why_not_per_neuron(shape: torch.Size, **parts: tuple[Tensor, Tensor | None]) -> str:
    name = next(name for name, (_, fitting) in parts.items() if fitting is None)
    return f"its {name} {list(parts[name][0].shape)} is not one number, or one per neuron of {list(tail_of(shape))}"


def why_framework(module: Any, parts: Parts, shape: torch.Size, dtype: torch.dtype, reset: str) -> str | None:
    """Why calls with these parts run snnTorch's own code; None where they need not."""
    own = module.__dict__
    if parts.beta.is_meta:
        return policy.WHY_META
    if parts.state_quant:
        return "state_quant is not accelerated"
    if parts.inhibition:
        return "inhibition is not accelerated"
    if own.get("surrogate_disable"):
        return "surrogate_disable leaves no derivative to be sparse"
    if not parts.is_bound or reset not in RESETS or parts.state_function is not getattr(type(module), reset):
        return "its state_function is not its own"
    if SpikingNeuron.reset_dict[RESETS[reset]] != int(parts.reset_number):
        return "reset_mechanism was changed after it was made, which snnTorch heeds in part"
    replaced = [name for name in METHODS if name in own]
    if replaced:
        return f"its {replaced[0]} was replaced"
    if dtype not in FLOATS:
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


def tail_of(shape: torch.Size) -> torch.Size:
    """The neurons of a current [B, ...], or of one without a batch."""
    return shape[1:] if len(shape) > 1 else shape


def per_neuron(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """beta or threshold as [] or [N], differentiably; None where it is neither one number nor one per neuron of a
    current of this shape, or has more dimensions than that, which the spikes would then have too."""
    tail = tail_of(shape)
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


def as_now(part: Tensor) -> Tensor:
    """A coefficient that does not learn as it is now: what is kept for the backward pass may be written to before."""
    return part.clone() if torch.is_grad_enabled() and not part.requires_grad else part


def neuron_of(plan: Plan) -> dynamics.Leaky:
    """The neuron of a plan, its learnable parts made from the parameters anew."""
    if plan.neuron is not None:
        return plan.neuron._replace(beta=as_now(plan.neuron.beta), threshold=as_now(plan.neuron.threshold))
    assert plan.template is not None
    beta, threshold = (per_neuron(part, plan.shape, plan.dtype) for part in (plan.parts.beta, plan.parts.threshold))
    assert beta is not None and threshold is not None
    return plan.template._replace(beta=beta.clamp(0, 1), threshold=as_now(threshold))


def prepare_to_trace(module: Any, state: LayerState) -> None:
    """What the forward that torch.compile traces may not find out then."""
    known = surrogate.inspect(module.spike_grad)
    state.traced_for = module.spike_grad if known.problem is None else None
    state.traced_b_th = policy.resolve_b_th(state.b_th, module.spike_grad)
    state.traced_reset = RESETS.get(getattr(module.state_function, "__name__", ""), "")
    graded = module.graded_spikes_factor
    known_to_be_one = graded.numel() == 1 and not graded.is_meta and float(graded.detach()) == 1
    state.traced_graded = graded.requires_grad or not known_to_be_one


# Neurons with more state than a membrane.


class Kind(NamedTuple):
    """What tells one such class from the others."""

    states: tuple[str, ...]  #: names of its states in the order it takes them
    outputs: tuple[str, ...]  #: names of what it returns: its spikes, and the states that are not them
    slots: tuple[int, ...]  #: where each state is among these

    @property
    def synaptic(self) -> bool:
        return "syn" in self.states

    @property
    def recurrent(self) -> bool:
        return "spk" in self.states


def _kind(*states: str) -> Kind:
    outputs = ("spk", *(name for name in states if name != "spk"))
    return Kind(states, outputs, tuple(map(outputs.index, states)))


KINDS = {Synaptic: _kind("syn", "mem"), RLeaky: _kind("spk", "mem"), RSynaptic: _kind("spk", "syn", "mem")}


def same_objects(own: Any, buffers: Any, parameters: Any, modules: Any, parts: Parts) -> bool:
    """Whether a module is made of the parts a plan knows, looked up fast. What is written into them is seen by their
    versions, when recorded calls run."""
    beta, threshold, graded, function = parts.beta, parts.threshold, parts.graded, own["state_function"]
    factor = "graded_spikes_factor"
    return (  # a replica's are its own attributes
        (buffers.get("beta") is beta or parameters.get("beta") is beta or own.get("beta") is beta)
        and (
            buffers.get("threshold") is threshold
            or parameters.get("threshold") is threshold
            or own.get("threshold") is threshold
        )
        and (buffers.get(factor) is graded or parameters.get(factor) is graded or own.get(factor) is graded)
        and buffers.get("reset_mechanism_val") is parts.reset_number
        and (own["spike_grad"] if "spike_grad" in own else modules.get("spike_grad")) is parts.spike_grad
        and getattr(function, "__func__", function) is parts.state_function
        and own["reset_delay"] is parts.reset_delay
        and own["state_quant"] is parts.state_quant
        and own["inhibition"] is parts.inhibition
    )


class SynapticParts(NamedTuple):
    """Everything a user may change between calls that a plan depends on."""

    common: Parts
    alpha: Tensor | None
    recurrent: Any  # the module between a step's spikes and the next step's current
    weight: Tensor | None  # its parameters
    bias: Tensor | None

    def differ(self, other: SynapticParts) -> bool:
        return any(map(operator.is_not, self[1:], other[1:])) or any(map(operator.is_not, self.common, other.common))


class SynapticPlan(NamedTuple):
    """What follows from a module's parts, as long as they are the same objects at the same versions."""

    parts: SynapticParts
    versions: tuple[Any, ...]
    shape: torch.Size  # of the current
    dtype: torch.dtype
    why_framework: str | None
    why_in_steps: str | None  # why its calls cannot run as one sequence
    flat: tuple[int, int]  # (B, N)
    reset: int
    b_th: float
    why_dense: str | None

    def neuron(self) -> dynamics.LIF:
        """Made from the parameters anew, so that they learn."""
        common, alpha = self.parts.common, self.parts.alpha
        beta, threshold = self._fitting(common.beta), as_now(self._fitting(common.threshold))
        alpha = None if alpha is None else self._fitting(alpha).clamp(0, 1)
        return dynamics.discrete(beta.clamp(0, 1), alpha, threshold, self.reset)

    def _fitting(self, part: Tensor) -> Tensor:
        fitting = per_neuron(part, self.shape, self.dtype)
        assert fitting is not None
        return fitting

    def recurrent(self) -> tuple[Tensor | None, Tensor | None]:
        """The recurrent weights [N, N] and bias [N] of a plan whose calls may run as one sequence."""
        weight, bias = self.parts.weight, self.parts.bias
        if weight is not None and type(self.parts.recurrent) in ONE_TO_ONE:
            weight = torch.diag(weight.reshape(-1).expand(self.flat[1]))
        return weight, bias


def synaptic_parts_of(module: Any, kind: Kind) -> SynapticParts:
    recurrent = module._modules.get("recurrent") if kind.recurrent else None
    weight, bias = connection_of(recurrent)
    alpha = part_of(module, "alpha") if kind.synaptic else None
    return SynapticParts(parts_of(module), alpha, recurrent, weight, bias)


def connection_of(recurrent: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a recurrent connection; None where it is not a known one."""
    if type(recurrent) is torch.nn.Linear:
        own = recurrent._parameters  # not what is pruned, parametrized or a buffer
        return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (None, None)
    return (recurrent.V, None) if type(recurrent) in ONE_TO_ONE else (None, None)


def synaptic_versions_of(parts: SynapticParts) -> tuple[Any, ...]:
    learns = (None if part is None else part.requires_grad for part in (parts.weight, parts.bias))
    if parts.alpha is None:
        return *versions_of(parts.common), *learns
    return *versions_of(parts.common), *learns, parts.alpha._version, parts.alpha.requires_grad


def synaptic_plan_for(
    module: Any, kind: Kind, state: LayerState, shape: torch.Size, dtype: torch.dtype, *, again: bool
) -> SynapticPlan:
    """The module's plan, made anew where it is not of these parts any more. again: in any case."""
    parts = synaptic_parts_of(module, kind)
    plan: SynapticPlan | None = state.plan
    if (
        again
        or plan is None
        or plan.shape != shape
        or plan.dtype is not dtype
        or parts.differ(plan.parts)
        or synaptic_versions_of(parts) != plan.versions
    ):
        plan = state.plan = make_synaptic_plan(module, kind, state, parts, shape, dtype)
    return plan


def make_synaptic_plan(
    module: Any, kind: Kind, state: LayerState, parts: SynapticParts, shape: torch.Size, dtype: torch.dtype
) -> SynapticPlan:
    prepare_to_trace(module, state)
    common, alpha = parts.common, parts.alpha
    reset = getattr(common.state_function, "__name__", "")
    in_steps = _why_in_steps(parts, shape, dtype) if kind.recurrent else None
    reason = why_framework(module, common, shape, dtype, reset) or _why_not_as_discrete(module, common, reset)
    if reason is None and kind.recurrent:
        reason = _why_not_recurrent(parts, reset, dtype)
    b_th, why_dense, code = math.inf, None, dynamics.RESETS["none"]
    if reason is None:
        given = {"beta": common.beta, "threshold": common.threshold}
        if alpha is not None:
            given["alpha"] = alpha
        fitting = {name: (part, per_neuron(part, shape, dtype)) for name, part in given.items()}
        if any(part is None for _, part in fitting.values()):
            reason = _why_not_per_neuron(shape, **fitting)
        else:
            code = dynamics.RESETS[RESETS[reset]]
            b_th, why_dense = _band(state, common, common.threshold)
    return SynapticPlan(
        parts, synaptic_versions_of(parts), shape, dtype, reason, in_steps, _flat(shape), code, b_th, why_dense
    )


def _why_not_as_discrete(module: Any, parts: Parts, reset: str) -> str | None:
    name = type(module).__name__
    if not parts.reset_delay and (reset != "_base_int" or name == "RSynaptic"):  # which snnTorch runs only if given spk
        return f"reset_delay=False is not accelerated for {name}"
    if parts.graded.requires_grad or float(parts.graded) != 1:
        return f"graded_spikes_factor is not accelerated for {name}"
    return None


def _why_not_recurrent(parts: SynapticParts, reset: str, dtype: torch.dtype) -> str | None:
    recurrent = parts.recurrent
    if type(recurrent) in ONE_TO_ONE and not _has_hooks(recurrent):
        return None
    others = {part.dtype for part in recurrent.parameters()} - {dtype}
    if others:
        return f"its recurrent weights are {others.pop()}, its current {dtype}"
    if reset == "_base_zero":  # snnTorch asks it twice a step
        for part in recurrent.modules():
            if type(part) not in REPEATABLE or _has_hooks(part):
                what = "hooks" if type(part) in REPEATABLE else f"a {type(part).__name__}"
                return f"its recurrent connection has {what}, with a reset to zero"
    return None


def _has_hooks(module: Any) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _has_any_global_hook()


def _why_in_steps(parts: SynapticParts, shape: torch.Size, dtype: torch.dtype) -> str | None:
    recurrent, weight = parts.recurrent, parts.weight
    if weight is None and type(recurrent) is torch.nn.Linear:
        return "weight or bias of its recurrent connection is no parameter"
    if weight is None:
        return f"its recurrent connection is a {type(recurrent).__name__}"
    if _has_hooks(recurrent):
        return "its recurrent connection has hooks"
    if len(shape) != 2:
        return f"its current {list(shape)} is not [B, N]"
    if weight.numel() != 1 and weight.shape[-1] != shape[-1]:
        return f"its recurrent weights are {list(weight.shape)}, its current {list(shape)}"
    if weight.dtype is not dtype:
        return f"its recurrent weights are {weight.dtype}, its current {dtype}"
    if type(recurrent) in ONE_TO_ONE and (weight.dim() > 1 or shape[-1] > MOST_ONE_TO_ONE):
        return f"its one-to-one connection of {shape[-1]} neurons, V {list(weight.shape)}, is not made a matrix"
    return None
