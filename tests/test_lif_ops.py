"""The ops of the two-state neuron through the dispatcher against their plain-PyTorch twins, forward and backward apart.

Drawing and comparing are those of `test_ops.py`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import INF, dyadic, normal, spikes, threads
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_ops import (
    B_TH,
    BATCH,
    DENSITY,
    DTYPES,
    F32,
    F64,
    LAYOUT,
    MANY_SAMPLES,
    SEED,
    STEPS,
    WIDTH,
    equal,
    kernels,
    lay_out,
    make_active,
    make_events,
    numbers,
    spread,
    spread_floats,
)
from torch import Tensor

from sparse_backend import _native
from sparse_backend.dynamics import LIF_RESETS, RESETS
from sparse_backend.ops import event_linear as event_linear_ops
from sparse_backend.ops import hub as hub_ops
from sparse_backend.ops import lif as lif_ops
from sparse_backend.ops import linear_lif as linear_lif_ops
from sparse_backend.ops.lif import NEEDS, LIFOutput, Neuron
from sparse_backend.reference import lif as lif_twins
from sparse_backend.reference import linear_leaky as linear_twins
from sparse_backend.reference import linear_lif as linear_lif_twins

pytestmark = pytest.mark.kernels

__all__ = ["kernels"]  # the fixture loads them here too

RESET = st.sampled_from(sorted(LIF_RESETS))
COEFFICIENTS = ("mem_gain", "syn_decay", "leak", "threshold", "reset_to")


# Drawing.


class Options(NamedTuple):
    keep_states: bool
    keep_drive: bool
    keep_inflow: bool
    max_active: float = 1.0


def coefficient(name: str, per_neuron: bool, neurons: int, seed: int, dtype: torch.dtype) -> Tensor:
    shape = (neurons,) if per_neuron else ()
    low, high = {"mem_gain": (0, 4), "syn_decay": (0, 5), "leak": (-2, 3), "threshold": (1, 5), "reset_to": (-4, 1)}[
        name
    ]
    random = torch.Generator().manual_seed(seed)
    if dtype == F32:
        return torch.randint(low, high + 1, shape, generator=random).to(F32) / 4
    return (low + (high - low) * torch.rand(shape, generator=random, dtype=F64)) / 4


@st.composite
def neurons_of(
    draw: Any, steps: int, batch: int, neurons: int, dtype: torch.dtype, dense: bool | None = None
) -> tuple[Neuron, Options]:
    seed = draw(SEED)
    vectors = draw(st.sets(st.sampled_from(COEFFICIENTS)))
    parameters = {
        name: coefficient(name, name in vectors, neurons, seed + k, dtype) for k, name in enumerate(COEFFICIENTS)
    }
    synaptic = draw(st.booleans())
    if not synaptic:
        parameters["syn_decay"] = None
    if draw(st.sampled_from([False, False, True])):
        parameters["leak"] = None

    def state(offset: int) -> Tensor | None:
        made = numbers((batch, neurons), seed + offset, dtype) if draw(st.booleans()) else None
        return made.t().contiguous().t() if made is not None and draw(st.booleans()) else made

    recurrent = None
    if draw(st.booleans()):
        scale = 1.0 / max(neurons, 1) ** 0.5
        recurrent = lay_out(numbers((neurons, neurons), seed + 12, dtype, scale), draw(LAYOUT))
    discrete = draw(st.booleans())
    if discrete:
        parameters["leak"] = None
        if draw(st.booleans()):  # silent neurons that the first step resets
            parameters["threshold"] = -parameters["threshold"]
    neuron = Neuron(
        **parameters,
        v=state(10),
        i=state(11),
        recurrent=recurrent,
        g=None,
        reset=draw(st.sampled_from(sorted(RESETS.values()))) if discrete else LIF_RESETS[draw(RESET)],
        discrete=discrete,
        detached=discrete or draw(st.booleans()),
        b_th=draw(B_TH),
        dense=draw(st.booleans()) if dense is None else dense,
    )
    # 4 bits a step: what float32 holds exactly
    assume(dtype == F64 or steps <= 3)
    limit = draw(st.sampled_from([1.0, 1.0, 0.1, 0.0]))
    return neuron, Options(draw(st.booleans()), draw(st.booleans()), synaptic and draw(st.booleans()), limit)


def overflowed(out: Any, dense: bool) -> bool:
    return not dense and LIFOutput(*out).active_ptr.numel() == 0


def away_from_edges(current: Tensor, neuron: Neuron) -> None:
    """Reject draws where rounding decides whether something spikes or is active; dyadic ones are exact."""
    if current.dtype == F32 or not current.numel():
        return
    args = (current, *neuron._replace(b_th=INF, dense=True))
    x = lif_twins.lif(*args, False, False, False, 1.0)[0].abs()
    assume(float(x.min()) > 1e-9 and (math.isinf(neuron.b_th) or float((x - neuron.b_th).abs().min()) > 1e-9))


def compare_forward(ours: Any, twin: Any, dtype: torch.dtype, dense: bool) -> LIFOutput:
    assert overflowed(ours, dense) == overflowed(twin, dense), "one of the two ran over max_active"
    if not overflowed(twin, dense):
        for name, one, other in zip(LIFOutput._fields, ours, twin, strict=True):
            equal(one, other, f"forward {name}", exact=dtype == F32)
    return LIFOutput(*ours)


def backward_inputs(
    draw: Any, out: LIFOutput, neuron: Neuron, kept: Options, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Any, ...]:
    """A backward's arguments: gradients arriving (some absent, expanded or strided), what is saved, sizes, needs."""
    seed = draw(SEED)
    _, batch, neurons = shape
    synaptic = neuron.syn_decay is not None

    def arriving(size: Any, offset: int, can: bool = True) -> Tensor | None:
        if not can or not draw(st.booleans()):
            return None
        kind = draw(st.sampled_from(["plain", "expanded", "spread"]))
        made = numbers(size, seed + offset, dtype)
        if kind == "expanded":
            return torch.full((), 0.5, dtype=dtype).expand(size)
        return spread(made) if kind == "spread" else made

    grads = (
        arriving(out.x.shape, 0),
        arriving((batch, neurons), 1),
        arriving((batch, neurons), 2, synaptic),
        arriving(shape, 3, kept.keep_states),
        arriving(shape, 4, kept.keep_states and synaptic),
    )
    can = {
        "mem_gain": kept.keep_drive,
        "syn_decay": kept.keep_inflow,
        "leak": neuron.leak is not None,
        "recurrent": neuron.recurrent is not None,
    }
    needs = sum(1 << k for k, name in enumerate(NEEDS) if can.get(name, True) and draw(st.booleans()))
    neuron = neuron._replace(g=numbers(out.x.shape, seed + 5, dtype).abs())
    saved = lif_ops.saved_for_backward(out, neuron, needs)
    return *grads, *saved, *lif_ops.sizes_of(shape, neuron, needs)


