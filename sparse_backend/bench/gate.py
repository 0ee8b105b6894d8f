"""Nothing is timed that has not first been checked to compute the same.

The judge is the stock network with its surrogate masked to |x| < b_th, which is what the sparse gradient is defined
to be (docs/design.md). In float64, on a few samples, outputs and gradients must be equal to rounding. In float32, on
the whole batch, sums taken in another order turn a membrane within rounding of the threshold into a spike or not, in
one sample of many, and everything behind that spike differs. Such samples are found by comparing the hidden layers'
spikes with stock's; few may be so, and they are left out of the loss on both sides. Of the others, readouts and loss
must agree, and gradients point the same way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_backend.bench.cases import MENDED, STOCK, STOCK_NO_GRAD, BTh, Case
from sparse_backend.bench.graph import run_of
from sparse_backend.bench.inputs import Batch
from sparse_backend.bench.models import framework_of
from sparse_backend.bench.paths import Evaluation, Path, Run, Unavailable
from sparse_backend.policy import resolve_b_th
from sparse_backend.surrogate import SpikeGrad

EXACT_SAMPLES = 8
EXACT = 1e-8  # of the largest entry
CLOSE = 1e-3  # of the loss, of the largest membrane
FLIPPED = 0.05  # share of samples that may have a flipped spike, in networks of up to
MEMBRANES = 200_000  # membranes a sample, over all hidden layers and steps, of sums of up to
EVENTS = 16  # input events a step; of more membranes as many more may flip, as roundings of longer sums grow, to
MOST_FLIPPED = 0.5
COSINE = 0.999


@dataclass
class Verdict:
    """Whether a path computes what stock does; `problem` says what does not agree."""

    problem: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)


def masked(spike_grad: SpikeGrad, b_th: float) -> SpikeGrad:
    """g where |x| < b_th, else no gradient."""

    def inner(x: Tensor) -> Tensor:
        spikes = spike_grad(x)
        return torch.where(x.detach().abs() < b_th, spikes, spikes.detach())

    return spike_grad if math.isinf(b_th) else inner


class _Stock:
    """Stock on one batch, its results kept: those of the samples asked for last."""

    def __init__(self, case: Case, net: Any, batch: Batch, dense: Tensor | None, forward: Callable[[Any], Any]) -> None:
        """forward: makes the forward pass from a copy of the network."""
        self.framework, self.b_th = framework_of(case), case.b_th
        self.run = Run(Path(STOCK, STOCK, "dense", lambda net, _: forward(net)), net, case.b_th, batch, dense)
        self._hidden: list[Tensor] | None = None
        self._results: dict[bool, tuple[tuple[int, ...] | None, Evaluation]] = {}

    def hidden(self) -> list[Tensor]:
        if self._hidden is None:
            with torch.no_grad():
                self._hidden = self.run.hidden()
        return self._hidden

    def evaluate(self, with_mask: bool, samples: Tensor | None = None) -> Evaluation:
        key = None if samples is None else tuple(samples.tolist())
        known = self._results.get(with_mask)
        if known is None or known[0] != key:
            band = resolve_b_th(self.b_th, self.framework.surrogate_of(self.run.net)) if with_mask else math.inf
            with self.framework.intercepted(self.run.net, lambda _, spike_grad: masked(spike_grad, band)):
                found = self.run.evaluate(samples)
            gradients = {name: gradient.clone() for name, gradient in found.gradients.items()}
            known = self._results[with_mask] = key, found._replace(gradients=gradients)
        return known[1]


def may_flip(case: Case) -> float:
    """The share of a batch's samples in which rounding may decide a spike."""
    larger = case.steps * sum(case.hidden) / MEMBRANES
    longer = case.events / case.steps / EVENTS
    return min(MOST_FLIPPED, FLIPPED * max(1.0, larger) * math.sqrt(max(1.0, longer)))


