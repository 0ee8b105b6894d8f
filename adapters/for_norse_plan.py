"""What Norse's neurons compute, read off a module's parameters: a dynamics entry of the engine, a surrogate, a band."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from norse.torch.functional import iaf as iaf_functions
from norse.torch.functional import leaky_integrator as li_functions
from norse.torch.functional import leaky_integrator_box as li_box_functions
from norse.torch.functional import lif as lif_functions
from norse.torch.functional import lif_box as lif_box_functions
from norse.torch.functional import reset as reset_functions
from norse.torch.module import iaf, leaky_integrator, leaky_integrator_box, lif, lif_box
from torch import Tensor

from sparse_backend import policy, surrogate
from sparse_backend.dynamics import LI, LIF, LIF_RESETS
from sparse_backend.layer_state import LayerState
from sparse_backend.ops import FLOATS

_RESETS = {reset_functions.reset_value: "value", reset_functions.reset_subtract: "subtract"}


class Kind(NamedTuple):
    """What one of Norse's classes computes."""

    step: Callable[..., Any]  #: Norse's own function for one step, which the engine stands in for
    home: ModuleType  #: where it is defined: its `threshold` is what decides and what has a derivative
    state: Any  #: the NamedTuple of its state
    in_time: bool = False  #: whether the first dimension of its input is time
    weighted: bool = False  #: whether it multiplies its input by weights of its own
    recurrent: bool = False

    @property
    def spikes(self) -> bool:
        return "threshold" in vars(self.home)

    def takes(self, state: Any) -> bool:
        """Whether it is a state of Norse's own for this class."""
        return type(state) is self.state

    @property
    def leaks(self) -> bool:
        return self.home is not iaf_functions

    @property
    def synaptic(self) -> bool:
        """Whether there is a synaptic current."""
        return "i" in self.state._fields


_LIF = Kind(lif_functions.lif_feed_forward_step, lif_functions, lif_functions.LIFFeedForwardState)
_RECURRENT = Kind(lif_functions.lif_step, lif_functions, lif_functions.LIFState, weighted=True, recurrent=True)
_BOX = Kind(lif_box_functions.lif_box_feed_forward_step, lif_box_functions, lif_box_functions.LIFBoxFeedForwardState)
_IAF = Kind(iaf_functions.iaf_feed_forward_step, iaf_functions, iaf_functions.IAFFeedForwardState)
_LI = Kind(li_functions.li_feed_forward_step, li_functions, li_functions.LIState)
_LI_BOX = Kind(li_box_functions.li_box_feed_forward_step, li_box_functions, li_box_functions.LIBoxState)

#: exactly these classes are accelerated
KINDS: dict[type, Kind] = {
    lif.LIFCell: _LIF,
    lif.LIF: _LIF._replace(in_time=True),
    lif.LIFRecurrentCell: _RECURRENT,
    lif.LIFRecurrent: _RECURRENT._replace(in_time=True),
    lif_box.LIFBoxCell: _BOX,
    iaf.IAFCell: _IAF,
    iaf.IAF: _IAF._replace(in_time=True),
    leaky_integrator.LICell: _LI,
    leaky_integrator.LI: _LI._replace(in_time=True),
    leaky_integrator.LILinearCell: Kind(li_functions.li_step, li_functions, li_functions.LIState, weighted=True),
    leaky_integrator_box.LIBoxCell: _LI_BOX,
}
if hasattr(lif_box, "LIFBox"):
    KINDS[lif_box.LIFBox] = _BOX._replace(in_time=True)
if hasattr(leaky_integrator_box, "LIBox"):
    KINDS[leaky_integrator_box.LIBox] = _LI_BOX._replace(in_time=True)


# The surrogate.


class Threshold:
    """Norse's own `threshold` with one method and alpha: spikes of v - v_th."""

    def __init__(self, function: Callable[..., Tensor], method: Any, alpha: Any) -> None:
        self.function, self.method, self.alpha = function, method, alpha

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, self.method, self.alpha)


@functools.lru_cache(maxsize=256)
def _threshold(
    function: Callable[..., Tensor], method: Any, alpha: float, as_tensor: tuple[Any, ...] | None
) -> Threshold:
    """One object per meaning, so that it is probed once. as_tensor: shape, dtype and device where alpha is a tensor."""
    if as_tensor is None:
        return Threshold(function, method, alpha)
    shape, dtype, device = as_tensor
    with torch.inference_mode(False):
        return Threshold(function, method, torch.full(shape, alpha, dtype=dtype, device=device))


def threshold_of(kind: Kind, method: Any, alpha: Any) -> Threshold:
    function = kind.home.threshold
    if not isinstance(alpha, Tensor):
        return _threshold(function, method, alpha, None)
    if alpha.numel() == 1:
        return _threshold(function, method, float(alpha), (alpha.shape, alpha.dtype, alpha.device))
    return Threshold(function, method, alpha)


# The parameters.


class Parts(NamedTuple):
    """Everything a user may change between calls that a plan depends on; None for what a neuron does not have."""

    tau_mem_inv: Any
    tau_syn_inv: Any
    v_leak: Any
    v_th: Any
    v_reset: Any
    method: Any
    alpha: Any
    reset_method: Any
    dt: Any
    step: Any


_OF_P = Parts._fields[:-2]  # what stands in `p`


def parts_of(module: Any, kind: Kind) -> Parts:
    p = module.p
    of_p = [getattr(p, name, None) for name in _OF_P]
    return Parts._make((*of_p, module.dt, getattr(module, "activation", kind.step)))


