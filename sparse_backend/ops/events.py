"""Ops that turn dense tensors into events and back. Layout: CSR over rows, see `events.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_backend.ops import keeping
from sparse_backend.ops._library import autograd, define, dynamic_size
from sparse_backend.reference import events as reference


def _from_dense_fake(dense: Tensor, max_density: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = dense.shape[:-1].numel()
    events = dynamic_size()
    dtype = dense.dtype if dense.is_floating_point() else torch.float32
    return (
        dense.new_empty(rows + 1, dtype=torch.int32),
        dense.new_empty(events, dtype=torch.int32),
        dense.new_empty(dynamic_size(), dtype=dtype),
    )


def _to_dense_fake(
    handle: Tensor,
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    columns: int,
) -> Tensor:
    return handle.new_empty(row_ptr.shape[0] - 1, columns)


def _sum_fake(handle: Tensor, row_ptr: Tensor, *rest: Any) -> Tensor:
    columns, steps = rest[-2:]
    return handle.new_empty((row_ptr.shape[0] - 1) // steps, columns)


def _gather_fake(dense: Tensor, row_ptr: Tensor, indices: Tensor) -> Tensor:
    return dense.new_empty(indices.shape[0])


#: dense [..., N] (float, bool, uint8) -> row_ptr [R + 1] int32, indices [nnz] int32, values [nnz], or [0] if all are 1;
#: all of them [0] where more than `max_density` of the entries are events
events_from_dense = define(
    "events_from_dense(Tensor dense, float max_density) -> (Tensor, Tensor, Tensor)",
    reference.events_from_dense,
    _from_dense_fake,
)

#: events -> dense [R, columns] of the handle's dtype; the gradient reaches `handle` at its active entries
events_to_dense = define(
    "events_to_dense(Tensor handle, Tensor row_ptr, Tensor indices, Tensor? values, Tensor? active_ptr,"
    " Tensor? active_indices, int columns) -> Tensor",
    reference.events_to_dense,
    _to_dense_fake,
)

#: events of `steps` blocks of rows -> their sum over the blocks, dense [R / steps, columns]; gradient as above
events_sum = define(
    "events_sum(Tensor handle, Tensor row_ptr, Tensor indices, Tensor? values, Tensor? active_ptr,"
    " Tensor? active_indices, int columns, int steps) -> Tensor",
    reference.events_sum,
    _sum_fake,
)

#: dense [R, N] -> its entries at the events [nnz]; row_ptr must begin at 0. Fewer rows, a divisor of R, are repeated
events_gather = define(
    "events_gather(Tensor dense, Tensor row_ptr, Tensor indices) -> Tensor", reference.events_gather, _gather_fake
)


def _to_dense_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    active_ptr, active_indices = inputs[4:6]
    ctx.inputs = len(inputs)
    keeping.save(ctx, active_ptr, active_indices)


def _to_dense_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    active_ptr, active_indices = keeping.saved(ctx)
    if grad is None or active_ptr is None:
        return (None,) * ctx.inputs
    return (events_gather(grad.contiguous(), active_ptr, active_indices), *(None,) * (ctx.inputs - 1))


call_events_to_dense = autograd(events_to_dense, _to_dense_setup, _to_dense_backward, learns=(0,))
call_events_sum = autograd(events_sum, _to_dense_setup, _to_dense_backward, learns=(0,))
