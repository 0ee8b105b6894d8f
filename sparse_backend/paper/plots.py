"""The figures as matplotlib draws them: one function each, from checked results to a figure."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sparse_backend.surrogate import AUTO_MASS

from . import published
from .results import DENSE, STOCK, Gradients, Group, Mean, Picture, Point, Setting, SweepGroup, rule_b_th

# Okabe and Ito's colours, told apart with any colour vision; vermilion is the paper's everywhere
SPARSE, LIGHT_SPARSE, GREY, LIGHT_GREY, PAPER = "#0072B2", "#5aa5d1", "#5c5c5c", "#9a9a9a", "#D55E00"
SERIES = (SPARSE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*"
WIDTH = 7.2  # inches, of a text column
SMALL = 7
DPI = 200  # of images within a figure; nothing else has pixels
LEAST_SPAN = 2.0  # points of accuracy that an axis shows: less is noise made large
RING: dict[str, Any] = {
    "marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 0.9,
    "linestyle": "",
}  # fmt: skip
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
        figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
        return _smaller(buffer.getvalue()), digest(figure)


def _smaller(text: str) -> str:
    """Without comments and indentation, about a quarter of it."""
    return re.sub(r"\n\s+", "\n", re.sub(r"<!--.*?-->\s*", "", text))


def digest(figure: Figure) -> str:
    """Of the data and words drawn, whatever the version of matplotlib: numbers to 6 digits."""
    parts: list[Any] = [figure.get_suptitle()]
    for axes in figure.axes:
        parts += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        parts += [(_legend_text(line), to_hex(line.get_color()), _numbers(line.get_xydata())) for line in axes.lines]
        parts += [
            _numbers(patch.get_path().transformed(patch.get_patch_transform()).vertices) for patch in axes.patches
        ]
        parts += [_numbers(path.vertices) for many in axes.collections for path in many.get_paths()]
        parts += [_numbers(np.ma.filled(image.get_array(), np.nan)) for image in axes.images]
        parts += [(text.get_text(), _numbers(getattr(text, "xy", text.get_position()))) for text in axes.texts]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _legend_text(line: Any) -> str:
    """What the legend says; nothing for names that matplotlib makes up."""
    label = str(line.get_label())
    return "" if label.startswith("_") else label


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


def _paper(axes: Axes, low: float, high: float, text: str, at_top: bool = False) -> None:
    """The paper's range as a band, one number as a line; the text where lines are least likely."""
    if low == high:
        axes.axhline(high, color=PAPER, linewidth=1)
    else:
        axes.axhspan(low, high, color=PAPER, alpha=0.09, linewidth=0)
    axes.annotate(
        text, (0.985, high if at_top else low), (0, -2 if at_top else 1.5), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", color=PAPER, fontsize=SMALL, ha="right", va="top" if at_top else "bottom",
    )  # fmt: skip


def _paper_active(axes: Axes) -> None:
    low, high = published.ACTIVE
    _paper(axes, low, high, f"paper: {low:g}–{high:g} %", at_top=axes.dataLim.y1 < 0.8 * high)
    axes.set(ylabel="active neurons, %", ylim=(0, 1.1 * max(high, axes.dataLim.y1)), xlim=(0, None))


def _legend(figure: Figure, handles: Iterable[Any]) -> None:
    figure.legend(handles=list(handles), loc="outside upper left", ncols=4, fontsize=SMALL + 0.5)


def _shades(count: int) -> list[tuple[float, ...]]:
    """From light to dark blue."""
    return [tuple(matplotlib.colormaps["Blues"](x)) for x in np.linspace(0.45, 0.95, count)]


def _colour(group: Group) -> str:
    return {STOCK: LIGHT_GREY, DENSE: GREY}.get(group.how, SPARSE)


