"""A folder of results read back: every JSON file checked and typed, runs grouped so that seeds stand together."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, TypeVar

from sparse_backend.bench.render import where_line
from sparse_backend.surrogate import AUTO_MASS

from .presets import PRESETS, Preset

STATUSES = ("running", "finished", "dead", "diverged")
OVER = ("hidden", "b-th", "depth")
CURE = "make it again with `python -m sparse_backend paper`, or move it out of the folder of results"

STOCK, DENSE = "stock", "dense (b_th = inf)"
DATASETS = {
    "fmnist": "Fashion-MNIST",
    "nmnist": "N-MNIST",
    "shd": "SHD",
    "spoken": "Spoken digits (a stand-in for SHD)",
    "digits": "Handwritten digits 8 × 8",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Origin:
    """Where numbers come from."""

    file: str  #: its name
    command: str
    where: str  #: machine, versions, commit in one line


@dataclass(frozen=True)
class Data:
    name: str
    note: str
    train: int
    test: int
    events_per_sample: float


@dataclass(frozen=True)
class Subject:
    """What was trained."""

    name: str  #: a key of PRESETS
    preset: Preset
    seed: int
    stock: bool

    @property
    def how(self) -> str:
        """Whose gradients: snnTorch's own, dense by our kernels (equal to them), or sparse."""
        if self.stock:
            return STOCK
        b_th = self.preset.b_th
        return DENSE if b_th == math.inf else "sparse b_th " + (b_th if isinstance(b_th, str) else f"{b_th:g}")

    @property
    def sparse(self) -> bool:
        return self.how not in (STOCK, DENSE)

    @property
    def changes(self) -> str:
        """What differs from the named preset, gradients and epochs aside; empty where nothing does."""
        base, left_out = PRESETS[self.name], ("b_th", "epochs", "chosen")
        names = [field.name for field in dataclasses.fields(Preset) if field.name not in left_out]
        changed = [name for name in names if getattr(self.preset, name) != getattr(base, name)]
        return ", ".join(_changed(self.preset, name) for name in changed)

    @property
    def title(self) -> str:
        """The data set, and what is special about the network; never without what the data stands in for."""
        variant = {"sum": "sum over time"}.get(variant := self.name.partition("-")[2], variant)
        return ", ".join(part for part in (DATASETS[self.preset.dataset], variant, self.changes) if part)


class Mean(NamedTuple):
    """Over seeds."""

    value: float
    error: float | None  #: standard error; None of one value
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Of those there are."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Mean(mean(there), stdev(there) / math.sqrt(len(there)) if len(there) > 1 else None, len(there))


@dataclass(frozen=True)
class Epoch:
    """After so many epochs; epoch 0, before training, has activity alone. Activity in % of all (t, b, j), by layer."""

    epoch: int
    spikes: tuple[float, ...]
    active: tuple[float, ...]
    loss: float | None = None
    train_accuracy: float | None = None  #: %
    test_accuracy: float | None = None  #: %
    seconds: float = 0.0
    step_ms: float | None = None


