"""snnTorch's networks, and what the benchmark asks of the framework (`models.Framework`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch as snn
from snntorch import surrogate
from torch import nn

from sparse_backend.bench.leaky_nets import (
    BETA,
    SLOPE,
    currents,
    exact,
    given,
    intercepted,
    nets,
    oracle,
    surrogate_of,
)

__all__ = ["NETS", "SURROGATES", "currents", "exact", "given", "intercepted", "neurons", "oracle", "surrogate_of"]

SURROGATES: dict[str, tuple[str, Callable[[], Any]]] = {
    "fast_sigmoid": (f"fast_sigmoid(slope={SLOPE})", lambda: surrogate.fast_sigmoid(slope=SLOPE)),
    "atan": ("atan(), snnTorch's default", surrogate.atan),
}


def neurons(count: int, spike_grad: Any) -> nn.ModuleList:
    made = nn.ModuleList(snn.Leaky(beta=BETA, spike_grad=spike_grad) for _ in range(count - 1))
    made.append(snn.Leaky(beta=BETA, spike_grad=spike_grad, reset_mechanism="none"))
    for neuron in made:  # the class's list of all neurons would keep every benchmarked one alive
        snn.SpikingNeuron.instances.remove(neuron)
    return made


NETS = nets(neurons, SURROGATES)
