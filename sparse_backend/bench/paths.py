"""The ways to run a case: the registry of paths. A new one is one entry of `PATHS`, named in a case's `paths`."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sparse_backend import EventTensor
from sparse_backend.bench import devices
from sparse_backend.bench.cases import (
    CELLS,
    CELLS_EVENTS,
    ENABLED,
    ENABLED_EVENTS,
    FUSED,
    FUSED_GRAPH,
    GRAPH,
    LOOP,
    LOOP_EVENTS,
    LOOP_NO_GRAD,
    MENDED,
    SEQUENCE,
    SEQUENCE_EVENTS,
    SPIKINGJELLY,
    STEP,
    STOCK,
    STOCK_NO_GRAD,
    BTh,
)
from sparse_backend.bench.inputs import Batch
from sparse_backend.bench.memory import kept_bytes
from sparse_backend.bench.models import Output, loss_of
from sparse_backend.policy import resolve_b_th


class Unavailable(RuntimeError):
    """This path cannot run here; the message says why."""


@dataclass(frozen=True)
class Path:
    """`prepare` makes the forward pass from a network that is its own to change."""

    name: str
    label: str
    input: Literal["dense", "events"]
    prepare: Callable[[Any, BTh], Callable[[Any], Output]]
    masked: bool = True  #: whether its gradient is the sparse one, or stock's own
    learns: bool = True  #: whether there is a backward pass
    against: str = STOCK  #: the path whose medians its ratios are of
    captured: bool = False  #: whether it runs as a graph
    judge: Callable[[Any], Callable[[Any], Output]] | None = None  #: a forward pass to be judged by instead of stock's
    note: Callable[[torch.device], str] | None = None  #: what has to be said of it on a device


def _stock(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    return net


def _mended(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    from sparse_backend.bench.for_norse import mended

    return mended(net)


def _sequence(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    from sparse_backend.bench.leaky_nets import sequence_forward

    return partial(sequence_forward, net, b_th=b_th)


def _sparse_sequence(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    from sparse_backend.bench.leaky_nets import sparse_forward

    return partial(sparse_forward, net, b_th=resolve_b_th(b_th, net.neurons[0].spike_grad))


def _fused(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    from sparse_backend.bench import fused_dense

    return fused_dense.forward_of(net, fused_dense.kind_for(next(net.parameters()).device))


def _of_fused(device: torch.device) -> str:
    from sparse_backend.bench import fused_dense

    return f"one matrix product over T * B a layer, scans by {fused_dense.kind_for(device)}"


def _spikingjelly(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    from sparse_backend.bench import peer

    try:
        return peer.forward_of(net)
    except ImportError as error:
        raise Unavailable(f"SpikingJelly is not installed ({error})") from error


def _judge_of_spikingjelly(net: Any) -> Callable[[Any], Output]:
    from sparse_backend.bench import peer

    return peer.judge(net)


def _of_spikingjelly(device: torch.device) -> str:
    from sparse_backend.bench import peer

    return peer.NOTE


def enabled(net: Any, b_th: BTh, fuse_time: bool = True) -> Any:
    from sparse_backend.bench.for_rebuilt import Leaky

    if any(isinstance(module, Leaky) for module in net.modules()):
        raise Unavailable("it needs snnTorch, which is not installed")
    try:
        from sparse_backend import enable

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a broad surrogate stays dense is what is measured
            return enable(net, b_th=b_th, fuse_time=fuse_time)
    except ImportError as error:
        raise Unavailable(f"sparse_backend.enable is not here ({error})") from error


def _cells(net: Any, b_th: BTh) -> Callable[[Any], Output]:
    from sparse_backend.bench.for_norse import CellNet

    return enabled(CellNet(net), b_th)


PATHS: dict[str, Path] = {
    path.name: path
    for path in (
        Path(STOCK, "stock", "dense", _stock, masked=False),
        Path(MENDED, "stock, mended by unbind", "dense", _mended, masked=False),
        Path(SEQUENCE, "sequence, dense input", "dense", _sequence),
        Path(SEQUENCE_EVENTS, "sequence, event input", "events", _sequence),
        Path(ENABLED, "enabled, dense input", "dense", enabled),
        Path(ENABLED_EVENTS, "enabled, event input", "events", enabled),
        Path(LOOP, "unmodified loop, fused, dense input", "dense", enabled),
        Path(LOOP_EVENTS, "unmodified loop, fused, event input", "events", enabled),
        Path(STEP, "unmodified loop, step form", "dense", partial(enabled, fuse_time=False)),
        Path(CELLS, "enabled cells in a loop, fused, dense input", "dense", _cells),
        Path(CELLS_EVENTS, "enabled cells in a loop, fused, event input", "events", _cells),
        Path(GRAPH, "sequence as a CUDA graph, event input", "events", _sparse_sequence, captured=True),
        Path(FUSED, "fused dense loop", "dense", _fused, masked=False, note=_of_fused),
        Path(FUSED_GRAPH, "fused dense loop as a CUDA graph", "dense", _fused, masked=False, captured=True),
        Path(
            SPIKINGJELLY,
            "SpikingJelly",
            "dense",
            _spikingjelly,
            masked=False,
            judge=_judge_of_spikingjelly,
            note=_of_spikingjelly,
        ),
        Path(STOCK_NO_GRAD, "stock, no_grad", "dense", _stock, masked=False, learns=False, against=STOCK_NO_GRAD),
        Path(LOOP_NO_GRAD, "unmodified loop, fused, no_grad", "dense", enabled, learns=False, against=STOCK_NO_GRAD),
    )
}


class Times(NamedTuple):
    """Seconds of one training step, of its forward pass alone where the path does not learn."""

    forward: float  #: and the loss
    backward: float | None = None
    whole: float | None = None  #: with zero_grad and the optimiser's step


class Evaluation(NamedTuple):
    """What a path computes."""

    loss: float
    mem: Tensor  #: [T, B, classes]
    gradients: dict[str, Tensor]  #: by name of the parameter; none where the path does not learn


class Run:
    """One path on one batch, with a copy of the network of its own."""

    def __init__(self, path: Path, net: Any, b_th: BTh, batch: Batch, dense: Tensor | None = None) -> None:
        """dense: the batch's dense form where several runs share one. The weights' dtype is the input's."""
        self.path = path
        self.net = copy.deepcopy(net)
        self.forward = path.prepare(self.net, b_th)
        dtype = next(self.net.parameters()).dtype
        self.input: Tensor | EventTensor
        if path.input == "events":
            self.input = batch.as_events(dtype)
        else:
            self.input = batch.dense(dtype) if dense is None else dense
        self.labels = batch.labels
        self.device = devices.of(batch.labels.device)
        self._inputs: Iterator[Tensor | EventTensor] = itertools.repeat(self.input)
        # Learning rate 0: every repeat sees the same weights, of a new version, as in training.
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0)

    def rotate(self, inputs: Sequence[Tensor | EventTensor]) -> None:
        """Go through these, copies of the input, in turn: what one step left in the cache is not the next one's."""
        self._inputs = itertools.cycle(inputs)

    def loss(self, samples: Tensor | None = None) -> Tensor:
        return loss_of(self.forward(self.input), self.labels, samples)

    def step(self) -> Times:
        """One training step."""
        self._renew_input()
        self.device.wait()
        mark, between = self.device.mark, self.device.between
        if not self.path.learns:
            begin = mark()
            with torch.no_grad():
                self.loss()
            return Times(between(begin, mark()))
        start = mark()
        self.optimizer.zero_grad()
        begin = mark()
        loss = self.loss()
        middle = mark()
        loss.backward()
        end = mark()
        self.optimizer.step()
        del loss
        stop = mark()
        return Times(between(begin, middle), between(middle, end), between(start, stop))

    def _renew_input(self) -> None:
        """Make the input as new as the next batch would be: what was read of it before may not be used again."""
        self.input = next(self._inputs)
        if type(self.input) is EventTensor:
            self.input = self.input.without_handle()
        else:
            increment_version(self.input)

    def hidden(self) -> list[Tensor]:
        """Where the hidden layers spike, [T, B, ...] each, in the pass that is timed but for what it gives back."""
        owners = [owner for owner in (self.net, self.forward) if isinstance(owner, nn.Module)]
        for owner in owners:
            owner.return_hidden = True
        try:
            with torch.set_grad_enabled(self.path.learns):
                found = self.forward(self.input).hidden
        finally:
            for owner in owners:
                owner.return_hidden = False
        return [(z.to_dense() if isinstance(z, EventTensor) else z).detach() != 0 for z in found]

    def evaluate(self, samples: Tensor | None = None) -> Evaluation:
        """One pass; the loss, and with it the gradients, are of these samples."""
        with torch.set_grad_enabled(self.path.learns):
            output = self.forward(self.input)
            loss = loss_of(output, self.labels, samples)
            if self.path.learns:
                self.optimizer.zero_grad()
                loss.backward()
        return Evaluation(loss.item(), output.mem.detach(), self.gradients() if self.path.learns else {})

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.net.named_parameters()
        }

    def kept_bytes(self) -> int:
        """Bytes kept for backward, without parameters and what the caller made."""
        return kept_bytes(self.loss, exclude=self._given())

    def _given(self) -> Iterator[Tensor]:
        yield from self.net.parameters()
        yield from self.net.buffers()
        yield self.labels
        if type(self.input) is EventTensor:
            parts = (self.input.row_ptr, self.input.indices, self.input.values)
            yield from (part for part in parts if part is not None)
        else:
            yield self.input
