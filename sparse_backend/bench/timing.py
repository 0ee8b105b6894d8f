"""Timing in one process: repeats of all paths interleaved, in random order, medians."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Collection, Mapping
from statistics import median, quantiles

from sparse_backend.bench.paths import Run, Times

FEWEST, MOST = 5, 25


def interleave(
    runs: Mapping[str, Run], repeats: int | None, seconds: float, seed: int, once: Collection[str] = (), warm: int = 1
) -> dict[str, list[Times]]:
    """Time `repeats` training steps of every run, after `warm` to warm up.

    With `repeats` None, as many as fit in `seconds`, between `FEWEST` and `MOST`. once: runs that are timed a single
    time, among the others' first, and not warmed up.
    """
    for _ in range(warm):
        start = time.perf_counter()
        for name, run in runs.items():
            if name not in once:
                run.step()
    one_round = time.perf_counter() - start
    if repeats is None:
        repeats = min(max(int(seconds / max(one_round, 1e-9)), FEWEST), MOST)
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[Times]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    try:
        for repeat in range(repeats):
            gc.collect()
            gc.disable()
            shuffle(order)
            for name in order:
                if not (repeat and name in once):
                    times[name].append(runs[name].step())
            if collecting:
                gc.enable()
    finally:
        if collecting:
            gc.enable()
    return times


def summary(times: list[Times]) -> dict[str, dict[str, float]]:
    """Milliseconds: median and quartiles of each part of the step that there is."""
    result = {}
    for part in Times._fields:
        values = [1e3 * seconds for one in times if (seconds := getattr(one, part)) is not None]
        if not values:
            continue
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        result[part] = {"median": median(values), "low": low, "high": high}
    return result
