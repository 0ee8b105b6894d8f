"""Convolution of events, and the pooling behind it: kernels against their twin, and the twin against torch's own.

Drawing and comparing are those of `test_ops.py`. Numbers are dyadic where maxima are compared: sums are then exact in
any order, and equal entries of a window are real ties, of which the first has to win.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from helpers import INF, dyadic, normal, spikes, threads
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ops import DTYPES, F32, F64, SEED, Events, equal, kernels, make_active, make_events, numbers, spread
from torch import Tensor
from torch.nn import functional as F

from sparse_backend import _native
from sparse_backend.ops import event_conv as ops
from sparse_backend.ops.event_conv import AVERAGE_POOL, MAX_POOL, NO_POOL, Geometry
from sparse_backend.reference import event_conv as twins

pytestmark = pytest.mark.kernels

__all__ = ["kernels"]  # the fixture loads them here too

POOLS = (NO_POOL, MAX_POOL, AVERAGE_POOL)
DENSITY = st.sampled_from([0.0, 0.005, 0.02, 0.1, 0.5, 1.0])
ROWS = st.sampled_from([0, 1, 2, 5])
LAYOUT = st.sampled_from(["plain", "channels last", "output channels last", "strided"])
ARRIVING = st.sampled_from(["plain", "transposed", "expanded"])
NEEDS = st.tuples(st.booleans(), st.booleans(), st.booleans())


# Drawing.


class Sizes(NamedTuple):
    """A convolution without its numbers."""

    rows: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    geometry: Geometry

    @property
    def columns(self) -> int:
        return self.channels * self.geometry.height * self.geometry.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.channels, *self.kernel

    @property
    def plane(self) -> tuple[int, int]:
        """Height and width before pooling."""
        return self.geometry.of_convolution(torch.empty(self.weight_shape, device="meta"))

    @property
    def outputs(self) -> int:
        return self.out_channels * math.prod(self.geometry.of_output(torch.empty(self.weight_shape, device="meta")))


@st.composite
def sizes(draw: Any) -> Sizes:
    """Any convolution that has an output: kernels wider than the image where the padding makes room for them."""
    height, width = (draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 17, 30])) for _ in range(2))
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2, 3]))
    stride = draw(st.sampled_from([1, 1, 2, 3, 4])), draw(st.sampled_from([1, 1, 2, 3, 4]))
    padding = tuple(
        max(0, -(-(d * (k - 1) + 1 - size) // 2)) + draw(st.sampled_from([0, 0, 1, 2, 5]))
        for size, k, d in zip((height, width), kernel, dilation, strict=True)
    )
    channels = draw(st.sampled_from([1, 2, 3, 12]))
    out_channels = draw(st.sampled_from([1, 2, 3, 7, 8, 12, 16, 17, 31, 33, 64]))
    geometry = Geometry(height, width, *stride, *padding, *dilation)
    result = Sizes(draw(ROWS), channels, out_channels, kernel, geometry)
    pool = draw(st.sampled_from(POOLS))
    if pool == NO_POOL:
        return result
    window = [draw(st.integers(1, min(size, 5))) for size in result.plane]
    return result._replace(geometry=geometry._replace(pool=pool, pool_h=window[0], pool_w=window[1]))


def a_convolution(
    rows: int,
    channels: int,
    out_channels: int,
    size: int,
    kernel: int,
    pool: int = NO_POOL,
    window: int = 1,
    **rest: int,
) -> Sizes:
    geometry = Geometry(size, size, **rest)._replace(pool=pool, pool_h=window, pool_w=window)
    return Sizes(rows, channels, out_channels, (kernel, kernel), geometry)


def lay_out(weight: Tensor, layout: str) -> Tensor:
    """The same [O, C, kh, kw] numbers with other strides."""
    if layout == "channels last":
        return weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "output channels last":
        return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "strided":
        room = weight.new_full([2 * size + 1 for size in weight.shape], math.nan)
        room[1::2, 1::2, 1::2, 1::2] = weight
        return room[1::2, 1::2, 1::2, 1::2]
    return weight.contiguous()


def arriving(grad: Tensor, how: str) -> Tensor:
    """A gradient as autograd may hand it over."""
    if how == "expanded":  # what out.sum().backward() sends
        return torch.full((), 0.5, dtype=grad.dtype).expand(grad.shape)
    return grad.t().contiguous().t() if how == "transposed" else grad


# Comparing.


def judge(x: Events, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """torch's own: the dense image as a leaf, and the output [R, O * H' * W']."""
    image = x.dense.clone().requires_grad_()
    g = geometry
    images = image.view(len(image), weight.shape[1], g.height, g.width)
    steps = (g.stride_h, g.stride_w), (g.padding_h, g.padding_w), (g.dilation_h, g.dilation_w)
    out, window = F.conv2d(images, weight, bias, *steps), (g.pool_h, g.pool_w)
    if g.pool == MAX_POOL:
        out = F.max_pool2d(out, window)
    elif g.pool == AVERAGE_POOL:
        out = F.avg_pool2d(out, window)
    return image, out.flatten(1)


