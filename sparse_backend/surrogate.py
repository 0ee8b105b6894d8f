"""The surrogate derivative g, read off whatever callable the model uses.

Only the callable itself is trusted: it is evaluated, on the active entries alone, by the framework's own code. What
has to hold for that to be right is probed once per callable.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_backend.differentiating import once
from sparse_backend.tensorlike import under_saved_tensor_hooks

#: share of the surrogate's mass that b_th="auto" keeps: what the paper's b_th = 0.2 keeps of fast_sigmoid(slope=100)
AUTO_MASS = 0.95

SpikeGrad = Callable[[Tensor], Tensor]


def _own_graph() -> Any:
    """A graph that is made and used here alone: no checkpoint around it may answer its saved tensors."""
    if not under_saved_tensor_hooks():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def derivative(spike_grad: SpikeGrad, x: Tensor) -> Tensor:
    """g at x: the derivative torch.autograd gives for spike_grad. x: any shape; the result has its shape and dtype."""
    with torch.enable_grad(), _own_graph():
        x = x.detach().requires_grad_()
        spikes = spike_grad(x)
        if not spikes.requires_grad:
            return torch.zeros_like(x)
        (g,) = torch.autograd.grad(spikes, x, spikes.new_ones(()).expand_as(spikes), allow_unused=True)
    return torch.zeros_like(x) if g is None else g.to(x.dtype)


#: entries whose derivative is taken at once: what its intermediate results leave room for in a cache
AT_ONCE = 1 << 18


def derivative_in_pieces(spike_grad: SpikeGrad, x: Tensor, b_th: float = math.inf) -> Tensor:
    """g at x where |x| < b_th, else 0, piece by piece on a CPU: a surrogate makes several tensors of x's size."""

    if x.numel() <= AT_ONCE or x.device.type != "cpu":
        g = derivative(spike_grad, x)
        return g if math.isinf(b_th) else torch.ops.aten.hardtanh_backward(g, x, -b_th, b_th)  # the mask, in one pass
    result = torch.empty_like(x)
    for piece, out in zip(x.view(-1).split(AT_ONCE), result.view(-1).split(AT_ONCE), strict=True):
        g = derivative(spike_grad, piece)
        if math.isinf(b_th):
            out.copy_(g)
        else:
            torch.ops.aten.hardtanh_backward.grad_input(g, piece, -b_th, b_th, grad_input=out)
    return result


class _Spikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(g)
        return torch.gt(x, 0, out=x.new_empty(x.shape, dtype=dtype))

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> Any:
        (g,) = ctx.saved_tensors
        return grad.to(g.dtype) * g, None, None


def spikes(spike_grad: SpikeGrad, x: Tensor, g: Tensor | None) -> Tensor:
    """H(x), differentiable with the derivative g, of x's shape: the surrogate is not evaluated again. None where
    nothing learns."""
    return _Spikes.apply(x, g, spike_dtype(spike_grad, x))


def probe(spike_grad: SpikeGrad) -> str | None:
    """None if spike_grad is a fixed, elementwise Heaviside with a derivative; otherwise the reason it is not.

    It is evaluated on a random [2, N] tensor, as a whole, again, and on a 1-D selection of its entries; the global
    random state is left as it was.
    """
    with torch.inference_mode(False):  # the answer is kept: it must not depend on who asks first
        return _probe(spike_grad)


def _probe(spike_grad: SpikeGrad) -> str | None:
    generator = torch.Generator().manual_seed(0)  # on a CPU, whatever torch's default device is
    x = torch.randn(2, 37, generator=generator, device="cpu")
    x[0, :3] = torch.tensor([0.0, 1e-6, -1e-6], device="cpu")
    chosen = torch.rand(x.shape, generator=generator, device="cpu") < 0.4
    with torch.random.fork_rng(devices=[]):
        try:
            whole, again, part = spike_grad(x.clone()), spike_grad(x.clone()), spike_grad(x[chosen])
            g_whole, g_again = derivative(spike_grad, x), derivative(spike_grad, x)
            g_part = derivative(spike_grad, x[chosen])
        except Exception as error:  # whatever a user's callable may raise on a 1-D tensor
            return f"its surrogate cannot be evaluated on single entries ({type(error).__name__}: {error})"
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        return "its surrogate does not return a tensor of its input's shape"
    if not torch.allclose(whole.float(), (x > 0).float(), rtol=0, atol=1e-5):  # hard + soft - soft rounds
        return "its surrogate's forward is random or not the step function H(x)"
    if not (torch.equal(whole, again) and torch.equal(g_whole, g_again)):
        return "its surrogate is random or keeps state"
    rounding = 1e-6 * float(g_whole.abs().max())  # far from the threshold a formula may cancel
    if not (torch.equal(whole[chosen], part) and torch.allclose(g_whole[chosen], g_part, rtol=1e-6, atol=rounding)):
        return "its surrogate is not the same function for every neuron"
    if not bool(torch.isfinite(g_whole).all()):
        return "its surrogate's derivative is not finite"
    if not bool(g_whole.any()):
        return "its surrogate has no derivative (spikes carry no gradient)"
    return None


