"""The Spiking Heidelberg Digits (Cramer et al. 2020): spoken digits through a model of the inner ear, 700 channels."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import AGAIN, directory_of
from .recordings import EventSet, Recordings

CHANNELS, CLASSES = 700, 20


def load_shd(directory: str | Path, steps: int = 500, dt_ms: float = 2.0) -> EventSet:
    """`shd_train.h5` and `shd_test.h5` in `directory`, each plain or with `.gz`, in their official layout.

    `spikes/times` holds an array of seconds for each recording, `spikes/units` one of channels 0..699, `labels` the
    classes 0..19: ten digits in English and ten in German.

    steps: T; dt_ms: a step in ms. Events at or after steps · dt_ms are left out, and the set's `note` says what share
    of them that is. The longest recordings last 1.37 s, and little happens after the first second, which the defaults
    cover.
    Raises FileNotFoundError if the folder or a file is not there, ImportError without h5py, ValueError if a file is
    damaged or holds something else.
    """
    if not dt_ms > 0:
        raise ValueError(f"dt_ms must be above 0, got {dt_ms}")
    root = directory_of(directory)
    parts, events = [], 0
    for name in ("shd_train.h5", "shd_test.h5"):
        path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
        if path is None:
            there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{name} or {name}.gz expected in {root}, found {there}")
        samples, labels = _read(path, dt_ms)
        events += sum(len(unit) for _, unit in samples if len(unit))
        parts.append((samples, labels))
    late = sum(int((step >= steps).sum()) for samples, _ in parts for step, _ in samples)
    train, test = (Recordings.from_samples(samples, labels, steps, CHANNELS) for samples, labels in parts)
    note = f"{100 * late / events:.2g} % of the events come after {steps * dt_ms:g} ms and are left out" if late else ""
    return EventSet("SHD", train, test, CLASSES, note)


def _read(path: Path, dt_ms: float) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            'SHD is read with h5py, which is not installed: pip install "sparse_backend[paper]"'
        ) from error
    try:
        with h5py.File(_opened(path), "r") as file:
            missing = [key for key in ("spikes/times", "spikes/units", "labels") if key not in file]
            if missing:
                raise ValueError(f"{path}: {', '.join(missing)} expected, got {', '.join(file) or 'nothing'}: not SHD")
            times, units = list(file["spikes/times"][:]), list(file["spikes/units"][:])
            labels = torch.as_tensor(file["labels"][:]).long()
    except (OSError, EOFError, zlib.error, KeyError, RuntimeError, TypeError) as error:  # whatever HDF5 stumbles over
        raise ValueError(f"{path}: an HDF5 file expected ({error}): {AGAIN}") from error
    if not len(times) == len(units) == len(labels):
        raise ValueError(
            f"{path}: times, units and labels must be one for each recording, "
            f"got {len(times)}, {len(units)} and {len(labels)}"
        )
    samples = []
    for i, (seconds, channel) in enumerate(zip(times, units, strict=True)):
        when = torch.as_tensor(seconds).double()
        if when.numel() and not bool(torch.isfinite(when).all()):
            raise ValueError(f"{path}: recording {i}: times must be finite")
        samples.append((torch.floor(when * 1e3 / dt_ms + 1e-6).long(), torch.as_tensor(channel.astype("int64"))))
    return samples, labels


def _opened(path: Path) -> Any:
    if path.suffix != ".gz":
        return path
    return io.BytesIO(gzip.decompress(path.read_bytes()))
