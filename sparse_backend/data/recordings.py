"""Data sets of events: every sample a list of (step, unit), handed out in batches as EventTensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_backend.events import EventTensor

from .coding import TAU_EFF, THETA, latency
from .images import ImageSet

SMALL_UNITS = 2**15  # units that int16 holds


class Recordings(Dataset):
    """Labelled samples, each the spikes of `n_units` inputs over `steps` time steps, kept as events.

    A sample is a pair of an EventTensor [T, N] and its label. A DataLoader collates samples with
    `sparse_backend.collate`; `batch` is the fast way to the same batch.

    times: [E] int16, the step of each event; a sample's events ascend by (step, unit), each once; units: [E] int16,
    int32 from 2**15 units on; ptr: [n + 1] int64, sample i has the events ptr[i] .. ptr[i + 1]; labels: [n] int64;
    steps: T; n_units: N.
    Raises ValueError if the parts do not fit together.
    """

    def __init__(self, times: Tensor, units: Tensor, ptr: Tensor, labels: Tensor, steps: int, n_units: int) -> None:
        if not 1 <= steps < 2**15:
            raise ValueError(f"steps must lie in 1..{2**15 - 1}, got {steps}")
        if len(ptr) != len(labels) + 1 or len(times) != len(units) or len(times) != int(ptr[-1]):
            raise ValueError(
                f"ptr must have one entry more than there are labels and end at the number of events, got {len(ptr)} "
                f"for {len(labels)} labels, ending at {int(ptr[-1])} of {len(times)} times and {len(units)} units"
            )
        self.times, self.units, self.ptr, self.labels = times, units, ptr, labels
        self.steps, self.n_units = steps, n_units

    @classmethod
    def from_samples(
        cls, samples: Iterable[tuple[Any, Any]], labels: Sequence[int] | Tensor, steps: int, n_units: int
    ) -> Recordings:
        """From one pair of arrays (steps, units) for each sample: integers, in any order.

        Several events of a unit in one step count as one; events at or after `steps` are left out.
        Raises ValueError for arrays that are not integers, a negative step, a unit outside 0..n_units-1, arrays of two
        lengths, or another number of samples than of labels.
        """
        of_units = torch.int16 if n_units <= SMALL_UNITS else torch.int32
        times: list[Tensor] = []  # narrow at once: a large data set has 10**8 events
        units: list[Tensor] = []
        for position, (when, which) in enumerate(samples):
            step, unit = torch.as_tensor(when), torch.as_tensor(which)
            for name, array in (("steps", step), ("units", unit)):
                if array.is_floating_point() and array.numel():
                    raise ValueError(f"sample {position}: {name} must be integers, got {array.dtype}: round them first")
            step, unit = step.long(), unit.long()
            if step.shape != unit.shape or step.dim() != 1:
                raise ValueError(
                    f"sample {position}: steps and units must be arrays of one length, "
                    f"got {list(step.shape)} and {list(unit.shape)}"
                )
            if step.numel() and int(step.min()) < 0:
                raise ValueError(f"sample {position}: steps must be at least 0, got {int(step.min())}")
            if unit.numel() and not 0 <= int(unit.min()) <= int(unit.max()) < n_units:
                raise ValueError(
                    f"sample {position}: units must lie in 0..{n_units - 1}, got {int(unit.min())}..{int(unit.max())}"
                )
            flat = torch.unique((step * n_units + unit)[step < steps])
            times.append((flat // n_units).to(torch.int16))
            units.append((flat % n_units).to(of_units))
        if len(times) != len(labels):
            raise ValueError(f"labels must be one for each of {len(times)} samples, got {len(labels)}")
        ptr = torch.zeros(len(times) + 1, dtype=torch.int64)
        ptr[1:] = torch.tensor([len(sample) for sample in times], dtype=torch.int64).cumsum(0)
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int16), *times]),
            torch.cat([torch.empty(0, dtype=of_units), *units]),
            ptr,
            torch.as_tensor(labels, dtype=torch.int64),
            steps,
            n_units,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[EventTensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample must lie in 0..{len(self) - 1}, got {index}")
        index %= len(self)
        begin, end = self.ptr[index : index + 2].tolist()
        row_ptr = torch.zeros(self.steps + 1, dtype=torch.int32)
        row_ptr[1:] = torch.bincount(self.times[begin:end].long(), minlength=self.steps).cumsum(0)
        events = EventTensor((self.steps, self.n_units), row_ptr, self.units[begin:end].int(), check=False)
        return events, int(self.labels[index])

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[EventTensor, Tensor]:
        """Samples as one batch [T, B, N] and its labels [B]: linear in events and T·B, nothing is sorted."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        begin, count = self.ptr[chosen], self.ptr[chosen + 1] - self.ptr[chosen]
        samples, total = len(chosen), int(count.sum())
        sample = torch.repeat_interleave(torch.arange(samples), count, output_size=total)
        first = count.cumsum(0) - count  # of each sample, in the order chosen
        source = torch.arange(total) + (begin - first)[sample]
        step = self.times[source].long()

        per_row = torch.bincount(sample * self.steps + step, minlength=samples * self.steps).view(samples, self.steps)
        ahead_in_sample = per_row.view(-1).cumsum(0) - per_row.view(-1)  # [B * T]
        row_ptr = torch.zeros(samples * self.steps + 1, dtype=torch.int64)
        row_ptr[1:] = per_row.t().reshape(-1).cumsum(0)
        # an event keeps its place within its row; rows change from (b, t) to (t, b)
        shift = row_ptr[:-1].view(self.steps, samples).t().reshape(-1) - ahead_in_sample
        columns = torch.empty(total, dtype=torch.int32)
        columns[torch.arange(total) + shift[sample * self.steps + step]] = self.units[source].int()
        shape = (self.steps, samples, self.n_units)
        return EventTensor(shape, row_ptr.int(), columns, check=False), self.labels[chosen]

    def spread(self, count: int) -> Recordings:
        """``count`` samples at even distances, so of every class where they lie class by class; all where there are
        fewer."""
        kept = torch.arange(min(count, len(self))) * len(self) // max(1, min(count, len(self)))
        sizes = self.ptr[kept + 1] - self.ptr[kept]
        ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        events = torch.arange(int(ptr[-1])) + torch.repeat_interleave(self.ptr[kept] - ptr[:-1], sizes)
        return Recordings(self.times[events], self.units[events], ptr, self.labels[kept], self.steps, self.n_units)

    @property
    def events_per_sample(self) -> float:
        return len(self.times) / max(1, len(self))


