"""What several test files share: surrogates, drawn cases, and the stock loops every result is judged by.

Stock means snnTorch's own `Leaky`, one call per step, in float64 and with a surrogate that keeps the dtype (those of
snnTorch 1.0 return float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_backend import EventTensor, policy

INF = math.inf
RESETS = ("subtract", "zero", "none")
SpikeGrad = Callable[[Tensor], Tensor]


# Surrogates.


class _Step(torch.autograd.Function):
    """The step function in its input's dtype; `slope(x)` is its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: SpikeGrad) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * ctx.slope(x), None


def step_function(slope: SpikeGrad) -> SpikeGrad:
    """A dtype-keeping surrogate from its derivative."""
    return lambda x: _Step.apply(x, slope)


def fast_sigmoid(slope: float = 25.0) -> SpikeGrad:
    return step_function(lambda x: 1 / (1 + slope * x.abs()) ** 2)


def atan(alpha: float = 2.0) -> SpikeGrad:
    return step_function(lambda x: alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2))


def sigmoid(slope: float = 25.0) -> SpikeGrad:
    return step_function(lambda x: slope * torch.sigmoid(slope * x) * torch.sigmoid(-slope * x))


def boxcar(half_width: float = 0.5) -> SpikeGrad:
    return step_function(lambda x: (x.abs() < half_width).to(x.dtype) / (2 * half_width))


def straight_through() -> SpikeGrad:
    return step_function(torch.ones_like)


def lopsided(slope: float = 3.0) -> SpikeGrad:
    """A derivative that is not even and changes its sign."""
    return step_function(lambda x: (0.7 - x) * torch.exp(-slope * x * x))


def piecewise(x: Tensor) -> Tensor:
    """A surrogate written without an autograd.Function, as people do."""
    soft = x / (1 + 10 * x.abs())
    return (x > 0).to(x.dtype) + (soft - soft.detach())


SURROGATES: dict[str, SpikeGrad] = {
    "fast_sigmoid": fast_sigmoid(),
    "steep": fast_sigmoid(100.0),
    "atan": atan(),
    "sigmoid": sigmoid(5.0),
    "boxcar": boxcar(),
    "straight_through": straight_through(),
    "lopsided": lopsided(),
    "piecewise": piecewise,
}


def masked(spike_grad: SpikeGrad, b_th: float) -> SpikeGrad:
    """The surrogate of E3: g where |x| < b_th, else no gradient."""

    def inner(x: Tensor) -> Tensor:
        spikes = spike_grad(x)
        return torch.where(x.detach().abs() < b_th, spikes, spikes.detach())

    return inner


def no_derivative(x: Tensor) -> Tensor:
    """A step function without derivative."""
    return (x > 0).to(x.dtype)


# Drawing.


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spikes(
    shape: Sequence[int], density: float, seed: int, dtype: torch.dtype = torch.float64, graded: bool = False
) -> Tensor:
    """A dense tensor with this share of entries nonzero: 1, or multiples of 1/2 where graded."""
    random = generator(seed)
    mask = torch.rand(tuple(shape), generator=random) < density
    if not graded:
        return mask.to(dtype)
    values = torch.randint(1, 4, tuple(shape), generator=random).to(dtype) / 2
    sign = torch.where(torch.rand(tuple(shape), generator=random) < 0.3, -1.0, 1.0).to(dtype)
    return mask.to(dtype) * values * sign


def dyadic(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, unit: float = 0.125, most: int = 8
) -> Tensor:
    """Multiples of `unit` up to `most` units: their sums are exact, so ties at the threshold are real ties."""
    return torch.randint(-most, most + 1, tuple(shape), generator=generator(seed)).to(dtype) * unit


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64).to(dtype) * scale


@contextmanager
def sparse_always(max_active: float = 1.0, max_input: float = 1.0) -> Iterator[None]:
    """Never fall back to the dense regime because of counts."""
    before = policy.MAX_ACTIVE, policy.MAX_ACTIVE_CUDA, policy.MAX_LISTED, policy.MAX_INPUT, policy.MAX_CONVOLVED
    policy.MAX_ACTIVE = policy.MAX_ACTIVE_CUDA = max_active
    policy.MAX_LISTED = max_active + 1
    policy.MAX_INPUT = policy.MAX_CONVOLVED = max_input
    try:
        yield
    finally:
        policy.MAX_ACTIVE, policy.MAX_ACTIVE_CUDA, policy.MAX_LISTED, policy.MAX_INPUT, policy.MAX_CONVOLVED = before


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Stock loops.


