"""Checks of the arguments of the sequence functions, each an error naming the argument, what was expected and given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_backend import policy
from sparse_backend.autocasting import NARROW, dtype_of, lowered, rounded, widened
from sparse_backend.deferred import DeferredCurrent, WeightHub, is_finite
from sparse_backend.events import EventTensor
from sparse_backend.ops import FLOATS, keeping
from sparse_backend.reference.linear_leaky import sums_dtype
from sparse_backend.surrogate import SpikeGrad, inspect


def check_tensors(optional: tuple[str, ...] = (), **tensors: Any) -> None:
    """Raise TypeError for what is not a tensor; those named in `optional` may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_like(like: Tensor, **others: Tensor | None) -> None:
    """All float32 or float64 as `like`, and on its device; half or bfloat16 too on CUDA."""
    if like.dtype not in FLOATS and not (like.device.type == "cuda" and like.dtype in NARROW):
        raise TypeError(f"weight: expected float32 or float64, got {like.dtype}")
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} as the other tensors, got {other.dtype}")
        if other.device != like.device:
            raise ValueError(f"{name}: expected on {like.device} as the other tensors, got {other.device}")


def check_state(name: str, state: Tensor | None, batch: int, neurons: int) -> None:
    if state is not None and state.shape != (batch, neurons):
        raise ValueError(f"{name}: expected [{batch}, {neurons}], got {list(state.shape)}")


def check_recurrent(current: Tensor, recurrent: Tensor | None, before: Tensor | None, name: str) -> Tensor | None:
    """Recurrent weights [N, N] as autocast rounds them. before: the spikes [B, N] they meet first, called `name`."""
    _, batch, neurons = current.shape
    check_tensors(("recurrent", name), **{"recurrent": recurrent, name: before})
    if recurrent is not None and recurrent.shape != (neurons, neurons):
        raise ValueError(f"recurrent: expected [{neurons}, {neurons}], got {list(recurrent.shape)}")
    if before is not None and recurrent is None:
        raise ValueError(f"{name}: expected None without recurrent weights, got a tensor")
    check_state(name, before, batch, neurons)
    if recurrent is not None:
        recurrent = rounded(widened(recurrent))
    check_like(current, **{"recurrent": recurrent, name: before})
    return recurrent


def check_reset(reset: Any, known: dict[str, int]) -> int:
    if reset not in known:
        raise ValueError(f"reset: expected one of {sorted(known)}, got {reset!r}")
    return known[reset]


def check_steps(current: Tensor) -> tuple[int, int, int]:
    """The sizes of a sequence [T, B, N] of at least one step."""
    if current.shape[0] == 0:
        raise ValueError(f"T: expected at least one step, got a sequence of shape {list(current.shape)}")
    steps, batch, neurons = current.shape
    return steps, batch, neurons


def check_neurons(
    current: Tensor, coefficients: dict[str, Any], optional: tuple[str, ...], **states: Tensor | None
) -> tuple[tuple[int, int, int], list[Any]]:
    """A sequence's sizes, and `coefficients` as tensors; those named in `optional` may be None, as may the states."""
    shape = check_steps(current)
    _, batch, neurons = shape
    check_tensors(tuple(states), **states)
    for name, state in states.items():
        check_state(name, state, batch, neurons)
    tensors = {
        name: None if value is None and name in optional else per_neuron(name, value, current, neurons)
        for name, value in coefficients.items()
    }
    check_like(current, **tensors, **states)
    return shape, list(tensors.values())


def check_surrogate(spike_grad: SpikeGrad, b_th: policy.BTh) -> float:
    """b_th as a number, for a surrogate that may be evaluated on single entries."""
    width = policy.resolve_b_th(policy.check_b_th(b_th), spike_grad)
    problem = inspect(spike_grad).problem
    if problem is not None:
        raise ValueError(f"spike_grad: expected the step function with a fixed elementwise derivative, but {problem}")
    return width


def per_neuron(name: str, value: float | Tensor, like: Tensor, neurons: int) -> Tensor:
    """A number or tensor as a tensor [] or [N]."""
    try:
        if isinstance(value, (int, float)):  # filled where it is: a copy there would wait for the device
            return torch.full((), value, dtype=like.dtype, device=like.device)
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number or a tensor, got {value!r}") from None
    if tensor.numel() == 1:
        return tensor.reshape(())
    if tensor.numel() != neurons or neurons == 1:
        expected = "one entry" if neurons == 1 else f"one entry or {neurons}"
        raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")
    return tensor.reshape(neurons).contiguous()


def linear_current(x: EventTensor | Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | DeferredCurrent:
    """The current x W^T + b of a sequence [T, B, M], deferred where x is sparse enough.

    It is float32 where the weight is half or bfloat16, or made so by autocast.
    """
    check_tensors(("bias",), x=x, weight=weight, bias=bias)
    if x.dim() != 3:
        raise ValueError(f"x: expected [T, B, M], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight: expected [N, {x.shape[2]}] for x {list(x.shape)}, got {list(weight.shape)}")
    neurons = weight.shape[0]
    if bias is not None and bias.shape != (neurons,):
        raise ValueError(f"bias: expected [{neurons}], got {list(bias.shape)}")
    check_like(weight, bias=bias)
    if x.device != weight.device:
        raise ValueError(f"x: expected on {weight.device} as weight, got {x.device}. Move it: x.to({weight.device})")
    weight, given = lowered(weight, dtype_of(weight)), weight
    fits = x.dtype == given.dtype or (weight is not given and x.dtype in NARROW)
    if type(x) is not EventTensor and x.is_floating_point() and not fits:
        raise TypeError(f"x: expected {given.dtype} as weight, got {x.dtype}")
    if type(x) is EventTensor and x.columns != x.shape[2]:
        x = x.to_dense()
    events = EventTensor.from_dense(x)
    if events is not x:
        keeping.made(events.columns, (events.row_ptr, events.indices))
    events = events.to(weight.dtype) if weight.dtype in FLOATS else _with_float_values(events)
    # how long the list is needs no waiting for the device
    crowded = events.indices.numel() > policy.MAX_INPUT * events.numel() and not policy.is_captured(weight)
    crowded = crowded and events.density > policy.MAX_INPUT  # which a capture has no number for
    if crowded or not is_finite(weight):
        dense = events.to_dense() if type(x) is EventTensor else x
        return torch.nn.functional.linear(dense.to(weight.dtype), weight, bias).to(sums_dtype(weight))
    return DeferredCurrent(events, WeightHub(weight, None if bias is None else widened(bias).contiguous(), None, 0))


def _with_float_values(events: EventTensor) -> EventTensor:
    """The same events, their values float32; whatever gradients arrive at keeps its dtype."""
    if events.values is None or events.values.dtype == torch.float32:
        return events
    return EventTensor(
        events.shape,
        events.row_ptr,
        events.indices,
        events.values.float(),
        handle=events.handle,
        active_ptr=events.active_ptr,
        active_indices=events.active_indices,
        dtype=torch.float32,
        check=False,
    )


def given_current(current: Any) -> Tensor:
    """A current [T, B, N] as a contiguous tensor."""
    check_tensors(current=current)
    if current.dim() != 3:
        raise ValueError(f"current: expected [T, B, N], got {list(current.shape)}. Flatten what follows the batch")
    current = widened(current.to_dense() if type(current) is EventTensor else current.contiguous())
    if current.dtype not in FLOATS:
        raise TypeError(f"current: expected float32 or float64, got {current.dtype}")
    return current