def is_exact(dtype: torch.dtype, geometry: Geometry) -> bool:
    """Whether no sum is rounded: numbers of `numbers`, none divided by the size of a window."""
    return dtype == F32 and geometry.pool != AVERAGE_POOL


def at(dense: Tensor, row_ptr: Tensor, indices: Tensor) -> Tensor:
    """Entries of a dense [R, M] in the order of the events, row by row."""
    parts = [row[indices[begin:end].long()] for row, begin, end in zip(dense, row_ptr[:-1], row_ptr[1:], strict=True)]
    return torch.cat(parts) if parts else dense.new_empty(0)


def assert_maxima(chosen: Tensor, out: Tensor, x: Events, weight: Tensor, bias: Tensor | None, g: Geometry) -> None:
    """What was chosen is the maximum, to rounding."""
    image = x.dense.view(-1, weight.shape[1], g.height, g.width)
    windows = g.windows(g.convolve(image, weight, bias)).flatten(1, 3)
    equal(windows.gather(-1, chosen.long().unsqueeze(-1)).squeeze(-1), out, "chosen")


# The kernels and their twin.


def test_what_runs_is_what_was_loaded():
    """Without this, a kernel that is not registered would pass every test of this file as its own twin."""
    for op in (ops.event_conv, ops.event_conv_backward):
        name = op.name().split(".")[0]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") == _native.available()


@settings(deadline=None, max_examples=250)
@given(
    case=sizes(), density=DENSITY, active=DENSITY, dtype=DTYPES, graded=st.booleans(), sliced=st.booleans(),
    bias=st.booleans(), layout=LAYOUT, keep=st.booleans(), grad_density=st.sampled_from([0.0, 0.1, 1.0]),
    grad_layout=ARRIVING, needs=NEEDS, seed=SEED,
)  # fmt: skip
@example(
    case=a_convolution(5, 3, 33, 9, 4, MAX_POOL, 3, padding_h=2, padding_w=1, stride_w=2), density=1.0, active=1.0,
    dtype=F32, graded=False, sliced=True, bias=True, layout="strided", keep=True, grad_density=1.0,
    grad_layout="plain", needs=(True, True, True), seed=0,
)  # fmt: skip
def test_event_conv_against_its_twin(
    case, density, active, dtype, graded, sliced, bias, layout, keep, grad_density, grad_layout, needs, seed
):
    geometry = case.geometry
    x = make_events(case.rows, case.columns, density, seed, dtype, graded, sliced)
    weight = lay_out(numbers(case.weight_shape, seed + 1, dtype), layout)
    b = numbers((case.out_channels,), seed + 2, dtype) if bias else None
    args = (*x[1:], None, None, None, weight, b, *geometry, keep)
    (out, chosen), (twin, twins_chosen) = ops.event_conv(*args), twins.event_conv(*args)
    exact = is_exact(dtype, geometry)
    equal(out, twin, "forward", exact)
    assert chosen.dtype == torch.uint8 and chosen.shape == twins_chosen.shape
    if dtype == F32:
        equal(chosen, twins_chosen, "chosen")
    elif chosen.numel():
        assert_maxima(chosen, twin, x, weight, b, geometry)
    if geometry.pool == MAX_POOL and not keep:
        return

    shape = case.rows, case.outputs
    grad = arriving(numbers(shape, seed + 3, dtype) * spikes(shape, grad_density, seed + 4, dtype), grad_layout)
    pointers = make_active(case.rows, case.columns, active, seed + 5) if needs[0] else (None, None)
    args = (grad, *x[1:], *pointers, weight, twins_chosen if geometry.pool == MAX_POOL else None, *geometry, *needs)
    equal(ops.event_conv_backward(*args), twins.event_conv_backward(*args), "backward", exact)


