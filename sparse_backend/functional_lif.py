"""The sequence ops of neurons with a synaptic current, part of `functional`.

>>> import torch
>>> from sparse_backend import EventTensor, functional as F
>>> def fast_sigmoid(x, slope=100.0):
...     soft = x / (1 + slope * x.abs())
...     return (x > 0).to(x.dtype) + (soft - soft.detach())
>>> _ = torch.manual_seed(0)
>>> x = EventTensor.from_dense((torch.rand(20, 4, 30) < 0.1).float())  # [T, B, M] spikes
>>> hidden, readout = torch.nn.Parameter(torch.randn(10, 30)), torch.nn.Parameter(torch.randn(2, 10))
>>> spikes, v, i = F.linear_lif(x, hidden, mem_gain=0.1, syn_decay=0.8, spike_grad=fast_sigmoid, b_th=0.2)
>>> out = F.linear_li(spikes, readout, mem_gain=0.1, syn_decay=0.8)
>>> out.v.shape, out.v_last.shape
(torch.Size([20, 4, 2]), torch.Size([4, 2]))
>>> out.v.sum().backward()
>>> hidden.grad.shape
torch.Size([10, 30])
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_backend import policy
from sparse_backend.arguments import (
    check_neurons,
    check_recurrent,
    check_reset,
    check_surrogate,
    given_current,
    linear_current,
)
from sparse_backend.dynamics import LI, LIF, LIF_RESETS
from sparse_backend.events import EventTensor
from sparse_backend.execute_lif import run_li, run_lif
from sparse_backend.surrogate import SpikeGrad


class LIFSequence(NamedTuple):
    """A layer's answer: `spikes` [T, B, N]; membrane `v` and synaptic current `i`, [B, N] after the last step or
    [T, B, N] of all steps. i is None for neurons without one."""

    spikes: EventTensor
    v: Tensor
    i: Tensor | None


class LISequence(NamedTuple):
    """A leaky integrator's answer: `v` [T, B, N], `v_last` and `i_last` [B, N]; i_last is None where there is none."""

    v: Tensor
    v_last: Tensor
    i_last: Tensor | None


def linear_lif(
    x: EventTensor | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mem_gain: float | Tensor,
    syn_decay: float | Tensor | None = None,
    leak: float | Tensor | None = 0.0,
    threshold: float | Tensor = 1.0,
    reset_to: float | Tensor = 0.0,
    reset: str = "value",
    detached: bool = False,
    spike_grad: SpikeGrad,
    b_th: policy.BTh = "auto",
    v: Tensor | None = None,
    i: Tensor | None = None,
    recurrent: Tensor | None = None,
    z: Tensor | None = None,
    return_states: bool = False,
) -> LIFSequence:
    """A linear layer and neurons with membrane v and synaptic current i over a whole sequence, I = x W^T + b:

        inflow = i + I;  u = v + mem_gain ((leak - v) + inflow);  i = syn_decay inflow;  S = H(u - threshold)
        v = (1 - S) u + S reset_to ("value"), u - S threshold ("subtract") or u ("none")

    Norse's LIF has mem_gain = dt tau_mem_inv and syn_decay = 1 - dt tau_syn_inv; its LIFBox has no synaptic current,
    syn_decay = None; in its IAF nothing leaks either, leak = None: u = v + mem_gain inflow.

    x, weight, bias: as in `linear_leaky`; mem_gain .. reset_to: numbers or tensors of one or N entries; v, i: [B, N]
    before the first step, leak (or zeros; as in Norse, without its gradient) and zeros if None; recurrent: [N, N]
    weights from the spikes of the step before, which are z, [B, N], at the first step, zeros if None. All floating
    point tensors share one dtype, float32 or float64, and one device; on CUDA x and weights may be half or bfloat16, as
    there.

    Gradients reach every tensor given that requires them, and are those of ordinary back-propagation with the surrogate
    masked to |u - threshold| < b_th, in the reset (unless `detached`) and in the recurrence too.

    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: neurons as norse/torch/functional/lif.py and lif_box.py.
    """
    return _lif(
        linear_current(x, weight, bias), (mem_gain, syn_decay, leak, threshold, reset_to), reset, detached,
        spike_grad, b_th, v, i, recurrent, z, return_states,
    )  # fmt: skip


