"""snnTorch's stock loop where snnTorch is not installed: `Leaky` and `fast_sigmoid`, rebuilt from their documented
equations in plain PyTorch. A step asks torch for no more operations than snnTorch's own (tests/test_bench_cuda.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_backend.bench.leaky_nets import (
    BETA,
    SLOPE,
    currents,
    exact,
    given,
    intercepted,
    nets,
    oracle,
    surrogate_of,
)
from sparse_backend.surrogate import SpikeGrad

__all__ = ["NETS", "SURROGATES", "Leaky", "currents", "exact", "given", "intercepted", "oracle", "surrogate_of"]


class Leaky(nn.Module):
    """U[t] = beta U[t-1] + I[t] - R[t] threshold, R[t] = H(U[t-1] - threshold) detached, S[t] = H(U[t] - threshold),
    beta clipped to 0..1; reset_mechanism "none" leaves the term with R out.

    Source: docs/snn.neurons_leaky of snnTorch 1.0, reset by subtraction, reset_delay=True.
    """

    beta: Tensor
    threshold: Tensor

    def __init__(self, beta: float, spike_grad: SpikeGrad, reset_mechanism: str = "subtract") -> None:
        super().__init__()
        self.spike_grad, self.reset_mechanism = spike_grad, reset_mechanism
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("threshold", torch.tensor(1.0))

    def reset_mem(self) -> Tensor:
        return self.beta.new_zeros(0)

    def forward(self, current: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:  # [B, N], [B, N] or [0]
        if mem.shape != current.shape:
            mem = torch.zeros_like(current)
        reset = self.spike_grad(mem - self.threshold).detach()
        mem = self.beta.clamp(0, 1) * mem + current
        if self.reset_mechanism == "subtract":
            mem = mem - reset * self.threshold
        return self.spike_grad(mem - self.threshold), mem


class _FastSigmoid(torch.autograd.Function):
    """H(x), with the derivative 1 / (1 + slope |x|)² (Zenke & Ganguli 2018)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (SLOPE * x.abs() + 1.0) ** 2


def _fast_sigmoid(x: Tensor) -> Tensor:
    return _FastSigmoid.apply(x)


SURROGATES: dict[str, tuple[str, Callable[[], Any]]] = {
    "fast_sigmoid": (f"fast_sigmoid(slope={SLOPE})", lambda: _fast_sigmoid)
}


def _neurons(count: int, spike_grad: SpikeGrad) -> nn.ModuleList:
    made = [Leaky(BETA, spike_grad) for _ in range(count - 1)]
    return nn.ModuleList([*made, Leaky(BETA, spike_grad, reset_mechanism="none")])


NETS = nets(_neurons, SURROGATES)
