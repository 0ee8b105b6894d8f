"""Every figure and page of the results, from the JSON alone. matplotlib is imported when something is drawn."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import page as pages
from .results import Gradients, Results, Setting, load

DIGEST = re.compile(r"<!-- drawn from the results of `python -m sparse_backend paper`, digest ([0-9a-f]{64}) -->")


@dataclass(frozen=True)
class Figure:
    """What is drawn, by a function of `plots`."""

    name: str  #: of its file, and where it stands in the page
    plot: str
    caption: str
    data: Any  #: what the function takes; nothing where the results have nothing to draw
    needs: str  #: what has to be run for it

    @property
    def file(self) -> str:
        return f"{self.name}.svg"


def figures_of(results: Results) -> list[Figure]:
    """All there can be, in the page's order; without `data` those that the results do not give."""
    main = [setting for setting in results.settings if not swept(setting)]
    trained = [setting for setting in main if any(group.epochs for group in setting.groups)]
    figures = [
        Figure(
            "accuracy", "accuracy",
            "Test accuracy at the last epoch: mean and standard error over seeds, each seed a dot. Where the sparse "
            "runs "
            "are longer than the dense ones, the lighter bar is sparse at the dense runs' last epoch.",
            trained, "`paper train`",
        ),
        Figure(
            "accuracy-training", "accuracy_over_epochs",
            "Test accuracy after each epoch; line: mean over the seeds that got so far, band: lowest to highest.",
            trained, "`paper train`",
        ),
        Figure(
            "loss", "loss", "Training loss of each epoch, sparse against dense; line: mean over the seeds that got "
            "so far, band: lowest to highest.",
            trained, "`paper train`",
        ),
        Figure(
            "activity", "activity",
            "Active neurons, % of all (t, b, j) of a layer, over training with sparse gradients; layer 1 is next to "
            "the "
            "input. Line: mean over seeds, band: lowest to highest.",
            [setting for setting in main if setting.sparse], "`paper train`",
        ),
        Figure(
            "activity-hidden", "activity_by_hidden",
            "Active neurons over training, mean over the hidden layers, for networks of different sizes.",
            _by_hidden(results), "`paper train --hidden` with at least two sizes",
        ),
        Figure(
            "activity-size", "activity_at_end", "Active neurons after training against the size of the hidden layers.",
            results.swept("hidden"), "`paper sweep --over hidden`",
        ),
    ]  # fmt: skip
    shown: dict[Any, Gradients] = {}
    for result in results.gradients:
        if result.pictures and result.subject.sparse:
            shown.setdefault((result.subject.title, result.subject.how), result)
    figures += [
        Figure(
            f"gradients-{result.subject.name}" + (f"-{i}" if i else ""), "gradients",
            f"{result.subject.title}, seed {result.subject.seed}, epoch {result.epoch}: gradients on one test batch of "
            f"{result.samples}, the rows and columns where the dense gradient is largest. Hatched: exactly zero. The "
            "relative error is the whole tensor's, for spikes that of one sample.",
            result, "",
        )
        for i, result in _numbered(list(shown.values()))
    ] or [Figure("gradients", "gradients", "", None, "`paper train`, which writes gradients at its end")]  # fmt: skip
    speed = "Medians of interleaved repeats against stock snnTorch, same threads, same trained weights."
    figures += [
        Figure(
            "hidden", "hidden",
            f"Speed and memory against the size of the hidden layers{_trained(results, 'hidden')}. {speed}",
            results.swept("hidden"), "`paper sweep --over hidden`",
        ),
        Figure(
            "depth", "depth",
            f"Accuracy, speed and memory against the number of hidden layers{_trained(results, 'depth')}. {speed}",
            results.swept("depth"), "`paper sweep --over depth`",
        ),
        Figure(
            "b_th", "b_th",
            "Accuracy, speed, memory kept and gradient error against b_th (above; ∞ is dense) and against the share "
            "of the "
            f"surrogate's mass that it keeps (below). Rings: the rule's 95 %. {speed}",
            results.swept("b-th"), "`paper sweep --over b-th`",
        ),
    ]  # fmt: skip
    return figures


def _trained(results: Results, over: str) -> str:
    """For how long the networks of a sweep were trained: activity grows with it."""
    epochs = sorted({row.epochs for group in results.swept(over) for point in group.points for row in point.rows})
    unit = "epoch" if epochs == [1] else "epochs"
    return f", of networks trained for {' or '.join(map(str, epochs))} {unit}" if epochs else ""


def swept(setting: Setting) -> bool:
    """Whether it is the preset with another network or surrogate, one of many points rather than an experiment."""
    return any(word in setting.subject.changes for word in ("hidden", "fast_sigmoid", "atan"))


def draw(folder: Path, out: Path, page: Path | None = None, choosing: Path | None = None) -> None:
    """Draw into `out` what the results in `folder` give, and write the pages; says what was left out, and why.

    page: written whole. choosing: its section between markers is.

    Raises:
        OSError: `folder` is not there, or something cannot be written.
        ValueError: a file of the results is damaged or foreign, or `choosing` has no markers.
        ImportError: matplotlib is not installed.
    """
    results = load(folder)
    figures = figures_of(results)
    texts = {}
    if page:
        texts[page] = pages.paper(results, figures, _relative(out, page), page)
    if choosing:
        texts[choosing] = pages.choosing(results, figures, _relative(out, choosing), choosing)
    drawn = {figure.file: drawing(figure) for figure in figures if figure.data}
    out.mkdir(parents=True, exist_ok=True)
    for old in sorted(out.glob("*.svg")):
        if old.name not in drawn and DIGEST.search(old.read_text(encoding="utf-8")):
            old.unlink()
            print(f"{old}: removed, the results do not give it any more")
    for name, text in drawn.items():
        (out / name).write_text(text, encoding="utf-8")
        print(f"{out / name}: drawn")
    for figure in figures:
        if not figure.data:
            print(f"{figure.file}: left out, no results for it; run {figure.needs.replace('`', '')}")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: written")


def drawing(figure: Figure) -> str:
    """The SVG, which carries a digest of what it shows. Raises ImportError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install matplotlib, then run this again"
        ) from error
    from . import plots

    text, digest = plots.svg(getattr(plots, figure.plot), figure.data)
    mark = f"<!-- drawn from the results of `python -m sparse_backend paper`, digest {digest} -->"
    return text.rstrip("\n") + f"\n{mark}\n"


def _by_hidden(results: Results) -> dict[str, list[Setting]]:
    """Settings that differ in the size of their hidden layers alone, where there are several, by their preset."""
    found: dict[str, list[Setting]] = {}
    for setting in results.settings:
        changed = setting.subject.changes
        if setting.sparse and (not changed or re.fullmatch(r"hidden (\d+)(-\1)*", changed)):
            found.setdefault(setting.subject.name, []).append(setting)
    return {
        name: sorted(several, key=lambda setting: setting.subject.preset.hidden)
        for name, several in found.items()
        if len({len(setting.subject.preset.hidden) for setting in several}) == 1 and len(several) > 1
    }


def _numbered(results: Sequence[Any]) -> list[tuple[int, Any]]:
    """With how many of its preset came before."""
    names = [result.subject.name for result in results]
    return [(names[:i].count(names[i]), result) for i, result in enumerate(results)]


def _relative(out: Path, page: Path) -> str:
    return Path(os.path.relpath(out, page.parent)).as_posix()
