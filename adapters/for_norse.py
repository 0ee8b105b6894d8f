"""Norse: LIF, LIFBox, IAF and recurrent LIF neurons, LI readouts and Lift run on the engine, as cells and in time.

Every other neuron, and every option not named here, runs Norse's own code. What a call accepts and returns is Norse's
to the letter: spikes and a state of Norse's own class, through which gradients flow.
"""

from __future__ import annotations

import math
from typing import Any

import norse.torch
import torch
from norse.torch.module.coba_lif import CobaLIFCell
from norse.torch.module.leaky_integrator import LILinearCell
from norse.torch.module.lif_correlation import LIFCorrelation
from norse.torch.module.lift import Lift
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell

from sparse_backend import autocasting, tensorlike
from sparse_backend.layer_state import STATE, LayerState, NoState
from sparse_backend.layers import is_surrounded, own_forward
from sparse_backend.timefusion import recorder
from sparse_backend.timefusion.buffers import Buffer

from .for_norse_call import prepare
from .for_norse_fused import record
from .for_norse_lift import lift_forward, patched_lift_forward
from .for_norse_plan import KINDS, Threshold, threshold_of

_NEURONS = (SNNCell, SNN, SNNRecurrentCell, SNNRecurrent, LILinearCell, CobaLIFCell, LIFCorrelation)


# What `enabling` asks of an adapter.


def is_neuron(module: torch.nn.Module) -> bool:
    """Whether the report should list it."""
    return isinstance(module, _NEURONS)


def why_not(module: torch.nn.Module) -> str | None:
    """Why a neuron is never accelerated; None where it may be."""
    kind = type(module)
    if kind in KINDS:
        return None
    for base in KINDS:
        if isinstance(module, base):
            return f"{kind.__name__} is a subclass of norse.torch.{base.__name__} and may differ from it"
    known = getattr(norse.torch, kind.__name__, None) is kind
    return f"norse.torch.{kind.__name__} is not accelerated yet" if known else f"{kind.__name__} is not Norse's own"


def has_spikes(module: torch.nn.Module) -> bool:
    """Whether a neuron that may be accelerated spikes, so that there is a b_th to choose."""
    kind = KINDS.get(type(module))
    return kind is not None and kind.spikes


def spike_grad(module: Any) -> Threshold | None:
    """None where there are no spikes."""
    return threshold_of(KINDS[type(module)], module.p.method, module.p.alpha) if has_spikes(module) else None


def lowest_threshold(module: Any) -> float:
    """The lowest threshold above rest."""
    threshold, rest = torch.as_tensor(module.p.v_th), torch.as_tensor(getattr(module.p, "v_leak", module.p.v_reset))
    return float(threshold.detach().min() - rest.detach().max()) if threshold.numel() and rest.numel() else math.inf


def prepare_to_trace(module: Any, state: LayerState) -> None:
    """torch.compile traces Norse's own code."""


def forward_of(module: torch.nn.Module) -> Any:
    """The forward of an enabled neuron."""
    return _enabled_forward


def _enabled_forward(module: Any, input_tensor: Any, state: Any = None) -> Any:
    layer = module.__dict__[STATE]
    if not torch.compiler.is_compiling():
        if autocasting.is_on():
            input_tensor = autocasting.widened(input_tensor)
        into, kind = recorder.current(), KINDS.get(type(module))
        if into is not None and kind is not None and not kind.in_time and not is_surrounded(module):
            recorded = record(into, module, layer, kind, input_tensor, state)
            if recorded is not None:
                return recorded
    return _forward(module, layer, input_tensor, state)


def _patched_forward(state_for: Any, module: Any, input_tensor: Any, state: Any = None) -> Any:
    return _forward(module, None if torch.compiler.is_compiling() else state_for(module), input_tensor, state)


def _forward(module: Any, layer: Any, input_: Any, state: Any) -> Any:
    if torch.compiler.is_compiling():
        return own_forward(module)(module, input_, state)
    kind = KINDS.get(type(module))
    if kind is None:
        return _framework(module, layer, f"its class became {type(module).__name__} after enable", input_, state)
    if type(input_) is Buffer:  # a tensor that a recorded loop fills
        input_ = input_.to_dense()
    call = prepare(module, layer, kind, input_, state, kind.in_time)
    if isinstance(call, str):
        return _framework(module, layer, call, input_, state, in_time=kind.in_time)
    return call.run(layer, kind.in_time and getattr(module, "record_states", False))


def _framework(module: Any, layer: LayerState, reason: str, input_: Any, state: Any, *, in_time: bool = False) -> Any:
    layer.tally.path, layer.tally.reason = "framework", reason
    layer.tally.framework_steps += input_.shape[0] if in_time and getattr(input_, "shape", None) else 1
    return own_forward(module)(module, *tensorlike.dense((input_, state)))


#: modules that are not neurons but run better for them: class -> forward and state
CONTAINERS = {Lift: (lift_forward, NoState)}

#: classes whose `forward` is replaced by `patch`, and by what: called with how to find a module's state first
PATCHED = {**dict.fromkeys(KINDS, _patched_forward), Lift: patched_lift_forward}
