"""E1, E2, E3 of docs/design.md: whole enabled Norse models against stock ones, in float64."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from helpers import INF, assert_close, assert_same_gradients, dyadic, sparse_always, threads
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from norse_models import (
    FORMS,
    PARAMETERS,
    READOUTS,
    SPIKING,
    LayerCase,
    Model,
    ModelCase,
    Outcome,
    enabled_copy,
    given_states,
    make_input,
    run,
    stock_run,
)

import sparse_backend

warnings.filterwarnings("ignore", message="sparse_backend: with b_th='auto'")

SURROGATES = [("super", 100.0), ("triangle", 0.7), ("tanh", 3.0), ("circ", 0.5), ("heavi_erfc", 2.0)]
parameters = st.frozensets(st.sampled_from(PARAMETERS))


def layer_cases(kinds):
    def build(surrogate, **options):
        return LayerCase(method=surrogate[0], alpha=surrogate[1], **options)

    return st.builds(
        build,
        st.sampled_from(SURROGATES),
        kind=st.sampled_from(kinds),
        neurons=st.integers(1, 9),
        bias=st.booleans(),
        each=parameters,
        learn=parameters,
        reset=st.sampled_from(["value", "subtract"]),
        dt=st.sampled_from([0.001, 0.5, 2.0]),
        autapses=st.booleans(),
    )


@st.composite
def model_cases(draw):
    layers = draw(st.lists(layer_cases(SPIKING), min_size=0, max_size=2))
    layers.append(draw(layer_cases(SPIKING + READOUTS)))
    return ModelCase(
        layers=layers,
        inputs=draw(st.integers(1, 9)),
        steps=draw(st.integers(1, 7)),
        batch=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 1000)),
        form=draw(st.sampled_from(FORMS)),
    )


def assert_same(ours: Outcome, stock: Outcome) -> None:
    assert_close(ours.out, stock.out, "output")
    for k, (a, b) in enumerate(zip(ours.states, stock.states, strict=True)):
        assert a.keys() == b.keys()
        for name, part in a.items():
            assert_close(part, b[name], f"state {name} of layer {k}")
    assert_same_gradients(ours.gradients, stock.gradients)


def is_clear(seen: list[torch.Tensor], b_th: float) -> bool:
    """Whether no |v - v_th| comes so near 0 or b_th that rounding decides."""
    sizes = torch.cat([torch.ones(1, dtype=torch.float64), *(x.flatten() for x in seen)]).abs()
    return float(sizes.min()) > 1e-9 and (b_th == INF or float((sizes - b_th).abs().min()) > 1e-9)


def states_for(case: ModelCase, given: bool):
    """Norse begins in float32, in which it would round the leak's gradient, and cannot begin where the leak is one per
    neuron."""
    begins = any("v_leak" in layer.each | layer.learn for layer in case.layers)
    return given_states(case) if given or begins else None


ALL = frozenset(PARAMETERS)
LEARNING = [LayerCase(kind, 6, each=ALL, learn=ALL) for kind in SPIKING]


@settings(max_examples=150)
@given(
    model_cases(), st.sampled_from([0.05, 0.2, 0.7, 3.0, INF]),
    st.sampled_from(["spikes", "events", "real", "spikes grad", "real grad"]), st.floats(0, 1), st.booleans(),
    st.sampled_from(["out", "states", "both"]), st.booleans(), st.booleans(),
)  # fmt: skip
@example(ModelCase(), 0.2, "events", 0.0, False, "both", True, True)
@example(ModelCase(form="step"), 0.2, "spikes", 1.0, False, "both", True, True)
@example(ModelCase(LEARNING), 0.2, "events", 0.3, True, "both", True, True)
@example(ModelCase(LEARNING, form="step"), 0.2, "spikes", 0.3, True, "both", True, False)
@example(ModelCase(LEARNING, form="lifted"), INF, "spikes", 0.3, True, "both", True, True)
def test_outputs_and_gradients_are_the_frameworks(case, b_th, kind, density, given, loss, sparse, fuse_time):
    model, states = Model(case), states_for(case, given)
    x = make_input(kind, case, density)
    stock, seen = stock_run(model, b_th, x, states, loss)
    assume(is_clear(seen, b_th))
    with sparse_always() if sparse else contextlib.nullcontext():
        ours = run(net := enabled_copy(model, b_th, fuse_time), x, states, loss)
    assert_same(ours, stock)
    for layer, of in zip(sparse_backend.report(net).layers, case.layers, strict=True):
        regime, form = layer.path.split()
        forms = ["sequence"] if case.form != "step" else ["step", "sequence"] if fuse_time else ["step"]
        assert form in forms, (layer.path, layer.reason)
        if of.kind in SPIKING and (sparse or b_th == INF):
            assert regime == ("dense" if b_th == INF else "sparse")


@settings(max_examples=40)
@given(model_cases(), st.sampled_from(["spikes", "events", "real grad"]), st.floats(0, 1), st.booleans())
def test_a_band_wider_than_any_membrane_is_infinite_bit_for_bit(case, kind, density, given):
    model, states, x = Model(case), states_for(case, given), make_input(kind, case, density)
    finite, infinite = (run(enabled_copy(model, b_th), x, states) for b_th in (1e9, INF))
    assert torch.equal(finite.out, infinite.out)
    for a, b in zip(finite.states, infinite.states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for name, gradient in finite.gradients.items():
        assert torch.equal(gradient, infinite.gradients[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["LIF", "LIFBox", "LIFRecurrent", "LI"])
def test_initial_membranes_of_norse_are_float32(kind, form):
    """Norse rounds the gradient of a leak that learns to float32 in the first step; everything else agrees."""
    layers = [LayerCase(kind, 6, learn=frozenset({"v_leak", "tau_mem_inv"}))]
    case = ModelCase(layers, form=form)
    model, x = Model(case), make_input("spikes", case, 0.4)
    stock, _ = stock_run(model, 0.4, x)
    ours = run(enabled_copy(model, 0.4), x)
    for gradients in (ours.gradients, stock.gradients):
        gradients["p0.v_leak"] = gradients["p0.v_leak"].float()
    assert_same_gradients({"leak": ours.gradients.pop("p0.v_leak")}, {"leak": stock.gradients.pop("p0.v_leak")}, 1e-5)
    assert_same(ours, stock)


# Ties: numbers whose sums are exact, so that v == v_th happens and means no spike, and |v - v_th| == b_th happens and
# means not active.


def tie_case(seed: int, kind: str, reset: str, form: str) -> tuple[Model, torch.Tensor, list]:
    layer = LayerCase(kind, 6, reset=reset, dt=0.5, method="triangle", alpha=0.5)
    case = ModelCase([layer, layer], inputs=5, form=form)
    model = Model(case)
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(dyadic(parameter.shape, seed + k, unit=0.25, most=4))
            if parameter.shape == (6, 6) and kind == "LIFRecurrent":
                parameter.fill_diagonal_(0)
        for cell in model.cells():
            for name, value in (
                ("tau_mem_inv", 1),
                ("tau_syn_inv", 1),
                ("v_leak", 0),
                ("v_th", 0.5),
                ("v_reset", 0.25),
            ):
                if hasattr(cell.p, name):
                    getattr(cell.p, name).fill_(value)
    states = given_states(case)
    with torch.no_grad():
        for k, state in enumerate(states):
            for j, part in enumerate(state):
                part.copy_(dyadic(part.shape, seed + 20 + 5 * k + j, unit=0.25, most=2))
    return model, dyadic((5, 3, 5), seed + 9, torch.float64, unit=1.0, most=1).abs(), states


@settings(max_examples=60)
@given(
    st.integers(0, 10_000), st.sampled_from(SPIKING), st.sampled_from(["value", "subtract"]), st.sampled_from(FORMS),
    st.sampled_from([0.125, 0.25, 0.5, INF]),
)  # fmt: skip
def test_ties_are_decided_as_the_framework_does(seed, kind, reset, form, b_th):
    model, x, states = tie_case(seed, kind, reset, form)
    stock, _ = stock_run(model, b_th, x, states)
    with sparse_always():
        ours = run(enabled_copy(model, b_th), x, states)
    assert torch.equal(ours.out, stock.out)
    for a, b in zip(ours.states, stock.states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert_same_gradients(ours.gradients, stock.gradients)


def test_the_tie_draws_do_hold_ties():
    seen: list[torch.Tensor] = []
    for seed in range(10):
        model, x, states = tie_case(seed, "LIF", "value", "sequence")
        seen += stock_run(model, 0.25, x, states)[1]
    values = torch.cat([part.flatten() for part in seen])
    assert int((values == 0).sum()) > 20 and int((values.abs() == 0.25).sum()) > 20


@pytest.mark.parametrize("b_th", [0.2, INF])
@pytest.mark.parametrize("form", ["sequence", "step"])
@pytest.mark.parametrize("kind", SPIKING)
def test_one_thread_and_two_agree_bit_for_bit(kind, form, b_th):
    layers = [LayerCase(kind, 70, learn=ALL), LayerCase(kind, 40)]
    case = ModelCase(layers, inputs=60, steps=6, batch=33, dtype=torch.float32, form=form)
    model, x, states = Model(case), make_input("spikes", case, 0.1), given_states(case)
    outcomes = []
    for number in (1, 2):
        with threads(number):
            outcomes.append(run(enabled_copy(model, b_th), x, states))
    assert torch.equal(outcomes[0].out, outcomes[1].out)
    for name, gradient in outcomes[0].gradients.items():
        assert torch.equal(gradient, outcomes[1].gradients[name]), name


def test_auto_is_the_band_of_its_number():
    case = ModelCase([LayerCase(neurons=8, method="tanh", alpha=20.0)])
    model, x = Model(case), make_input("events", case, 0.3)
    width = sparse_backend.report(enabled_copy(model, "auto")).layers[0].b_th_value
    automatic, number = run(enabled_copy(model, "auto"), x), run(enabled_copy(model, width), x)
    assert width == pytest.approx(0.0916, abs=0.001)  # artanh(0.95) / 20
    assert_same(automatic, number)
