"""Every op through the dispatcher against its plain-PyTorch twin, forward and backward apart.

With the kernels built this holds them to their specification; without, it still checks schemas, fakes and autograd.
Ranges of indices are the constructor's duty (`EventTensor`): release kernels trust them, debug builds check them.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
from typing import Any, NamedTuple

import pytest
import torch
from helpers import INF, RESETS, dyadic, fast_sigmoid, generator, masked, normal, spikes, threads
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_backend import _native, policy
from sparse_backend.dynamics import RESETS as CODES
from sparse_backend.ops import event_linear as event_linear_ops
from sparse_backend.ops import events as event_ops
from sparse_backend.ops import hub as hub_ops
from sparse_backend.ops import leaky as leaky_ops
from sparse_backend.ops import leaky_dense as leaky_dense_ops
from sparse_backend.ops import linear_leaky as linear_leaky_ops
from sparse_backend.ops.leaky import LeakyOutput
from sparse_backend.reference import events as event_twins
from sparse_backend.reference import leaky as leaky_twins
from sparse_backend.reference import linear_leaky as linear_leaky_twins

pytestmark = pytest.mark.kernels

F32, F64 = torch.float32, torch.float64
DTYPES = st.sampled_from([F32, F64])
STEPS = st.sampled_from([1, 2, 3, 7])
BATCH = st.sampled_from([0, 1, 2, 3, 5])
WIDTHS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 97, 128, 130, 257, 300]
WIDTH = st.sampled_from(WIDTHS)
DENSITY = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])
SEED = st.integers(0, 10_000)
B_TH = st.sampled_from([1e-6, 0.1, 0.5, 3.0, INF])
RESET = st.sampled_from(RESETS)
RULES = (linear_leaky_ops.BY_COUNTS, linear_leaky_ops.OVER_SPIKES, linear_leaky_ops.OVER_ACTIVE)
RULE = st.sampled_from(RULES)
LAYOUT = st.sampled_from(["rows", "transposed", "padded", "strided"])


@pytest.fixture(autouse=True, scope="module")
def kernels():
    """Kernels loaded, and every uninitialised buffer full of NaN, so that an unwritten element shows: on the emulated
    device, and in the kernels of `make asan`."""
    _native.load()
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


# Drawing.


class Events(NamedTuple):
    """CSR parts of a dense [R, M], perhaps a slice of something larger."""

    dense: Tensor
    row_ptr: Tensor
    indices: Tensor
    values: Tensor | None


def make_events(
    rows: int, columns: int, density: float, seed: int, dtype: torch.dtype, graded: bool = False, sliced: bool = False
) -> Events:
    extra = 2 if sliced else 0
    dense = spikes((rows + 2 * extra, columns), density, seed, dtype, graded)
    row_ptr, indices = event_twins.compress(dense != 0)
    values = event_twins.gather(dense, row_ptr, indices) if graded else None
    return Events(dense[extra : rows + extra], row_ptr[extra : rows + extra + 1], indices, values)


def make_active(rows: int, columns: int, density: float, seed: int) -> tuple[Tensor, Tensor]:
    return event_twins.compress(spikes((rows, columns), density, seed) != 0)


def lay_out(matrix: Tensor, layout: str) -> Tensor:
    """The same [N, M] numbers with other strides."""
    neurons, inputs = matrix.shape
    if layout == "transposed":
        return matrix.t().contiguous().t()
    if layout == "padded":  # how a transposed copy is kept: rows of [M, Npad] start on whole vectors
        room = matrix.new_full((inputs, -(-neurons // 16) * 16), math.nan)
        room[:, :neurons] = matrix.t()
        return room[:, :neurons].t()
    if layout == "strided":
        room = matrix.new_full((2 * neurons + 1, 3 * inputs + 1), math.nan)
        room[1::2, 1::3] = matrix
        return room[1::2, 1::3]
    return matrix.contiguous()


def numbers(shape: Any, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Dyadic in float32, so that sums are exact and no spike hangs on rounding; anything in float64."""
    return dyadic(shape, seed, F32) if dtype == F32 else normal(shape, seed, scale=scale)


def parameter(kind: str, per_neuron: bool, neurons: int, seed: int, dtype: torch.dtype) -> Tensor:
    shape = (neurons,) if per_neuron else ()
    if dtype == F32:
        choices = torch.tensor([0.5, 0.0, 1.0, 0.25] if kind == "beta" else [1.0, 0.5, 0.75, 0.125])
        return choices[torch.randint(0, 4, shape, generator=generator(seed))]
    low = 0.3 if kind == "beta" else 0.5
    return low + 0.69 * torch.rand(shape, generator=generator(seed), dtype=F64)


class Neuron(NamedTuple):
    beta: Tensor
    threshold: Tensor
    mem: Tensor | None
    options: tuple[Any, ...]  # from `reset` on


@st.composite
def neurons_of(draw: Any, steps: int, batch: int, neurons: int, dtype: torch.dtype, max_active: bool = True) -> Neuron:
    seed = draw(SEED)
    mem = numbers((batch, neurons), seed + 2, dtype) if draw(st.booleans()) else None
    if mem is not None and draw(st.booleans()):
        mem = mem.t().contiguous().t()
    return Neuron(
        parameter("beta", draw(st.booleans()), neurons, seed, dtype),
        parameter("threshold", draw(st.booleans()), neurons, seed + 1, dtype),
        mem,
        (
            CODES[draw(RESET)],
            draw(st.booleans()),
            draw(B_TH),
            draw(st.booleans()),  # cover_spikes
            draw(st.booleans()),  # keep_mem
            draw(st.booleans()),  # keep_reset
            draw(st.booleans()),  # keep_p
            draw(st.sampled_from([1.0, 1.0, 0.1, 0.0])) if max_active else 1.0,
        ),
    )


# Comparing.


def equal(ours: Any, twin: Any, name: str = "", exact: bool = False) -> None:
    """Integers equal; floats equal to rounding, or exactly."""
    if isinstance(twin, (tuple, list)):
        assert len(ours) == len(twin)
        names = LeakyOutput._fields if len(twin) == len(LeakyOutput._fields) else range(len(twin))
        for one, other, part in zip(ours, twin, names, strict=True):
            equal(one, other, f"{name} {part}", exact)
        return
    assert ours.shape == twin.shape, f"{name}: shape {list(ours.shape)}, the twin's {list(twin.shape)}"
    assert ours.dtype == twin.dtype, f"{name}: {ours.dtype}, the twin's {twin.dtype}"
    if not twin.numel():
        return
    rtol = 0.0 if exact or not twin.is_floating_point() else 2e-5 if twin.dtype == F32 else 1e-10
    finite = twin[twin.isfinite()] if twin.is_floating_point() else twin
    atol = rtol * max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    torch.testing.assert_close(ours, twin, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}")


