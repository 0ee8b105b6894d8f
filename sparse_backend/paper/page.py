"""The pages made of the results: docs/paper.md, and the measured section of docs/choosing-b_th.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from . import published
from .presets import PRESETS
from .results import (
    DATASETS,
    DENSE,
    STOCK,
    Epoch,
    Gradients,
    Group,
    Point,
    Results,
    Run,
    Setting,
    Sweep,
    SweepGroup,
    mean_of,
    rule_b_th,
)

if TYPE_CHECKING:
    from .figures import Figure

BEGIN, END = "<!-- sweep:begin -->", "<!-- sweep:end -->"
COMMAND = (
    "python -m sparse_backend paper figures --results docs/results --out docs/figures --page docs/paper.md "
    "--choosing docs/choosing-b_th.md"
)
_INTRO = f"""<!-- made by `{COMMAND}`: edit the results, not this page -->
# The paper's experiments, run again

{published.SOURCE}. Its networks, written as plain snnTorch code and enabled by the one line, on its data sets and on
stand-ins where they cannot be had. *Dense* is ordinary back-propagation, either snnTorch's own code ("stock") or the
same gradients by our kernels ("b_th = inf", held equal to stock in the tests); *sparse* is the paper's method. Accuracy
is on the test set at the last epoch, never the best one; ± is the standard error over seeds, an interval Student's over
pairs of runs of one seed. No run that ended is left out, dead and diverged ones included.
The paper's figures are from its text, on a GPU and an older stack: they say what it found, not what this machine
should do.

This page and its figures are made from the JSON files in docs/results alone, which the commands under each table and
its figures wrote, DATA being the folder of the data set's own files and OUT that of the results: resumable, so that
the last of several commands of one run is the one that gives it.
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
        found = [f for name in names for f in self.figures if f.name == name]
        return [
            f"![{figure.caption}]({self.folder}/{figure.file})\n\n*{figure.caption}*\n"
            if figure.data
            else f"*Figure “{figure.name}” is left out: it needs {figure.needs}.*\n"
            for figure in found
        ]