def compare_backward(ours: Any, twin: Any, names: tuple[str, ...]) -> None:
    for name, one, other in zip(names, ours, twin, strict=True):
        equal(one, other, f"gradient of {name}")


# Against the twins.


@settings(deadline=None, max_examples=150)
@given(data=st.data(), steps=STEPS, batch=BATCH, neurons=WIDTH, dtype=DTYPES, seed=SEED)
def test_lif_against_its_twin(data, steps, batch, neurons, dtype, seed):
    shape = (steps, batch, neurons)
    current = numbers(shape, seed, dtype, data.draw(st.sampled_from([0.5, 2.0])))
    neuron, kept = data.draw(neurons_of(*shape, dtype))
    away_from_edges(current, neuron)
    args = (current, *neuron, *kept)
    out = compare_forward(lif_ops.lif(*args), lif_twins.lif(*args), dtype, neuron.dense)
    if overflowed(out, neuron.dense):
        return
    args = backward_inputs(data.draw, out, neuron, kept, shape, dtype)
    compare_backward(lif_ops.lif_backward(*args), lif_twins.lif_backward(*args), ("current", *NEEDS))


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(), steps=STEPS, batch=BATCH, inputs=WIDTH, neurons=WIDTH, density=DENSITY, dtype=DTYPES,
    graded=st.booleans(), sliced=st.booleans(), bias=st.booleans(), layout=LAYOUT, seed=SEED,
)  # fmt: skip
def test_linear_lif_against_its_twin(
    data, steps, batch, inputs, neurons, density, dtype, graded, sliced, bias, layout, seed
):
    draw = data.draw
    shape, rows = (steps, batch, neurons), steps * batch
    x = make_events(rows, inputs, density, seed, dtype, graded, sliced)
    scale = 0.5 if dtype == F32 else 2 * (1.0 + inputs * density) ** -0.5
    weight = lay_out(numbers((neurons, inputs), seed + 1, dtype, scale), layout)
    b = numbers((neurons,), seed + 2, dtype, 0.3) if bias else None
    neuron, kept = draw(neurons_of(*shape, dtype))
    away_from_edges(linear_twins.event_linear(x.row_ptr, x.indices, x.values, weight, b).view(shape), neuron)
    input_kind = draw(st.integers(0, 2))
    ptr, where = make_active(rows, inputs, draw(DENSITY), seed + 3)
    handle = None
    if input_kind:
        handle = torch.zeros(where.shape if input_kind == 1 else (steps, batch, inputs), dtype=dtype)
    compact = (ptr, where) if input_kind == 1 else (None, None)
    args = (
        x.row_ptr, x.indices, x.values, handle, *compact, weight, b, None, 0, steps, batch, *neuron, *kept,
    )  # fmt: skip
    out = compare_forward(linear_lif_ops.linear_lif(*args), linear_lif_twins.linear_lif(*args), dtype, neuron.dense)
    if overflowed(out, neuron.dense) or (neuron.dense and neuron.recurrent is not None):
        return
    need = input_kind, draw(st.booleans()), draw(st.booleans())
    args = (
        x.row_ptr, x.indices, x.values, *compact, weight, *need,
        *backward_inputs(draw, out, neuron, kept, shape, dtype),
    )  # fmt: skip
    ours, twin = linear_lif_ops.linear_lif_backward(*args), linear_lif_twins.linear_lif_backward(*args)
    compare_backward(ours, twin, ("input", "weight", "bias", *NEEDS))


