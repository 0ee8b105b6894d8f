"""The figures as matplotlib draws them: one function each, from checked results to a figure."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import matplotlib.lines
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sparse_backend.surrogate import AUTO_MASS

from . import published
from .results import DENSE, STOCK, Gradients, Group, Mean, Picture, Point, Setting, SweepGroup, rule_b_th

# Okabe and Ito's colours, told apart with any colour vision; vermilion is the paper's everywhere
SPARSE, GREY, LIGHT_GREY, PAPER = "#0072B2", "#5c5c5c", "#a3a3a3", "#D55E00"
SERIES = (SPARSE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*"
WIDTH = 7.2  # inches, of a text column
SMALL = 7
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 8,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "hatch.linewidth": 0.4,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "sparse_backend",  # names within the file are the same every time
    "svg.fonttype": "path",
}


def svg(draw: Callable[[Any], Figure], data: Any) -> tuple[str, str]:
    """The figure as SVG, the same text for the same data, and a digest of what is drawn."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = draw(data)
        FigureCanvasAgg(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue(), digest(figure)


def digest(figure: Figure) -> str:
    """Of the data and words drawn, whatever the version of matplotlib: numbers to 6 digits."""
    parts: list[Any] = [figure.get_suptitle()]
    for axes in figure.axes:
        parts += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        parts += [(line.get_label(), str(line.get_color()), _numbers(line.get_xydata())) for line in axes.lines]
        parts += [
            _numbers(patch.get_path().transformed(patch.get_patch_transform()).vertices) for patch in axes.patches
        ]
        parts += [_numbers(path.vertices) for many in axes.collections for path in many.get_paths()]
        parts += [_numbers(np.ma.filled(image.get_array(), np.nan)) for image in axes.images]
        parts += [(text.get_text(), _numbers(getattr(text, "xy", text.get_position()))) for text in axes.texts]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _numbers(values: Any) -> list[str]:
    return [f"{value:.6g}" for value in np.asarray(values, dtype=float).ravel()]


# Parts of figures.


class Label(NamedTuple):
    """Beside the last point of a line, in data coordinates."""

    x: float
    y: float
    text: str
    colour: Any


def _panels(count: int, height: float = 2.1, most: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(count, most) if count != 4 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * {1: 0.62}.get(columns, 1), height * rows + 0.1), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _labels(axes: Axes, labels: Sequence[Label], gap: float = 0.085) -> None:
    """Write them, moved apart to `gap` of the axes' height; the limits of y must be final."""
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label.y)
    heights = [(label.y - low) / (high - low) for label in ordered]
    for _ in range(50):
        for i in range(len(heights) - 1):
            if (lack := gap - (heights[i + 1] - heights[i])) > 0:
                heights[i], heights[i + 1] = heights[i] - lack / 2, heights[i + 1] + lack / 2
    for label, height in zip(ordered, heights, strict=True):
        axes.annotate(
            label.text, (label.x, height), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            color=label.colour, va="center", fontsize=SMALL,
        )  # fmt: skip


def _paper_band(axes: Axes, low: float, high: float, text: str) -> None:
    axes.axhspan(low, high, color=PAPER, alpha=0.09, linewidth=0)
    axes.text(
        0.985, high, text, color=PAPER, fontsize=SMALL, ha="right", va="bottom", transform=axes.get_yaxis_transform()
    )


def _shades(count: int) -> list[tuple[float, ...]]:
    """From light to dark blue."""
    return [tuple(matplotlib.colormaps["Blues"](x)) for x in np.linspace(0.45, 0.95, count)]


def _colour(group: Group) -> str:
    return {STOCK: LIGHT_GREY, DENSE: GREY}.get(group.how, SPARSE)


def _short(group: Group) -> str:
    return {STOCK: "stock", DENSE: "dense"}.get(group.how, group.how)


