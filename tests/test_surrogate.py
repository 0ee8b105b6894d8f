"""g of whatever callable a model uses, which callables are refused, and the automatic b_th against closed forms."""

from __future__ import annotations

import functools
import gc
import math
import random

import numpy as np
import pytest
import snntorch.surrogate
import torch
from helpers import INF, SURROGATES, boxcar, fast_sigmoid, no_derivative, sigmoid, step_function, straight_through
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_backend import surrogate


def fast_sigmoid_of(x, slope):
    return snntorch.surrogate.FastSigmoid.apply(x, slope)


# The derivative.


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), ()])
def test_derivative_is_what_autograd_says(name, dtype, shape):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (expected,) = torch.autograd.grad(SURROGATES[name](x).sum(), x)
    g = surrogate.derivative(SURROGATES[name], x)
    assert g.dtype == dtype
    assert g.shape == x.shape
    assert not g.requires_grad
    assert torch.equal(g, expected)


def test_derivative_works_under_no_grad_and_leaves_its_argument_alone():
    x = torch.randn(5)
    with torch.no_grad():
        g = surrogate.derivative(fast_sigmoid(10), x)
    assert torch.allclose(g, 1 / (1 + 10 * x.abs()) ** 2)
    assert not x.requires_grad and x.grad is None


def test_derivative_of_a_surrogate_that_returns_float32():
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    g = surrogate.derivative(snntorch.surrogate.fast_sigmoid(25), x)
    assert g.dtype == torch.float64
    assert torch.allclose(g, 1 / (1 + 25 * x.abs()) ** 2, rtol=1e-6)


def test_a_surrogate_without_graph_has_derivative_zero():
    assert torch.equal(surrogate.derivative(no_derivative, torch.randn(4)), torch.zeros(4))


def test_a_surrogate_that_ignores_its_input_has_derivative_zero():
    other = torch.ones(3, requires_grad=True)
    assert torch.equal(surrogate.derivative(lambda x: other * 1, torch.randn(3)), torch.zeros(3))


# The automatic b_th.


@pytest.mark.parametrize("slope", [1.0, 5.0, 25.0, 100.0, 1000.0])
def test_auto_of_fast_sigmoid(slope):
    assert surrogate.inspect(fast_sigmoid(slope)).auto_b_th == pytest.approx(19 / slope, rel=1e-3)
    assert surrogate.inspect(snntorch.surrogate.fast_sigmoid(slope)).auto_b_th == pytest.approx(19 / slope, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 10.0])
def test_auto_of_atan(alpha):
    expected = math.tan(0.95 * math.pi / 2) * 2 / (math.pi * alpha)
    assert surrogate.inspect(snntorch.surrogate.atan(alpha)).auto_b_th == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("slope", [1.0, 5.0, 25.0])
def test_auto_of_sigmoid(slope):
    expected = math.log(0.975 / 0.025) / slope
    assert surrogate.inspect(sigmoid(slope)).auto_b_th == pytest.approx(expected, rel=1e-3)
    assert surrogate.inspect(snntorch.surrogate.sigmoid(slope)).auto_b_th == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("half_width", [0.1, 0.5, 3.0])
def test_auto_of_boxcar(half_width):
    assert surrogate.inspect(boxcar(half_width)).auto_b_th == pytest.approx(0.95 * half_width, rel=5e-3)


def test_auto_of_a_gaussian():
    gaussian = step_function(lambda x: torch.exp(-0.5 * x * x))
    assert surrogate.inspect(gaussian).auto_b_th == pytest.approx(1.959964, rel=1e-3)


@settings(deadline=None, max_examples=15)
@given(mass=st.floats(0.05, 0.99), slope=st.floats(0.1, 500))
def test_any_mass_of_fast_sigmoid(mass, slope):
    assert surrogate.b_th_of_mass(fast_sigmoid(slope), mass) == pytest.approx(mass / (1 - mass) / slope, rel=2e-3)


def test_mass_counts_both_sides_and_absolute_values():
    one_sided = step_function(lambda x: (x > 0).to(x.dtype) * torch.exp(-x))
    assert surrogate.b_th_of_mass(one_sided) == pytest.approx(-math.log(0.05), rel=1e-3)
    negative = step_function(lambda x: -torch.exp(-x.abs()))
    assert surrogate.b_th_of_mass(negative) == pytest.approx(-math.log(0.05), rel=1e-3)


