"""One quantity over a range: a network is trained at each value, then timed and compared with stock."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_backend import EventTensor
from sparse_backend.atomic import write_text
from sparse_backend.bench import machine
from sparse_backend.bench.measure import set_threads
from sparse_backend.bench.memory import kept_bytes
from sparse_backend.bench.paths import Times
from sparse_backend.bench.timing import summary
from sparse_backend.demo.progress import Progress
from sparse_backend.policy import resolve_b_th
from sparse_backend.surrogate import mass_of_b_th

from . import datasets, options
from .gradients import agreeing, mask, parameter_gradients, relative_error
from .presets import Preset
from .train import Experiment, Trainer, train

VALUES: dict[str, tuple[float, ...]] = {
    "hidden": (100, 200, 400, 600, 800, 1000),
    "b-th": (0.05, 0.1, 0.2, 0.4, 0.8, math.inf),
    "depth": (1, 2, 3, 4, 5),
}
REPEATS = 7
FLIPPED = 0.1  #: share of the samples whose readouts may differ
ERROR = 1e-3  #: relative, of a gradient over the other samples


def preset_at(preset: Preset, over: str, value: float) -> Preset:
    """The preset with one quantity changed."""
    if over == "b-th":
        if not value > 0:
            raise ValueError(f"--values must be above 0 over b-th, got {value:g}")
        return dataclasses.replace(preset, b_th=value)
    if value % 1 != 0 or value < 1:
        raise ValueError(f"--values must be whole numbers of at least 1 over {over}, got {value}")
    if preset.net != "feedforward":
        raise ValueError(f"--over {over} needs a network of fully connected layers, got {preset.net}")
    widths = (int(value),) * len(preset.hidden) if over == "hidden" else (preset.hidden[0],) * int(value)
    return dataclasses.replace(preset, hidden=widths)


def sweep(arguments: argparse.Namespace, command: str) -> None:
    """Run it, writing the results so far after each value."""
    base = options.preset_of(arguments)
    values = arguments.values or VALUES[arguments.over]
    presets = [preset_at(base, arguments.over, value) for value in values]
    before = set_threads(arguments.threads)
    try:
        data = datasets.load(base.dataset, arguments.data, base.steps, arguments.limit)
        rows: list[dict[str, Any]] = []
        for value, preset in zip(values, presets, strict=True):
            experiment = Experiment(arguments.dataset, preset, arguments.seed)
            with Progress(preset.epochs * -(-len(data.train) // preset.batch), arguments.quiet) as progress:
                trainer, result = train(experiment, data, arguments.out, command, progress.advance)
            row = {"value": "inf" if value == math.inf else value, **_trained(result), **compare(trainer)}
            print(f"{arguments.over} {value:g}: {said(row)}", flush=True)
            rows.append(row)
            whole = {
                "over": arguments.over,
                "experiment": Experiment(arguments.dataset, base, arguments.seed).to_dict(),
                "data": result["data"],
                "rows": rows,
                "command": command,
                **machine.describe(),
            }
            write_text(arguments.out / _file(arguments, base), json.dumps(whole, indent=1, allow_nan=False) + "\n")
    finally:
        set_threads(before)


def _file(arguments: argparse.Namespace, base: Preset) -> str:
    layers = ["-".join(map(str, arguments.hidden))] if arguments.hidden else []
    words = ["sweep", arguments.dataset, arguments.over, *layers, base.short_surrogate, f"seed{arguments.seed}"]
    return "_".join(words) + ".json"


def _trained(result: dict[str, Any]) -> dict[str, Any]:
    history = result["history"]
    last = {"loss": None, "test_accuracy": None, **history[-1]}
    return {
        "epochs": last["epoch"],
        "status": result["status"],
        **{name: last[name] for name in ("loss", "test_accuracy", "spikes_pct", "active_pct")},
        "seconds": sum(entry.get("seconds", 0.0) for entry in history),
    }


def said(row: dict[str, Any]) -> str:
    stock, enabled = row["stock"], row["enabled"]
    ratios = [stock["ms"][part]["median"] / enabled["ms"][part]["median"] for part in ("backward", "whole")]
    accuracy = math.nan if row["test_accuracy"] is None else row["test_accuracy"]
    return (
        f"test accuracy {accuracy:.2f} %, backward {ratios[0]:.1f}x, whole step {ratios[1]:.1f}x, "
        f"kept {100 * enabled['kept_bytes'] / stock['kept_bytes']:.1f} %"
    )


class Disagreement(ValueError):
    """Stock and enabled do not compute the same."""


class Side(NamedTuple):
    """A network with the input it takes."""

    net: Any
    x: Any  #: [T, B, N], dense or events

    def renewed(self) -> Side:
        """The same events as an input not seen before, of which nothing is remembered."""
        if type(self.x) is Tensor:
            return self
        return Side(self.net, EventTensor(self.x.shape, self.x.row_ptr, self.x.indices, check=False))


def compare(trainer: Trainer) -> dict[str, Any]:
    """Stock against enabled on one training batch, with the trained weights: dense input for stock, events for ours.

    Raises:
        Disagreement: forward or gradients differ, so that no time of theirs may be compared.
    """
    preset = trainer.experiment.preset
    indices = torch.arange(min(preset.batch, len(trainer.data.train)))
    errors = _gradient_errors(trainer, indices[_agree(trainer, indices)])
    x, labels = trainer.data.train.batch(indices)
    sides = {"stock": Side(trainer.stock(), x.to_dense()), "enabled": Side(trainer.net, x)}
    loss = _loss(trainer, labels)
    neuron = sides["stock"].net.neurons[0]
    times: dict[str, list[Times]] = {name: [] for name in sides}
    order = list(sides)
    for repeat in range(REPEATS + 1):
        random.Random(repeat).shuffle(order)
        for name in order:
            gc.collect()
            one = _timed(sides[name], loss)
            if repeat:  # the first is for warming up
                times[name].append(one)
    measured = {
        name: {"ms": summary(times[name]), "kept_bytes": _kept(side, labels, loss)} for name, side in sides.items()
    }
    return {
        "mass_pct": 100 * mass_of_b_th(neuron.spike_grad, resolve_b_th(preset.b_th, neuron.spike_grad)),
        **measured,
        "gradient_error": errors,
    }


def _loss(trainer: Trainer, labels: Tensor) -> Callable[[Side], Tensor]:
    def loss(side: Side) -> Tensor:
        mem, spikes = side.net(side.x)
        return trainer.loss(mem, spikes, labels)

    return loss


def _timed(side: Side, loss: Callable[[Side], Tensor]) -> Times:
    side = side.renewed()
    start = time.perf_counter()
    side.net.zero_grad()
    value = loss(side)
    middle = time.perf_counter()
    value.backward()
    end = time.perf_counter()
    return Times(middle - start, end - middle, end - start)


def _kept(side: Side, labels: Tensor, loss: Callable[[Side], Tensor]) -> int:
    own = [*side.net.parameters(), *side.net.buffers(), labels]
    own += [side.x] if type(side.x) is Tensor else [side.x.row_ptr, side.x.indices]
    return kept_bytes(lambda: loss(side), exclude=own)


def _agree(trainer: Trainer, indices: Tensor) -> Tensor:
    """Which samples agree with stock's: E1 and E3 in float32. A membrane within rounding of the threshold may spike in
    one and not in the other: there may be few such samples, and on all others gradients must be masked stock's."""
    kept = agreeing(trainer, trainer.data.train.batch(indices)[0])
    share, worst = 1 - float(kept.double().mean()), 1.0
    if share <= FLIPPED:
        x, labels = trainer.data.train.batch(indices[kept])
        masked = trainer.stock()
        mask(masked, trainer.experiment.preset.b_th)
        theirs = parameter_gradients(trainer, masked, x.to_dense(), labels)
        ours = parameter_gradients(trainer, trainer.net, x, labels)
        worst = max(relative_error(ours[name], theirs[name]) for name in theirs)
    if share > FLIPPED or not worst <= ERROR:  # NaN is no agreement
        raise Disagreement(
            f"{trainer.experiment.id}: before anything is timed, at most {100 * FLIPPED:g} % of the samples may differ "
            f"from stock's and the others' gradients by at most {ERROR:g}, got {100 * share:.1f} % and {worst:.2g}: "
            "please report this, with the output of python -m sparse_backend doctor"
        )
    return kept


def _gradient_errors(trainer: Trainer, indices: Tensor) -> list[float]:
    """Relative, sparse against stock, of each linear or convolutional layer's weight, input to output."""
    x, labels = trainer.data.train.batch(indices)
    dense = parameter_gradients(trainer, trainer.stock(), x.to_dense(), labels)
    sparse = parameter_gradients(trainer, trainer.net, x, labels)
    return [relative_error(sparse[name], dense[name]) for name in dense if name.endswith("weight")]