@dataclass
class Layer:
    """One linear + leaky layer; tensors are leaves, those that learn require grad. Used stock and with ours."""

    weight: Tensor
    bias: Tensor | None = None
    beta: Tensor = field(default_factory=lambda: torch.tensor(0.9, dtype=torch.float64))
    threshold: Tensor = field(default_factory=lambda: torch.tensor(1.0, dtype=torch.float64))
    mem: Tensor | None = None
    graded: Tensor | None = None
    reset: str = "subtract"
    reset_delay: bool = True

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that require grad, by name."""
        names = ("weight", "bias", "beta", "threshold", "mem", "graded")
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}

    def stock_neuron(self, spike_grad: SpikeGrad) -> Any:
        import snntorch as snn  # the ops' tests run where no framework is installed

        neuron = snn.Leaky(
            beta=self.beta,
            threshold=self.threshold,
            spike_grad=spike_grad,
            reset_mechanism=self.reset,
            graded_spikes_factor=self.weight.new_ones(()) if self.graded is None else self.graded,
            reset_delay=self.reset_delay,
        )
        snn.SpikingNeuron.instances.remove(neuron)  # the list is global: leave it as it was
        return neuron


@dataclass
class Trace:
    """One layer's run: x is V - threshold before any second reset."""

    spikes: Tensor  #: [T, B, N]
    mem: Tensor  #: [T, B, N], what snnTorch returns
    x: Tensor  #: [T, B, N]


def stock_leaky(current: Tensor, layer: Layer, spike_grad: SpikeGrad) -> Trace:
    """snnTorch's Leaky over currents [T, B, N]."""
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return spike_grad(x)

    neuron = layer.stock_neuron(watched)
    mem = torch.zeros_like(current[0]) if layer.mem is None else layer.mem
    all_spikes, all_mem = [], []
    for step in current:
        spk, mem = neuron(step, mem)
        all_spikes.append(spk), all_mem.append(mem)
    return Trace(torch.stack(all_spikes), torch.stack(all_mem), torch.stack(seen[1::2]))  # each step resets, then fires


def stock_network(x: Tensor, layers: Sequence[Layer], spike_grad: SpikeGrad) -> list[Trace]:
    """linear + leaky layers one after the other, every layer over all steps (there is no feedback)."""
    traces = []
    for layer in layers:
        trace = stock_leaky(torch.nn.functional.linear(x, layer.weight, layer.bias), layer, spike_grad)
        traces.append(trace)
        x = trace.spikes
    return traces


def edge_distance(traces: Sequence[Trace], b_th: float) -> float:
    """How near any |V - threshold| comes to 0 or b_th: where it is tiny, rounding decides and nothing is compared."""
    nearest = INF
    for trace in traces:
        if trace.x.numel():
            size = trace.x.abs()
            nearest = min(nearest, float(size.min()))
            if math.isfinite(b_th):
                nearest = min(nearest, float((size - b_th).abs().min()))
    return nearest


# Comparing.


def as_tensor(value: Any) -> Tensor:
    return value.to_dense() if type(value) is EventTensor else value


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of every leaf; zeros where the loss does not depend on it. Goes through `.grad`, as training does."""
    for leaf in leaves.values():
        leaf.grad = None
    if loss.requires_grad:
        loss.backward()
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return grads


def assert_close(ours: Tensor, stock: Tensor, name: str = "", rtol: float = 1e-8) -> None:
    """Equal to rounding: relative to the largest entry, since sums are taken in another order."""
    assert ours.shape == stock.shape, f"{name}: shape {list(ours.shape)} against {list(stock.shape)}"
    assert ours.dtype == stock.dtype, f"{name}: {ours.dtype} against {stock.dtype}"
    ours, stock = ours.detach(), stock.detach()
    if not stock.numel():
        return
    scale = float(stock.abs().max())
    torch.testing.assert_close(
        ours, stock, rtol=rtol, atol=rtol * max(scale, 1e-6), msg=lambda text: f"{name}: {text}", equal_nan=True
    )


def assert_same_gradients(ours: dict[str, Tensor], stock: dict[str, Tensor], rtol: float = 1e-8) -> None:
    assert ours.keys() == stock.keys()
    for name, grad in ours.items():
        assert_close(grad, stock[name], f"gradient of {name}", rtol)


def snapshot(net):
    """The objects that every module of a net is made of."""
    return {name: (dict(m.__dict__), dict(m._buffers), dict(m._parameters)) for name, m in net.named_modules()}


def same_snapshot(a, b):
    """Whether two snapshots hold the same objects."""
    return a.keys() == b.keys() and all(
        one.keys() == other.keys() and all(one[key] is other[key] for key in one)
        for name in a
        for one, other in zip(a[name], b[name], strict=True)
    )
