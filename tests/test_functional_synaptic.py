"""functional.synaptic and linear_synaptic against snnTorch's Synaptic, RLeaky and RSynaptic in float64.

E1: the forward pass is the framework's. E2: with b_th = inf every gradient is. E3: with any b_th every gradient is that
of the framework with its surrogate masked to |V - threshold| < b_th, in the recurrence too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

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
    fast_sigmoid,
    generator,
    gradients,
    masked,
    no_derivative,
    normal,
    sparse_always,
    spikes,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_backend import EventTensor, functional
from sparse_backend.functional import SynapticSequence

pytestmark = pytest.mark.usefixtures("neurons", "one_thread")

F64 = torch.float64
EDGE = 1e-9
SEED = st.integers(0, 10_000)
B_TH = st.sampled_from([0.013, 0.11, 0.37, 1.3, 7.7, INF])
LEARN = ("weight", "bias", "alpha", "beta", "threshold", "mem", "syn", "recurrent", "spk")
GIVEN = ("bias", "alpha", "mem", "syn", "recurrent", "spk")
STEEP = fast_sigmoid(5.0)


class Recurrence(nn.Module):
    """The recurrent weights of a stock neuron, as a tensor of the test's; None: no recurrence."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.__dict__["weight"] = weight

    def forward(self, spk: Tensor) -> Tensor:
        return torch.zeros_like(spk) if self.weight is None else nn.functional.linear(spk, self.weight)


@dataclass
class Layer:
    """One linear layer and its neurons; tensors are leaves, those that learn require grad."""

    weight: Tensor
    beta: Tensor
    threshold: Tensor
    bias: Tensor | None = None
    alpha: Tensor | None = None
    mem: Tensor | None = None
    syn: Tensor | None = None
    recurrent: Tensor | None = None
    spk: Tensor | None = None
    reset: str = "subtract"

    def leaves(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in LEARN}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}

    def settings(self) -> dict[str, Any]:
        """What both functions take beside x or the current, weight and bias."""
        names = ("alpha", "beta", "threshold", "mem", "syn", "recurrent", "spk", "reset")
        return {name: getattr(self, name) for name in names}


@dataclass
class Trace:
    """One layer's run by the framework; all [T, B, N]."""

    spikes: Tensor
    mem: Tensor
    syn: Tensor | None
    x: Tensor  #: V - threshold


def stock(current: Tensor, layer: Layer, spike_grad: Any) -> Trace:
    """snnTorch over currents [T, B, N]: RLeaky without alpha, Synaptic without recurrent weights, else RSynaptic."""
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return spike_grad(x)

    options: dict[str, Any] = {
        "beta": layer.beta, "threshold": layer.threshold, "spike_grad": watched, "reset_mechanism": layer.reset
    }  # fmt: skip
    if layer.alpha is not None:
        options["alpha"] = layer.alpha
    recurrent = layer.alpha is None or layer.recurrent is not None
    if recurrent:
        options["all_to_all"] = False
    neuron = getattr(snn, ("R" if recurrent else "") + ("Leaky" if layer.alpha is None else "Synaptic"))(**options)
    if recurrent:
        neuron.recurrent = Recurrence(layer.recurrent)
    zero = torch.zeros_like(current[0])
    spk, syn, mem = (zero if state is None else state for state in (layer.spk, layer.syn, layer.mem))
    steps: list[tuple[Tensor, ...]] = []
    for step in current:
        if layer.alpha is None:
            spk, mem = neuron(step, spk, mem)
        elif recurrent:
            spk, syn, mem = neuron(step, spk, syn, mem)
        else:
            spk, syn, mem = neuron(step, syn, mem)
        steps.append((spk, mem, syn))
    spk_seq, mem_seq, syn_seq = (torch.stack(part) for part in zip(*steps, strict=True))
    return Trace(spk_seq, mem_seq, None if layer.alpha is None else syn_seq, torch.stack(seen[1::2]))


def stock_network(x: Tensor, layers: list[Layer], spike_grad: Any) -> list[Trace]:
    traces = []
    for layer in layers:
        traces.append(stock(nn.functional.linear(x, layer.weight, layer.bias), layer, spike_grad))
        x = traces[-1].spikes
    return traces


def is_clear(traces: list[Trace], b_th: float) -> bool:
    """Whether no |V - threshold| is so near 0 or b_th that rounding decides."""
    sizes = [trace.x.abs() for trace in traces]
    return all(float(torch.minimum(size, (size - min(b_th, 1e9)).abs()).min()) > EDGE for size in sizes)


