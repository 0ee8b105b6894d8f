"""`python -m sparse_backend paper`: the experiments of Sparse Spiking Gradient Descent, on its data sets."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from . import options

    given = list(sys.argv[1:] if argv is None else argv)
    arguments = options.parser().parse_args(given)
    run = {"train": _train, "sweep": _sweep, "figures": _figures}[arguments.command]
    try:
        run(arguments, options.shown(given))
    except ModuleNotFoundError as error:
        if error.name != "snntorch":
            raise
        print('paper: needs snntorch, which is not installed: pip install "sparse_backend[paper]"', file=sys.stderr)
        return 1
    except (OSError, ValueError, ImportError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npaper: interrupted; train and sweep go on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def _train(arguments: argparse.Namespace, command: str) -> None:
    from sparse_backend.bench.measure import set_threads
    from sparse_backend.demo.progress import Progress

    from . import datasets, options
    from .gradients import write_gradients
    from .train import Experiment, train

    preset = options.preset_of(arguments)
    before = set_threads(arguments.threads)
    try:
        data = datasets.load(preset.dataset, arguments.data, preset.steps, arguments.limit)
        total = preset.epochs * -(-len(data.train) // preset.batch)
        for seed in arguments.seeds:
            experiment = Experiment(arguments.dataset, preset, seed, arguments.dense)
            with Progress(total, arguments.quiet) as progress:
                trainer, result = train(experiment, data, arguments.out, command, progress.advance)
            last = result["history"][-1]
            if not (preset.b_th == math.inf or experiment.stock):
                write_gradients(trainer, arguments.out, command)
            print(
                f"{experiment.id}: {result['status']} after {last['epoch']} epochs, "
                f"test accuracy {last.get('test_accuracy', float('nan')):.2f} %",
                flush=True,
            )
    finally:
        set_threads(before)


def _sweep(arguments: argparse.Namespace, command: str) -> None:
    from .sweep import sweep

    sweep(arguments, command)


def _figures(arguments: argparse.Namespace, command: str) -> None:
    from .figures import draw

    draw(arguments.results, arguments.out, arguments.page, arguments.choosing)
