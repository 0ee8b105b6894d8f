"""snnTorch's networks, and what the benchmark asks of the framework (`models.Framework`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn

from sparse_backend.bench.cases import Case
from sparse_backend.bench.leaky_nets import (
    BETA,
    SLOPE,
    LeakyNet,
    currents,
    exact,
    given,
    initial,
    intercepted,
    nets,
    oracle,
    surrogate_of,
)
from sparse_backend.bench.models import Output

__all__ = ["NETS", "SURROGATES", "currents", "exact", "given", "intercepted", "neurons", "oracle", "surrogate_of"]

SURROGATES: dict[str, tuple[str, Callable[[], Any]]] = {
    "fast_sigmoid": (f"fast_sigmoid(slope={SLOPE})", lambda: surrogate.fast_sigmoid(slope=SLOPE)),
    "broad": ("fast_sigmoid(slope=25)", lambda: surrogate.fast_sigmoid(slope=25)),
    "atan": ("atan(), snnTorch's default", surrogate.atan),
}


ALPHA = math.exp(-1 / 5)  # of synaptic currents, a time constant of 5 steps


def neurons(count: int, spike_grad: Any) -> nn.ModuleList:
    hidden = [snn.Leaky(beta=BETA, spike_grad=spike_grad) for _ in range(count - 1)]
    return _with_readout(hidden, spike_grad)


def _with_readout(hidden: list[Any], spike_grad: Any) -> nn.ModuleList:
    made = nn.ModuleList([*hidden, snn.Leaky(beta=BETA, spike_grad=spike_grad, reset_mechanism="none")])
    for neuron in made:  # the class's list of all neurons would keep every benchmarked one alive
        snn.SpikingNeuron.instances.remove(neuron)
    return made


class StatesNet(LeakyNet):
    """The same with hidden neurons that have more states than a membrane."""

    def forward(self, x: Tensor) -> Output:  # [T, B, inputs]
        states = [_tuple(neuron.reset_mem()) for neuron in self.neurons]
        mem_rec: list[Tensor] = []
        spk_rec: list[list[Tensor]] = [[] for _ in self.neurons]
        last, every = len(spk_rec) - 1, self.return_hidden
        for step in range(x.shape[0]):
            spk = x[step]
            for layer, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                out = neuron(linear(spk), *states[layer])
                spk, states[layer] = out[0], out[len(out) - len(states[layer]) :]
                if every or layer == last:
                    spk_rec[layer].append(spk)
            mem_rec.append(states[-1][-1])
        return Output(torch.stack(spk_rec[-1]), torch.stack(mem_rec), [torch.stack(rec) for rec in spk_rec[:-1] if rec])


def _tuple(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def _synaptic(neurons: int, spike_grad: Any) -> nn.Module:
    return snn.Synaptic(alpha=ALPHA, beta=BETA, spike_grad=spike_grad)


def _recurrent(neurons: int, spike_grad: Any) -> nn.Module:
    neuron = snn.RLeaky(beta=BETA, linear_features=neurons, spike_grad=spike_grad)
    initial(neuron.recurrent)
    return neuron


def _states_net(make: Callable[[int, Any], nn.Module]) -> Callable[[Case], StatesNet]:
    def build(case: Case) -> StatesNet:
        def neurons(count: int, spike_grad: Any) -> nn.ModuleList:
            return _with_readout([make(size, spike_grad) for size in case.hidden], spike_grad)

        return StatesNet((case.inputs, *case.hidden, case.classes), SURROGATES[case.surrogate][1](), neurons)

    return build


NETS = {
    **nets(neurons, SURROGATES),
    "synaptic": _states_net(_synaptic),
    "recurrent": _states_net(_recurrent),
}
