"""Enabled snnTorch models of Synaptic, RLeaky and RSynaptic neurons against stock ones: E1, E2 and E3, in float64."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pairs
import pytest
import snntorch as snn
import torch
from helpers import (
    INF,
    RESETS,
    SURROGATES,
    as_tensor,
    assert_close,
    assert_same_gradients,
    dyadic,
    generator,
    masked,
    no_derivative,
    normal,
    piecewise,
    sparse_always,
    spikes,
    threads,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pairs import (
    BAND,
    SPIKE_GRAD,
    UNFUSED,
    WAYS,
    Way,
    assert_equal_runs,
    enabled,
    leaky,
    longest,
    outcome,
    stock,
    weighted,
)
from pairs import assert_same as assert_same_outcome
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import sparse_backend
from sparse_backend import EventTensor, _native
from sparse_backend.tensorlike import TensorLike

pytestmark = pytest.mark.usefixtures("neurons", "one_thread")

F32, F64 = torch.float32, torch.float64
STATES = {"Synaptic": ("syn", "mem"), "RLeaky": ("spk", "mem"), "RSynaptic": ("spk", "syn", "mem")}
KINDS = [*STATES]
INPUTS, STEPS, BATCH = 8, 6, 3
LEARN = frozenset(("alpha", "beta", "threshold", "recurrent"))
MOST_WAYS = {name: {**WAYS, **UNFUSED}[name] for name in ("inf", "band as events", "inf unfused", "band unfused")}
FEW_WAYS = {name: MOST_WAYS[name] for name in ("band as events", "inf unfused")}


@pytest.fixture(autouse=True)
def spikes_are_states_too(monkeypatch):
    """A neuron that runs step by step keeps the spikes it returned, an EventTensor, as its state."""

    def states(net: nn.Module) -> dict[str, Tensor]:
        for name, buffer in net.named_buffers():
            assert not isinstance(buffer, TensorLike) or (name.endswith("spk") and type(buffer) is EventTensor), name
        return {name: as_tensor(buffer).detach().clone() for name, buffer in net.named_buffers()}

    monkeypatch.setattr(pairs, "states", states)


@pytest.fixture(params=FEW_WAYS)
def few(request):
    return FEW_WAYS[request.param]


@pytest.fixture(params=MOST_WAYS)
def most(request):
    return MOST_WAYS[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# Models.


@dataclass(frozen=True)
class Case:
    """One linear layer and its neurons; "one" and "each" are one number and one per neuron."""

    kind: str
    neurons: int = 6
    reset: str = "subtract"
    alpha: str = "one"
    beta: str = "one"
    threshold: str = "one"
    recurrence: str = "linear"  #: or one V, or "each" neuron its own
    learn: frozenset[str] = frozenset()
    form: str = "explicit"  #: or "hidden" states, or hidden ones with "output"


def make_neuron(case: Case, spike_grad: Any = SPIKE_GRAD, seed: int = 0, **options: Any) -> Any:
    def drawn(name: str, shape: str, low: float, high: float) -> Tensor:
        size = (case.neurons,) if shape == "each" else ()
        return low + (high - low) * torch.rand(size, generator=generator(seed + ord(name[0])), dtype=F64)

    if case.kind != "RLeaky":
        options = {"alpha": drawn("alpha", case.alpha, 0.2, 0.8), "learn_alpha": "alpha" in case.learn, **options}
    if case.kind != "Synaptic":
        options["learn_recurrent"] = "recurrent" in case.learn
        if case.recurrence == "linear":
            options["linear_features"] = case.neurons
        else:
            options.setdefault("V", drawn("V", case.recurrence, -0.6, 0.6))
            options["all_to_all"] = False
    options = {
        "beta": drawn("beta", case.beta, 0.3, 0.9), "threshold": drawn("threshold", case.threshold, 0.5, 0.9),
        "spike_grad": spike_grad, "reset_mechanism": case.reset, "init_hidden": case.form != "explicit",
        "output": case.form == "output", "learn_beta": "beta" in case.learn,
        "learn_threshold": "threshold" in case.learn, **options,
    }  # fmt: skip
    neuron = getattr(snn, case.kind)(**options).double()
    if case.kind != "Synaptic" and case.recurrence == "linear":
        fill(neuron.recurrent, seed + 1, 0.9)
    return neuron


@torch.no_grad()
def fill(layer: Any, seed: int, scale: float, shift: float = 0.0) -> Any:
    fan_in = math.sqrt(layer.weight[0].numel())
    layer.weight.copy_(normal(layer.weight.shape, seed, scale=scale / fan_in) + shift / fan_in)
    if layer.bias is not None:
        layer.bias.copy_(normal(layer.bias.shape, seed + 1, scale=0.1))
    return layer


def states_of(neuron: Any, out: Any) -> tuple[Any, ...]:
    """The states after a call, as the next one takes them."""
    kind = type(neuron).__name__
    if neuron.init_hidden and not neuron.output:
        return tuple(getattr(neuron, name) for name in STATES[kind])
    return out if kind != "Synaptic" else out[1:]


def advance(neuron: Any, current: Any, states: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """One step: spikes, and the states to hand in next."""
    out = neuron(current) if neuron.init_hidden else neuron(current, *states)
    return out if type(out) is not tuple else out[0], states_of(neuron, out)


class Net(nn.Module):
    """linear + neuron layers; a test gives the loop."""

    def __init__(self, cases: list[Case], spike_grad: Any, loop: Callable[..., Any], seed: int = 0) -> None:
        super().__init__()
        self.loop = loop
        sizes = [INPUTS, *(case.neurons for case in cases)]
        self.linears, self.neurons = nn.ModuleList(), nn.ModuleList()
        for i, case in enumerate(cases):
            linear = nn.Linear(sizes[i], sizes[i + 1], dtype=F64)
            self.linears.append(fill(linear, seed + 20 * i, 1.2, 0.4))
            self.neurons.append(make_neuron(case, spike_grad, seed + 20 * i + 10))

    def begin(self) -> list[tuple[Any, ...]]:
        return [neuron.reset_mem() for neuron in self.neurons]  # type: ignore[operator]

    def step(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        after = []
        for linear, neuron, state in zip(self.linears, self.neurons, states, strict=True):
            x, state = advance(neuron, linear(x), state)
            after.append(state)
        return x, after

    def forward(self, x: Any, *more: Any) -> Any:
        return self.loop(self, x, *more)


def all_states(net: Net, x: Any, begin: Any = None) -> Any:
    """The usual loop; every spike and state of the last layer, and all layers' last states."""
    states, rows = begin or net.begin(), []
    for t in range(len(x)):
        spk, states = net.step(x[t], states)
        rows.append((spk, *states[-1]))
    return [torch.stack(part) for part in zip(*rows, strict=True)], states


def spikes_alone(net: Net, x: Any) -> Any:
    states, rows = net.begin(), []
    for t in range(len(x)):
        spk, states = net.step(x[t], states)
        rows.append(spk)
    return torch.stack(rows)


def last_states(net: Net, x: Any) -> Any:
    states, total = net.begin(), 0
    for step in x:
        spk, states = net.step(step, states)
        total = total + spk
    return total, states


LOOPS = {"all": all_states, "spikes": spikes_alone, "last": last_states}


def net_of(cases: list[Case], loop: Callable[..., Any] = all_states, seed: int = 0) -> Callable[[Any], Any]:
    return lambda spike_grad: Net(cases, spike_grad, loop, seed)


def frames(seed: int = 1, steps: int = STEPS, batch: int = BATCH, density: float = 0.35) -> Tensor:
    return spikes((steps, batch, INPUTS), density, seed)


def two(kind: str, **options: Any) -> list[Case]:
    return [Case(kind, 9, **options), Case(kind, 5, **options)]


def check(way: Way, cases: list[Case], loop: Callable[..., Any] = all_states, x: Any = None, **options: Any) -> Any:
    """The loop over `frames()` equals stock."""
    x = frames() if x is None else x
    inputs = [x] if type(x) is Tensor and x.requires_grad else []
    return assert_equal_runs(net_of(cases, loop), lambda net: net(x), way, inputs, **options)


def paths_of(net: nn.Module) -> list[str]:
    return [layer.path for layer in sparse_backend.report(net).layers]


def reasons_of(net: nn.Module) -> list[Any]:
    return [layer.reason for layer in sparse_backend.report(net).layers]


def assert_ran_as(net: nn.Module, way: Way, steps: int = STEPS) -> None:
    """Every layer on the engine, and as one sequence where time is fused."""
    form = "sequence" if way.fuse_time else "step"
    regimes = ("sparse",) if way.b_th < INF and not way.counts_decide else ("sparse", "dense")
    assert set(paths_of(net)) <= {f"{regime} {form}" for regime in regimes}, (paths_of(net), reasons_of(net))
    assert [layer.steps["framework"] for layer in sparse_backend.report(net).layers] == [0] * len(paths_of(net))
    if way.fuse_time:
        assert longest(net) == steps


# Drawn models.


CASES = st.builds(
    Case,
    kind=st.sampled_from(KINDS),
    neurons=st.integers(1, 8),
    reset=st.sampled_from(RESETS),
    alpha=st.sampled_from(["one", "each"]),
    beta=st.sampled_from(["one", "each"]),
    threshold=st.sampled_from(["one", "each"]),
    recurrence=st.sampled_from(["linear", "one", "each"]),
    learn=st.frozensets(st.sampled_from(sorted(LEARN))),
    form=st.sampled_from(["explicit", "hidden", "output"]),
)
FULL = [Case(kind, 6, "zero", "each", "each", "each", "linear", LEARN, "output") for kind in KINDS]


def make_input(kind: str, density: float, seed: int) -> Any:
    shape = (STEPS, BATCH, INPUTS)
    if kind.startswith("real"):
        x = normal(shape, seed)
    elif kind == "static":
        x = spikes(shape[1:], density, seed).expand(shape)
    else:
        x = spikes(shape, density, seed, graded=kind == "graded")
    return x.requires_grad_() if kind.endswith("grad") else x