def ours_network(
    x: Any, layers: list[Layer], spike_grad: Any, b_th: float, return_states: bool
) -> list[SynapticSequence]:
    outputs = []
    for layer in layers:
        out = functional.linear_synaptic(
            x, layer.weight, layer.bias, **layer.settings(), spike_grad=spike_grad, b_th=b_th,
            return_states=return_states,
        )  # fmt: skip
        outputs.append(out)
        x = out.spikes
    return outputs


def as_answer(trace: Trace, return_states: bool) -> SynapticSequence:
    last = slice(None) if return_states else -1
    return SynapticSequence(trace.spikes, trace.mem[last], None if trace.syn is None else trace.syn[last])


def loss_of(outputs: list[SynapticSequence], terms: str, seed: int) -> Tensor:
    """Looks at what `terms` name: spikes, mem, syn of the last layer, spikes of the others where "hidden"."""
    loss = torch.zeros((), dtype=outputs[-1].mem.dtype)
    for name in ("spikes", "mem", "syn"):
        value = getattr(outputs[-1], name)
        if name in terms.split() and value is not None:
            value = as_tensor(value)
            loss = loss + (value * normal(value.shape, seed + len(name), value.dtype)).sum()
    if "hidden" in terms:
        for depth, out in enumerate(outputs[:-1]):
            hidden = as_tensor(out.spikes)
            loss = loss + (hidden * normal(hidden.shape, seed + 10 + depth, hidden.dtype)).sum()
    return loss


def assert_same_answer(ours: SynapticSequence, theirs: SynapticSequence) -> None:
    assert type(ours.spikes) is EventTensor
    assert_close(as_tensor(ours.spikes), theirs.spikes, "spikes")
    assert_close(ours.mem, theirs.mem, "mem")
    assert (ours.syn is None) == (theirs.syn is None)
    if ours.syn is not None and theirs.syn is not None:
        assert_close(ours.syn, theirs.syn, "syn")


def must(clear: bool) -> None:
    assert clear, "rounding decides a spike or the band in this draw: take another seed"


def compare(
    x: Tensor, layers: list[Layer], spike_grad: Any, b_th: float, terms: str = "spikes mem syn hidden",
    return_states: bool = True, seed: int = 0, ours_x: Any = None, require: Any = must,
) -> None:  # fmt: skip
    """E1 and, with the masked surrogate, E2 and E3."""
    leaves = {f"{name} {depth}": leaf for depth, layer in enumerate(layers) for name, leaf in layer.leaves().items()}
    if x.requires_grad:
        leaves["x"] = x
    traces = stock_network(x, layers, masked(spike_grad, b_th))
    require(is_clear(traces, b_th))
    outputs = ours_network(x if ours_x is None else ours_x, layers, spike_grad, b_th, return_states)
    answers = [as_answer(trace, return_states) for trace in traces]
    for ours, theirs in zip(outputs, answers, strict=True):
        assert_same_answer(ours, theirs)
    expected = gradients(loss_of(answers, terms, seed), leaves)
    assert_same_gradients(gradients(loss_of(outputs, terms, seed), leaves), expected)


@dataclass(frozen=True)
class Options:
    """What one layer is made of."""

    reset: str = "subtract"
    has: frozenset[str] = frozenset(GIVEN)  #: of what may be None
    vectors: frozenset[str] = frozenset()  #: of alpha, beta, threshold: one entry per neuron
    learn: frozenset[str] = frozenset(LEARN)


OPTIONS = st.builds(
    Options,
    st.sampled_from(RESETS),
    st.frozensets(st.sampled_from(GIVEN)),
    st.frozensets(st.sampled_from(("alpha", "beta", "threshold"))),
    st.frozensets(st.sampled_from(LEARN)),
)