def overflowed(out: tuple[Tensor, ...]) -> bool:
    return LeakyOutput(*out).active_ptr.numel() == 0


def away_from_edges(current: Tensor, neuron: Neuron) -> None:
    """Reject draws where rounding decides whether something spikes or is active; dyadic ones are exact."""
    if current.dtype == F32 or not current.numel():
        return
    reset, reset_delay, b_th = neuron.options[:3]
    args = (current, neuron.beta, neuron.threshold, neuron.mem, None, reset, reset_delay, INF, False)
    x = leaky_twins.leaky_dense(*args)[0].abs()
    assume(float(x.min()) > 1e-9 and (math.isinf(b_th) or float((x - b_th).abs().min()) > 1e-9))


def compare_forward(ours: tuple[Tensor, ...], twin: tuple[Tensor, ...], dtype: torch.dtype) -> LeakyOutput:
    assert overflowed(ours) == overflowed(twin), "one of the two ran over max_active"
    if not overflowed(twin):
        equal(ours, twin, "forward", exact=dtype == F32)
    return LeakyOutput(*ours)


def backward_inputs(
    draw: Any, out: LeakyOutput, neuron: Neuron, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[list[Tensor | None], tuple[Tensor | None, ...], tuple[bool, bool, bool], tuple[int, bool]]:
    """Gradients arriving (some absent, some expanded), what is saved, and what is needed."""
    seed = draw(SEED)
    reset, reset_delay, *_, keep_mem, keep_reset, keep_p, _ = neuron.options
    steps, batch, neurons = shape
    double_reset = not reset_delay and reset != CODES["none"]
    grad_x = numbers(out.x.shape, seed, dtype) if draw(st.booleans()) else None
    grad_last = numbers((batch, neurons), seed + 1, dtype) if draw(st.booleans()) else None
    if grad_last is not None and draw(st.booleans()):
        grad_last = torch.full((), 0.5, dtype=dtype).expand(batch, neurons)  # what mem.sum().backward() sends
    grad_seq = numbers(shape, seed + 2, dtype) if keep_mem and draw(st.booleans()) else None
    if grad_seq is not None and draw(st.booleans()):
        grad_seq = grad_seq.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    g = None
    if double_reset:
        g = numbers(out.x.shape, seed + 3, dtype).abs()
    need_threshold = draw(st.booleans()) and (keep_reset or reset != CODES["subtract"])
    can_beta = keep_mem or steps == 1 or (keep_p and not double_reset and grad_seq is None)
    need_beta = draw(st.booleans()) and can_beta
    if (reset == CODES["zero"] or double_reset) and not keep_reset:
        assume(False)
    saved = leaky_ops.saved_for_backward(
        out, neuron.beta, neuron.threshold, neuron.mem, g, reset, reset_delay, need_beta, need_threshold
    )
    if need_beta and keep_p and (double_reset or grad_seq is not None):
        assume(False)  # p is not asked for then
    return [grad_x, grad_last, grad_seq], saved, (draw(st.booleans()), need_beta, need_threshold), (reset, reset_delay)


# Events and dense.


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 3, 16, 33]),
    columns=WIDTH,
    density=DENSITY,
    dtype=st.sampled_from([F32, F64, torch.bool, torch.uint8]),
    graded=st.booleans(),
    max_density=st.sampled_from([1.0, 1.0, 0.3, 0.05, 0.0]),
    strided=st.booleans(),
    seed=SEED,
)
def test_events_from_dense(rows, columns, density, dtype, graded, max_density, strided, seed):
    dense = (spikes((rows, columns), density, seed, F64, graded).abs() * (2 if graded else 1)).to(dtype)
    if strided:
        dense = torch.stack([dense, dense], -1)[..., 0]
    ours = event_ops.events_from_dense(dense, max_density)
    equal(ours, event_twins.events_from_dense(dense, max_density), exact=True)


def test_events_from_dense_of_more_rows_than_a_task():
    for columns, density in ((784, 0.02), (3, 0.5), (1, 1.0)):
        dense = spikes((3001, columns), density, 1, F32)
        equal(event_ops.events_from_dense(dense, 1.0), event_twins.events_from_dense(dense, 1.0), exact=True)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.sampled_from([0, 1, 3, 16, 33]),
    columns=WIDTH,
    density=DENSITY,
    active=DENSITY,
    dtype=DTYPES,
    graded=st.booleans(),
    sliced=st.booleans(),
    seed=SEED,
)
def test_events_to_dense_and_its_gradient(rows, columns, density, active, dtype, graded, sliced, seed):
    x = make_events(rows, columns, density, seed, dtype, graded, sliced)
    ptr, where = make_active(rows, columns, active, seed + 1)
    handle = torch.zeros(where.shape, dtype=dtype).requires_grad_()
    dense = event_ops.events_to_dense(handle, x.row_ptr, x.indices, x.values, ptr, where, columns)
    equal(dense, x.dense, exact=True)
    grad = numbers((columns, rows), seed + 2, dtype).t()
    dense.backward(grad)
    equal(handle.grad, event_twins.events_gather(grad, ptr, where), exact=True)
    gathered = event_ops.events_gather(grad.contiguous(), ptr, where)
    equal(gathered, event_twins.events_gather(grad, ptr, where), exact=True)


def test_an_expanded_gradient_reaches_the_handle():
    x = make_events(4, 9, 0.3, 0, F64)
    ptr, where = make_active(4, 9, 0.5, 1)
    handle = torch.zeros(where.shape, dtype=F64).requires_grad_()
    event_ops.events_to_dense(handle, x.row_ptr, x.indices, None, ptr, where, 9).sum().backward()
    assert torch.equal(handle.grad, torch.ones_like(handle))


# Leaky over dense currents.


@settings(deadline=None, max_examples=150)
@given(data=st.data(), steps=STEPS, batch=BATCH, neurons=WIDTH, dtype=DTYPES, seed=SEED)
def test_leaky_against_its_twin(data, steps, batch, neurons, dtype, seed):
    shape = (steps, batch, neurons)
    current = numbers(shape, seed, dtype, data.draw(st.sampled_from([0.3, 1.0])))
    neuron = data.draw(neurons_of(*shape, dtype))
    away_from_edges(current, neuron)
    args = (current, neuron.beta, neuron.threshold, neuron.mem, None, *neuron.options)
    out = compare_forward(leaky_ops.leaky(*args), leaky_twins.leaky(*args), dtype)
    if overflowed(out):
        return
    grads, saved, needs, reset = backward_inputs(data.draw, out, neuron, shape, dtype)
    args = (*grads, *saved, *shape, *reset, *needs)
    equal(leaky_ops.leaky_backward(*args), leaky_twins.leaky_backward(*args), "backward")


