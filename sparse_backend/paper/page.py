"""The pages made of the results: docs/paper.md, and the measured section of docs/choosing-b_th.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import published
from .presets import PRESETS
from .results import DATASETS, DENSE, Group, Mean, Point, Results, Run, Setting, SweepGroup, rule_b_th

if TYPE_CHECKING:
    from .figures import Figure

BEGIN, END = "<!-- sweep:begin -->", "<!-- sweep:end -->"
COMMAND = (
    "python -m sparse_backend paper figures --results docs/results --out docs/figures --page docs/paper.md "
    "--choosing docs/choosing-b_th.md"
)
_INTRO = f"""<!-- made by `{COMMAND}`: edit the results, not this page -->
# The paper, reproduced

{published.SOURCE}. Its networks, written as plain snnTorch code and enabled by the one line, on its data sets and on
stand-ins where they cannot be had. *Dense* is ordinary back-propagation, either snnTorch's own code ("stock") or the
same gradients by our kernels ("b_th = inf", held equal to stock in the tests); *sparse* is the paper's method. Accuracy
is on the test set at the last epoch, never the best one; ± is the standard error over seeds, and no seed is left out.
The paper's figures are from its text, on a GPU and an older stack: they say what it found, not what this machine
should do.

This page and its figures are made from the JSON files in docs/results alone; CONTRIBUTING.md has the commands.
"""


def paper(results: Results, figures: Sequence[Figure], folder: str, page: Path) -> str:
    """docs/paper.md. folder: of the figures, from the page."""
    shown = _Figures(figures, folder)
    parts = [
        _INTRO,
        *(_accuracy(results, shown) if results.runs else ["## Test accuracy\n\nNothing has been trained yet.\n"]),
        *_activity(results, shown),
        *_gradients(results, shown),
        *_sizes(results, shown),
        *_runs(results),
    ]
    return "\n".join(parts).rstrip() + "\n"


def choosing(results: Results, figures: Sequence[Figure], folder: str, page: Path) -> str:
    """docs/choosing-b_th.md as it is, with the section between its markers made anew.

    Raises ValueError where the markers are not there.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: the markers {BEGIN} and {END} expected: put them where the section belongs")
    section = "\n".join(_choosing(results.swept("b-th"), _Figures(figures, folder)))
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}"


