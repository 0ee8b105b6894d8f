"""One call of a Norse neuron on the engine: inputs and states in, output and states out, for one step or for all."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, NamedTuple

import torch
from norse.torch.module.leaky_integrator import LILinearCell
from torch import Tensor
from torch.nn import Parameter

from sparse_backend import autocasting, policy
from sparse_backend.deferred import DeferredCurrent, WeightCache, is_finite, unusual
from sparse_backend.events import EventTensor
from sparse_backend.execute_lif import LIFResult, LIResult, run_li, run_lif
from sparse_backend.layer_state import LayerState
from sparse_backend.layers import LinearState, linear
from sparse_backend.tensorlike import TensorLike, dense_of
from sparse_backend.timefusion.recorder import Placeholder

from .for_norse_plan import KINDS, Kind, Plan, make_plan, parts_of
from .shared import check_weight, count, goes_dense, of_all_steps

_unsafe_view = torch.ops.aten._unsafe_view


class OwnWeights:
    """What a layer keeps of weights of its own, which `LinearState` keeps of a linear layer's."""

    __slots__ = ("input", "recurrent")

    def __init__(self) -> None:
        self.input, self.recurrent = LinearState(), LinearState()


class Call(NamedTuple):
    """One call's tensors, for one step or for all of them."""

    kind: Kind
    plan: Plan
    current: Any  # of the shape of the output
    steps: int | None  # None: a cell's call
    v: Tensor  # the states have the shape of the output of one step, as far as they are not broadcast
    i: Tensor | None
    z: Any  # spikes before, None where there were none
    recurrent: Tensor | None  # weights
    begins: bool  # whether this may be the first call of a sequence

    def run(self, layer: LayerState, record_states: bool = False) -> Any:
        """What Norse's forward returns: output, state. record_states: states of all steps, [T, ...]."""
        result = self.run_engine(layer, record_states)
        steps, shape, states = self.steps, self.plan.shape, {}
        output: Any
        if isinstance(result, LIResult):
            v_seq: Any = result.v_seq
            output = shaped(v_seq, self.current.shape)
        else:
            output, v_seq = shaped(result.spikes, self.current.shape), result.v_seq
        if record_states:
            sequence = self.current.shape
            v_seq = v_seq if self.kind.spikes else v_seq.clone()  # Norse's output and states are two tensors here
            states = {"v": shaped(v_seq, sequence), "i": shaped(result.i_seq, sequence)}
        else:
            readout = steps is None and not self.kind.spikes  # a cell's, whose output is its state
            states = {"v": output if readout else shaped(result.v_last, shape), "i": shaped(result.i_last, shape)}
            layer.last_mem = weakref.ref(states["v"])
        if not self.kind.synaptic:
            del states["i"]
        elif not self.current_learns():
            states["i"] = states["i"].detach()
        if self.kind.recurrent:
            states["z"] = output if steps is None else _copy(output) if record_states else _last(output, shape)
        return output, self.kind.state(**states)

    def run_engine(self, layer: LayerState, keep_states: bool) -> LIFResult | LIResult:
        kind, plan, steps = self.kind, self.plan, self.steps
        batch, neurons = plan.flat
        sizes = steps or 1, batch, neurons
        current = self._current(layer)
        neuron, v, i = plan.neuron_now(), self._flat(self.v), self._flat(self.i)
        if not kind.spikes:
            li = run_li(current, sizes, neuron, v, i, keep_states=keep_states)
            _count_readout(layer, li, sizes, plan, steps is not None)
            return li
        assert plan.spike_grad is not None
        z, recurrent = self.z, self.recurrent
        if z is not None:
            if z.shape != plan.flat:
                z = self._flat(dense_of(z))
            if steps is None:  # gathered over the steps, as the weights of a linear layer are
                i = i + linear(layer.weights.recurrent, recurrent, None, z)
                z = recurrent = None
        asked_dense = plan.why_dense is not None or goes_dense(layer)
        if recurrent is not None:
            recurrent = autocasting.rounded(recurrent)
        result = run_lif(
            current, sizes, neuron, v, i, plan.spike_grad, plan.b_th, recurrent=recurrent, z=z,
            keep_states=keep_states, max_active=policy.max_active(current.device), dense=asked_dense,
        )  # fmt: skip
        count(
            layer, result, steps or 1, math.prod(sizes), plan.b_th, plan.why_dense, plan.dtype.itemsize,
            in_time=steps is not None, asked_dense=asked_dense,
            of_events=type(current) is DeferredCurrent or recurrent is not None,
        )  # fmt: skip
        return result

    def current_learns(self) -> bool:
        """Whether the synaptic current has a gradient: it does not depend on the membrane, which begins with one."""
        causes = (self.current, self.i, self.plan.parts.tau_syn_inv)
        return self.kind.recurrent or any(
            cause.learns if isinstance(cause, TensorLike) else isinstance(cause, Tensor) and cause.requires_grad
            for cause in causes
        )

    def _flat(self, part: Tensor | None) -> Any:
        """A state as the engine takes it, [B, N]."""
        if part is None or part.shape == self.plan.flat:
            return part
        return part.expand(self.plan.shape).reshape(self.plan.flat)

    def _current(self, layer: LayerState) -> Any:
        """The current as the engine takes it: rows of N neurons."""
        current, neurons = self.current, self.plan.flat[1]
        layer.begins |= self.begins
        if type(current) is DeferredCurrent and current.is_deferred and current.shape[-1] == neurons:
            if self.steps is not None:
                current = of_all_steps(current)
            elif not self.kind.weighted:
                if layer.weights is None:
                    layer.weights = WeightCache()
                current.adopt(layer.weights)
            if type(current) is DeferredCurrent and current.is_deferred:
                check_weight(layer, current)
                return current
        current = dense_of(current)
        return current if current.dim() else current.reshape(1, neurons)