@settings(deadline=None, max_examples=80)
@given(
    data=st.data(), steps=STEPS, batch=BATCH, neurons=WIDTH, dtype=DTYPES, seed=SEED,
    reset=RESET, reset_delay=st.booleans(), with_mem=st.booleans(), vectors=st.booleans(),
    b_th=st.sampled_from([INF, 0.7]), keep_mem=st.booleans(),
)  # fmt: skip
def test_leaky_dense_against_its_twin(
    data, steps, batch, neurons, dtype, seed, reset, reset_delay, with_mem, vectors, b_th, keep_mem
):
    shape = (steps, batch, neurons)
    reset_delay = reset_delay or reset == "none"  # as the caller has it
    current = numbers(shape, seed, dtype)
    beta = parameter("beta", vectors, neurons, seed + 1, dtype)
    threshold = parameter("threshold", not vectors, neurons, seed + 2, dtype)
    mem = numbers((batch, neurons), seed + 3, dtype) if with_mem else None
    options = (CODES[reset], reset_delay, b_th)
    away_from_edges(current, Neuron(beta, threshold, mem, options))
    keep_mem = keep_mem or not reset_delay
    args = (current, beta, threshold, mem, None, *options, keep_mem)
    ours, twin = leaky_dense_ops.leaky_dense(*args), leaky_twins.leaky_dense(*args)
    equal(ours, twin, "forward", exact=dtype == F32)
    x, _, mem_seq = twin

    draw = data.draw
    grad_x = numbers(shape, seed + 4, dtype) if draw(st.booleans()) else None
    grad_last = numbers((batch, neurons), seed + 5, dtype) if draw(st.booleans()) else None
    grad_seq = numbers(shape, seed + 6, dtype) if keep_mem and draw(st.booleans()) else None
    needs = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    double_reset = not reset_delay
    g = numbers(shape, seed + 7, dtype).abs() if double_reset else None
    need_x = reset == "zero" or double_reset or needs[1] or (needs[2] and reset == "subtract")
    args = (
        grad_x, grad_last, grad_seq, x if need_x or b_th != INF else None, g,
        mem_seq if need_x and double_reset else None,
        mem if need_x else None, beta, threshold, *shape, *options, *needs,
    )  # fmt: skip
    equal(leaky_dense_ops.leaky_dense_backward(*args), leaky_twins.leaky_dense_backward(*args), "backward")


# Linear on events.


@settings(deadline=None, max_examples=100)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 24]), inputs=WIDTH, neurons=WIDTH, density=DENSITY, active=DENSITY, dtype=DTYPES,
    graded=st.booleans(), sliced=st.booleans(), bias=st.booleans(), layout=LAYOUT, need_input=st.integers(0, 2),
    need=st.tuples(st.booleans(), st.booleans()), seed=SEED,
)  # fmt: skip
@example(
    rows=24, inputs=300, neurons=300, density=1.0, active=1.0, dtype=F64, graded=True, sliced=True, bias=True,
    layout="padded", need_input=1, need=(True, True), seed=0,
)  # fmt: skip
def test_event_linear_against_its_twin(
    rows, inputs, neurons, density, active, dtype, graded, sliced, bias, layout, need_input, need, seed
):
    x = make_events(rows, inputs, density, seed, dtype, graded, sliced)
    weight = lay_out(numbers((neurons, inputs), seed + 1, dtype), layout)
    b = numbers((neurons,), seed + 2, dtype) if bias else None
    ptr, where = make_active(rows, inputs, active, seed + 3)
    ours = event_linear_ops.event_linear(x.row_ptr, x.indices, x.values, None, None, None, weight, b, None, 0)
    equal(ours, linear_leaky_twins.event_linear(x.row_ptr, x.indices, x.values, weight, b), exact=dtype == F32)

    delta = numbers((rows, neurons), seed + 4, dtype) * spikes((rows, neurons), active, seed + 5, dtype)
    compact = (ptr, where) if need_input == 1 else (None, None)
    args = (delta, x.row_ptr, x.indices, x.values, *compact, weight, need_input, *need)
    equal(event_linear_ops.event_linear_backward(*args), linear_leaky_twins.event_linear_backward(*args), "backward")


@settings(deadline=None, max_examples=40)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 24]), inputs=WIDTH, neurons=WIDTH, density=DENSITY, dtype=DTYPES,
    graded=st.booleans(), sliced=st.booleans(), seed=SEED,
)  # fmt: skip
def test_outer_accumulate_against_its_twin(rows, inputs, neurons, density, dtype, graded, sliced, seed):
    x = make_events(rows, inputs, density, seed, dtype, graded, sliced)
    delta = numbers((rows, neurons), seed + 1, dtype)
    width = hub_ops.padded(neurons)
    ours = numbers((inputs, width), seed + 2, dtype), numbers((width,), seed + 3, dtype)
    twin = tuple(tensor.clone() for tensor in ours)
    for _ in range(2):  # it adds
        hub_ops.outer_accumulate(*ours, delta, x.row_ptr, x.indices, x.values)
        hub_ops._accumulate_reference(*twin, delta, x.row_ptr, x.indices, x.values)
    equal([tensor[..., :neurons] for tensor in ours], [tensor[..., :neurons] for tensor in twin])


# Linear + leaky.


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(), steps=STEPS, batch=BATCH, inputs=WIDTH, neurons=WIDTH, density=DENSITY, dtype=DTYPES,
    graded=st.booleans(), sliced=st.booleans(), bias=st.booleans(), layout=LAYOUT, seed=SEED,
)  # fmt: skip
def test_linear_leaky_against_its_twin(
    data, steps, batch, inputs, neurons, density, dtype, graded, sliced, bias, layout, seed
):
    draw = data.draw
    rows = steps * batch
    x = make_events(rows, inputs, density, seed, dtype, graded, sliced)
    scale = 0.5 if dtype == F32 else (1.0 + inputs * density) ** -0.5
    weight = lay_out(numbers((neurons, inputs), seed + 1, dtype, scale), layout)
    b = numbers((neurons,), seed + 2, dtype, 0.3) if bias else None
    neuron = draw(neurons_of(steps, batch, neurons, dtype))
    current = linear_leaky_twins.event_linear(x.row_ptr, x.indices, x.values, weight, b)
    away_from_edges(current.view(steps, batch, neurons), neuron)
    input_kind = draw(st.integers(0, 2))
    ptr, where = make_active(rows, inputs, draw(DENSITY), seed + 3)
    handle = None
    if input_kind:
        handle = torch.zeros(where.shape if input_kind == 1 else (steps, batch, inputs), dtype=dtype)
    compact = (ptr, where) if input_kind == 1 else (None, None)
    args = (
        x.row_ptr, x.indices, x.values, handle, *compact, weight, b, neuron.beta, neuron.threshold, neuron.mem, None,
        None, 0, steps, batch, *neuron.options,
    )  # fmt: skip
    out = compare_forward(linear_leaky_ops.linear_leaky(*args), linear_leaky_twins.linear_leaky(*args), dtype)
    if overflowed(out):
        return
    grads, saved, needs, reset = backward_inputs(draw, out, neuron, (steps, batch, neurons), dtype)
    need_weight, need_bias = draw(st.booleans()), draw(st.booleans())
    args = (
        *grads, x.row_ptr, x.indices, x.values, *compact, weight, *saved, steps, batch, *reset, draw(RULE), input_kind,
        need_weight, need_bias, *needs,
    )  # fmt: skip
    equal(linear_leaky_ops.linear_leaky_backward(*args), linear_leaky_twins.linear_leaky_backward(*args), "backward")