@pytest.mark.parametrize("density", [0.002, 0.08])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "case",
    [
        a_convolution(30, 1, 12, 28, 5, MAX_POOL, 2),
        a_convolution(70, 12, 64, 12, 5, MAX_POOL, 2),
        a_convolution(9, 64, 130, 8, 3, AVERAGE_POOL, 4, padding_h=1, padding_w=1),
        a_convolution(3, 2, 32, 34, 3, stride_h=2, stride_w=2),
        a_convolution(2, 300, 5, 3, 1),
    ],
    ids=lambda case: f"{case.columns}-{case.out_channels}C{case.kernel[0]}",
)
def test_a_layer_of_usual_size(case, dtype, density):
    x = make_events(case.rows, case.columns, density, 1, dtype)
    weight, bias = dyadic(case.weight_shape, 2, dtype), dyadic((case.out_channels,), 3, dtype)
    args = (*x[1:], None, None, None, weight, bias, *case.geometry, True)
    (out, chosen), (twin, twins_chosen) = ops.event_conv(*args), twins.event_conv(*args)
    exact = case.geometry.pool != AVERAGE_POOL or case.geometry.pool_h == 4
    equal(out, twin, "forward", exact)
    equal(chosen, twins_chosen, "chosen")
    grad = dyadic(out.shape, 4, dtype)
    kept = chosen if case.geometry.pool == MAX_POOL else None
    active = make_active(case.rows, case.columns, density, 5)
    args = (grad, *x[1:], *active, weight, kept, *case.geometry, True, True, True)
    equal(ops.event_conv_backward(*args), twins.event_conv_backward(*args), "backward", exact)


# The twin, and what a user calls, against torch.


@settings(deadline=None, max_examples=150)
@given(
    case=sizes(), density=DENSITY, active=DENSITY, graded=st.booleans(), sliced=st.booleans(), bias=st.booleans(),
    seed=SEED,
)  # fmt: skip
def test_the_twin_against_torch(case, density, active, graded, sliced, bias, seed):
    geometry = case.geometry
    x = make_events(case.rows, case.columns, density, seed, F64, graded, sliced)
    weight = dyadic(case.weight_shape, seed + 1, F64).requires_grad_()
    b = dyadic((case.out_channels,), seed + 2, F64).requires_grad_() if bias else None
    image, expected = judge(x, weight, b, geometry)
    with torch.no_grad():
        out, chosen = twins.event_conv(*x[1:], None, None, None, weight, b, *geometry, True)
    equal(out, expected.detach(), "forward")

    grad = dyadic(out.shape, seed + 3, F64)
    leaves = [image, weight] if b is None else [image, weight, b]
    of_image, *of_parameters = torch.autograd.grad(expected, leaves, grad)
    ptr, where = make_active(case.rows, case.columns, active, seed + 4)
    kept = chosen if geometry.pool == MAX_POOL else None
    args = (grad, *x[1:], ptr, where, weight.detach(), kept, *geometry, True, True, bias)
    ours = twins.event_conv_backward(*args)
    equal(ours[: len(leaves)], [at(of_image, ptr, where), *of_parameters], "backward")