@settings(max_examples=70)
@given(
    cases=st.lists(CASES, min_size=1, max_size=3),
    kind=st.sampled_from(["spikes", "graded", "events", "real", "static", "spikes grad", "real grad"]),
    density=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    loop=st.sampled_from(sorted(LOOPS)),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    b_th=st.sampled_from([0.05, 0.2, 0.7, 3.0, INF]),
    fuse_time=st.booleans(),
    always_sparse=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(FULL, "real grad", 0.4, "all", "lopsided", 0.2, True, True, 1)
@example(FULL, "spikes grad", 0.4, "all", "atan", INF, False, False, 2)
def test_drawn_models(cases, kind, density, loop, surrogate, b_th, fuse_time, always_sparse, seed):
    x = make_input(kind, density, seed)
    inputs = [x] if x.requires_grad else []
    way = Way(b_th, fuse_time, not always_sparse)
    recipe, spike_grad = net_of(cases, LOOPS[loop], seed), SURROGATES[surrogate]
    theirs, edge = stock(recipe, b_th, spike_grad)
    expected = outcome(theirs, lambda net: net(x), inputs)
    assume(edge.is_clear())
    with way.policy():
        ours = enabled(recipe, way, spike_grad)
        got = outcome(ours, lambda net: net(EventTensor.from_dense(x) if kind == "events" else x), inputs)
    assert_same_outcome(got, expected)


@pytest.mark.parametrize("recurrence", ["linear", "one", "each"])
@pytest.mark.parametrize("reset", RESETS)
def test_every_kind_and_reset(most, kind, reset, recurrence):
    if kind == "Synaptic" and recurrence != "linear":
        return
    net = check(most, two(kind, reset=reset, recurrence=recurrence, learn=LEARN, beta="each", threshold="each"), runs=2)
    assert_ran_as(net, most)
    check(most, two(kind, reset=reset, recurrence=recurrence, alpha="each"), spikes_alone)


@pytest.mark.parametrize("form", ["hidden", "output"])
@pytest.mark.parametrize("loop", LOOPS)
def test_hidden_states(few, kind, form, loop):
    net = check(few, two(kind, form=form, learn=LEARN), LOOPS[loop], runs=2 if loop == "all" else 1)
    assert_ran_as(net, few)


@pytest.mark.parametrize("what", sorted(LEARN))
def test_each_parameter_alone(few, kind, what):
    check(few, two(kind, learn=frozenset((what,))), spikes_alone)


# Inputs.


@pytest.mark.parametrize("learns", [False, True])
def test_a_static_input(few, kind, learns):
    def loop(net: Net, x: Any) -> Any:
        states, rows = net.begin(), []
        for _ in range(STEPS):
            spk, states = net.step(x, states)
            rows.append(spk)
        return torch.stack(rows), states

    net = check(few, two(kind), loop, frames()[0].clone().requires_grad_(learns))
    assert_ran_as(net, few)


def test_a_dense_real_input(few, kind):
    assert_ran_as(check(few, two(kind), x=normal((STEPS, BATCH, INPUTS), 3).requires_grad_()), few)


def test_a_strided_input(few, kind):
    x = normal((BATCH, INPUTS, STEPS), 3).requires_grad_()
    recipe = net_of(two(kind, learn=LEARN))
    assert_ran_as(assert_equal_runs(recipe, lambda net: net(x.permute(2, 0, 1)), few, [x], runs=2), few)


class Convolutional(nn.Module):
    def __init__(self, kind: str, spike_grad: Any, conv_neurons: str = "Leaky") -> None:
        super().__init__()
        self.conv = fill(nn.Conv2d(1, 3, 3, dtype=F64), 3, 1.5, 0.5)
        below = leaky(spike_grad, 0.8, 0.6) if conv_neurons == "Leaky" else make_neuron(Case(conv_neurons), spike_grad)
        self.first, self.fc = below, fill(nn.Linear(3 * 4 * 4, 5, dtype=F64), 5, 1.5, 0.5)
        self.neuron = make_neuron(Case(kind, 5), spike_grad, 7)

    def forward(self, x: Any) -> Any:
        before, states, rows = self.first.reset_mem(), self.neuron.reset_mem(), []
        before = before if type(before) is tuple else (before,)
        for t in range(len(x)):
            spk, *before = self.first(self.conv(x[t]), *before)
            spk, states = advance(self.neuron, self.fc(spk.flatten(1)), states)
            rows.append(spk)
        return torch.stack(rows), before, states


@pytest.mark.parametrize("conv_neurons", ["Leaky", "Synaptic"])
def test_behind_a_convolution(few, kind, conv_neurons):
    x = spikes((STEPS, 2, 1, 6, 6), 0.3, 2)
    assert_equal_runs(lambda g: Convolutional(kind, g, conv_neurons), lambda net: net(x), few, runs=2)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (2, 1, 2, 5), (0, 5)])
def test_currents_of_any_shape(few, kind, shape):
    """A recurrent linear layer takes any leading dimensions, and so does each of the others."""
    x = normal((STEPS, *shape), 4, scale=0.8).requires_grad_()

    def go(neuron: Any) -> Any:
        states, rows = neuron.reset_mem(), []
        for step in x:
            spk, states = advance(neuron, step, states)
            rows.append(spk)
        return rows, states

    assert_equal_runs(lambda g: make_neuron(Case(kind, 5, learn=LEARN), g), go, few, [x])


@pytest.mark.parametrize("shape", [(1,), (1, 5), (3, 5), (3, 1)])
def test_settings_of_any_shape(few, kind, shape):
    """What is not one number or one per neuron is the framework's own, and right."""
    options = {name: normal(shape, ord(name[0]), scale=0.1) + 0.6 for name in ("alpha", "beta", "threshold")}
    if kind == "RLeaky":
        del options["alpha"]
    learn = {f"learn_{name}": True for name in options}
    accelerated = shape in ((1,), (1, 5))
    x = normal((STEPS, 3, 5), 4, scale=0.8)

    def recipe(spike_grad: Any) -> Any:
        return make_neuron(Case(kind, 5), spike_grad if accelerated else SPIKE_GRAD, **copy.deepcopy(options), **learn)

    def go(neuron: Any) -> Any:
        states, rows = neuron.reset_mem(), []
        for step in x:
            spk, states = advance(neuron, step, states)
            rows.append((spk, *states))
        return rows

    net = assert_equal_runs(recipe, go, few)
    assert (paths_of(net) == ["framework"]) == (not accelerated), reasons_of(net)
    assert accelerated or str(list(shape)) in reasons_of(net)[0]


# States.


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_initial_states(few, kind, reset, learns):
    begin = [
        tuple(normal((BATCH, n), 7 * n + i).requires_grad_(learns) for i in range(len(STATES[kind]))) for n in (9, 5)
    ]
    recipe = net_of(two(kind, reset=reset, learn=LEARN))
    inputs = [state for states in begin for state in states if learns]
    net = assert_equal_runs(recipe, lambda net: net(frames(), begin), few, inputs)
    assert_ran_as(net, few)


def test_states_are_carried_from_one_forward_to_the_next(few, kind):
    def go(net: Net) -> Any:
        first, states = net(frames())
        second, states = net(frames(2), states)
        third, states = net(frames(3), [tuple(s.detach() for s in layer) for layer in states])
        return first, second, third, states

    assert_equal_runs(net_of(two(kind, learn=LEARN)), go, few)


@pytest.mark.parametrize("form", ["explicit", "hidden", "output"])
def test_states_that_persist_in_the_neuron(few, kind, form):
    """Nobody resets: the second call begins where the first ended; a new batch size begins anew."""

    def loop(net: Net, x: Any) -> Any:
        rows = []
        for step in x:
            for linear, neuron in zip(net.linears, net.neurons, strict=True):
                out = neuron(linear(step))
                step = out[0] if type(out) is tuple else out
            rows.append((step, *states_of(net.neurons[-1], out)))
        return rows

    def go(net: Net) -> Any:
        first = net(frames())
        for neuron in net.neurons:
            for name in STATES[kind]:
                setattr(neuron, name, getattr(neuron, name).detach())
        return first, net(frames(2)), net(frames(3, batch=2)), net(frames(4, batch=2))

    assert_equal_runs(net_of(two(kind, form=form)), go, few)


@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)])
def test_states_given_in_part(few, kind, given):
    """One state by its name, the other kept by the neuron."""
    names = [STATES[kind][i] for i in given]

    def go(net: Net) -> Any:
        rows = []
        for t, step in enumerate(frames()):
            states = {name: normal((BATCH, 9), 10 * t + i) for i, name in enumerate(names)} if t in (0, 3) else {}
            rows.append(net.neurons[0](net.linears[0](step), **states))
        return rows

    def forget(net: Net) -> Any:
        net.begin()
        return go(net)

    assert_equal_runs(net_of([Case(kind, 9)]), forget, few, runs=2)

    def in_forward(net: Net, x: Any) -> Any:
        return forget(net)

    check(few, [Case(kind, 9)], in_forward)


def test_hidden_states_may_not_be_passed(kind):
    theirs, ours = (make_neuron(Case(kind, 5, form="hidden")) for _ in range(2))
    sparse_backend.enable(ours, b_th=0.3)
    for name in STATES[kind]:
        messages = []
        for neuron in (theirs, ours):
            with pytest.raises(TypeError) as raised:
                neuron(torch.zeros(2, 5, dtype=F64), **{name: torch.ones(2, 5, dtype=F64)})
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def halve_the_membrane(states: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*states[:-1], states[-1] * 0.5)


def other_first_state(states: tuple[Any, ...]) -> tuple[Any, ...]:
    """Spikes that are no spikes, or another synaptic current."""
    return (0.3 - states[0], *states[1:])


def no_first_state(states: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.zeros_like(states[0]), *states[1:])


def masked_in_place(states: tuple[Any, ...]) -> tuple[Any, ...]:
    states = tuple(state.clone() for state in states)
    for state in states:
        state[:, ::2] = 0
    return states


def exchanged(states: tuple[Any, ...]) -> tuple[Any, ...]:
    return states[::-1]