def make_layer(options: Options, inputs: int, neurons: int, batch: int, density: float, seed: int) -> Layer:
    def uniform(name: str, low: float, high: float) -> Tensor:
        shape = (neurons,) if name in options.vectors else ()
        return low + (high - low) * torch.rand(shape, generator=generator(seed + LEARN.index(name)), dtype=F64)

    has = options.has
    state = (batch, neurons)
    scale = 1.2 / (1 + inputs * density) ** 0.5
    layer = Layer(
        normal((neurons, inputs), seed + 20, scale=scale) + 0.2 * scale,
        uniform("beta", 0.2, 0.95),
        uniform("threshold", 0.4, 1.2),
        normal((neurons,), seed + 21, scale=0.2) if "bias" in has else None,
        uniform("alpha", 0.1, 0.9) if "alpha" in has else None,
        normal(state, seed + 22) if "mem" in has else None,
        normal(state, seed + 23, scale=0.5) if {"syn", "alpha"} <= has else None,
        normal((neurons, neurons), seed + 24, scale=0.8 / neurons**0.5) if "recurrent" in has else None,
        normal(state, seed + 25) if {"spk", "recurrent"} <= has else None,
        options.reset,
    )
    for name in options.learn:
        tensor = getattr(layer, name)
        if tensor is not None:
            tensor.requires_grad_()
    return layer


FULL = Options()
LEAKY = Options("zero", frozenset(("mem",)), frozenset(("beta",)))
SYNAPTIC = Options("zero", frozenset(("bias", "alpha", "syn")), frozenset(("alpha", "beta", "threshold")))


@settings(max_examples=100)
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=3),
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 5, 9, 17])] * 4),
    steps=st.sampled_from([1, 2, 3, 8]),
    batch=st.sampled_from([1, 2, 3]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    kind=st.sampled_from(["spikes", "events", "graded events", "real", "real that learns", "spikes that learn"]),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    b_th=B_TH,
    terms=st.sampled_from(["spikes", "mem", "syn", "spikes mem syn", "spikes mem syn hidden", "hidden"]),
    return_states=st.booleans(),
    always_sparse=st.booleans(),
    seed=SEED,
)
@example(
    options=[FULL, SYNAPTIC, LEAKY], sizes=(9, 17, 9, 5), steps=8, batch=3, density=0.5, kind="real that learns",
    surrogate="lopsided", b_th=0.37, terms="spikes mem syn hidden", return_states=True, always_sparse=True, seed=1,
)  # fmt: skip
@example(
    options=[SYNAPTIC, FULL], sizes=(9, 17, 9, 5), steps=8, batch=3, density=0.1, kind="graded events",
    surrogate="fast_sigmoid", b_th=INF, terms="spikes mem syn", return_states=False, always_sparse=True, seed=2,
)  # fmt: skip
def test_whole_models_equal_stock(
    options, sizes, steps, batch, density, kind, surrogate, b_th, terms, return_states, always_sparse, seed
):
    shape = (steps, batch, sizes[0])
    x = normal(shape, seed) if kind.startswith("real") else spikes(shape, density, seed, graded="graded" in kind)
    x.requires_grad_(kind.endswith(("learns", "learn")))
    layers = [
        make_layer(o, sizes[depth], sizes[depth + 1], batch, density if depth == 0 else 0.3, seed + 30 * depth)
        for depth, o in enumerate(options)
    ]
    ours_x = EventTensor.from_dense(x) if kind.endswith("events") else None
    with sparse_always() if always_sparse else contextlib.nullcontext():
        compare(x, layers, SURROGATES[surrogate], b_th, terms, return_states, seed, ours_x, assume)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("learn", [*LEARN, "all"])
@pytest.mark.parametrize("has", [{"alpha"}, {"alpha", "recurrent"}, {"recurrent"}], ids=["syn", "both", "rec"])
def test_every_learnable_alone_and_together(reset, learn, has):
    """What is kept for the backward depends on what learns and what the loss looks at."""
    names = frozenset(LEARN if learn == "all" else (learn,))
    for vectors in (frozenset(), frozenset(("alpha", "beta", "threshold"))):
        given = frozenset({"bias", "mem", "syn", "spk"} | has)
        layer = make_layer(Options(reset, given, vectors, names), 7, 6, 3, 0.4, 17)
        for b_th in (0.31, INF):
            for return_states, terms in ((False, "spikes"), (True, "spikes mem syn"), (False, "syn")):
                with sparse_always():
                    compare(spikes((6, 3, 7), 0.4, 3), [layer], SURROGATES["atan"], b_th, terms, return_states)