#: samples enough for several of the kernels' groups, in steps enough for the weight's sums to be in shares of them
MANY_SAMPLES = {
    "data": st.data(), "steps": st.sampled_from([5, 12]), "batch": st.sampled_from([17, 40]),
    "inputs": st.integers(1, 20), "neurons": st.sampled_from([1, 7, 16, 33]), "density": DENSITY, "dtype": DTYPES,
    "graded": st.booleans(), "sliced": st.booleans(), "bias": st.booleans(), "layout": LAYOUT, "seed": SEED,
}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(**MANY_SAMPLES)
def test_linear_leaky_of_many_samples(**case):
    test_linear_leaky_against_its_twin.hypothesis.inner_test(**case)


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded", "strided"])
@pytest.mark.parametrize("neurons", [0, 1, 15, 16])
def test_a_layer_without_inputs_gets_its_bias(layout, neurons):
    """A weight without entries has no address: that is no reason to look for the currents elsewhere."""
    x = make_events(6, 0, 0.0, 0, F64)
    weight, bias = lay_out(torch.zeros(neurons, 0, dtype=F64), layout), normal((neurons,), 1)
    neuron = (torch.tensor(0.9, dtype=F64), torch.tensor(0.5, dtype=F64), None, None)
    args = (x.row_ptr, x.indices, None, None, None, None, weight, bias, *neuron, None, 0, 3, 2, *options(mem=True))
    compare_forward(linear_leaky_ops.linear_leaky(*args), linear_leaky_twins.linear_leaky(*args), F64)
    ours = event_linear_ops.event_linear(x.row_ptr, x.indices, None, None, None, None, weight, bias, None, 0)
    equal(ours, bias.expand(6, neurons).contiguous())


@pytest.mark.parametrize("neurons", [1, 5, 16, 33, 200, 300, 1000])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_whole_layer_of_usual_size(neurons, dtype):
    """More rows than one block of steps, more columns than one block of neurons, more samples than shares of them;
    sparse and exact."""
    steps, batch, inputs = 40, 20, 100
    x = make_events(steps * batch, inputs, 0.05, 1, dtype)
    weight = dyadic((neurons, inputs), 2, dtype)
    neuron = (torch.tensor(0.5, dtype=dtype), torch.tensor(1.0, dtype=dtype), None)
    for b_th in (0.05, 0.5):
        args = (
            x.row_ptr, x.indices, None, None, None, None, weight, None, *neuron, None, None, 0, steps, batch,
            CODES["subtract"], True, b_th, False, False, True, True, 1.0,
        )  # fmt: skip
        out, twin = LeakyOutput(*linear_leaky_ops.linear_leaky(*args)), linear_leaky_twins.linear_leaky(*args)
        # 40 halvings exceed float32's digits, so a tie may be decided either way there: few of them
        if dtype == F64:
            equal(out, twin, "forward")
            out_for_backward = out
        else:
            out_for_backward = LeakyOutput(*twin)
            equal(out.spike_ptr.double()[-1:], LeakyOutput(*twin).spike_ptr.double()[-1:] + 0, "spikes")
        grad = dyadic(out_for_backward.x.shape, 3, dtype)
        saved = leaky_ops.saved_for_backward(out_for_backward, *neuron, None, CODES["subtract"], True, True, True)
        args = (grad, None, None, x.row_ptr, x.indices, None, None, None, weight, *saved, steps, batch, 0, True)
        for rule in RULES:
            needs = (rule, 2, True, True, True, True, True)
            ours = linear_leaky_ops.linear_leaky_backward(*args, *needs)
            equal(ours, linear_leaky_twins.linear_leaky_backward(*args, *needs), f"backward, rule {rule}")


# Ties, infinities, NaN.


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("reset_delay", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("neurons", [1, 3, 19, 40])
def test_ties_do_not_spike_and_the_band_is_open(reset, reset_delay, dtype, neurons):
    """V == threshold is no spike, |V - threshold| == b_th is not active."""
    current = torch.tensor([1.0, 0.5, 1.5, 0.0, 2.0], dtype=dtype).view(5, 1, 1).expand(5, 2, neurons).contiguous()
    beta, threshold = torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    options = (CODES["none"], reset_delay, 0.5, False, True, True, True, 1.0)
    out = LeakyOutput(*leaky_ops.leaky(current, beta, threshold, None, None, *options))
    assert out.spike_ptr[::2].tolist() == [n * neurons for n in (0, 0, 0, 2, 2, 4)]
    assert out.active_ptr[::2].tolist() == [n * neurons for n in (0, 2, 2, 2, 2, 2)]
    assert torch.equal(out.x, torch.zeros(2 * neurons, dtype=dtype))

    args = (current, torch.tensor(0.5, dtype=dtype), threshold, None, None, CODES[reset], *options[1:])
    equal(leaky_ops.leaky(*args), leaky_twins.leaky(*args), exact=True)
    # the initial membrane at the threshold does not reset
    mem = threshold.expand(2, neurons)
    args = (current, torch.tensor(0.5, dtype=dtype), threshold, mem, None, CODES[reset], *options[1:])
    equal(leaky_ops.leaky(*args), leaky_twins.leaky(*args), exact=True)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF, 1e38])
@pytest.mark.parametrize("b_th", [0.5, INF])
def test_what_is_not_finite_in_the_current(reset, bad, b_th):
    current = dyadic((4, 2, 21), 1)
    current[1, 0, 3] = current[0, 1, 17] = bad
    neuron = (torch.tensor(0.5), torch.tensor(1.0), None, None)
    args = (current, *neuron, CODES[reset], True, b_th, False, True, True, True, 1.0)
    out = compare_forward(leaky_ops.leaky(*args), leaky_twins.leaky(*args), F32)
    grad = dyadic(out.x.shape, 2)
    saved = leaky_ops.saved_for_backward(out, *neuron, CODES[reset], True, True, True)
    args = (grad, None, None, *saved, 4, 2, 21, CODES[reset], True, True, True, True)
    equal(leaky_ops.leaky_backward(*args), leaky_twins.leaky_backward(*args), "backward")


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_what_is_not_finite_in_the_values_reaches_every_neuron(bad):
    x = make_events(6, 20, 0.3, 1, F32, graded=True)
    values = x.values.clone()
    values[3] = bad
    weight = dyadic((18, 20), 2).abs() + 0.125
    args = (
        x.row_ptr, x.indices, values, None, None, None, weight, None, torch.tensor(0.5), torch.tensor(1.0), None, None,
        None, 0, 3, 2, CODES["subtract"], True, 0.5, False, True, True, True, 1.0,
    )  # fmt: skip
    out = compare_forward(linear_leaky_ops.linear_leaky(*args), linear_leaky_twins.linear_leaky(*args), F32)
    assert not bool(out.mem_seq.isfinite().all(-1).all())


