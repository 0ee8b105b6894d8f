"""The fused dense time loop: what the sparse one has to beat.

One matrix product over all T * B rows a layer, then one pass over time: each neuron's membrane stays in a register
while it walks the steps, and V - threshold is all that is kept for the backward, whose pass computes g again. This is
the least a dense layer moves: forward 12 bytes an entry (current in, spikes and V - threshold out), backward 12
(gradient and V - threshold in, delta out).

On a GPU the passes are Triton kernels (fused_triton.py), on a CPU this project's own dense kernels. `scan_forward` and
`scan_backward` are the Triton kernels' twins in plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_backend.bench.leaky_nets import SLOPE, LeakyNet, leaky_entry
from sparse_backend.bench.models import Output
from sparse_backend.execute import Result, run_leaky

Kind = Literal["Triton kernels", "this project's dense kernels", "plain PyTorch"]


def kind_for(device: torch.device) -> Kind:
    """The fastest scan there is for a device."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "Triton kernels"
    return "this project's dense kernels"


def scan_forward(current: Tensor, beta: float, threshold: float, readout: bool) -> tuple[Tensor, Tensor | None]:
    """Leaky neurons, reset by subtraction. current: [T, B, N].

    Returns (spikes, V - threshold), both [T, B, N]; of a readout, which never resets, (V, None).
    """
    first, second = torch.empty_like(current), None if readout else torch.empty_like(current)
    mem = reset = torch.zeros_like(current[0])
    for t in range(current.shape[0]):
        mem = beta * mem + current[t]
        if second is None:
            first[t] = mem
            continue
        mem = mem - reset * threshold
        second[t] = mem - threshold
        reset = first[t] = (second[t] > 0).to(mem.dtype)
    return first, second


def scan_backward(grad: Tensor, x: Tensor | None, beta: float, slope: float) -> Tensor:
    """delta [T, B, N] of the gradient of `scan_forward`'s first result; x: its second."""
    delta = torch.empty_like(grad)
    later = torch.zeros_like(grad[0])
    for t in reversed(range(grad.shape[0])):
        epsilon = grad[t] if x is None else grad[t] / (slope * x[t].abs() + 1) ** 2
        later = delta[t] = epsilon + beta * later
    return delta


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, beta: float, threshold: float, readout: bool, kind: Kind) -> Tensor:
        forward, ctx.scan = _scans(kind)
        ctx.beta = beta
        first, x = forward(current.contiguous(), beta, threshold, readout)
        ctx.save_for_backward(x)
        return first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.scan(grad.contiguous(), x, ctx.beta, SLOPE), None, None, None, None


def _scans(kind: Kind) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., Tensor]]:
    if kind == "Triton kernels":
        from sparse_backend.bench import fused_triton

        return fused_triton.scan_forward, fused_triton.scan_backward
    return scan_forward, scan_backward


def forward_of(net: LeakyNet, kind: Kind) -> Callable[[Tensor], Output]:
    """The forward pass of a network whose surrogate is fast_sigmoid(slope=`SLOPE`), by scans of this kind."""
    if kind == "this project's dense kernels":
        return lambda x: _by_our_kernels(net, x)
    numbers = [(float(neuron.beta), float(neuron.threshold)) for neuron in net.neurons]  # waits, so not every time

    def forward(x: Tensor) -> Output:  # [T, B, inputs]
        hidden, last = [], len(numbers) - 1
        for layer, (linear, (beta, threshold)) in enumerate(zip(net.linears, numbers, strict=True)):
            current = torch.nn.functional.linear(x, linear.weight, linear.bias)
            x = _Scan.apply(current, beta, threshold, layer == last, kind)
            if net.return_hidden and layer < last:
                hidden.append(x)
        return Output(None, x, hidden)

    return forward


def layers(net: LeakyNet, x: Tensor) -> Iterator[Result]:
    """The network layer by layer, densely, by this project's dense kernels; x: [T, B, inputs]."""
    for linear, neuron in zip(net.linears, net.neurons, strict=True):
        current = torch.nn.functional.linear(x, linear.weight, linear.bias)
        shape = current.shape[0], current.shape[1], current.shape[2]
        last = linear is net.linears[-1]
        result = run_leaky(
            current, shape, leaky_entry(neuron), None, neuron.spike_grad, math.inf, keep_mem=last, dense=True
        )
        yield result
        x = result.spikes


def _by_our_kernels(net: LeakyNet, x: Tensor) -> Output:
    *hidden, last = layers(net, x)
    assert last.mem_seq is not None
    return Output(None, last.mem_seq, [layer.spikes for layer in hidden] if net.return_hidden else ())