class _Figures:
    """Markdown for the figures there are, by name."""

    def __init__(self, figures: Sequence[Figure], folder: str) -> None:
        self.figures, self.folder = figures, folder

    def __call__(self, *names: str) -> list[str]:
        found = [f for name in names for f in self.figures if f.name == name or f.name.startswith(f"{name}-fm")]
        return [
            f"![{figure.caption}]({self.folder}/{figure.file})\n\n*{figure.caption}*\n"
            if figure.data
            else f"*Figure “{figure.name}” is left out: it needs {figure.needs}.*\n"
            for figure in found
        ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are text, the others numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"


def _main(results: Results) -> list[Setting]:
    """The presets as they are; networks changed for a sweep aside."""
    return [setting for setting in results.settings if not setting.subject.changes]


# --- accuracy ------------------------------------------------------------------------------------------------------


def _accuracy(results: Results, shown: _Figures) -> list[str]:
    head = ["data set", "paper: dense → sparse", "dense", "sparse, same epochs", "sparse, at its end"]
    rows, said = [], []
    for setting in _main(results):
        dense, sparse = _first(setting.dense), _first(setting.sparse)
        both = min(dense.epochs, sparse.epochs) if dense and sparse else 0
        rows.append(
            [
                f"{setting.title}, {setting.data.train:,}/{setting.data.test:,}",
                _papers(setting.subject.name),
                _at(dense, both or (dense.epochs if dense else 0)),
                _at(sparse, both) if both else "–",
                _at(sparse, sparse.epochs if sparse else 0),
            ]
        )
        if dense and sparse and both:
            said.append(_verdict(setting, dense, sparse, both))
    missing = [name for name in PRESETS if not any(run.subject.name == name for run in results.runs)]
    return [
        "## Test accuracy\n",
        _table(head, rows),
        *(f"- {line}" for line in said),
        "",
        f"Not run here: {', '.join(f'`{name}`' for name in missing)}.\n" if missing else "",
        *shown("accuracy", "accuracy-training", "loss"),
    ]


def _first(groups: Sequence[Group]) -> Group | None:
    """The group with most seeds."""
    return max(groups, key=lambda group: len(group.runs)) if groups else None


def _at(group: Group | None, epoch: int) -> str:
    if group is None or not epoch:
        return "–"
    found = group.accuracy(epoch)
    stopped = "" if not group.unfinished else f", {len(group.unfinished)} not finished"
    return "–" if found is None else f"{found} % ({epoch} epochs, {_seeds(found.seeds)}{stopped})"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def _papers(name: str) -> str:
    found = published.PUBLISHED.get(name)
    if found is None:
        return "–"
    dense, sparse = found.accuracy
    return f"{'–' if dense is None else f'{dense:g} %'} → {sparse:g} % ({found.samples[0]:,}/{found.samples[1]:,})"


def _verdict(setting: Setting, dense: Group, sparse: Group, epoch: int) -> str:
    """Over the seeds that both have, so that each pair starts from the same weights and sees the same batches."""
    pairs = _pairs(dense, sparse, epoch)
    if not pairs:
        return f"{setting.title}: no seed was run both ways."
    difference = sum(pairs) / len(pairs)
    spread = math.sqrt(sum((pair - difference) ** 2 for pair in pairs) / (len(pairs) - 1)) if len(pairs) > 1 else None
    error = None if spread is None else spread / math.sqrt(len(pairs))
    words = f"{setting.title}: sparse − dense ({dense.how}) after {epoch} epochs, {_seeds(len(pairs))} in pairs: "
    sign = "+" if difference >= 0 else ""
    inside = "" if error is None else "within" if abs(difference) <= 2 * error else "beyond"
    return f"{words}{sign}{Mean(difference, error, len(pairs))} points{inside and f', {inside} two standard errors'}."


def _pairs(dense: Group, sparse: Group, epoch: int) -> list[float]:
    ours = {run.subject.seed: run.at(epoch).test_accuracy for run in sparse.runs}
    found = []
    for run in dense.runs:
        theirs, mine = run.at(epoch).test_accuracy, ours.get(run.subject.seed)
        if theirs is not None and mine is not None:
            found.append(mine - theirs)
    return found


# --- activity, gradients, sizes ------------------------------------------------------------------------------------


def _activity(results: Results, shown: _Figures) -> list[str]:
    low, high = published.ACTIVE
    rows = []
    for setting in _main(results):
        for group in setting.sparse:
            layers = list(zip(*(run.last.active for run in group.runs), strict=True))
            spikes = list(zip(*(run.last.spikes for run in group.runs), strict=True))
            means = [sum(layer) / len(layer) for layer in layers]
            rows.append(
                [
                    setting.title,
                    ", ".join(f"{value:.2g}" for value in means),
                    ", ".join(f"{sum(layer) / len(layer):.2g}" for layer in spikes),
                    "yes" if all(low <= value <= high for value in means) else "no",
                ]
            )
    if not rows:
        return []
    return [
        "## Activity\n",
        f"The paper reports that {low:g} to {high:g} % of the neurons are active, |V − θ| < b_th, in the course of "
        "training. Ours, "
        "with sparse gradients at the last epoch, layer by layer from the input, means over the seeds:\n",
        _table(["data set", "active %", "spikes %", f"within {low:g}–{high:g} %"], rows),
        "Activity is a property of the trained network, not of the method: the longer a network trains and the "
        "larger its "
        "learning rate, the more of its membranes come near the threshold. Nothing here holds it down; "
        "`sparse_backend.losses.upper_activity` does if added to the loss.\n",
        *shown("activity", "activity-hidden", "activity-size"),
    ]


def _gradients(results: Results, shown: _Figures) -> list[str]:
    found = [result for result in results.gradients if result.subject.sparse]
    if not found:
        return []
    rows = [
        [
            f"{result.subject.title}, seed {result.subject.seed}, epoch {result.epoch}",
            ", ".join(f"{100 * weight.relative_error:.1f}" for weight in result.weights),
            ", ".join(f"{weight.cosine:.4f}" for weight in result.weights),
            ", ".join(f"{weight.zeros_sparse:.0f} / {weight.zeros_dense:.0f}" for weight in result.weights),
        ]
        for result in found
    ]
    return [
        "## Gradients\n",
        "Sparse against dense gradients of the trained networks, on one test batch, weight by weight from the input. "
        "The paper "
        f"reports relative errors of at most {published.GRADIENT_ERROR:g} %.\n",
        _table(["network", "relative error %", "cosine", "zeros %, sparse / dense"], rows),
        *shown("gradients"),
    ]


def _sizes(results: Results, shown: _Figures) -> list[str]:
    groups = [*results.swept("hidden"), *results.swept("depth")]
    if not groups:
        return []
    text = [
        "## Speed and memory\n",
        "Whole training step and backward pass against stock snnTorch on the same trained weights and batch, after "
        "both agreed; "
        "medians of interleaved repeats, same threads; stock takes dense input, ours events. The paper reports, on "
        "its GPU, "
        f"{published.BACKWARD[0]:g} to {published.BACKWARD[1]:g}× for one layer's backward pass, up to "
        f"{published.BACKWARD_MOST:g}× at best, {published.WHOLE[0]:g} to {published.WHOLE[1]:g}× for the whole "
        "step, and up to "
        f"{published.MEMORY_LESS:g} % less memory.\n",
    ]
    for group in groups:
        named = "neurons in a hidden layer" if group.over == "hidden" else "hidden layers"
        rows = [[f"{point.value:g}", *_speeds(point)] for point in group.points]
        text += [f"{group.subject.title}; {_where(group)}:\n", _table([named, *_SPEEDS], rows, left=0)]
    return [*text, *shown("hidden", "depth")]


_SPEEDS = ("test accuracy %", "active %", "stock ms", "backward ×", "whole step ×", "kept %")


def _speeds(point: Point) -> list[str]:
    active = [value for row in point.rows for value in row.active]
    stock = sum(row.stock.whole for row in point.rows) / len(point.rows)
    return [
        f"{point.get('test_accuracy'):.1f}",
        f"{sum(active) / len(active):.2g}",
        f"{stock:.0f}",
        f"{point.get('backward'):.1f}",
        f"{point.get('whole'):.1f}",
        f"{point.get('kept'):.1f}",
    ]


def _where(group: SweepGroup) -> str:
    row = group.points[0].rows[0]
    epochs = f"{row.epochs} epoch{'s' if row.epochs != 1 else ''}"
    return f"{group.subject.preset.surrogate}, {epochs}, {group.sweeps[0].origin.where}"


# --- b_th ----------------------------------------------------------------------------------------------------------


def _choosing(groups: Sequence[SweepGroup], shown: _Figures) -> list[str]:
    if not groups:
        return ["Not measured yet: there is no sweep over b_th in docs/results."]
    text = []
    for group in groups:
        rows = [
            [_b_th(point), f"{point.get('mass'):.0f}", *_speeds(point), f"{point.get('worst_error'):.1f}"]
            for point in group.points
        ]
        text += [
            f'{group.subject.title}, {_where(group)}; "auto" would be {_auto(group)}:\n',
            _table(["b_th", "mass %", *_SPEEDS, "gradient error %"], rows, left=0),
        ]
    return [
        "Each row is a network trained from the same weights with that b_th, then timed against stock on its own "
        "trained "
        "weights. *Mass* is the share of the surrogate's area inside the band, *gradient error* that of the weight "
        "gradient "
        "farthest from the dense one, relative.\n",
        *text,
        *(f"- {_found(group)}" for group in groups),
        "",
        *shown("b_th"),
    ]


def _b_th(point: Point) -> str:
    return "∞ (dense)" if point.value == math.inf else f"{point.value:g}"


def _auto(group: SweepGroup) -> str:
    width = rule_b_th(group.subject.preset)
    return "∞" if math.isinf(width) else f"{width:.3g}"


def _found(group: SweepGroup) -> str:
    """What the numbers say of a surrogate: the least b_th within half a point of dense, and what it brings."""
    points = {point.value: point for point in group.points if not math.isnan(point.get("test_accuracy"))}
    dense = points.get(math.inf)
    if dense is None:
        return f"{group.subject.preset.surrogate}: no dense run to compare with."
    near = [p for b, p in points.items() if b < math.inf and p.get("test_accuracy") >= dense.get("test_accuracy") - 0.5]
    if not near:
        return f"{group.subject.preset.surrogate}: no b_th tried comes within half a point of dense."
    least = min(near, key=lambda point: point.value)
    return (
        f"{group.subject.preset.surrogate}: the least b_th within half a point of dense, "
        f"{dense.get('test_accuracy'):.1f} %, is "
        f"{least.value:g}, which keeps {least.get('mass'):.0f} % of the mass: {least.get('test_accuracy'):.1f} %, "
        "whole step "
        f"{least.get('whole'):.1f}×, {least.get('kept'):.1f} % of the memory; dense by our kernels is "
        f"{dense.get('whole'):.1f}×."
    )


# --- all of it -----------------------------------------------------------------------------------------------------


def _runs(results: Results) -> list[str]:
    if not results.runs:
        return []
    head = ["run", "gradients", "seed", "epochs", "status", "test accuracy %", "training time"]
    rows = [
        [
            f"`{run.subject.name}`" + (f", {run.subject.changes}" if run.subject.changes else ""),
            run.subject.how if run.subject.how != DENSE else "dense, b_th = inf",
            str(run.subject.seed),
            str(run.last.epoch),
            run.status,
            "–" if run.last.test_accuracy is None else f"{run.last.test_accuracy:.2f}",
            _minutes(run.seconds),
        ]
        for run in results.runs
    ]
    told = [_told(run) for run in results.runs if run.status in ("dead", "diverged")]
    everything: tuple[Any, ...] = (*results.runs, *results.gradients, *results.sweeps)
    origins = [result.origin for result in everything]
    commands = dict.fromkeys(origin.command for origin in origins)
    places = dict.fromkeys(origin.where for origin in origins)
    return [
        "## Every run\n",
        _table(head, rows, left=2),
        *told,
        "Times are of training alone, as they came: several runs may have shared the machine, so only the tables "
        "under speed "
        "compare times. DATA is the folder of the data set's own files, OUT that of the results.\n",
        "```console",
        *commands,
        "```\n",
        "Measured on: " + "; ".join(places) + ".\n",
        "Data sets: " + "; ".join(dict.fromkeys(_data(run) for run in results.runs)) + ".",
    ]


def _told(run: Run) -> str:
    why = {
        "dead": "a hidden layer spikes no more, so that no gradient reaches what lies below it",
        "diverged": f"the loss was not finite in epoch {run.last.epoch + 1}",
    }
    return f"- `{run.subject.name}`, {run.subject.how}, seed {run.subject.seed}: {why[run.status]}."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _data(run: Run) -> str:
    note = f" ({run.data.note})" if run.data.note else ""
    title = DATASETS[run.subject.preset.dataset]
    return f"{title}{note}, {run.data.events_per_sample:.0f} events a sample"