def prepare(module: Any, layer: LayerState, kind: Kind, input_: Any, state: Any, in_time: bool) -> Call | str:
    """A call, or why it has to be Norse's own. in_time: whether the first dimension of the input is time."""
    if type(input_) is Placeholder:
        input_ = input_.value()
    if autocasting.is_on():
        input_ = autocasting.widened(input_)
    reason = unusual() or _why_not_input(input_, in_time)
    if reason is not None:
        return reason
    before: Any = initial_state(module, input_, in_time and not kind.in_time) if state is None else state
    if not kind.takes(before):
        return f"its state is a {type(before).__name__}, not Norse's {kind.state.__name__}"
    if autocasting.is_on():
        before = type(before)(*map(autocasting.widened, before))
    current, recurrent, z = input_, None, None
    if kind.weighted:
        if layer.weights is None:
            layer.weights = OwnWeights()
        current = linear(layer.weights.input, module.input_weights, None, input_)
    shape = current.shape[1:] if in_time else current.shape
    fit = functools.partial(fitting, shape=shape, dtype=current.dtype, device=current.device)
    of_norse = state is None or is_initial(module, state, current.dtype)
    v = fit(before.v, of_norse=of_norse)
    i = fit(before.i, of_norse=of_norse) if kind.synaptic else None
    if v is None or (i is None and kind.synaptic):
        return f"its state does not fit a current {list(shape)} of {current.dtype}"
    if kind.recurrent:
        recurrent = module.recurrent_weights
        reason = why_not_recurrent(recurrent, shape, current, in_time)
        if reason is not None:
            return reason
        if not (in_time and state is None and begins_as_norse(module)):  # with no spikes at all
            z = before.z
            if type(z) is not EventTensor or z.shape != shape or z.dtype is not current.dtype:
                z = fit(z)
            if z is None:
                return f"its spikes before do not fit a current {list(shape)} of {current.dtype}"
    parts = parts_of(module, kind)
    known = shape, current.dtype, current.device, type(current) is DeferredCurrent and current.is_deferred
    plan: Plan | None = layer.plan
    begins = layer.last_mem is None or layer.last_mem() is not before.v  # not what was handed out last
    again = begins and policy.reads_at_once(current.device)
    if again or plan is None or not plan.is_for(parts, *known):
        plan = layer.plan = make_plan(layer, kind, parts, *known)
    if plan.why_framework is not None:
        return plan.why_framework
    return Call(kind, plan, current, current.shape[0] if in_time else None, v, i, z, recurrent, begins)


def _why_not_input(x: Any, in_time: bool) -> str | None:
    if not isinstance(x, TensorLike):
        if type(x) is not Tensor and type(x) is not Parameter:
            return f"its input is a {type(x).__name__}"
        if x.layout is not torch.strided:
            return "its input is a sparse tensor"
        if x.is_meta:
            return policy.WHY_META
    if in_time and (not x.dim() or not x.shape[0]):
        return "its input has no steps"
    return None