def _versions(parts: Parts) -> tuple[Any, ...]:
    return tuple(
        [
            (None if part.is_inference() else part._version, part.requires_grad)
            for part in parts
            if isinstance(part, Tensor)
        ]
    )


class Plan(NamedTuple):
    """What follows from a module's parts, as long as they are the same objects at the same versions."""

    parts: Parts
    versions: tuple[Any, ...]
    shape: torch.Size  # of the current of one step, and of the states
    dtype: torch.dtype
    device: torch.device
    deferred: bool
    why_framework: str | None
    flat: tuple[int, int]  # (B, N)
    neuron: LIF | LI | None  # None where it has to be made at each call, to learn
    make_neuron: Callable[[], Any]
    spike_grad: Threshold | None  # None: no spikes
    b_th: float
    why_dense: str | None

    def is_for(self, parts: Parts, shape: torch.Size, dtype: torch.dtype, device: torch.device, deferred: bool) -> bool:
        return (
            self.shape == shape
            and self.dtype is dtype
            and self.device == device
            and self.deferred is deferred
            and not any(map(operator.is_not, parts, self.parts))
            and _versions(parts) == self.versions
        )

    def neuron_now(self) -> Any:
        return self.make_neuron() if self.neuron is None else self.neuron


class _UnsupportedError(Exception):
    """Why the engine cannot run a neuron."""


def make_plan(
    layer: LayerState,
    kind: Kind,
    parts: Parts,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    deferred: bool,
) -> Plan:
    """deferred: whether the current is that of a linear layer, whose last dimension are its neurons."""
    by_columns = len(shape) <= 2 or kind.recurrent
    by_columns = by_columns or (deferred and all(p.dim() <= 1 for p in parts if isinstance(p, Tensor)))
    tail = shape[-1:] if by_columns else shape[1:]
    flat = (shape.numel() // max(1, tail.numel()), tail.numel())
    reason = _why_framework(kind, parts, shape, dtype)
    neuron: LIF | LI | None = None
    spike_grad, b_th, why_dense = None, math.inf, None
    make_neuron = functools.partial(_make_neuron, kind, parts, tail, dtype, device)
    if reason is None:
        try:
            with torch.inference_mode(False):
                neuron = make_neuron()
        except _UnsupportedError as why:
            reason = str(why)
    if reason is None and kind.spikes:
        spike_grad = threshold_of(kind, parts.method, parts.alpha)
        reason = surrogate.inspect(spike_grad).problem
        b_th = policy.resolve_b_th(layer.b_th, spike_grad)
        assert isinstance(neuron, LIF)
        rest = neuron.reset_to if neuron.leak is None else neuron.leak
        above_rest = float((neuron.threshold - rest).detach().min())
        if layer.b_th == "auto" and policy.is_broad(b_th, above_rest):
            why_dense = policy.why_broad(b_th)
    if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        neuron = None
    return Plan(
        parts, _versions(parts), shape, dtype, device, deferred, reason, flat, neuron, make_neuron, spike_grad, b_th,
        why_dense,
    )  # fmt: skip


def _why_framework(kind: Kind, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> str | None:
    """Why calls with these parts run Norse's own code; None where they need not."""
    if parts.step is not kind.step:
        name = getattr(parts.step, "__name__", type(parts.step).__name__)
        return f"its activation is {name}, not Norse's {kind.step.__name__}"
    if parts.reset_method is not None and parts.reset_method not in _RESETS:
        return "its reset_method is not one of Norse's"
    if dtype not in FLOATS:
        return f"its input is {dtype}, not float32 or float64"
    if not shape.numel():
        return f"its input has shape {list(shape)}"
    for name, part in zip(parts._fields, parts, strict=True):
        if isinstance(part, Tensor) and part.dim() > len(shape):
            return f"its {name} {list(part.shape)} has more dimensions than its input {list(shape)}"
    return None


def _make_neuron(kind: Kind, parts: Parts, tail: torch.Size, dtype: torch.dtype, device: torch.device) -> LIF | LI:
    def coefficient(name: str) -> Tensor:
        value = getattr(parts, name)
        part = _per_neuron(parts.dt * value if name.startswith("tau") else value, tail, dtype, device)
        if part is None:
            of = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise _UnsupportedError(f"its {name} is {of}, not one number, or one per neuron of {list(tail)}")
        given = isinstance(value, Tensor) and not part.requires_grad
        return part.clone() if given else part  # what is kept for the backward pass may be written to before

    mem_gain, leak = torch.ones((), dtype=dtype, device=device), None
    if kind.leaks:
        mem_gain, leak = coefficient("tau_mem_inv"), coefficient("v_leak")
    syn_decay = 1 - coefficient("tau_syn_inv") if kind.synaptic else None
    if not kind.spikes:
        return LI(mem_gain, syn_decay, leak)
    reset = "value" if parts.reset_method is None else _RESETS[parts.reset_method]
    return LIF(
        mem_gain, syn_decay, leak, coefficient("v_th"), coefficient("v_reset"), LIF_RESETS[reset], kind.recurrent
    )


def _per_neuron(value: Any, tail: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A parameter as [] or [N], differentiably; None where it is neither one number nor one per neuron."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=dtype, device=device) if isinstance(value, (int, float)) else None
    if not value.dim():
        return value.to(device, dtype)
    if value.device != device or torch.promote_types(value.dtype, dtype) is not dtype:
        return None
    if value.dim() > len(tail) and value.shape[0] != 1:
        return None
    part = value.to(dtype)
    if part.shape == tail and part.dim() == 1:
        return part
    if part.numel() == 1:
        return part.reshape(())
    try:
        return part.expand(1, *tail).reshape(-1)
    except RuntimeError:
        return None
