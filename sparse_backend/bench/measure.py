"""One case from drawn input to numbers: train, check, count, time."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_backend import EventTensor
from sparse_backend.bench import kernels, rss
from sparse_backend.bench.cases import SEQUENCE, SLACK, TARGETS, Case, Target, recorded_calls
from sparse_backend.bench.devices import Cpu
from sparse_backend.bench.gate import EXACT_SAMPLES, Gate
from sparse_backend.bench.graph import run_of
from sparse_backend.bench.inputs import Inputs
from sparse_backend.bench.models import framework_of
from sparse_backend.bench.paths import PATHS, Run, Unavailable
from sparse_backend.bench.timing import interleave, summary
from sparse_backend.bench.training import band, fitted_band, measure_activity, train
from sparse_backend.data import ImageSet


@dataclass(frozen=True)
class Settings:
    repeats: int | None = None  #: None: as many as fit in the device's `seconds`
    seed: int = 0
    rss: bool = False
    judged: bool = True  #: whether the numbers are held against the targets
    device: Cpu = dataclasses.field(default_factory=Cpu)


def measure(
    case: Case, settings: Settings, images: ImageSet | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The case's entry of the results; see `render.py` for what becomes of it."""
    with framework_of(case).given(case):
        return _measure(case, settings, images, say)


def _measure(case: Case, settings: Settings, images: ImageSet | None, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"{case.name}: training {case.train_steps} steps")
    device = settings.device
    inputs = _inputs(case, settings, images if case.data is not None else None)
    trained = train(case, inputs, settings.seed)
    batch = inputs.batch(case.batch)
    if case.crossover is not None:
        case = dataclasses.replace(case, b_th=fitted_band(trained.net, case.crossover, batch))
    activity = measure_activity(trained.net, case, batch)
    result: dict[str, Any] = {
        "case": case.to_dict(),
        "device": device.type,
        "sizes": case.sizes,
        "surrogate": framework_of(case).SURROGATES[case.surrogate][0],
        "band": _plain(band(trained.net, case)),
        "input": inputs.name,
        "input_events": batch.events_per_sample,
        "spikes_pct": activity.mean(activity.spikes),
        "active_pct": activity.mean(activity.active),
        "spikes_pct_by_layer": activity.spikes,
        "active_pct_by_layer": activity.active,
        "training": {"steps": trained.steps, "first_loss": trained.first_loss, "last_loss": trained.last_loss},
        "rows": [],
    }

    say(f"{case.name}: checking {len(case.paths)} paths")
    dense = batch.dense()
    gate = Gate(case, trained.net, inputs.batch(min(EXACT_SAMPLES, case.batch)), batch, dense)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {name: {"path": name, "label": PATHS[name].label} for name in case.paths}
    for name, row in rows.items():
        try:
            verdict = gate.judge(PATHS[name])
            if verdict.problem is None:
                runs[name] = run_of(PATHS[name], trained.net, case.b_th, batch, dense)
        except Unavailable as error:
            row["left_out"] = str(error)
            continue
        row["check"] = _plain(verdict.numbers)
        if verdict.problem is not None:
            row["refused"] = verdict.problem
            continue
        if note := PATHS[name].note:
            row["note"] = note(batch.labels.device)
    del gate

    say(f"{case.name}: timing")
    for name, run in runs.items():
        if run.path.learns and not run.path.captured:
            rows[name]["kept_bytes"] = run.kept_bytes()
    rotated: dict[str, list[Tensor | EventTensor]] = {}
    for run in runs.values():
        if run.path.input not in rotated:
            rotated[run.path.input] = copies(run.input, device.cache_bytes)
        run.rotate(rotated[run.path.input])
    seconds = device.seconds
    for name, times in interleave(runs, settings.repeats, seconds, settings.seed, case.once, device.warm).items():
        rows[name]["ms"] = summary(times)
        rows[name]["repeats"] = len(times)
    for name, run in runs.items():
        if run.path.learns and not run.path.captured:
            run.optimizer.zero_grad()
            peak = device.peak_bytes(run.step)
            if peak is not None:
                rows[name]["peak_bytes"] = peak
    if case.kernels and SEQUENCE in runs:
        say(f"{case.name}: kernel by kernel")
        result["kernels"] = kernels.table(runs[SEQUENCE], device)
    rotated.clear()
    runs.clear()
    if settings.rss:
        del dense
        for name, row in rows.items():
            if "ms" in row:
                say(f"{case.name}: peak memory of {name}")
                row["peak_bytes"] = rss.peak_bytes(case, trained.net, batch, name)
    for row in rows.values():
        _compare(case, row, rows, settings.judged)
    result["rows"] = list(rows.values())
    return result


_known_inputs: dict[tuple[Any, ...], Inputs] = {}


def _inputs(case: Case, settings: Settings, images: ImageSet | None) -> Inputs:
    """Networks that differ in their hidden layers alone are given the same batches, drawn once."""
    device = settings.device.type
    if device == "cpu":
        return Inputs(case, settings.seed, images)
    key = (case.inputs, case.steps, case.events, case.coding, case.classes, case.batch, case.train_steps, settings.seed)
    if key not in _known_inputs:
        _known_inputs[key] = Inputs(case, settings.seed, images, device)
    _known_inputs[key].rewind()
    return _known_inputs[key]


def copies(given: Tensor | EventTensor, least: int) -> list[Tensor | EventTensor]:
    """The input and copies of it, together at least as many bytes."""
    parts = (given.row_ptr, given.indices) if type(given) is EventTensor else (given,)
    size = sum(part.nbytes for part in parts)
    return [given, *(copy.deepcopy(given) for _ in range(1, math.ceil(least / max(1, size))))]


def _compare(case: Case, row: dict[str, Any], rows: Mapping[str, dict[str, Any]], judged: bool) -> None:
    """Ratios to stock, and what becomes of the targets."""
    stock = rows.get(PATHS[row["path"]].against, {})
    if "ms" in row and "ms" in stock:
        row["ratio"] = {part: stock["ms"][part]["median"] / row["ms"][part]["median"] for part in row["ms"]}
        for share, size in (("kept_share", "kept_bytes"), ("peak_share", "peak_bytes")):
            if size in row and size in stock:
                row[share] = row[size] / max(1, stock[size])
    if "ms" not in row:
        return
    row["targets"] = []
    for target in TARGETS if judged else ():
        against = rows.get(target.against, {})
        if (target.case, target.path) == (case.name, row["path"]) and "ms" in against:
            got = _got(case, target, row, against)
            entry = {"target": target.text, "quantity": target.quantity, "got": got, "reached": target.reached(got)}
            row["targets"].append(entry)


def _got(case: Case, target: Target, row: dict[str, Any], against: dict[str, Any]) -> float:
    """What there is of the target's quantity."""
    if target.quantity in ("kept", "peak"):
        size = f"{target.quantity}_bytes"
        return float(row[size]) / max(1, against[size])
    part = "whole" if target.quantity == "recording" else target.quantity
    ours, theirs = row["ms"][part]["median"], against["ms"][part]["median"]
    if target.quantity == "recording":
        return float(1e3 * (ours - SLACK * theirs) / recorded_calls(case))
    return float(theirs / ours)


def _plain(value: Any) -> Any:
    """Infinities and NaN as text: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def set_threads(count: int | None) -> int:
    """Set torch's threads where asked to; returns how many there were."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    return before
