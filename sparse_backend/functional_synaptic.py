"""The sequence ops of snnTorch's neurons with a synaptic current or recurrent weights, part of `functional`.

>>> import torch
>>> from sparse_backend import EventTensor, functional as F
>>> def fast_sigmoid(x, slope=100.0):
...     soft = x / (1 + slope * x.abs())
...     return (x > 0).to(x.dtype) + (soft - soft.detach())
>>> _ = torch.manual_seed(0)
>>> x = EventTensor.from_dense((torch.rand(20, 4, 30) < 0.1).float())  # [T, B, M] spikes
>>> weight, recurrent = torch.nn.Parameter(torch.randn(10, 30)), torch.nn.Parameter(torch.randn(10, 10))
>>> out = F.linear_synaptic(x, weight, alpha=0.8, beta=0.9, recurrent=recurrent, spike_grad=fast_sigmoid, b_th=0.2)
>>> out.spikes.shape, out.mem.shape, out.syn.shape
(torch.Size([20, 4, 10]), torch.Size([4, 10]), torch.Size([4, 10]))
>>> out.spikes.sum().backward()
>>> recurrent.grad.shape
torch.Size([10, 10])
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_backend import policy
from sparse_backend.arguments import (
    check_neurons,
    check_recurrent,
    check_reset,
    given_current,
    linear_current,
)
from sparse_backend.dynamics import RESETS, discrete
from sparse_backend.events import EventTensor
from sparse_backend.functional_lif import run_neurons
from sparse_backend.surrogate import SpikeGrad


class SynapticSequence(NamedTuple):
    """A layer's answer: `spikes` [T, B, N]; membrane `mem` and synaptic current `syn`, [B, N] after the last step or
    [T, B, N] of all steps. syn is None for neurons without one."""

    spikes: EventTensor
    mem: Tensor
    syn: Tensor | None


def linear_synaptic(
    x: EventTensor | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float | Tensor,
    alpha: float | Tensor | None = None,
    threshold: float | Tensor = 1.0,
    reset: str = "subtract",
    spike_grad: SpikeGrad,
    b_th: policy.BTh = "auto",
    mem: Tensor | None = None,
    syn: Tensor | None = None,
    recurrent: Tensor | None = None,
    spk: Tensor | None = None,
    return_states: bool = False,
) -> SynapticSequence:
    """A linear layer and snnTorch's second-order neurons over a whole sequence, I = x W^T + b:

        syn = alpha syn + I;  V = beta V + syn, with r = H(V - threshold) of the step before
        V - r threshold ("subtract"), (1 - r) V ("zero") or V ("none");  S = H(V - threshold)

    snnTorch's Synaptic; without alpha there is no synaptic current, and with recurrent weights it is its RLeaky. Here
    "zero" clears all of V, the step's current included, where `linear_leaky` clears what is left of the step before.

    x, weight, bias: as in `linear_leaky`; beta, alpha, threshold: numbers or tensors of one or N entries; mem, syn:
    [B, N] before the first step, zeros if None; recurrent: [N, N] weights from the spikes of the step before, which are
    spk, [B, N], at the first step, zeros if None. All floating point tensors share one dtype, float32 or float64, and
    one device; on CUDA x and weights may be half or bfloat16, as there.

    Gradients reach every tensor given that requires them, and are those of ordinary back-propagation with the surrogate
    masked to |V - threshold| < b_th, in the recurrence too. alpha and beta are used as given: clamp them yourself where
    you learn them.

    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: neurons as snntorch/_neurons/synaptic.py, rleaky.py and rsynaptic.py.
    """
    return _synaptic(
        linear_current(x, weight, bias), (beta, alpha, threshold), reset, spike_grad, b_th, mem, syn, recurrent, spk,
        return_states,
    )  # fmt: skip


def synaptic(
    current: Tensor,
    *,
    beta: float | Tensor,
    alpha: float | Tensor | None = None,
    threshold: float | Tensor = 1.0,
    reset: str = "subtract",
    spike_grad: SpikeGrad,
    b_th: policy.BTh = "auto",
    mem: Tensor | None = None,
    syn: Tensor | None = None,
    recurrent: Tensor | None = None,
    spk: Tensor | None = None,
    return_states: bool = False,
) -> SynapticSequence:
    """The neurons alone, over a sequence of any currents [T, B, N]; the rest as `linear_synaptic`."""
    return _synaptic(
        given_current(current), (beta, alpha, threshold), reset, spike_grad, b_th, mem, syn, recurrent, spk,
        return_states,
    )  # fmt: skip


def _synaptic(
    current: Any,
    values: tuple[Any, ...],
    reset: str,
    spike_grad: SpikeGrad,
    b_th: policy.BTh,
    mem: Tensor | None,
    syn: Tensor | None,
    recurrent: Tensor | None,
    spk: Tensor | None,
    return_states: bool,
) -> SynapticSequence:
    code = check_reset(reset, RESETS)
    coefficients = dict(zip(("beta", "alpha", "threshold"), values, strict=True))
    shape, (beta, alpha, threshold) = check_neurons(current, coefficients, ("alpha",), mem=mem, syn=syn)
    if syn is not None and alpha is None:
        raise ValueError("syn: expected None without alpha, got a tensor")
    recurrent = check_recurrent(current, recurrent, spk, "spk")
    neuron = discrete(beta, alpha, threshold, code)
    return SynapticSequence(
        *run_neurons(current, shape, neuron, spike_grad, b_th, mem, syn, recurrent, spk, return_states)
    )