def detached(states: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(state.detach() for state in states)


def first_detached(states: tuple[Any, ...]) -> tuple[Any, ...]:
    return (states[0].detach(), *states[1:])


def looked_at(states: tuple[Any, ...]) -> tuple[Any, ...]:
    assert all(math.isfinite(float(state.sum())) for state in states)
    return states


def rolled(states: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(state.roll(1, 0) for state in states)


CHANGES = [
    halve_the_membrane, other_first_state, no_first_state, masked_in_place, exchanged, detached, first_detached,
    looked_at, rolled,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_states_changed_between_steps(few, kind, change):
    def loop(net: Net, x: Any) -> Any:
        states, rows = net.begin(), []
        for t in range(len(x)):
            spk, states = net.step(x[t], states)
            if t in (0, 2, 3):
                states = [change(layer) for layer in states]
            rows.append((spk, *states[-1]))
        return rows, states

    check(few, two(kind, learn=LEARN, reset="subtract"), loop)


def test_hidden_states_changed_between_steps(few, kind):
    def loop(net: Net, x: Any) -> Any:
        net.begin()
        rows = []
        for t in range(len(x)):
            spk, _ = net.step(x[t], [()] * 2)
            if t % 2:
                net.neurons[0].mem = net.neurons[0].mem * 0.5
                name = STATES[kind][0]
                setattr(net.neurons[1], name, getattr(net.neurons[1], name) + 0.2)
            rows.append(spk)
        return torch.stack(rows), net.neurons[0].mem

    check(few, two(kind, form="hidden"), loop)


def test_states_feed_other_layers(few, kind):
    """A layer on the membrane, a skip over spikes, feedback from the last layer's states to the first."""

    def loop(net: Net, x: Any) -> Any:
        states, rows, back = net.begin(), [], 0.0
        for t in range(len(x)):
            spk, first = advance(net.neurons[0], net.linears[0](x[t]) + back, states[0])
            out, second = advance(net.neurons[1], net.linears[1](spk + 0.1 * first[-1]), states[1])
            states, back = [first, second], 0.3 * second[-1][:, :1] - 0.2 * out[:, 1:2]
            rows.append(out + second[0] * spk[:, :5])
        return torch.stack(rows), states

    check(few, two(kind, learn=LEARN), loop)


def test_one_neuron_called_twice_in_a_step(few, kind):
    def loop(net: Net, x: Any) -> Any:
        states = [net.neurons[0].reset_mem() for _ in range(2)]
        rows = []
        for t in range(len(x)):
            current = net.linears[0](x[t])
            a, states[0] = advance(net.neurons[0], current, states[0])
            b, states[1] = advance(net.neurons[0], 0.5 * current + a, states[1])
            rows.append(a - 2 * b)
        return torch.stack(rows), states

    check(few, [Case(kind, 9, learn=LEARN)], loop)


def test_the_first_layers_spikes_only_recur(few, kind):
    """Spikes that nothing else reads, and a loss on the membrane alone."""

    def loop(net: Net, x: Any) -> Any:
        states = net.neurons[0].reset_mem()
        for t in range(len(x)):
            _, states = advance(net.neurons[0], net.linears[0](x[t]), states)
        return states[-1]

    assert_ran_as(check(few, [Case(kind, 9, learn=LEARN)], loop), few)


def early_exit(net: Net, x: Any) -> Any:
    states, rows = net.begin(), []
    for t in range(len(x)):
        spk, states = net.step(x[t], states)
        rows.append(spk)
        if torch.stack(rows).sum().item() > 6:
            break
    return torch.stack(rows), states


def preallocated(net: Net, x: Any) -> Any:
    states, out = net.begin(), torch.zeros(len(x), x.shape[1], 5, dtype=F64)
    for t in range(len(x)):
        spk, states = net.step(x[t], states)
        out[t] = spk
    return out, states


def layer_by_layer(net: Net, x: Any) -> Any:
    states = net.begin()
    for i in range(2):
        rows = []
        for t in range(len(x)):
            spk, states[i] = advance(net.neurons[i], net.linears[i](x[t]), states[i])
            rows.append(spk)
        x = torch.stack(rows)
    return x, states


def fewer_samples_midway(net: Net, x: Any) -> Any:
    states, rows = net.begin(), []
    for t in range(len(x)):
        if t == 3:
            states = [tuple(state[:2] for state in layer) for layer in states]
        spk, states = net.step(x[t] if t < 3 else x[t][:2], states)
        rows.append(spk)
    return rows, states


def states_of_another_batch(net: Net, x: Any) -> Any:
    """A state whose shape is not the current's begins anew, each by itself."""
    states, rows = net.begin(), []
    for t in range(len(x)):
        spk, states = net.step(x[t], states)
        rows.append(spk)
        if t == 2:
            states = [(layer[0][:2], *layer[1:]) for layer in states]
        if t == 4:
            states = [(*layer[:-1], layer[-1][:2]) for layer in states]
    return rows, states


def a_step_without_gradient(net: Net, x: Any) -> Any:
    states, rows = net.begin(), []
    for t in range(len(x)):
        with torch.set_grad_enabled(t != 2):
            spk, states = net.step(x[t], states)
        rows.append(spk)
    return rows, states


def two_populations(net: Net, x: Any) -> Any:
    """Two runs through the same neurons, forwards and backwards in time."""
    one, other, rows = net.begin(), net.begin(), []
    for t in range(len(x)):
        a, one = net.step(x[t], one)
        b, other = net.step(x[-1 - t], other)
        rows.append(a - b)
    return rows, one, other


def a_slower_layer(net: Net, x: Any) -> Any:
    states, rows = net.begin(), []
    for t in range(len(x)):
        if t % 2 == 0:
            below, states[0] = advance(net.neurons[0], net.linears[0](x[t]), states[0])
        spk, states[1] = advance(net.neurons[1], net.linears[1](below), states[1])
        rows.append(spk)
    return rows, states


def dropout_between(net: Net, x: Any) -> Any:
    states, rows = net.begin(), []
    for t in range(len(x)):
        below, states[0] = advance(net.neurons[0], net.linears[0](x[t]), states[0])
        spk, states[1] = advance(net.neurons[1], net.linears[1](nn.functional.dropout(below, 0.3)), states[1])
        rows.append(spk)
    return rows, states


@pytest.mark.parametrize(
    "loop",
    [
        early_exit, preallocated, layer_by_layer, fewer_samples_midway, states_of_another_batch,
        a_step_without_gradient, two_populations, a_slower_layer, dropout_between,
    ],
    ids=lambda loop: loop.__name__,
)  # fmt: skip
def test_other_loops(few, kind, loop):
    check(few, two(kind, learn=LEARN), loop)


def test_a_model_called_once_per_step(few, kind):
    """The loop is the caller's; each forward is one step."""

    def go(net: Net) -> Any:
        states, rows = net.begin(), []
        for step in frames():
            spk, states = net(step, states)
            rows.append((spk, *states[-1]))
        return rows, states

    assert_equal_runs(net_of(two(kind, learn=LEARN), lambda net, x, states: net.step(x, states)), go, few, runs=2)


# Truncated back-propagation and training.


CUTS = ["detach", "detach_", "detach_hidden"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_truncated_backpropagation(kind, cut, fused):
    """A backward pass and an optimiser step every three steps of the loop."""

    def train(net: Net, around: Any) -> list[float]:
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
        states, losses, x = net.begin(), [], frames(steps=9)
        for begin in range(0, 9, 3):
            loss = torch.zeros((), dtype=F64)
            with around(net):
                for t in range(begin, begin + 3):
                    spk, states = net.step(x[t], states)
                    loss = loss + (spk * (t + 1)).sum() + (states[-1][-1] ** 2).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            if cut == "detach_hidden":
                getattr(snn, kind).detach_hidden()
                for neuron in net.neurons:
                    if kind == "RSynaptic":  # which snnTorch forgets
                        neuron.spk.detach_()
                states = [tuple(getattr(neuron, name) for name in STATES[kind]) for neuron in net.neurons]
            elif cut == "detach_":
                for layer in states:
                    snn.SpikingNeuron.detach(*layer)
            else:
                states = [tuple(state.detach() for state in layer) for layer in states]
        return losses

    cases = two(kind, learn=LEARN)
    theirs, edge = stock(net_of(cases), BAND)
    with sparse_always():
        ours = sparse_backend.enable(net_of(cases)(SPIKE_GRAD), b_th=BAND)
        got = train(ours, sparse_backend.fuse_time if fused else lambda net: nullcontext())
    expected = train(theirs, lambda net: nullcontext())
    assert edge.is_clear()
    assert got == pytest.approx(expected, rel=1e-9)
    assert_same_gradients(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_cut_inside_the_forward(few, kind):
    def loop(net: Net, x: Any) -> Any:
        states, rows = net.begin(), []
        for t in range(len(x)):
            if t % 2 == 0:
                states = [detached(layer) for layer in states]
            spk, states = net.step(x[t], states)
            rows.append(spk)
        return torch.stack(rows), states

    check(few, two(kind, learn=LEARN), loop)


def test_detach_and_reset_of_hidden_states_inside_the_forward(few, kind):
    def loop(net: Net, x: Any) -> Any:
        net.begin()
        rows = []
        for t in range(len(x)):
            if t == 2:
                getattr(snn, kind).detach_hidden()
            if t == 4:
                getattr(snn, kind).reset_hidden()
            rows.append(net.step(x[t], [()] * 2)[0])
        return torch.stack(rows)

    # The stock net's neurons come first: without its graph they have nothing to detach.
    check(few, two(kind, form="hidden", learn=LEARN), loop)


def test_reset_leaves_what_the_framework_leaves(few, kind):
    """`utils.reset` before every pass of an nn.Sequential; RSynaptic's spikes survive it."""

    def recipe(spike_grad: Any) -> nn.Module:
        cases = [Case(kind, 9, form="hidden"), Case(kind, 5, form="output")]
        return nn.Sequential(*Net(cases, spike_grad, all_states).linears, *Net(cases, spike_grad, all_states).neurons)

    def go(net: Any) -> Any:
        rows = []
        with torch.no_grad():
            for seed in (1, 2):
                utils.reset(net)
                for step in frames(seed):
                    rows.append(net[3](net[1](net[2](net[0](step)))))
        return rows

    assert_equal_runs(recipe, go, few, runs=2)


def test_parameters_updated_between_steps(few, kind):
    """Inside a forward: seen at the next step, or a clear error where the loop is recorded."""

    def loop(net: Net, x: Any) -> Any:
        states, rows = net.begin(), []
        for t in range(len(x)):
            spk, states = net.step(x[t], states)
            rows.append((spk, *states[-1]))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.97)
        return rows

    theirs, edge = stock(net_of(two(kind, learn=LEARN), loop), few.b_th)
    with few.policy(), torch.no_grad():
        ours = enabled(net_of(two(kind, learn=LEARN), loop), few)
        if few.fuse_time:
            with pytest.raises(RuntimeError, match="changed in place after a recorded call"):
                ours(frames())
            return
        for _ in range(2):
            for a, b in zip(ours(frames()), theirs(frames()), strict=True):
                for one, other in zip(a, b, strict=True):
                    assert_close(one + 0, other)
    assert edge.is_clear()


def test_a_single_step_gives_every_parameter_a_gradient(kind):
    """Zeros, not None: an optimiser with momentum or decay takes a step with zeros."""
    neuron = sparse_backend.enable(make_neuron(Case(kind, 5, learn=LEARN)), b_th=INF)
    _, states = advance(neuron, normal((2, 5), 0), neuron.reset_mem())
    states[-1].sum().backward()
    assert [name for name, p in neuron.named_parameters() if p.grad is None] == []


def test_online_learning_of_every_step(few, kind):
    """An optimiser's step after each time step; states cut."""

    def go(net: Net) -> Any:
        optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
        states, rows = net.begin(), []
        for step in frames():
            spk, states = net.step(step, states)
            rows.append(weighted((spk, *states[-1])))
            optimiser.zero_grad()
            rows[-1].backward()
            optimiser.step()
            states = [detached(layer) for layer in states]
        return [row.detach() for row in rows]

    assert_equal_runs(net_of(two(kind, learn=LEARN)), go, few, runs=2)


def test_two_forwards_one_backward_and_a_retained_graph(few, kind):
    grads = []
    theirs, edge = stock(net_of(two(kind, learn=LEARN), spikes_alone), few.b_th)
    with few.policy():
        for net in (enabled(net_of(two(kind, learn=LEARN), spikes_alone), few), theirs):
            loss = weighted(net(frames()) * net(frames(2))) + sum((p**2).sum() for p in net.parameters())
            loss.backward(retain_graph=True)
            loss.backward()
            grads.append({name: p.grad for name, p in net.named_parameters()})
    assert edge.is_clear()
    assert_same_gradients(*grads)


def test_gradients_asked_for_by_name(few, kind):
    x, grads = frames().requires_grad_(), []
    theirs, edge = stock(net_of(two(kind, learn=LEARN)), few.b_th)
    with few.policy():
        for net in (enabled(net_of(two(kind, learn=LEARN)), few), theirs):
            leaves = {"x": x, **dict(net.neurons[0].named_parameters())}
            out = torch.autograd.grad(weighted(net(x)), [*leaves.values()])
            grads.append(dict(zip(leaves, out, strict=True)))
    assert edge.is_clear()
    assert_same_gradients(*grads)


# Settings.


@pytest.mark.parametrize("changed", [{}, {"beta": 0}, {"beta": 0.5}, {"threshold": 0.5}], ids=str)
def test_settings_that_are_integers(few, kind, changed):
    def recipe(spike_grad: Any) -> Net:
        options = {"beta": 1, "threshold": 1, "spike_grad": spike_grad}
        if kind != "RLeaky":
            options["alpha"] = 1
        if kind != "Synaptic":
            options.update(all_to_all=False, V=1, learn_recurrent=False)
        net = Net(two(kind), spike_grad, all_states)
        net.neurons[0] = getattr(snn, kind)(**{**options, **changed})
        return net

    net = assert_equal_runs(recipe, lambda net: net(frames()), few)
    assert paths_of(net)[0] != "framework", reasons_of(net)


@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0, 1.7])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_decays_are_clamped(few, kind, name, value):
    if not (kind == "RLeaky" and name == "alpha"):
        for shape in ((), (5,)):
            number = torch.full(shape, value, dtype=F64)
            if shape:
                number[0] = 0.6
            options = {name: number, f"learn_{name}": True}

            def recipe(spike_grad: Any, options: Any = options) -> Net:
                net = Net([Case(kind, 5)], spike_grad, all_states)
                net.neurons[0] = make_neuron(Case(kind, 5), spike_grad, 10, **copy.deepcopy(options))
                return net

            net = assert_equal_runs(recipe, lambda net: net(frames()), few)
            grad = getattr(net.neurons[0], name).grad
            if not 0 <= value <= 1:
                assert not bool((grad.flatten()[1:] if shape else grad).any())
                assert not shape or bool(grad[0])


@pytest.mark.parametrize(("value", "reset"), [(-0.4, "subtract"), (-0.4, "zero"), (-0.4, "none"), (0.0, "subtract")])
def test_thresholds_that_zero_states_reach(few, kind, value, reset):
    """A neuron at rest fires, and is reset before its first step."""
    options = {"threshold": torch.tensor(value, dtype=F64), "learn_threshold": True}

    def recipe(spike_grad: Any) -> Net:
        net = Net(two(kind), spike_grad, all_states)
        net.neurons[0] = make_neuron(Case(kind, 9, reset), spike_grad, 10, **copy.deepcopy(options))
        return net

    begin = [tuple(normal((BATCH, n), n + i) for i in range(len(STATES[kind]))) for n in (9, 5)]
    if value:
        assert_equal_runs(recipe, lambda net: net(frames()), few)
    assert_equal_runs(recipe, lambda net: net(frames(), begin), few)


def tie_net(kind: str, reset: str, recurrence: str, seed: int, dtype: torch.dtype, spike_grad: Any) -> Any:
    half = torch.tensor(0.5, dtype=dtype)
    options: dict[str, Any] = {"beta": half, "threshold": half.clone(), "learn_threshold": True}
    if kind != "RLeaky":
        options["alpha"] = half.clone()
    if kind != "Synaptic" and recurrence == "each":
        options["V"] = dyadic((6,), seed + 3, dtype, unit=0.25, most=2)
    net = Net([Case(kind, 6), Case(kind, 4)], spike_grad, all_states)
    net.neurons[0] = make_neuron(Case(kind, 6, reset, recurrence=recurrence, learn=LEARN), spike_grad, **options)
    net.to(dtype)
    with torch.no_grad():
        for i, (linear, neuron) in enumerate(zip(net.linears, net.neurons, strict=True)):
            for part in (linear, getattr(neuron, "recurrent", None)):
                if not isinstance(part, nn.Linear):
                    continue
                part.weight.copy_(dyadic(part.weight.shape, seed + i, dtype, unit=0.25, most=3))
                part.bias.copy_(dyadic(part.bias.shape, seed + i + 50, dtype, unit=0.25, most=2))
            for name in ("alpha", "beta", "threshold"):
                if hasattr(neuron, name):
                    getattr(neuron, name).fill_(0.5)
    return net


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("recurrence", ["linear", "each"])
@pytest.mark.parametrize("reset", RESETS)
def test_ties(kind, reset, recurrence, dtype):
    """Dyadic numbers: V meets the threshold, and |V - threshold| the band's edge, exactly; spikes equal bit for bit."""
    b_th, met, fired = 0.25, 0, 0
    for seed in range(3):
        seen: list[Tensor] = []
        band = masked(SPIKE_GRAD, b_th)

        def watched(x: Tensor, seen: Any = seen, band: Any = band) -> Tensor:
            seen.append(x.detach())
            return band(x)

        x = frames(seed).to(dtype)
        theirs = tie_net(kind, reset, recurrence, seed, dtype, watched)
        ours = sparse_backend.enable(tie_net(kind, reset, recurrence, seed, dtype, SPIKE_GRAD), b_th=b_th)
        with sparse_always():
            expected, got = (outcome(net, lambda net, x=x: net(x), loss=weighted) for net in (theirs, ours))
        for a, b in zip(got.outputs, expected.outputs, strict=True):
            assert torch.equal(a, b)
        if dtype is F64:
            assert_same_gradients(got.gradients, expected.gradients)
        values = torch.cat([part.flatten() for part in seen])
        met += int((values == 0).sum()) + int((values.abs() == b_th).sum())
        fired += int(expected.outputs[0].sum())
    assert met > 20 and fired > 3


# The recurrence.


class Scaled(nn.Module):
    """A user's own recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Any) -> Any:
        return self.scale * x.roll(1, -1)


class Doubled(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


RECURRENCES: dict[str, Callable[[], nn.Module]] = {
    "no bias": lambda: nn.Linear(9, 9, bias=False),
    "frozen bias": lambda: _frozen(nn.Linear(9, 9), "bias"),
    "frozen weight": lambda: _frozen(nn.Linear(9, 9), "weight"),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(9, 9)),
    "subclass": lambda: Doubled(9, 9),
    "sequential": lambda: nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 9)),
    "dropout": lambda: nn.Sequential(nn.Linear(9, 9), nn.Dropout(0.4)),
    "batch norm": lambda: nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9)),
    "own": Scaled,
    "identity": nn.Identity,
}


def _frozen(linear: nn.Linear, name: str) -> nn.Linear:
    getattr(linear, name).requires_grad_(False)
    return linear


# Where it resets to zero, snnTorch calls the recurrence twice a step: two dropouts, two running means. What is not
# known to answer the same twice is left to it then.
TWICE = {"weight norm", "subclass", "dropout", "batch norm", "own"}


@pytest.mark.parametrize("what", RECURRENCES)
@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_another_recurrence(few, kind, what, reset):
    framework = reset == "zero" and what in TWICE

    def recipe(spike_grad: Any) -> Net:
        net = Net(two(kind, reset=reset), spike_grad, all_states)
        torch.manual_seed(5)
        net.neurons[0].recurrent = RECURRENCES[what]().double()
        if framework:
            net.neurons[0].spike_grad = SPIKE_GRAD  # not masked
        return net

    net = assert_equal_runs(recipe, lambda net: net(frames()), few)
    assert (paths_of(net)[0] == "framework") == framework, reasons_of(net)
    assert not framework or "reset to zero" in reasons_of(net)[0]


@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
@pytest.mark.parametrize("reset", RESETS)
def test_recurrences_with_hooks(few, kind, reset):
    """Seen as often, and heeded, as snnTorch calls them: twice a step where it resets to zero."""

    def recipe(spike_grad: Any) -> Net:
        net = Net(two(kind, reset=reset), spike_grad, all_states)
        net.seen = []
        recurrent = net.neurons[0].recurrent
        recurrent.register_forward_pre_hook(lambda module, args: net.seen.append(float(args[0].sum())))
        recurrent.register_forward_hook(lambda module, args, out: out * 0.5)
        if reset == "zero":
            net.neurons[0].spike_grad = SPIKE_GRAD
        return net

    def go(net: Any) -> Any:
        net.seen.clear()
        return net(frames()), list(net.seen)

    net = assert_equal_runs(recipe, go, few, runs=2)
    assert paths_of(net)[0] in (["framework"] if reset == "zero" else ["sparse step", "dense step"])


@pytest.mark.parametrize("learn", [frozenset(), LEARN])
def test_parts_exchanged_after_enabling(few, kind, learn):
    def go(net: Net) -> Any:
        neuron, outs = net.neurons[0], [net(frames())]
        number = torch.tensor(0.3, dtype=F64)
        neuron.beta = nn.Parameter(number) if learn else number
        outs.append(net(frames()))
        if kind != "Synaptic":
            neuron.recurrent.weight = nn.Parameter(neuron.recurrent.weight.detach() * 0.5)
            outs.append(net(frames()))
            neuron.recurrent = fill(nn.Linear(9, 9, bias=False, dtype=F64), 3, 0.8)
            outs.append(net(frames()))
            neuron.recurrent = Scaled().double()
            outs.append(net(frames()))
        return outs

    assert_equal_runs(net_of(two(kind, learn=learn)), go, few)


@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
def test_one_recurrent_layer_of_two_neurons(few, kind):
    def recipe(spike_grad: Any) -> Net:
        net = Net([Case(kind, 8), Case(kind, 8)], spike_grad, all_states)
        net.neurons[1].recurrent = net.neurons[0].recurrent
        net.linears[1] = net.neurons[0].recurrent
        net.requires_grad_()
        return net

    assert_ran_as(assert_equal_runs(recipe, lambda net: net(frames()), few, runs=2), few)


@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
@pytest.mark.parametrize("recurrence", ["one", "each"])
def test_a_fixed_V_that_stays_float32(few, kind, recurrence):
    """snnTorch's recurrence keeps a fixed V as a plain tensor, which `.double()` does not reach."""

    def recipe(spike_grad: Any) -> Net:
        net = Net(two(kind), spike_grad, all_states)
        V = torch.tensor(0.4) if recurrence == "one" else normal((9,), 3, F32, 0.4)
        net.neurons[0] = make_neuron(Case(kind, 9, recurrence=recurrence), spike_grad, 10, V=V)
        assert net.neurons[0].recurrent.V.dtype is F32
        return net

    assert_equal_runs(recipe, lambda net: net(frames()), few, runs=2)


@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
def test_a_V_set_anew_does_not_reach_the_recurrence(few, kind):
    def go(net: Net) -> Any:
        first = net(frames())
        net.neurons[0].V = torch.full_like(net.neurons[0].V, 5.0)  # the recurrence keeps its own
        second = net(frames())
        net.neurons[0].recurrent.V = torch.full((9,), -0.5, dtype=F64)
        return first, second, net(frames())

    assert_equal_runs(net_of(two(kind, recurrence="each")), go, few)


class Spatial(nn.Module):
    """Recurrent convolutions."""

    def __init__(self, kind: str, spike_grad: Any, reset: str) -> None:
        super().__init__()
        self.conv = fill(nn.Conv2d(1, 2, 3, padding=1, dtype=F64), 1, 1.5, 0.5)
        options = {} if kind == "RLeaky" else {"alpha": torch.tensor(0.5, dtype=F64), "learn_alpha": True}
        self.neuron = getattr(snn, kind)(
            beta=torch.tensor(0.8, dtype=F64), conv2d_channels=2, kernel_size=3, spike_grad=spike_grad,
            threshold=torch.tensor(0.6, dtype=F64), learn_threshold=True, reset_mechanism=reset, **options,
        ).double()  # fmt: skip
        fill(self.neuron.recurrent, 3, 0.8)

    def forward(self, x: Any) -> Any:
        states, rows = self.neuron.reset_mem(), []
        for t in range(len(x)):
            spk, states = advance(self.neuron, self.conv(x[t]), states)
            rows.append(spk)
        return torch.stack(rows), states


@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
@pytest.mark.parametrize("reset", RESETS)
def test_convolutional_recurrences_run_step_by_step(few, kind, reset):
    x = spikes((4, 2, 1, 5, 5), 0.3, 2)
    net = assert_equal_runs(lambda g: Spatial(kind, g, reset), lambda net: net(x), few, runs=2)
    (layer,) = sparse_backend.report(net).layers
    assert layer.path in ("sparse step", "dense step"), (layer.path, layer.reason)


# What is left to the framework.


class Tuned(snn.Synaptic):
    def forward(self, input_: Any, syn: Any = None, mem: Any = None) -> Any:
        return super().forward(2 * input_, syn, mem)


def quantised(x: Tensor) -> Tensor:
    return x + ((x * 4).round() / 4 - x).detach()


def with_state_function(neuron: Any) -> Any:
    original = neuron.state_function

    def half(input_: Any) -> Any:
        return original(0.5 * input_)

    neuron.state_function = half
    return neuron


def replaced(neuron: Any, name: str) -> Any:
    original = getattr(neuron, name)
    setattr(neuron, name, lambda mem: original(mem - 0.1))
    return neuron


def graded(neuron: Any) -> Any:
    neuron.graded_spikes_factor.fill_(0.5)
    return neuron


FALLBACKS: dict[str, tuple[Callable[..., Any], str]] = {
    "state_quant": (lambda case, g: make_neuron(case, g, state_quant=quantised), "state_quant"),
    "inhibition": (lambda case, g: make_neuron(case, g, inhibition=True), "inhibition"),
    "surrogate_disable": (lambda case, g: make_neuron(case, g, surrogate_disable=True), "surrogate_disable"),
    "reset_delay": (lambda case, g: make_neuron(case, g, reset_delay=False), "reset_delay"),
    "reset_delay zero": (
        lambda case, g: make_neuron(replace(case, reset="zero"), g, reset_delay=False), "reset_delay",
    ),
    "graded": (lambda case, g: graded(make_neuron(case, g)), "graded"),
    "fire": (lambda case, g: replaced(make_neuron(case, g), "fire"), "fire"),
    "mem_reset": (lambda case, g: replaced(make_neuron(case, g), "mem_reset"), "mem_reset"),
    "state function": (lambda case, g: with_state_function(make_neuron(case, g)), "state"),
}  # fmt: skip


def zeros_of(case: Case) -> tuple[Tensor, ...]:
    """States to begin with, since without them stock RSynaptic's reset_delay=False fails."""
    return tuple(torch.zeros(BATCH, case.neurons, dtype=F64) for _ in STATES[case.kind])


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("what", FALLBACKS)
def test_what_is_not_accelerated_says_why(few, kind, what):
    """It runs with its own surrogate, not masked; the layer above is accelerated."""
    make, reason = FALLBACKS[what]
    cases = [Case(kind, 9), Case(kind, 5)]

    def recipe(spike_grad: Any) -> Net:
        net = Net(cases, spike_grad, all_states)
        net.neurons[0] = make(cases[0], SPIKE_GRAD)
        if what == "surrogate_disable":
            net.neurons[0].spike_grad = no_derivative
        return net

    begin = [zeros_of(case) for case in cases]
    net = assert_equal_runs(recipe, lambda net: net(frames(), begin), few)
    first, second = sparse_backend.report(net).layers
    assert first.path == "framework" and reason in first.reason, first
    assert second.path != "framework", second


@pytest.mark.parametrize("kind", ["Synaptic", "RLeaky"])
def test_without_a_reset_its_delay_means_nothing(few, kind):
    def recipe(spike_grad: Any) -> Net:
        net = Net([Case(kind, 9), Case(kind, 5)], spike_grad, all_states)
        net.neurons[0] = make_neuron(Case(kind, 9, "none"), spike_grad, reset_delay=False)
        return net

    assert_ran_as(assert_equal_runs(recipe, lambda net: net(frames()), few, runs=2), few)


@pytest.mark.parametrize("reset", ["subtract", "none"])
def test_reset_delay_false_fails_in_RSynaptic_as_it_does_in_stock(reset):
    """snnTorch reads the spikes it was given, not its own: none, or of no size."""
    messages = []
    for enable in (True, False):
        neuron = make_neuron(Case("RSynaptic", 5, reset), reset_delay=False)
        if enable:
            sparse_backend.enable(neuron, b_th=0.3)
        for states in ((), neuron.reset_mem()):
            with pytest.raises((TypeError, RuntimeError)) as raised:
                neuron(torch.ones(2, 5, dtype=F64), *states)
            messages.append(str(raised.value))
    assert messages[:2] == messages[2:]


def test_subclasses_are_left_alone(few):
    def recipe(spike_grad: Any) -> Net:
        net = Net([Case("Synaptic", 9), Case("RSynaptic", 5)], spike_grad, subclass_below)
        net.neurons[0].__class__ = Tuned
        net.neurons[0].spike_grad = SPIKE_GRAD
        return net

    def subclass_below(net: Net, x: Any) -> Any:
        states, rows = net.begin(), []
        for step in x:
            spk, *below = net.neurons[0](net.linears[0](step), *states[0])
            spk, above = advance(net.neurons[1], net.linears[1](spk), states[1])
            states = [below, above]
            rows.append(spk)
        return rows, states

    net = assert_equal_runs(recipe, lambda net: net(frames()), few)
    assert "neurons.0" not in [layer.name for layer in sparse_backend.report(net).layers if layer.path != "framework"]
    assert any("Tuned is a subclass of snntorch.Synaptic" in (reason or "") for reason in reasons_of(net))


@pytest.mark.parametrize("fuse_time", [True, False])
def test_options_may_change_between_calls(kind, fuse_time):
    begin = [zeros_of(case) for case in two(kind)]

    def go(net: Net) -> Any:
        neuron: Any = net.neurons[0]
        changes = [
            lambda: None,
            lambda: setattr(neuron, "threshold", torch.tensor(0.4, dtype=F64)),
            lambda: neuron.beta.fill_(0.2),
            lambda: neuron.beta.data.fill_(1.5),  # bumps no version
            lambda: setattr(neuron, "beta", torch.tensor(0.7, dtype=F64)),
            lambda: setattr(neuron, "reset_mechanism", "zero"),  # which snnTorch heeds in part
            lambda: setattr(neuron, "reset_mechanism", "subtract"),
            lambda: setattr(neuron, "state_quant", quantised),
            lambda: setattr(neuron, "state_quant", False),
            lambda: setattr(neuron, "reset_delay", False),
            lambda: setattr(neuron, "reset_delay", True),
            lambda: setattr(neuron, "state_function", neuron._base_int),
        ]
        outs = []
        for change in changes:
            change()
            outs.append(net(frames(), begin))
        return outs

    assert_equal_runs(net_of(two(kind)), go, Way(INF, fuse_time))


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("changed", ["alpha", "beta", "threshold", "weight", "V"])
def test_data_written_behind_autograds_back_is_seen_by_the_next_call(kind, changed, fuse_time):
    def go(net: Net) -> Any:
        outs = [net(frames())]
        for neuron in net.neurons:
            recurrent = getattr(neuron, "recurrent", None)
            target = getattr(recurrent if changed in ("weight", "V") else neuron, changed, None)
            if target is not None:
                target.data.mul_(0.5)
                outs.append(net(frames()))
                target.detach().numpy()[...] = 0.3
                outs.append(net(frames()))
        return outs

    recurrence = "each" if changed == "V" else "linear"
    assert_equal_runs(net_of(two(kind, learn=LEARN, recurrence=recurrence)), no_grad(go), Way(INF, fuse_time))


def no_grad(go: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def inner(net: Any) -> Any:
        with torch.no_grad():
            return go(net)

    return inner


# Modes of torch.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", ["explicit", "output"])
def test_without_gradients(few, kind, mode, form):
    def go(net: Net) -> Any:
        with mode():
            return [o.clone() for o in net(frames())[0]]

    cases = two(kind, form=form, learn=LEARN)
    theirs, edge = stock(net_of(cases), few.b_th)
    with few.policy():
        ours = enabled(net_of(cases), few)
        for _ in range(2):
            for a, b in zip(go(ours), go(theirs), strict=True):
                assert_close(a, b)
    assert edge.is_clear()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", ["net", "step"])
def test_checkpoints(few, kind, around, reentrant):
    x = frames().requires_grad_()

    def loop(net: Net, x: Any) -> Any:
        states, rows = net.begin(), []
        for t in range(len(x)):
            if around == "step":
                spk, states = checkpoint(net.step, x[t], states, use_reentrant=reentrant)
            else:
                spk, states = net.step(x[t], states)
            rows.append(spk)
        return (torch.stack(rows), *states[-1])

    def go(net: Net) -> Any:
        return net(x) if around == "step" else checkpoint(net, x, use_reentrant=reentrant)

    names = tuple(f"neurons.{i}.{name}" for i in range(2) for name in STATES[kind])
    if reentrant and around == "step":  # tensors inside lists take no gradient through that checkpoint

        def flat(net: Net, x: Any) -> Any:
            size = len(STATES[kind])

            def step(x: Any, *states: Any) -> Any:
                spk, after = net.step(x, [states[:size], states[size:]])
                return (spk, *after[0], *after[1])

            states = tuple(s for layer in net.begin() for s in layer)
            rows = []
            for t in range(len(x)):
                spk, *states = checkpoint(step, x[t], *states, use_reentrant=True)
                rows.append(spk)
            return torch.stack(rows)

        loop = flat
    assert_equal_runs(net_of(two(kind, learn=LEARN), loop), go, few, [x], skip=names)


def compare_compiled_steps(kind: str, reset: str, backend: str = "aot_eager") -> None:
    """One op on plain tensors for a neuron's step, the gradient masked."""
    torch._dynamo.reset()
    case = Case(kind, 9, reset, learn=LEARN)
    theirs, edge = stock(net_of([case]), BAND)
    ours = sparse_backend.enable(net_of([case])(SPIKE_GRAD), b_th=BAND)
    grads = []
    for net, step in ((ours, torch.compile(ours.step, backend=backend)), (theirs, theirs.step)):
        begin = tuple(torch.zeros(BATCH, 9, dtype=F64, requires_grad=True) for _ in STATES[kind])
        states, total = [begin], torch.zeros((), dtype=F64)
        for t, x in enumerate(frames()[:4]):
            spk, states = step(x, states)
            assert type(spk) is Tensor
            total = total + weighted((spk, *states[-1])) * (t + 1)
        total.backward()
        leaves = {**dict(net.named_parameters()), **dict(zip(STATES[kind], begin, strict=True))}
        grads.append({"loss": total.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    torch._dynamo.reset()
    assert edge.is_clear()
    assert_same_gradients(*grads)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_steps():
    compare_compiled_steps("RSynaptic", "subtract")


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_that_reset_to_zero():
    """In a process of its own: a list that the backward needs and does not have is a crash."""
    process = multiprocessing.get_context("fork").Process(
        target=compare_compiled_steps, args=("Synaptic", "zero", "eager")
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model():
    kind = "RSynaptic"
    torch._dynamo.reset()
    theirs, edge = stock(net_of(two(kind, learn=LEARN), last_states), INF)
    ours = sparse_backend.enable(net_of(two(kind, learn=LEARN), last_states)(SPIKE_GRAD), b_th=INF)
    compiled = torch.compile(ours, backend="eager")
    outs = []
    for net, call in ((ours, compiled), (theirs, theirs)):
        spk, states = call(frames())
        weighted((spk, *states[-1])).backward()
        outs.append({"spk": as_tensor(spk).detach(), **{n: p.grad for n, p in net.named_parameters()}})
    torch._dynamo.reset()
    assert edge.is_clear()
    assert_same_gradients(*outs)


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("b_th", [INF, INF])
def test_autocast(kind, b_th, fuse_time):
    """Linear layers, recurrent ones too, meet rounded weights; the states are float32."""
    few = Way(b_th, fuse_time, counts_decide=False)

    def run(net: Net, cast: bool) -> Any:
        net.float()
        if not cast:
            with torch.no_grad():
                for module in net.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.copy_(module.weight.bfloat16().float())
        with few.policy(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            rows, _ = net(frames().float())
        weighted(rows).backward()
        return [row.detach() + 0 for row in rows], {n: p.grad for n, p in net.named_parameters()}

    theirs, edge = stock(net_of(two(kind)), few.b_th)
    expected, gradients = run(theirs, False)
    with few.policy():
        ours = enabled(net_of(two(kind)), few)
        got, grads = run(ours, True)
    assert min(float((x.abs() - b).abs().min()) for x in edge.seen for b in {0.0, min(few.b_th, 9.0)}) > 1e-5
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is F32
        assert_close(a, b, rtol=1e-4)
    assert gradients.keys() == grads.keys()
    for name, gradient in gradients.items():
        if gradient is not None:
            assert float((grads[name] - gradient).abs().max()) <= 2**-7 * float(gradient.abs().max()), name


def test_float32_with_the_frameworks_surrogate(kind):
    """A user's usual model, snnTorch's own surrogate and dtypes."""
    results = []
    for enable in (True, False):
        net = Net(two(kind, learn=LEARN), snn_surrogate.fast_sigmoid(slope=25), all_states).float()
        if enable:
            sparse_backend.enable(net, b_th=INF)
        rows, _ = net(frames().float())
        weighted(rows).backward()
        results.append(([row.detach() for row in rows], {n: p.grad for n, p in net.named_parameters()}))
    (got, ours), (expected, theirs) = results
    assert torch.equal(got[0], expected[0]) and bool(got[0].any())
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-5)
    assert_same_gradients(ours, theirs, 1e-4)


def test_hooks_on_neurons(few, kind):
    def recipe(spike_grad: Any) -> Net:
        net = Net(two(kind, learn=LEARN), spike_grad, all_states)
        net.seen = []
        for i, neuron in enumerate(net.neurons):
            neuron.register_forward_pre_hook(lambda module, args, i=i: net.seen.append((i, float(args[0].sum()))))
            neuron.register_forward_hook(lambda module, args, out: (out[0] * 0.5, *out[1:]))
        return net

    def go(net: Any) -> Any:
        net.seen.clear()
        return net(frames()), [value for _, value in net.seen], [str(i) for i, _ in net.seen]

    assert_equal_runs(recipe, go, few, runs=2)


@pytest.mark.parametrize("where", ["linears.0", "neurons.0", "neurons.1"])
def test_full_backward_hooks(kind, where):
    seen_by = []
    theirs, _ = stock(net_of(two(kind)), INF)
    ours = sparse_backend.enable(net_of(two(kind))(SPIKE_GRAD), b_th=INF)
    for net in (ours, theirs):
        seen: list[Any] = []
        net.get_submodule(where).register_full_backward_hook(
            lambda module, gi, go, seen=seen: seen.append([g.clone() for g in (*gi, *go) if g is not None])
        )
        weighted(net(frames().requires_grad_())).backward()
        seen_by.append(seen)
    assert len(seen_by[0]) == len(seen_by[1]) == STEPS
    for a, b in zip(*seen_by, strict=True):
        for one, other in zip(a, b, strict=True):
            assert_close(one, other)


# Copies, and disable.


def test_deepcopy_and_pickle(kind):
    x, cases = frames(), two(kind, form="output", learn=LEARN)
    net = sparse_backend.enable(Net(cases, steep, all_states), b_th={"neurons.0": 0.2, "neurons.1": 0.4})
    with torch.no_grad():
        expected = [row + 0 for row in net(x)[0]]
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    others = (copy.deepcopy(net), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(net)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for other in others:
        assert [layer.b_th for layer in sparse_backend.report(other).layers] == [0.2, 0.4]
        with torch.no_grad():
            for a, b in zip(other(x)[0], expected, strict=True):
                assert torch.equal(a + 0, b)
        assert sparse_backend.report(other).layers[0].path != "framework"
        assert all(
            getattr(neuron, name).shape == (BATCH, n)
            for neuron, n in zip(other.neurons, (9, 5), strict=True) for name in STATES[kind]
        )  # fmt: skip


def steep(x: Tensor) -> Tensor:
    """A surrogate that can be pickled."""
    return SPIKE_GRAD(x)


@pytest.mark.parametrize("recurrence", ["linear", "each"])
def test_a_deepcopy_recurs_through_its_own_weights(few, kind, recurrence):
    def recipe(spike_grad: Any) -> Net:
        return copy.deepcopy(Net(two(kind, learn=LEARN, recurrence=recurrence), spike_grad, all_states))

    def go(net: Net) -> Any:
        net.begin()
        for neuron in net.neurons:
            for name in STATES[kind]:
                setattr(neuron, name, torch.zeros(0, dtype=F64))
            neuron.__dict__.pop("reset", None)  # the framework's, with a graph
        return copy.deepcopy(net)(frames())

    theirs, edge = stock(recipe, few.b_th)
    with few.policy():
        ours = enabled(recipe, few)
        for _ in range(2):
            for a, b in zip(go(ours)[0], go(theirs)[0], strict=True):
                assert_close(a + 0, b)
            with torch.no_grad():
                for parameter in (*ours.parameters(), *theirs.parameters()):
                    parameter.mul_(0.8)
    assert edge.is_clear()


def snapshot(net: nn.Module) -> Any:
    return {
        name: {**module.__dict__, **module._buffers, **module._parameters, **module._modules}
        for name, module in net.named_modules()
    }


@pytest.mark.parametrize("recurrence", ["linear", "one"])
def test_disable_gives_back_the_model(kind, recurrence):
    net = Net(two(kind, learn=LEARN, recurrence=recurrence), SPIKE_GRAD, all_states)
    before, keys, text = snapshot(net), list(net.state_dict()), repr(net)
    kinds = [type(module) for module in net.modules()]
    assert sparse_backend.enable(net, b_th=0.2) is net
    assert list(net.state_dict()) == keys and repr(net) == text
    assert [type(module) for module in net.modules()] == kinds
    assert sparse_backend.disable(net) is net
    after = snapshot(net)
    assert after.keys() == before.keys()
    for name, one in after.items():
        assert one.keys() == before[name].keys(), name
        for key, value in one.items():
            same = value == before[name][key] if key.startswith("_") else value is before[name][key]
            assert same, f"{name}.{key}"


def test_disable_after_training_leaves_a_stock_model(kind):
    def values(net: Net) -> list[Tensor]:
        return [row.detach() + 0 for row in net(frames())[0]]

    plain = Net(two(kind, learn=LEARN), SPIKE_GRAD, all_states)
    net = sparse_backend.enable(Net(two(kind, learn=LEARN), SPIKE_GRAD, all_states), b_th=0.2)
    weighted(net(frames())).backward()
    plain.load_state_dict(net.state_dict(), strict=True)
    sparse_backend.disable(net)
    for module in net.modules():
        assert not any("sparse" in name for name in module.__dict__), module
        assert "forward" not in module.__dict__
        assert not any(isinstance(buffer, TensorLike) for buffer in module.buffers(recurse=False))
    for a, b in zip(values(net), values(plain), strict=True):
        assert torch.equal(a, b)
    assert all(type(row) is Tensor for row in net.step(frames()[0], net.begin())[1][0])


def test_state_dicts_load_both_ways(kind):
    plain = Net(two(kind, learn=LEARN, recurrence="each"), SPIKE_GRAD, all_states, seed=3)
    net = sparse_backend.enable(Net(two(kind, learn=LEARN, recurrence="each"), SPIKE_GRAD, all_states), b_th=0.2)
    net(frames())
    net.load_state_dict(plain.state_dict(), strict=True)
    for a, b in zip(net(frames())[0], plain(frames())[0], strict=True):
        assert_close(a + 0, b)
    plain.load_state_dict(net.state_dict(), strict=True)


# Handed-out states.


def test_handed_out_tensors_may_be_detached_in_place(few, kind):
    with few.policy():
        net = enabled(net_of(two(kind, learn=LEARN)), few)
        _, states = net(frames())
        for state in states[-1]:
            assert state.requires_grad
            state.detach_()
            assert not state.requires_grad
        spk, states = net.step(frames()[0], net.begin())
        snn.SpikingNeuron.detach(spk, *states[0], *states[1])
        assert not any(state.requires_grad for layer in states for state in layer)


def test_the_neuron_keeps_what_it_returns(kind):
    net = sparse_backend.enable(Net([Case(kind, 9)], SPIKE_GRAD, all_states), b_th=0.2, fuse_time=False)
    _, (states,) = net.step(frames()[0], net.begin())
    for name, state in zip(STATES[kind], states, strict=True):
        assert getattr(net.neurons[0], name) is state, name


# Other doors: patch, an outer loop, the automatic band; and other neurons beside.


def test_patch(few, kind):
    theirs, edge = stock(net_of(two(kind, learn=LEARN)), few.b_th)
    expected = outcome(theirs, lambda net: net(frames()))
    assert edge.is_clear()
    original = getattr(snn, kind).forward
    with few.policy(), sparse_backend.patch("snntorch", b_th=few.b_th):
        net = net_of(two(kind, learn=LEARN))(SPIKE_GRAD)
        got = outcome(net, lambda net: net(frames()))
        assert paths_of(net)[0] in ("sparse step", "dense step", "sparse sequence", "dense sequence")
    assert getattr(snn, kind).forward is original
    assert_same_outcome(got, expected)


@pytest.mark.parametrize("b_th", [BAND, INF])
@pytest.mark.parametrize("form", ["explicit", "hidden"])
def test_an_outer_loop_inside_fuse_time(kind, b_th, form):
    theirs, edge = stock(net_of(two(kind, learn=LEARN, form=form)), b_th)

    def go(net: Net) -> Any:
        with sparse_backend.fuse_time(net) if net is ours else nullcontext():
            rows, states = all_states(net, frames())
        return [row + 0 for row in rows], [[state + 0 for state in layer] for layer in states]

    with sparse_always():
        ours = sparse_backend.enable(net_of(two(kind, learn=LEARN, form=form))(SPIKE_GRAD), b_th=b_th)
        for _ in range(2):
            assert_same_outcome(outcome(ours, go), outcome(theirs, go))
    assert edge.is_clear()
    assert_ran_as(ours, Way(b_th, True, False))


@pytest.mark.filterwarnings("ignore:sparse_backend. with b_th='auto'")
@pytest.mark.parametrize("fuse_time", [True, False])
def test_the_automatic_band_of_a_broad_surrogate_is_dense(kind, fuse_time):
    broad = SURROGATES["atan"]
    ours = sparse_backend.enable(net_of(two(kind, learn=LEARN))(broad), fuse_time=fuse_time)
    width = sparse_backend.report(ours).layers[0].b_th_value
    assert width > 1
    theirs, edge = stock(net_of(two(kind, learn=LEARN)), width, broad)
    for _ in range(2):
        assert_same_outcome(outcome(ours, lambda net: net(frames())), outcome(theirs, lambda net: net(frames())))
    assert edge.is_clear()
    assert set(paths_of(ours)) == {"dense sequence" if fuse_time else "dense step"}, reasons_of(ours)


class Mixed(nn.Module):
    """Leaky layers below and above."""

    def __init__(self, kind: str, spike_grad: Any) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            fill(nn.Linear(n, m, dtype=F64), 20 * n + m, 1.2, 0.4) for n, m in ((INPUTS, 9), (9, 7), (7, 5))
        )
        self.below, self.above = leaky(spike_grad, 0.8, 0.6, learn_beta=True), leaky(spike_grad, 0.7, 0.5)
        self.neuron = make_neuron(Case(kind, 7, learn=LEARN), spike_grad, 3)

    def forward(self, x: Any) -> Any:
        below, above, states, rows = self.below.reset_mem(), self.above.reset_mem(), self.neuron.reset_mem(), []
        for t in range(len(x)):
            spk, below = self.below(self.linears[0](x[t]), below)
            spk, states = advance(self.neuron, self.linears[1](spk), states)
            spk, above = self.above(self.linears[2](spk), above)
            rows.append(spk)
        return torch.stack(rows), below, above, states


@pytest.mark.parametrize("hidden", [False, True])
def test_leaky_layers_beside(few, kind, hidden):
    net = assert_equal_runs(lambda g: Mixed(kind, g), lambda net: net(frames())[: 4 if hidden else 1], few, runs=2)
    assert_ran_as(net, few)


def test_all_kinds_in_one_model(few):
    cases = [Case("Synaptic", 9), Case("RLeaky", 8, "zero"), Case("RSynaptic", 7, recurrence="each"), Case("RLeaky", 5)]
    assert_ran_as(check(few, [replace(case, learn=LEARN) for case in cases]), few)


def test_the_report_names_them(kind):
    net = sparse_backend.enable(Net(two(kind), SPIKE_GRAD, all_states), b_th=0.2)
    assert paths_of(net) == ["not called yet"] * 2
    with sparse_always():
        net(frames())
        assert paths_of(net) == ["sparse sequence"] * 2
        sparse_backend.enable(net, b_th=0.2, fuse_time=False)
        net(frames())
    assert paths_of(net) == ["sparse step"] * 2
    assert str(sparse_backend.report(net)).count("neurons.") == 2


def test_check_finds_them_right(kind):
    cases = two(kind, learn=LEARN)
    dense = sparse_backend.enable(Net(cases, SPIKE_GRAD, spikes_alone), b_th=INF)
    narrow = sparse_backend.enable(Net(cases, SPIKE_GRAD, spikes_alone), b_th=0.01)
    errors = []
    for net in (dense, narrow):
        result = sparse_backend.check(net, frames(), weighted)
        assert result.loss_sparse == pytest.approx(result.loss_dense)
        errors.append(max(gradient.relative_error for gradient in result.gradients))
    assert errors[0] < 1e-9 < 1e-2 < errors[1]


# Odds and ends.


@pytest.mark.parametrize(("batch", "neurons"), [(33, 70), (1, 130)])
def test_sizes_beyond_one_vector(few, kind, batch, neurons):
    cases = [Case(kind, neurons, learn=LEARN, alpha="each", beta="each"), Case(kind, 17, "zero", learn=LEARN)]
    check(few, cases, x=frames(batch=batch))


def test_training_with_hidden_states_reset_before_every_pass(few, kind):
    """The tutorials' loop: utils.reset, a pass, a backward, a step."""

    def loop(net: Net, x: Any) -> Any:
        for neuron in net.neurons:
            if kind == "RSynaptic":  # which utils.reset forgets
                neuron.spk = torch.zeros_like(neuron.spk)
        getattr(snn, kind).reset_hidden()
        getattr(snn, kind).detach_hidden()
        return torch.stack([net.step(step, [()] * 2)[0] for step in x])

    def go(net: Net) -> Any:
        optimiser, losses = torch.optim.Adam(net.parameters(), lr=0.01), []
        for seed in range(3):
            loss = weighted(net(frames(seed)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return losses

    snn.SpikingNeuron.instances.clear()
    assert_equal_runs(net_of(two(kind, form="hidden", learn=LEARN), loop), go, few)


def test_threads_agree_bit_for_bit(kind):
    outcomes = []
    for count in (1, 2):
        with threads(count):
            net = sparse_backend.enable(net_of([Case(kind, 70, learn=LEARN), Case(kind, 40)])(SPIKE_GRAD), b_th=BAND)
            outcomes.append(outcome(net, lambda net: net(frames(batch=33))))
    for a, b in zip(outcomes[0].outputs, outcomes[1].outputs, strict=True):
        assert torch.equal(a, b)
    for name, gradient in outcomes[0].gradients.items():
        assert torch.equal(gradient, outcomes[1].gradients[name]), name


def test_random_surrogates_and_functional_transforms_are_the_frameworks(kind):
    net = sparse_backend.enable(make_neuron(Case(kind, 5), snn_surrogate.SSO()), b_th=0.2)
    net(torch.ones(2, 5, dtype=F64))
    assert paths_of(net) == ["framework"] and "random" in reasons_of(net)[0]
    ours = sparse_backend.enable(net_of(two(kind, learn=LEARN), last_states)(piecewise), b_th=0.2)
    theirs = net_of(two(kind, learn=LEARN), last_states)(piecewise)
    weights = {name: p.detach() for name, p in theirs.named_parameters()}

    def loss(model: nn.Module) -> Callable[[Any], Tensor]:
        return lambda given: weighted(torch.func.functional_call(model, given, (frames(),))[0])

    assert_same_gradients(torch.func.grad(loss(ours))(weights), torch.func.grad(loss(theirs))(weights))
    assert "torch.func" in reasons_of(ours)[0]


@pytest.mark.parametrize("where", ["linear", "recurrent", "input", "state"])
def test_nan_and_inf_come_out_where_stock_has_them(few, kind, where):
    bad = float("inf" if where == "recurrent" else "nan")
    x = frames()
    begin = [zeros_of(case) for case in two(kind)]
    if where == "input":
        x[2, 1, 3] = bad
    if where == "state":
        begin[0][-1][1, 2] = bad

    def go(net: Net) -> Any:
        layer = net.linears[0] if where == "linear" else getattr(net.neurons[0], "recurrent", None)
        if where in ("linear", "recurrent") and layer is not None:
            layer.weight.data[2, 3] = bad
        return net(x, begin)[0]

    theirs, _ = stock(net_of(two(kind)), few.b_th)
    with few.policy():
        ours = enabled(net_of(two(kind)), few)
        for a, b in zip(go(ours), go(theirs), strict=True):
            assert_close(a + 0, b)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, F32, F32), (F64, F32, F32), (F32, F64, F32), (F32, F32, F64)])
def test_dtypes_mixed_as_the_framework_mixes_them(kind, dtypes):
    of_input, of_states, of_neuron = dtypes
    outs = []
    for enable in (True, False):
        neuron = make_neuron(Case(kind, 5, recurrence="each"), SPIKE_GRAD).to(of_neuron)
        if enable:
            sparse_backend.enable(neuron, b_th=INF)
        x = (4 * normal((3, 2, 5), 3)).round() / 4
        states = tuple(torch.full((2, 5), 0.25, dtype=of_states) for _ in STATES[kind])
        for step in x.to(of_input):
            spk, states = advance(neuron, step, states)
        outs.append((spk, *states))
    for a, b in zip(*outs, strict=True):
        assert a.dtype is b.dtype
        assert_close(as_tensor(a).double(), b.double(), rtol=1e-2 if of_input is torch.bfloat16 else 1e-6)


def test_an_exception_inside_the_loop_leaves_the_model_usable(few, kind):
    broken = [True]

    def loop(net: Net, x: Any) -> Any:
        states = net.begin()
        for t in range(len(x)):
            spk, states = net.step(x[t], states)
            if broken[0] and t == 3:
                raise KeyboardInterrupt
        return spk, states

    theirs, edge = stock(net_of(two(kind), loop), few.b_th)
    with few.policy():
        ours = enabled(net_of(two(kind), loop), few)
        for net in (theirs, ours):
            broken[0] = True
            with pytest.raises(KeyboardInterrupt):
                net(frames())
            broken[0] = False
        assert_same_outcome(outcome(ours, lambda net: net(frames())), outcome(theirs, lambda net: net(frames())))
    assert edge.is_clear()


# Coefficients that are no parameters and change while the model runs.


class Homeostatic(nn.Module):
    """Its threshold follows its activity, and its decay sinks."""

    def __init__(self, kind: str, spike_grad: Any) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(INPUTS, 10)
        self.follows = True
        self.at_first: list[Any] = [0.5, 0.9]  # threshold and beta of each forward's first step, None: as they are
        rest: dict[str, Any] = {"threshold": torch.full((10,), 0.5), "spike_grad": spike_grad}
        self.lif = {
            "Leaky": lambda: snn.Leaky(0.9, **rest),
            "Leaky, zero": lambda: snn.Leaky(0.9, reset_mechanism="zero", **rest),
            "Synaptic": lambda: snn.Synaptic(0.8, 0.9, **rest),
            "RLeaky": lambda: snn.RLeaky(0.9, linear_features=10, **rest),
        }[kind]()
        random = generator(7)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = torch.randn(layer.weight.shape, generator=random, dtype=F64)
                layer.bias.data = torch.randn(layer.bias.shape, generator=random, dtype=F64) / 10
        self.double()

    def forward(self, x: Any) -> Any:
        lif = self.lif
        for part, value in zip((lif.threshold, lif.beta), self.at_first, strict=True):
            if value is not None:
                part.fill_(value)
        states, out = lif.reset_mem(), []
        for step in x:
            spk, *states = lif(self.fc(step), *(states if isinstance(states, (list, tuple)) else (states,)))
            states = [spk, *states] if self.kind == "RLeaky" else states
            if self.follows:
                lif.threshold.add_(0.05 * spk.detach().mean())
                lif.beta.mul_(0.99)
            out.append(spk)
        return torch.stack(out)


@pytest.mark.parametrize("way", MOST_WAYS.values(), ids=MOST_WAYS)
@pytest.mark.parametrize("neuron", ["Leaky", "Leaky, zero", "Synaptic", "RLeaky"])
def test_thresholds_and_decays_that_follow_the_activity(way: Way, neuron: str) -> None:
    x = spikes((STEPS, BATCH, INPUTS), 0.4, 3).double()
    assert_equal_runs(lambda grad: Homeostatic(neuron, grad), lambda net: net(x), way, runs=2)


@pytest.mark.parametrize("way", MOST_WAYS.values(), ids=MOST_WAYS)
@pytest.mark.parametrize("neuron", ["Leaky", "Leaky, zero", "Synaptic", "RLeaky"])
def test_coefficients_written_between_forwards_where_nobody_looks_again(monkeypatch, way: Way, neuron: str) -> None:
    """As on a GPU: what bumps a version, or is another tensor, is seen all the same; so is a value set by `.data`."""
    monkeypatch.setattr("sparse_backend.policy.reads_at_once", lambda device: False)
    x = spikes((STEPS, BATCH, INPUTS), 0.4, 3).double()

    def go(net: Any) -> Any:
        out = [net(x)]
        net.at_first = [0.4, 1.5]
        out.append(net(x))
        net.lif.beta.data = torch.full_like(net.lif.beta, 0.6)
        net.at_first = [0.3, None]
        out.append(net(x))
        net.at_first = [0.5, 0.9]
        return out

    assert_equal_runs(lambda grad: Homeostatic(neuron, grad), go, way, runs=2)


# Where reading a number waits for a GPU.


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("b_th", [0.3, INF])
@pytest.mark.parametrize("neuron", ["Leaky", "Leaky, zero", "Synaptic", "RLeaky"])
def test_an_enabled_model_reads_no_number(monkeypatch, neuron: str, b_th: float, fuse_time: bool) -> None:
    """Once it has run, and its weights and thresholds with it: on a GPU nothing of Python waits for the device."""
    if not _native.available():
        pytest.skip("the twins look at their numbers")
    monkeypatch.setattr("sparse_backend.policy.reads_at_once", lambda device: False)
    net = sparse_backend.enable(Homeostatic(neuron, SPIKE_GRAD), b_th=b_th, fuse_time=fuse_time)
    net.at_first, net.follows = [None, None], False
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    x = EventTensor.from_dense(spikes((STEPS, BATCH, INPUTS), 0.4, 3).double())

    def reads() -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            optimizer.zero_grad()
            net(x).sum().backward()
            optimizer.step()
        counts = {event.key: event.count for event in seen.key_averages()}
        assert any(name.startswith("sparse_backend::") for name in counts)
        return counts.get("aten::_local_scalar_dense", 0)

    first = reads()
    assert first > 0  # a plan is made
    assert reads() == reads() == 0
