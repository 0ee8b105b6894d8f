"""`python -m sparse_backend bench`: stock training against sparse gradients on this machine, checked, then timed.

`cases.py` is the registry of what is measured and its targets, `paths.py` of the ways to run it, `for_*.py` and
`leaky_nets.py` have each framework's networks, `fused_dense.py` the dense loop to beat; `gate.py` checks, `timing.py`,
`memory.py`, `rss.py` and `kernels.py` measure on what `devices.py` knows, `render.py` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_backend.atomic import write_text

if TYPE_CHECKING:
    from sparse_backend.bench.cases import Case

__all__ = ["main"]

RESULTS = Path("docs/benchmarks")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_backend bench",
        description="Measure training steps of stock snnTorch and Norse and of sparse_backend in one process, from the "
        "same trained weights, after checking that both compute the same.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure; on cuda the paper's networks, "
        "a fused dense loop beside them, each kernel, and --crossover (default: %(default)s)")  # fmt: skip
    add("--case", action="append", metavar="NAME", help="only this case; may be given several times; see --list "
        "(default: all of the frameworks that are installed)")  # fmt: skip
    add("--crossover", action="store_true", help="only the cases that go from 0.1 %% to 100 %% of activity, against a "
        "fused dense loop")  # fmt: skip
    add("--list", action="store_true", help="the cases, and no measuring")
    add("--data", type=Path, metavar="DIR", help="folder with the idx files of Fashion-MNIST, for the cases that are "
        "like it; without it events are drawn")  # fmt: skip
    add("--repeats", type=_count, metavar="N", help="timed steps of each path (default: what fits in 20 s a case, "
        "4 s on a GPU)")  # fmt: skip
    add("--threads", type=_count, metavar="N", help="threads torch may use (default: torch's own choice)")
    add("--seed", type=int, default=0, help="of weights, input and order (default: %(default)s)")
    add("--rss", action="store_true", help="measure the peak memory of a step too, in child processes; slow")
    add("--quick", action="store_true", help="small batches and 3 repeats, to see that it runs; ratios mean "
        "nothing. On a GPU the cases that matter most, and 3 repeats")  # fmt: skip
    add("--title", help="heading of this result in docs/benchmarks.md (default: CPU or GPU)")
    add("--json", type=Path, metavar="FILE", help="write the numbers there, after each case")
    add("--render", type=Path, nargs="?", const=RESULTS, metavar="DIR", help="measure nothing: write DIR.md from the "
        f"results DIR/*.json, those of one --title together (default: {RESULTS})")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: command line without the program's name; ``None`` takes ``sys.argv[1:]``.

    Returns:
        0 when all that was asked for was measured (missed targets included), 1 when a path failed its check or
        something needed is missing, 130 when interrupted.
    """
    options = _parser().parse_args(argv)
    try:
        if options.render is not None:
            return _render(options.render)
        return _measure(options)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: interrupted", file=sys.stderr)
        return 130


def _render(folder: Path) -> int:
    from sparse_backend.bench import render

    file, text = render.render(folder)
    file.write_text(text, encoding="utf-8")
    print(file)
    readme = folder.parent.parent / "README.md"
    if folder == RESULTS and readme.is_file():
        contents = [render.load(path) for path in sorted(folder.glob("*.json"))]
        readme.write_text(render.with_summary(readme.read_text(encoding="utf-8"), contents), encoding="utf-8")
        print(readme)
    return 0


def _measure(options: argparse.Namespace) -> int:
    from sparse_backend.bench import devices, machine, measure, render
    from sparse_backend.bench.cases import REBUILT, quick
    from sparse_backend.data import load_fashion_mnist

    on_gpu = options.device == "cuda"
    cases = _chosen(options)
    if options.list:
        for case in cases:
            print(
                f"{case.name:<20} {case.sizes}, T {case.steps}, {case.events} events a sample; {', '.join(case.paths)}"
            )
        return 0
    device = devices.choose(options.device)
    if options.rss and on_gpu:
        raise ValueError("--rss: expected with --device cpu; on a GPU peak memory is measured anyway")
    missing = {
        case.framework
        for case in cases
        if case.framework != REBUILT and importlib.util.find_spec(case.framework) is None
    }
    if missing and (options.case or all(case.framework in missing for case in cases)):
        framework = min(missing)
        raise ValueError(f'needs {framework}, which is not installed: pip install "sparse_backend[{framework}]"')
    if missing:
        left_out = [case.name for case in cases if case.framework in missing]
        print(f"left out, as {', '.join(sorted(missing))} is not installed: {', '.join(left_out)}")
        cases = [case for case in cases if case.framework not in missing]
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json: expected a file in an existing folder, got {str(options.json)!r}")
    images = None if options.data is None else load_fashion_mnist(options.data)
    settings = measure.Settings(options.repeats, options.seed, options.rss, device=device)
    if options.quick:
        cases = quick(cases, options.device)
        settings = dataclasses.replace(settings, repeats=options.repeats or 3, judged=on_gpu)

    threads = measure.set_threads(options.threads)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    where: dict[str, Any] = {}
    try:
        for case in cases:
            try:
                results.append(measure.measure(case, settings, images, _say))
                told = render.text_table(results[-1])
            except Exception as error:  # the others are to be measured while the GPU is there
                if not on_gpu:
                    raise
                first, _, _ = str(error).partition("\n")
                failed[case.name] = f"{type(error).__name__}: {first}"
                told = render.failure(case.name, failed[case.name])
            _say("")
            print(told + "\n", flush=True)
            gc.collect()  # of a case that failed for want of memory, whatever is left
            where = where or machine.describe(device)
            content = _content(options, results, failed, where)
            if options.json is not None:
                write_text(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    finally:
        measure.set_threads(threads)
    if results:
        print(render.closing(content))
        print("a quick run: not held against the targets" if not settings.judged else render.tally(results))
    for name, why in failed.items():
        print(render.failure(name, why))
    return 1 if failed or any("refused" in row for result in results for row in result["rows"]) else 0


def _chosen(options: argparse.Namespace) -> list[Case]:
    """The cases asked for. Raises ValueError for a name that the device has none of."""
    from sparse_backend.bench import cases

    if options.device == "cuda":
        registry = known = {name: cases.for_this_machine(case) for name, case in cases.GPU_CASES.items()}
    else:
        registry = cases.CASES
        known = {**registry, **{name: cases.on_cpu(case) for name, case in cases.CROSSOVER.items()}}
    names = options.case or list(cases.CROSSOVER if options.crossover else registry)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--case: expected one of {', '.join(known)}, got {unknown[0]!r}")
    return [known[name] for name in dict.fromkeys(names)]


def _content(
    options: argparse.Namespace, results: list[dict[str, Any]], failed: dict[str, str], where: dict[str, Any]
) -> dict[str, Any]:
    from sparse_backend.bench import render

    title = options.title or ("GPU" if options.device == "cuda" else "CPU")
    asked = {"seed": options.seed, "quick": options.quick}
    return render.document(results, {"title": title, **where, **asked, "failed": failed})


def _say(text: str) -> None:
    """What is going on, on a terminal's one line; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
