"""What a user chooses, and when dense is better.

`b_th` is the half-width of the band around the threshold whose neurons back-propagate: a positive number, inf for
ordinary dense back-propagation, or "auto" for the same share of surrogate mass in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sparse_backend import surrogate
from sparse_backend.ops import linear_leaky

BTh = float | str
BThSpec = BTh | Mapping[str, BTh]

#: active entries above this fraction of all are kept dense: their gradient is a dot product each, which matrix products
#: of all entries then overtake (layers of 1000; smaller ones and convolutions later)
MAX_ACTIVE = 0.4

#: the same on a GPU, where matrix products are better still
MAX_ACTIVE_CUDA = 0.25

#: active entries and spikes together above this fraction of all are kept dense where the current is dense anyway:
#: lists of so many cost more than they save, here and in what comes behind the layer
MAX_LISTED = 0.5

#: input events above this fraction of all go through a GEMM instead of row operations
MAX_INPUT = 0.25

#: a product of no more multiplications than that costs less than finding the events of its dense input
SMALL_PRODUCT = 1 << 19

#: a neuron layer with dense sequences, one step of which has at least the first of these bytes, runs as many steps at
#: once as make the second: the memory of more is new every time, and writing to it first costs more than all else
LARGE_STEP_BYTES, DENSE_BYTES = 1 << 20, 8 << 20

#: bytes of input and output that convolutions and pooling are given at once: more steps than that leave the cache
CHUNK_BYTES = 4 << 20

#: factor on CHUNK_BYTES where a convolution may run on events: the image before pooling is then never stored
EVENT_CHUNKS = 8

#: input events above this fraction of all go through torch's convolution where no pooling is behind it; with pooling
#: MAX_INPUT is the limit
MAX_CONVOLVED = 0.15

WEIGHT_RULES = {
    "by counts": linear_leaky.BY_COUNTS,
    "over spikes": linear_leaky.OVER_SPIKES,
    "over active": linear_leaky.OVER_ACTIVE,
}


def set_weight_rule(rule: str) -> None:
    """How weight gradients are summed from now on: "over spikes" of the input, "over active" entries where that is
    exact, or "by counts", whichever is cheaper (the default). The result is the same to rounding."""
    if rule not in WEIGHT_RULES:
        raise ValueError(f"rule: expected one of {sorted(WEIGHT_RULES)}, got {rule!r}")
    linear_leaky.weight_rule = WEIGHT_RULES[rule]


def check_b_th(b_th: Any, name: str = "b_th") -> BTh:
    """b_th as a float or "auto". Raises ValueError for anything else, zero, negative or NaN numbers included."""
    if isinstance(b_th, str):
        if b_th == "auto":
            return b_th
    else:
        try:
            value = float(b_th)
        except (TypeError, ValueError):
            value = math.nan
        if value > 0:
            return value
    raise ValueError(f"{name}: expected a positive number, inf or 'auto', got {b_th!r}. The paper uses 0.2.")


def resolve_b_th(b_th: BTh, spike_grad: surrogate.SpikeGrad) -> float:
    """The number a checked b_th stands for with this surrogate."""
    return surrogate.inspect(spike_grad).auto_b_th if isinstance(b_th, str) else float(b_th)


#: what to do about a surrogate whose automatic band is too wide
CURE_BROAD = "Use a steeper surrogate, or choose a number: b_th=0.2 is the paper's, made for fast_sigmoid(slope=100)."


def is_broad(b_th: float, threshold: float) -> bool:
    """Whether the band reaches down to rest: a neuron at V = 0 is active, so almost all are."""
    return b_th >= threshold


def why_broad(b_th: float) -> str:
    share = f"{100 * surrogate.AUTO_MASS:.0f} % of its surrogate's mass"
    if math.isinf(b_th):
        return f"no band holds {share}, whose integral diverges"
    return f"{share} needs the band |V - threshold| < {b_th:.3g}, in which neurons at rest lie too"


def reads_at_once(device: torch.device) -> bool:
    """Whether a number is there as soon as it is asked for. Where reading one waits for the device, plans are not made
    anew to see what was written through `.data`, which bumps no version, and counts stay where they are."""
    return device.type == "cpu"


def is_captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is recording: it has no numbers yet, and what is kept between calls is not looked at again
    when it is replayed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def has_numbers(x: torch.Tensor) -> bool:
    """Whether entries can be looked at: on the meta device there are none, while a graph is captured none yet."""
    return not (x.is_meta or is_captured(x))


def max_active(device: torch.device) -> float:
    """Above which fraction of active entries a layer runs densely there."""
    return MAX_ACTIVE_CUDA if device.type == "cuda" else MAX_ACTIVE


def is_crowded(n_active: int, n_spikes: int, entries: int, device: torch.device) -> bool:
    """Whether lists of so many of all entries are more than a layer with a dense current should have made."""
    return reads_at_once(device) and n_active + n_spikes > MAX_LISTED * entries


WHY_META = "tensors of the meta device have no numbers"
WHY_CROWDED = (
    f"its current is dense, and active neurons and spikes together are more than {100 * MAX_LISTED:.0f} % of it"
)


def why_active(device: torch.device) -> str:
    """Why a layer with a finite b_th runs densely."""
    return f"more than {100 * max_active(device):.0f} % of its neurons are active: a smaller b_th keeps fewer"