def _over_epochs(group: Group, quantity: Callable[[Any], float | None]) -> tuple[list[int], np.ndarray]:
    """Epochs, and mean, lowest, highest over the seeds that got there: [epochs, 3]."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for entry in run.history:
            if (value := quantity(entry)) is not None:
                values.setdefault(entry.epoch, []).append(value)
    epochs = sorted(values)
    return epochs, np.array([(np.mean(values[e]), min(values[e]), max(values[e])) for e in epochs]).reshape(-1, 3)


def _band(axes: Axes, x: Sequence[float], values: np.ndarray, colour: Any, **line: Any) -> None:
    axes.fill_between(x, values[:, 1], values[:, 2], color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, values[:, 0], color=colour, marker="o" if len(x) == 1 else None, **line)


def _log_ticks(axes: Axes, first: float, last: float) -> None:
    ticks = [m * 10**e for e, m in itertools.product(range(-3, 5), (1, 2, 5))]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if first <= tick <= last]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _title(setting: Setting) -> str:
    """With a line's end where it is long."""
    return setting.title.replace(" (", "\n(").replace(", ", ",\n", 1) if len(setting.title) > 26 else setting.title


# Training.


def activity(settings: Sequence[Setting]) -> Figure:
    """Active % of each hidden layer over training, sparse runs."""
    figure, panels = _panels(len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        labels = []
        low, high = published.ACTIVE
        highest = high
        for group in setting.sparse[:1]:
            layers = len(group.runs[0].history[0].active)
            for layer, colour in enumerate(_shades(layers)):
                epochs, values = _over_epochs(group, lambda entry, layer=layer: entry.active[layer])  # type: ignore[misc]
                _band(axes, epochs, values, colour, label=f"layer {layer + 1}")
                labels.append(Label(epochs[-1], float(values[-1, 0]), f"layer {layer + 1}", colour))
                highest = max(highest, values.max())
        _paper_band(axes, low, high, f"paper: {low:g}–{high:g} %")
        axes.set(
            title=_title(setting), xlabel="epoch", ylabel="active neurons, %", ylim=(0, 1.12 * highest), xlim=(0, None)
        )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _labels(axes, labels)
    return figure


def activity_by_hidden(settings: dict[str, Sequence[Setting]]) -> Figure:
    """Active %, mean over hidden layers, over training: a line for each number of hidden neurons."""
    figure, panels = _panels(len(settings))
    for axes, of_one in zip(panels, settings.values(), strict=True):
        labels = []
        for setting, colour in zip(of_one, _shades(len(of_one)), strict=True):
            epochs, values = _over_epochs(setting.sparse[0], lambda entry: float(np.mean(entry.active)))
            name = "-".join(map(str, setting.subject.preset.hidden))
            _band(axes, epochs, values, colour, label=name)
            labels.append(Label(epochs[-1], float(values[-1, 0]), name, colour))
        low, high = published.ACTIVE
        _paper_band(axes, low, high, f"paper: {low:g}–{high:g} %")
        axes.set(title=of_one[0].subject.title.split(",")[0], xlabel="epoch", ylabel="active neurons, %")
        axes.set(ylim=(0, 1.12 * max(high, axes.dataLim.y1)), xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _labels(axes, labels)
    return figure


def loss(settings: Sequence[Setting]) -> Figure:
    return _curves(settings, "loss", "training loss")


def accuracy_over_epochs(settings: Sequence[Setting]) -> Figure:
    return _curves(settings, "test_accuracy", "test accuracy, %")


def _curves(settings: Sequence[Setting], quantity: str, name: str) -> Figure:
    """Sparse against dense over epochs, on a logarithmic axis: dense runs are often the shorter ones."""
    figure, panels = _panels(len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        labels, longest = [], 1
        for group in (*setting.dense, *setting.sparse):
            epochs, values = _over_epochs(group, lambda entry: getattr(entry, quantity))
            if epochs:
                _band(axes, epochs, values, _colour(group), label=group.how)
                labels.append(Label(epochs[-1], float(values[-1, 0]), _short(group), _colour(group)))
                longest = max(longest, epochs[-1])
        _log_ticks(axes, 1, longest)
        axes.set(title=_title(setting), xlabel="epoch", ylabel=name)
        axes.margins(y=0.08)
        _labels(axes, labels)
    return figure


class Bar(NamedTuple):
    group: Group
    epoch: int
    accuracy: Mean


def bars_of(setting: Setting) -> list[Bar]:
    """Every group at its last epoch, longer sparse ones also where the dense runs end."""
    ends = [group.epochs for group in setting.dense]
    bars = []
    for group in (*setting.dense, *setting.sparse):
        for epoch in sorted({*(end for end in ends if group.sparse and end < group.epochs), group.epochs}):
            if accuracy := group.accuracy(epoch):
                bars.append(Bar(group, epoch, accuracy))
    return bars


def accuracy(settings: Sequence[Setting]) -> Figure:
    """Bars with standard error over seeds, the seeds themselves as dots, the paper's numbers as marks."""
    all_bars = [bars_of(setting) for setting in settings]
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    left, centres = 0.0, []
    for setting, bars in zip(settings, all_bars, strict=True):
        reported = published.PUBLISHED.get(setting.subject.name) if not setting.subject.changes else None
        for place, bar in enumerate(bars):
            x = left + place
            axes.bar(
                x,
                bar.accuracy.value,
                0.82,
                color=_colour(bar.group),
                alpha=0.9 if bar.epoch == bar.group.epochs else 0.55,
            )
            dots = list(bar.group.accuracies(bar.epoch).values())
            offsets = np.linspace(-0.22, 0.22, len(dots)) if len(dots) > 1 else [0.0]
            axes.plot(x + np.asarray(offsets), dots, "o", color="black", markersize=1.6, linestyle="")
            if bar.accuracy.error is not None:
                axes.errorbar(x, bar.accuracy.value, bar.accuracy.error, color="black", capsize=3, linewidth=0.9)
            text = f"{bar.accuracy.value:.1f}" + (
                f"\n±{bar.accuracy.error:.1f}" if bar.accuracy.error is not None else ""
            )
            axes.annotate(text, (x, 102), ha="center", va="bottom", fontsize=SMALL)
            axes.annotate(f"epoch\n{bar.epoch}", (x, 2), ha="center", va="bottom", fontsize=6, color="white")
            if reported and (mark := reported.accuracy[bar.group.sparse]) is not None:
                axes.plot([x - 0.41, x + 0.41], [mark, mark], color=PAPER, linewidth=1.6)
        centres.append(left + (len(bars) - 1) / 2)
        left += len(bars) + 0.9
    axes.set(ylabel="test accuracy, %", ylim=(0, 114), yticks=range(0, 101, 20), xlim=(-0.8, max(left - 1.1, 4)))
    axes.set_xticks(centres, [_title(setting) for setting in settings])
    axes.tick_params(axis="x", length=0)
    present = {bar.group.how if not bar.group.sparse else "sparse" for bars in all_bars for bar in bars}
    names = {STOCK: (LIGHT_GREY, "stock"), DENSE: (GREY, "dense"), "sparse": (SPARSE, "sparse")}
    handles: list[Any] = [Patch(color=colour, label=text) for how, (colour, text) in names.items() if how in present]
    handles.append(matplotlib.lines.Line2D([], [], color=PAPER, linewidth=1.6, label="the paper's number"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=SMALL + 0.5)
    return figure


# Gradients.


def gradients(result: Gradients) -> Figure:
    """Each picture as dense, sparse and their difference, on one scale; exact zeros hatched."""
    pictures = result.pictures
    figure = Figure(figsize=(WIDTH, 1.75 * len(pictures) + 0.35), layout="constrained")
    rows = figure.subplots(len(pictures), 3, squeeze=False, sharex="row", sharey="row")
    for row, picture in zip(rows, pictures, strict=True):
        _blocks(figure, row, picture)
    figure.legend(
        handles=[Patch(facecolor="#f6f6f6", edgecolor="#8a8a8a", hatch="//////", linewidth=0, label="exactly zero")],
        loc="outside upper right", fontsize=SMALL + 0.5,
    )  # fmt: skip
    return figure


def _blocks(figure: Figure, row: Sequence[Axes], picture: Picture) -> None:
    dense, sparse = np.array(picture.dense), np.array(picture.sparse)
    top = float(np.quantile(np.abs(dense), 0.99)) or float(np.abs(dense).max()) or 1.0
    titles = (
        f"{picture.name}: dense",
        "sparse",
        f"sparse − dense; relative error {100 * picture.relative_error:.3g} %",
    )
    for axes, block, title in zip(row, (dense, sparse, sparse - dense), titles, strict=True):
        axes.add_patch(
            Rectangle((0, 0), 1, 1, transform=axes.transAxes, facecolor="#f6f6f6", edgecolor="#8a8a8a", hatch="//////",
                      linewidth=0, zorder=0)
        )  # fmt: skip
        image = axes.imshow(
            np.ma.masked_equal(block, 0), cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="none"
        )
        axes.set_title(title)
        axes.set_xlabel(picture.axes[1])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(True)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    row[0].set_ylabel(picture.axes[0])
    bar = figure.colorbar(image, ax=list(row), fraction=0.02, pad=0.01, extend="both", ticks=[-top, 0, top])
    bar.ax.set_yticklabels([f"{-top:.1g}", "0", f"{top:.1g}"], fontsize=6.5)
    bar.outline.set_linewidth(0.5)


# Speed, memory and accuracy over a range.


class Quantity(NamedTuple):
    """A panel of a sweep's figure."""

    row: str  #: an attribute of Row
    title: str
    unit: str
    paper: tuple[float, float] | None = None
    paper_text: str = ""


ACCURACY = Quantity("test_accuracy", "Test accuracy", "%")
BACKWARD = Quantity(
    "backward", "Backward pass", "times faster than stock", published.BACKWARD,
    "paper, one layer, GPU: {:g}–{:g}×".format(*published.BACKWARD),
)  # fmt: skip
WHOLE = Quantity(
    "whole",
    "Training step",
    "times faster than stock",
    published.WHOLE,
    "paper, GPU: {:g}–{:g}×".format(*published.WHOLE),
)
KEPT = Quantity(
    "kept", "Memory kept for backward", "% of stock", (100 - published.MEMORY_LESS,) * 2,
    f"paper, at best: {100 - published.MEMORY_LESS:g} %",
)  # fmt: skip
ERROR = Quantity(
    "worst_error", "Weight gradient error", "% of the dense gradient", (published.GRADIENT_ERROR,) * 2,
    f"paper, at most: {published.GRADIENT_ERROR:g} %",
)  # fmt: skip


def hidden(groups: Sequence[SweepGroup]) -> Figure:
    figure, panels = _panels(3)
    for axes, quantity in zip(panels, (BACKWARD, WHOLE, KEPT), strict=True):
        _sweep_panel(axes, quantity, groups, lambda group: [point.value for point in group.points])
        axes.set_xlabel("neurons in each hidden layer")
        axes.set_xlim(0, None)
    return figure


def activity_at_end(groups: Sequence[SweepGroup]) -> Figure:
    """Active % of each hidden layer after training, against the number of hidden neurons."""
    figure, panels = _panels(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        labels = []
        layers = min(len(row.active) for point in group.points for row in point.rows)
        for layer, colour in enumerate(_shades(layers)):
            x = [point.value for point in group.points]
            y = [point.mean(lambda row, layer=layer: row.active[layer]) for point in group.points]  # type: ignore[misc]
            heights = [value.value for value in y if value is not None]
            axes.plot(x, heights, "o-", color=colour, label=f"layer {layer + 1}")
            labels.append(Label(x[-1], heights[-1], f"layer {layer + 1}", colour))
        low, high = published.ACTIVE
        _paper_band(axes, low, high, f"paper: {low:g}–{high:g} %")
        axes.set(title=group.subject.title, xlabel="neurons in each hidden layer", ylabel="active neurons, %")
        axes.set(ylim=(0, 1.12 * max(high, axes.dataLim.y1)), xlim=(0, None))
        _labels(axes, labels)
    return figure


def depth(groups: Sequence[SweepGroup]) -> Figure:
    figure, panels = _panels(4)
    for axes, quantity in zip(panels, (ACCURACY, BACKWARD, WHOLE, KEPT), strict=True):
        _sweep_panel(axes, quantity, groups, lambda group: [point.value for point in group.points])
        axes.set_xlabel("hidden layers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def b_th(groups: Sequence[SweepGroup]) -> Figure:
    """Above against b_th, below against the share of the surrogate's mass it keeps; the rule's 95 % as a ring."""
    quantities = (ACCURACY, WHOLE, KEPT, ERROR)
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    rows = figure.subplots(2, 4)
    finite = [point.value for group in groups for point in group.points if point.value < math.inf]
    dense_at = 2.5 * max(finite, default=1.0)  # where b_th = inf is drawn

    def width(group: SweepGroup) -> list[float]:
        return [min(point.value, dense_at) for point in group.points]

    def mass(group: SweepGroup) -> list[float]:
        return [point.get("mass") for point in group.points]

    for column, quantity in enumerate(quantities):
        over: Literal["b_th", "mass"]
        for row, x, over in ((rows[0], width, "b_th"), (rows[1], mass, "mass")):
            axes = row[column]
            _sweep_panel(axes, quantity._replace(paper=None), groups, x, named=False, ring=over)
            axes.set_title(quantity.title if over == "b_th" else "")
            axes.yaxis.set_major_locator(MaxNLocator(5))
        ticks = [value for value in (0.01, 0.05, 0.2, 0.8, 3) if min(finite, default=1) <= value <= dense_at / 2]
        rows[0][column].set_xscale("log")
        rows[0][column].xaxis.set_major_locator(FixedLocator([*ticks, dense_at]))
        rows[0][column].xaxis.set_major_formatter(FuncFormatter(lambda v, _: "∞" if v == dense_at else f"{v:g}"))
        rows[0][column].xaxis.set_minor_locator(NullLocator())
        rows[0][column].set_xlabel("b_th")
        rows[1][column].set_xlabel("surrogate mass kept, %")
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, marker=marker, label=_of_sweep(group, groups))
        for group, (colour, marker) in zip(groups, _series(), strict=False)
    ]
    ring: Any = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": ""}
    handles.append(matplotlib.lines.Line2D([], [], label="95 % of the mass: b_th = auto", **ring))
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if len(handles) > 3 else 4, fontsize=SMALL + 0.5)
    return figure


def _series() -> Iterator[tuple[str, str]]:
    return iter(zip(SERIES, MARKERS, strict=True))


def _of_sweep(group: SweepGroup, groups: Sequence[SweepGroup]) -> str:
    """What tells it from the others."""
    preset = group.subject.preset
    parts = [group.subject.title.split(", fast_sigmoid")[0].split(", atan")[0]]
    if group.over == "b-th" or len({other.subject.preset.slope for other in groups}) > 1:
        parts = [preset.surrogate, *(parts if len({other.subject.name for other in groups}) > 1 else [])]
    return ", ".join(parts)


def _sweep_panel(
    axes: Axes,
    quantity: Quantity,
    groups: Sequence[SweepGroup],
    x_of: Callable[[SweepGroup], list[float]],
    named: bool = True,
    ring: Literal["", "b_th", "mass"] = "",
) -> None:
    """A line for each sweep, standard errors over its seeds; `ring`: with the rule's b_th marked on such an axis."""
    labels = []
    for group, (colour, marker) in zip(groups, _series(), strict=False):
        x, y = x_of(group), [point.get(quantity.row) for point in group.points]
        errors = [_error(point, quantity.row) for point in group.points]
        axes.errorbar(x, y, errors, color=colour, marker=marker, capsize=2, elinewidth=0.8)
        if ring:
            _ring(axes, group, x, y, ring)
        there = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
        if there:
            labels.append(Label(*there[-1], _of_sweep(group, groups), colour))
    axes.set(title=quantity.title, ylabel=quantity.unit)
    if quantity.row != "test_accuracy":
        axes.set_ylim(0, 1.12 * max(axes.dataLim.y1, *(quantity.paper or (0,))))
    if quantity.row in ("backward", "whole"):
        axes.axhline(1, color="#444444", linewidth=0.8, linestyle=(0, (2, 2)))
    if quantity.paper:
        low, high = quantity.paper
        if low == high:
            axes.axhline(high, color=PAPER, linewidth=1)
        _paper_band(axes, low, high, quantity.paper_text)
    if named and len(groups) > 1:
        _labels(axes, labels)


def _ring(axes: Axes, group: SweepGroup, x: list[float], y: list[float], over: str) -> None:
    """Where the rule's b_th lies on the line, if it is among the widths measured; lines are straight on their axis."""
    widths = [point.value for point in group.points if point.value < math.inf]
    at = rule_b_th(group.subject.preset)
    if not (widths and widths[0] <= at <= widths[-1]):
        return
    height = np.interp(math.log(at), np.log(x), y) if over == "b_th" else np.interp(100 * AUTO_MASS, x, y)
    axes.plot(
        [at if over == "b_th" else 100 * AUTO_MASS], [float(height)], "o", markersize=8, markerfacecolor="none",
        markeredgecolor="black", markeredgewidth=0.9,
    )  # fmt: skip


def _error(point: Point, quantity: str) -> float:
    found = point.mean(lambda row: getattr(row, quantity))
    return 0.0 if found is None or found.error is None else found.error
