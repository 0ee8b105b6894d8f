"""Weights as training leaves them: activity at initialisation is not representative."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_backend.bench import fused_dense
from sparse_backend.bench.cases import Case
from sparse_backend.bench.inputs import Batch, Inputs
from sparse_backend.bench.models import build, framework_of, loss_of
from sparse_backend.bench.paths import PATHS
from sparse_backend.policy import resolve_b_th
from sparse_backend.surrogate import SpikeGrad

LEARNING_RATE = 3e-4
BATCHES = 4  # drawn once and gone through again and again
SCALE_EVERY = 4  # training steps
SCALE_LAST = 20  # times at the end, at most
CLOSE = 1.1  # factor between activity and what the case asks for


@dataclass(frozen=True)
class Activity:
    """% of all (t, b, j), by hidden layer."""

    spikes: tuple[float, ...]
    active: tuple[float, ...]

    @staticmethod
    def mean(values: tuple[float, ...]) -> float:
        return sum(values) / len(values)


@dataclass(frozen=True)
class Trained:
    net: Any
    steps: int
    first_loss: float
    last_loss: float


def band(net: Any, case: Case) -> float:
    """The number that the case's b_th stands for."""
    return resolve_b_th(case.b_th, framework_of(case).surrogate_of(net))


@torch.no_grad()
def measure_activity(net: Any, case: Case, batch: Batch, width: float | None = None) -> Activity:
    """What the hidden layers do on a batch, counted as stock runs. width: of the band, where it is known.

    On a GPU, where stock's loop would take most of the time there is, and where activity is all that a case is brought
    to, this project's dense kernels are asked.
    """
    reach = band(net, case) if width is None else width
    if batch.labels.is_cuda or case.crossover is not None:
        return dense_activity(net, batch, reach)
    counts = torch.zeros(len(case.hidden), 3)  # spikes, active, all

    def counted(layer: int, spike_grad: SpikeGrad) -> SpikeGrad:
        def inner(x: Tensor) -> Tensor:
            if layer < len(counts):
                spikes, active = x.gt(0).sum(), (x.abs() < reach).sum()
                counts[layer] += torch.stack([spikes, active, torch.tensor(x.numel())])
            return spike_grad(x)

        return inner

    with framework_of(case).intercepted(net, counted):
        net(batch.dense())
    spikes, active, entries = counts.double().unbind(1)
    return Activity(tuple((100 * spikes / entries).tolist()), tuple((100 * active / entries).tolist()))


@torch.no_grad()
def hidden_x(net: Any, batch: Batch) -> list[Tensor]:
    """V - threshold of the hidden layers of a `leaky_nets.LeakyNet`, [T, B, N] each."""
    return [layer.x for layer in fused_dense.layers(net, batch.dense()) if layer.x is not None][:-1]


def dense_activity(net: Any, batch: Batch, reach: float) -> Activity:
    xs = hidden_x(net, batch)
    spikes, active = [(x > 0).double().mean() for x in xs], [(x.abs() < reach).double().mean() for x in xs]
    return Activity(tuple(100 * float(share) for share in spikes), tuple(100 * float(share) for share in active))


def fitted_band(net: Any, share: float, batch: Batch) -> float:
    """The b_th at which this share, in %, of the hidden layers' entries is active on a batch."""
    if share >= 100:
        return math.inf
    reach = torch.cat([x.abs().flatten() for x in hidden_x(net, batch)])
    return float(reach.kthvalue(max(1, round(share / 100 * reach.numel()))).values)


@torch.no_grad()
def calibrate(net: Any, case: Case, batch: Batch) -> None:
    """Scale the hidden layers' weights, one after the other, until each is as active as the case asks.

    Activity rises with the weights and then saturates: the scale is searched upwards from far below, and where the
    aim cannot be had the nearest is taken.
    """
    width = band(net, case)
    for layer, (weight, *_) in enumerate(framework_of(case).currents(net)):
        initial = weight.clone()
        scale, factor, most = 0.02, 1.25, 0.0
        nearest = (math.inf, scale)
        for _ in range(60):
            weight.copy_(initial * scale)
            activity = measure_activity(net, case, batch, width)
            got = (activity.active if case.aim_at == "active" else activity.spikes)[layer]
            nearest = min(nearest, (abs(got - case.aim), scale))
            if got >= case.aim:
                scale, factor = scale / factor, factor**0.5
                if factor < 1.01:
                    break
            elif got < 0.7 * most:
                break  # past the top
            most = max(most, got)
            scale *= factor
        weight.copy_(initial * nearest[1])


def train(case: Case, inputs: Inputs, seed: int) -> Trained:
    """A network trained with sparse gradients, as active at the end as the case asks for.

    Training alone drives activity up, to a level that depends on the task; a homeostatic scaling of the hidden layers
    in between, as modellers of such networks use it, keeps it where it is wanted.
    """
    batches = [inputs.batch(case.batch) for _ in range(BATCHES if case.train_steps else 1)]
    sample = inputs.batch(min(case.batch, 32))
    torch.manual_seed(seed)
    net = build(case).to(inputs.device)
    calibrate(net, case, sample)
    # a twin on the same parameters: activity is counted on the network itself
    twin = copy.deepcopy(net, {id(parameter): parameter for parameter in net.parameters()})
    forward = PATHS[case.trains_with].prepare(twin, case.b_th)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)

    def loss(batch: Batch) -> Tensor:
        return loss_of(forward(batch.dense() if batch.image else batch.events), batch.labels)

    losses = []
    for step in range(case.train_steps):
        optimizer.zero_grad()
        one = loss(batches[step % len(batches)])
        one.backward()
        optimizer.step()
        losses.append(one.item())
        if step % SCALE_EVERY == SCALE_EVERY - 1:
            rescale(net, case, sample)
    for _ in range(SCALE_LAST):
        if rescale(net, case, sample) < CLOSE:
            break
    with torch.no_grad():
        losses.append(loss(batches[0]).item())
    optimizer.zero_grad()
    return Trained(net, case.train_steps, losses[0], losses[-1])


@torch.no_grad()
def rescale(net: Any, case: Case, sample: Batch) -> float:
    """Scale each hidden layer's current a little towards the case's activity; returns by what factor the worst was
    off before."""
    worst = 1.0
    activity = measure_activity(net, case, sample)
    currents = framework_of(case).currents(net)
    for layer, got in enumerate(activity.active if case.aim_at == "active" else activity.spikes):
        if case.aim_at == "active" and got < case.aim and activity.spikes[layer] > 2 * got:
            continue  # driven so hard that it crosses the band in one step: more current would not help
        ratio = case.aim / max(got, 1e-3 * case.aim)
        worst = max(worst, ratio, 1 / ratio)
        factor = min(max(ratio**0.2, 0.9), 1.1)
        for parameter in currents[layer]:
            parameter *= factor
    return worst