@settings(deadline=None, max_examples=60)
@given(**MANY_SAMPLES)
def test_linear_lif_of_many_samples(**case):
    test_linear_lif_against_its_twin.hypothesis.inner_test(**case)


def make_neuron(neurons: int, batch: int, dtype: torch.dtype, recurrent: bool = False, **rest: Any) -> Neuron:
    made = {
        "mem_gain": torch.tensor(0.25, dtype=dtype),
        "syn_decay": torch.tensor(0.5, dtype=dtype),
        "leak": torch.tensor(0.0, dtype=dtype),
        "threshold": torch.full((neurons,), 0.5, dtype=dtype),
        "reset_to": torch.tensor(-0.25, dtype=dtype),
        "v": numbers((batch, neurons), 90, dtype),
        "i": numbers((batch, neurons), 91, dtype),
        "recurrent": normal((neurons, neurons), 92, dtype, neurons**-0.5) if recurrent else None,
        "g": None,
        "reset": LIF_RESETS["value"],
        "discrete": False,
        "detached": False,
        "b_th": 0.3,
        "dense": False,
    }
    return Neuron(**(made | rest))


DISCRETE: dict[str, Any] = {"discrete": True, "detached": True, "leak": None, "reset": RESETS["zero"]}


@pytest.mark.parametrize("neurons", [1, 16, 33, 200, 300, 1000])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_whole_layer_of_usual_size(neurons, recurrent):
    steps, batch, inputs = 40, 20, 100
    x = make_events(steps * batch, inputs, 0.05, 1, F64)
    weight = normal((neurons, inputs), 2, F64)
    neuron = make_neuron(neurons, batch, F64, recurrent)
    args = (x.row_ptr, x.indices, None, None, None, None, weight, None, None, 0, steps, batch)
    kept = Options(False, True, True)
    out = LIFOutput(*linear_lif_ops.linear_lif(*args, *neuron, *kept))
    compare_forward(out, linear_lif_twins.linear_lif(*args, *neuron, *kept), F64, False)
    assert out.spike_indices.numel() and out.active_indices.numel()
    neuron = neuron._replace(g=normal(out.x.shape, 3, F64).abs())
    needs = (1 << len(NEEDS)) - (1 if recurrent else 1 + (1 << NEEDS.index("recurrent")))
    saved = lif_ops.saved_for_backward(out, neuron, needs)
    ptr, where = make_active(steps * batch, inputs, 0.03, 4)
    args = (
        x.row_ptr, x.indices, None, ptr, where, weight, 1, True, True, normal(out.x.shape, 5, F64),
        None, None, None, None, *saved, *lif_ops.sizes_of((steps, batch, neurons), neuron, needs),
    )  # fmt: skip
    ours, twin = linear_lif_ops.linear_lif_backward(*args), linear_lif_twins.linear_lif_backward(*args)
    compare_backward(ours, twin, ("input", "weight", "bias", *NEEDS))


