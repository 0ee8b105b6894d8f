"""Norse's `Lift`: a linear layer or a cell of ours runs over all steps at once, anything else in Norse's own loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparse_backend.convolution import DeferredConvolution, as_events
from sparse_backend.deferred import unusual
from sparse_backend.enabling import state_of
from sparse_backend.events import EventTensor
from sparse_backend.layer_state import STATE
from sparse_backend.layers import own_forward
from sparse_backend.tensorlike import TensorLike
from sparse_backend.timefusion.recorder import Placeholder, paused

from .for_norse_call import begins_as_norse, prepare
from .for_norse_plan import KINDS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [vars(torch_module)[f"_global{name}"] for name in _HOOKS]


#: what has a sparse form for images that are events, sample by sample
_OF_IMAGES = {nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten}


class Steps:
    """A tensor as Norse's loop reads it, whose steps share one node in the graph: indexing T times would write T
    gradients of the whole sequence."""

    __slots__ = ("shape", "steps")

    def __init__(self, x: Tensor) -> None:
        self.shape, self.steps = x.shape, x.unbind(0)

    def __getitem__(self, t: int) -> Tensor:
        return self.steps[t]


def lift_forward(module: Any, x: Any) -> Any:
    """An enabled `Lift`'s forward."""
    if torch.compiler.is_compiling():
        return own_forward(module)(module, x)
    sequence, state = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    if type(sequence) is Placeholder:
        sequence = sequence.value()
    if unusual() is None and isinstance(sequence, Tensor) and sequence.dim() > 1 and sequence.shape[0]:
        result = _at_once(module, module.lifted_module, sequence, state)
        if result is not None:
            return result
        if isinstance(sequence, TensorLike):
            sequence = sequence if type(sequence) is EventTensor else sequence.to_dense()
        if type(sequence) is Tensor and sequence.requires_grad and sequence.layout is torch.strided:
            sequence = Steps(sequence)
        x = (sequence, state) if isinstance(x, tuple) else sequence
    return own_forward(module)(module, x)


def patched_lift_forward(_: Any, module: Any, x: Any) -> Any:
    return lift_forward(module, x)


def _at_once(module: Any, inner: Any, sequence: Any, state: Any) -> Any:
    """The lifted module over all steps in one call; None where it has to be called step by step."""
    if any(getattr(inner, name) for name in _HOOKS) or any(_GLOBAL_HOOKS):
        return None
    if "forward" in inner.__dict__ and STATE not in inner.__dict__:
        return None
    if type(inner) is nn.Linear:
        return inner(sequence)
    if type(inner) in _OF_IMAGES:
        return _of_images(inner, sequence)
    kind = KINDS.get(type(inner))
    layer = state_of(inner)
    if kind is None or kind.in_time or layer is None or not module.is_stateful:
        return None
    if state is None and not begins_as_norse(inner):
        return None
    call = prepare(inner, layer, kind, sequence, state, True)
    return None if isinstance(call, str) else call.run(layer)


def _of_images(inner: Any, sequence: Any) -> Any:
    """A module over all steps of images [T, B, C, H, W] that are events; None where they are not, since a dense
    convolution of all steps at once leaves the cache."""
    if len(sequence.shape) != 5 or not sequence.numel():
        return None
    lead = sequence.shape[:2]
    samples = sequence.reshape(lead.numel(), *sequence.shape[2:])
    if type(inner) is nn.Conv2d:
        samples = as_events(samples)
    if type(samples) is not EventTensor and type(samples) is not DeferredConvolution:
        return None
    if type(inner) is nn.Flatten and inner.start_dim < 1:
        return None
    with paused():
        result = inner(samples)
    return result.reshape(*lead, *result.shape[1:])