class Gate:
    """Judges the paths of one case."""

    def __init__(self, case: Case, net: Any, few: Batch, batch: Batch, dense: Tensor) -> None:
        """few: of `EXACT_SAMPLES`; batch, and its dense form: what will be timed."""
        self.b_th: BTh = case.b_th
        self.net, self.few, self.batch, self.dense = net, few, batch, dense
        self._case = case
        self.may_flip = may_flip(case)
        framework = framework_of(case)
        self.exact_net = framework.exact(net)
        self._exact = _Stock(case, self.exact_net, few, None, framework.oracle)
        self._unmasked = _Stock(case, self.exact_net, few, None, lambda net: net)
        self._whole = _Stock(case, copy.deepcopy(net), batch, dense, framework.oracle)

    def judge(self, path: Path) -> Verdict:
        """Raises `Unavailable` where the path cannot run; one that fails in any other way is not right."""
        if path.name in (STOCK, STOCK_NO_GRAD):
            return Verdict()
        try:
            return self._judge(path)
        except Unavailable:
            raise
        except Exception as error:
            return Verdict(f"it raised {type(error).__name__}: {error}")

    def _judge(self, path: Path) -> Verdict:
        if path.judge is not None:  # in the one dtype that it is sure to have
            run = run_of(path, self.net, self.b_th, self.batch, self.dense)
            judge = _Stock(self._case, copy.deepcopy(self.net), self.batch, self.dense, path.judge)
            return self._judge_whole(run, judge)
        stock = (self._exact if path.masked else self._unmasked).evaluate(path.masked)
        problem = _differs(run_of(path, self.exact_net, self.b_th, self.few).evaluate(), stock)
        if problem is not None:
            return Verdict(f"in float64 on {EXACT_SAMPLES} samples {problem}")
        if path.name == MENDED:  # stock in another form, which is slow: the few have to do
            return Verdict()
        return self._judge_whole(run_of(path, self.net, self.b_th, self.batch, self.dense), self._whole)

    def _judge_whole(self, run: Run, stock: _Stock) -> Verdict:
        verdict = self._compare_whole(run, stock)
        if verdict.problem is not None:
            verdict.problem = f"in float32 on the whole batch {verdict.problem}"
        return verdict

    def _compare_whole(self, run: Run, stock: _Stock) -> Verdict:
        flipped = flips(run.hidden(), stock.hidden())
        share = float(flipped.float().mean())
        numbers = {"samples_left_out": share}
        if not share <= self.may_flip:
            allowed, got = 100 * self.may_flip, 100 * share
            return Verdict(f"at most {allowed:g} % of the samples may have a flipped spike, got {got:.3g} %", numbers)
        samples = (~flipped).nonzero().flatten() if share else None
        return _near(run.evaluate(samples), stock.evaluate(run.path.masked, samples), ~flipped, numbers)


def flips(ours: list[Tensor], stock: list[Tensor]) -> Tensor:
    """Whether a spike of a sample is in one and not in the other, [B]; of layers [T, B, ...]."""
    pairs = zip(ours, stock, strict=True)
    return torch.stack([(a != b).flatten(2).any(dim=2).any(dim=0) for a, b in pairs]).any(dim=0)


def _differs(ours: Evaluation, stock: Evaluation) -> str | None:
    pairs = {"the readout's membrane": (ours.mem, stock.mem)}
    for name, gradient in ours.gradients.items():
        pairs[f"the gradient of {name}"] = (gradient, stock.gradients[name])
    for name, (got, expected) in pairs.items():
        if got.shape != expected.shape:
            return f"{name} must have shape {list(expected.shape)}, got {list(got.shape)}"
        scale = float(expected.abs().max()) or 1.0
        error = float((got.double() - expected).abs().max()) / scale
        if not error <= EXACT:
            return f"{name} must equal stock's within {EXACT:g} of its largest entry, got {error:.3g}"
    return None


def _near(ours: Evaluation, stock: Evaluation, counts: Tensor, numbers: dict[str, float]) -> Verdict:
    """counts: whether a sample does, [B]."""
    error = abs(ours.loss - stock.loss) / max(abs(stock.loss), 1e-12)
    scale = max(1.0, float(stock.mem.abs().max()))
    off = float((ours.mem - stock.mem)[:, counts].abs().max()) / scale
    pairs = [(gradient, stock.gradients[name]) for name, gradient in ours.gradients.items()]
    cosine = min((_cosine(a, b) for a, b in pairs), default=1.0)
    numbers |= {"loss_error": error, "membrane_error": off, "gradient_cosine": cosine}
    problem = None
    if not error <= CLOSE:
        problem = f"the loss must equal stock's within {CLOSE:g}, got {error:.3g}"
    elif not off <= CLOSE:
        problem = f"the readout's membrane must equal stock's within {CLOSE:g} of its largest entry, got {off:.3g}"
    elif not cosine >= COSINE:
        problem = f"every gradient's cosine with masked stock must be at least {COSINE}, got {cosine:.6f}"
    return Verdict(problem, numbers)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else float(torch.equal(a, b))
