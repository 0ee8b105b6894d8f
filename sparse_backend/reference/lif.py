"""The two-state neuron over a sequence in plain PyTorch: the specification of `ops/lif.py`.

    inflow[t] = i[t-1] + I[t]                       i[t] = syn_decay inflow[t]
    drive[t]  = (leak - v[t-1]) + inflow[t]         u[t] = v[t-1] + mem_gain drive[t]
    S[t]      = H(u[t] - threshold)                 v[t] = u[t] after the reset

Where `discrete`, snnTorch's neurons: mem_gain is the decay of v, r[t] = H(v[t-1] - threshold) is detached, and

    inflow[t] = i[t-1] + I[t]                       i[t] = syn_decay inflow[t]
    drive[t]  = v[t-1]                              u[t] = v[t] = mem_gain drive[t] + inflow[t], if not r[t]
                                                    u[t] - threshold (SUBTRACT) or 0 (ZERO) if r[t]

where the i that is handed out, i_last and i_seq, is the inflow, before it decays; the one given has decayed.

Everything is dense here and compressed at the end; the kernels never make the dense tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_backend.reference.events import compress, gather, scatter
from sparse_backend.reference.leaky import NONE, SUBTRACT, ZERO

VALUE = 3  #: v = reset_to after a spike

#: what `lif_backward` can be asked for beside delta: bit k of its `needs` asks for the k-th of these
NEEDS = ("v", "i", "mem_gain", "syn_decay", "leak", "threshold", "reset_to", "recurrent")


def lif(
    current: Tensor,  # [T, B, N]
    mem_gain: Tensor,  # [] or [N], as are the other coefficients
    syn_decay: Tensor | None,  # None: no synaptic current, i = 0 after every step
    leak: Tensor | None,  # None: nothing leaks, drive = inflow
    threshold: Tensor,
    reset_to: Tensor,
    v: Tensor | None,  # [B, N], leak or zeros if None
    i: Tensor | None,  # [B, N], zeros if None
    recurrent: Tensor | None,  # [N, N], from the spikes of the step before
    g: Tensor | None,  # surrogate derivative where x is; only its backward needs it
    reset: int,
    discrete: bool,
    detached: bool,
    b_th: float,
    dense: bool,
    keep_states: bool,
    keep_drive: bool,
    keep_inflow: bool,
    max_active: float,
) -> tuple[Tensor, ...]:
    """Returns x, v_last, i_last, v_seq, i_seq, spike_ptr, spike_indices, active_ptr, active_indices, drive, inflow;
    what was not asked for is empty. See `ops.lif.LIFOutput`."""
    steps, batch, neurons = current.shape
    if v is None:
        v = current.new_zeros(batch, neurons) if leak is None else leak.expand(batch, neurons)
    i = current.new_zeros(batch, neurons) if i is None else i
    last_i, spikes = i, current.new_zeros(batch, neurons)
    sequences: tuple[list[Tensor], ...] = ([], [], [], [], [])
    for t in range(steps):
        inflow = i + current[t]
        if recurrent is not None:
            inflow = inflow + spikes @ recurrent.t()
        i = torch.zeros_like(inflow) if syn_decay is None else syn_decay * inflow
        if discrete:
            drive, resets = v, v - threshold > 0
            v = mem_gain * v + inflow
            if reset == SUBTRACT:
                v = v - resets * threshold
            elif reset == ZERO:
                v = v - resets.to(v.dtype) * v  # NaN where v is infinite, as snnTorch has it
        else:
            drive = inflow if leak is None else (leak - v) + inflow
            v = v + mem_gain * drive
        x = v - threshold
        spikes = (x > 0).to(v.dtype)
        if not (discrete or reset == NONE):
            v = (1 - spikes) * v + spikes * (reset_to if reset == VALUE else x)
        last_i = inflow if discrete else i
        for sequence, part in zip(sequences, (x, v, last_i, drive, inflow), strict=True):
            sequence.append(part)
    xs, vs, currents, drives, inflows = sequences

    def empty(dtype: torch.dtype = current.dtype) -> Tensor:
        return current.new_empty(0, dtype=dtype)

    def kept(sequence: list[Tensor], wanted: bool) -> Tensor:
        if not wanted:
            return empty()
        return torch.stack(sequence) if sequence else current.new_empty(0, batch, neurons)

    x = kept(xs, True)
    lists = [empty(torch.int32) for _ in range(4)]
    flat = x.reshape(steps * batch, neurons)
    if not dense or recurrent is not None:
        lists[:2] = compress(flat > 0)
    if not dense:
        lists[2:] = compress(~(flat.abs() >= b_th))
        x = gather(flat, *lists[2:])
        if x.numel() > max_active * flat.numel():
            return (*(empty() for _ in range(5)), *(empty(torch.int32) for _ in range(4)), empty(), empty())
    synaptic = syn_decay is not None
    return (
        x,
        v.clone(),
        last_i.clone() if synaptic else empty(),
        kept(vs, keep_states),
        kept(currents, keep_states and synaptic),
        *lists,
        kept(drives, keep_drive),
        kept(inflows, keep_inflow),
    )


def lif_backward(
    grad_x: Tensor | None,  # where x is: epsilon * g
    grad_v_last: Tensor | None,  # [B, N]
    grad_i_last: Tensor | None,
    grad_v_seq: Tensor | None,  # [T, B, N]
    grad_i_seq: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    spike_ptr: Tensor | None,
    spike_indices: Tensor | None,
    active_ptr: Tensor | None,
    active_indices: Tensor | None,
    drive: Tensor | None,  # [T, B, N], where mem_gain learns
    inflow: Tensor | None,  # [T, B, N], where syn_decay learns
    first_reset: Tensor | None,  # [B, N] uint8, `discrete`: r[0], None where v began with zeros
    mem_gain: Tensor,
    syn_decay: Tensor | None,
    threshold: Tensor,
    reset_to: Tensor,
    recurrent: Tensor | None,
    steps: int,
    batch: int,
    neurons: int,
    leaks: bool,
    reset: int,
    discrete: bool,
    detached: bool,
    b_th: float,
    dense: bool,
    needs: int,
) -> tuple[Tensor, ...]:
    """Returns delta [T, B, N] and the gradients of `NEEDS`: v, i [B, N], coefficients [N], recurrent [N, N]; empty
    where not needed. Where `dense`, x and the gradients for it are [T, B, N] and count where |x| < b_th."""
    shape = (steps, batch, neurons)
    zero = mem_gain.new_zeros(())

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if dense:
            return values if x is None else torch.where(x.abs() >= b_th, zero, values)
        assert active_ptr is not None and active_indices is not None
        return scatter(active_ptr, active_indices, values, neurons, mem_gain.dtype).view(shape)

    spikes = mem_gain.new_zeros(shape)
    if spike_ptr is not None and spike_indices is not None:
        spikes = scatter(spike_ptr, spike_indices, None, neurons, mem_gain.dtype).view(shape)
    elif dense and x is not None:
        spikes = (x > 0).to(mem_gain.dtype)
    eps_g, g, jump = spread(grad_x), spread(g), -threshold
    if reset == VALUE:
        at = spread(x)
        jump = reset_to - (threshold if at is None else at + threshold)
    attached = not (detached or discrete or reset == NONE)
    resets = spikes
    if discrete:  # r: the spikes of the step before
        first = (-threshold > 0).to(mem_gain.dtype) if first_reset is None else first_reset.to(mem_gain.dtype)
        resets = torch.cat((first.expand(1, batch, neurons), spikes[:-1])) if steps else spikes
    delta = mem_gain.new_zeros(shape)
    grads = {name: mem_gain.new_zeros(neurons) for name in NEEDS}
    of_v = mem_gain.new_zeros(batch, neurons) if grad_v_last is None else grad_v_last
    of_i = mem_gain.new_zeros(batch, neurons)
    for t in reversed(range(steps)):
        lv = of_v if grad_v_seq is None else of_v + grad_v_seq[t]
        handed_out = torch.zeros_like(of_i) if grad_i_seq is None else grad_i_seq[t]
        if t == steps - 1 and grad_i_last is not None:
            handed_out = handed_out + grad_i_last
        li = of_i if discrete else of_i + handed_out
        through = torch.zeros_like(lv) if eps_g is None else eps_g[t]
        if recurrent is not None and g is not None and t + 1 < steps:
            through = through + delta[t + 1] @ recurrent * g[t]
        if attached and g is not None:
            through = through + lv * (jump[t] if jump.dim() == 3 else jump) * g[t]
        of_u = through + lv
        jumped = (of_u if discrete else lv) * resets[t]
        grads["threshold"] -= through.sum(0)
        if reset == SUBTRACT:
            grads["threshold"] -= jumped.sum(0)
        else:
            of_u = of_u if reset == NONE else of_u - jumped
        if reset == VALUE:
            grads["reset_to"] += jumped.sum(0)
        if drive is not None:
            grads["mem_gain"] += (of_u * drive[t]).sum(0)
        if inflow is not None:
            grads["syn_decay"] += (li * inflow[t]).sum(0)
        through_u = of_u if discrete else mem_gain * of_u
        grads["leak"] += through_u.sum(0)
        delta[t] = through_u if syn_decay is None else through_u + syn_decay * li
        if discrete:
            delta[t] += handed_out
            of_v = mem_gain * of_u
        else:
            of_v = (1 - mem_gain) * of_u if leaks else of_u
        of_i = delta[t]
    if not steps and grad_i_last is not None:
        of_i = grad_i_last
    grads["v"], grads["i"] = of_v.clone(), of_i.clone()
    grads["recurrent"] = mem_gain.new_zeros(neurons, neurons)
    if steps > 1:
        grads["recurrent"] = torch.einsum("tbi,tbj->ij", delta[1:], spikes[:-1])
    return delta, *(grads[name] if needs >> k & 1 else zero.new_empty(0) for k, name in enumerate(NEEDS))
