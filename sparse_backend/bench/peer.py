"""The same sizes and weights in SpikingJelly, whose fused loop over time is the best known dense one.

Its neuron is another one, whose reset decays with the membrane: U[t] = beta V[t-1] + I[t], S[t] = H(U[t] - threshold),
V[t] = U[t] - threshold S[t]. So it is judged by a plain loop over these documented equations, with its own surrogate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_backend.bench.leaky_nets import LeakyNet
from sparse_backend.bench.models import Output

NEVER = 1e9  # a threshold that nothing reaches: the readout
NOTE = "its own neuron, whose reset decays, with its ATan; checked against a plain loop of that"


def forward_of(net: LeakyNet) -> Callable[[Tensor], Output]:
    """The forward pass by SpikingJelly's multi-step neurons. Raises ImportError where it cannot be imported."""
    from spikingjelly.activation_based import functional

    last = len(net.linears) - 1
    nodes = [_node(neuron, layer == last) for layer, neuron in enumerate(net.neurons)]

    def forward(x: Tensor) -> Output:  # [T, B, inputs]
        hidden = []
        for linear, node in zip(net.linears, nodes, strict=True):
            functional.reset_net(node)
            x = node(torch.nn.functional.linear(x, linear.weight, linear.bias))
            if net.return_hidden and node is not nodes[-1]:
                hidden.append(x)
        return Output(None, nodes[-1].v_seq, hidden)

    return forward


def _node(neuron: Any, readout: bool) -> Any:
    from spikingjelly.activation_based import neuron as neurons

    node = neurons.LIFNode(
        tau=1 / (1 - float(neuron.beta)),
        decay_input=False,
        v_threshold=NEVER if readout else float(neuron.threshold),
        v_reset=None,
        surrogate_function=_surrogate(),
        detach_reset=True,
        step_mode="m",
        store_v_seq=readout,
    )
    fused = "cupy" in getattr(node, "supported_backends", ()) and importlib.util.find_spec("cupy") is not None
    if fused and neuron.beta.is_cuda:  # newer versions have no such choice, and fuse by themselves
        node.backend = "cupy"
    return node


def _surrogate() -> nn.Module:
    from spikingjelly.activation_based import surrogate

    return surrogate.ATan()


def judge(net: LeakyNet) -> Callable[[Tensor], Output]:
    """Its documented equations, step by step."""
    surrogate, last = _surrogate(), len(net.linears) - 1

    def forward(x: Tensor) -> Output:  # [T, B, inputs]
        hidden = []
        for layer, (linear, neuron) in enumerate(zip(net.linears, net.neurons, strict=True)):
            beta = float(neuron.beta)
            mem, seen = torch.zeros((), dtype=x.dtype, device=x.device), []
            for current in torch.nn.functional.linear(x, linear.weight, linear.bias):
                mem = beta * mem + current
                if layer == last:
                    seen.append(mem)
                else:
                    seen.append(surrogate(mem - neuron.threshold))
                    mem = mem - seen[-1].detach() * neuron.threshold
            x = torch.stack(seen)
            if net.return_hidden and layer < last:
                hidden.append(x)
        return Output(None, x, hidden)

    return forward
