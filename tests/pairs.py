"""A stock model and an enabled one made by the same recipe, and everything that must be equal between them.

A recipe takes the surrogate and returns a new float64 model. The stock model's surrogate is masked to the band (E3) and
remembers every V - threshold it saw, so that a draw in which rounding decides is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import snntorch as snn
import torch
from helpers import INF, SpikeGrad, assert_close, fast_sigmoid, masked, sparse_always
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparse_backend
from sparse_backend.tensorlike import TensorLike
from sparse_backend.timefusion.recorder import Placeholder

Recipe = Callable[[SpikeGrad], nn.Module]
EDGE = 1e-9
SPIKE_GRAD = fast_sigmoid(5.0)  # one object, since an enabled model inspects each surrogate once


@dataclass(frozen=True)
class Way:
    """How an enabled model runs."""

    b_th: float
    fuse_time: bool = True
    counts_decide: bool = True  #: whether an active layer may run densely

    @contextmanager
    def policy(self) -> Iterator[None]:
        if self.counts_decide:
            yield
        else:
            with sparse_always():
                yield


BAND = 0.15
WAYS = {
    "inf": Way(INF),
    "band": Way(BAND),
    "band as events": Way(BAND, counts_decide=False),
    "all as events": Way(1e6, counts_decide=False),
}
UNFUSED = {"inf unfused": Way(INF, fuse_time=False), "band unfused": Way(BAND, fuse_time=False, counts_decide=False)}


class Edge:
    """What the stock surrogate was asked for."""

    def __init__(self, b_th: float) -> None:
        self.b_th = b_th
        self.seen: list[Tensor] = []

    def is_clear(self) -> bool:
        """Whether no |V - threshold| seen is so near 0 or b_th that rounding decides."""
        for x in self.seen:
            size = x.abs()
            near = size.min() if self.b_th == INF else torch.minimum(size, (size - self.b_th).abs()).min()
            if near < EDGE:
                return False
        return True


def stock(recipe: Recipe, b_th: float, spike_grad: SpikeGrad | None = None) -> tuple[Any, Edge]:
    edge = Edge(b_th)
    inner = spike_grad or SPIKE_GRAD
    band = inner if b_th == INF else masked(inner, b_th)

    def watched(x: Tensor) -> Tensor:
        if x.numel():
            edge.seen.append(x.detach())
        return band(x)

    return recipe(watched), edge


def enabled(recipe: Recipe, way: Way, spike_grad: SpikeGrad | None = None) -> Any:
    return sparse_backend.enable(recipe(spike_grad or SPIKE_GRAD), b_th=way.b_th, fuse_time=way.fuse_time)


def leaky(spike_grad: SpikeGrad, beta: Any = 0.9, threshold: Any = 1.0, **options: Any) -> snn.Leaky:
    """A Leaky whose settings are float64 from the start, not float32 numbers made longer."""

    def number(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64)

    return snn.Leaky(number(beta), number(threshold), spike_grad=spike_grad, **options).double()


def weighted(out: Any) -> Tensor:
    """A loss that gives every number of the output a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for o in tree_leaves(out):
        if isinstance(o, Tensor) and o.is_floating_point():
            total = total + (o * torch.linspace(0.1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum()
    return total


@dataclass
class Outcome:
    outputs: list[Any]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]  #: hidden states and running statistics among them
    random: Tensor


def assert_no_placeholder(values: Any) -> None:
    for value in tree_leaves(values):
        assert type(value) is not Placeholder, "a placeholder survived"


def states(net: nn.Module) -> dict[str, Tensor]:
    """Every buffer of a model; plain tensors outside a forward."""
    buffers = dict(net.named_buffers())
    for name, buffer in buffers.items():
        assert not isinstance(buffer, TensorLike), f"{name} is a {type(buffer).__name__} after the forward"
    return {name: buffer.detach().clone() for name, buffer in buffers.items()}


def outcome(
    net: nn.Module, go: Callable[[Any], Any], inputs: Any = (), loss: Callable[..., Tensor] = weighted
) -> Outcome:
    """Run `go(net)`, take the gradients of a loss on what it returns. inputs: leaves beside the parameters."""
    torch.manual_seed(2)
    net.zero_grad()
    out = go(net)
    random = torch.get_rng_state()
    assert_no_placeholder(out)
    value = loss(out)
    if value.requires_grad:
        value.backward()
    leaves = {**dict(net.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()
    }
    for x in inputs:
        x.grad = None
    return Outcome(
        [o.detach().clone() if isinstance(o, Tensor) else o for o in tree_leaves(out)],
        gradients,
        {name: p.detach().clone() for name, p in net.named_parameters()},
        states(net),
        random,
    )


def is_rounding(a: Tensor, b: Tensor, largest: float) -> bool:
    """Whether two gradients are 0 but for rounding, next to the largest one: that of a bias before a norm, say."""
    return a.shape == b.shape and a.numel() > 0 and float((a - b).abs().max()) < 1e-13 * largest


def assert_same(ours: Outcome, theirs: Outcome, skip: tuple[str, ...] = (), rtol: float = 1e-8) -> None:
    """skip: names of buffers that need not be equal."""
    assert len(ours.outputs) == len(theirs.outputs)
    for i, (a, b) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        if isinstance(b, Tensor) and b.dtype is not torch.bool:
            assert_close(a, b, f"output {i}", rtol)
        elif isinstance(b, Tensor):
            assert torch.equal(a, b), f"output {i}: {a} against {b}"
        else:
            assert a == (pytest.approx(b, rel=rtol, abs=rtol) if isinstance(b, (float, complex)) else b), (
                f"output {i}: {a!r} != {b!r}"
            )
    for what in ("gradients", "parameters", "buffers"):
        mine, stocks = getattr(ours, what), getattr(theirs, what)
        assert mine.keys() == stocks.keys()
        largest = max([float(value.abs().max()) for value in stocks.values() if value.numel()], default=0.0)
        for name in mine.keys() - set(skip):
            if not is_rounding(mine[name], stocks[name], largest):
                assert_close(mine[name], stocks[name], f"{what}: {name}", rtol)
    assert torch.equal(ours.random, theirs.random), "another number of random numbers was drawn"


def assert_equal_runs(
    recipe: Recipe,
    go: Callable[[Any], Any],
    way: Way,
    inputs: Any = (),
    runs: int = 1,
    skip: tuple[str, ...] = (),
    spike_grad: SpikeGrad | None = None,
) -> Any:
    """The enabled model does what stock does, `runs` times in a row with the same input; returns the enabled model."""
    theirs, edge = stock(recipe, way.b_th, spike_grad)
    with way.policy():
        ours = enabled(recipe, way, spike_grad)
    for _ in range(runs):
        expected = outcome(theirs, go, inputs)
        assert edge.is_clear(), "choose other numbers: rounding decides here"
        with way.policy():
            got = outcome(ours, go, inputs)
        assert_same(got, expected, skip)
    return ours


def longest(net: nn.Module) -> int:
    """How many steps ran as one sequence in an enabled model's last forward, as the report says it."""
    note = sparse_backend.report(net).note or ""
    words = note.split("up to ")
    return int(words[1].split()[0]) if len(words) > 1 else 1
