"""Which share of a network's neurons spike and are active, counted the same way whether it is enabled or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_backend import policy, reporting
from sparse_backend.demo.train import stock_activity

if TYPE_CHECKING:
    from .train import Experiment


@dataclass(frozen=True)
class Activity:
    """% of all (t, b, j), by hidden layer."""

    spikes: list[float]
    active: list[float]

    def to_dict(self) -> dict[str, list[float]]:
        return {"spikes_pct": self.spikes, "active_pct": self.active}


def activity(net: nn.Module, x: Any, experiment: Experiment) -> Activity:
    """Of the hidden layers on one input [T, B, N]; `active` is |V − θ| < B_th with the preset's B_th."""
    return _stock(net, x, experiment) if experiment.stock else _enabled(net, x)


@torch.no_grad()
def _enabled(net: nn.Module, x: Any) -> Activity:
    reporting.report(net, reset=True)
    net(x)
    layers = [layer for layer in reporting.report(net, reset=True).layers if layer.name.startswith("neurons.")]
    return Activity(
        [100 * (layer.spikes or 0.0) for layer in layers], [100 * (layer.active or 0.0) for layer in layers]
    )


def _stock(net: Any, x: Any, experiment: Experiment) -> Activity:
    b_th = experiment.preset.b_th
    widths = {
        f"neurons.{layer}": float(policy.resolve_b_th(b_th, neuron.spike_grad))
        for layer, neuron in enumerate(net.neurons)
    }
    active, spikes = zip(*stock_activity(net, x, widths).values(), strict=True)
    return Activity(list(spikes), list(active))
