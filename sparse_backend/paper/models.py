"""The paper's networks (appendix E.2, E.3) as plain snnTorch code, with nothing in it that knows of sparse_backend."""

from __future__ import annotations

import itertools
import math

import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn

from .presets import Preset


class Feedforward(nn.Module):
    """Hidden layers of leaky neurons and a readout that integrates and never fires."""

    def __init__(self, inputs: int, classes: int, preset: Preset) -> None:
        super().__init__()
        sizes = (inputs, *preset.hidden)
        self.linears = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(sizes))
        self.neurons = nn.ModuleList(snn.Leaky(preset.beta, spike_grad=_surrogate(preset)) for _ in preset.hidden)
        self.output = nn.Linear(sizes[-1], classes)
        self.readout = snn.Leaky(preset.beta, spike_grad=_surrogate(preset), reset_mechanism="none")
        if preset.initial == "normal":
            for layer in (*self.linears, self.output):
                normal_(layer, preset)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Spikes ``[T, B, N]`` to the readout's membrane ``[T, B, classes]`` and each hidden layer's spikes."""
        mems = [neuron.reset_mem() for neuron in self.neurons]
        mem_out = self.readout.reset_mem()
        spikes: list[list[Tensor]] = [[] for _ in self.neurons]
        trace = []
        for step in range(x.shape[0]):
            spk = x[step]
            for i, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                spk, mems[i] = neuron(linear(spk), mems[i])
                spikes[i].append(spk)
            _, mem_out = self.readout(self.output(spk), mem_out)
            trace.append(mem_out)
        return torch.stack(trace), [torch.stack(layer) for layer in spikes]


class Convolutional(nn.Module):
    """The convolutional variant: 64 filters of 3, stride 1, max-pool of 2, 64 · 14 · 14 = 12544 neurons, a readout."""

    def __init__(self, inputs: int, classes: int, preset: Preset) -> None:
        super().__init__()
        self.side = math.isqrt(inputs)
        if self.side**2 != inputs or self.side % 2:
            raise ValueError(f"inputs must be the pixels of a square image with an even side, got {inputs}")
        self.conv, self.pool = nn.Conv2d(1, 64, 3, padding=1), nn.MaxPool2d(2)
        self.neurons = nn.ModuleList([snn.Leaky(preset.beta, spike_grad=_surrogate(preset))])
        self.output = nn.Linear(64 * (self.side // 2) ** 2, classes)
        self.readout = snn.Leaky(preset.beta, spike_grad=_surrogate(preset), reset_mechanism="none")
        if preset.initial == "normal":
            normal_(self.conv, preset)
            normal_(self.output, preset)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Spikes ``[T, B, side²]``; as :class:`Feedforward`."""
        mem, mem_out = self.neurons[0].reset_mem(), self.readout.reset_mem()
        spikes, trace = [], []
        for step in range(x.shape[0]):
            image = x[step].view(-1, 1, self.side, self.side)
            spk, mem = self.neurons[0](self.pool(self.conv(image)), mem)
            spikes.append(spk)
            _, mem_out = self.readout(self.output(spk.flatten(1)), mem_out)
            trace.append(mem_out)
        return torch.stack(trace), [torch.stack(spikes)]


def build(inputs: int, classes: int, preset: Preset) -> nn.Module:
    """The preset's network with random weights, from torch's generator."""
    return {"feedforward": Feedforward, "conv": Convolutional}[preset.net](inputs, classes, preset)


def normal_(layer: nn.Linear | nn.Conv2d, preset: Preset) -> None:
    """The paper's initialisation for Fashion-MNIST: std 20 (1 − e^(−Δt/τ)) / √N, N the inputs of a neuron; no bias."""
    inputs = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=20 * (1 - preset.beta) / math.sqrt(inputs))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _surrogate(preset: Preset):
    return surrogate.fast_sigmoid(slope=preset.slope) if preset.slope else surrogate.atan(alpha=2.0)