_DECADES, _PER_DECADE = 8, 400  # of |x|, each way from 1


def _mass(spike_grad: SpikeGrad) -> tuple[Tensor, Tensor]:
    """Points x > 0, evenly spaced in log(x), and the integral of |g| from -x to x at each."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        x = torch.logspace(-_DECADES, _DECADES, 2 * _DECADES * _PER_DECADE + 1, dtype=torch.float64, device="cpu")
        g = derivative(spike_grad, x).abs() + derivative(spike_grad, -x).abs()
    g = g.nan_to_num(nan=0.0)  # a formula may overflow far from the threshold, where its value is 0
    steps = math.log(10) / _PER_DECADE
    weighted = g * x  # dx = x dlog(x)
    pieces = 0.5 * (weighted[1:] + weighted[:-1]) * steps
    return x, torch.cat([weighted[:1], weighted[0] + pieces.cumsum(0)])


def _total(below: Tensor) -> float:
    """The whole integral; infinite where it diverges, or is no positive number."""
    total = float(below[-1])
    converges = math.isfinite(total) and total > 0 and total - float(below[-1 - _PER_DECADE]) <= 0.01 * total
    return total if converges else math.inf


def mass_of_b_th(spike_grad: SpikeGrad, b_th: float) -> float:
    """The share, 0..1, of the integral of |g| that lies within b_th; of one that diverges, 0 where b_th is finite."""
    if math.isinf(b_th):
        return 1.0
    x, below = _mass(spike_grad)
    place = min(max(int(torch.searchsorted(x, b_th)), 1), len(x) - 1)
    share = min(max(math.log(b_th / float(x[place - 1])) * _PER_DECADE / math.log(10), 0.0), 1.0)
    return float(torch.lerp(below[place - 1], below[place], share)) / _total(below)


def b_th_of_mass(spike_grad: SpikeGrad, mass: float = AUTO_MASS) -> float:
    """The smallest b_th that keeps `mass`, 0..1, of the integral of |g|; infinity where the integral diverges.

    spike_grad: tensor -> spikes, any shape, differentiable. Raises ValueError for a mass outside (0, 1).
    Source: docs/choosing-b_th.md.
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass: expected a share between 0 and 1, got {mass!r}")
    x, below = _mass(spike_grad)
    total = _total(below)
    if math.isinf(total):
        return math.inf
    place = int(torch.searchsorted(below, mass * total))
    low, high = float(below[place - 1]), float(below[place])
    share = (mass * total - low) / (high - low)
    return float(x[place - 1] * (x[place] / x[place - 1]) ** share)


class Surrogate:
    """What is known of one spike_grad callable: why it cannot be used compactly, and its automatic b_th."""

    def __init__(self, spike_grad: SpikeGrad) -> None:
        self.problem = probe(spike_grad)
        self.dtypes: dict[torch.dtype, torch.dtype] = {}  #: of its input -> of the spikes it returns
        self.auto_b_th = math.inf
        if self.problem is None:
            with contextlib.suppress(Exception):  # one that refuses float64: its mass cannot be known
                self.auto_b_th = b_th_of_mass(spike_grad)


_known: weakref.WeakKeyDictionary[Any, Surrogate] = weakref.WeakKeyDictionary()


def inspect(spike_grad: SpikeGrad) -> Surrogate:
    """The `Surrogate` of a callable, probed once per object."""
    try:
        known = _known.get(spike_grad)
        if known is None:
            known = _known[spike_grad] = Surrogate(spike_grad)
    except TypeError:  # not hashable, or without weak references
        known = Surrogate(spike_grad)
    return known


def spike_dtype(spike_grad: SpikeGrad, x: Tensor) -> torch.dtype:
    """The dtype of spike_grad(x), without evaluating it on x."""
    known = inspect(spike_grad).dtypes
    dtype = known.get(x.dtype)
    if dtype is None:
        with torch.no_grad():
            dtype = known[x.dtype] = spike_grad(x.new_zeros(1)).dtype
    return dtype
