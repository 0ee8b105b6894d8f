"""Layers that are better run densely: whose lists would be long, and whose sequences would be too large at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_loops import BATCH, HIDDEN, STEPS, Net, check, frames, net_of, recorded
from pairs import WAYS, Way, assert_equal_runs, enabled, leaky
from torch import Tensor, nn

import sparse_backend
from sparse_backend import policy

STEP_BYTES = BATCH * HIDDEN * 8


def usual(net: Net, x: Any) -> Any:
    spikes, membranes, last = recorded(net, x)
    return torch.stack(spikes), torch.stack(membranes), last


@pytest.mark.parametrize("at_once", [1, 2, 3, STEPS])
@pytest.mark.parametrize("way", ["inf", "band"])
def test_large_dense_layers_run_few_steps_at_once(monkeypatch: pytest.MonkeyPatch, way: str, at_once: int) -> None:
    monkeypatch.setattr(policy, "LARGE_STEP_BYTES", STEP_BYTES)
    monkeypatch.setattr(policy, "DENSE_BYTES", STEP_BYTES * at_once)
    net = check(WAYS[way], usual)
    first = sparse_backend.report(net).layers[0]
    assert first.at_once <= at_once if way == "inf" else first.at_once == STEPS


@pytest.mark.parametrize("size", [STEP_BYTES, STEP_BYTES + 1])
def test_small_ones_run_all(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(policy, "LARGE_STEP_BYTES", size)
    monkeypatch.setattr(policy, "DENSE_BYTES", 1)
    first = sparse_backend.report(check(WAYS["inf"], usual)).layers[0]
    assert first.at_once == (STEPS if size > STEP_BYTES else 1)


class Normed(nn.Module):
    """A norm makes the current dense; gain decides how many neurons spike."""

    def __init__(self, spike_grad: Any, gain: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(30)
        self.lif = leaky(spike_grad, 0.9, 0.7)
        nn.init.constant_(self.norm.weight, gain)
        self.double()

    def forward(self, x: Tensor) -> Any:
        mem, out = self.lif.reset_mem(), []
        for step in x:
            spk, mem = self.lif(self.norm(step), mem)
            out.append(spk)
        return torch.stack(out), mem


def normed(way: Way, gain: float, runs: int) -> Any:
    x = torch.randn(STEPS, 8, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return assert_equal_runs(lambda grad: Normed(grad, gain), lambda net: net(x), way, runs=runs)


@pytest.mark.parametrize("fuse_time", [True, False])
def test_a_crowded_layer_goes_dense(fuse_time: bool) -> None:
    way = Way(1.0, fuse_time=fuse_time)
    (layer,) = sparse_backend.report(normed(way, 1.5, 3)).layers
    assert layer.reason == policy.WHY_CROWDED
    assert layer.steps["sparse"] and layer.steps["dense"]


@pytest.mark.parametrize("fuse_time", [True, False])
def test_a_quiet_one_does_not(fuse_time: bool) -> None:
    (layer,) = sparse_backend.report(normed(Way(0.1, fuse_time=fuse_time), 0.3, 3)).layers
    assert layer.reason is None and not layer.steps["dense"]


def test_what_comes_from_events_is_judged_by_its_active_entries_alone() -> None:
    """A linear layer's current is never made there."""
    net = enabled(net_of(usual), Way(0.35))
    with torch.no_grad():
        for layer in (net.fc1, net.fc2, net.fc3):
            layer.bias.fill_(0.6)  # enough to spike now and then
    for _ in range(3):
        net(frames(density=0.2))
    first, *_ = sparse_backend.report(net).layers
    assert first.active is not None and first.spikes is not None
    assert first.active + first.spikes > policy.MAX_LISTED and first.active < policy.MAX_ACTIVE
    assert first.steps["dense"] == 0 and first.reason is None