def lif(
    current: Tensor,
    *,
    mem_gain: float | Tensor,
    syn_decay: float | Tensor | None = None,
    leak: float | Tensor | None = 0.0,
    threshold: float | Tensor = 1.0,
    reset_to: float | Tensor = 0.0,
    reset: str = "value",
    detached: bool = False,
    spike_grad: SpikeGrad,
    b_th: policy.BTh = "auto",
    v: Tensor | None = None,
    i: Tensor | None = None,
    recurrent: Tensor | None = None,
    z: Tensor | None = None,
    return_states: bool = False,
) -> LIFSequence:
    """The neurons alone, over a sequence of any currents [T, B, N]; the rest as `linear_lif`."""
    current = given_current(current)
    return _lif(
        current, (mem_gain, syn_decay, leak, threshold, reset_to), reset, detached,
        spike_grad, b_th, v, i, recurrent, z, return_states,
    )  # fmt: skip


def linear_li(
    x: EventTensor | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mem_gain: float | Tensor,
    syn_decay: float | Tensor | None = None,
    leak: float | Tensor | None = 0.0,
    v: Tensor | None = None,
    i: Tensor | None = None,
) -> LISequence:
    """A linear layer and leaky integrators, `linear_lif` without spikes: the readout of many networks.

    x [T, B, M], weight [N, M], bias [N], mem_gain, syn_decay, leak, v, i: as in `linear_lif`. Gradients reach every
    tensor given that requires them. Raises ValueError or TypeError naming the argument.
    Source: norse/torch/functional/leaky_integrator.py.
    """
    return _li(linear_current(x, weight, bias), (mem_gain, syn_decay, leak), v, i)


def li(
    current: Tensor,
    *,
    mem_gain: float | Tensor,
    syn_decay: float | Tensor | None = None,
    leak: float | Tensor | None = 0.0,
    v: Tensor | None = None,
    i: Tensor | None = None,
) -> LISequence:
    """Leaky integrators over a sequence of any currents [T, B, N]; the rest as `linear_li`."""
    current = given_current(current)
    return _li(current, (mem_gain, syn_decay, leak), v, i)


def run_neurons(
    current: Any,
    shape: tuple[int, int, int],
    neuron: LIF,
    spike_grad: SpikeGrad,
    b_th: policy.BTh,
    v: Tensor | None,
    i: Tensor | None,
    recurrent: Tensor | None,
    z: Tensor | None,
    return_states: bool,
) -> tuple[EventTensor, Tensor, Tensor | None]:
    """Spikes, membrane and synaptic current of a sequence whose arguments have been checked."""
    result = run_lif(
        current,
        shape,
        neuron,
        v,
        i,
        spike_grad,
        check_surrogate(spike_grad, b_th),
        recurrent=recurrent,
        z=z,
        keep_states=return_states,
        max_active=policy.max_active(current.device),
    )
    states = (result.v_seq, result.i_seq) if return_states else (result.v_last, result.i_last)
    assert states[0] is not None
    return EventTensor.from_dense(result.spikes), *states


def _checked(
    current: Any, values: tuple[Any, ...], v: Tensor | None, i: Tensor | None
) -> tuple[tuple[int, int, int], list[Any]]:
    """Shape of a sequence, and the coefficients of its neurons, the first of LIF's fields, as tensors."""
    coefficients = dict(zip(LIF._fields, values, strict=False))
    if i is not None and coefficients["syn_decay"] is None:
        raise ValueError("i: expected None without syn_decay, got a tensor")
    return check_neurons(current, coefficients, ("syn_decay", "leak"), v=v, i=i)


def _lif(
    current: Any,
    values: tuple[Any, ...],
    reset: str,
    detached: bool,
    spike_grad: SpikeGrad,
    b_th: policy.BTh,
    v: Tensor | None,
    i: Tensor | None,
    recurrent: Tensor | None,
    z: Tensor | None,
    return_states: bool,
) -> LIFSequence:
    code = check_reset(reset, LIF_RESETS)
    shape, coefficients = _checked(current, values, v, i)
    recurrent = check_recurrent(current, recurrent, z, "z")
    neuron = LIF(*coefficients)._replace(reset=code, detached=detached)
    return LIFSequence(*run_neurons(current, shape, neuron, spike_grad, b_th, v, i, recurrent, z, return_states))


def _li(current: Any, values: tuple[Any, ...], v: Tensor | None, i: Tensor | None) -> LISequence:
    shape, coefficients = _checked(current, values, v, i)
    result = run_li(current, shape, LI(*coefficients), v, i)
    return LISequence(result.v_seq, result.v_last, result.i_last)
