"""How an op keeps its tensors for the backward: columns of events in 8 or 16 bits, if nobody else holds them.

Kernels read int32 columns. Between forward and backward nobody reads them, and they are half of what a sparse layer
keeps: long lists that this package has made wait as uint8 or int16, each once however many layers keep it. A list of
the caller's stays as it is, since a copy beside it would save nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: the shortest list that is converted: a step's is not worth the calls
LEAST = 1 << 16

_NARROW = {torch.uint8: 1 << 8, torch.int16: 1 << 15}  # dtype -> how many columns it tells apart

#: long lists made here, as long as they live -> the dtype they are kept in, and what is kept of them, None before
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def made(columns: int, *lists: Tensor) -> None:
    """Tell that this package has made these int32 lists, of entries below `columns`."""
    for indices in lists:
        if type(indices) is Tensor and indices.shape[0] >= LEAST and (dtype := _dtype(columns)) in _NARROW:
            _made[indices] = dtype, None


def bytes_of(entries: int, columns: int) -> int:
    """What a list made here takes while it is kept."""
    return entries * (_dtype(columns).itemsize if entries >= LEAST else 4)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`; read with `saved`."""
    ctx.narrowed = None
    if _made:  # no list is long in step form, which is called most
        kept = tuple(map(_narrow, tensors))
        ctx.narrowed = [narrow is not tensor for narrow, tensor in zip(kept, tensors, strict=True)]
        tensors = kept
    ctx.absent = [at for at, tensor in enumerate(tensors) if tensor is None]
    ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])  # who draws a graph asks their sizes


def saved(ctx: Any) -> tuple[Any, ...]:
    """`ctx.saved_tensors`, as they were."""
    tensors = list(ctx.saved_tensors)
    for at in ctx.absent:
        tensors.insert(at, None)
    if ctx.narrowed is None:
        return tuple(tensors)
    kept = zip(tensors, ctx.narrowed, strict=True)
    return tuple([tensor.to(torch.int32) if narrowed else tensor for tensor, narrowed in kept])


def _dtype(columns: int) -> torch.dtype:
    return next((dtype for dtype, most in _NARROW.items() if columns <= most), torch.int32)


def _narrow(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or type(tensor) is not Tensor or tensor.dtype is not torch.int32 or tensor.numel() < LEAST:
        return tensor
    known = _made.get(tensor)
    if known is None:
        return tensor
    dtype, narrow = known
    if narrow is None:
        narrow = tensor.to(dtype)
        _made[tensor] = dtype, narrow
    return narrow
