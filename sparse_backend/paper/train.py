"""One network trained on one data set, stock or enabled: resumable, its results a JSON file that grows by the epoch."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import sparse_backend
from sparse_backend import atomic, losses
from sparse_backend.bench import machine
from sparse_backend.data import EventSet, Recordings

from .activity import Activity, activity
from .models import build
from .presets import Preset


@dataclass(frozen=True)
class Experiment:
    """What one run trains; two runs of one experiment on one machine with one number of threads are the same."""

    name: str  #: of the preset it comes from
    preset: Preset
    seed: int
    stock: bool = False  #: the framework's own dense gradients, nothing enabled

    @property
    def id(self) -> str:
        """The name of its files."""
        p = self.preset
        layers = "conv" if p.net == "conv" else "-".join(map(str, p.hidden))
        gradient = "stock" if self.stock else f"b{p.b_th}"
        return f"{self.name}_{layers}_{p.short_surrogate}_{gradient}_seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "preset": self.preset.to_dict(), "seed": self.seed, "stock": self.stock}


class Trainer:
    """A network, its optimiser and the order of its samples. All that is random comes from the seed."""

    def __init__(self, experiment: Experiment, data: EventSet) -> None:
        self.experiment, self.data = experiment, data
        preset = experiment.preset
        torch.manual_seed(experiment.seed)
        self.net = build(data.train.n_units, data.classes, preset)
        if not experiment.stock:
            self.net = sparse_backend.enable(self.net, b_th=preset.b_th)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=preset.lr)
        self.order = torch.Generator().manual_seed(experiment.seed)
        self.history: list[dict[str, Any]] = []

    def stock(self) -> Any:
        """A copy of the network as it is now, with nothing enabled."""
        net = build(self.data.train.n_units, self.data.classes, self.experiment.preset)
        net.load_state_dict(self.net.state_dict())
        return net

    def batches(self, part: Recordings, order: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Spikes [T, B, N], dense for a stock network, and labels [B]; the last batch may be smaller."""
        for indices in order.split(self.experiment.preset.batch):
            x, labels = part.batch(indices)
            yield (x.to_dense() if self.experiment.stock else x), labels

    def loss(self, mem: Tensor, spikes: list[Any], labels: Tensor) -> Tensor:
        """Appendix E.4: cross entropy on the readout's membrane [T, B, classes], pooled over time, and regularisers."""
        preset = self.experiment.preset
        loss = losses.cross_entropy_over_time(mem, labels, pool=preset.pool)
        for layer in spikes:
            if preset.lower[1]:
                loss = loss + losses.lower_activity(layer, *preset.lower)
            if preset.upper[1]:
                loss = loss + losses.upper_activity(layer, *preset.upper)
        return loss

    def scores(self, mem: Tensor) -> Tensor:
        return losses.max_over_time(mem) if self.experiment.preset.pool == "max" else losses.sum_over_time(mem)

    def step(self, x: Any, labels: Tensor) -> tuple[float, int]:
        """One training step; the loss, and how many of the batch were classified right."""
        self.optimizer.zero_grad()
        mem, spikes = self.net(x)
        loss = self.loss(mem, spikes, labels)
        loss.backward()
        self.optimizer.step()
        return loss.item(), int((self.scores(mem).argmax(1) == labels).sum())

    def epoch(self, tick: Callable[[str], None]) -> dict[str, Any]:
        """Once through the training set; `loss` is the mean over samples, not finite if a loss or a weight is not."""
        part, times = self.data.train, []
        total, right, start = 0.0, 0, time.perf_counter()
        for x, labels in self.batches(part, torch.randperm(len(part), generator=self.order)):
            begin = time.perf_counter()
            loss, hits = self.step(x, labels)
            times.append(time.perf_counter() - begin)
            total, right = total + loss * len(labels), right + hits
            tick(f"loss {loss:.3f}")
            if not math.isfinite(loss):
                break
        if not all(bool(parameter.isfinite().all()) for parameter in self.net.parameters()):
            total = math.nan
        return {
            "loss": total / len(part),
            "train_accuracy": 100 * right / len(part),
            "seconds": time.perf_counter() - start,
            "step_ms": 1e3 * median(times),
        }

    @torch.no_grad()
    def accuracy(self, part: Recordings) -> float:
        """Percent of the samples classified right."""
        right = 0
        for x, labels in self.batches(part, torch.arange(len(part))):
            mem, _ = self.net(x)
            right += int((self.scores(mem).argmax(1) == labels).sum())
        return 100 * right / len(part)

    def activity(self) -> Activity:
        """Of the hidden layers, on the first batch of the test set."""
        x, _ = next(self.batches(self.data.test, torch.arange(len(self.data.test))))
        return activity(self.net, x, self.experiment)

    def state(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment.to_dict(),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, maybe for more epochs than it was made for."""
        expected = self.experiment.to_dict()
        got = {
            **state["experiment"],
            "preset": {**state["experiment"]["preset"], "epochs": self.experiment.preset.epochs},
        }
        if got != expected:
            raise ValueError(f"the checkpoint must be of {expected}, got {got}: choose another --out, or delete it")
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        self.history = state["history"]


def _restored(path: Path) -> dict[str, Any]:
    """What is in a checkpoint."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be a whole checkpoint, got a damaged file ({reason}): delete it") from error
    return state