@dataclass(frozen=True)
class Run:
    origin: Origin
    subject: Subject
    data: Data
    status: str
    history: tuple[Epoch, ...]

    @property
    def last(self) -> Epoch:
        return self.history[-1]

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.history)

    @property
    def failed(self) -> bool:
        return self.status in ("dead", "diverged")

    def accuracy(self, epoch: int) -> float | None:
        """Test accuracy after `epoch` epochs, of a run that died or diverged before that its last; None of one that
        was not trained so far."""
        if epoch > self.last.epoch and not self.failed:
            return None
        return self.history[min(epoch, self.last.epoch)].test_accuracy


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed."""

    how: str
    runs: tuple[Run, ...]

    @property
    def sparse(self) -> bool:
        return self.runs[0].subject.sparse

    @property
    def epochs(self) -> int:
        """Of the longest run."""
        return max(run.last.epoch for run in self.runs)

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs if run.failed]

    def shorter(self, epoch: int) -> list[Run]:
        """Those that were trained less than that, for no fault of theirs."""
        return [run for run in self.runs if run.last.epoch < epoch and not run.failed]

    def accuracies(self, epoch: int) -> dict[int, float]:
        """Test accuracy after `epoch` epochs, by seed."""
        found = {run.subject.seed: run.accuracy(epoch) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def accuracy(self, epoch: int) -> Mean | None:
        """Over the seeds of `accuracies`."""
        return mean_of(self.accuracies(epoch).values())


@dataclass(frozen=True)
class Setting:
    """One network on one data set, trained with one or more kinds of gradients."""

    subject: Subject  #: of the first run
    data: Data
    groups: tuple[Group, ...]

    @property
    def title(self) -> str:
        return self.subject.title

    @property
    def dense(self) -> list[Group]:
        return [group for group in self.groups if not group.sparse]

    @property
    def sparse(self) -> list[Group]:
        """With the preset's own b_th if there are any, otherwise with every b_th."""
        groups = [group for group in self.groups if group.sparse]
        return [g for g in groups if g.runs[0].subject.preset.b_th == PRESETS[self.subject.name].b_th] or groups


@dataclass(frozen=True)
class ParameterError:
    """Sparse against dense gradient of one parameter."""

    name: str
    relative_error: float
    cosine: float
    zeros_sparse: float  #: %
    zeros_dense: float  #: %


@dataclass(frozen=True)
class Picture:
    """A block of a gradient tensor, [rows][columns]; the relative error is the whole tensor's."""

    name: str
    axes: tuple[str, str]  #: what rows and columns are
    dense: tuple[tuple[float, ...], ...]
    sparse: tuple[tuple[float, ...], ...]
    relative_error: float


@dataclass(frozen=True)
class Gradients:
    origin: Origin
    subject: Subject
    epoch: int
    samples: int
    parameters: tuple[ParameterError, ...]
    pictures: tuple[Picture, ...]

    @property
    def weights(self) -> list[ParameterError]:
        return [parameter for parameter in self.parameters if parameter.name.endswith("weight")]


@dataclass(frozen=True)
class Timed:
    """Medians in ms of one training step; bytes alive for its backward pass."""

    forward: float
    backward: float
    whole: float
    kept: int


@dataclass(frozen=True)
class Row:
    """A sweep at one value."""

    value: float
    epochs: int
    status: str
    test_accuracy: float | None
    loss: float | None
    spikes: tuple[float, ...]
    active: tuple[float, ...]
    seconds: float
    mass: float  #: % of the surrogate's area inside b_th
    stock: Timed
    enabled: Timed
    gradient_error: tuple[float, ...]  #: relative, of each weight, input to output

    @property
    def backward(self) -> float:
        """Times faster than stock."""
        return self.stock.backward / self.enabled.backward

    @property
    def whole(self) -> float:
        """Times faster than stock."""
        return self.stock.whole / self.enabled.whole

    @property
    def kept(self) -> float:
        """% of stock."""
        return 100 * self.enabled.kept / self.stock.kept

    @property
    def worst_error(self) -> float:
        """% of the dense gradient, of the weight where it is largest."""
        return 100 * max(self.gradient_error)


@dataclass(frozen=True)
class Sweep:
    origin: Origin
    over: str
    subject: Subject
    data: Data
    rows: tuple[Row, ...]


class Point(NamedTuple):
    """Sweeps that differ in their seed, at one value."""

    value: float
    rows: tuple[Row, ...]

    def mean(self, quantity: Callable[[Row], float | None]) -> Mean | None:
        return mean_of(quantity(row) for row in self.rows)

    def get(self, quantity: str) -> float:
        """Mean of a Row's attribute; NaN where no seed has it."""
        found = self.mean(lambda row: getattr(row, quantity))
        return math.nan if found is None else found.value


