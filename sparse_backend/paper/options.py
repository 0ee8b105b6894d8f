"""The command line of `python -m sparse_backend paper`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from .presets import PRESETS, BTh, Preset

OUT = Path("paper_output")
EPILOG = "Folders and commands of the published results: docs/paper.md."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m sparse_backend paper",
        description="Train the networks of Sparse Spiking Gradient Descent (NeurIPS 2021) and draw its figures.",
        epilog=EPILOG,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="{train,sweep,figures}")

    train = commands.add_parser("train", help="train one network over several seeds; goes on where it was stopped")
    _of_experiments(train)
    train.add_argument("--dense", action="store_true", help="train the same network stock, with nothing enabled")
    train.add_argument("--seeds", type=_seed, nargs="+", default=[0], metavar="S", help="default: 0")

    sweep = commands.add_parser("sweep", help="train, time and compare with stock over a range of one quantity")
    _of_experiments(sweep)
    sweep.add_argument(
        "--over", required=True, choices=["hidden", "b-th", "depth"], help="the quantity: neurons in a hidden layer, "
        "half-width of the active band, number of hidden layers"
    )  # fmt: skip
    sweep.add_argument("--values", type=float, nargs="+", metavar="V", help="default: the paper's")
    sweep.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")

    figures = commands.add_parser("figures", help="draw every figure from the JSON results alone")
    figures.add_argument("--results", type=Path, default=OUT, metavar="DIR", help="default: %(default)s")
    figures.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: %(default)s")
    figures.add_argument("--page", type=Path, metavar="FILE", help="also write the page of tables and figures there")
    figures.add_argument("--choosing", type=Path, metavar="FILE", help="also make this page's section on b_th anew")
    return top


def _of_experiments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", required=True, choices=sorted(PRESETS), metavar="NAME", help="data set, or preset: "
        + ", ".join(sorted(PRESETS)))  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="folder of the data set's own files; digits needs none")
    add("--out", type=Path, default=OUT, metavar="DIR", help="for results and checkpoints (default: %(default)s)")
    add("--epochs", type=_whole, metavar="E", help="default: the preset's")
    add("--hidden", type=_whole, nargs="+", metavar="N", help="neurons of each hidden layer")
    add("--batch", type=_whole, metavar="B")
    add("--lr", type=_positive, metavar="RATE")
    add("--b-th", type=_b_th, metavar="B_TH", help='half-width of the active band, "inf" or "auto"')
    add("--slope", type=_not_negative, metavar="K", help="of fast_sigmoid; 0 for atan(alpha=2)")
    add("--limit", type=_whole, metavar="N", help="only N samples, evenly spread, of the training and of the test set")
    add("--threads", type=_whole, metavar="N", help="of torch")
    add("--quiet", action="store_true", help="no progress bar")


def preset_of(arguments: argparse.Namespace) -> Preset:
    """The preset that was named, with what was asked for in its place."""
    given = {
        "epochs": arguments.epochs,
        "hidden": tuple(arguments.hidden) if arguments.hidden else None,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "b_th": arguments.b_th,
        "slope": arguments.slope,
    }
    return dataclasses.replace(PRESETS[arguments.dataset], **{k: v for k, v in given.items() if v is not None})


def shown(argv: Sequence[str]) -> str:
    """The command as others would give it: folders of this machine are named by what they hold."""
    words = list(argv)
    for flag, name in (("--data", "DATA"), ("--out", "OUT"), ("--results", "OUT")):
        for i, word in enumerate(words):
            if word == flag and i + 1 < len(words):
                words[i + 1] = name
            elif word.startswith(f"{flag}="):
                words[i] = f"{flag}={name}"
    return " ".join(["python -m sparse_backend paper", *words])


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    return 0 if text == "0" else _whole(text)


def _positive(text: str) -> float:
    value = _not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _b_th(text: str) -> BTh:
    if text == "auto":
        return "auto"
    if text == "inf":
        return math.inf
    return _positive(text)
