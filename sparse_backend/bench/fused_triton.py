"""The scans of the fused dense time loop as Triton kernels; twins, with shapes and results, in fused_dense.py.

A lane per neuron of a sample. Loads of the steps ahead are issued early (`num_stages`): they do not wait for the
membrane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES, WARPS, STAGES = 64, 2, 8  # small blocks: B * N = 51,200 lanes are to reach all of a GPU


@triton.jit
def _forward(
    current, first, second, steps, width, beta, threshold,
    READOUT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    mem = tl.zeros([BLOCK], current.dtype.element_ty)
    reset = tl.zeros([BLOCK], current.dtype.element_ty)
    for _ in tl.range(0, steps, num_stages=AHEAD):
        mem = beta * mem + tl.load(current + at, mask=inside, other=0.0)
        if READOUT:
            tl.store(first + at, mem, mask=inside)
        else:
            mem = mem - reset * threshold
            x = mem - threshold
            reset = (x > 0).to(mem.dtype)
            tl.store(first + at, reset, mask=inside)
            tl.store(second + at, x, mask=inside)
        at += width


@triton.jit
def _backward(
    grad, x, delta, steps, width, beta, slope,
    READOUT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    at = lane + tl.cast(steps - 1, tl.int64) * width
    later = tl.zeros([BLOCK], grad.dtype.element_ty)
    for _ in tl.range(0, steps, num_stages=AHEAD):
        epsilon = tl.load(grad + at, mask=inside, other=0.0)
        if not READOUT:
            soft = slope * tl.abs(tl.load(x + at, mask=inside, other=0.0)) + 1
            epsilon = epsilon / (soft * soft)
        later = epsilon + beta * later
        tl.store(delta + at, later, mask=inside)
        at -= width


def _launch(kernel, like: Tensor, *arguments, readout: bool) -> None:
    steps, width = like.shape[0], like[0].numel()
    if like.numel():
        kernel[(triton.cdiv(width, LANES),)](
            *arguments[:3], steps, width, *arguments[3:], READOUT=readout, BLOCK=LANES, AHEAD=STAGES, num_warps=WARPS
        )


def scan_forward(current: Tensor, beta: float, threshold: float, readout: bool) -> tuple[Tensor, Tensor | None]:
    first, second = torch.empty_like(current), None if readout else torch.empty_like(current)
    _launch(_forward, current, current, first, second, beta, threshold, readout=readout)
    return first, second


def scan_backward(grad: Tensor, x: Tensor | None, beta: float, slope: float) -> Tensor:
    delta = torch.empty_like(grad)
    _launch(_backward, grad, grad, x, delta, beta, slope, readout=x is None)
    return delta