@pytest.mark.parametrize(
    "slope", [torch.ones_like, lambda x: 1 / (1 + x.abs()), lambda x: 1 / (1 + x.abs().sqrt()), lambda x: x.abs()]
)
def test_auto_is_infinite_where_the_mass_diverges(slope):
    assert surrogate.inspect(step_function(slope)).auto_b_th == INF


def test_auto_of_straight_through_is_infinite_without_a_problem():
    known = surrogate.inspect(straight_through())
    assert known.problem is None
    assert known.auto_b_th == INF


def test_a_formula_that_overflows_far_away_still_has_a_mass():
    naive = step_function(lambda x: torch.exp(-x) / (1 + torch.exp(-x)) ** 2)  # nan below -710
    assert surrogate.b_th_of_mass(naive) == pytest.approx(math.log(0.975 / 0.025), rel=1e-3)


# What is refused, and why.


@pytest.mark.parametrize("name", SURROGATES)
def test_fixed_elementwise_surrogates_are_taken(name):
    assert surrogate.probe(SURROGATES[name]) is None


@pytest.mark.parametrize(
    "make",
    [
        snntorch.surrogate.atan,
        snntorch.surrogate.fast_sigmoid,
        snntorch.surrogate.sigmoid,
        snntorch.surrogate.straight_through_estimator,
        snntorch.surrogate.spike_rate_escape,
        snntorch.surrogate.SFS,
        snntorch.surrogate.heaviside,
        functools.partial(snntorch.surrogate.custom_surrogate, lambda x, grad, spikes: grad * torch.exp(-x.abs())),
    ],
)
def test_the_surrogates_of_snntorch_are_taken(make):
    problem = surrogate.inspect(make()).problem
    assert problem is None, problem


def test_a_stochastic_surrogate_is_refused():
    assert surrogate.probe(snntorch.surrogate.SSO()) is not None

    def noisy(x):
        g = torch.rand_like(x)
        soft = g * x
        return (x > 0).to(x.dtype) + (soft - soft.detach())

    assert "random or keeps state" in surrogate.probe(noisy)


def test_a_surrogate_whose_forward_is_random_is_refused():
    assert "H(x)" in surrogate.probe(lambda x: (torch.rand_like(x) < torch.sigmoid(x)).to(x.dtype) + 0 * x)


def test_a_surrogate_that_keeps_state_is_refused():
    class Annealed:
        slope = 1.0

        def __call__(self, x):
            self.slope *= 1.1
            return fast_sigmoid(self.slope)(x)

    assert "keeps state" in surrogate.probe(Annealed())


def test_a_surrogate_per_neuron_is_refused():
    slopes = torch.linspace(1, 50, 37)  # fits the probe's width by chance
    problem = surrogate.probe(lambda x: fast_sigmoid(slopes)(x))
    assert "single entries" in problem or "every neuron" in problem
    by_position = step_function(lambda x: torch.arange(x.numel(), dtype=x.dtype).view_as(x) + 1)
    assert "every neuron" in surrogate.probe(by_position)


def test_a_surrogate_normalised_over_the_batch_is_refused():
    assert "every neuron" in surrogate.probe(step_function(lambda x: x.abs() / x.abs().sum()))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: torch.sigmoid(x),
        lambda x: (x >= 0).to(x.dtype) + 0 * x,  # a tie at the threshold would spike
        lambda x: (x > 0.1).to(x.dtype) + 0 * x,
        lambda x: torch.sign(x) + 0 * x,
        lambda x: 2 * fast_sigmoid()(x),
        lambda x: torch.full_like(x, math.nan) * x,
    ],
)
def test_a_forward_that_is_not_the_step_function_is_refused(forward):
    assert "not the step function" in surrogate.probe(forward)


def test_a_surrogate_without_derivative_is_refused():
    assert "no derivative" in surrogate.probe(no_derivative)
    assert "no derivative" in surrogate.probe(step_function(torch.zeros_like))


