"""Events in plain PyTorch: the specification of `ops/events.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """CSR structure of a boolean matrix. mask: [R, N] -> row_ptr [R + 1] int32, indices [nnz] int32."""
    counts = mask.sum(dim=1)
    row_ptr = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    row_ptr[1:] = counts.cumsum(0)
    return row_ptr, mask.nonzero()[:, 1].to(torch.int32)


def positions(row_ptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, slice]:
    """Row and column of every event, and where its entries lie: row_ptr may start anywhere in `indices`."""
    begin, end = int(row_ptr[0]), int(row_ptr[-1])
    counts = (row_ptr[1:] - row_ptr[:-1]).long()
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return rows, indices[begin:end].long(), slice(begin, end)


def scatter(row_ptr: Tensor, indices: Tensor, values: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """Dense [R, columns] from CSR; the value of an event is 1 where `values` is None."""
    rows, cols, span = positions(row_ptr, indices)
    dense = torch.zeros(row_ptr.numel() - 1, columns, dtype=dtype, device=indices.device)
    dense[rows, cols] = 1 if values is None else values[span].to(dtype)
    return dense


def gather(dense: Tensor, row_ptr: Tensor, indices: Tensor) -> Tensor:
    """Entries of dense at the events: [nnz]. dense has R rows, or a divisor of R and is then repeated."""
    rows, cols, _ = positions(row_ptr, indices)
    return dense[rows % max(dense.shape[0], 1), cols]


def events_from_dense(dense: Tensor, max_density: float) -> tuple[Tensor, Tensor, Tensor]:
    flat = dense.reshape(dense.shape[:-1].numel(), dense.shape[-1])
    row_ptr, indices = compress(flat != 0)
    values = gather(flat, row_ptr, indices)
    if not values.is_floating_point():
        values = values.to(torch.float32)
    if indices.numel() > int(max_density * flat.numel()):
        return row_ptr.new_empty(0), indices.new_empty(0), values.new_empty(0)
    return row_ptr, indices, values.new_empty(0) if bool((values == 1).all()) else values


def events_to_dense(
    handle: Tensor,
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    columns: int,
) -> Tensor:
    return scatter(row_ptr, indices, values, columns, handle.dtype)


def events_sum(
    handle: Tensor,
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    columns: int,
    steps: int,
) -> Tensor:
    rows, cols, span = positions(row_ptr, indices)
    size = row_ptr[1:].view(steps, -1).shape[1]  # rows of a block
    wide = torch.promote_types(handle.dtype, torch.float32)  # half precision is rounded once
    total = torch.zeros(size * columns, dtype=wide, device=indices.device)
    added = torch.ones_like(rows, dtype=wide) if values is None else values[span].to(wide)
    total.index_add_(0, rows % max(size, 1) * columns + cols, added)
    return total.view(size, columns).to(handle.dtype)


def events_gather(dense: Tensor, row_ptr: Tensor, indices: Tensor) -> Tensor:
    return gather(dense, row_ptr, indices)