def _percent(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


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
        if dense:
            others = [group for group in setting.groups if group.sparse and group not in setting.sparse]
            said += [_verdict(setting, dense, group, min(dense.epochs, group.epochs), group.how) for group in others]
    missing = [name for name in PRESETS if not any(run.subject.name == name for run in results.runs)]
    return [
        "## Test accuracy\n",
        _table(head, rows),
        *(f"- {line}" for line in (*said, *_remarks(results))),
        "",
        f"Not run here: {', '.join(f'`{name}`' for name in missing)}.\n" if missing else "",
        *shown("accuracy", "accuracy-training", "loss"),
        _commands(results.runs),
    ]


def _first(groups: Sequence[Group]) -> Group | None:
    """The group with most seeds."""
    return max(groups, key=lambda group: len(group.runs)) if groups else None


def _at(group: Group | None, epoch: int) -> str:
    if group is None or not epoch:
        return "–"
    found = group.accuracy(epoch)
    if found is None:
        return "–"
    failed, shorter = len(group.failed), len(group.shorter(epoch))
    failed_text = f", {failed} not finished" if failed else ""
    return f"{found} % ({epoch} epochs, {_seeds(found.seeds)}{failed_text}{f', {shorter} shorter' if shorter else ''})"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def _papers(name: str) -> str:
    found = published.PUBLISHED.get(name)
    if found is None:
        return "–"
    dense, sparse = found.accuracy
    return f"{'–' if dense is None else f'{dense:g} %'} → {sparse:g} % ({found.samples[0]:,}/{found.samples[1]:,})"


_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # t of 95 %, by degrees of freedom from 1 on


def _verdict(setting: Setting, dense: Group, sparse: Group, epoch: int, how: str = "sparse") -> str:
    """Over the seeds that both have, so that each pair starts from the same weights and sees the same batches."""
    ours, theirs = sparse.accuracies(epoch), dense.accuracies(epoch)
    found = mean_of(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())
    if found is None:
        return f"{setting.title}: no seed was run both ways."
    kind = "stock" if dense.how == STOCK else "b_th = inf"
    sign = "+" if found.value >= 0 else ""
    words = (
        f"{setting.title}: {how} − dense ({kind}) after {epoch} epochs, {_seeds(found.seeds)} in pairs: {sign}{found}"
    )
    if found.error is None:
        return f"{words} points; one seed tells nothing."
    half = found.error * _STUDENT[min(found.seeds - 1, len(_STUDENT)) - 1]
    low, high = found.value - half, found.value + half
    told = "sparse is better" if low > 0 else "sparse is worse" if high < 0 else "these seeds do not tell them apart"
    return f"{words} points, 95 % interval {low:+.2f} to {high:+.2f}: {told}."


def _remarks(results: Results) -> list[str]:
    """What in our experiments is not the paper's."""
    chosen = [
        f"`{name}` {', '.join(PRESETS[name].chosen)}"
        for name in dict.fromkeys(setting.subject.name for setting in _main(results))
        if PRESETS[name].chosen
    ]
    found = [f"Chosen here, since the paper does not give them or its data set is another: {'; '.join(chosen)}."]
    for setting in _main(results):
        full = PRESETS[setting.subject.name].epochs
        most = max(group.epochs for group in setting.groups)
        if most < full:
            whose = "its preset has" if "epochs" in PRESETS[setting.subject.name].chosen else "the paper trains"
            found.append(f"{setting.title}: at most {most} epochs here, {whose} {full}.")
    return found


# --- activity, gradients, sizes ------------------------------------------------------------------------------------


def _activity(results: Results, shown: _Figures) -> list[str]:
    low, high = published.ACTIVE
    rows, said = [], []
    for setting in _main(results):
        for group in setting.sparse:
            first, last = [run.history[0] for run in group.runs], [run.last for run in group.runs]
            after = _by_layer(last, "active")
            rows.append(
                [
                    f"{setting.title}, {group.epochs} epochs",
                    ", ".join(map(_percent, _by_layer(first, "active"))),
                    ", ".join(map(_percent, after)),
                    ", ".join(map(_percent, _by_layer(last, "spikes"))),
                    "yes" if all(low <= value <= high for value in after) else "no",
                ]
            )
            if max(after) > high:
                said.append(f"- {setting.title}: {_grown(group, high)}")
    if not rows:
        return []
    return [
        "## Activity\n",
        f"The paper reports that {low:g} to {high:g} % of the neurons are active, |V − θ| < b_th, in the course of "
        "training. Ours, with sparse gradients, on one test batch before training and at each run's last epoch, "
        "layer by layer from the input, means over the seeds:\n",
        _table(["data set", "active % before", "active % after", "spikes % after", f"within {low:g}–{high:g} %"], rows),
        "Activity is a property of the network and grows with training, and with it what a step costs; "
        "`sparse_backend.losses.upper_activity` holds it down where that matters (`fmnist-calm`).\n",
        *said,
        "",
        *shown("activity", "activity-hidden", "activity-size"),
        "The commands under test accuracy made this table; the last figure has those under speed and memory.\n",
    ]


def _by_layer(entries: Sequence[Epoch], quantity: str) -> list[float]:
    """Mean over runs, of each layer from the input."""
    return [mean(layer) for layer in zip(*(getattr(entry, quantity) for entry in entries), strict=True)]


def _grown(group: Group, high: float) -> str:
    """When activity passed what the paper saw."""
    epochs = range(min(len(run.history) for run in group.runs))
    most = [max(_by_layer([run.history[epoch] for run in group.runs], "active")) for epoch in epochs]
    last = next((epoch for epoch in epochs if most[epoch] > high), len(epochs)) - 1
    if last < 1:
        return f"above {high:g} % from the first epoch on."
    return f"no layer above {high:g} % up to epoch {last}, at {group.accuracy(last)} % test accuracy; the runs go on."


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
        "Sparse against dense gradients of the trained networks, on the samples of one test batch whose spikes are the "
        "same both ways, weight by weight from the input. The paper "
        f"reports relative errors of at most {published.GRADIENT_ERROR:g} %. The readout's weight does not depend on "
        "b_th. A spike's gradient "
        "is wanted only where its neuron is active, so the sparse ones, zero elsewhere, are far from the dense ones as "
        "tensors, which the picture shows.\n",
        _table(["network", "relative error %", "cosine", "zeros %, sparse / dense"], rows),
        *shown(*(figure.name for figure in shown.figures if figure.name.startswith("gradients"))),
        _commands(found),
    ]


