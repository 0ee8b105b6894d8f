"""Max- and average-pooling of images whose spikes are events. It moves places, not numbers: what is differentiable
about it is an index_add of the handle, which torch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_backend.ops._library import define, dynamic_size
from sparse_backend.reference import events_pool as reference


def _fake(
    row_ptr: Tensor, indices: Tensor, active_ptr: Tensor | None, active_indices: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    events, average = dynamic_size(), options[-1]
    learns = active_ptr is not None and active_indices is not None
    return (
        row_ptr.new_empty(row_ptr.shape),
        row_ptr.new_empty(events),
        row_ptr.new_empty(events if average else 0),
        row_ptr.new_empty(row_ptr.shape if learns else (0,)),
        row_ptr.new_empty(dynamic_size() if learns else 0),
        row_ptr.new_empty(active_indices.shape if active_indices is not None else (0,), dtype=torch.int64),
    )


#: spikes and active entries of images [R, C * H * W] -> spikes of windows side by side, how many each holds (average
#: alone), active windows, and the place of each active entry's window among them, n_active' where it has none
events_pool = define(
    "events_pool(Tensor row_ptr, Tensor indices, Tensor? active_ptr, Tensor? active_indices, int channels, int height,"
    " int width, int pool_h, int pool_w, bool average) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.events_pool,
    _fake,
)