@settings(max_examples=40)
@given(
    options=OPTIONS, neurons=st.sampled_from([1, 2, 7, 16, 19, 40]), steps=st.sampled_from([1, 2, 9]),
    batch=st.sampled_from([1, 3]), surrogate=st.sampled_from(sorted(SURROGATES)), b_th=B_TH,
    return_states=st.booleans(), strided=st.booleans(), always_sparse=st.booleans(), seed=SEED,
)  # fmt: skip
def test_neurons_alone_equal_stock(
    options, neurons, steps, batch, surrogate, b_th, return_states, strided, always_sparse, seed
):
    """Any current: from a convolution, a batch norm, whatever."""
    layer = make_layer(options, 1, neurons, batch, 1.0, seed)
    current = normal((steps, batch, neurons), seed + 7)
    if strided:
        current = normal((neurons, batch, steps), seed + 7).permute(2, 1, 0)
    current.requires_grad_()
    spike_grad = SURROGATES[surrogate]
    trace = stock(current, layer, masked(spike_grad, b_th))
    assume(is_clear([trace], b_th))
    with sparse_always() if always_sparse else contextlib.nullcontext():
        out = functional.synaptic(
            current, **layer.settings(), spike_grad=spike_grad, b_th=b_th, return_states=return_states
        )
    theirs = as_answer(trace, return_states)
    assert_same_answer(out, theirs)
    leaves = {"current": current, **layer.leaves()}
    expected = gradients(loss_of([theirs], "spikes mem syn", seed), leaves)
    assert_same_gradients(gradients(loss_of([out], "spikes mem syn", seed), leaves), expected)


def tie_layer(reset: str, neurons: int, seed: int, dtype: torch.dtype = F64) -> Layer:
    half = torch.tensor(0.5, dtype=dtype)
    return Layer(
        dyadic((neurons, 6), seed, dtype, unit=0.25, most=4).requires_grad_(),
        half, torch.tensor(0.75, dtype=dtype), dyadic((neurons,), seed + 10, dtype, unit=0.25, most=2).requires_grad_(),
        half, recurrent=dyadic((neurons, neurons), seed + 20, dtype, unit=0.25, most=2).requires_grad_(), reset=reset,
    )  # fmt: skip


@pytest.mark.parametrize("b_th", [0.25, 0.5, INF])
@pytest.mark.parametrize("reset", RESETS)
def test_ties_are_decided_as_stock_decides_them(reset, b_th):
    """Dyadic numbers: V meets the threshold, and |V - threshold| meets b_th, exactly and often."""
    on_threshold = on_band = 0
    for seed in range(8):
        layer, x = tie_layer(reset, 5, seed), spikes((5, 2, 6), 0.4, seed)
        trace = stock(nn.functional.linear(x, layer.weight, layer.bias), layer, masked(STEEP, b_th))
        on_threshold += int((trace.x == 0).sum())
        on_band += int((trace.x.abs() == b_th).sum())
        with sparse_always():
            (out,) = ours_network(x, [layer], STEEP, b_th, True)
        assert torch.equal(as_tensor(out.spikes), trace.spikes)
        assert torch.equal(out.mem, trace.mem) and out.syn is not None and torch.equal(out.syn, trace.syn)
        leaves = layer.leaves()
        expected = gradients(loss_of([as_answer(trace, True)], "spikes mem syn", 1), leaves)
        assert_same_gradients(gradients(loss_of([out], "spikes mem syn", 1), leaves), expected)
    assert on_threshold > 10 and (b_th == INF or on_band > 10)


def test_float32_spikes_of_dyadic_numbers_are_stocks():
    fired = 0
    for seed in range(4):
        layer, x = tie_layer("subtract", 19, seed, torch.float32), spikes((6, 3, 6), 0.4, seed, torch.float32)
        trace = stock(nn.functional.linear(x, layer.weight, layer.bias), layer, STEEP)
        (out,) = ours_network(x, [layer], STEEP, 0.3, True)
        assert torch.equal(as_tensor(out.spikes), trace.spikes) and torch.equal(out.mem, trace.mem)
        fired += int(trace.spikes.sum())
    assert fired > 20