def _sizes(results: Results, shown: _Figures) -> list[str]:
    groups = [*results.swept("hidden"), *results.swept("depth")]
    if not groups:
        return []
    text = [
        "## Speed and memory\n",
        "Whole step (forward, loss and backward; the optimiser's update, the same for both, is left out) and backward "
        "pass against stock snnTorch on the same trained weights and batch, after both agreed; "
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
    return [
        *text,
        *_backward(groups),
        *shown("hidden", "depth"),
        _commands(sweep for group in groups for sweep in group.sweeps),
    ]


def _backward(groups: Sequence[SweepGroup]) -> list[str]:
    """The paper's raw times beside ours of the same network."""
    measured: dict[str, Point] = {}
    for group in groups:
        for point in group.points:
            size = (2, point.value) if group.over == "hidden" else (point.value, group.subject.preset.hidden[0])
            if size == (2, 200):
                measured.setdefault(group.subject.preset.dataset, point)
    of_paper = {name: found for name, found in published.PUBLISHED.items() if found.backward_ms}
    rows = []
    for dataset in dict.fromkeys([*of_paper, *measured]):
        theirs = of_paper[dataset].backward_ms if dataset in of_paper else None
        ours = measured.get(dataset)
        rows.append(
            [
                DATASETS[dataset],
                "–" if theirs is None else f"{theirs[0]:g} → {theirs[1]:g} ({theirs[0] / theirs[1]:.1f}×)",
                f"{_stock_to_ours(ours, 'backward')} ({ours.get('backward'):.1f}×)" if ours else "not measured",
            ]
        )
    head = ["milliseconds of one backward pass", "paper: second hidden layer alone, its GPU", "here: the whole network"]
    return ["Two hidden layers of 200, dense → sparse:\n", _table(head, rows)]


def _stock_to_ours(point: Point, part: str) -> str:
    before, after = (mean(getattr(getattr(row, side), part) for row in point.rows) for side in ("stock", "enabled"))
    return f"{before:.0f} → {after:.3g}"


_SPEEDS = ("test accuracy %", "active %", "backward ms", "×", "whole step ms", "×", "kept %")


def _speeds(point: Point) -> list[str]:
    active = [value for row in point.rows for value in row.active]
    return [
        f"{point.get('test_accuracy'):.1f}",
        _percent(mean(active)),
        _stock_to_ours(point, "backward"),
        f"{point.get('backward'):.1f}",
        _stock_to_ours(point, "whole"),
        f"{point.get('whole'):.1f}",
        f"{point.get('kept'):.1f}",
    ]


def _commands(made: Iterable[Run | Gradients | Sweep]) -> str:
    return "\n".join(["```console", *dict.fromkeys(one.origin.command for one in made), "```\n"])


def _where(group: SweepGroup) -> str:
    row = group.points[0].rows[0]
    epochs = f"{row.epochs} epoch{'s' if row.epochs != 1 else ''}"
    surrogate = group.subject.preset.surrogate
    named = "" if surrogate in group.subject.title else f"{surrogate}, "
    return f"{named}{epochs}, {_seeds(len(group.seeds))}, {group.sweeps[0].origin.where}"


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
        "trained weights. The whole step is forward, loss and backward; the optimiser's update, the same for both, is "
        "left out. *Mass* is the share of the surrogate's area inside the band, *gradient error* that of the weight "
        "gradient farthest from the dense one, relative.\n",
        *text,
        *(f"- {_found(group)}" for group in groups),
        *(f"- {_swayed(group)}" for group in groups),
        "",
        *_recommended(groups),
        *shown("b_th"),
        _commands(sweep for group in groups for sweep in group.sweeps),
    ]


