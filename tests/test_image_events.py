"""Events of images: pooling, dropout, parts of a sequence, and Norse's `Lift`, against torch on dense images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, generator, normal, spikes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_backend
from sparse_backend import EventTensor, _native, convolution
from sparse_backend.ops.events_pool import events_pool
from sparse_backend.reference import events as event_twins
from sparse_backend.reference import events_pool as twin

pytestmark = pytest.mark.kernels

F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def kernels():
    _native.load()


@pytest.fixture
def everywhere(monkeypatch):
    """Sparse forms where kernels are missing too: the twin then runs."""
    monkeypatch.setattr(convolution, "available", lambda device: True)


def compact(shape: Any, density: float, active: float, seed: int) -> tuple[EventTensor, Tensor, Tensor]:
    """Spikes with a compact handle, their dense form as a leaf, and where they are active: [R, ...] of images."""
    dense = spikes(shape, density, seed)
    mask = spikes(shape, active, seed + 1) != 0
    columns = dense[0].numel()
    row_ptr, indices = event_twins.compress(dense.flatten(1) != 0)
    active_ptr, active_indices = event_twins.compress(mask.flatten(1))
    handle = dense[mask].requires_grad_()
    events = EventTensor(
        shape, row_ptr, indices, handle=handle, active_ptr=active_ptr, active_indices=active_indices, columns=columns
    )
    return events, dense.requires_grad_(), mask


def agree(ours: Any, theirs: Tensor, events: EventTensor, dense: Tensor, mask: Tensor, seed: int = 0) -> None:
    """Values are the same, and so is the gradient at active entries, through the dense form and through the handle."""
    assert type(ours) is EventTensor and ours.is_events
    assert_close(ours.to_dense().detach(), theirs.detach())
    weight = normal(theirs.shape, seed + 5)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), dense)
    (got,) = torch.autograd.grad((ours.to_dense() * weight).sum(), events.handle)
    assert_close(got, expected[mask])


# Pooling.


@settings(deadline=None, max_examples=80)
@given(
    rows=st.sampled_from([1, 2, 65]),
    channels=st.sampled_from([1, 2, 5]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    active=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    average=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pooling_as_torch(rows, channels, height, width, window, density, active, average, seed):
    window = (min(window[0], height), min(window[1], width))
    events, dense, mask = compact((rows, channels, height, width), density, active, seed)
    pool = F.avg_pool2d if average else F.max_pool2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "available", lambda device: True)
        ours = pool(events, window)
    agree(ours, pool(dense, window), events, dense, mask, seed)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 3, 64, 130]),
    channels=st.sampled_from([1, 3, 7]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    active=st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
    average=st.booleans(),
    sliced=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pooling_kernel_is_its_twin(rows, channels, height, width, window, density, active, average, sliced, seed):
    window = (min(window[0], height), min(window[1], width))
    extra = 2 if sliced else 0
    shape = (rows + extra, channels * height * width)
    row_ptr, indices = event_twins.compress(spikes(shape, density, seed) != 0)
    active_ptr = active_indices = None
    if active is not None:
        active_ptr, active_indices = event_twins.compress(spikes((rows, shape[1]), active, seed + 1) != 0)
    args = (row_ptr[extra:], indices, active_ptr, active_indices, channels, height, width, *window, average)
    for ours, theirs in zip(events_pool(*args), twin.events_pool(*args), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("average", [False, True])
def test_pooling_op_is_a_torch_op(average):
    events, _, _ = compact((3, 2, 6, 5), 0.2, 0.3, 0)
    parts = (events.row_ptr, events.indices, events.active_ptr, events.active_indices)
    torch.library.opcheck(events_pool, (*parts, 2, 6, 5, 2, 2, average))


def test_pooling_refuses_a_window_outside():
    events, _, _ = compact((3, 2, 6, 5), 0.2, 0.3, 0)
    with pytest.raises(RuntimeError, match=r"expected a window within \[6, 5\], got \[7, 2\]"):
        events_pool(events.row_ptr, events.indices, None, None, 2, 6, 5, 7, 2, False)


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"padding": 1}, {"ceil_mode": True}, {"kernel_size": 3, "stride": 2}, {"return_indices": True}],
    ids=str,
)
def test_other_pooling_is_torchs(everywhere, options):
    events, dense, mask = compact((4, 2, 7, 7), 0.2, 0.4, 1)
    kernel = options.pop("kernel_size", 2)
    ours, theirs = (F.max_pool2d(x, kernel, **options) for x in (events, dense))
    if isinstance(theirs, tuple):
        assert torch.equal(ours[1], theirs[1])
        ours, theirs = ours[0], theirs[0]
    assert type(ours) is Tensor
    assert_close(ours.detach(), theirs.detach())
    (expected,) = torch.autograd.grad(theirs.sum(), dense)
    (got,) = torch.autograd.grad(ours.sum(), events.handle)
    assert_close(got, expected[mask])


def test_pooling_of_graded_spikes_is_torchs(everywhere):
    dense = spikes((4, 2, 6, 6), 0.3, 0, graded=True)
    ours = F.max_pool2d(EventTensor.from_dense(dense, row_dims=3), 2)
    assert type(ours) is Tensor
    assert_close(ours, F.max_pool2d(dense, 2))


# Dropout.


@pytest.mark.parametrize(
    ("drop", "shape"),
    [(F.dropout, (9, 4, 30)), (F.dropout, (5, 2, 6, 6)), (F.dropout1d, (5, 4, 9)), (F.dropout2d, (5, 8, 3, 3))],
    ids=["flat", "images", "1d", "2d"],
)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_dropout_as_torch(drop, shape, p):
    flat = compact((shape[0], *shape[1:]), 0.3, 0.5, 3)
    events, dense, mask = flat
    torch.manual_seed(11)
    theirs = drop(dense, p, True)
    torch.manual_seed(11)
    ours = drop(events, p, True)
    if p == 1.0:
        ours = EventTensor.from_dense(ours)
        assert_close(ours.to_dense().detach(), theirs.detach())
    else:
        agree(ours, theirs, events, dense, mask)
        assert ours.nnz == int(torch.count_nonzero(theirs))
    assert drop(events, p, False) is events


def test_dropout_of_dropped_and_of_sliced_events():
    dense = spikes((6, 3, 20), 0.4, 0)
    x = EventTensor.from_dense(dense)
    torch.manual_seed(5)
    ours = F.dropout(F.dropout(x[2], 0.5), 0.5)
    torch.manual_seed(5)
    theirs = F.dropout(F.dropout(dense[2], 0.5), 0.5)
    assert type(ours) is EventTensor
    assert_close(ours.to_dense(), theirs)


# Parts of a sequence.


@pytest.mark.parametrize("span", [(0, 6), (0, 1), (2, 5), (5, 6)])
@pytest.mark.parametrize("handle", ["none", "compact", "dense"])
def test_some_steps(span, handle):
    events, dense, mask = compact((12, 2, 3, 3), 0.3, 0.5, 0)
    if handle == "none":
        events = events.without_handle()
    elif handle == "dense":
        dense = dense.detach().requires_grad_()
        events = EventTensor.from_dense(dense, row_dims=3)
    sequence = events.reshaped(torch.Size((6, 2, 2, 3, 3)))
    part = sequence.some_steps(*span)
    expected = dense.view(6, 2, 2, 3, 3)[slice(*span)]
    assert (part is sequence) == (span == (0, 6))
    assert part.shape == expected.shape
    assert_close(part.to_dense().detach(), expected.detach())
    if handle != "none":
        weight = torch.rand(expected.shape, dtype=F64, generator=generator(1))
        (theirs,) = torch.autograd.grad((expected * weight).sum(), dense)
        (ours,) = torch.autograd.grad((part.to_dense() * weight).sum(), events.handle)
        assert_close(ours, theirs if handle == "dense" else theirs[mask])


def test_steps_like_knows_its_own_steps():
    x = EventTensor.from_dense(spikes((6, 2, 5), 0.3, 0))
    steps = [x[t] for t in range(6)]
    assert x.steps_like(steps) is x
    assert torch.equal(x.steps_like(steps[1:4]).to_dense(), x.to_dense()[1:4])
    assert x.steps_like(steps[::-1]) is None
    assert x.steps_like([*steps[4:], steps[0]]) is None
    assert x.steps_like([EventTensor.from_dense(spikes((2, 5), 0.3, 0))]) is None


# Norse.


@pytest.mark.parametrize("b_th", [0.4, float("inf")])
def test_lift_of_image_layers_runs_all_steps_at_once(monkeypatch, b_th):
    norse = pytest.importorskip("norse.torch")

    def model() -> nn.Module:
        torch.manual_seed(0)
        p = norse.LIFParameters(method="tanh", alpha=10.0)
        net = norse.SequentialState(
            norse.Lift(nn.Conv2d(1, 4, 3)), norse.LIF(p), norse.Lift(nn.MaxPool2d(2)), norse.Lift(nn.Conv2d(4, 6, 3)),
            norse.Lift(nn.AvgPool2d(2)), norse.LIF(p), norse.Lift(nn.Flatten()), norse.Lift(nn.Linear(6, 3)),
        )  # fmt: skip
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.data.mul_(8)
        return net.double()

    called = []
    of_torch = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *a: called.append(self) or of_torch(self, *a))
    x = spikes((7, 3, 1, 12, 12), 0.2, 4)
    results = []
    for on_events in (False, True):
        monkeypatch.setattr(convolution, "available", lambda device, on=on_events: on)
        net = sparse_backend.enable(model(), b_th=b_th)
        called.clear()
        out, _ = net(x)
        calls = len(called)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad for p in net.parameters()]))
    assert calls == (2 if b_th == 0.4 else 1 + 7)  # with b_th infinite spikes are dense
    assert all(bool(grad.any()) for grad in results[0][1])
    assert_close(results[1][0], results[0][0])
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        assert_close(ours, theirs)