def test_a_derivative_that_is_not_finite_is_refused():
    assert "not finite" in surrogate.probe(step_function(lambda x: 1 / x.abs()))


def test_a_surrogate_that_raises_is_refused_with_its_error():
    def two_dimensional(x):
        if x.dim() != 2:
            raise IndexError("expected [B, N]")
        return fast_sigmoid()(x)

    problem = surrogate.probe(two_dimensional)
    assert "single entries" in problem and "IndexError" in problem and "expected [B, N]" in problem


@pytest.mark.parametrize("result", [lambda x: None, lambda x: fast_sigmoid()(x).sum(), lambda x: (x, x)])
def test_a_surrogate_of_another_result_is_refused(result):
    assert surrogate.probe(result) is not None


def test_modules_partials_and_apply_are_callables_too():
    class Steep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor(25.0))

        def forward(self, x):
            soft = x / (1 + self.slope.detach() * x.abs())
            return (x > 0).to(x.dtype) + (soft - soft.detach())

    module = Steep()
    assert surrogate.inspect(module).problem is None
    assert surrogate.inspect(module) is surrogate.inspect(module)
    assert surrogate.inspect(module).auto_b_th == pytest.approx(19 / 25, rel=1e-3)
    assert surrogate.inspect(functools.partial(fast_sigmoid_of, slope=25)).problem is None
    assert surrogate.inspect(lambda x: snntorch.surrogate.FastSigmoid.apply(x, 25)).problem is None
    assert surrogate.inspect(module.forward).problem is None


def test_a_surrogate_that_only_takes_float32():
    def picky(x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return fast_sigmoid()(x)

    known = surrogate.inspect(picky)
    assert known.problem is None
    assert known.auto_b_th == INF  # its mass cannot be known


def test_an_unhashable_callable_is_inspected_each_time():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return fast_sigmoid()(x)

    assert surrogate.inspect(Unhashable()).problem is None


def test_probing_is_done_once_and_forgotten_with_the_callable():
    calls = []

    def counted(x):
        calls.append(x.shape)
        return SURROGATES["fast_sigmoid"](x)

    first = surrogate.inspect(counted)
    count = len(calls)
    assert surrogate.inspect(counted) is first
    assert len(calls) == count
    before = len(surrogate._known)
    del counted
    gc.collect()
    assert len(surrogate._known) < before


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    surrogate.probe(snntorch.surrogate.SSO())
    surrogate.Surrogate(fast_sigmoid(7))
    surrogate.Surrogate(lambda x: (torch.rand_like(x) < 0.5).to(x.dtype) * x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_probing_does_not_depend_on_or_change_grad_mode():
    with torch.no_grad():
        assert surrogate.probe(fast_sigmoid(3)) is None
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        known = surrogate.inspect(fast_sigmoid(4))  # the first call of a model may be an evaluation
    assert known.problem is None
    assert known.auto_b_th == pytest.approx(19 / 4, rel=1e-3)


@pytest.mark.parametrize("slope", [1.0, 25.0, 100.0])
@pytest.mark.parametrize("b_th", [0.01, 0.2, 3.0])
def test_mass_inside_a_band(slope, b_th):
    kept = slope * b_th / (1 + slope * b_th)
    assert surrogate.mass_of_b_th(fast_sigmoid(slope), b_th) == pytest.approx(kept, rel=1e-4)
    assert surrogate.b_th_of_mass(fast_sigmoid(slope), kept) == pytest.approx(b_th, rel=2e-3)


@pytest.mark.parametrize("mass", [0, 1, 1.5, -1, math.nan])
def test_a_share_outside_0_and_1_is_refused(mass):
    with pytest.raises(ValueError, match="mass: expected a share between 0 and 1, got"):
        surrogate.b_th_of_mass(fast_sigmoid(10), mass)


def test_mass_where_there_is_no_end_to_it():
    assert surrogate.mass_of_b_th(fast_sigmoid(25.0), INF) == surrogate.mass_of_b_th(straight_through(), INF) == 1
    assert surrogate.mass_of_b_th(straight_through(), 5.0) == 0
    assert surrogate.mass_of_b_th(fast_sigmoid(25.0), 1e12) == pytest.approx(1)
