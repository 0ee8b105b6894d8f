"""Sparse against dense gradients of one trained network on one batch: how far apart, and a piece of both to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_backend import EventTensor, policy
from sparse_backend.atomic import write_text
from sparse_backend.bench import machine

from .train import Trainer

ROWS, COLUMNS = 30, 50  # of a picture
FIGURES = 3  # significant ones, of its numbers
CLOSE = 1e-4  #: of the largest value, how far apart two readouts of a sample may be


def write_gradients(trainer: Trainer, out: Path, command: str) -> None:
    """`<out>/<id>.gradients.json`."""
    values = {**gradients(trainer), "command": command, **machine.describe()}
    write_text(out / f"{trainer.experiment.id}.gradients.json", json.dumps(values, allow_nan=False) + "\n")


def gradients(trainer: Trainer) -> dict[str, Any]:
    """Gradients of every parameter, dense and sparse, on the first batch of the test set, and two pictures.

    Samples in which rounding lets a spike fall otherwise in stock are left out: they differ by more than the band.
    Dense is the framework's own code. The picture of spike gradients is of one sample and the first hidden layer: dL/dS
    everywhere, and dL/dS under sparse gradients where the neuron is active, which is all of it that goes further down.
    """
    indices = torch.arange(min(trainer.experiment.preset.batch, len(trainer.data.test)))
    indices = indices[agreeing(trainer, trainer.data.test.batch(indices)[0])]
    x, labels = trainer.data.test.batch(indices)
    spikes = x.to_dense()

    stock, masked = trainer.stock(), trainer.stock()
    mask(masked, trainer.experiment.preset.b_th)
    sparse = parameter_gradients(trainer, trainer.net, x, labels)
    with Watched(stock.neurons[0]) as dense_watched:
        dense = parameter_gradients(trainer, stock, spikes, labels)
    with Watched(masked.neurons[0]) as masked_watched:
        parameter_gradients(trainer, masked, spikes, labels)
    width = float(policy.resolve_b_th(trainer.experiment.preset.b_th, stock.neurons[0].spike_grad))
    pictures = []
    if len(trainer.experiment.preset.hidden) > 1:
        name = "linears.1.weight"
        pictures.append(_picture(name, ("output neuron", "input neuron"), dense[name], sparse[name]))
    sample = dense_watched.gradient().abs().flatten(2).sum((0, 2)).argmax()
    pictures.append(
        _picture(
            "spikes of layer 1",
            ("step", "neuron"),
            dense_watched.gradient()[:, sample].flatten(1),
            (masked_watched.gradient() * (masked_watched.distance().abs() < width))[:, sample].flatten(1),
        )
    )
    return {
        "experiment": trainer.experiment.to_dict(),
        "epoch": len(trainer.history) - 1,
        "samples": len(labels),
        "gradients": [
            {
                "name": name,
                "relative_error": relative_error(sparse[name], dense[name]),
                "cosine": float(nn.functional.cosine_similarity(sparse[name].view(-1), dense[name].view(-1), dim=0)),
                "zeros_sparse_pct": 100 * float((sparse[name] == 0).double().mean()),
                "zeros_dense_pct": 100 * float((dense[name] == 0).double().mean()),
            }
            for name in dense
        ],
        "pictures": pictures,
    }


def parameter_gradients(trainer: Trainer, net: nn.Module, x: Any, labels: Tensor) -> dict[str, Tensor]:
    """Of the trainer's loss of a network on x [T, B, N]; parameters without a gradient are left out."""
    net.zero_grad()
    mem, spikes = net(x)
    trainer.loss(mem, spikes, labels).backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def agreeing(trainer: Trainer, x: EventTensor) -> Tensor:
    """Of which samples [B] of x [T, B, N] the readout is stock's, but for rounding."""
    expected, got = trainer.stock()(x.to_dense())[0], trainer.net(x)[0]
    return (expected - got).abs().amax((0, 2)) <= CLOSE * max(1.0, float(expected.abs().max()))


def mask(net: Any, b_th: Any) -> None:
    """The framework's own gradient with its surrogate cut off outside the band: what sparse gradients equal (E3)."""
    for neuron in net.neurons:
        neuron.spike_grad = _cut(neuron.spike_grad, float(policy.resolve_b_th(b_th, neuron.spike_grad)))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got − expected| / |expected|; 0 where both are zero."""
    norm, off = float(expected.double().norm()), float((got.double() - expected.double()).norm())
    return off / norm if norm else math.inf if off else 0.0


class Watched:
    """What a stock neuron hands out at every step while this is entered, with its gradient after a backward pass."""

    def __init__(self, neuron: Any) -> None:
        self.neuron = neuron
        self.spikes: list[Tensor] = []
        self.mems: list[Tensor] = []

    def __enter__(self) -> Watched:
        def keep(_: Any, __: Any, output: tuple[Tensor, Tensor]) -> None:
            spk, mem = output
            spk.retain_grad()
            self.spikes.append(spk)
            self.mems.append(mem.detach())

        self.hook = self.neuron.register_forward_hook(keep)
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()

    def gradient(self) -> Tensor:
        """ε = dL/dS [T, B, ...]."""
        return torch.stack([torch.zeros_like(spk) if spk.grad is None else spk.grad for spk in self.spikes])

    def distance(self) -> Tensor:
        """V − θ [T, B, ...]."""
        return torch.stack(self.mems) - self.neuron.threshold


def _cut(spike_grad: Callable[[Tensor], Tensor], width: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(x.abs() < width, spike_grad(x), spike_grad(x.detach()))


def _picture(name: str, axes: tuple[str, str], dense: Tensor, sparse: Tensor) -> dict[str, Any]:
    """The rows and columns with most of the dense gradient, in their order."""
    rows, columns = (
        dense.abs().sum(1 - d).topk(min(most, dense.shape[d])).indices.sort().values
        for d, most in ((0, ROWS), (1, COLUMNS))
    )

    def block(values: Tensor) -> list[list[float]]:
        return [[_rounded(value) for value in row] for row in values[rows][:, columns].tolist()]

    return {
        "name": name,
        "axes": list(axes),
        "dense": block(dense),
        "sparse": block(sparse),
        "relative_error": relative_error(sparse, dense),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{FIGURES}g}")