@settings(deadline=None, max_examples=100)
@given(case=sizes(), density=DENSITY, active=DENSITY, graded=st.booleans(), bias=st.booleans(), learns=NEEDS, seed=SEED)
@example(
    case=a_convolution(0, 2, 3, 5, 3, MAX_POOL, 2), density=0.5, active=0.5, graded=False, bias=True,
    learns=(True, True, True), seed=0,
)  # fmt: skip
def test_the_gradients_are_autograds(case, density, active, graded, bias, learns, seed):
    """Only of what learns: the others stay without one."""
    x = make_events(case.rows, case.columns, density, seed, F64, graded)
    ptr, where = make_active(case.rows, case.columns, active, seed + 1)
    handle = torch.zeros(where.shape, dtype=F64).requires_grad_(learns[0])
    weight = dyadic(case.weight_shape, seed + 2, F64).requires_grad_(learns[1])
    b = dyadic((case.out_channels,), seed + 3, F64).requires_grad_(learns[2]) if bias else None
    any_learns = any(learns[: 3 if bias else 2])
    out, chosen = ops.call_event_conv(*x[1:], handle, ptr, where, weight, b, *case.geometry, any_learns)
    assert out.requires_grad == any_learns and not chosen.requires_grad
    image, expected = judge(x, weight, b, case.geometry)
    equal(out.detach(), expected.detach(), "forward")
    grad = dyadic(out.shape, seed + 4, F64)
    leaves = [leaf for leaf in (weight, b) if leaf is not None and leaf.requires_grad]
    of_image, *of_parameters = torch.autograd.grad(expected, [image, *leaves], grad)
    if any_learns:
        out.backward(grad)
    equal([leaf.grad for leaf in leaves], of_parameters, "gradients")
    if learns[0]:
        equal(handle.grad, at(of_image, ptr, where), "gradient of the handle")
    for leaf, learns_ in zip((handle, weight, b), learns, strict=True):
        assert leaf is None or learns_ or leaf.grad is None


@pytest.mark.parametrize("pool", [MAX_POOL, AVERAGE_POOL])
def test_strided_arguments(pool):
    """As views of something larger; events come contiguous."""
    parts, strided = backward_arguments(pool), backward_arguments(pool)
    strided |= {name: spread(parts[name]) for name in ("grad", "weight")}
    if pool == MAX_POOL:
        strided["chosen"] = arriving(parts["chosen"], "transposed")
    equal(ops.event_conv_backward(*strided.values()), twins.event_conv_backward(*parts.values()), "backward")
    parts = arguments(pool=pool, learns=(False, False, False))
    strided = parts | {name: spread(parts[name]) for name in ("weight", "bias")}
    equal(ops.event_conv(*strided.values()), twins.event_conv(*parts.values()), "forward")


# Ties.


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("out_channels", [1, 3, 16, 33])
def test_the_first_of_equals_is_the_maximum(out_channels, dtype):
    """Nothing but the bias in a window, or zeros of both signs: its first entry has the gradient."""
    case = a_convolution(2, 1, out_channels, 5, 2, MAX_POOL, 3, padding_h=1, padding_w=1)
    bias = dyadic((out_channels,), 1, dtype)
    bias[0] = -0.0
    for x in (make_events(2, 25, 0.0, 2, dtype), make_events(2, 25, 0.5, 2, dtype)):
        weight = torch.zeros(case.weight_shape, dtype=dtype)
        out, chosen = ops.event_conv(*x[1:], None, None, None, weight, bias, *case.geometry, True)
        equal(out, bias.repeat_interleave(4).expand(2, -1), exact=True)
        assert not chosen.any()
    everywhere = make_active(2, 25, 1.0, 3)
    args = (torch.ones_like(out), *x[1:], *everywhere, weight + 1, chosen, *case.geometry, True, True, True)
    of_input, of_weight, of_bias = ops.event_conv_backward(*args)
    _, expected = judge(x, weight.requires_grad_(), bias.requires_grad_(), case.geometry)
    equal((of_weight, of_bias), torch.autograd.grad(expected.sum(), (weight, bias)), exact=True)
    firsts = torch.zeros(5, 5, dtype=dtype)  # entries (0, 0), (0, 3), (3, 0), (3, 3) of the plane, image padded by 1
    firsts[:1, :1] = firsts[:1, 2:4] = firsts[2:4, :1] = firsts[2:4, 2:4] = out_channels
    equal(of_input, firsts.flatten().repeat(2), exact=True)


