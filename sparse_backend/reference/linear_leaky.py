"""Linear + leaky over a sequence of events in plain PyTorch: the specification of `ops/linear_leaky.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_backend.reference.events import gather, scatter
from sparse_backend.reference.leaky import leaky, leaky_backward


def sums_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products with a weight are summed in, and that of everything but the weight."""
    return torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype


def event_linear(
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    weight: Tensor,  # [N, M]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """Currents of every row: [R, N] = s W^T + b."""
    dtype = sums_dtype(weight)
    current = scatter(row_ptr, indices, values, weight.shape[1], dtype) @ weight.t().to(dtype)
    return current if bias is None else current + bias


def event_linear_backward(
    delta: Tensor,  # [R, N]
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    weight: Tensor,
    need_input: int,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input (0: none, 1: [n_active] where active, 2: dense [R, M]), weight [N, M], bias [N].

    All have delta's dtype but the dense one, a product in the weight's.
    """
    none = delta.new_empty(0)
    grad_input, grad_weight = none, none
    if need_input == 1:
        assert active_ptr is not None and active_indices is not None
        grad_input = gather(delta @ weight.to(delta.dtype), active_ptr, active_indices)
    elif need_input == 2:
        grad_input = delta.to(weight.dtype) @ weight
    if need_weight:
        grad_weight = delta.t() @ scatter(row_ptr, indices, values, weight.shape[1], delta.dtype)
    return grad_input, grad_weight, delta.sum(0) if need_bias else none


def linear_leaky(
    row_ptr: Tensor,  # [T * B + 1]
    indices: Tensor,  # columns below M
    values: Tensor | None,
    handle: Tensor | None,
    in_active_ptr: Tensor | None,
    in_active_indices: Tensor | None,
    weight: Tensor,  # [N, M]
    bias: Tensor | None,  # [N]
    beta: Tensor,
    threshold: Tensor,
    mem: Tensor | None,
    g: Tensor | None,
    token: Tensor | None,
    hub: int,
    steps: int,
    batch: int,
    reset: int,
    reset_delay: bool,
    b_th: float,
    cover_spikes: bool,
    keep_mem: bool,
    keep_reset: bool,
    keep_p: bool,
    max_active: float,
) -> tuple[Tensor, ...]:
    current = event_linear(row_ptr, indices, values, weight, bias).view(steps, batch, weight.shape[0])
    return leaky(
        current,
        beta,
        threshold,
        mem,
        g,
        reset,
        reset_delay,
        b_th,
        cover_spikes,
        keep_mem,
        keep_reset,
        keep_p,
        max_active,
    )


def linear_leaky_backward(
    grad_x: Tensor | None,
    grad_mem_last: Tensor | None,
    grad_mem_seq: Tensor | None,
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    in_active_ptr: Tensor | None,
    in_active_indices: Tensor | None,
    weight: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    spike_ptr: Tensor | None,
    spike_indices: Tensor | None,
    active_ptr: Tensor,
    active_indices: Tensor,
    reset_ptr: Tensor | None,
    reset_indices: Tensor | None,
    p: Tensor | None,
    p_last: Tensor | None,
    mem_seq: Tensor | None,
    mem: Tensor | None,
    beta: Tensor,
    threshold: Tensor,
    steps: int,
    batch: int,
    reset: int,
    reset_delay: bool,
    weight_rule: int,  # how a kernel may sum; the result is the same
    need_input: int,
    need_weight: bool,
    need_bias: bool,
    need_mem: bool,
    need_beta: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias, mem, beta [N], threshold [N]; empty where not needed."""
    neurons = weight.shape[0]
    delta, *of_neuron = leaky_backward(
        grad_x, grad_mem_last, grad_mem_seq, x, g, spike_ptr, spike_indices, active_ptr, active_indices,
        reset_ptr, reset_indices, p, p_last, mem_seq, mem, beta, threshold,
        steps, batch, neurons, reset, reset_delay, need_mem, need_beta, need_threshold,
    )  # fmt: skip
    of_linear = event_linear_backward(
        delta.view(steps * batch, neurons), row_ptr, indices, values, in_active_ptr, in_active_indices, weight,
        need_input, need_weight, need_bias,
    )  # fmt: skip
    return (*of_linear, *of_neuron)
