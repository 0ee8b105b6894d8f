"""A convolution of events that nobody has looked at yet.

A convolution fed with events hands one back, and so does pooling of it: both run as one op when the current is wanted,
so that the image before pooling is never made. Anything but pooling and a change of shape makes it a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparse_backend import _native, autocasting, policy
from sparse_backend.deferred import WeightHub, is_finite, unusual
from sparse_backend.events import EventTensor
from sparse_backend.ops import FLOATS
from sparse_backend.ops.event_conv import AVERAGE_POOL, MAX_POOL, NO_POOL, Geometry, call_event_conv
from sparse_backend.ops.events_pool import events_pool
from sparse_backend.tensorlike import TensorLike, implements, shaped, undisturbed

_MOST_OF_WINDOW = 256  #: the place of a maximum in its window is kept in one byte


class DeferredConvolution(TensorLike):
    """events [..., C, H, W], weight [O, C, kh, kw], bias [O] -> current [..., O, H', W'], when somebody asks."""

    __slots__ = ("_dense", "_learns", "_view_of", "dtype", "events", "geometry", "hub", "shape")

    def __init__(self, events: EventTensor, hub: WeightHub, geometry: Geometry, lead: Sequence[int]) -> None:
        """lead: the dimensions before the image's, as many rows as the events have."""
        self.events, self.hub, self.geometry = events, hub, geometry
        weight = hub.given
        self.shape = torch.Size((*lead, weight.shape[0], *geometry.of_output(weight)))
        self.dtype = weight.dtype
        self._dense: Tensor | None = None
        self._view_of: DeferredConvolution | None = None
        self._learns = torch.is_grad_enabled()

    @property
    def device(self) -> torch.device:
        return self.hub.given.device

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self._learns and (self.hub.learns or self.events.learns)

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        if self._dense is None:
            # In the grad mode it was made in, not that of its first reader.
            with torch.set_grad_enabled(self._learns), undisturbed(inference=not self._learns):
                if self._view_of is not None:
                    self._dense = self._view_of.to_dense().view(self.shape)
                else:
                    self._dense = shaped(self._convolved(), self.shape)
        return self._dense

    def _convolved(self) -> Tensor:
        """[R, entries of a row of the output]"""
        events, hub = self.events, self.hub
        hub.check_unchanged()
        if self.geometry.pool == NO_POOL and events.density > policy.MAX_CONVOLVED:
            of = hub.given if hub.given._base is None else hub.given._base
            paths[of] = f"more than {100 * policy.MAX_CONVOLVED:.0f} % of its input is not zero, and nothing pools it"
            shape = torch.Size((events.rows, *events.shape[-3:]))
            images = events.reshaped(shape).to_dense()  # as they were when it was called
            return self.geometry.convolve(images, hub.weight, hub.bias).flatten(1)
        return call_event_conv(
            events.row_ptr, events.indices, events.values, events.handle, events.active_ptr, events.active_indices,
            hub.weight, hub.bias, *self.geometry, self.learns,
        )[0]  # fmt: skip

    def pooled(self, pool: int, kernel: tuple[int, int]) -> DeferredConvolution | None:
        """Windows side by side of this; None where that is not one more step of the op."""
        geometry, (height, width) = self.geometry, self.shape[-2:]
        looked_at = self._dense is not None or (self._view_of is not None and self._view_of._dense is not None)
        if geometry.pool != NO_POOL or looked_at:
            return None
        if not (0 < kernel[0] <= height and 0 < kernel[1] <= width and kernel[0] * kernel[1] <= _MOST_OF_WINDOW):
            return None
        geometry = geometry._replace(pool=pool, pool_h=kernel[0], pool_w=kernel[1])
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            return DeferredConvolution(self.events, self.hub, geometry, self.shape[:-3])

    def as_view(self, shape: torch.Size) -> DeferredConvolution | None:
        """The same images under other leading dimensions."""
        if shape[-3:] != self.shape[-3:] or self._dense_only:
            return None
        view = DeferredConvolution(self.events, self.hub, self.geometry, shape[:-3])
        view._learns = self._learns and torch.is_grad_enabled()
        view._view_of = self if self._view_of is None else self._view_of
        return view

    def __repr__(self) -> str:
        return f"DeferredConvolution(shape={list(self.shape)}, from={self.events!r})"


def available(device: torch.device) -> bool:
    """Whether convolutions of events run faster than torch's: kernels for them are there."""
    return device.type == "cpu" and _native.load()


#: weights of convolutions that have run -> why torch's own ran, None where it ran on events
paths: WeakIdKeyDictionary = WeakIdKeyDictionary()


def convolve(
    events: EventTensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> DeferredConvolution | str:
    """The convolution of images that are events, or why torch's own has to run. Options as `conv2d` takes them."""
    if weight.dim() != 4 or events.columns != events.shape[-3:].numel():
        return "its input's rows are not images"
    if groups != 1:
        return "it has groups"
    if events.shape[-3] != weight.shape[1]:
        return f"its input has {events.shape[-3]} channels, its weight {weight.shape[1]}"
    if events.dtype != weight.dtype or weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, its input {events.dtype}"
    if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
        return "its bias is not like its weight"
    if events.device != weight.device or not available(weight.device):
        return "it has no kernels here"
    if events.learns and events.active_ptr is None:
        return "every entry of its input has a gradient"
    if not events.numel() or not weight.numel() or events.density > policy.MAX_INPUT:
        return _WHY_BUSY
    if not is_finite(weight):
        return "its weight is not finite"
    sizes = _sizes(weight, stride, padding, dilation)
    height, width = events.shape[-2:]
    geometry = None if sizes is None else Geometry(height, width, *sizes)
    if geometry is None or min(geometry.of_convolution(weight)) < 1:
        return f"of its stride {stride}, padding {padding} and dilation {dilation}"
    if not torch.is_grad_enabled():
        events = events.without_handle() if events.learns else events
    # Views, which require grad as it is now, whatever it is when the current is wanted.
    weight, bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)
    return DeferredConvolution(events, WeightHub(weight, bias, None, 0), geometry, events.shape[:-3])