@pytest.mark.parametrize("max_active", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("op", ["leaky", "linear_leaky"])
def test_too_many_active_entries_keep_nothing(op, max_active):
    """Half of all entries are active: above max_active nothing is kept and active_ptr says so by being empty."""
    current = torch.tensor([1.0, 5.0]).repeat(3, 2, 20)
    options = (CODES["none"], True, 0.5, False, True, True, True)
    neuron = (torch.tensor(0.0), torch.tensor(1.0), None, None)
    x = make_events(6, 4, 1.0, 0, F32)
    weight = torch.tensor([0.25, 2.0]).repeat(20).view(40, 1).expand(40, 4).contiguous()

    def run(limit):
        if op == "leaky":
            return LeakyOutput(*leaky_ops.leaky(current, *neuron, *options, limit))
        return LeakyOutput(*linear_leaky_ops.linear_leaky(
            x.row_ptr, x.indices, None, None, None, None, weight, None, *neuron, None, 0, 3, 2, *options, limit
        ))  # fmt: skip

    out = run(max_active)
    assert out.active_ptr.numel() == 0
    assert out.x.numel() == 0 and out.active_indices.numel() == 0
    for limit in (0.5, 0.7, 1.0):
        assert run(limit).active_ptr.numel() == 7


def test_no_active_entry_is_not_too_many():
    neuron = (torch.tensor(0.5), torch.tensor(1.0), None, None)
    out = LeakyOutput(*leaky_ops.leaky(torch.zeros(3, 2, 4), *neuron, *options(b_th=0.1, limit=0.0)))
    assert out.active_ptr.tolist() == [0] * 7


# Strides.


def test_strided_arguments():
    """All floats as views of something larger; events come contiguous."""
    current, mem = normal((5, 3, 18), 1), normal((3, 18), 2)
    beta, threshold = parameter("beta", True, 18, 3, F64), parameter("threshold", True, 18, 4, F64)
    options = (CODES["zero"], False, 0.5, True, True, True, False, 1.0)
    args = (spread(current), spread(beta), spread(threshold), spread(mem), None, *options)
    out = compare_forward(leaky_ops.leaky(*args), leaky_twins.leaky(current, beta, threshold, mem, None, *options), F64)
    g, grads = normal(out.x.shape, 5), (normal(out.x.shape, 6), normal((3, 18), 7), normal((5, 3, 18), 8))
    saved = leaky_ops.saved_for_backward(out, beta, threshold, mem, g, CODES["zero"], False, True, True)
    rest = (5, 3, 18, CODES["zero"], False, True, True, True)
    ours = leaky_ops.leaky_backward(*map(spread, grads), *spread_floats(saved), *rest)
    equal(ours, leaky_twins.leaky_backward(*grads, *saved, *rest), "backward")

    args = (beta, threshold, mem, None, CODES["zero"], False, 0.5, True)
    x, _, mem_seq = leaky_dense_ops.leaky_dense(current, *args)
    grads, saved = (normal((5, 3, 18), 6), *grads[1:]), (x, normal((5, 3, 18), 5), mem_seq, mem)
    rest = (5, 3, 18, CODES["zero"], False, 0.5, True, True, True)
    saved = (*saved, beta, threshold)
    ours = leaky_dense_ops.leaky_dense_backward(*map(spread, grads), *map(spread, saved), *rest)
    equal(ours, leaky_twins.leaky_dense_backward(*grads, *saved, *rest), "dense backward")

    x = make_events(15, 40, 0.2, 9, F64, graded=True)
    weight = normal((18, 40), 10, scale=0.3)
    neuron = (spread(normal((18,), 11)), spread(beta), spread(threshold), spread(mem))
    args = (None, None, None, lay_out(weight, "strided"), *neuron, None, None, 0, 5, 3)
    ours = linear_leaky_ops.linear_leaky(*x[1:], *args, *options)
    compare_forward(ours, linear_leaky_twins.linear_leaky(*x[1:], *args, *options), F64)
    one_for_all = normal((), 12).expand(18)
    ours = event_linear_ops.event_linear(*x[1:], None, None, None, weight, one_for_all, None, 0)
    torch.testing.assert_close(ours, torch.nn.functional.linear(x.dense, weight, one_for_all))


def spread(tensor: Tensor | None) -> Tensor | None:
    """The same numbers, two apart, with something else between them."""
    return None if tensor is None else torch.stack([tensor, tensor - 1], -1)[..., 0]


def spread_floats(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [spread(t) if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_a_second_reset_whose_surrogate_derivative_nobody_needs(reset):
    """g is None where a gradient arrives at the membrane alone: no jump is passed back, spikes or not."""
    neuron = parameter("beta", True, 18, 3, F64), parameter("threshold", True, 18, 4, F64)
    out = LeakyOutput(*leaky_ops.leaky(normal((5, 3, 18), 1), *neuron, None, None, *options(reset, False)))
    assert out.spike_indices.numel() and out.active_indices.numel()
    saved = leaky_ops.saved_for_backward(out, *neuron, None, None, CODES[reset], False, True, True)
    args = (None, normal((3, 18), 5), None, *saved, 5, 3, 18, CODES[reset], False, True, True, True)
    equal(leaky_ops.leaky_backward(*args), leaky_twins.leaky_backward(*args))


def before_a_guard(numbers: Tensor) -> Tensor:
    """The same entries, the last one at the end of a page after which nothing may be read."""
    page = mmap.PAGESIZE
    size = numbers.numel() * numbers.element_size()
    room = mmap.mmap(-1, (-(-size // page) + 1) * page)
    GUARDED.append(room)
    libc = ctypes.CDLL(None, use_errno=True)
    end = ctypes.addressof(ctypes.c_char.from_buffer(room)) + len(room) - page
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    guarded = torch.frombuffer(room, dtype=numbers.dtype, count=numbers.numel(), offset=len(room) - page - size)
    return guarded.copy_(numbers.reshape(-1))


GUARDED: list[mmap.mmap] = []  #: mapped for good


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_weight_whose_last_row_ends_with_its_storage(dtype):
    """Laid out as kernels want it but for the padding behind the last input's row, which is nobody's."""
    inputs, neurons = 9, 5
    storage = before_a_guard(dyadic(((inputs - 1) * 16 + neurons,), 1, dtype))
    weight = storage.as_strided((neurons, inputs), (1, 16))
    x = make_events(6, inputs, 1.0, 2, dtype)
    args = (*x[1:], None, None, None)
    ours = event_linear_ops.event_linear(*args, weight, None, None, 0)
    equal(ours, x.dense @ weight.t())
    rest = (x.row_ptr, x.indices, weight, 1, False, False)
    delta = dyadic((6, neurons), 3, dtype)
    ours = event_linear_ops.event_linear_backward(delta, *x[1:], *rest)[0]
    equal(ours, (delta @ weight).reshape(-1))


# Threads and races.


def big_layer(dtype: torch.dtype, reset: str, rule: int, steps: int = 25) -> tuple[Any, Any]:
    inputs, neurons, batch = 150, 130, 16
    x = make_events(steps * batch, inputs, 0.05, 1, dtype, graded=True)
    weight = normal((neurons, inputs), 2, dtype, 0.4)
    neuron = (torch.tensor(0.9, dtype=dtype), torch.tensor(1.0, dtype=dtype), normal((batch, neurons), 3, dtype))
    forward = (
        x.row_ptr, x.indices, x.values, None, None, None, weight, normal((neurons,), 4, dtype, 0.1), *neuron, None,
        None, 0, steps, batch, CODES[reset], True, 0.3, True, True, True, True, 1.0,
    )  # fmt: skip
    ptr, where = make_active(steps * batch, inputs, 0.1, 5)

    def backward(out: LeakyOutput) -> Any:
        kept = leaky_ops.saved_for_backward(out, *neuron, None, CODES[reset], True, True, True)
        grads = (normal(out.x.shape, 6, dtype), None if rule else normal((batch, neurons), 7, dtype), None)
        return linear_leaky_ops.linear_leaky_backward(
            *grads, x.row_ptr, x.indices, x.values, ptr, where, weight, *kept, steps, batch, CODES[reset], True,
            rule, 1, True, True, True, True, True,
        )  # fmt: skip

    return forward, backward


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("steps", [25, 50])  # from 38 steps on the weight's sums are in shares of the samples
@pytest.mark.parametrize(("reset", "rule"), [("zero", 0), ("subtract", 1), ("subtract", 2)])
def test_results_do_not_depend_on_threads_or_races(dtype, reset, rule, steps):
    forward, backward = big_layer(dtype, reset, rule, steps)
    results = []
    for count in (1, 2, 1, 2, 2):
        with threads(count):
            out = LeakyOutput(*linear_leaky_ops.linear_leaky(*forward))
            dense = leaky_dense_ops.leaky_dense(
                normal((25, 16, 130), 8, dtype), torch.tensor(0.9, dtype=dtype), torch.tensor(1.0, dtype=dtype), None,
                None, 0, True, INF, False,
            )  # fmt: skip
            x = event_ops.events_from_dense(spikes((400, 130), 0.1, 3, dtype), 1.0)
            width = hub_ops.padded(130)
            sums = torch.zeros(130, width, dtype=dtype), torch.zeros(width, dtype=dtype)
            delta = normal((400, 130), 9, dtype)
            hub_ops.outer_accumulate(*sums, delta, x[0], x[1], None)
            linear = event_linear_ops.event_linear_backward(
                delta, x[0], x[1], None, None, None, normal((130, 130), 10, dtype), 2, True, True
            )
            results.append((*out, *backward(out), *dense, *x, *sums, *linear))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two), "bit for bit"


# Autograd: what arrives from the graph goes where it should.


def options(reset="subtract", delay=True, b_th=0.5, cover=False, mem=False, keep_reset=True, p=True, limit=1.0):
    return CODES[reset], delay, b_th, cover, mem, keep_reset, p, limit


def layer_arguments(dtype=F64, handle="compact", steps=3, batch=2, grad=True, token=None, **rest):
    """Arguments of linear_leaky with everything that can require grad doing so."""
    inputs, neurons = 7, 6
    x = make_events(steps * batch, inputs, 0.4, 1, dtype)
    ptr, where = make_active(steps * batch, inputs, 0.3, 2) if handle == "compact" else (None, None)
    shape = {"compact": where.shape if where is not None else None, "dense": (steps, batch, inputs)}.get(handle)
    leaves = [
        None if shape is None else torch.zeros(shape, dtype=dtype),
        normal((neurons, inputs), 3, dtype), normal((neurons,), 4, dtype),
        torch.tensor(0.9, dtype=dtype), torch.full((neurons,), 0.7, dtype=dtype), normal((batch, neurons), 5, dtype),
    ]  # fmt: skip
    h, weight, bias, beta, threshold, mem = (
        None if leaf is None else leaf.requires_grad_(grad and leaf.is_floating_point()) for leaf in leaves
    )
    args = (
        x.row_ptr, x.indices, None, h, ptr, where, weight, bias, beta, threshold, mem, None, token, 0, steps, batch,
        *options(**rest),
    )  # fmt: skip
    return args, [leaf for leaf in leaves if leaf is not None]


OPCHECKS = {
    "leaky": lambda: (leaky_ops.leaky, leaky_arguments()),
    "leaky zero, all kept": lambda: (leaky_ops.leaky, leaky_arguments(reset="zero", mem=True)),
    "leaky none, inf": lambda: (leaky_ops.leaky, leaky_arguments(reset="none", b_th=INF, cover=True)),
    "leaky without parameters": lambda: (leaky_ops.leaky, leaky_arguments(grad=False, p=False, keep_reset=False)),
    "leaky float32": lambda: (leaky_ops.leaky, leaky_arguments(F32)),
    "linear_leaky compact": lambda: (linear_leaky_ops.linear_leaky, layer_arguments()[0]),
    "linear_leaky dense": lambda: (linear_leaky_ops.linear_leaky, layer_arguments(handle="dense", mem=True)[0]),
    "linear_leaky none": lambda: (linear_leaky_ops.linear_leaky, layer_arguments(handle="none", reset="zero")[0]),
    "linear_leaky step": lambda: (linear_leaky_ops.linear_leaky, layer_arguments(steps=1, p=False)[0]),
    "leaky_dense": lambda: (leaky_dense_ops.leaky_dense, dense_arguments()),
    "leaky_dense zero": lambda: (leaky_dense_ops.leaky_dense, dense_arguments("zero")),
    "event_linear": lambda: (event_linear_ops.event_linear, (*layer_arguments()[0][:8], None, 0)),
    "event_linear dense": lambda: (event_linear_ops.event_linear, (*layer_arguments(handle="dense")[0][:8], None, 0)),
    "events_to_dense": lambda: (event_ops.events_to_dense, to_dense_arguments()),
    "events_from_dense": lambda: (event_ops.events_from_dense, (spikes((3, 2, 5), 0.4, 0), 1.0)),
    "events_gather": lambda: (event_ops.events_gather, (normal((6, 7), 0), *make_active(6, 7, 0.4, 1))),
    "outer_accumulate": lambda: (
        hub_ops.outer_accumulate,
        (normal((7, 16), 0), normal((16,), 1), normal((6, 6), 2), *make_active(6, 7, 0.4, 1), None),
    ),
}


def leaky_arguments(dtype=F64, grad=True, **rest):
    tensors = (normal((3, 2, 6), 1, dtype), torch.tensor(0.9, dtype=dtype), torch.full((6,), 0.7, dtype=dtype))
    current, beta, threshold = (tensor.requires_grad_() for tensor in tensors)
    if not grad:
        beta, threshold = beta.detach(), threshold.detach()
    return current, beta, threshold, normal((2, 6), 2, dtype).requires_grad_(grad), None, *options(**rest)


def dense_arguments(reset="subtract"):
    current, beta, threshold, mem, *_ = leaky_arguments()
    return current, beta, threshold, mem, None, CODES[reset], True, 0.7, True


def to_dense_arguments():
    x = make_events(6, 7, 0.4, 1, F64)
    ptr, where = make_active(6, 7, 0.3, 2)
    return torch.zeros(where.shape, dtype=F64).requires_grad_(), x.row_ptr, x.indices, None, ptr, where, 7


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op, args = OPCHECKS[name]()
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("handle", ["compact", "dense", "none"])
def test_linear_leaky_is_event_linear_then_leaky(handle, reset, steps):
    """The fused op's gradients are those of its two parts."""

    def losses(fused):
        args, leaves = layer_arguments(handle=handle, steps=steps, reset=reset, mem=True, p=False)
        if fused:
            out = LeakyOutput(*linear_leaky_ops.linear_leaky(*args))
        else:
            current = event_linear_ops.event_linear(*args[:8], None, 0).view(steps, 2, 6)
            out = LeakyOutput(*leaky_ops.leaky(current, *args[8:12], *args[16:]))
        loss = (out.x**2).sum() + (out.mem_last**2).sum() + (out.mem_seq * normal((steps, 2, 6), 9)).sum()
        loss.backward()
        return [leaf.grad for leaf in leaves]

    for one, two in zip(losses(True), losses(False), strict=True):
        equal(one, two)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("b_th", [1e-6, 0.2, INF])
@pytest.mark.parametrize("mem_gradient", [False, True])
def test_both_formulas_of_the_weight_gradient_agree(reset, b_th, mem_gradient):
    """One row operation per input spike, or per active entry: the same sum, through autograd."""

    def gradients():
        args, leaves = layer_arguments(handle="dense", reset=reset, b_th=b_th, steps=9, batch=3)
        out = LeakyOutput(*linear_leaky_ops.linear_leaky(*args))
        loss = (out.x**2).sum() + ((out.mem_last**2).sum() if mem_gradient else 0)
        return torch.autograd.grad(loss, leaves)

    results = []
    for rule in policy.WEIGHT_RULES:
        policy.set_weight_rule(rule)
        try:
            results.append(gradients())
        finally:
            policy.set_weight_rule("by counts")
    equal(results[1], results[0])
    equal(results[2], results[0])


def test_absent_gradients_stay_absent():
    args, leaves = layer_arguments(handle="dense")
    out = LeakyOutput(*linear_leaky_ops.linear_leaky(*args))
    assert out.x.requires_grad and out.mem_last.requires_grad
    for part in out[2:]:
        assert not part.requires_grad
    (out.x.sum() * 0 + out.mem_last.sum()).backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_scalar_parameters_get_scalar_gradients():
    for beta in (torch.tensor(0.9, dtype=F64), torch.full((1,), 0.9, dtype=F64), torch.full((6,), 0.9, dtype=F64)):
        current, _, threshold, mem, *rest = leaky_arguments()
        beta.requires_grad_()
        leaky_ops.leaky(current, beta, threshold, mem, *rest)[1].sum().backward()
        assert beta.grad.shape == beta.shape
        assert threshold.grad.shape == threshold.shape


def test_double_backward_is_a_clear_error():
    args, leaves = layer_arguments()
    out = LeakyOutput(*linear_leaky_ops.linear_leaky(*args))
    (grad,) = torch.autograd.grad((out.x**2).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double backward|second derivative"):
        grad.sum().backward()


def test_backward_twice_is_torchs_own_error():
    args, _ = layer_arguments()
    loss = LeakyOutput(*linear_leaky_ops.linear_leaky(*args)).mem_last.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_edited_weight_is_torchs_own_error():
    args, leaves = layer_arguments()
    loss = LeakyOutput(*linear_leaky_ops.linear_leaky(*args)).mem_last.sum()
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The hub.


def hub_steps(weight, bias, xs, hub=True, handles=None):
    """Three steps of one layer, its weight's gradient through a hub or not."""
    id = hub_ops.new_id()
    token = hub_ops.hub(weight, bias, id) if hub else None
    w, b = (weight.detach(), bias.detach()) if hub else (weight, bias)
    mem = torch.zeros(2, weight.shape[0], dtype=F64)
    loss = 0
    for t, x in enumerate(xs):
        handle = None if handles is None else handles[t]
        out = LeakyOutput(*linear_leaky_ops.linear_leaky(
            x.row_ptr, x.indices, x.values, handle, None, None, w, b, torch.tensor(0.9, dtype=F64),
            torch.tensor(0.7, dtype=F64), mem, None, token, id, 1, 2, *options(p=False),
        ))  # fmt: skip
        mem = out.mem_last
        loss = loss + (fast_sigmoid(5.0)(out.x) * (t + 1)).sum()
    current = event_linear_ops.event_linear(*xs[0][1:], None, None, None, w, b, token, id)
    return loss + (mem**2).sum() + (current**2).sum()


def hub_case():
    weight, bias = normal((6, 7), 3).requires_grad_(), normal((6,), 4).requires_grad_()
    return weight, bias, [make_events(2, 7, 0.4, t, F64, graded=True) for t in range(3)]


def test_the_hub_gathers_the_same_gradient():
    weight, bias, xs = hub_case()
    expected = torch.autograd.grad(hub_steps(weight, bias, xs, hub=False), (weight, bias))
    got = torch.autograd.grad(hub_steps(weight, bias, xs), (weight, bias))
    equal(got, expected)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_the_hub_with_one_of_the_two_frozen(frozen):
    weight, bias, xs = hub_case()
    expected = torch.autograd.grad(hub_steps(weight, bias, xs, hub=False), (weight, bias))
    (weight if frozen == "weight" else bias).requires_grad_(False)
    hub_steps(weight, bias, xs).backward()
    if frozen == "weight":
        assert weight.grad is None
        equal(bias.grad, expected[1])
    else:
        assert bias.grad is None
        equal(weight.grad, expected[0])


def test_a_retained_graph_gives_the_same_gradient_again():
    weight, bias, xs = hub_case()
    loss = hub_steps(weight, bias, xs)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    equal(weight.grad, 2 * first)


def test_two_hubs_in_one_backward_do_not_mix():
    weight, bias, xs = hub_case()
    other, other_bias, _ = hub_case()
    with torch.no_grad():
        other.mul_(-0.5)
    expected = [
        *torch.autograd.grad(hub_steps(weight, bias, xs, hub=False), (weight, bias)),
        *torch.autograd.grad(hub_steps(other, other_bias, xs, hub=False), (other, other_bias)),
    ]
    loss = hub_steps(weight, bias, xs) + hub_steps(other, other_bias, xs)
    equal(torch.autograd.grad(loss, (weight, bias, other, other_bias)), expected)


def test_a_backward_that_never_reaches_the_hub_leaves_nothing_behind():
    weight, bias, xs = hub_case()
    handles = [x.dense.clone().requires_grad_() for x in xs]
    loss = hub_steps(weight, bias, xs, handles=handles)
    grads = torch.autograd.grad(loss, handles, retain_graph=True)
    expected = torch.autograd.grad(hub_steps(weight, bias, xs, hub=False, handles=handles), handles)
    equal(grads, expected)
    gatherers = list(hub_ops._gatherers.values())
    assert gatherers and not any(gatherer.sums for gatherer in gatherers)
    (got,) = torch.autograd.grad(loss, weight)  # and the next pass is not disturbed
    (plain,) = torch.autograd.grad(hub_steps(weight, bias, xs, hub=False, handles=handles), weight)
    equal(got, plain)


def test_a_backward_that_raises_leaves_nothing_behind():
    weight, bias, xs = hub_case()
    loss = hub_steps(weight, bias, xs)
    first = torch.zeros((), dtype=F64, requires_grad=True)
    first.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (loss + loss.detach() * first).backward(retain_graph=True)
    weight.grad = bias.grad = None
    loss.backward()
    expected = torch.autograd.grad(hub_steps(weight, bias, xs, hub=False), weight)[0]
    equal(weight.grad, expected)


def test_hubs_leave_nothing_behind_as_training_goes_on():
    weight, bias, xs = hub_case()
    for backward in (True, False):
        counts = []
        for _ in range(6):
            loss = hub_steps(weight, bias, xs)
            if backward:
                loss.backward()
            del loss
            gc.collect()
            counts.append(len(hub_ops._gatherers))
        assert counts[0] == counts[-1], "something is kept for every forward pass"


def test_a_weight_edited_between_forward_and_backward_is_an_error_where_it_is_needed():
    weight, bias, xs = hub_case()
    handles = [x.dense.clone().requires_grad_() for x in xs]
    loss = hub_steps(weight, bias, xs, handles=handles)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# torch.compile.


def test_fullgraph_compile_of_the_step_form():
    sg = masked(plain_surrogate, 0.5)

    def step(row_ptr, indices, weight, bias, beta, threshold, mem, second_mem):
        out = LeakyOutput(*linear_leaky_ops.linear_leaky(
            row_ptr, indices, None, None, None, None, weight, bias, beta, threshold, mem, None, None, 0, 1, 2,
            *options(p=False),
        ))  # fmt: skip
        spk = event_ops.events_to_dense(
            sg(out.x), out.spike_ptr, out.spike_indices, None, out.active_ptr, out.active_indices, 6
        )
        second = LeakyOutput(*leaky_ops.leaky(spk.view(1, 2, 6), beta, threshold, second_mem, None, *options(p=False)))
        return spk, out.mem_last, second.mem_last, sg(second.x).sum()

    def run(function):
        args, leaves = layer_arguments(handle="none", steps=1)
        second_mem = normal((2, 6), 8).requires_grad_()
        inputs = (*args[:2], *args[6:11], second_mem)
        spk, mem, second, loss = function(*inputs)
        total = (spk * normal((2, 6), 9)).sum() + (mem**2).sum() + (second**2).sum() + loss
        total.backward()
        return [spk, mem, second, loss, *(leaf.grad for leaf in (*leaves, second_mem))]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    equal([t.detach() for t in run(compiled)], [t.detach() for t in run(step)])


def plain_surrogate(x: Tensor) -> Tensor:
    soft = x / (1 + 5 * x.abs())
    return (x > 0).to(x.dtype) + (soft - soft.detach())


# Bad arguments: an error with a name, never a crash.


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weight": torch.ones(6, 7, dtype=torch.float16)}, "weight of another dtype"),
        ({"mem": torch.ones(3, 6, dtype=F64)}, "mem of another batch"),
        ({"beta": torch.ones(5, dtype=F64)}, "beta of another size"),
        ({"threshold": torch.ones(5, dtype=F64)}, "threshold of another size"),
        ({"bias": torch.ones(5, dtype=F64)}, "bias of another size"),
        ({"row_ptr": torch.zeros(3, dtype=torch.int32)}, "row_ptr of another length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_raise(change, what):
    names = ("row_ptr", "indices", "values", "handle", "in_active_ptr", "in_active_indices", "weight", "bias", "beta",
             "threshold", "mem")  # fmt: skip
    args, _ = layer_arguments(handle="none", grad=False)
    if "dtype" in what and not _native.available():
        pytest.skip("the twin promotes")
    arguments = dict(zip(names, args, strict=False)) | change
    with pytest.raises(Exception) as error:
        linear_leaky_ops.linear_leaky(*arguments.values(), *args[len(names) :])
    assert str(error.value)
    if _native.available():
        message = str(error.value)
        assert "linear_leaky" in message or next(iter(change)) in message or "input events" in message, what
        assert "expected" in message


@pytest.mark.parametrize("shape", [(3, 6), (1,)])
def test_a_membrane_that_does_not_fit_a_dense_layer_raises(shape):
    neuron = torch.tensor(0.9), torch.tensor(1.0), torch.ones(shape), None
    if shape == (1,) and not _native.available():
        pytest.skip("the twin broadcasts")
    expected = r"mem: expected \[2, 6\]" if _native.available() else r"size of tensor a \(3\) must match"
    with pytest.raises(RuntimeError, match=expected):
        leaky_dense_ops.leaky_dense(torch.ones(4, 2, 6), *neuron, CODES["subtract"], True, INF, False)


@pytest.mark.parametrize("steps", [0, -3, 4])
def test_a_sum_over_steps_that_do_not_divide_the_rows_raises(steps):
    x = make_events(15, 6, 0.3, 1, F64)
    expected = f"steps: expected a number that divides the 15 rows, got {steps}" if _native.available() else "shape"
    with pytest.raises(RuntimeError, match=expected):
        event_ops.events_sum(torch.zeros(0, dtype=F64), *x[1:], None, None, 6, steps)