@dataclass(frozen=True)
class SweepGroup:
    """Sweeps that differ in their seed."""

    sweeps: tuple[Sweep, ...]

    @property
    def over(self) -> str:
        return self.sweeps[0].over

    @property
    def subject(self) -> Subject:
        return self.sweeps[0].subject

    @property
    def points(self) -> list[Point]:
        """By value."""
        values: dict[float, list[Row]] = {}
        for sweep in self.sweeps:
            for row in sweep.rows:
                values.setdefault(row.value, []).append(row)
        return [Point(value, tuple(rows)) for value, rows in sorted(values.items())]

    @property
    def seeds(self) -> list[int]:
        return [sweep.subject.seed for sweep in self.sweeps]


@dataclass(frozen=True)
class Results:
    """All of a folder, in the order of the presets."""

    runs: tuple[Run, ...]
    gradients: tuple[Gradients, ...]
    sweeps: tuple[Sweep, ...]

    @property
    def settings(self) -> list[Setting]:
        found: dict[Any, list[Run]] = {}
        for run in self.runs:
            same = dataclasses.replace(run.subject.preset, b_th=0.0, epochs=0)
            key = (run.subject.name, same, run.data.name, run.data.train, run.data.test)
            found.setdefault(key, []).append(run)
        return [Setting(runs[0].subject, runs[0].data, _groups(runs)) for runs in found.values()]

    def swept(self, over: str) -> list[SweepGroup]:
        found: dict[Any, list[Sweep]] = {}
        for sweep in self.sweeps:
            if sweep.over == over:
                subject = sweep.subject
                same = dataclasses.replace(subject.preset, epochs=0)
                key = (subject.name, same, sweep.data.name, sweep.data.train, sweep.data.test)
                found.setdefault(key, []).append(sweep)
        return [SweepGroup(tuple(sweeps)) for sweeps in found.values()]

    def __bool__(self) -> bool:
        return bool(self.runs or self.gradients or self.sweeps)


def rule_b_th(preset: Preset) -> float:
    """What b_th = "auto" is with the preset's surrogate: AUTO_MASS of its area, see docs/choosing-b_th.md."""
    if preset.slope:
        return AUTO_MASS / (1 - AUTO_MASS) / preset.slope
    return math.tan(math.pi / 2 * AUTO_MASS) / math.pi


def load(folder: Path) -> Results:
    """Every *.json of the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file in it is damaged, or is not a result of `train` or `sweep`; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--results must be a folder of results, got {str(folder)!r}, which is none: "
            "make one with `python -m sparse_backend paper train`"
        )
    runs: list[Run] = []
    gradients: list[Gradients] = []
    sweeps: list[Sweep] = []
    for path in sorted(folder.glob("*.json")):
        result = read(path)
        {Run: runs, Gradients: gradients, Sweep: sweeps}[type(result)].append(result)  # type: ignore[attr-defined]
    presets = list(PRESETS)

    def ordered(found: Sequence[_T]) -> tuple[_T, ...]:
        return tuple(sorted(found, key=lambda result: _order(result, presets)))

    return Results(ordered(runs), ordered(gradients), ordered(sweeps))


def read(path: Path) -> Run | Gradients | Sweep:
    """One file; errors of `load`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be JSON, got {error}: {CURE}") from error
    fields = _Fields(values, path.name)
    origin = Origin(path.name, fields.take("command", _text), _where(fields, path.name))
    if "over" in values:
        return _sweep(fields, origin)
    return _gradients(fields, origin) if "pictures" in values else _run(fields, origin)


