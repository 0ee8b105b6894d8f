"""Losses of spiking networks: cross entropy on a readout's membrane over time, and activity regularisers.

Plain torch functions for any model, enabled or not. Spikes of an enabled model stay events: their counts are summed
from the events, and the gradient goes to their active entries alone. A readout's membrane is dense as ever.

>>> import torch
>>> from sparse_backend import EventTensor, losses
>>> mem = torch.tensor([[[0.1, 0.9]], [[0.5, 0.2]]])  # [T, B, C]
>>> losses.max_over_time(mem)
tensor([[0.5000, 0.9000]])
>>> losses.cross_entropy_over_time(mem, torch.tensor([1]))
tensor(0.5130)
>>> spk = torch.tensor([[[1.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]])  # [T, B, N]; spikes per neuron: 2, 0, 1
>>> losses.lower_activity(spk, threshold=1, strength=3.0)  # one neuron in three is one spike short
tensor(1.)
>>> losses.upper_activity(EventTensor.from_dense(spk), threshold=0.5, strength=2.0)  # one spike on average
tensor(0.5000)
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_backend.arguments import check_tensors
from sparse_backend.events import EventTensor

__all__ = [
    "cross_entropy_over_time",
    "lower_activity",
    "max_over_time",
    "sum_over_time",
    "upper_activity",
]

_HALVES = (torch.float16, torch.bfloat16)


def max_over_time(mem: Tensor | Sequence[Tensor]) -> Tensor:
    """Scores [B, C]: the largest value of each output over the steps, to whose step the gradient goes.

    mem: [T, B, C] or a list of T tensors [B, C], floating point.
    Raises TypeError or ValueError naming the argument, what was expected and what was given.
    Source: Perez-Nieves & Goodman 2021, appendix E.4.
    """
    _check_steps("mem", mem, "[T, B, C]", 3)
    return (mem if isinstance(mem, Tensor) else torch.stack(list(mem))).max(dim=0).values


def sum_over_time(mem: Tensor | Sequence[Tensor]) -> Tensor:
    """Scores [B, C]: the sum of each output over the steps, in float32 where `mem` is of half precision.

    mem: [T, B, C] or a list of T tensors [B, C], floating point. Of spikes it is their counts, and EventTensors are not
    made dense.
    Raises TypeError or ValueError naming the argument, what was expected and what was given.
    Source: Perez-Nieves & Goodman 2021, appendix E.4, for the Spiking Heidelberg Digits.
    """
    _check_steps("mem", mem, "[T, B, C]", 3)
    return _sum(mem)


_POOLS = {"max": max_over_time, "sum": sum_over_time}


def cross_entropy_over_time(mem: Tensor | Sequence[Tensor], labels: Tensor, pool: str = "max") -> Tensor:
    """Cross entropy of the scores over time, averaged over the samples: a scalar.

    mem: [T, B, C] or a list of T tensors [B, C], floating point: a readout's membrane; labels: [B] integers in 0..C-1;
    pool: the scores are "max" or "sum" over time.
    Raises TypeError or ValueError naming the argument, what was expected and what was given. Labels outside 0..C-1 are
    found on a CPU; elsewhere torch's own assertion meets them, so that nothing waits for the device.
    Source: Perez-Nieves & Goodman 2021, appendix E.4.
    """
    if pool not in _POOLS:
        raise ValueError(f"pool: expected one of {sorted(_POOLS)}, got {pool!r}")
    scores = _POOLS[pool](mem)
    return F.cross_entropy(scores, _check_labels(labels, scores))


def lower_activity(spk: Tensor | Sequence[Tensor], threshold: float, strength: float) -> Tensor:
    """Pushes neurons that spike less than `threshold` times up: a scalar, to be added to the loss.

    ::

        strength / (B N) Σ_{b,i} max(0, threshold − ζ[b,i])²,    ζ[b,i] = Σ_t S[t,b,i]

    spk: spikes S of one layer, [T, B, N] (or [T, B, ...], its N neurons in any shape), dense or events, or a list of T
    steps, floating point; threshold: spikes per neuron and sample, over all steps; strength: weight of the term.
    Of an enabled model the gradient reaches a neuron at the steps at which it is active; one that never comes within
    b_th of its threshold gets none.
    Raises TypeError or ValueError naming the argument, what was expected and what was given.
    Source: the form of Zenke & Vogels 2021 (The remarkable robustness of surrogate gradient learning), which
    Perez-Nieves & Goodman 2021 follow in appendix E.4; there are others, this is the one used here.
    """
    counts, threshold, strength = _counts(spk, threshold, strength)
    return strength * (threshold - counts).clamp(min=0).square().mean()


def upper_activity(spk: Tensor | Sequence[Tensor], threshold: float, strength: float) -> Tensor:
    """Holds a layer that spikes more than `threshold` times per neuron down: a scalar, to be added to the loss.

    ::

        strength / B Σ_b max(0, (1 / N) Σ_i ζ[b,i] − threshold)²,    ζ[b,i] = Σ_t S[t,b,i]

    threshold: spikes per sample over all steps, averaged over the layer's neurons. The rest, errors and source as
    `lower_activity`.
    """
    counts, threshold, strength = _counts(spk, threshold, strength)
    return strength * (counts.mean(1) - threshold).clamp(min=0).square().mean()


def _counts(spk: Tensor | Sequence[Tensor], threshold: float, strength: float) -> tuple[Tensor, float, float]:
    """Spike counts ζ [B, N], and the two checked numbers."""
    _check_steps("spk", spk, "[T, B, N] or [T, B, ...]", None)
    threshold, strength = _check_number("threshold", threshold), _check_number("strength", strength)
    return _sum(spk).flatten(1), threshold, strength


def _sum(x: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum over the steps [T, ...]; nothing of that shape is made where they are events or a list."""
    if isinstance(x, Tensor):
        return x.sum(0, dtype=torch.float32) if x.dtype in _HALVES else x.sum(0)
    steps = [step.float() if step.dtype in _HALVES else step for step in x]
    events = [step for step in steps if _is_compact(step)]
    sums = [step for step in steps if not _is_compact(step)]
    if events:
        sums.append(EventTensor.stack(events).sum(0))
    return functools.reduce(operator.add, sums)  # additions, since time fusion knows a running sum


