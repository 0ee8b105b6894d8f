"""Input for the cases: events drawn at a stated density with classes to learn, or real images, latency-coded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_backend import EventTensor
from sparse_backend.bench.cases import Case
from sparse_backend.data import ImageSet, latency_events

BLOBS = 10  # of each class of recordings: places in time and unit where events crowd
BACKGROUND = 0.25  # share of a recording's events that lie anywhere
PIXEL_NOISE = 0.7


@dataclass(frozen=True)
class Batch:
    """The same spikes as events [T, B, N] and dense [T, B, *image], and labels [B]."""

    events: EventTensor
    labels: Tensor
    image: tuple[int, ...] = ()  #: [N] if there is none

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor at each call: an EventTensor would keep its own dense form."""
        dense = EventTensor(self.events.shape, self.events.row_ptr, self.events.indices, dtype=dtype).to_dense()
        return dense.unflatten(2, self.image) if self.image else dense

    def as_events(self, dtype: torch.dtype) -> EventTensor:
        """Events [T, B, *image]."""
        events = self.events.to(dtype)
        return events.reshaped(torch.Size((*events.shape[:2], *self.image))) if self.image else events

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.events.to(device), self.labels.to(device), self.image)

    @property
    def events_per_sample(self) -> float:
        return self.events.nnz / max(1, self.events.shape[1])


class Inputs:
    """Draws batches of one case, from a seed: the same on every device."""

    def __init__(self, case: Case, seed: int, images: ImageSet | None = None, device: str = "cpu") -> None:
        self.case = case
        self.images = images
        self.device = device
        self.name = "drawn" if images is None else images.name
        self._random = torch.Generator().manual_seed(seed)
        size = (case.classes, BLOBS)
        self._centres = torch.rand(*size, 2, generator=self._random)
        self._templates = torch.randn(case.classes, case.inputs, generator=self._random)
        self._overdraw = 1.0  # several events on one place count as one
        if images is None and case.coding == "recording":
            for _ in range(3):
                self._overdraw *= case.events / max(1.0, self._drawn(16).events_per_sample)
        self._known: list[Batch] = []
        self._next = 0

    def batch(self, samples: int) -> Batch:
        """A new batch of this many samples."""
        if self._next == len(self._known):
            self._known.append(self._drawn(samples).to(self.device))
        self._next += 1
        batch = self._known[self._next - 1]
        assert len(batch.labels) == samples, "after a rewind batches are asked for as before"
        return batch

    def rewind(self) -> None:
        """Give the same batches again, in the same order."""
        self._next = 0

    def _drawn(self, samples: int) -> Batch:
        case = self.case
        if self.images is not None:
            chosen = torch.randint(len(self.images.train_images), (samples,), generator=self._random)
            return self._latency(self.images.train_images[chosen], self.images.train_labels[chosen])
        labels = torch.randint(case.classes, (samples,), generator=self._random)
        if case.coding == "recording":
            return self._recording(labels)
        if case.coding == "random":
            return self._random_entries(labels)
        noise = PIXEL_NOISE * torch.randn(samples, case.inputs, generator=self._random)
        order = (self._templates[labels] + noise).argsort(dim=1, descending=True)[:, : case.events]
        values = torch.zeros(samples, case.inputs)
        values.scatter_(1, order, torch.linspace(1, 0.25, order.shape[1]).expand(order.shape))
        return self._latency(values, labels)

    def _latency(self, values: Tensor, labels: Tensor) -> Batch:
        steps = self.case.steps
        time, sample, unit = latency_events(values, steps, tau_eff=steps / 5)
        return self._batch((time * len(labels) + sample) * self.case.inputs + unit, labels)

    def _recording(self, labels: Tensor) -> Batch:
        case, random = self.case, self._random
        counts = torch.poisson(torch.full((len(labels),), case.events * self._overdraw), generator=random).long()
        sample = torch.repeat_interleave(torch.arange(len(labels)), counts)
        blob = torch.randint(BLOBS, sample.shape, generator=random)
        place = self._centres[labels[sample], blob]  # [E, (time, unit)], 0..1
        place = (place + 0.07 * torch.randn(place.shape, generator=random)) % 1
        anywhere = torch.rand(sample.shape, generator=random) < BACKGROUND
        place[anywhere] = torch.rand(int(anywhere.sum()), 2, generator=random)
        time = (place[:, 0] * case.steps).long().clamp_(max=case.steps - 1)
        unit = (place[:, 1] * case.inputs).long().clamp_(max=case.inputs - 1)
        return self._batch(torch.unique((time * len(labels) + sample) * case.inputs + unit), labels)

    def _random_entries(self, labels: Tensor) -> Batch:
        case, entries = self.case, len(labels) * self.case.inputs
        share = case.events / (case.steps * case.inputs)
        chosen = [
            (torch.rand(entries, generator=self._random) < share).nonzero().flatten() + step * entries
            for step in range(case.steps)
        ]
        return self._batch(torch.cat(chosen), labels)

    def _batch(self, flat: Tensor, labels: Tensor) -> Batch:
        """flat: (t * B + b) * N + unit of every event, each once."""
        case = self.case
        if case.coding != "random":  # which come sorted
            flat = flat.sort().values
        shape = (case.steps, len(labels), case.inputs)
        row_ptr = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.int32)
        row_ptr[1:] = torch.bincount(flat // case.inputs, minlength=row_ptr.numel() - 1).cumsum(0)
        return Batch(EventTensor(shape, row_ptr, (flat % case.inputs).to(torch.int32)), labels, case.image)