def _recommended(groups: Sequence[SweepGroup]) -> list[str]:
    """What each b_th costs at worst and brings at least, whatever the surrogate."""
    lost: dict[float, list[float]] = {}
    gained: dict[float, list[float]] = {}
    for group in groups:
        points = {point.value: point for point in group.points}
        dense = points.pop(math.inf, None)
        if dense is None:
            continue
        for b_th, point in points.items():
            lost.setdefault(b_th, []).append(dense.get("test_accuracy") - point.get("test_accuracy"))
            gained.setdefault(b_th, []).append(point.get("whole"))
    tried = sorted(b_th for b_th, losses in lost.items() if len(losses) == len(groups))
    if len(groups) < 2 or not tried:
        return []
    rows = [[f"{b_th:g}", f"{max(lost[b_th]):.1f}", f"{min(gained[b_th]):.1f}"] for b_th in tried]
    good = [b_th for b_th in tried if max(lost[b_th]) <= 1]
    text = [
        f"Over all {len(groups)} surrogates, each against its own dense training:\n",
        _table(["b_th", "points of accuracy lost at most", "whole step × at least"], rows, left=0),
    ]
    if good:
        text.append(
            f'**What we recommend** by these runs: with a steep surrogate keep "auto"; where "auto" is dense, begin '
            f"with `b_th={good[0]:g}`, the least that loses at most one point with every surrogate tried, and widen "
            "the band if `check` or your accuracy says so.\n"
        )
    return text


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
        f"{group.subject.preset.surrogate}, {_seeds(len(group.seeds))}: the least b_th within half a point of dense, "
        f"{dense.get('test_accuracy'):.1f} %, is "
        f"{least.value:g}, which keeps {least.get('mass'):.0f} % of the mass: {least.get('test_accuracy'):.1f} %, "
        "whole step "
        f"{least.get('whole'):.1f}×, {least.get('kept'):.1f} % of the memory; dense by our kernels is "
        f"{dense.get('whole'):.1f}×."
    )


def _swayed(group: SweepGroup) -> str:
    """How much of a time is the machine's: stock does the same work at every b_th."""
    times = [row.stock.whole for point in group.points for row in point.rows]
    return (
        f"{group.subject.preset.surrogate}: stock, which knows no b_th, took {min(times):.0f} to {max(times):.0f} ms "
        "for the same work, so much does the machine sway a time. The two sides of a ratio took turns, which sways "
        "it less."
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
    places = dict.fromkeys(result.origin.where for result in everything)
    return [
        "## Every run\n",
        _table(head, rows, left=2),
        *told,
        "Times are of training alone, as they came: several runs may have shared the machine, so only times that "
        "took turns, those of the sweeps, are compared.\n",
        "Measured on:\n",
        *(f"- {place}" for place in places),
        "",
        "Data sets: " + "; ".join(dict.fromkeys(_data(run) for run in results.runs)) + ".",
    ]


def _told(run: Run) -> str:
    why = {
        "dead": "a hidden layer spikes no more, so that no gradient reaches what lies below it",
        "diverged": f"the loss or a weight was not finite in epoch {run.last.epoch + 1}",
    }
    return f"- `{run.subject.name}`, {run.subject.how}, seed {run.subject.seed}: {why[run.status]}."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _data(run: Run) -> str:
    note = f" ({run.data.note})" if run.data.note else ""
    title = DATASETS[run.subject.preset.dataset]
    return f"{title}{note}, {run.data.events_per_sample:.0f} events a sample"