class _Fields:
    """A JSON object, taken apart field by field; what nobody takes is unknown."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise _wrong(where, "an object", values)
        self.values, self.where, self.taken = values, where, set[str]()

    def take(self, name: str, kind: Callable[[Any, str], _T]) -> _T:
        where = f"{self.where}: {name}"
        self.taken.add(name)
        if name not in self.values:
            raise ValueError(f"{where} must be there, got only {_short(sorted(self.values))}: {CURE}")
        return kind(self.values[name], where)

    def done(self) -> None:
        if unknown := sorted(self.values.keys() - self.taken):
            raise ValueError(f"{self.where} must hold only {sorted(self.taken)}, got also {_short(unknown)}: {CURE}")


def _run(fields: _Fields, origin: Origin) -> Run:
    run = Run(
        origin,
        fields.take("experiment", _subject),
        fields.take("data", _data),
        fields.take("status", _one_of(STATUSES)),
        fields.take("history", _many(_epoch)),
    )
    fields.done()
    if [entry.epoch for entry in run.history] != list(range(len(run.history))):
        raise _wrong(f"{origin.file}: history", "epochs 0, 1, 2, ...", [entry.epoch for entry in run.history])
    return run


def _gradients(fields: _Fields, origin: Origin) -> Gradients:
    gradients = Gradients(
        origin,
        fields.take("experiment", _subject),
        fields.take("epoch", _whole),
        fields.take("samples", _whole),
        fields.take("gradients", _many(_parameter)),
        fields.take("pictures", _many(_picture, least=0)),
    )
    fields.done()
    return gradients


def _sweep(fields: _Fields, origin: Origin) -> Sweep:
    sweep = Sweep(
        origin,
        fields.take("over", _one_of(OVER)),
        fields.take("experiment", _subject),
        fields.take("data", _data),
        fields.take("rows", _many(_row)),
    )
    fields.done()
    return sweep


def _where(fields: _Fields, file: str) -> str:
    names = ("machine", "versions", "kernels", "commit")
    content = {name: fields.take(name, lambda value, _: value) for name in names}
    try:
        return where_line(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise _wrong(file, "machine, versions, kernels and commit as the trainer writes them", content) from error


def _subject(value: Any, where: str) -> Subject:
    fields = _Fields(value, where)
    subject = Subject(
        fields.take("name", _one_of(tuple(PRESETS))),
        fields.take("preset", _preset),
        fields.take("seed", _whole),
        fields.take("stock", _flag),
    )
    fields.done()
    return subject


def _preset(value: Any, where: str) -> Preset:
    try:
        preset = Preset.from_dict(value)
        if preset.dataset not in DATASETS:
            raise ValueError(preset.dataset)
        return preset
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must be a preset of this version, got {_short(value)} ({error}): {CURE}") from error


def _data(value: Any, where: str) -> Data:
    fields = _Fields(value, where)
    data = Data(
        fields.take("name", _text),
        fields.take("note", _text),
        fields.take("train", _whole),
        fields.take("test", _whole),
        fields.take("events_per_sample", _number),
    )
    fields.done()
    return data


def _epoch(value: Any, where: str) -> Epoch:
    fields = _Fields(value, where)
    epoch = fields.take("epoch", _whole)
    active = fields.take("spikes_pct", _many(_number)), fields.take("active_pct", _many(_number))
    names = ("loss", "train_accuracy", "test_accuracy", "seconds", "step_ms") if epoch else ()
    numbers = {name: fields.take(name, _number) for name in names}
    fields.done()
    return Epoch(epoch, *active, **numbers)  # type: ignore[arg-type]


def _parameter(value: Any, where: str) -> ParameterError:
    fields = _Fields(value, where)
    numbers = ("relative_error", "cosine", "zeros_sparse_pct", "zeros_dense_pct")
    parameter = ParameterError(fields.take("name", _text), *(fields.take(name, _number) for name in numbers))
    fields.done()
    return parameter


def _picture(value: Any, where: str) -> Picture:
    fields = _Fields(value, where)
    rows = _many(_many(_number))
    picture = Picture(
        fields.take("name", _text),
        fields.take("axes", _pair),
        fields.take("dense", rows),
        fields.take("sparse", rows),
        fields.take("relative_error", _number),
    )
    fields.done()
    widths = [[len(row) for row in block] for block in (picture.dense, picture.sparse)]
    if widths[0] != widths[1] or len(set(widths[0])) != 1:
        raise _wrong(where, "dense and sparse as rows of one length", widths)
    return picture


def _row(value: Any, where: str) -> Row:
    fields = _Fields(value, where)
    row = Row(
        fields.take("value", _value),
        fields.take("epochs", _whole),
        fields.take("status", _one_of(STATUSES)),
        fields.take("test_accuracy", _maybe),
        fields.take("loss", _maybe),
        fields.take("spikes_pct", _many(_number)),
        fields.take("active_pct", _many(_number)),
        fields.take("seconds", _number),
        fields.take("mass_pct", _number),
        fields.take("stock", _timed),
        fields.take("enabled", _timed),
        fields.take("gradient_error", _many(_number)),
    )
    fields.done()
    return row


def _timed(value: Any, where: str) -> Timed:
    fields = _Fields(value, where)

    def part(value: Any, where: str) -> float:
        parts = _Fields(value, where)
        medians = [parts.take(name, _above_zero) for name in ("median", "low", "high")]
        parts.done()
        return medians[0]

    def of_parts(value: Any, where: str) -> list[float]:
        parts = _Fields(value, where)
        medians = [parts.take(name, part) for name in ("forward", "backward", "whole")]
        parts.done()
        return medians

    forward, backward, whole = fields.take("ms", of_parts)
    timed = Timed(forward, backward, whole, fields.take("kept_bytes", _above_zero))
    fields.done()
    return timed


def _number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _wrong(where, "a number", value)
    return value


def _above_zero(value: Any, where: str) -> Any:
    if _number(value, where) <= 0:
        raise _wrong(where, "a number above 0", value)
    return value


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(where, "a whole number of at least 0", value)
    return value


def _maybe(value: Any, where: str) -> float | None:
    return None if value is None else _number(value, where)


def _value(value: Any, where: str) -> float:
    return math.inf if value == "inf" else _number(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "text", value)
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def _one_of(known: tuple[str, ...]) -> Callable[[Any, str], str]:
    def check(value: Any, where: str) -> str:
        if value not in known:
            raise _wrong(where, f"one of {', '.join(known)}", value)
        return str(value)

    return check


def _many(kind: Callable[[Any, str], _T], least: int = 1) -> Callable[[Any, str], tuple[_T, ...]]:
    def check(value: Any, where: str) -> tuple[_T, ...]:
        if not isinstance(value, list) or len(value) < least:
            raise _wrong(where, f"a list of at least {least}", value)
        return tuple(kind(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check


def _pair(value: Any, where: str) -> tuple[str, str]:
    texts = _many(_text, 2)(value, where)
    return texts[0], texts[1]


def _wrong(where: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{where} must be {expected}, got {_short(got)}: {CURE}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(constant: str) -> float:
    raise ValueError(f"the number {constant}")


def _changed(preset: Preset, name: str) -> str:
    value = getattr(preset, name)
    if name == "slope":
        return preset.surrogate
    if name == "hidden":
        return "hidden " + "-".join(map(str, value))
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Stock, dense, then sparse by b_th."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.subject.how, []).append(run)
    groups = [Group(how, tuple(of)) for how, of in found.items()]

    def order(group: Group) -> tuple[int, float]:
        b_th = group.runs[0].subject.preset.b_th
        return (STOCK, DENSE).index(group.how) if not group.sparse else 2, 0.0 if b_th == "auto" else b_th

    return tuple(sorted(groups, key=order))


def _order(result: Any, presets: list[str]) -> tuple[Any, ...]:
    subject: Subject = result.subject
    return presets.index(subject.name), bool(subject.changes), result.origin.file
