"""Each kernel of one training step: its time, and for those that stream, the bytes that must move.

Streaming kernels are bound by memory: their time is held against bytes over the bandwidth of a copy measured in the
same run. Scans wait for the step before and gathers for their rows: of these the time a step of the sequence is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from sparse_backend import EventTensor
from sparse_backend.bench.cases import STREAMING
from sparse_backend.bench.devices import Cpu
from sparse_backend.bench.paths import Run

REPEATS = 5
WORD = 4  # bytes of an index, of a number, of 32 bits


class Layer(NamedTuple):
    """What decides how much a layer's kernels move."""

    rows: int  #: T * B
    inputs: int
    neurons: int
    events: int  #: in its input
    active: int
    spikes: int
    dense_input: bool

    @property
    def input_bits(self) -> int:
        """Bytes of a bit for every entry of the input, whole words a row; `output_bits` of the output."""
        return WORD * self.rows * -(-self.inputs // 32)

    @property
    def output_bits(self) -> int:
        return WORD * self.rows * -(-self.neurons // 32)


class Kernel(NamedTuple):
    pattern: str  #: how its name is found among those the profiler gives
    label: str
    kind: Literal["streaming", "scan", "gather", "rest"]
    moved: Callable[[Layer], int] = lambda layer: 0  #: bytes that must come from or go to memory


def _dense_read(layer: Layer) -> int:
    return WORD * layer.rows * layer.inputs + layer.input_bits if layer.dense_input else 0


def _counted(layer: Layer) -> int:
    return (layer.input_bits if layer.dense_input else 0) + 2 * layer.output_bits


def _emitted(layer: Layer) -> int:
    """Bits read, row pointers and indices written; of active entries V - threshold too, read and written."""
    of_input = layer.input_bits + WORD * (layer.events + layer.rows) if layer.dense_input else 0
    return of_input + 2 * layer.output_bits + WORD * (2 * layer.rows + layer.spikes + 3 * layer.active)


def _ours(name: str) -> str:
    return rf"sparse_backend.*\b{name}_kernel\b"


#: by device; a name belongs to the first whose pattern it has
KERNELS: dict[str, Sequence[Kernel]] = {
    "cuda": (
        Kernel(_ours("mark_nonzero"), "events_from_dense: mark", "streaming", _dense_read),
        Kernel(_ours("count"), "event lists: count", "streaming", _counted),
        Kernel(_ours("emit"), "event lists: emit", "streaming", _emitted),
        Kernel(_ours("transpose_bits"), "∇W: turn events by column", "streaming",
               lambda layer: WORD * (layer.events + layer.rows) + layer.input_bits),
        Kernel(_ours("currents"), "currents", "gather"),
        Kernel(_ours("input_gradient"), "∇s at active entries", "gather"),
        Kernel(_ours("weight_gradient"), "∇W", "gather"),
        Kernel(_ours("locate"), "locate lists' entries", "gather"),
        Kernel(_ours("forward"), "scan", "scan"),
        Kernel(_ours("backward"), "reverse scan, δ", "scan"),
        Kernel("sparse_backend", "other kernels of ours", "rest"),
        Kernel("", "torch: surrogate, loss, optimiser, copies", "rest"),
    ),
    "cpu": (
        Kernel("sparse_backend::events_from_dense", "events_from_dense", "streaming",
               lambda layer: WORD * (layer.rows * (layer.inputs + 1) + layer.events) if layer.dense_input else 0),
        Kernel("sparse_backend::linear_leaky_backward", "linear_leaky, backward", "scan"),
        Kernel("sparse_backend::linear_leaky", "linear_leaky", "scan"),
        Kernel("", "torch: surrogate, loss, optimiser, autograd", "rest"),
    ),
}  # fmt: skip


def layers_of(run: Run) -> list[Layer]:
    """The sizes of a run of the sequence form, whose input is dense."""
    run.net.return_hidden = True
    with torch.no_grad():
        output = run.forward(run.input)
    run.net.return_hidden = False
    made = []
    before: Any = run.input
    for linear, spikes in zip(run.net.linears, [*output.hidden, output.spikes], strict=True):
        sparse = type(before) is EventTensor
        events = before.nnz if sparse else int(before.count_nonzero())
        active = 0 if spikes.active_indices is None else spikes.active_indices.numel()
        rows = before.shape[0] * before.shape[1]
        made.append(Layer(rows, linear.in_features, linear.out_features, events, active, spikes.nnz, not sparse))
        before = spikes
    return made


def table(run: Run, device: Cpu) -> dict[str, Any]:
    """A row for each kernel that ran: launches and milliseconds of a step; of those that stream, bytes, their floor in
    milliseconds, and how many times that was taken; of the others microseconds for each of the T steps."""
    layers, steps = layers_of(run), run.input.shape[0]
    launches = device.kernels(run.step, REPEATS)
    rate = device.copy_rate()
    rows = []
    taken: set[str] = set()
    for kernel in KERNELS[device.type]:
        names = [name for name in launches if name not in taken and re.search(kernel.pattern, name)]
        taken.update(names)
        if not names:
            continue
        seconds = sum(launches[name].seconds for name in names)
        row: dict[str, Any] = {"kernel": kernel.label, "kind": kernel.kind}
        row |= {"launches": sum(launches[name].launches for name in names), "ms": 1e3 * seconds}
        if kernel.kind == "streaming":
            moved = sum(kernel.moved(layer) for layer in layers)
            times = seconds * rate / max(1, moved)
            row |= {"bytes": moved, "floor_ms": 1e3 * moved / rate, "times": times, "reached": times <= STREAMING}
        else:
            row["us_per_step"] = 1e6 * seconds / steps
        rows.append(row)
    return {"copy_gb_s": rate / 1e9, "rows": rows}
