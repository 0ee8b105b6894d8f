"""EventTensor: its layout, every way in and out, its steps and their gradients, and what its constructor refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import assert_close, fast_sigmoid, normal, spikes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import sparse_backend
from sparse_backend import EventTensor, collate, functional

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = st.sampled_from([0, 1, 2, 3, 5, 16, 17, 33, 64, 130])


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def events(shape=(2, 3), **parts):
    """[[1, 0, 1], [0, 1, 0]], or whatever of it is replaced."""
    return EventTensor(shape, **{"row_ptr": ints(0, 2, 3), "indices": ints(0, 2, 1), **parts})


def assert_layout(x: EventTensor, dense: Tensor) -> None:
    """The parts of x are the documented CSR form of this dense tensor."""
    flat = dense.reshape(-1, dense.shape[-1]) if dense.numel() else dense.new_zeros(dense.shape[:-1].numel(), 0)
    begin, end = int(x.row_ptr[0]), int(x.row_ptr[-1])
    assert x.row_ptr.dtype == x.indices.dtype == torch.int32
    assert x.row_ptr.shape == (dense.shape[:-1].numel() + 1,)
    where = flat.nonzero()
    assert torch.equal(x.row_ptr.diff().long(), (flat != 0).sum(1))
    assert torch.equal(x.indices[begin:end].long(), where[:, 1])
    if x.values is None:
        assert bool((flat[flat != 0] == 1).all())
    else:
        torch.testing.assert_close(x.values[begin:end].double(), flat[flat != 0].double(), equal_nan=True)
    assert x.nnz == where.shape[0]


# from_dense, to_dense.


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(SIZES.filter(lambda n: n < 20), min_size=0, max_size=3),
    columns=SIZES,
    density=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from([*FLOATS, torch.bool, torch.uint8]),
    graded=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(shape=[], columns=5, density=0.5, dtype=torch.float32, graded=False, seed=0)
@example(shape=[0], columns=5, density=0.5, dtype=torch.float32, graded=True, seed=0)
@example(shape=[4], columns=0, density=0.5, dtype=torch.float64, graded=True, seed=0)
@example(shape=[3, 5], columns=64, density=1.0, dtype=torch.bool, graded=False, seed=0)
@pytest.mark.kernels
def test_round_trip(shape, columns, density, dtype, graded, seed):
    dense = spikes((*shape, columns), density, seed, torch.float64, graded)
    if dtype == torch.uint8:
        dense = (dense.abs() * 2).floor() if graded else dense
    dense = dense.to(dtype)
    x = EventTensor.from_dense(dense)
    assert_layout(x, dense)
    assert x.shape == dense.shape
    expected = dtype if dtype.is_floating_point else torch.float32
    assert x.dtype == expected
    assert x.to_dense().dtype == expected
    assert torch.equal(x.to_dense(), dense.to(expected))
    assert x.density == pytest.approx(float((dense != 0).double().mean()) if dense.numel() else 0.0)
    assert x.is_events and not x.requires_grad
    EventTensor(x.shape, x.row_ptr, x.indices, x.values)  # passes the constructor's own checks


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int64])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2],
        lambda x: x[..., 1::3],
        lambda x: x[1:, 1:, 1:],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.flip(0)[::2].mT,
    ],
)
def test_from_dense_of_strided_tensors(dtype, strided):
    dense = strided((spikes((6, 7, 40), 0.3, 1, torch.float32, graded=True).abs() * 2).to(dtype))
    x = EventTensor.from_dense(dense)
    assert_layout(x, dense)
    assert torch.equal(x.to_dense(), dense.to(x.dtype))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 784])
def test_from_dense_finds_every_column(columns, dtype):
    """One event per row, at every place: no lane of any vector width is missed."""
    dense = torch.eye(columns, dtype=dtype) * torch.arange(1, columns + 1, dtype=dtype)
    x = EventTensor.from_dense(dense)
    assert torch.equal(x.indices, torch.arange(columns, dtype=torch.int32))
    assert torch.equal(x.to_dense(), dense)


@pytest.mark.kernels
def test_from_dense_of_special_values():
    row = torch.tensor([[0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1.0, 1.0]])
    x = EventTensor.from_dense(row)
    assert x.indices.tolist() == [2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(x.to_dense(), row.abs() * row.sign().nan_to_num(math.nan), equal_nan=True)
    double = EventTensor.from_dense(torch.tensor([[0.0, -0.0, 5e-324, math.nan]], dtype=torch.float64))
    assert double.indices.tolist() == [2, 3]


def test_a_single_nan_keeps_its_values():
    x = EventTensor.from_dense(torch.tensor([[1.0, math.nan]]))
    assert x.values is not None and bool(x.values.isnan()[1])


def test_values_are_left_out_where_all_are_one():
    assert EventTensor.from_dense(torch.ones(2, 3)).values is None
    assert EventTensor.from_dense(torch.tensor([[1.0, 0.5]])).values is not None


def test_from_dense_of_events_is_the_same_object():
    x = events()
    assert EventTensor.from_dense(x) is x


def test_from_dense_of_a_tensor_that_requires_grad_keeps_it_as_handle():
    dense = spikes((3, 2, 4), 0.5, 0).requires_grad_()
    x = EventTensor.from_dense(dense)
    assert x.handle is dense and x.active_ptr is None and x.requires_grad
    (x * normal((3, 2, 4), 1)).sum().backward()
    assert torch.equal(dense.grad, normal((3, 2, 4), 1))


def test_from_dense_refuses_what_has_no_columns():
    with pytest.raises(ValueError, match=r"EventTensor\.from_dense: expected a tensor \[\.\.\., N\]"):
        EventTensor.from_dense(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"EventTensor\.from_dense: expected a torch\.Tensor, got list"):
        EventTensor.from_dense([1.0, 2.0])


# from_coo.


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    graded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_from_coo(shape, density, graded, seed):
    dense = spikes(shape, density, seed, torch.float32, graded)
    for x in (EventTensor.from_coo(dense.to_sparse()), EventTensor.from_dense(dense.to_sparse())):
        assert_layout(x, dense)
        assert torch.equal(x.to_dense(), dense)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_from_coo_sums_repeated_entries_in_any_order():
    where = torch.tensor([[1, 0, 1, 0], [2, 0, 2, 1]])
    x = EventTensor.from_coo(torch.sparse_coo_tensor(where, torch.tensor([1.0, 1.0, 1.0, 1.0]), (2, 3)))
    assert torch.equal(x.to_dense(), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support:UserWarning")
def test_from_csr():
    dense = spikes((5, 7), 0.4, 2, torch.float32, graded=True)
    for sparse in (dense.to_sparse_csr(), dense.to_sparse_csc()):
        assert torch.equal(EventTensor.from_coo(sparse).to_dense(), dense)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64])
def test_from_coo_of_other_dtypes(dtype):
    dense = (spikes((3, 4), 0.5, 1).mul(2)).to(dtype)
    x = EventTensor.from_coo(dense.to_sparse())
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(x.to_dense(), dense.to(x.dtype))


def test_from_coo_in_a_stated_dtype():
    x = EventTensor.from_coo((spikes((3, 4), 0.5, 1, torch.float32) * 2).to_sparse(), dtype=torch.float64)
    assert x.dtype == x.values.dtype == x.to_dense().dtype == torch.float64


def test_from_coo_refuses_dense_dimensions():
    with pytest.raises(ValueError, match="expected no dense dimensions, got 1"):
        EventTensor.from_coo(torch.eye(3).to_sparse(1))
    with pytest.raises(TypeError, match=r"expected a sparse tensor, got a strided one\. Use EventTensor\.from_dense"):
        EventTensor.from_coo(torch.eye(3))
    with pytest.raises(TypeError, match="expected a sparse tensor, got int"):
        EventTensor.from_coo(3)


def test_a_sparse_tensor_that_requires_grad_gets_its_gradient():
    sparse = spikes((3, 2, 4), 0.3, 1, torch.float32).to_sparse().requires_grad_()
    x = EventTensor.from_coo(sparse)
    assert x.requires_grad
    (x * 3).sum().backward()
    assert sparse.grad is not None


# from_times.


def test_from_times():
    times, units = np.array([0.0, 2.5, 2.4, 9.9, 10.0, 0.2]), np.array([1, 0, 3, 2, 2, 1])
    x = EventTensor.from_times(times, units, 10, 4)
    expected = torch.zeros(10, 4)
    expected[0, 1] = expected[2, 0] = expected[2, 3] = expected[9, 2] = 1
    assert_layout(x, expected)
    assert x.values is None
    assert torch.equal(x.to_dense(), expected)


def test_from_times_sums_where_asked():
    x = EventTensor.from_times([0.1, 0.2, 3.0], [1, 1, 0], 4, 2, duplicates="sum")
    assert x.to_dense()[0, 1] == 2 and x.to_dense()[3, 0] == 1
    assert x.dtype == torch.float32
    plain = EventTensor.from_times([0.1, 3.0], [1, 0], 4, 2, duplicates="sum", dtype=torch.float64)
    assert plain.values is None and plain.dtype == torch.float64


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_from_times_takes_lists_arrays_and_tensors(kind):
    x = EventTensor.from_times(kind([7, 1]), kind([0, 2]), 4, 3, dt=2)
    assert x.to_dense().nonzero().tolist() == [[0, 2], [3, 0]]


def test_from_times_of_nothing():
    x = EventTensor.from_times([], [], 4, 3)
    assert x.nnz == 0 and x.shape == (4, 3)
    assert not x.to_dense().any()


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_from_times_of_integer_microseconds(kind):
    """Whole numbers that float32 cannot hold stay in their step."""
    x = EventTensor.from_times(kind([16_777_999, 16_778_000, 16_777_217]), kind([0, 1, 2]), 16_779, 3, dt=1000.0)
    assert x.to_dense().nonzero().tolist() == [[16_777, 0], [16_777, 2], [16_778, 1]]


def test_from_times_drops_what_comes_too_late():
    x = EventTensor.from_times([1.0, 2.0, 1e30, math.inf], [0, 1, 1, 1], 2, 2)
    assert x.to_dense().nonzero().tolist() == [[1, 0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), count=st.integers(0, 80), dt=st.sampled_from([0.5, 1.0, 4.0]))
def test_from_times_against_a_plain_loop(seed, count, dt):
    random = np.random.default_rng(seed)
    times, units = random.uniform(0, 30, count), random.integers(0, 5, count)
    counts = torch.zeros(20, 5)
    for time, unit in zip(times, units, strict=True):
        if math.floor(time / dt) < 20:
            counts[math.floor(time / dt), unit] += 1
    assert torch.equal(EventTensor.from_times(times, units, 20, 5, dt=dt, duplicates="sum").to_dense(), counts)
    assert torch.equal(EventTensor.from_times(times, units, 20, 5, dt=dt).to_dense(), counts.clamp(max=1))


@pytest.mark.parametrize(
    ("times", "units", "options", "message"),
    [
        ([1.0], [0, 1], {}, r"arrays of one length, got \[1\] and \[2\]"),
        ([[1.0]], [[0]], {}, "arrays of one length"),
        ([1.0], [4], {}, r"units must lie in 0\.\.3, got 4\.\.4"),
        ([1.0], [-1], {}, r"units must lie in 0\.\.3, got -1"),
        ([-0.5], [0], {}, r"times must be at least 0, got -0\.5"),
        ([math.nan], [0], {}, "times must be at least 0, got nan"),
        ([1.0], [0], {"duplicates": "two"}, "duplicates must be 'one' or 'sum', got 'two'"),
    ],
)
def test_from_times_refuses(times, units, options, message):
    with pytest.raises(ValueError, match=message):
        EventTensor.from_times(times, units, 10, 4, **options)


def test_from_times_wants_sizes():
    with pytest.raises(ValueError, match=r"EventTensor\.from_times: steps must be at least 0, got -5"):
        EventTensor.from_times([1.0], [0], -5, 4)
    with pytest.raises(ValueError, match="n_units must be at least 0, got -1"):
        EventTensor.from_times([], [], 5, -1)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        EventTensor.from_times([1.0], [0], 5.5, 4)


# collate.


class Recordings(Dataset):
    def __init__(self, form="tuple", count=5):
        self.form, self.count = form, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        x = EventTensor.from_dense(spikes((4, 6), 0.3, index, torch.float32))
        if self.form == "alone":
            return x
        return {"x": x, "y": index} if self.form == "dict" else (x, index)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_collate(graded, density):
    samples = [spikes((4, 6), density, seed, torch.float32, graded) for seed in range(3)]
    x = EventTensor.collate([EventTensor.from_dense(sample) for sample in samples])
    assert_layout(x, torch.stack(samples, 1))
    assert torch.equal(x.to_dense(), torch.stack(samples, 1))
    assert x.shape == (4, 3, 6)


def test_collate_of_views_mixed_values_and_dense_samples():
    whole = spikes((3, 4, 6), 0.4, 7, torch.float32)
    samples = [EventTensor.from_dense(whole)[1], EventTensor.from_dense(whole[2] * 3), whole[0]]
    x = EventTensor.collate(samples)
    assert torch.equal(x.to_dense(), torch.stack([whole[1], whole[2] * 3, whole[0]], 1))


@pytest.mark.parametrize("shape", [(0, 6), (4, 0)])
def test_collate_of_empty_samples(shape):
    x = EventTensor.collate([EventTensor.from_dense(torch.zeros(shape))] * 2)
    assert x.shape == (shape[0], 2, shape[1]) and x.nnz == 0


@pytest.mark.parametrize(
    ("arguments", "options", "copies"),
    [
        ((torch.float64, False, True), {}, True),
        (("cpu", torch.float64, False, True), {}, True),
        ((torch.zeros(1, dtype=torch.float64), False, True), {}, True),
        ((torch.float64,), {"copy": True}, True),
        ((torch.float64,), {}, False),
        (("cpu", torch.float64), {"memory_format": torch.preserve_format}, False),
    ],
)
def test_to_takes_what_torchs_takes(arguments, options, copies):
    dense = spikes((3, 2, 4), 0.4, 0, torch.float32)
    x = EventTensor.from_dense(dense).to(*arguments, **options)
    assert type(x) is EventTensor and x.dtype is torch.float64 and torch.equal(x.to_dense(), dense.double())
    assert (x.to(*arguments, **options) is x) != copies


def test_to_another_memory_format_is_dense():
    dense = spikes((2, 3, 4, 5), 0.4, 0, torch.float32)
    out = EventTensor.from_dense(dense, row_dims=3).to(memory_format=torch.channels_last)
    assert torch.equal(out, dense) and out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("function", [torch.sgn, lambda x: torch.sgn(x) + x, lambda x: x.sgn() * x])
def test_gradients_that_are_zeros_without_memory(function):
    ours, theirs = (spikes((3, 2, 4), 0.4, 0, torch.float32).requires_grad_() for _ in range(2))
    function(EventTensor.from_dense(ours)).sum().backward()
    function(theirs).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_record_stream_is_told_of_every_part(monkeypatch):
    told = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: told.append((id(part), stream)))
    x = EventTensor.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]], requires_grad=True))
    x.record_stream("a stream")
    assert set(told) == {(id(part), "a stream") for part in (x.row_ptr, x.indices, x.values, x.handle)}
    dense = x.to_dense()
    told.clear()
    x.record_stream("another")
    assert (id(dense), "another") in told and (id(x.indices), "another") in told


def test_collate_refuses():
    with pytest.raises(ValueError, match="collate: expected at least one sample, got none"):
        collate([])
    with pytest.raises(ValueError, match="at least one sample"):
        EventTensor.collate([])
    with pytest.raises(ValueError, match=r"one shape \[T, N\], a row per step, got \[4, 6\] and \[4, 5\]"):
        EventTensor.collate([torch.zeros(4, 6), torch.zeros(4, 5)])
    with pytest.raises(ValueError, match=r"one shape \[T, N\]"):
        EventTensor.collate([EventTensor.from_dense(torch.zeros(2, 4, 6))])
    with pytest.raises(ValueError, match=r"one shape \[T, N\]"):
        EventTensor.collate([torch.zeros(4)])


def test_collate_of_structures():
    class Pair(NamedTuple):
        x: EventTensor
        y: int

    batch = collate([Pair(events(), 1), Pair(events(), 2)])
    assert type(batch) is Pair and type(batch.x) is EventTensor and batch.y.tolist() == [1, 2]
    batch = collate([{"a": events(), "b": [1.0, events()]}] * 3)
    assert batch["a"].shape == (2, 3, 3) and batch["b"][0].tolist() == [1.0] * 3 and batch["b"][1].shape == (2, 3, 3)
    assert collate([1, 2]).tolist() == [1, 2]
    assert sparse_backend.collate is collate


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["alone", "tuple", "dict"])
def test_data_loader(form, workers):
    loader = DataLoader(Recordings(form), batch_size=2, collate_fn=collate, num_workers=workers)
    seen = 0
    for batch in loader:
        x = batch if form == "alone" else batch["x"] if form == "dict" else batch[0]
        assert type(x) is EventTensor
        count = x.shape[1]
        expected = torch.stack([spikes((4, 6), 0.3, seen + i, torch.float32) for i in range(count)], 1)
        assert torch.equal(x.to_dense(), expected)
        if form != "alone":
            assert (batch["y"] if form == "dict" else batch[1]).tolist() == list(range(seen, seen + count))
        seen += count
    assert seen == 5


# Steps.


@settings(deadline=None, max_examples=30)
@given(
    steps=st.integers(1, 6),
    batch=st.sampled_from([0, 1, 3]),
    columns=st.sampled_from([0, 1, 5, 17]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    graded=st.booleans(),
)
def test_steps_are_views(steps, batch, columns, density, graded):
    dense = spikes((steps, batch, columns), density, 3, torch.float32, graded)
    x = EventTensor.from_dense(dense)
    for t in range(-steps, steps):
        step = x[t]
        assert type(step) is EventTensor
        assert step.shape == (batch, columns)
        assert step.indices.data_ptr() == x.indices.data_ptr()
        assert step.row_ptr.shape == (batch + 1,)
        assert torch.equal(step.to_dense(), dense[t])
        assert step.nnz == int((dense[t] != 0).sum())
        EventTensor(step.shape, step.row_ptr, step.indices, step.values)  # a row_ptr that does not begin at 0 is fine
    assert x[0] is x[0]
    assert [type(step) for step in x] == [EventTensor] * steps
    assert x._dense is None


def test_steps_of_four_dimensions():
    dense = spikes((3, 2, 4, 5), 0.3, 1, torch.float32)
    x = EventTensor.from_dense(dense)
    assert torch.equal(x[2].to_dense(), dense[2])
    assert torch.equal(x[2][1].to_dense(), dense[2, 1])


def test_a_step_outside_is_an_index_error():
    x = EventTensor.from_dense(torch.ones(3, 2, 4))
    for t in (3, -4):
        with pytest.raises(IndexError, match=f"index {t} is out of bounds for dimension 0 with size 3"):
            x[t]


def network_output(seed=0, b_th=0.3):
    """Spikes [6, 3, 5] of a layer of ours, with a compact handle."""
    weight = normal((5, 7), seed, scale=0.5).requires_grad_()
    x = spikes((6, 3, 7), 0.2, seed)
    out = functional.linear_leaky(x, weight, beta=0.9, threshold=0.5, spike_grad=fast_sigmoid(5.0), b_th=b_th).spikes
    return out, weight


@pytest.mark.parametrize("b_th", [0.02, 0.2, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_through_the_steps_are_those_through_the_whole(seed, b_th):
    cotangent = normal((6, 3, 5), 9)
    out, weight = network_output(seed, b_th)
    if math.isfinite(b_th):
        assert out.active_ptr is not None
    (expected,) = torch.autograd.grad((out * cotangent).sum(), weight)
    out, weight = network_output(seed, b_th)
    for t in (0, 3, 5):  # some of the steps
        assert torch.equal(out[t].to_dense(), out.to_dense()[t])
    loss = sum((out[t] * cotangent[t]).sum() for t in range(6))
    (by_step,) = torch.autograd.grad(loss, weight)
    assert_close(by_step, expected)


def test_gradients_through_one_step_only():
    cotangent = normal((3, 5), 9)
    out, weight = network_output()
    (expected,) = torch.autograd.grad((out.to_dense()[2] * cotangent).sum(), weight)
    out, weight = network_output()
    (got,) = torch.autograd.grad((out[2] * cotangent).sum(), weight)
    assert_close(got, expected)


@pytest.mark.parametrize("b_th", [0.2, math.inf])
def test_all_steps_share_one_backward_node(b_th):
    """One node for all T steps: backward through them costs T, not T squared."""
    out, _ = network_output(0, b_th)
    nodes = {id(step.handle.grad_fn) for step in out if step.handle.grad_fn is not None}
    assert len(nodes) == 1


def test_the_parts_of_a_step_with_a_handle_fit():
    out, _ = network_output()
    for t, step in enumerate(out):
        EventTensor(
            step.shape, step.row_ptr, step.indices, step.values,
            handle=step.handle, active_ptr=step.active_ptr, active_indices=step.active_indices,
        )  # fmt: skip
        assert int(step.active_ptr[0]) == 0
        assert step.handle.shape == step.active_indices.shape
        rows = torch.repeat_interleave(torch.arange(3), step.active_ptr.diff().long())
        values = out.to_dense()[t][rows, step.active_indices.long()]
        assert torch.equal(step.handle, values), "the handle holds the spikes' values at the active entries"


# Moving, copying, showing.


def test_to():
    x = EventTensor.from_dense(spikes((3, 4), 0.5, 1, torch.float32, graded=True))
    assert x.to("cpu") is x and x.cpu() is x and x.to(torch.float32) is x and x.float() is x
    double = x.double()
    assert type(double) is EventTensor and double.dtype == double.values.dtype == torch.float64
    assert torch.equal(double.to_dense(), x.to_dense().double())
    assert x.dtype == torch.float32
    half = x.to(dtype=torch.float16)
    assert half.dtype == torch.float16 and half.to_dense().dtype == torch.float16
    assert x.to(torch.int64).dtype == torch.int64
    ones = EventTensor.from_dense(torch.ones(2, 2)).to(torch.float64)
    assert ones.values is None and ones.to_dense().dtype == torch.float64
    assert x.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_to_another_device_keeps_the_events():
    x = EventTensor.from_dense(spikes((3, 4), 0.5, 1, torch.float32, graded=True))
    moved = x.to("meta")
    assert type(moved) is EventTensor
    assert moved.device.type == moved.row_ptr.device.type == moved.values.device.type == "meta"


def test_gradients_go_through_to():
    out, weight = network_output()
    (out.to(torch.float32) * 2).sum().backward()
    again, other = network_output()
    (again.to_dense() * 2).sum().backward()
    assert_close(weight.grad, other.grad, rtol=1e-6)


def test_detach():
    out, _ = network_output()
    detached = out.detach()
    assert type(detached) is EventTensor and not detached.requires_grad
    assert torch.equal(detached.to_dense(), out.to_dense())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), copy.copy])
@pytest.mark.parametrize("graded", [False, True])
def test_copies(copier, graded):
    dense = spikes((3, 2, 4), 0.5, 1, torch.float64, graded)
    x = EventTensor.from_dense(dense)
    for original, expected in ((x, dense), (x[1], dense[1])):
        twin = copier(original)
        assert type(twin) is EventTensor and twin is not original
        assert twin.dtype == torch.float64
        assert torch.equal(twin.to_dense(), expected)
    assert x.is_events
    nested = copier({"a": [x]})
    assert torch.equal(nested["a"][0].to_dense(), dense)


def test_a_deep_copy_shares_nothing():
    x = EventTensor.from_dense(spikes((3, 4), 0.5, 1, graded=True))
    twin = copy.deepcopy(x)
    twin.values.zero_()
    assert x.values.any()


def test_torch_save_and_load():
    x = EventTensor.from_dense(spikes((3, 4), 0.5, 1))
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)["x"].to_dense(), x.to_dense())


def test_pickling_spikes_of_a_layer_keeps_their_values():
    out, _ = network_output()
    twin = pickle.loads(pickle.dumps(out))
    assert not twin.requires_grad
    assert torch.equal(twin.to_dense(), out.to_dense())


def test_repr():
    assert repr(events()) == "EventTensor(shape=[2, 3], events=3, density=50 %, dtype=torch.float32, device='cpu')"
    out, _ = network_output()
    assert "requires_grad=True" in repr(out)
    assert repr(EventTensor.from_dense(torch.zeros(0, 3))).startswith("EventTensor(shape=[0, 3], events=0, density=0 %")


def test_density():
    assert events().density == 0.5
    assert EventTensor.from_dense(torch.zeros(4, 0)).density == 0
    x = EventTensor.from_dense(spikes((3, 2, 4), 0.5, 1))
    assert sum(step.nnz for step in x) == x.nnz
    assert x[1].density == x[1].nnz / 8


# The constructor's checks: the kernels trust what passes them.


def test_a_right_one_passes():
    x = events(values=torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(x.to_dense(), torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    assert events(row_ptr=ints(1, 2, 3), indices=ints(9, 0, 1, 9)).nnz == 2  # what no row holds is not looked at


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shape": ()}, r"expected a shape \[\.\.\., N\] of at least one dimension, got \[\]"),
        ({"row_ptr": ints(0, 3)}, r"row_ptr must have 3 entries for shape \[2, 3\], got 2"),
        ({"row_ptr": ints(0, 2, 3).long()}, r"row_ptr must be int32 of one dimension, got torch.int64 \[3\]"),
        ({"indices": ints(0, 2, 1).view(1, 3)}, r"indices must be int32 of one dimension, got torch.int32 \[1, 3\]"),
        ({"indices": torch.tensor([0.0, 2.0, 1.0])}, "indices must be int32 of one dimension, got torch.float32"),
        ({"row_ptr": ints(0, 2, 4)}, r"row_ptr must ascend within 0\.\.3, got 0\.\.4"),
        ({"row_ptr": ints(-1, 2, 3)}, r"row_ptr must ascend within 0\.\.3, got -1\.\.3"),
        ({"row_ptr": ints(0, 3, 2)}, r"row_ptr must ascend within 0\.\.3"),
        ({"row_ptr": ints(0, 9, 3)}, r"row_ptr must ascend within 0\.\.3"),
        ({"indices": ints(0, 3, 1)}, r"indices must lie in 0\.\.2, got 0\.\.3"),
        ({"indices": ints(-1, 2, 1)}, r"indices must lie in 0\.\.2, got -1\.\.2"),
        ({"indices": ints(2, 0, 1)}, "indices must ascend within each row, without repeats"),
        ({"indices": ints(1, 1, 1)}, "indices must ascend within each row, without repeats"),
        ({"values": torch.ones(2)}, r"values must have shape \[3\], got \[2\]"),
        ({"values": torch.ones(3, 1)}, r"values must have shape \[3\], got \[3, 1\]"),
        ({"handle": torch.ones(3, 2)}, r"handle must have shape \[2, 3\], got \[3, 2\]"),
        ({"active_ptr": ints(0, 1, 1)}, "active_ptr and active_indices must be given together"),
        ({"active_indices": ints(0)}, "active_ptr and active_indices must be given together"),
        ({"active_ptr": ints(0, 1), "active_indices": ints(0)}, "active_ptr must have 3 entries"),
        ({"active_ptr": ints(0, 1, 1), "active_indices": ints(3)}, r"active_indices must lie in 0\.\.2, got 3\.\.3"),
        ({"active_ptr": ints(0, 1, 2), "active_indices": ints(0)}, r"active_ptr must ascend within 0\.\.1"),
        ({"active_ptr": ints(1, 1, 2), "active_indices": ints(0, 1)}, r"active_ptr must go from 0 to 2, .* got 1\.\.2"),
        ({"active_ptr": ints(0, 1, 1), "active_indices": ints(0, 1)}, r"active_ptr must go from 0 to 2, .* got 0\.\.1"),
        (
            {"handle": torch.ones(2), "active_ptr": ints(0, 1, 1), "active_indices": ints(0)},
            r"handle must have shape \[1\], got \[2\]",
        ),
    ],
)
def test_constructor_refuses(parts, message):
    with pytest.raises(ValueError, match="EventTensor: " + message):
        events(**parts)


def test_the_same_column_in_neighbouring_rows_is_fine():
    assert events(row_ptr=ints(0, 1, 2), indices=ints(1, 1)).nnz == 2
    assert events((4, 3), row_ptr=ints(0, 1, 1, 1, 2), indices=ints(2, 0)).nnz == 2


def test_unordered_parts_are_taken_contiguous_or_not():
    """Every second of an array, as slicing a recording gives it."""
    both = torch.stack([ints(0, 2, 1), ints(7, 7, 7)], 1)
    values = torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])[:, 0]
    x = EventTensor((2, 3), torch.stack([ints(0, 2, 3)] * 2, 1)[:, 0], both[:, 0], values)
    expected = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    assert torch.equal(x.to_dense(), expected)
    weight = normal((4, 3), 0, torch.float32)
    current = functional.linear_leaky(EventTensor((2, 1, 3), x.row_ptr, x.indices, x.values), weight, beta=0.5,
                                      spike_grad=fast_sigmoid(), b_th=0.1, reset="none")  # fmt: skip
    assert_close(current.mem, (0.5 * expected[:1] + expected[1:]) @ weight.t(), rtol=1e-5)


def test_what_is_made_of_events_that_were_written_to():
    x = EventTensor.from_dense(torch.eye(4).view(2, 2, 4))
    x[0] = 2.0
    written = x.to_dense()
    assert torch.equal(EventTensor.collate([x, x]).to_dense()[:, 0], written)
    assert torch.equal(x.step(0).to_dense(), written[0])
    assert torch.equal(x.without_handle().to_dense(), written)


@pytest.mark.parametrize("dt", [0, -1.0, math.nan, math.inf])
def test_a_step_that_is_no_time(dt):
    with pytest.raises(ValueError, match="dt must be a positive number"):
        EventTensor.from_times([0.0, 1.0], [0, 1], 4, 3, dt=dt)


def test_times_that_have_no_sign():
    x = EventTensor.from_times(np.array([1, 3], np.uint32), np.array([0, 1]), 4, 2)
    assert x.to_dense().nonzero().tolist() == [[1, 0], [3, 1]]


def test_options_of_a_conversion():
    x = EventTensor.from_dense(torch.eye(4))
    copied = x.to(torch.float64, copy=True)
    assert copied.dtype is torch.float64 and x.to(torch.float32, copy=True).indices is not x.indices
    assert x.double(memory_format=torch.preserve_format).dtype is torch.float64
