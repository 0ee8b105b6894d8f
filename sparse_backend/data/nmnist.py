"""Neuromorphic-MNIST (Orchard et al. 2015): MNIST's digits as a moving event camera saw them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .files import AGAIN, directory_of, members
from .recordings import EventSet, Recordings

SIDE = 34  # pixels
OVERFLOW, OVERFLOW_US = 240, 2**13  # as y: no event, but so much to be added to all later times
WHOLE = (60_000, 10_000)  # recordings of the official training and test set


def load_nmnist(
    directory: str | Path, steps: int = 300, dt_us: float = 1000.0, polarity: Literal["merge", "both"] = "merge"
) -> EventSet:
    """The official `Train.zip` and `Test.zip` in `directory`, or the folders `Train` and `Test` unpacked from them.

    A file `Train/<digit>/<id>.bin` is a recording of about 300 ms, 5 bytes an event: x, y, one bit of polarity (1:
    brighter) and 23 bits of time in µs, the most significant first. Where y is 240 there is no event: the camera's
    clock ran over, and 8192 µs are added to all times after it. Archives may hold a part of the recordings only, which
    the set's `note` then says.

    steps: T; events at or after steps · dt_us are left out; dt_us: a step in µs; polarity: "merge" puts both polarities
    of a pixel on one input, 34 · 34 = 1156, as the paper has it; "both" gives them one each, p · 1156 + y · 34 + x.
    Raises FileNotFoundError if the folder, an archive or its recordings are not there, ValueError if a file is damaged
    or no recording, or an argument is none of the above.
    """
    if polarity not in ("merge", "both"):
        raise ValueError(f"polarity must be 'merge' or 'both', got {polarity!r}")
    if not dt_us > 0:
        raise ValueError(f"dt_us must be above 0, got {dt_us}")
    root = directory_of(directory)
    units = SIDE * SIDE * (2 if polarity == "both" else 1)
    parts = []
    for name in ("Train", "Test"):
        labels: list[int] = []  # filled as the samples are read: all events at once, as int64, are many GB
        samples = _samples(members(root, name, ".bin"), labels, dt_us, polarity == "both")
        parts.append(Recordings.from_samples(samples, labels, steps, units))
    counts = (len(parts[0]), len(parts[1]))
    note = "" if counts == WHOLE else f"{counts[0]:,} of 60,000 training and {counts[1]:,} of 10,000 test recordings"
    return EventSet("N-MNIST", parts[0], parts[1], classes=10, note=note)


def _samples(
    files: Iterator[tuple[str, bytes]], labels: list[int], dt_us: float, both: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for path, content in files:
        digit = Path(path).parent.name
        if digit not in "0123456789" or len(digit) != 1:
            raise ValueError(f"{path}: a folder named by its digit, 0 to 9, expected, got {digit!r}")
        labels.append(int(digit))
        yield _events(path, content, dt_us, both)


def _events(path: str, content: bytes, dt_us: float, both: bool) -> tuple[Tensor, Tensor]:
    """Steps and inputs of a recording's events."""
    if not content or len(content) % 5:
        raise ValueError(f"{path}: events of 5 bytes each expected, got {len(content)} bytes: {AGAIN}")
    x, y, high, middle, low = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 5).long().unbind(1)
    overflow = y == OVERFLOW
    seen = ~overflow
    for name, place in (("x", x[seen]), ("y", y[seen])):
        if place.numel() and int(place.max()) >= SIDE:
            raise ValueError(
                f"{path}: {name} must lie in 0..{SIDE - 1}, got {int(place.max())}: this is no N-MNIST recording"
            )
    time = (((high & 0x7F) << 16) | (middle << 8) | low) + OVERFLOW_US * overflow.cumsum(0)
    unit = y * SIDE + x + (high >> 7) * SIDE * SIDE * both
    return torch.div(time[seen].double(), dt_us, rounding_mode="floor").long(), unit[seen]
