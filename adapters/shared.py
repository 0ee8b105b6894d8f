"""What adapters share: what a neuron takes as its current, the framework's own forward, counting what layers do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_backend import policy
from sparse_backend.deferred import DeferredCurrent, WeightCache, is_finite
from sparse_backend.layer_state import LayerState
from sparse_backend.layers import own_forward
from sparse_backend.tensorlike import dense_of, under_saved_tensor_hooks
from sparse_backend.timefusion import recorder
from sparse_backend.timefusion.recorder import Placeholder
from sparse_backend.timefusion.sites import FunctionSite, NeuronSite


def taken(state: LayerState, current: Any) -> Any:
    """The current of one call as a neuron takes it: deferred, the weight's hub kept by the layer, or a tensor."""
    if type(current) is DeferredCurrent and current.is_deferred and len(current.shape) == 2:
        if state.weights is None:
            state.weights = WeightCache()
        current.adopt(state.weights)
        if current.is_deferred:
            return current
    return dense_of(current)


def check_weight(state: LayerState, current: DeferredCurrent) -> None:
    """See whether the weight was written to behind torch's back, through `.data`: where a sequence begins, and at every
    step while no graph is recorded, which is how rules of plasticity write."""
    if state.begins or not torch.is_grad_enabled():
        current.hub, state.begins = current.hub.verified(), False
    else:
        current.hub.used = True


def run_own_forward(module: Any, state: LayerState, reason: str | None, input_: Any, *states: Any) -> Any:
    """The framework's own forward of one step; `reason` is None where that is about to refuse the call."""
    if reason is not None:
        state.tally.path, state.tally.reason = "framework", reason
        state.tally.framework_steps += 1
    given = [dense_of(part) for part in (input_, *states)]
    with recorder.paused():  # what the framework writes in place must not have been read by a recorded call
        return own_forward(module)(module, *given)


def count(
    layer: LayerState,
    result: Any,
    steps: int,
    entries: int,
    b_th: float,
    why_dense: str | None,
    itemsize: int,
    *,
    in_time: bool = False,
    asked_dense: bool = False,
    of_events: bool = False,
) -> None:
    """Count one call of a spiking layer: `entries` of all `steps`. asked_dense: nobody looked whether it had to be;
    of_events: its current was never made."""
    tally, form = layer.tally, "sequence" if in_time else "step"
    tally.entries += entries
    tally.at_once = max(tally.at_once, steps)
    if result.kept:
        tally.kept += result.kept
        tally.dense_kept += 2 * entries * itemsize
    if result.x is None:
        tally.path, tally.reason = f"sparse {form}", None
        crowded = not of_events and policy.is_crowded(result.n_active, result.n_spikes, entries, result.spikes.device)
        if crowded:
            layer.go_dense(policy.WHY_CROWDED)
        else:
            layer.dense_next = layer.DENSE_STEPS_FIRST
        tally.sparse_steps += steps
        tally.add(result.n_active, result.n_spikes, entries)
        return
    tally.path, tally.reason = f"dense {form}", why_dense
    if tally.reason is None:
        seen = layer.dense_because if asked_dense else None
        tally.reason = "b_th is infinite" if math.isinf(b_th) else seen or policy.why_active(result.x.device)
    if not (asked_dense or math.isinf(b_th)):
        layer.go_dense()
    if (steps > 1 or tally.dense_steps % layer.COUNT_DENSE_EVERY == 0) and not policy.is_captured(result.x):
        x = result.x.detach()[:, :: max(1, entries // layer.COUNT_DENSE_MOST)]
        active = x.numel() if math.isinf(b_th) else _number(x.abs() < b_th)
        tally.add(active, _number(x > 0), x.numel())
    tally.dense_steps += steps


def _number(mask: Tensor) -> int | Tensor:
    """How many are true; a tensor where reading it would wait for the device."""
    total = mask.count_nonzero()  # a sum would make 8 bytes of every one first
    return int(total) if policy.reads_at_once(total.device) else total


def limit_steps(site: NeuronSite, layer: LayerState, current: Any, b_th: float, why_dense: str | None) -> None:
    """Let a large neuron layer whose sequences will be dense, what it is given or what it gives, run as many steps at
    once as their memory is kept for."""
    (spec, *_) = site.specs
    if not policy.reads_at_once(spec.device):  # whose allocator keeps what it has
        return
    by_history = layer.dense_for > 0 and not under_saved_tensor_hooks()  # a checkpoint's second run saves as much
    size = spec.shape.numel() * spec.dtype.itemsize
    is_dense = type(current) is Placeholder and type(current.ref[0].site) is FunctionSite
    if size >= policy.LARGE_STEP_BYTES and (is_dense or why_dense is not None or math.isinf(b_th) or by_history):
        site.most = max(1, policy.DENSE_BYTES // size)


def goes_dense(layer: LayerState) -> bool:
    """Whether a step is to be run densely because the ones before it were too active."""
    if not layer.dense_for or under_saved_tensor_hooks():
        return False
    layer.dense_for -= 1
    return True


def of_all_steps(current: DeferredCurrent) -> DeferredCurrent | Tensor:
    """The same current for an op that runs all steps at once: its weight takes part in autograd itself, without the
    token that gathers over calls. Unchanged where the weight is not what it was any more; a tensor where it is not
    finite, whose products with zeros count too."""
    hub, cache = current.hub, current.hub.cache
    if cache is not None:
        if cache.weight is None or cache.hub(cache.weight, cache.bias, hub.narrow) is not hub:
            return current
        return DeferredCurrent(current.events, cache.of_all_steps(hub.narrow))
    if all(part is None or is_finite(part) for part in (hub.weight, hub.bias)):
        return current
    return current.by_torch()