# Ties, what is not finite, too much activity.


@pytest.mark.parametrize("reset", sorted(LIF_RESETS))
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("neurons", [1, 3, 19, 40])
def test_ties_do_not_spike_and_the_band_is_open(reset, dtype, neurons):
    """u == threshold is no spike, |u - threshold| == b_th is not active."""
    current = torch.tensor([1.0, 0.5, 1.5, 0.0, 2.0], dtype=dtype).view(5, 1, 1).expand(5, 2, neurons).contiguous()
    one, zero = torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)
    neuron = Neuron(one, None, zero, one, zero, None, None, None, None, LIF_RESETS[reset], False, False, 0.5, False)
    out = LIFOutput(*lif_ops.lif(current, *neuron, *Options(True, True, False)))  # u is the current
    assert out.spike_ptr[::2].tolist() == [n * neurons for n in (0, 0, 0, 2, 2, 4)]
    assert out.active_ptr[::2].tolist() == [n * neurons for n in (0, 2, 2, 2, 2, 2)]
    assert torch.equal(out.x, torch.zeros(2 * neurons, dtype=dtype))
    compare_forward(out, lif_twins.lif(current, *neuron, *Options(True, True, False)), F32, False)


@pytest.mark.parametrize("reset", sorted(LIF_RESETS))
@pytest.mark.parametrize("bad", [math.nan, INF, -INF, 1e38])
@pytest.mark.parametrize("b_th", [0.5, INF])
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_not_finite_in_the_current(reset, bad, b_th, dense):
    current = dyadic((3, 2, 21), 1)
    current[1, 0, 3] = current[0, 1, 17] = bad
    neuron = make_neuron(21, 2, F32, reset=LIF_RESETS[reset], b_th=b_th, dense=dense)
    args = (current, *neuron, *Options(True, True, True))
    out = compare_forward(lif_ops.lif(*args), lif_twins.lif(*args), F32, dense)
    assert bad == 1e38 or not bool(out.v_seq.isfinite().all())


@pytest.mark.parametrize("max_active", [0.0, 0.1, 0.49, 0.5, 0.7])
def test_too_many_active_entries_keep_nothing(max_active):
    """Half of all entries are active: above max_active nothing is kept and active_ptr says so by being empty."""
    current = torch.tensor([1.0, 5.0]).repeat(3, 2, 20)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    neuron = Neuron(one, None, zero, one, zero, None, None, None, None, LIF_RESETS["none"], False, False, 0.5, False)
    out = LIFOutput(*lif_ops.lif(current, *neuron, *Options(True, True, False, max_active)))
    if max_active < 0.5:
        assert all(part.numel() == 0 for part in out)
    else:
        assert out.active_ptr.numel() == 7


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded", "strided"])
@pytest.mark.parametrize("neurons", [0, 1, 15, 16])
def test_a_layer_without_inputs_gets_its_bias(layout, neurons):
    """A weight without entries has no address: that is no reason to look for the currents elsewhere."""
    x = make_events(6, 0, 0.0, 0, F64)
    weight, bias = lay_out(torch.zeros(neurons, 0, dtype=F64), layout), normal((neurons,), 1)
    args = (x.row_ptr, x.indices, None, None, None, None, weight, bias, None, 0, 3, 2, *make_neuron(neurons, 2, F64))
    args = (*args, *Options(True, False, False))
    compare_forward(linear_lif_ops.linear_lif(*args), linear_lif_twins.linear_lif(*args), F64, False)


