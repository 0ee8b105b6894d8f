"""Linear + two-state neuron over a sequence of events in plain PyTorch: the specification of `ops/linear_lif.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_backend.reference.lif import lif, lif_backward
from sparse_backend.reference.linear_leaky import event_linear, event_linear_backward


def linear_lif(
    row_ptr: Tensor,  # [T * B + 1]
    indices: Tensor,  # columns below M
    values: Tensor | None,
    handle: Tensor | None,
    in_active_ptr: Tensor | None,
    in_active_indices: Tensor | None,
    weight: Tensor,  # [N, M]
    bias: Tensor | None,  # [N]
    token: Tensor | None,
    hub: int,
    steps: int,
    batch: int,
    *neuron: Any,  # of `lif`, from mem_gain on
) -> tuple[Tensor, ...]:
    current = event_linear(row_ptr, indices, values, weight, bias).view(steps, batch, weight.shape[0])
    return lif(current, *neuron)


def linear_lif_backward(
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    in_active_ptr: Tensor | None,
    in_active_indices: Tensor | None,
    weight: Tensor,
    need_input: int,
    need_weight: bool,
    need_bias: bool,
    *neuron: Any,  # of `lif_backward`
) -> tuple[Tensor, ...]:
    """Gradients of input, weight, bias, and of `lif.NEEDS`; empty where not needed."""
    delta, *of_neuron = lif_backward(*neuron)
    rows = delta.view(delta.shape[0] * delta.shape[1], weight.shape[0])
    events = row_ptr, indices, values, in_active_ptr, in_active_indices
    of_linear = event_linear_backward(rows, *events, weight, need_input, need_weight, need_bias)
    return *of_linear, *of_neuron