def _over_epochs(group: Group, quantity: Callable[[Any], float | None]) -> tuple[list[int], np.ndarray]:
    """Epochs, and mean, lowest, highest over the seeds that got there: [epochs, 3]."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for entry in run.history:
            if (value := quantity(entry)) is not None:
                values.setdefault(entry.epoch, []).append(value)
    epochs = sorted(values)
    return epochs, np.array([(np.mean(values[e]), min(values[e]), max(values[e])) for e in epochs]).reshape(-1, 3)


def _band(axes: Axes, x: Sequence[float], values: np.ndarray, color: Any, **line: Any) -> None:
    """values: [x, 3], mean, lowest, highest."""
    axes.fill_between(x, values[:, 1], values[:, 2], color=color, alpha=0.18, linewidth=0)
    axes.plot(x, values[:, 0], color=color, marker="o" if len(x) == 1 else None, **line)


def _log_ticks(axes: Axes, last: int) -> None:
    ticks = [m * 10**e for e, m in itertools.product(range(5), (1, 2, 5))]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
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
        for group in setting.sparse[:1]:
            layers = len(group.runs[0].history[0].active)
            for layer, colour in enumerate(_shades(layers)):
                epochs, values = _over_epochs(group, lambda entry, layer=layer: entry.active[layer])  # type: ignore[misc]
                _band(axes, epochs, values, colour, label=f"layer {layer + 1}")
                labels.append(Label(epochs[-1], float(values[-1, 0]), f"layer {layer + 1}", colour))
        _paper_active(axes)
        axes.set(title=_title(setting), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _labels(axes, labels)
    return figure


def activity_by_hidden(settings: dict[str, Sequence[Setting]]) -> Figure:
    """Active %, mean over hidden layers, over the epochs that all have: a line for each number of neurons."""
    figure, panels = _panels(len(settings))
    for axes, of_one in zip(panels, settings.values(), strict=True):
        labels, end = [], min(setting.sparse[0].epochs for setting in of_one)
        for setting, colour in zip(of_one, _shades(len(of_one)), strict=True):
            epochs, values = _over_epochs(setting.sparse[0], lambda entry: float(np.mean(entry.active)))
            epochs, values = epochs[: end + 1], values[: end + 1]
            name = "-".join(map(str, setting.subject.preset.hidden))
            _band(axes, epochs, values, colour, label=name)
            labels.append(Label(epochs[-1], float(values[-1, 0]), name, colour))
        _paper_active(axes)
        axes.set(title=of_one[0].title.split(", hidden")[0], xlabel="epoch")
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
    lines = {}
    for axes, setting in zip(panels, settings, strict=True):
        longest = 2
        for group in (*setting.sparse, *setting.dense):
            epochs, values = _over_epochs(group, lambda entry: getattr(entry, quantity))
            if epochs:
                style: dict[str, Any] = {"color": _colour(group), "linestyle": "-" if group.sparse else (0, (3, 1.5))}
                lines[group.how] = Line2D([], [], label=group.how, **style)
                _band(axes, epochs, values, **style, label=group.how)
                longest = max(longest, epochs[-1])
        if axes.dataLim.y0 > 0 and axes.dataLim.y1 > 30 * axes.dataLim.y0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _log_ticks(axes, longest)
        axes.set(title=_title(setting), xlabel="epoch", ylabel=name)
        axes.margins(y=0.08)
    _legend(figure, lines.values())
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
    left, centres, marked = 0.0, [], False
    for setting, bars in zip(settings, all_bars, strict=True):
        reported = published.PUBLISHED.get(setting.subject.name) if not setting.subject.changes else None
        for place, bar in enumerate(bars):
            x = left + place
            colour = _colour(bar.group) if bar.epoch == bar.group.epochs else LIGHT_SPARSE
            axes.bar(x, bar.accuracy.value, 0.82, color=colour)
            dots = list(bar.group.accuracies(bar.epoch).values())
            offsets = np.linspace(-0.22, 0.22, len(dots)) if len(dots) > 1 else [0.0]
            axes.plot(x + np.asarray(offsets), dots, "o", color="black", markersize=1.6, linestyle="")
            if bar.accuracy.error is not None:
                axes.errorbar(x, bar.accuracy.value, bar.accuracy.error, color="black", capsize=3, linewidth=0.9)
            text = f"{bar.accuracy.value:.1f}"
            if bar.accuracy.error is not None:
                text += f"\n±{bar.accuracy.error:.1f}"
            axes.annotate(text, (x, 102), ha="center", va="bottom", fontsize=SMALL)
            axes.annotate(f"epoch\n{bar.epoch}", (x, 2), ha="center", va="bottom", fontsize=6, color="white")
            if reported and (mark := reported.accuracy[bar.group.sparse]) is not None:
                axes.plot([x - 0.41, x + 0.41], [mark, mark], color=PAPER, linewidth=1.4, zorder=1.9)
                marked = True
        centres.append(left + (len(bars) - 1) / 2)
        left += len(bars) + 0.9
    axes.set(ylabel="test accuracy, %", ylim=(0, 114), yticks=range(0, 101, 20), xlim=(-0.8, max(left - 1.1, 4)))
    axes.set_xticks(centres, [_title(setting) for setting in settings])
    axes.tick_params(axis="x", length=0)
    handles: dict[str, Any] = {
        bar.group.how: Patch(color=_colour(bar.group), label=bar.group.how) for bars in all_bars for bar in bars
    }
    if marked:
        handles["paper"] = Line2D([], [], color=PAPER, linewidth=1.6, label="the paper's number")
    _legend(figure, handles.values())
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
            np.ma.masked_equal(block, 0), cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest"
        )
        axes.set_title(title)
        axes.set_xlabel(picture.axes[1])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(True)
        axes.set(xticks=[], yticks=[])  # rows and columns are picked: their places in the block mean nothing
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
    _legend(figure, _handles(groups))
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
        _paper_active(axes)
        axes.set(title=group.subject.title, xlabel="neurons in each hidden layer")
        _labels(axes, labels)
    return figure


def depth(groups: Sequence[SweepGroup]) -> Figure:
    figure, panels = _panels(4)
    for axes, quantity in zip(panels, (ACCURACY, BACKWARD, WHOLE, KEPT), strict=True):
        _sweep_panel(axes, quantity, groups, lambda group: [point.value for point in group.points])
        axes.set_xlabel("hidden layers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, _handles(groups))
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
            _sweep_panel(axes, quantity._replace(paper=None), groups, x, over)
            axes.set_title(quantity.title if over == "b_th" else "")
            axes.yaxis.set_major_locator(MaxNLocator(5))
        ticks = [value for value in (0.01, 0.05, 0.2, 0.8, 3) if min(finite, default=1) <= value <= dense_at / 2]
        rows[0][column].set_xscale("log")
        rows[0][column].xaxis.set_major_locator(FixedLocator([*ticks, dense_at]))
        rows[0][column].xaxis.set_major_formatter(FuncFormatter(lambda v, _: "∞" if v == dense_at else f"{v:g}"))
        rows[0][column].xaxis.set_minor_locator(NullLocator())
        rows[0][column].set_xlabel("b_th")
        rows[1][column].set_xlabel("surrogate mass kept, %")
    _legend(figure, [*_handles(groups), Line2D([], [], label='95 % of the mass, b_th="auto"', **RING)])
    return figure


def _handles(groups: Sequence[SweepGroup]) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, marker=marker, label=_of_sweep(group, groups))
        for group, (colour, marker) in zip(groups, _series(), strict=False)
    ]


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
    ring: Literal["", "b_th", "mass"] = "",
) -> None:
    """A line for each sweep, standard errors over its seeds; `ring`: with the rule's b_th marked on such an axis."""
    for group, (colour, marker) in zip(groups, _series(), strict=False):
        x, y = x_of(group), [point.get(quantity.row) for point in group.points]
        errors = [_error(point, quantity.row) for point in group.points]
        axes.errorbar(x, y, errors if any(errors) else None, color=colour, marker=marker, capsize=2, elinewidth=0.8)
        if ring:
            _ring(axes, group, x, y, ring)
    axes.set(title=quantity.title, ylabel=quantity.unit)
    if quantity.row == "test_accuracy":
        low, high = axes.dataLim.y0, axes.dataLim.y1
        room = max(0.08 * (high - low), (LEAST_SPAN - (high - low)) / 2)
        axes.set_ylim(low - room, high + room)
    else:
        axes.set_ylim(0, 1.12 * max(axes.dataLim.y1, *(quantity.paper or (0,))))
    if quantity.row in ("backward", "whole"):
        axes.axhline(1, color="#444444", linewidth=0.8, linestyle=(0, (2, 2)))
    if quantity.paper:
        _paper(axes, *quantity.paper, quantity.paper_text, at_top=quantity is BACKWARD)


def _ring(axes: Axes, group: SweepGroup, x: list[float], y: list[float], over: str) -> None:
    """Where the rule's b_th lies on the line, if it is among the widths measured; lines are straight on their axis."""
    widths = [point.value for point in group.points if point.value < math.inf]
    at = rule_b_th(group.subject.preset)
    if not (widths and widths[0] <= at <= widths[-1]):
        return
    height = np.interp(math.log(at), np.log(x), y) if over == "b_th" else np.interp(100 * AUTO_MASS, x, y)
    axes.plot([at if over == "b_th" else 100 * AUTO_MASS], [float(height)], **RING)


def _error(point: Point, quantity: str) -> float:
    found = point.mean(lambda row: getattr(row, quantity))
    return 0.0 if found is None or found.error is None else found.error