@dataclass(frozen=True)
class EventSet:
    """A data set of events in a training and a test part, of the same T and N.

    name: what to call it in tables and plots; classes: how many there are; note: what a reader of results must know of
    it, empty where it is the data set of that name, whole.
    """

    name: str
    train: Recordings
    test: Recordings
    classes: int
    note: str = ""

    def __post_init__(self) -> None:
        shapes = [(part.steps, part.n_units) for part in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"train and test must have one (steps, n_units), got {shapes[0]} and {shapes[1]}")
        for part, labels in (("train", self.train.labels), ("test", self.test.labels)):
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                raise ValueError(
                    f"{part} labels must lie in 0..{self.classes - 1}, "
                    f"got {int(labels.min())}..{int(labels.max())}: these labels belong to another data set"
                )

    def spread(self, count: int) -> EventSet:
        """``count`` samples of each part, see `Recordings.spread`."""
        return dataclasses.replace(self, train=self.train.spread(count), test=self.test.spread(count))


def latency_set(images: ImageSet, steps: int, tau_eff: float = TAU_EFF, theta: float = THETA) -> EventSet:
    """Images as spikes, at most one for each pixel, at the step T(x) = tau_eff log(x / (x − theta)) where x > theta.

    steps: T; tau_eff: in steps; theta: of pixels in [0, 1].
    Raises ValueError for pixels that are not finite, or numbers that are not positive.
    Source: the paper's appendix E.1.
    """

    def coded(pixels: Tensor, labels: Tensor) -> Recordings:
        when = latency(pixels, tau_eff, theta)
        return Recordings.from_samples(
            ((times[fires].long(), fires.nonzero().view(-1)) for times, fires in zip(when, when < steps, strict=True)),
            labels,
            steps,
            pixels.shape[1],
        )

    return EventSet(
        images.name,
        coded(images.train_images, images.train_labels),
        coded(images.test_images, images.test_labels),
        images.classes,
    )
