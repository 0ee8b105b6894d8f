"""What is done differently on a GPU, in Python: the branches that CUDA tensors take, taken here by tensors on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_loops import BATCH, INPUTS, Net, frames, net_of, recorded, stock_and_enabled
from helpers import assert_close, fast_sigmoid, normal, spikes
from pairs import SPIKE_GRAD, WAYS
from torch import Tensor, nn

import sparse_backend
from sparse_backend import EventTensor, functional, policy, surrogate
from sparse_backend.deferred import WeightCache
from sparse_backend.layers import LinearState

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is there as soon as it is asked for."""
    monkeypatch.setattr(policy, "reads_at_once", lambda device: False)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch, without_numbers: None) -> Any:
    """A function that says whether a CUDA graph is recorded from now on."""
    yes = [False]
    monkeypatch.setattr(policy, "is_captured", lambda x: yes[0])
    return lambda now: yes.__setitem__(0, now)


def usual(net: Net, x: Any) -> Any:
    spk_rec, mem_rec, _ = recorded(net, x)
    return torch.stack(spk_rec), torch.stack(mem_rec)


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_fused_optimizers_write_without_a_version(without_numbers: None, optimizer: Any, fuse_time: bool) -> None:
    losses = []
    for kind in ("stock", "ours"):
        net = net_of(usual, learn_beta=True)(SPIKE_GRAD)
        if kind == "ours":
            sparse_backend.enable(net, b_th=float("inf"), fuse_time=fuse_time)
        steps = optimizer(net.parameters(), lr=0.05, fused=True)
        losses.append([])
        for _ in range(4):
            steps.zero_grad()
            spk, mem = net(frames())
            loss = ((mem - 0.5) ** 2).mean() + spk.mean()
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_a_capture_looks_at_no_number_and_keeps_nothing(captured: Any) -> None:
    state, x = LinearState(), spikes((BATCH, INPUTS), 0.1, 1)
    warm = state.events_of(x)
    assert type(warm) is EventTensor and state.events_of(x) is warm
    captured(True)
    assert state.events_of(x) is None, "a replay is to read the buffer, whatever it then holds"
    captured(False)
    assert state.events_of(x) is warm


def test_a_capture_copies_weights_itself(captured: Any) -> None:
    cache, weight = WeightCache(), nn.Parameter(normal((4, 5), 1))
    before = cache.hub(weight, None, None)
    assert cache.hub(weight, None, None) is before
    captured(True)
    inside = cache.hub(weight, None, None)
    assert inside is not before and inside is not None and before is not None
    assert inside.weight.data_ptr() != before.weight.data_ptr()
    captured(False)
    assert cache.hub(weight, None, None) is not inside


@pytest.mark.parametrize("events", [True, False])
def test_sequences_run_inside_a_capture(captured: Any, events: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("looked at a number")

    (theirs, _), (ours, _) = stock_and_enabled(WAYS["inf"], usual)
    expected = theirs(frames())
    x: Any = EventTensor.from_dense(frames()) if events else frames()
    captured(True)
    monkeypatch.setattr(EventTensor, "density", property(refuse))
    if not events:
        monkeypatch.setattr(EventTensor, "if_sparse", refuse)
    for a, b in zip(ours(x), expected, strict=True):
        assert_close(a + 0, b)


def test_the_functional_layers_run_inside_a_capture(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("looked at a number")

    x, weight = spikes((6, BATCH, INPUTS), 0.6, 1), normal((7, INPUTS), 2)
    layer = dict(beta=torch.tensor(0.9).double(), threshold=torch.tensor(0.7).double(), spike_grad=SPIKE_GRAD, b_th=0.2)
    events = EventTensor.from_dense(x)
    expected, _ = functional.linear_leaky(events, weight, **layer)
    captured(True)
    monkeypatch.setattr(EventTensor, "density", property(refuse))
    spk, _ = functional.linear_leaky(events, weight, **layer)
    assert_close(spk.to_dense(), expected.to_dense())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_surrogates_are_inspected_on_a_cpu_whatever_the_default_device(device: str) -> None:
    def spike_grad(x: Tensor) -> Tensor:
        return fast_sigmoid(7.0)(x)

    torch.set_default_device(device)
    try:
        known = surrogate.inspect(spike_grad)
    finally:
        torch.set_default_device(None)
    assert known.problem is None and known.auto_b_th == pytest.approx(19 / 7, rel=1e-2)
