"""The sequence ops for people who write layers themselves.

>>> import torch
>>> from sparse_backend import EventTensor, functional as F
>>> def fast_sigmoid(x, slope=100.0):  # any Heaviside with a derivative: your framework's, or your own
...     soft = x / (1 + slope * x.abs())
...     return (x > 0).to(x.dtype) + (soft - soft.detach())
>>> _ = torch.manual_seed(0)
>>> x = EventTensor.from_dense((torch.rand(20, 4, 30) < 0.1).float())  # [T, B, M] spikes
>>> weight = torch.nn.Parameter(torch.randn(10, 30) * 0.3)
>>> spikes, mem = F.linear_leaky(x, weight, beta=0.9, spike_grad=fast_sigmoid, b_th=0.2)
>>> spikes.shape, mem.shape
(torch.Size([20, 4, 10]), torch.Size([4, 10]))
>>> spikes.sum().backward()
>>> weight.grad.shape
torch.Size([10, 30])
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_backend import policy
from sparse_backend.arguments import (
    check_like,
    check_reset,
    check_state,
    check_steps,
    check_surrogate,
    check_tensors,
    given_current,
    linear_current,
    per_neuron,
)
from sparse_backend.dynamics import RESETS, Leaky
from sparse_backend.events import EventTensor
from sparse_backend.execute import run_leaky
from sparse_backend.functional_lif import LIFSequence, LISequence, li, lif, linear_li, linear_lif
from sparse_backend.functional_synaptic import SynapticSequence, linear_synaptic, synaptic
from sparse_backend.surrogate import SpikeGrad

__all__ = [
    "LIFSequence",
    "LISequence",
    "LeakySequence",
    "SynapticSequence",
    "leaky",
    "li",
    "lif",
    "linear_leaky",
    "linear_li",
    "linear_lif",
    "linear_synaptic",
    "synaptic",
]


class LeakySequence(NamedTuple):
    """A layer's answer: `spikes` [T, B, N], and `mem`, [B, N] after the last step or [T, B, N] of all steps."""

    spikes: EventTensor
    mem: Tensor


def linear_leaky(
    x: EventTensor | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float | Tensor,
    threshold: float | Tensor = 1.0,
    spike_grad: SpikeGrad,
    b_th: policy.BTh = "auto",
    mem: Tensor | None = None,
    reset: str = "subtract",
    reset_delay: bool = True,
    graded: float | Tensor | None = None,
    return_mem: bool = False,
) -> LeakySequence:
    """A linear layer and leaky neurons over a whole sequence: I = x W^T + b, then V, S as in docs/design.md.

    x: [T, B, M], events or a dense tensor, spikes or any real values; weight: [N, M]; bias: [N]; beta, threshold:
    numbers or tensors of one or N entries; mem: [B, N] before the first step, zeros if None; graded: what a spike is
    worth. All floating point tensors share one dtype, float32 or float64, and one device. On CUDA x, weight and bias
    may be half or bfloat16, all others float32 then. Autocast rounds the weight, on any device.

    Gradients reach x (all of it if it is a dense tensor that requires grad, its active entries if it comes from a
    layer of ours), weight, bias, mem, beta, threshold and graded, and are those of ordinary back-propagation with the
    surrogate masked to |V - threshold| < b_th. beta is used as given: clamp it yourself where you learn it.

    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: Perez-Nieves & Goodman 2021, equations 9-14; neuron as snntorch/_neurons/leaky.py.
    """
    check_tensors(("mem",), mem=mem)
    current = linear_current(x, weight, bias)
    return _leaky(current, beta, threshold, spike_grad, b_th, mem, reset, reset_delay, graded, return_mem)


def leaky(
    current: Tensor,
    *,
    beta: float | Tensor,
    threshold: float | Tensor = 1.0,
    spike_grad: SpikeGrad,
    b_th: policy.BTh = "auto",
    mem: Tensor | None = None,
    reset: str = "subtract",
    reset_delay: bool = True,
    graded: float | Tensor | None = None,
    return_mem: bool = False,
) -> LeakySequence:
    """Leaky neurons over a sequence of any currents [T, B, N]; arguments, results and errors as `linear_leaky`."""
    check_tensors(("mem",), mem=mem)
    current = given_current(current)
    return _leaky(current, beta, threshold, spike_grad, b_th, mem, reset, reset_delay, graded, return_mem)


def _leaky(
    current: Any,
    beta: float | Tensor,
    threshold: float | Tensor,
    spike_grad: SpikeGrad,
    b_th: policy.BTh,
    mem: Tensor | None,
    reset: str,
    reset_delay: bool,
    graded: float | Tensor | None,
    return_mem: bool,
) -> LeakySequence:
    steps, batch, neurons = check_steps(current)
    code = check_reset(reset, RESETS)
    check_state("mem", mem, batch, neurons)
    beta, threshold = per_neuron("beta", beta, current, neurons), per_neuron("threshold", threshold, current, neurons)
    if graded is not None:
        graded = per_neuron("graded", graded, current, 1)
    check_like(current, beta=beta, threshold=threshold, mem=mem, graded=graded)
    width = check_surrogate(spike_grad, b_th)
    result = run_leaky(
        current,
        (steps, batch, neurons),
        Leaky(beta, threshold, code, reset_delay, graded),
        mem,
        spike_grad,
        width,
        keep_mem=return_mem,
        max_active=policy.max_active(current.device),
    )
    mem_out = result.mem_seq if return_mem else result.mem_last
    assert mem_out is not None
    return LeakySequence(EventTensor.from_dense(result.spikes), mem_out)
