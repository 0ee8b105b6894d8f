"""The data sets by name, as spikes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparse_backend import data
from sparse_backend.data import EventSet


def _fmnist(directory: Path | None, steps: int) -> EventSet:
    return data.latency_set(data.load_fashion_mnist(_given(directory)), steps, tau_eff=steps / 5)


def _digits(directory: Path | None, steps: int) -> EventSet:
    return data.latency_set(data.load_digits(), steps, tau_eff=steps / 5)


def _nmnist(directory: Path | None, steps: int) -> EventSet:
    return data.load_nmnist(_given(directory), steps)


def _shd(directory: Path | None, steps: int) -> EventSet:
    return data.load_shd(_given(directory), steps)


def _spoken(directory: Path | None, steps: int) -> EventSet:
    return data.load_spoken(_given(directory), steps)


DATASETS: dict[str, Callable[[Path | None, int], EventSet]] = {
    "fmnist": _fmnist,
    "nmnist": _nmnist,
    "shd": _shd,
    "digits": _digits,
    "spoken": _spoken,
}


def load(name: str, directory: Path | None, steps: int, limit: int | None = None) -> EventSet:
    """A data set of T `steps`, `limit` samples of each part, spread over it, if there is one.

    Raises ValueError where a part has no samples, and what the data set's loader raises.
    """
    found = DATASETS[name](directory, steps)
    if not (len(found.train) and len(found.test)):
        raise ValueError(
            f"{found.name}: samples to train and to test with expected, got {len(found.train)} and {len(found.test)}"
        )
    return found if limit is None else found.spread(limit)


def _given(directory: Path | None) -> Path:
    if directory is None:
        raise ValueError("--data must name the folder of the data set; nothing is downloaded")
    return directory