@pytest.mark.parametrize(("alpha", "beta"), [(1.2, 0.9), (-0.3, 1.1), (0.0, 0.0), (1.0, 1.0)])
def test_decays_are_used_as_given(alpha, beta):
    """Not clamped, as the framework would: their gradients stay."""
    layer = make_layer(FULL, 5, 4, 2, 0.5, 3)
    layer.alpha, layer.beta = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (alpha, beta))
    x, b_th = spikes((5, 2, 5), 0.5, 1), 0.4
    spike_grad = masked(STEEP, b_th)
    spk, syn, mem, rows = layer.spk, layer.syn, layer.mem, []
    for step in x:
        fired = (mem > layer.threshold).to(F64)
        syn = layer.alpha * syn + nn.functional.linear(step, layer.weight, layer.bias) + spk @ layer.recurrent.t()
        mem = layer.beta * mem + syn - fired * layer.threshold
        spk = spike_grad(mem - layer.threshold)
        rows.append((spk, mem, syn))
    theirs = SynapticSequence(*(torch.stack(part) for part in zip(*rows, strict=True)))
    must(is_clear([Trace(theirs.spikes, theirs.mem, theirs.syn, (theirs.mem - layer.threshold).detach())], b_th))
    (out,) = ours_network(x, [layer], STEEP, b_th, True)
    assert_same_answer(out, theirs)
    expected = gradients(loss_of([theirs], "spikes mem syn", 0), layer.leaves())
    assert bool(expected["alpha"].any()) and bool(expected["beta"].any())
    assert_same_gradients(gradients(loss_of([out], "spikes mem syn", 0), layer.leaves()), expected)


def test_two_halves_are_the_whole():
    """States and spikes of one call are those before the next, gradients through them too."""
    layer, x = make_layer(FULL, 9, 7, 3, 0.4, 5), spikes((8, 3, 9), 0.4, 2)
    leaves = layer.leaves()
    (whole,) = ours_network(x, [layer], STEEP, 0.4, True)
    first = functional.linear_synaptic(
        x[:3], layer.weight, layer.bias, **layer.settings(), spike_grad=STEEP, b_th=0.4, return_states=True
    )
    carried = {"mem": first.mem[-1], "syn": first.syn[-1], "spk": first.spikes.to_dense()[-1]}
    second = functional.linear_synaptic(
        x[3:], layer.weight, layer.bias, **{**layer.settings(), **carried}, spike_grad=STEEP, b_th=0.4,
        return_states=True,
    )  # fmt: skip
    joined = SynapticSequence(*(torch.cat([as_tensor(a), as_tensor(b)]) for a, b in zip(first, second, strict=True)))
    assert_same_answer(whole, joined)
    expected = gradients(loss_of([joined], "spikes mem syn", 0), leaves)
    assert_same_gradients(gradients(loss_of([whole], "spikes mem syn", 0), leaves), expected)