def train(
    experiment: Experiment, data: EventSet, out: Path, command: str, tick: Callable[[str], None] = lambda _: None
) -> tuple[Trainer, dict[str, Any]]:
    """Train, or go on where an earlier run stopped; returns the network and what `<out>/<id>.json` holds at the end.

    After every epoch `<out>/<id>.ckpt` holds what is needed to go on, and then the result is written; a finished run is
    returned as it is. Of a run that diverged the network is the one before that epoch. tick: called after each training
    step with a note.
    Raises ValueError for a damaged checkpoint or one of something else, FileExistsError for a result without its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    result_path, checkpoint = out / f"{experiment.id}.json", out / f"{experiment.id}.ckpt"
    trainer = Trainer(experiment, data)
    described = {
        "name": data.name,
        "note": data.note,
        "train": len(data.train),
        "test": len(data.test),
        "events_per_sample": data.train.events_per_sample,
    }

    def result(status: str) -> dict[str, Any]:
        values = {
            "experiment": experiment.to_dict(),
            "data": described,
            "status": status,
            "history": trainer.history,
            "command": command,
            **machine.describe(),
        }
        atomic.write_text(result_path, json.dumps(values, indent=1, allow_nan=False) + "\n")
        return values

    def save() -> None:
        atomic.write(checkpoint, lambda file: torch.save(trainer.state(), file))

    known = json.loads(result_path.read_text(encoding="utf-8")) if result_path.exists() else None
    if known is not None and not checkpoint.exists():
        raise FileExistsError(f"{result_path} is there, but not its checkpoint: choose another --out, or delete it")
    if known is not None and known["data"] != described:
        raise ValueError(
            f"{result_path} must be of {described}, got {known['data']}: choose another --out, or delete it"
        )
    if checkpoint.exists():
        trainer.load(_restored(checkpoint))
    else:
        trainer.history.append({"epoch": 0, **trainer.activity().to_dict()})
        save()
    ended = len(trainer.history) > experiment.preset.epochs
    if ended and known is not None and len(known["history"]) == len(trainer.history) and known["status"] != "running":
        return trainer, known

    for epoch in range(len(trainer.history), experiment.preset.epochs + 1):
        entry = {"epoch": epoch, **trainer.epoch(tick)}
        if not math.isfinite(entry["loss"]):
            trainer.load(_restored(checkpoint))
            return trainer, result("diverged")
        trainer.history.append({**entry, "test_accuracy": trainer.accuracy(data.test), **trainer.activity().to_dict()})
        save()
        if epoch < experiment.preset.epochs:
            result("running")
    return trainer, result(_status(trainer))


def _status(trainer: Trainer) -> str:
    """ "dead" where a hidden layer has no spike left: no gradient reaches what lies below."""
    return "finished" if all(trainer.history[-1]["spikes_pct"]) else "dead"
