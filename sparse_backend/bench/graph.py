"""A path captured as a graph: forward with loss, and backward, each replayed as one unit."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from sparse_backend import EventTensor
from sparse_backend.bench.cases import BTh
from sparse_backend.bench.inputs import Batch
from sparse_backend.bench.models import loss_of
from sparse_backend.bench.paths import Evaluation, Path, Run, Times, Unavailable


def run_of(path: Path, net: Any, b_th: BTh, batch: Batch, dense: Tensor | None = None) -> Run:
    """What runs a path: see `Run`."""
    return (CapturedRun if path.captured else Run)(path, net, b_th, batch, dense)


class CapturedRun(Run):
    """A step copies its events to where the graph reads them, and a dense input is read where it is, which is the
    least there is to do; gradients are written where they were, not cleared."""

    def __init__(self, path: Path, net: Any, b_th: BTh, batch: Batch, dense: Tensor | None = None) -> None:
        super().__init__(path, net, b_th, batch, dense)
        self._static = copy.deepcopy(self.input) if type(self.input) is EventTensor else self.input
        self._mem: Any = None
        self._loss: Any = None
        self._capture(None)

    def _capture(self, samples: Tensor | None) -> None:
        def forward() -> None:
            # a pass that lives on would accumulate gradients on the stream it was made on
            self._mem = self._loss = None
            output = self.forward(self._static)
            self._mem, self._loss = output.mem, loss_of(output, self.labels, samples)

        def backward() -> None:
            self.optimizer.zero_grad()
            self._loss.backward()

        try:
            self._replay_forward, self._replay_backward = self.device.capture(forward, backward)
        except RuntimeError as error:
            first, _, _ = str(error).partition("\n")
            raise Unavailable(f"it cannot be captured: {first}") from error

    def step(self) -> Times:
        self._renew_input()
        self.device.wait()
        mark, between = self.device.mark, self.device.between
        start = mark()
        if type(self._static) is EventTensor:
            self._static.row_ptr.copy_(self.input.row_ptr)
            self._static.indices.copy_(self.input.indices)
        self._replay_forward()
        middle = mark()
        self._replay_backward()
        end = mark()
        self.optimizer.step()
        stop = mark()
        return Times(between(start, middle), between(middle, end), between(start, stop))

    def evaluate(self, samples: Tensor | None = None) -> Evaluation:
        self._capture(samples)
        self._replay_forward()
        self._replay_backward()
        return Evaluation(self._loss.item(), self._mem.detach(), self.gradients())