@pytest.mark.parametrize("reset", ["subtract", "none"])  # "zero" drops the step's current too in snnTorch's RLeaky
def test_without_alpha_and_recurrence_it_is_the_leaky_layer(reset):
    layer, x = make_layer(replace(LEAKY, reset=reset), 6, 5, 2, 0.5, 4), spikes((7, 2, 6), 0.5, 4)
    ours = functional.linear_synaptic(x, layer.weight, **layer.settings(), spike_grad=STEEP, b_th=0.3)
    leaky = functional.linear_leaky(
        x, layer.weight, beta=layer.beta, threshold=layer.threshold, reset=reset, mem=layer.mem, spike_grad=STEEP,
        b_th=0.3,
    )  # fmt: skip
    assert ours.syn is None
    assert_close(ours.spikes.to_dense(), leaky.spikes.to_dense())
    assert_close(ours.mem, leaky.mem)
    a, b = (gradients(as_tensor(out.spikes).sum() + out.mem.sum(), layer.leaves()) for out in (ours, leaky))
    assert_same_gradients(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    layer, x = make_layer(FULL, 6, 5, 2, 0.5, 4), spikes((7, 2, 6), 0.5, 4)
    (expected,) = ours_network(x, [layer], STEEP, 0.3, True)
    with mode():
        (got,) = ours_network(x, [layer], STEEP, 0.3, True)
        for a, b in zip(got, expected, strict=True):
            assert_close(as_tensor(a), as_tensor(b))
    assert not got.mem.requires_grad


def test_numbers_are_taken_for_tensors():
    x, weight = spikes((5, 2, 4), 0.5, 0), normal((3, 4), 1)
    numbers = functional.linear_synaptic(x, weight, alpha=0.5, beta=0.75, threshold=0.25, spike_grad=STEEP, b_th=0.3)
    tensors = functional.linear_synaptic(
        x, weight, alpha=torch.tensor([0.5], dtype=F64), beta=torch.full((3,), 0.75, dtype=F64),
        threshold=torch.tensor([[0.25]], dtype=F64), spike_grad=STEEP, b_th=0.3,
    )  # fmt: skip
    for a, b in zip(numbers, tensors, strict=True):
        assert torch.equal(as_tensor(a), as_tensor(b))


X, W = torch.zeros(4, 2, 5, dtype=F64), torch.ones(3, 5, dtype=F64)
GOOD: dict[str, Any] = {"alpha": 0.5, "beta": 0.9, "spike_grad": STEEP, "b_th": 0.3}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(2, 5, dtype=F64)}, ValueError, r"x: expected \[T, B, M\], got \[2, 5\]"),
    ({"x": torch.zeros(0, 2, 5, dtype=F64)}, ValueError, "T: expected at least one step"),
    ({"weight": torch.ones(3, 4, dtype=F64)}, ValueError, r"weight: expected \[N, 5\]"),
    ({"weight": torch.ones(3, 5)}, TypeError, "x: expected torch.float32"),
    ({"mem": torch.zeros(2, 4, dtype=F64)}, ValueError, r"mem: expected \[2, 3\], got \[2, 4\]"),
    ({"mem": 0.0}, TypeError, "mem: expected a tensor, got float"),
    ({"mem": torch.zeros(2, 3)}, TypeError, "mem: expected torch.float64"),
    ({"syn": torch.zeros(3, dtype=F64)}, ValueError, r"syn: expected \[2, 3\], got \[3\]"),
    ({"syn": torch.zeros(2, 3, dtype=F64), "alpha": None}, ValueError, "syn: expected None without alpha"),
    ({"alpha": torch.zeros(2, dtype=F64)}, ValueError, "alpha: expected one entry or 3, got"),
    ({"alpha": "half"}, TypeError, "alpha: expected a number or a tensor, got 'half'"),
    ({"beta": None}, TypeError, "beta: expected a number or a tensor, got None"),
    ({"threshold": torch.zeros(5, dtype=F64)}, ValueError, "threshold: expected one entry or 3"),
    ({"beta": torch.zeros(3)}, TypeError, "beta: expected torch.float64"),
    ({"recurrent": torch.zeros(3, 2, dtype=F64)}, ValueError, r"recurrent: expected \[3, 3\], got \[3, 2\]"),
    ({"recurrent": 0.5}, TypeError, "recurrent: expected a tensor, got float"),
    ({"recurrent": torch.zeros(3, 3)}, TypeError, "recurrent: expected torch.float64"),
    ({"spk": torch.zeros(2, 3, dtype=F64)}, ValueError, "spk: expected None without recurrent weights"),
    (
        {"spk": torch.zeros(2, 2, dtype=F64), "recurrent": torch.zeros(3, 3, dtype=F64)},
        ValueError, r"spk: expected \[2, 3\], got \[2, 2\]",
    ),
    ({"reset": "none at all"}, ValueError, r"reset: expected one of .*, got 'none at all'"),
    ({"b_th": -1}, ValueError, "b_th"),
    ({"spike_grad": no_derivative}, ValueError, "spike_grad: expected the step function"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=["-".join(change) for change, _, _ in BAD])
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": X, "weight": W, **GOOD, **change}
    functional.linear_synaptic(X, W, **GOOD)
    with pytest.raises(error, match=message):
        functional.linear_synaptic(**arguments)


@pytest.mark.parametrize("recurrent", [False, True])
def test_an_infinite_current_is_nan_after_a_reset_to_zero(recurrent):
    """snnTorch subtracts what is reset, times 0 or 1, from the membrane: NaN where that is infinite."""
    current = torch.full((3, 1, 20), 0.1, dtype=torch.float64)
    current[1, 0, 7] = INF
    neuron = snn.RLeaky(0.9, linear_features=20, reset_mechanism="zero", spike_grad=fast_sigmoid())
    nn.init.zeros_(neuron.double().recurrent.weight), nn.init.zeros_(neuron.recurrent.bias)
    theirs, (spk, mem) = [], neuron.reset_mem()
    for step in current:
        spk, mem = neuron(step, spk, mem)
        theirs.append(mem)
    weight = neuron.recurrent.weight if recurrent else None
    ours = functional.synaptic(
        current, beta=0.9, reset="zero", spike_grad=fast_sigmoid(), b_th=0.3, recurrent=weight, return_states=True
    )
    assert torch.stack(theirs).isnan().sum() == 2
    torch.testing.assert_close(ours.mem, torch.stack(theirs).detach(), equal_nan=True)
