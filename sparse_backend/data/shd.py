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
LAYOUT = {"spikes/times": ("fiu", True), "spikes/units": ("iu", True), "labels": ("iu", False)}  # kinds; ragged?


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
    parts, events, late = [], 0, 0
    for name in ("shd_train.h5", "shd_test.h5"):
        path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
        if path is None:
            there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{name} or {name}.gz expected in {root}, found {there}")
        times, units, labels = _read(path)
        when = [_steps(path, i, seconds, steps, dt_ms) for i, seconds in enumerate(times)]
        try:
            part = Recordings.from_samples(
                ((step, unit.astype("int64")) for step, unit in zip(when, units, strict=True)), labels, steps, CHANNELS
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}: not SHD") from error
        events += sum(map(len, when))
        late += sum(int((step == steps).sum()) for step in when)
        parts.append(part)
    note = f"{100 * late / events:.2g} % of the events come after {steps * dt_ms:g} ms and are left out" if late else ""
    return EventSet("SHD", parts[0], parts[1], CLASSES, note)


def _read(path: Path) -> tuple[Any, Any, Tensor]:
    """An array of seconds and one of channels for each recording, and the classes."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            'SHD is read with h5py, which is not installed: pip install "sparse_backend[paper]"'
        ) from error
    try:
        with h5py.File(_opened(path), "r") as file:
            missing = [key for key in LAYOUT if key not in file]
            if missing:
                raise ValueError(f"{path}: {', '.join(missing)} expected, got {', '.join(file) or 'nothing'}: not SHD")
            wrong = [key for key in LAYOUT if not _fits(file[key], *LAYOUT[key])]
            if wrong:
                kind = "an array of numbers" if wrong[0] != "labels" else "an integer"
                raise ValueError(f"{path}: {wrong[0]} must hold {kind} a recording, got {file[wrong[0]]}: not SHD")
            times, units, labels = (file[key][:] for key in LAYOUT)
    except (OSError, EOFError, zlib.error, KeyError, RuntimeError) as error:  # whatever HDF5 stumbles over
        raise ValueError(f"{path}: an HDF5 file expected ({error}): {AGAIN}") from error
    if not len(times) == len(units) == len(labels):
        raise ValueError(
            f"{path}: times, units and labels must be one for each recording, "
            f"got {len(times)}, {len(units)} and {len(labels)}"
        )
    return times, units, torch.as_tensor(labels.astype("int64"))


def _fits(data: Any, kinds: str, ragged: bool) -> bool:
    """Whether this is a data set of one array (`ragged`) or number of one of these NumPy kinds for each recording."""
    import h5py

    if not isinstance(data, h5py.Dataset) or len(data.shape) != 1:
        return False
    dtype = h5py.check_vlen_dtype(data.dtype) if ragged else data.dtype
    return getattr(dtype, "kind", "") in tuple(kinds)


def _steps(path: Path, recording: int, seconds: Any, steps: int, dt_ms: float) -> Tensor:
    """Step of each event, `steps` for all that come too late; int32."""
    when = torch.as_tensor(seconds).double()
    bad = when[~(torch.isfinite(when) & (when >= 0))]
    if bad.numel():
        raise ValueError(f"{path}: recording {recording}: times must be finite and at least 0, got {float(bad[0])}")
    # the 1e-6: times that are whole steps but for the rounding of the division
    return torch.floor(when * 1e3 / dt_ms + 1e-6).clamp(max=steps).int()


def _opened(path: Path) -> Any:
    if path.suffix != ".gz":
        return path
    return io.BytesIO(gzip.decompress(path.read_bytes()))