def begins_as_norse(module: Any) -> bool:
    """Whether the state of a call without one is Norse's own, whatever the input's values are."""
    fallback = getattr(module, "state_fallback", None)
    return getattr(fallback, "__func__", None) is getattr(type(module), "initial_state", None)


def initial_state(module: Any, input_: Any, of_lifted: bool) -> Any:
    """What a call without a state begins with, as Norse makes it. of_lifted: for one step of the input."""
    if of_lifted:
        input_ = torch.empty((), dtype=input_.dtype, device=input_.device).expand(input_.shape[1:])
    if type(module) is not LILinearCell:
        return module.state_fallback(input_)
    i = torch.zeros((input_.shape[0], module.hidden_size), dtype=input_.dtype, device=input_.device)
    return KINDS[LILinearCell].state(v=module.p.v_leak.detach().requires_grad_(), i=i)


def is_initial(module: Any, state: Any, dtype: torch.dtype) -> bool:
    """Whether a state of another dtype that a user gives is what `initial_state` makes: at rest, in float32."""
    v, i = state.v, getattr(state, "i", None)
    if not (type(v) is Tensor and v.dtype is torch.float32 is not dtype and policy.reads_at_once(v.device)):
        return False
    at_rest = v.detach() == torch.as_tensor(module.p.v_leak).detach().float()
    return bool(at_rest.all()) and (i is None or (type(i) is Tensor and not bool(i.detach().any())))


def fitting(
    part: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device, of_norse: bool = False
) -> Tensor | None:
    """A state for a current of this shape, which it may be broadcast to; None where Norse would promote or refuse it.

    of_norse: whether Norse has made it, in float32 for a current of any dtype.
    """
    part = dense_of(part)
    if type(part) is not Tensor and type(part) is not Parameter:
        return None
    if part.dtype is not dtype or part.device != device:
        if part.dim() and not (of_norse and part.device == device and part.dtype is torch.float32):
            return None
        part = part.to(device, dtype)
    if part.shape == shape:
        return part
    if part.dim() > len(shape):
        return None
    sizes = zip(reversed(part.shape), reversed(shape), strict=False)
    return part if all(size in (1, wanted) for size, wanted in sizes) else None


def why_not_recurrent(weight: Any, shape: torch.Size, current: Any, in_time: bool) -> str | None:
    if not isinstance(weight, Tensor) or weight.dtype is not current.dtype or weight.device != current.device:
        return f"its recurrent weights are not of {current.dtype} on {current.device}"
    if weight.shape != (shape[-1], shape[-1]):
        return f"its recurrent weights are {list(weight.shape)}, its current {list(shape)}"
    if in_time and not is_finite(weight):
        return "its recurrent weights are not finite, and their products with zeros count"
    return None


def shaped(x: Any, shape: torch.Size) -> Any:
    """Not a view: users detach_() states and outputs as they do any tensor."""
    if type(x) is EventTensor:
        return x if x.shape == shape else x.reshaped(shape)
    return x if x is None or (x.shape == shape and not x._is_view()) else _unsafe_view(x, shape)


def _copy(spikes: Any) -> Any:
    return spikes.reshaped(spikes.shape) if type(spikes) is EventTensor and spikes.is_events else spikes.clone()


def _last(spikes: Any, shape: torch.Size) -> Any:
    """The spikes of the last step."""
    if type(spikes) is not EventTensor or not spikes.is_events:
        return spikes[-1].clone()
    steps = spikes.shape[0]
    return spikes.some_steps(steps - 1, steps).reshaped(shape)


def _count_readout(layer: LayerState, result: LIResult, sizes: tuple[int, int, int], plan: Plan, in_time: bool) -> None:
    tally, entries = layer.tally, math.prod(sizes)
    layer.tally.path, layer.tally.reason = f"dense {'sequence' if in_time else 'step'}", "a readout has no spikes"
    tally.dense_steps += sizes[0]
    tally.at_once = max(tally.at_once, sizes[0])
    tally.entries += entries
    if result.kept:
        tally.kept += result.kept
        tally.dense_kept += entries * plan.dtype.itemsize
