"""Which share of a network's neurons spike and are active, counted the same way whether it is enabled or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_backend import policy, reporting

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


@torch.no_grad()
def _stock(net: Any, x: Any, experiment: Experiment) -> Activity:
    counts = torch.zeros(len(net.neurons), 3, dtype=torch.float64)  # spikes, active, all
    hooks = []
    for layer, neuron in enumerate(net.neurons):
        width = float(policy.resolve_b_th(experiment.preset.b_th, neuron.spike_grad))

        def count(module: Any, _: Any, output: Any, layer: int = layer, width: float = width) -> None:
            spk, mem = output
            near = (mem - module.threshold).abs() < width if width < math.inf else torch.ones_like(mem)
            counts[layer] += torch.stack([spk.count_nonzero(), near.sum(), torch.tensor(spk.numel())])

        hooks.append(neuron.register_forward_hook(count))
    try:
        net(x)
    finally:
        for hook in hooks:
            hook.remove()
    spikes, active, entries = counts.unbind(1)
    return Activity((100 * spikes / entries).tolist(), (100 * active / entries).tolist())
