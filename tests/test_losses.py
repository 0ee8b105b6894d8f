"""Losses over time and activity regularisers: against their formulas, dense, as events and step by step, alone and on
enabled models."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from fusion_loops import frames, net_of, wake
from helpers import assert_close, fast_sigmoid, normal, sparse_always, spikes
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import UNFUSED, WAYS, assert_equal_runs, enabled, leaky, longest, stock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_backend
from sparse_backend import EventTensor, functional, losses
from sparse_backend.layer_state import is_enabled
from sparse_backend.reference import events as twins

pytestmark = pytest.mark.usefixtures("neurons")

F64 = torch.float64
REGULARISERS = {"lower": losses.lower_activity, "upper": losses.upper_activity}
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dense": lambda x: x,
    "events": EventTensor.from_dense,
    "list": lambda x: list(x),
    "tuple": lambda x: tuple(x),
    "list of events": lambda x: [EventTensor.from_dense(step) for step in x],
    "steps of events": lambda x: list(EventTensor.from_dense(x)),
    "mixed list": lambda x: [EventTensor.from_dense(step) if t % 2 else step for t, step in enumerate(x)],
}


# The formulas, in plain loops.


def counts_of(spk: Tensor) -> list[list[float]]:
    """ζ[b][i] of spikes [T, B, ...]."""
    flat = spk.flatten(2).tolist()
    return [[sum(step[b][i] for step in flat) for i in range(len(flat[0][0]))] for b in range(len(flat[0]))]


def lower_formula(spk: Tensor, threshold: float, strength: float) -> float:
    terms = [max(0.0, threshold - zeta) ** 2 for sample in counts_of(spk) for zeta in sample]
    return strength * sum(terms) / len(terms)


def upper_formula(spk: Tensor, threshold: float, strength: float) -> float:
    terms = [max(0.0, sum(sample) / len(sample) - threshold) ** 2 for sample in counts_of(spk)]
    return strength * sum(terms) / len(terms)


FORMULAS = {"lower": lower_formula, "upper": upper_formula}
POOLS = {"max": max, "sum": sum}


def cross_entropy_formula(mem: Tensor, labels: list[int], pool: str) -> float:
    values, total = mem.tolist(), 0.0
    for b, label in enumerate(labels):
        scores = [POOLS[pool](step[b][c] for step in values) for c in range(mem.shape[2])]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    return total / len(labels)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMULAS)), form=st.sampled_from(sorted(FORMS)),
    shape=st.lists(st.integers(1, 4), min_size=3, max_size=5), density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    graded=st.booleans(), threshold=st.sampled_from([0, 0.3, 1, 2.5, 100.0]), strength=st.sampled_from([0, 0.7, 3]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_regularisers_are_their_formulas(name, form, shape, density, graded, threshold, strength, seed):
    spk = spikes(shape, density, seed, F64, graded)
    got = REGULARISERS[name](FORMS[form](spk), threshold, strength)
    assert got.shape == () and got.dtype == F64
    assert float(got) == pytest.approx(FORMULAS[name](spk, threshold, strength), rel=1e-12, abs=1e-12)


@settings(max_examples=60)
@given(
    pool=st.sampled_from(["max", "sum"]), form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    steps=st.integers(1, 5), batch=st.integers(1, 4), classes=st.integers(1, 5), seed=st.integers(0, 1000),
)  # fmt: skip
def test_cross_entropy_is_its_formula(pool, form, dtype, steps, batch, classes, seed):
    mem = normal((steps, batch, classes), seed)
    labels = [(seed + 3 * b) % classes for b in range(batch)]
    got = losses.cross_entropy_over_time(FORMS[form](mem), torch.tensor(labels, dtype=dtype), pool)
    assert float(got) == pytest.approx(cross_entropy_formula(mem, labels, pool), rel=1e-12, abs=1e-12)


def test_the_scores_are_the_largest_values_unless_told_otherwise():
    mem, labels = normal((4, 3, 2), 0), torch.tensor([0, 1, 1])
    assert losses.max_over_time(mem).tolist() == mem.amax(0).tolist()
    assert_close(losses.sum_over_time(mem), mem.sum(0))
    default, largest = (losses.cross_entropy_over_time(mem, labels, *pool) for pool in ((), ("max",)))
    assert torch.equal(default, largest)


@pytest.mark.parametrize("form", ["dense", "list"])
@pytest.mark.parametrize(
    "loss",
    [
        losses.max_over_time,
        losses.sum_over_time,
        lambda x: losses.cross_entropy_over_time(x, torch.tensor([1, 0, 3]), "max"),
        lambda x: losses.cross_entropy_over_time(x, torch.tensor([1, 0, 3]), "sum"),
        lambda x: losses.lower_activity(x, 0.3, 2.0),
        lambda x: losses.upper_activity(x, 0.1, 2.0),
    ],
    ids=["max", "sum", "cross entropy of max", "cross entropy of sum", "lower", "upper"],
)
def test_gradcheck(loss, form):
    """Values in the place of spikes, so that all is smooth but for the kinks, which the draw stays away from."""
    x = normal((3, 3, 4), 3)
    counts = x.sum(0)
    kinks = torch.cat([(counts - 0.3).flatten(), counts.mean(1) - 0.1, x.topk(2, dim=0).values.diff(dim=0).flatten()])
    assert float(kinks.abs().min()) > 1e-3 and bool((counts < 0.3).any()) and bool((counts.mean(1) > 0.1).any())
    assert torch.autograd.gradcheck(lambda x: loss(FORMS[form](x)), x.requires_grad_())


# Spikes as events: the same gradient where they are active, and nothing as large as the sequence.

SHAPE = STEPS, BATCH, NEURONS = (40, 3, 20)


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.most = max([self.most, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def layer(steps: int = STEPS) -> tuple[EventTensor, Tensor]:
    """Spikes [T, B, N] with a compact handle, and the weight behind them."""
    weight = normal((NEURONS, 12), 0, scale=0.4).requires_grad_()
    x = EventTensor.from_dense(spikes((steps, BATCH, 12), 0.1, 1))
    spk = functional.linear_leaky(x, weight, beta=0.9, threshold=0.8, spike_grad=fast_sigmoid(5.0), b_th=0.1).spikes
    assert spk.active_ptr is not None, "the draw must stay sparse"
    return spk, weight


def step_by_step(spk: EventTensor) -> list[EventTensor]:
    """The steps as tensors of their own, as a loop that is not fused makes them."""
    return [step.to(F64) for step in spk]


COMPACT = {"whole": lambda spk: spk, "its steps": list, "steps of their own": step_by_step}


@pytest.mark.parametrize("given", COMPACT)
@pytest.mark.parametrize("name", ["lower", "upper", "sum"])
def test_events_give_the_gradient_of_the_dense_form(name, given):
    def loss(x: Any) -> Tensor:
        if name == "sum":
            return losses.cross_entropy_over_time(x, torch.tensor([3, 0, 2]), "sum")
        return REGULARISERS[name](x, {"lower": 3.0, "upper": 0.2}[name], 0.7)

    results = []
    for form in (COMPACT[given], lambda spk: spk.to_dense()):
        spk, weight = layer()
        value = loss(form(spk))
        value.backward()
        results.append((value.detach(), weight.grad))
    (ours, gradient), (dense, expected) = results
    assert float(dense) > 0.01 and float(expected.abs().max()) > 1e-4
    assert_close(ours, dense)
    assert_close(gradient, expected)


@pytest.mark.parametrize("given", COMPACT)
@pytest.mark.parametrize("name", REGULARISERS)
def test_nothing_as_large_as_the_sequence_is_made(name, given):
    spk, weight = layer()
    x = COMPACT[given](spk)
    assert spk.nnz > BATCH * NEURONS, "steps and events must be told apart"
    with Largest() as seen:
        REGULARISERS[name](x, 0.5, 1.0).backward()
    assert seen.most < math.prod(SHAPE) / 3
    assert bool(weight.grad.any())
    assert all(part._dense is None for part in (spk, *(x if isinstance(x, list) else [])))
    with Largest() as seen:
        REGULARISERS[name](spk.to_dense(), 0.5, 1.0)
    assert seen.most == math.prod(SHAPE), "and the measure sees it where it is made"


def test_the_twin_of_the_sum_makes_nothing_as_large_either():
    spk, _ = layer()
    parts = (spk.row_ptr, spk.indices, None, spk.active_ptr, spk.active_indices)
    with Largest() as seen:
        total = twins.events_sum(spk.handle.detach(), *parts, NEURONS, STEPS)
    assert seen.most < math.prod(SHAPE) / 3
    assert torch.equal(total, spk.to_dense().detach().sum(0))


def test_a_stack_of_steps_keeps_what_learns():
    """Some learn, some are constant, one has not a single active entry; graded and plain."""
    spk, _ = layer()
    steps = step_by_step(spk)[:6]
    steps[1] = EventTensor.from_dense(spikes((BATCH, NEURONS), 0.2, 3, graded=True))
    steps[3] = steps[3].without_handle()
    stacked, total = EventTensor.stack(steps), torch.stack([step.to_dense() for step in steps])
    assert torch.equal(stacked.to_dense(), total)
    factor = normal(total.shape, 4)
    handles = [step.handle for step in steps if step.handle is not None]
    got, expected = (torch.autograd.grad((x * factor).sum(), handles, retain_graph=True) for x in (stacked, total))
    assert all(map(torch.equal, got, expected)) and any(g.numel() for g in got)
    EventTensor(
        stacked.shape, stacked.row_ptr, stacked.indices, stacked.values, handle=stacked.handle,
        active_ptr=stacked.active_ptr, active_indices=stacked.active_indices,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_summed_in_single(dtype, form):
    spk = torch.ones(300, 2, 3, dtype=dtype)  # bfloat16 ends at 256
    spk[:, 0, 0] = 0
    x = FORMS[form](spk)
    counts = losses.sum_over_time(x)
    assert counts.dtype == torch.float32
    assert counts.tolist() == [[0, 300, 300], [300, 300, 300]]
    assert float(losses.lower_activity(x, 301, 6.0)) == 301**2 + 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_of_events_has_the_dtype_asked_for(dtype):
    dense = spikes((5, 2, 4), 0.5, 0, graded=True)
    leaf = torch.zeros(1, dtype=dtype, requires_grad=True)
    x = EventTensor.from_dense(dense.to(dtype))
    rows = torch.arange(11, dtype=torch.int32).clamp(max=1)  # one active entry, the first
    x.handle, x.active_ptr, x.active_indices = leaf, rows, torch.zeros(1, dtype=torch.int32)
    for asked in (None, torch.float32, torch.float64):
        got = x.sum(0) if asked is None else torch.sum(x, 0, dtype=asked)
        assert got.dtype == (asked or dtype)
        assert torch.equal(got.double(), dense.sum(0))
        leaf.grad = None
        (got * 3).sum().backward()
        assert leaf.grad.dtype == dtype and leaf.grad.tolist() == [3]
    assert torch.sum(x.detach(), 0, dtype=torch.int64).dtype == torch.int64


# Whole models, enabled, against stock with its surrogate masked.

TERMS = {"lower": (4.0, 0.3), "upper": (0.4, 2.0)}  #: threshold and strength
ALL_WAYS = WAYS | UNFUSED


def hidden_terms(spk_rec: Any) -> dict[str, Tensor]:
    return {name: REGULARISERS[name](spk_rec, *numbers) for name, numbers in TERMS.items()}


def total(mem_rec: Any, spk_recs: Any, pool: str = "max") -> Tensor:
    loss = losses.cross_entropy_over_time(mem_rec, torch.tensor([3, 0, 2, 1]), pool)
    return loss + sum(term for spk_rec in spk_recs for term in hidden_terms(spk_rec).values())


def recorded(net: Any, x: Any) -> tuple[list[Any], list[list[Any]]]:
    """Membranes of the readout, spikes of both hidden layers."""
    mem1, mem2, mem3 = net.mems()
    mem_rec, spk_recs = [], [[], []]
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        _, mem3 = net.lif3(net.fc3(spk2), mem3)
        mem_rec.append(mem3), spk_recs[0].append(spk1), spk_recs[1].append(spk2)
    return mem_rec, spk_recs


def stacked(net: Any, x: Any) -> tuple[Tensor, list[Tensor]]:
    mem_rec, spk_recs = recorded(net, x)
    return torch.stack(mem_rec), list(map(torch.stack, spk_recs))


def stacked_then_lists(net: Any, x: Any) -> Tensor:
    """What is recorded has run when the lists are summed."""
    mem_rec, spk_recs = recorded(net, x)
    return losses.max_over_time(torch.stack(mem_rec)).sum() + total(mem_rec, spk_recs, "sum")


#: the model's forward, and what is done with what it returns
PLACES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Tensor]]] = {
    "stacks outside": (stacked, lambda out: total(*out)),
    "stacks outside, sum": (stacked, lambda out: total(*out, pool="sum")),
    "lists outside": (recorded, lambda out: total(*out)),
    "stacks inside": (lambda net, x: total(*stacked(net, x)), lambda loss: loss),
    "lists inside": (lambda net, x: total(*recorded(net, x)), lambda loss: loss),
    "lists inside, sum": (lambda net, x: total(*recorded(net, x), pool="sum"), lambda loss: loss),
    "stacks, then lists inside": (stacked_then_lists, lambda loss: loss),
}


@pytest.mark.parametrize(
    ("place", "way"),
    [(p, w) for p in PLACES for w in WAYS] + [(p, w) for p in ("stacks outside", "lists outside") for w in UNFUSED],
)
def test_gradients_of_models_are_the_frameworks(place, way):
    loop, loss = PLACES[place]
    net = assert_equal_runs(net_of(loop), lambda net: loss(net(frames())), ALL_WAYS[way], runs=2)
    if ALL_WAYS[way].fuse_time:
        assert longest(net) == len(frames())


@pytest.mark.parametrize(
    ("within", "way"), [(w, way) for w in (True, False) for way in WAYS] + [(False, "band unfused")]
)
def test_gradients_of_loops_outside_the_model(way, within):
    """One call per step in `fuse_time`, the losses taken in it or after it."""

    def step(net: Any, x: Tensor, mems: Any) -> Any:
        spk1, mem1 = net.lif1(net.fc1(x), mems[0])
        spk2, mem2 = net.lif2(net.fc2(spk1), mems[1])
        return spk1, spk2, (mem1, mem2, net.lif3(net.fc3(spk2), mems[2])[1])

    def go(net: Any) -> Tensor:
        mems, mem_rec, spk_recs = net.mems(), [], [[], []]
        fuse = ALL_WAYS[way].fuse_time and is_enabled(net)
        with sparse_backend.fuse_time(net) if fuse else nullcontext():
            for x in frames():
                spk1, spk2, mems = net(x, mems)
                mem_rec.append(mems[-1]), spk_recs[0].append(spk1), spk_recs[1].append(spk2)
            loss = total(mem_rec, spk_recs) if within else None
        return total(mem_rec, spk_recs) if loss is None else loss + 0

    assert_equal_runs(net_of(step), go, ALL_WAYS[way], runs=2)


def test_every_term_of_these_models_is_there():
    net, edge = stock(net_of(stacked), math.inf)
    _, spk_recs = net(frames())
    for spk_rec in spk_recs:
        terms = hidden_terms(spk_rec)
        for name, term in terms.items():
            (gradient,) = torch.autograd.grad(term, net.fc1.weight, retain_graph=True)
            assert float(term.detach()) > 0.01 and float(gradient.abs().max()) > 1e-4, name
    assert edge.is_clear()


@pytest.mark.parametrize("way", ["inf", "band as events"])
def test_a_convolutional_layer(way):
    class Convolutional(nn.Module):
        def __init__(self, spike_grad: Any) -> None:
            super().__init__()
            self.conv, self.lif1 = nn.Conv2d(1, 3, 3), leaky(spike_grad, 0.9, 0.5)
            self.fc, self.lif2 = nn.Linear(48, 4), leaky(spike_grad, 0.9, reset_mechanism="none")

        def forward(self, x: Tensor) -> Any:
            mem1, mem2, mem_rec, spk_rec = self.lif1.reset_mem(), self.lif2.reset_mem(), [], []
            for step in x:
                spk1, mem1 = self.lif1(self.conv(step), mem1)
                _, mem2 = self.lif2(self.fc(spk1.flatten(1)), mem2)
                mem_rec.append(mem2), spk_rec.append(spk1)
            return torch.stack(mem_rec), torch.stack(spk_rec)

    def go(net: Any) -> Tensor:
        mem_rec, spk_rec = net(spikes((6, 4, 1, 6, 6), 0.3, 0))
        assert spk_rec.shape == (6, 4, 3, 4, 4)
        return total(mem_rec, [spk_rec])

    assert_equal_runs(lambda spike_grad: wake(Convolutional(spike_grad)), go, WAYS[way], runs=2)


@pytest.mark.parametrize("way", ["band as events", "band unfused"])
def test_hidden_spikes_of_an_enabled_model_stay_events(way):
    with sparse_always():
        net = enabled(net_of(recorded if way == "band unfused" else stacked), ALL_WAYS[way])
        mem_rec, spk_recs = net(frames())
        total(mem_rec, spk_recs).backward()
    parts = [part for spk_rec in spk_recs for part in (spk_rec if isinstance(spk_rec, list) else [spk_rec])]
    assert all(type(part) is EventTensor and part.learns and part._dense is None for part in parts)


def test_losses_of_lists_are_recorded_and_end_nothing_early():
    net = enabled(net_of(lambda net, x: hidden_terms(recorded(net, x)[1][0])), WAYS["band as events"])
    net(frames())["lower"].backward()
    assert longest(net) == len(frames())
    assert vars(net)["_sparse_backend"].tally.forced == 0


# What is refused.

MEM, LABELS, SPK = torch.zeros(5, 3, 4), torch.tensor([0, 3, 1]), torch.zeros(5, 3, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-9, -1, "2", None, 1j, torch.tensor(1.0)])
@pytest.mark.parametrize("name", REGULARISERS)
@pytest.mark.parametrize("argument", ["threshold", "strength"])
def test_numbers_are_finite_and_not_negative(name, argument, bad):
    arguments = {"threshold": 1.0, "strength": 1.0, argument: bad}
    with pytest.raises(ValueError, match=f"^{argument}: expected a finite number of at least 0, got "):
        REGULARISERS[name](SPK, **arguments)


@pytest.mark.parametrize("number", [2, np.float32(2), np.int64(2), np.float64(2)])
def test_numbers_of_numpy_are_numbers(number):
    assert float(losses.lower_activity(SPK, number, number)) == 8


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "two dimensions": (
        ValueError, r"mem: expected \[T, B, C\], got \[5, 4\].*unsqueeze", lambda: losses.max_over_time(MEM[:, 0])),
    "four dimensions": (
        ValueError, r"mem: expected \[T, B, C\], got \[1, 5, 3, 4\]", lambda: losses.sum_over_time(MEM[None])),
    "a list of whole sequences": (
        ValueError, r"mem: expected \[T, B, C\], got \[2, 5, 3, 4\]", lambda: losses.sum_over_time([MEM, MEM])),
    "spikes of one sample": (
        ValueError, r"spk: expected \[T, B, N\] or \[T, B, ...\], got \[5, 6\]",
        lambda: losses.lower_activity(SPK[:, 0], 1, 1)),
    "no steps": (ValueError, r"without empty dimensions, got \[0, 3, 4\]", lambda: losses.max_over_time(MEM[:0])),
    "an empty list": (ValueError, r"without empty dimensions, got \[0\]", lambda: losses.upper_activity([], 1, 1)),
    "no samples": (
        ValueError, r"without empty dimensions, got \[5, 0, 6\]", lambda: losses.upper_activity(SPK[:, :0], 1, 1)),
    "no neurons": (
        ValueError, r"without empty dimensions, got \[5, 3, 0\]", lambda: losses.lower_activity(SPK[..., :0], 1, 1)),
    "not a tensor": (
        TypeError, r"mem: expected a tensor \[T, B, C\] or a list of its T steps, got ndarray",
        lambda: losses.max_over_time(MEM.numpy())),
    "a list of numbers": (
        TypeError, r"spk\[0\]: expected a tensor, got float", lambda: losses.lower_activity([1.0, 2.0], 1, 1)),
    "steps that differ": (
        ValueError, r"spk\[2\]: expected \[3, 6\] as the first step, got \[2, 6\]",
        lambda: losses.lower_activity([SPK[0], SPK[1], SPK[2, 1:]], 1, 1)),
    "whole numbers": (
        TypeError, r"spk: expected floating point numbers, got torch.int64. Convert",
        lambda: losses.upper_activity(SPK.long(), 1, 1)),
    "truth values in a list": (
        TypeError, r"spk: expected floating point numbers, got torch.bool",
        lambda: losses.upper_activity(list(SPK.bool()), 1, 1)),
    "labels that are scores": (
        ValueError, r"labels: expected \[3\], one class per sample, got \[3, 4\]",
        lambda: losses.cross_entropy_over_time(MEM, MEM[0])),
    "labels of another batch": (
        ValueError, r"labels: expected \[3\].*got \[2\]", lambda: losses.cross_entropy_over_time(MEM, LABELS[:2])),
    "labels that are floats": (
        TypeError, r"labels: expected integers, got torch.float32",
        lambda: losses.cross_entropy_over_time(MEM, LABELS.float())),
    "labels in a list": (
        TypeError, r"labels: expected a tensor, got list", lambda: losses.cross_entropy_over_time(MEM, [0, 3, 1])),
    "a label too large": (
        ValueError, r"labels: expected classes 0..3, got 0..4",
        lambda: losses.cross_entropy_over_time(MEM, torch.tensor([0, 4, 1]), "sum")),
    "a negative label": (
        ValueError, r"labels: expected classes 0..3, got -100..3",
        lambda: losses.cross_entropy_over_time(MEM, torch.tensor([0, 3, -100]))),
    "labels elsewhere": (
        ValueError, r"labels: expected on cpu as mem, got meta. Move them: labels.to\(cpu\)",
        lambda: losses.cross_entropy_over_time(MEM, LABELS.to("meta"))),
    "another pool": (
        ValueError, r"pool: expected one of \['max', 'sum'\], got 'mean'",
        lambda: losses.cross_entropy_over_time(MEM, LABELS, "mean")),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_named(what):
    kind, message, call = WRONG[what]
    with pytest.raises(kind, match=message):
        call()


def test_the_name_is_public():
    assert sparse_backend.losses is losses and "losses" in dir(sparse_backend)
    assert all(callable(getattr(losses, name)) for name in losses.__all__)