@pytest.mark.parametrize("window", [(2, 3), (1, 4), (16, 16), (128, 2), (1, 256)])
def test_places_in_a_window_count_line_by_line(window):
    """One event per row, through a kernel of one entry; up to 256 places fit into their byte."""
    height, width = 2 * window[0] - 1, 2 * window[1]
    geometry = Geometry(height, width, pool=MAX_POOL, pool_h=window[0], pool_w=window[1])
    rows = height * width
    row_ptr, indices = torch.arange(rows + 1, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    weight = torch.full((3, 1, 1, 1), 2.0)
    out, chosen = ops.event_conv(row_ptr, indices, None, None, None, None, weight, None, *geometry, True)
    down, across = indices // width, indices % width
    inside = down < window[0]  # the lines below fill no window
    second = across >= window[1]
    expected = torch.zeros(rows, 2, dtype=torch.uint8)
    expected[inside, second[inside].long()] = (down * window[1] + across % window[1])[inside].to(torch.uint8)
    equal(chosen, expected.repeat(1, 3), exact=True)
    assert int((out == 2).sum()) == 3 * int(inside.sum())


# Infinities, NaN.


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", ["value", "bias"])
def test_what_is_not_finite_is_as_torch_has_it(pool, bad, where):
    """A maximum over a NaN is NaN."""
    case = a_convolution(3, 2, 18, 8, 3, pool, 2 if pool else 1, padding_h=1, padding_w=1)
    x = make_events(3, case.columns, 0.2, 1, F32, graded=True)
    weight, bias = dyadic(case.weight_shape, 2), dyadic((18,), 3)
    if where == "value":
        x.values[5] = x.dense[0, x.indices[5]] = bad
    else:
        bias[4] = bad
    _, expected = judge(x, weight, bias, case.geometry)
    assert not bool(expected.isfinite().all()) and bool(expected.isfinite().any())
    args = (*x[1:], None, None, None, weight, bias, *case.geometry, True)
    equal(ops.event_conv(*args)[0], expected.detach(), "op")
    equal(twins.event_conv(*args)[0], expected.detach(), "twin")


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gradient_goes_to_the_entry_that_is_not_finite(kernel, bad):
    """With a kernel of one entry a window holds one such entry, with a larger kernel several."""
    case = a_convolution(2, 1, 5, 8, kernel, MAX_POOL, 4)
    x = make_events(2, 64, 0.2, 1, F64, graded=True)
    x.values[3] = x.dense[0, x.indices[3]] = bad
    weight = dyadic(case.weight_shape, 2, F64).abs() + 0.125
    image, expected = judge(x, weight, None, case.geometry)
    grad = dyadic(expected.shape, 3, F64)
    (of_image,) = torch.autograd.grad(expected, image, grad)
    everywhere = make_active(2, 64, 1.0, 4)
    handle = torch.zeros(128, dtype=F64, requires_grad=True)
    ops.call_event_conv(*x[1:], handle, *everywhere, weight, None, *case.geometry, True)[0].backward(grad)
    equal(handle.grad, of_image.flatten(), "op")
    _, chosen = twins.event_conv(*x[1:], None, None, None, weight, None, *case.geometry, True)
    args = (grad, *x[1:], *everywhere, weight, chosen, *case.geometry, True, False, False)
    equal(twins.event_conv_backward(*args)[0], of_image.flatten(), "twin")


@pytest.mark.parametrize("pool", POOLS)
def test_a_gradient_that_is_nan_and_else_zero_is_not_lost(pool):
    parts = backward_arguments(pool)
    parts["grad"].zero_()[1, 4] = math.nan
    ours, twin = ops.event_conv_backward(*parts.values()), twins.event_conv_backward(*parts.values())
    equal((ours[0], ours[2]), (twin[0], twin[2]))
    assert bool(ours[0].isnan().any()) and bool(ours[1].isnan().any())


# Threads and races.


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("rows", [1, 3, 150])
def test_results_do_not_depend_on_threads_or_races(rows, pool, dtype):
    case = a_convolution(rows, 12, 40, 12, 5, pool, 2 if pool else 1, padding_h=1)
    x = make_events(rows, case.columns, 0.1, 1, dtype, graded=True)
    weight, bias = normal(case.weight_shape, 2, dtype), normal((40,), 3, dtype)
    active = make_active(rows, case.columns, 0.1, 4)
    grad = normal((rows, case.outputs), 5, dtype)
    results = []
    for count in (1, 2, 3, 1, 3, 3):
        with threads(count):
            out, chosen = ops.event_conv(*x[1:], None, None, None, weight, bias, *case.geometry, True)
            kept = chosen if pool == MAX_POOL else None
            args = (grad, *x[1:], *active, weight, kept, *case.geometry, True, True, True)
            results.append((out, chosen, *ops.event_conv_backward(*args)))
    for other in results[1:]:  # bit for bit; torch's own convolution, of which the twin is made, promises less
        equal(other, results[0], exact=_native.available())


# Autograd: what arrives from the graph goes where it should.


def arguments(
    dtype: torch.dtype = F64, pool: int = MAX_POOL, learns: tuple[bool, bool, bool] = (True, True, True), **change: Any
) -> dict[str, Any]:
    """Arguments of event_conv by name: 4 images of 2 channels of 6 x 7, 3 output channels, 2 x 3 windows."""
    x = make_events(4, 84, 0.3, 1, dtype, graded=True)
    ptr, where = make_active(4, 84, 0.3, 2)
    geometry = Geometry(6, 7, padding_w=1, pool=pool, pool_h=2 if pool else 1, pool_w=3 if pool else 1)
    parts = {
        "row_ptr": x.row_ptr, "indices": x.indices, "values": x.values,
        "handle": torch.zeros(where.shape, dtype=dtype).requires_grad_(learns[0]),
        "active_ptr": ptr, "active_indices": where,
        "weight": normal((3, 2, 3, 2), 3, dtype).requires_grad_(learns[1]),
        "bias": normal((3,), 4, dtype).requires_grad_(learns[2]), **geometry._asdict(), "keep": True,
    }  # fmt: skip
    assert change.keys() <= parts.keys()
    return parts | change


def backward_arguments(pool: int = MAX_POOL, **change: Any) -> dict[str, Any]:
    """Those of event_conv_backward, everything needed."""
    parts = arguments(pool=pool, learns=(False, False, False))
    out, chosen = ops.event_conv(*parts.values())
    for name in ("handle", "bias", "keep"):
        del parts[name]
    events = {name: parts.pop(name) for name in tuple(parts)[:6]}  # up to the weight
    needs = {"need_input": True, "need_weight": True, "need_bias": True}
    parts = {
        "grad": normal(out.shape, 5), **events, "chosen": chosen if pool == MAX_POOL else None, **parts, **needs
    }  # fmt: skip
    assert change.keys() <= parts.keys()
    return parts | change


OPCHECKS = {
    "maximum": lambda: (ops.event_conv, arguments()),
    "average": lambda: (ops.event_conv, arguments(pool=AVERAGE_POOL)),
    "no pooling": lambda: (ops.event_conv, arguments(pool=NO_POOL)),
    "float32": lambda: (ops.event_conv, arguments(F32)),
    "nothing learns": lambda: (ops.event_conv, arguments(learns=(False, False, False), keep=False)),
    "no handle, bias, values": lambda: (
        ops.event_conv,
        arguments(handle=None, active_ptr=None, active_indices=None, bias=None, values=None),
    ),
    "backward": lambda: (ops.event_conv_backward, backward_arguments()),
    "backward of an average": lambda: (ops.event_conv_backward, backward_arguments(AVERAGE_POOL)),
    "backward to the weight alone": lambda: (
        ops.event_conv_backward,
        backward_arguments(need_input=False, need_bias=False, active_ptr=None, active_indices=None),
    ),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op, args = OPCHECKS[name]()
    torch.library.opcheck(op, tuple(args.values()))


@pytest.mark.parametrize(
    "learns", [(False, True, False), (True, False, False), (False, False, True), (True, True, True)]
)
def test_what_nobody_needs_is_not_computed(learns, monkeypatch):
    asked = []

    def backward(*args: Any) -> Any:
        asked.append(args)
        return plain(*args)

    plain = ops.event_conv_backward
    monkeypatch.setattr(ops, "event_conv_backward", backward)
    parts = arguments(learns=learns)
    ops.call_event_conv(*parts.values())[0].sum().backward()
    (args,) = asked
    assert args[-3:] == learns
    assert (args[4] is None, args[5] is None) == (not learns[0],) * 2  # the active set is not even kept
    for name, learns_, result in zip(("handle", "weight", "bias"), learns, plain(*args), strict=True):
        assert (parts[name].grad is not None) == learns_
        assert result.numel() == (parts[name].numel() if learns_ else 0)


def test_where_nothing_learns_nothing_is_kept():
    parts = arguments(learns=(False, False, False), keep=False)
    out, chosen = ops.call_event_conv(*parts.values())
    assert not out.requires_grad and chosen.shape == (0, out.shape[1])
    with torch.no_grad():
        out, _ = ops.call_event_conv(*arguments().values())
    assert not out.requires_grad


def test_double_backward_is_torchs_own_error():
    parts = arguments()
    out, _ = ops.call_event_conv(*parts.values())
    (grad,) = torch.autograd.grad((out**2).sum(), parts["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_twice_is_torchs_own_error():
    loss = ops.call_event_conv(*arguments().values())[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_edited_weight_is_torchs_own_error():
    parts = arguments()
    loss = ops.call_event_conv(*parts.values())[0].sum()
    with torch.no_grad():
        parts["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_touches_no_product():
    parts = arguments(F32)
    plain = torch.autograd.grad(ops.call_event_conv(*parts.values())[0].sum(), parts["weight"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(ops.call_event_conv(*parts.values())[0].sum(), parts["weight"])
    assert torch.equal(plain[0], inside[0])


def test_fullgraph_compile():
    def run(function: Any) -> list[Tensor]:
        parts = arguments()
        out, _ = function(*parts.values())
        (out * normal(out.shape, 6)).sum().backward()
        return [out.detach(), *(parts[name].grad for name in ("handle", "weight", "bias"))]

    torch._dynamo.reset()
    equal(run(torch.compile(ops.call_event_conv, backend="aot_eager", fullgraph=True)), run(ops.call_event_conv))


# Bad arguments: an error with a name, never a crash.


class Bad(NamedTuple):
    """One argument changed, or several."""

    named: str  #: what the message is about, a regular expression
    change: dict[str, Any]
    twin: bool = True  #: whether torch turns it down, where the twin runs


def identify(bad: Bad) -> str:
    return ", ".join(
        f"{name} {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{name} {value}"
        for name, value in bad.change.items()
    )


def assert_turned_down(op: Any, args: dict[str, Any], bad: Bad) -> None:
    """By the kernels with an error that says what it is about, by the twin with whatever torch raises."""
    if not _native.available() and not bad.twin:
        pytest.skip("torch promotes, and the twin knows no limits")
    with pytest.raises(RuntimeError if _native.available() else Exception) as error:
        op(*args.values())
    message = str(error.value)
    if _native.available():
        assert re.search(bad.named, message) and "expected" in message, message
        assert "got" in message or "dtype" in message or "float32 or float64" in message, message


def double(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=F64)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("row_ptr|events:", {"row_ptr": torch.zeros(5, dtype=torch.int64)}, twin=False),
        Bad("indices|events:", {"indices": torch.zeros(200, dtype=torch.int64)}, twin=False),
        Bad("values", {"values": torch.zeros(200)}, twin=False),
        Bad("weight", {"weight": double(3, 2, 3)}),
        Bad("weight", {"weight": double(3, 2, 3, 2, 1)}),
        Bad("event_conv", {"weight": torch.ones(3, 2, 3, 2, dtype=torch.float16)}),
        Bad("event_conv", {"weight": torch.ones(3, 2, 3, 2, dtype=torch.int64)}),
        Bad("bias", {"bias": double(4)}),
        Bad("bias", {"bias": double(1)}),
        Bad("bias", {"bias": torch.ones(3)}),
        Bad("kernel", {"weight": double(3, 2, 7, 2)}),
        Bad("kernel", {"weight": double(3, 2, 3, 10)}),
        Bad("kernel", {"weight": double(3, 2, 7, 2), "stride_h": 2}),
        Bad("kernel", {"weight": double(3, 2, 3, 10), "stride_w": 4, "pool": NO_POOL, "pool_h": 1, "pool_w": 1}),
        Bad("kernel", {"dilation_h": 3}),
        Bad("kernel", {"dilation_w": 9, "stride_w": 5, "pool_w": 1}),
        Bad("stride", {"stride_h": 0}),
        Bad("stride", {"stride_w": -1}),
        Bad("padding", {"padding_h": -1}),
        Bad("padding", {"padding_w": -1}),
        Bad("dilation", {"dilation_h": 0}),
        Bad("dilation", {"dilation_w": -1}),
        Bad("pool", {"pool": 3}, twin=False),
        Bad("pool", {"pool": -1}, twin=False),
        Bad("pool", {"pool": NO_POOL, "pool_h": 2}, twin=False),
        Bad("pool", {"pool_h": 0}),
        Bad("pool", {"pool_w": -2}),
        Bad("window", {"pool_h": 5}, twin=False),
        Bad("window", {"pool_w": 9}, twin=False),
        Bad("256", {"height": 300, "pool_h": 129, "pool_w": 2}, twin=False),
    ],
    ids=identify,
)
def test_arguments_that_do_not_fit_raise(bad):
    assert_turned_down(ops.event_conv, arguments(learns=(False, False, False), **bad.change), bad)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("grad", {"grad": double(4, 11)}),
        Bad("grad", {"grad": double(3, 12)}),
        Bad("grad", {"grad": torch.ones(4, 12)}),
        Bad("chosen", {"chosen": None}),
        Bad("chosen", {"chosen": torch.zeros(4, 11, dtype=torch.uint8)}),
        Bad("chosen", {"chosen": torch.zeros(0, 12, dtype=torch.uint8)}),
        Bad("chosen", {"chosen": torch.zeros(4, 12, dtype=torch.int32)}, twin=False),
        Bad("active", {"active_ptr": None, "active_indices": None}),
        Bad("active", {"active_ptr": torch.zeros(4, dtype=torch.int32)}, twin=False),
        Bad("stride", {"stride_h": 0}),
        Bad("kernel", {"weight": double(3, 2, 7, 2), "stride_h": 2}),
    ],
    ids=identify,
)
def test_arguments_of_the_backward_that_do_not_fit_raise(bad):
    assert_turned_down(ops.event_conv_backward, backward_arguments(**bad.change), bad)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("event_conv", {"width": -7, "padding_w": 9}),
        Bad("event_conv", {"height": 0, "padding_h": 3}),
        Bad("weight", {"weight": double(3, 2, 0, 2)}),
        Bad("weight", {"weight": double(3, 0, 3, 2)}),
        Bad("weight", {"weight": double(0, 2, 3, 2), "bias": None}),
    ],
    ids=identify,
)
def test_images_and_weights_without_entries_raise(bad):
    """Though the padding may leave room for a kernel."""
    assert_turned_down(ops.event_conv, arguments(learns=(False, False, False), **bad.change), bad)