def test_strided_arguments():
    """All floats as views of something larger; events come contiguous."""
    current = normal((5, 3, 18), 1)
    neuron = make_neuron(18, 3, F64, recurrent=True)
    kept = Options(True, True, True)
    strided = neuron._replace(recurrent=lay_out(neuron.recurrent, "strided"), **{
        name: spread(getattr(neuron, name)) for name in (*COEFFICIENTS, "v", "i")
    })  # fmt: skip
    out = lif_ops.lif(spread(current), *strided, *kept)
    out = compare_forward(out, lif_twins.lif(current, *neuron, *kept), F64, False)
    neuron = neuron._replace(g=normal(out.x.shape, 5).abs())
    grads = [normal(part.shape, 6 + k) for k, part in enumerate(out[:5])]
    rest = (*lif_ops.saved_for_backward(out, neuron, 255), *lif_ops.sizes_of((5, 3, 18), neuron, 255))
    tensors = sum(part is None or isinstance(part, Tensor) for part in rest)
    ours = lif_ops.lif_backward(*map(spread, grads), *spread_floats(rest[:tensors]), *rest[tensors:])
    compare_backward(ours, lif_twins.lif_backward(*grads, *rest), ("current", *NEEDS))


# Threads.


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("recurrent", "dense"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("rest", [{}, DISCRETE], ids=["", "discrete"])
@pytest.mark.parametrize(  # the weights' sums in shares of the samples or not, the columns in one walk or two
    ("inputs", "neurons"), [(60, 100), (600, 100), (150, 330)]
)
def test_results_do_not_depend_on_threads(dtype, recurrent, dense, rest, inputs, neurons):
    if not _native.available():
        pytest.skip("torch's own matrix products, which the twins use, depend on threads")
    steps, batch = 25, 40
    x = make_events(steps * batch, inputs, 0.05, 1, dtype, graded=True)
    weight = normal((neurons, inputs), 2, dtype, 0.8)
    neuron = make_neuron(neurons, batch, dtype, recurrent, dense=dense, **rest)
    ptr, where = make_active(steps * batch, inputs, 0.1, 5)
    needs = 255 if recurrent else 127

    def run():
        args = (x.row_ptr, x.indices, x.values, None, None, None, weight, normal((neurons,), 4, dtype, 0.1), None, 0)
        out = LIFOutput(*linear_lif_ops.linear_lif(*args, steps, batch, *neuron, *Options(True, True, True)))
        with_g = neuron._replace(g=normal(out.x.shape, 3, dtype).abs())
        saved = lif_ops.saved_for_backward(out, with_g, needs)
        grads = [normal(part.shape, 6 + k, dtype) for k, part in enumerate(out[:5])]
        rest = (*grads, *saved, *lif_ops.sizes_of((steps, batch, neurons), neuron, needs))
        events = (x.row_ptr, x.indices, x.values)
        return (
            *out,
            *linear_lif_ops.linear_lif_backward(*events, ptr, where, weight, 1, True, True, *rest),
            *lif_ops.lif_backward(*rest),
        )

    with threads(1):
        one = run()
    for count in (2, 3, 7):
        with threads(count):
            equal(run(), one, f"{count} threads", exact=True)


def test_tiny_numbers_are_zero_inside_a_kernel_alone():
    """A state that decays below the smallest normal number would slow every step down."""
    if not _native.available():
        pytest.skip("the twin computes as torch does")
    neuron = make_neuron(16, 1, F32, v=torch.full((1, 16), 1e-30), i=None, mem_gain=torch.tensor(1.0 - 2**-20))
    out = LIFOutput(*lif_ops.lif(torch.zeros(6, 1, 16), *neuron, *Options(True, False, False)))
    assert float(out.v_seq[0].min()) > 0 and torch.equal(out.v_last, torch.zeros(1, 16))
    assert float(torch.tensor([1e-30]) * torch.tensor([1e-10])) > 0


# Schemas, fakes, autograd.


def arguments(op: str, dtype=F64, grad=True, **rest: Any) -> tuple[Any, ...]:
    keep = Options(rest.pop("keep_states", False), rest.pop("keep_drive", grad), rest.pop("keep_inflow", grad))
    steps = rest.pop("steps", 3)
    handle = rest.pop("handle", "compact")
    neuron = make_neuron(6, 2, dtype, **rest)
    if neuron.syn_decay is None:
        keep = keep._replace(keep_inflow=False)
    leaves = [part for part in (*neuron[:5], neuron.v, neuron.i, neuron.recurrent) if part is not None]
    for leaf in leaves:
        leaf.requires_grad_(grad)
    if op == "lif":
        return normal((steps, 2, 6), 1, dtype).requires_grad_(), *neuron, *keep
    x = make_events(2 * steps, 7, 0.4, 1, dtype)
    ptr, where = make_active(2 * steps, 7, 0.4, 2)
    shape = {"compact": where.shape, "dense": (steps, 2, 7)}.get(handle)
    made = None if shape is None else torch.zeros(shape, dtype=dtype).requires_grad_(grad)
    compact = (ptr, where) if handle == "compact" else (None, None)
    weight, bias = normal((6, 7), 3, dtype).requires_grad_(grad), normal((6,), 4, dtype).requires_grad_(grad)
    return x.row_ptr, x.indices, None, made, *compact, weight, bias, None, 0, steps, 2, *neuron, *keep


OPCHECKS = {
    "lif": lambda: (lif_ops.lif, arguments("lif")),
    "lif, states kept": lambda: (lif_ops.lif, arguments("lif", keep_states=True)),
    "lif float32": lambda: (lif_ops.lif, arguments("lif", F32, reset=LIF_RESETS["subtract"])),
    "lif without i": lambda: (lif_ops.lif, arguments("lif", syn_decay=None, reset=LIF_RESETS["none"])),
    "lif without a leak": lambda: (lif_ops.lif, arguments("lif", leak=None)),
    "lif without parameters": lambda: (lif_ops.lif, arguments("lif", grad=False)),
    "lif dense": lambda: (lif_ops.lif, arguments("lif", dense=True, keep_states=True)),
    "lif recurrent": lambda: (lif_ops.lif, arguments("lif", recurrent=True)),
    "lif discrete": lambda: (lif_ops.lif, arguments("lif", keep_states=True, **DISCRETE)),
    "lif discrete dense": lambda: (lif_ops.lif, arguments("lif", dense=True, **DISCRETE)),
    "linear_lif discrete": lambda: (linear_lif_ops.linear_lif, arguments("linear_lif", recurrent=True, **DISCRETE)),
    "lif recurrent dense": lambda: (lif_ops.lif, arguments("lif", recurrent=True, dense=True)),
    "linear_lif compact": lambda: (linear_lif_ops.linear_lif, arguments("linear_lif")),
    "linear_lif dense input": lambda: (linear_lif_ops.linear_lif, arguments("linear_lif", handle="dense")),
    "linear_lif dense": lambda: (linear_lif_ops.linear_lif, arguments("linear_lif", handle="none", dense=True)),
    "linear_lif step": lambda: (linear_lif_ops.linear_lif, arguments("linear_lif", steps=1)),
    "linear_lif recurrent": lambda: (linear_lif_ops.linear_lif, arguments("linear_lif", recurrent=True)),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op, args = OPCHECKS[name]()
    torch.library.opcheck(op, args)


def test_opcheck_of_the_backwards():
    for dense, rest in itertools.product((False, True), ({}, DISCRETE)):
        neuron = make_neuron(6, 2, F64, dense=dense, recurrent=not dense, **rest)
        out = LIFOutput(*lif_ops.lif(normal((3, 2, 6), 1), *neuron, *Options(False, True, True)))
        needs = 255 - 128 * dense
        saved = lif_ops.saved_for_backward(out, neuron._replace(g=normal(out.x.shape, 2)), needs)
        rest = (out.x, None, None, None, None, *saved, *lif_ops.sizes_of((3, 2, 6), neuron, needs))
        torch.library.opcheck(lif_ops.lif_backward, rest)
        x = make_events(6, 7, 0.4, 1, F64)
        args = (x.row_ptr, x.indices, None, None, None, normal((6, 7), 3), 2, True, True, *rest)
        torch.library.opcheck(linear_lif_ops.linear_lif_backward, args)


def test_absent_gradients_stay_absent():
    out = LIFOutput(*linear_lif_ops.linear_lif(*arguments("linear_lif")))
    assert all(part.requires_grad for part in out[:3])
    assert not any(part.requires_grad for part in out[3:])


@pytest.mark.parametrize("op", ["lif", "linear_lif"])
def test_what_is_attached_afterwards_is_what_the_op_attaches(op):
    """`plain` then `attach` gives the results and gradients of a call, and no grad where nothing learns."""
    call = {"lif": lif_ops.call_lif, "linear_lif": linear_lif_ops.call_linear_lif}[op]
    results = []
    for attach in (False, True):
        args = list(arguments(op, recurrent=True))
        leaves = [part for part in args if isinstance(part, Tensor) and part.requires_grad]
        at = {"lif": 9, "linear_lif": 20}[op]  # g
        if attach:
            out = call.plain(*args)
            assert not any(part.requires_grad for part in out)
            args[at] = out[0].detach().abs()
            out = call.attach(tuple(args), out)
        else:
            args[at] = call.plain(*args)[0].detach().abs()
            out = call(*args)
        assert all(part.requires_grad for part in out[:3])
        loss = (out[0] ** 2).sum() + (out[1] ** 3).sum() + out[2].sum()
        results.append([*(part.detach() for part in out), *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            equal(one, other, exact=True)
    with torch.no_grad():
        args = arguments(op)
        assert not any(part.requires_grad for part in call.attach(args, call.plain(*args)))


def test_the_hub_gathers_the_same_gradient():
    """Step form: T steps of one layer, their weight's gradient through a hub or not."""

    def loss(hub: bool, weight: Tensor, bias: Tensor) -> Tensor:
        id = hub_ops.new_id()
        token = hub_ops.hub(weight, bias, id) if hub else None
        w, b = (weight.detach(), bias.detach()) if hub else (weight, bias)
        neuron, total = make_neuron(6, 2, F64), torch.zeros((), dtype=F64)
        for t in range(3):
            x = make_events(2, 7, 0.4, t, F64, graded=True)
            handle = x.dense.clone().requires_grad_()
            out = LIFOutput(*linear_lif_ops.call_linear_lif(
                x.row_ptr, x.indices, x.values, handle, None, None, w, b, token, id, 1, 2, *neuron,
                *Options(False, False, False),
            ))  # fmt: skip
            neuron = neuron._replace(v=out.v_last, i=out.i_last)
            total = total + (out.x**2).sum() * (t + 1)
        return total + (neuron.v**2).sum()

    weight, bias = normal((6, 7), 3).requires_grad_(), normal((6,), 4).requires_grad_()
    expected = torch.autograd.grad(loss(False, weight, bias), (weight, bias))
    equal(torch.autograd.grad(loss(True, weight, bias), (weight, bias)), expected)
    assert all(bool(grad.abs().max() > 0) for grad in expected)


def test_linear_lif_is_event_linear_then_lif():
    """The fused op's gradients are those of its two parts."""
    for dense in (False, True):
        grads = []
        for fused in (True, False):
            args = arguments("linear_lif", handle="dense", dense=dense, keep_states=True)
            leaves = [part for part in args if isinstance(part, Tensor) and part.requires_grad]
            if fused:
                out = LIFOutput(*linear_lif_ops.linear_lif(*args))
            else:
                current = event_linear_ops.event_linear(*args[:8], None, 0).view(3, 2, 6)
                out = LIFOutput(*lif_ops.lif(current, *args[12:]))
            loss = (out.x**2).sum() + (out.v_last**2).sum() + (out.i_seq * normal((3, 2, 6), 9)).sum()
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for one, other in zip(*grads, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                equal(one, other)


def test_double_backward_is_a_clear_error():
    args = arguments("lif")
    (grad,) = torch.autograd.grad((lif_ops.lif(*args)[0] ** 2).sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double backward|second derivative"):
        grad.sum().backward()


# Bad arguments: an error with a name, never a crash.


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("v", torch.ones(3, 6, dtype=F64)),
        ("i", torch.ones(2, 5, dtype=F64)),
        ("leak", torch.ones(5, dtype=F64)),
        ("mem_gain", torch.ones(5, dtype=F64)),
        ("recurrent", torch.ones(5, 6, dtype=F64)),
    ],
)
def test_arguments_that_do_not_fit_raise(name, bad):
    neuron = make_neuron(6, 2, F64)._replace(**{name: bad})
    with pytest.raises(Exception) as error:
        lif_ops.lif(normal((3, 2, 6), 1), *neuron, *Options(False, False, False))
    assert str(error.value)
    if _native.available():
        assert name in str(error.value) and "expected" in str(error.value)


def test_spikes_are_drawn_at_all():
    """What the tests above compare is not empty."""
    out = LIFOutput(*lif_ops.lif(dyadic((3, 2, 64), 1), *make_neuron(64, 2, F32), *Options(False, False, False)))
    assert out.spike_indices.numel() > 10 and 10 < out.active_indices.numel() < 3 * 2 * 64
    assert float(spikes((3, 3), 1.0, 0).sum()) == 9
