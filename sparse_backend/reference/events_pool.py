"""Pooling of images that are events, in plain PyTorch: the specification of `ops/events_pool.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_backend.reference.events import compress, positions


def events_pool(
    row_ptr: Tensor,
    indices: Tensor,  # columns below C * H * W
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    channels: int,
    height: int,
    width: int,
    pool_h: int,
    pool_w: int,
    average: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Windows with a spike, how many each has (average alone), windows with an active entry that counts, and of every
    active entry the place of its window among those, or after them where it does not count.

    The maximum of a window is its first spike, its first entry where there is none: where torch's gradient goes.
    """
    if not (0 < pool_h <= height and 0 < pool_w <= width):
        raise RuntimeError(f"events_pool: expected a window within [{height}, {width}], got [{pool_h}, {pool_w}]")
    down, across = height // pool_h, width // pool_w
    n_rows, columns = row_ptr.numel() - 1, channels * down * across

    def windows_of(cols: Tensor) -> tuple[Tensor, Tensor]:
        """Window of each column, and whether one holds it."""
        y, x = cols // width % height, cols % width
        window = (cols // (height * width) * down + y // pool_h) * across + x // pool_w
        return window, (y < down * pool_h) & (x < across * pool_w)

    rows, cols, _ = positions(row_ptr, indices)
    window, inside = windows_of(cols)
    count = torch.zeros(n_rows * columns, dtype=torch.int32, device=indices.device)
    place = rows * columns + window
    count.index_add_(0, place[inside], torch.ones_like(place[inside], dtype=torch.int32))
    out_ptr, out = compress(count.view(n_rows, columns) > 0)
    counts = count[count > 0] if average else out.new_empty(0)
    if active_ptr is None or active_indices is None:
        return out_ptr, out, counts, out.new_empty(0), out.new_empty(0), out.new_empty(0, dtype=torch.int64)
    first = torch.full((n_rows * columns,), channels * height * width, dtype=torch.int64, device=indices.device)
    first.scatter_reduce_(0, place[inside], cols[inside], "amin")
    rows, cols, _ = positions(active_ptr, active_indices)
    window, counted = windows_of(cols)
    place = rows * columns + window
    if not average:
        corner = (cols // width % height % pool_h == 0) & (cols % width % pool_w == 0)
        where = place.where(counted, 0)
        counted = counted & torch.where(count[where] > 0, first[where] == cols, corner) if len(place) else counted
    learns = torch.zeros(n_rows * columns, dtype=torch.bool, device=indices.device)
    learns[place[counted]] = True
    learns_ptr, learns_indices = compress(learns.view(n_rows, columns))
    slot = torch.full_like(place, len(learns_indices))
    slot[counted] = (learns.cumsum(0) - 1)[place[counted]]
    return out_ptr, out, counts, learns_ptr, learns_indices, slot