_WHY_BUSY = f"more than {100 * policy.MAX_INPUT:.0f} % of its input is not zero"


def why_dense(images: Any) -> str:
    """Why images that are no events are none."""
    if isinstance(images, Tensor) and images.requires_grad:
        return "its input is dense and has a gradient: neurons ran densely, or a layer behind them is not on events"
    return _WHY_BUSY if available(images.device) else "it has no kernels here"


def _sizes(weight: Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """Stride, padding and dilation as numbers, down and across each; None where they are not what kernels take."""
    steps, gaps = _pair(stride), _pair(dilation)
    if steps is None or gaps is None or min(*steps, *gaps) < 1:
        return None
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
        if any(size % 2 for size in reach) or steps != (1, 1):
            return None  # more on one side than on the other
        padding = tuple(size // 2 for size in reach)
    edges = _pair(padding)
    return None if edges is None or min(edges) < 0 else (*steps, *edges, *gaps)


def pool(spikes: EventTensor, average: bool, kernel: tuple[int, int]) -> EventTensor | None:
    """Windows side by side of images whose spikes are events; None where torch's own pooling has to run.

    The gradient of a maximum reaches the first of equals, as torch has it: of spikes the first, of none the corner.
    """
    if spikes.values is not None or spikes.columns != spikes.shape[-3:].numel() or spikes.dtype not in FLOATS:
        return None
    if (spikes.learns and spikes.active_ptr is None) or not spikes.numel() or not available(spikes.device):
        return None
    channels, height, width = spikes.shape[-3:]
    if not (0 < kernel[0] <= height and 0 < kernel[1] <= width):
        return None
    handle = spikes.handle if torch.is_grad_enabled() and spikes.learns else None
    active = (None, None) if handle is None else (spikes.active_ptr, spikes.active_indices)
    row_ptr, indices, counts, active_ptr, active_indices, slot = events_pool(
        spikes.row_ptr, spikes.indices, *active, channels, height, width, *kernel, average
    )
    share = 1 / (kernel[0] * kernel[1])
    if handle is not None:
        size = active_indices.shape[0]
        handle = handle.new_zeros(size + 1).index_add(0, slot, handle, alpha=share if average else 1)[:size]
    pooled = torch.Size((channels, height // kernel[0], width // kernel[1]))
    return EventTensor(
        (*spikes.shape[:-3], *pooled),
        row_ptr,
        indices,
        counts.to(spikes.dtype) * share if average else None,
        handle=handle,
        active_ptr=None if handle is None else active_ptr,
        active_indices=None if handle is None else active_indices,
        dtype=spikes.dtype,
        columns=pooled.numel(),
        check=False,
    )


def as_events(images: Any, weights: Sequence[Tensor] = ()) -> Any:
    """Images [R, C, H, W] as events where few of their entries are nonzero and none has a gradient. weights: of the
    convolution they are for."""
    events = None
    if can_be_events(images):
        events = EventTensor.if_sparse(images, policy.MAX_INPUT, 3)
    elif type(images) is EventTensor:
        return images
    if events is None:
        for weight in weights[:1]:
            if weight.dim() == 4:  # and no bias
                paths[weight] = why_dense(images)
    return images if events is None else events


def can_be_events(images: Any) -> bool:
    """Whether a plain tensor may be read as events of images."""
    return (
        type(images) is Tensor
        and images.dim() == 4
        and images.dtype in FLOATS
        and not images.requires_grad
        and images.layout is torch.strided
        and images.numel() > 0
        and available(images.device)
    )


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(type(part) is int for part in value):
        return value[0], value[-1]
    return None


def _is_usual() -> bool:
    """Whether ops of ours may stand in for torch's in the running call."""
    return not (torch.compiler.is_compiling() or autocasting.is_on() or unusual() is not None)


@implements(torch.conv2d)
def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Any:
    """`conv2d` of spikes of ours, wherever it is called from."""
    if type(input) is not EventTensor or not input.is_events or len(input.shape) != 4 or not _is_usual():
        return NotImplemented
    if not isinstance(weight, Tensor) or isinstance(weight, TensorLike) or isinstance(bias, TensorLike):
        return NotImplemented
    current = convolve(input, weight, bias, stride, padding, dilation, groups)
    paths[weight] = current if isinstance(current, str) else None
    return NotImplemented if isinstance(current, str) else current


@implements(torch.max_pool2d, F.max_pool2d)
def _max_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if _pair(dilation) != (1, 1) or return_indices:
        return NotImplemented
    return _pool(input, MAX_POOL, kernel_size, stride, padding, ceil_mode)


@implements(F.avg_pool2d)
def _avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if divisor_override is not None:
        return NotImplemented
    return _pool(input, AVERAGE_POOL, kernel_size, stride, padding, ceil_mode)


def _pool(input: Any, kind: int, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Any:
    """Pooling of spikes, or of a convolution of them, whose windows lie side by side."""
    kernel = _pair(kernel_size)
    if kernel is None or ceil_mode or _pair(padding) != (0, 0):
        return NotImplemented
    if stride is not None and stride != [] and _pair(stride) != kernel:
        return NotImplemented
    result = None
    if type(input) is DeferredConvolution:
        result = input.pooled(kind, kernel)
    elif type(input) is EventTensor and input.is_events and len(input.shape) == 4 and _is_usual():
        result = pool(input, kind == AVERAGE_POOL, kernel)
    return NotImplemented if result is None else result