def _is_compact(step: Tensor) -> bool:
    return type(step) is EventTensor and step.is_events and (step.active_ptr is not None or not step.learns)


def _check_steps(name: str, x: Any, layout: str, dims: int | None) -> None:
    """A floating point sequence of this many dimensions, or of at least three, none of them empty."""
    if not isinstance(x, Tensor):
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name}: expected a tensor {layout} or a list of its T steps, got {type(x).__name__}")
        for t, step in enumerate(x):
            if not isinstance(step, Tensor):
                raise TypeError(f"{name}[{t}]: expected a tensor, got {type(step).__name__}")
            if step.shape != x[0].shape:
                raise ValueError(f"{name}[{t}]: expected {list(x[0].shape)} as the first step, got {list(step.shape)}")
    shape = x.shape if isinstance(x, Tensor) else (len(x), *(x[0].shape if x else ()))
    if 0 in shape:
        raise ValueError(f"{name}: expected {layout} without empty dimensions, got {list(shape)}")
    if len(shape) != dims if dims else len(shape) < 3:
        raise ValueError(
            f"{name}: expected {layout}, got {list(shape)}. A single sample is a batch of one: unsqueeze(1)"
        )
    for step in (x,) if isinstance(x, Tensor) else x:
        if not step.is_floating_point():
            raise TypeError(f"{name}: expected floating point numbers, got {step.dtype}. Convert them with .float()")


def _check_number(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    return number


def _check_labels(labels: Any, scores: Tensor) -> Tensor:
    """One class per row of the scores [B, C], as int64."""
    check_tensors(labels=labels)
    (batch, classes), device = scores.shape, scores.device
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected [{batch}], one class per sample, got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels: expected on {device} as mem, got {labels.device}. Move them: labels.to({device})")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= classes:
            raise ValueError(f"labels: expected classes 0..{classes - 1}, got {least}..{most}")
    return labels.long()
