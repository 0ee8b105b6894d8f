"""Training the two models side by side, each step timed, on the same batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from ..data import ImageSet, latency_spikes
from .model import Net, max_over_time


class Batches:
    """Latency-coded batches of one data set; every model gets the very same tensors."""

    def __init__(self, images: ImageSet, steps: int, batch: int, seed: int) -> None:
        self.images = images
        self.steps = steps
        self.batch = min(batch, len(images.train_images))
        self.per_epoch = len(images.train_images) // self.batch
        self._generator = torch.Generator().manual_seed(seed)

    def encode(self, images: Tensor) -> Tensor:
        """``[B, N]`` images to ``[T, B, N]`` spikes; τ_eff is a fifth of T, so the same pixels spike at any T."""
        return latency_spikes(images, self.steps, tau_eff=self.steps / 5)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled full batches: spikes ``[T, B, N]`` and labels ``[B]``. The odd rest is left for another epoch."""
        order = torch.randperm(len(self.images.train_images), generator=self._generator)
        for index in order[: self.per_epoch * self.batch].split(self.batch):
            yield self.encode(self.images.train_images[index]), self.images.train_labels[index]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, in batches as large as training's."""
        for images, labels in zip(
            self.images.test_images.split(self.batch), self.images.test_labels.split(self.batch), strict=True
        ):
            yield self.encode(images), labels


@dataclass
class Times:
    """Milliseconds of each training step."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Medians over the second half of training, where activity is that of a trained network."""
        return {
            name: median(values[len(values) // 2 :])
            for name, values in (("forward", self.forward), ("backward", self.backward), ("whole", self.whole))
        }


class Trainer:
    """One model, its optimiser and what was seen of it."""

    def __init__(self, net: Net, lr: float) -> None:
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        self.times = Times()
        self.losses: list[float] = []

    def loss(self, spikes: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy on the maximum over time of the readout's membrane."""
        _, mem = self.net(spikes)
        return nn.functional.cross_entropy(max_over_time(mem), labels)

    def step(self, spikes: Tensor, labels: Tensor) -> None:
        """One training step: forward and loss, backward, optimiser; spikes ``[T, B, N]``, labels ``[B]``."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(spikes, labels)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        self.optimizer.step()
        finish = time.perf_counter()
        self.times.forward.append(1e3 * (middle - start))
        self.times.backward.append(1e3 * (end - middle))
        self.times.whole.append(1e3 * (finish - start))
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, batches: Batches) -> float:
        """Percent of the test set classified right."""
        right = total = 0
        for spikes, labels in batches.test():
            _, mem = self.net(spikes)
            right += int((max_over_time(mem).argmax(dim=1) == labels).sum())
            total += len(labels)
        return 100 * right / total if total else float("nan")


@torch.no_grad()
def stock_activity(net: nn.Module, spikes: Tensor, b_th: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Active % and spikes % of a stock model's neurons on one batch, from hooks.

    Args:
        net: a model that is not enabled.
        spikes: ``[T, B, N]`` input.
        b_th: half-width of the band for each layer to look at, by name.

    Returns:
        For each layer of ``b_th``: percent of (t, b, j) with ``|V − θ| < b_th``, percent that spike.
    """
    active = dict.fromkeys(b_th, 0)
    fired = dict.fromkeys(b_th, 0)
    total = dict.fromkeys(b_th, 0)

    def watch(name: str, layer: nn.Module):
        def hook(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            spk, mem = output
            active[name] += int(((mem - layer.threshold).abs() < b_th[name]).sum())
            fired[name] += int(spk.count_nonzero())
            total[name] += spk.numel()

        return layer.register_forward_hook(hook)

    hooks = [watch(name, net.get_submodule(name)) for name in b_th]
    try:
        net(spikes)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: (100 * active[name] / total[name], 100 * fired[name] / total[name]) for name in b_th}
