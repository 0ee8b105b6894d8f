"""How an op keeps its tensors for the backward: lists of events in 8 or 16 bits, if nobody else holds them.

Kernels read int32 columns, and int32 pointers to where a row's columns begin. Between forward and backward nobody reads
them, and they are half of what a sparse layer keeps: long lists that this package has made wait as uint8 or int16,
pointers as how many events each row has, each once however many layers keep it. A list of the caller's stays as it is,
since a copy beside it would save nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: the shortest list that is converted: a step's is not worth the calls
LEAST = 1 << 16

_NARROW = {torch.uint8: 1 << 8, torch.int16: 1 << 15}  # dtype -> how many numbers from 0 on it tells apart


class _Form(NamedTuple):
    """How a list waits."""

    dtype: torch.dtype
    is_pointers: bool

    def narrow(self, wide: Tensor) -> Tensor:
        return (wide.diff() if self.is_pointers else wide).to(self.dtype)

    def wide(self, narrow: Tensor) -> Tensor:
        if not self.is_pointers:
            return narrow.to(torch.int32)
        pointers = narrow.new_zeros(narrow.shape[0] + 1, dtype=torch.int32)
        torch.cumsum(narrow, 0, dtype=torch.int32, out=pointers[1:])
        return pointers


#: long lists made here, as long as they live -> their form, and what is kept of them, None before
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def made(columns: int, *lists: tuple[Tensor, Tensor]) -> None:
    """Tell that this package has made these lists of events in rows of `columns`: pointers from 0 on, and columns."""
    for pointers, indices in lists:
        _add(indices, indices.shape[0], _Form(_dtype(columns), is_pointers=False))
        _add(pointers, pointers.shape[0] - 1, _Form(_dtype(columns + 1), is_pointers=True))  # a row may be full


def _add(tensor: Tensor, kept: int, form: _Form) -> None:
    if type(tensor) is Tensor and kept >= LEAST and form.dtype in _NARROW:
        _made[tensor] = form, None


def bytes_of(columns: int, *lists: tuple[Tensor, Tensor]) -> int:
    """What such lists take while they are kept."""
    total = 0
    for pointers, indices in lists:
        rows, entries = pointers.shape[0] - 1, indices.shape[0]
        total += 4 * entries if entries < LEAST else entries * _dtype(columns).itemsize
        total += 4 * pointers.shape[0] if rows < LEAST else rows * _dtype(columns + 1).itemsize
    return total


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`; read with `saved`."""
    ctx.forms = None
    if _made:  # no list is long in step form, which is called most
        ctx.forms = list(map(_form, tensors))
        pairs = zip(tensors, ctx.forms, strict=True)
        tensors = tuple([tensor if form is None else _narrow(tensor) for tensor, form in pairs])
    ctx.absent = [at for at, tensor in enumerate(tensors) if tensor is None]
    ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])  # who draws a graph asks their sizes


def saved(ctx: Any) -> tuple[Any, ...]:
    """`ctx.saved_tensors`, as they were."""
    tensors = list(ctx.saved_tensors)
    for at in ctx.absent:
        tensors.insert(at, None)
    if ctx.forms is None:
        return tuple(tensors)
    pairs = zip(tensors, ctx.forms, strict=True)
    return tuple([tensor if form is None else form.wide(tensor) for tensor, form in pairs])


def _dtype(numbers: int) -> torch.dtype:
    """The narrowest that tells so many numbers from 0 on apart."""
    return next((dtype for dtype, most in _NARROW.items() if numbers <= most), torch.int32)


def _form(tensor: Tensor | None) -> _Form | None:
    """How a tensor waits; None for as it is."""
    if tensor is None or tensor.dtype is not torch.int32 or tensor.numel() < LEAST or tensor not in _made:
        return None
    form, _ = _made[tensor]
    return form


def _narrow(tensor: Tensor) -> Tensor:
    form, narrow = _made[tensor]
    if narrow is None:
        narrow = form.narrow(tensor)
        _made[tensor] = form, narrow
    return narrow
