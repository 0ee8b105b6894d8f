"""What each layer of an enabled model does, why not faster, and what it keeps for the backward pass.

Kept bytes are what a layer's own op and its surrogate save for backward: per active entry V - threshold and its
column (and g, with a second reset), per spike its column, int32 row pointers of both, the resets where the gradient
needs them, and the membrane where beta learns. Dense bytes are two floats, V - threshold and the spike, for every
neuron, sample and step: the least that ordinary back-propagation keeps (snnTorch keeps more). Both are sums over all
calls that recorded a graph, as are active and spike fractions over all calls; dense steps are counted at every
31st one, dense sequences on as many samples as make 65,536 entries.
"""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparse_backend import convolution, enabling, policy
from sparse_backend.layer_state import STATE, check_module
from sparse_backend.timefusion.forward import FusionState

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass
class LayerReport:
    """One spiking layer. Fractions are None where nothing has been counted."""

    name: str
    kind: str
    path: str  #: "sparse" or "dense", "step" or "sequence" (time fusion), "framework" or "not called yet"
    reason: str | None  #: why not faster
    b_th: float | str | None  #: as chosen
    b_th_value: float | None  #: the number "auto" stands for with this layer's surrogate
    active: float | None  #: 0..1
    spikes: float | None  #: 0..1
    kept_bytes: int
    dense_bytes: int
    steps: dict[str, int]  #: calls by path
    at_once: int  #: most steps that ran as one sequence


class Report:
    """The layers of a model; prints as a table, in notebooks too."""

    def __init__(self, layers: list[LayerReport], note: str | None) -> None:
        self.layers, self.note = layers, note

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(layer) for layer in self.layers], "note": self.note}

    def _cells(self) -> list[list[str]]:
        head = ["layer", "path", "at once", "b_th", "active", "spikes", "kept", "dense", "why not faster"]
        return [head, *([
            layer.name or "(model)", _path(layer), _steps(layer), _b_th(layer), _percent(layer.active),
            _percent(layer.spikes),
            _bytes(layer.kept_bytes), _bytes(layer.dense_bytes), layer.reason or "",
        ] for layer in self.layers)]  # fmt: skip

    def __str__(self) -> str:
        text = table(self._cells(), right={2, 4, 5, 6, 7}) if self.layers else ""
        return "\n".join(filter(None, [text, self.note]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return (html_table(self._cells()) if self.layers else "") + note


def report(net: nn.Module, reset: bool = False) -> Report:
    """Per spiking layer of `net`: the path it takes, why not faster, active and spiking share, bytes kept.

    Counts run since `enable` or since the last report with `reset=True`; bytes are those of all calls since, path and
    reason those of the last call. Raises TypeError for a net that is no module.
    """
    check_module(net)
    layers = []
    for name, module, adapter in enabling.neurons(net):
        state = enabling.state_of(module)
        layers.append(_layer(name, module, adapter, state))
        if reset and state is not None:
            state.tally.reset()
    note = None
    if not layers:
        note = "No spiking layer of a known framework in this model."
    elif all(layer.b_th is None for layer in layers):
        could = any(enabling.why_not(module, adapter) is None for _, module, adapter in enabling.neurons(net))
        note = f"Nothing is accelerated{'. Call sparse_backend.enable(net)' if could else ', nor can be'}."
    else:
        note = "\n".join(filter(None, [_fusion(net, layers), _convolutions(net)])) or None
    return Report(layers, note)


def _fusion(net: nn.Module, layers: list[LayerReport]) -> str | None:
    """How far the time loop in the model's forward ran as sequences, and what ended them early."""
    states = [module.__dict__.get(STATE) for module in net.modules()]
    recorded = [state.tally for state in states if type(state) is FusionState and state.tally.recorded]
    at_once = max(layer.at_once for layer in layers)
    if not recorded:
        never = FusionState in map(type, states) and at_once == 1
        return f"Time fusion: no forward that holds these layers was called as a module. {_FUSE}" if never else None
    fusion = max(recorded, key=lambda tally: tally.longest)
    longest, calls = fusion.longest, fusion.calls
    if longest <= 1 and calls <= 1:
        if at_once > 1:
            return None  # its modules were given whole sequences
        if longest == 1:
            return f"Time fusion: the forward is one step. {_FUSE}"
    what = f"up to {longest} steps ran as one sequence" if longest > 1 else "every step ran alone"
    if fusion.forced > 1:  # once: when all steps were there
        times = f"{fusion.forced} times in the last forward"
        return f"Time fusion: {what}. {fusion.forced_by} needed a value before the loop ended ({times})."
    if fusion.in_order and any(layer.at_once == 1 for layer in layers):
        who = "other layers one at a time" if longest > 1 else "in their order"
        return f"Time fusion: {what}, {who}: what they are given depends on what the step before gave."
    return f"Time fusion: {what}."


_FUSE = "Where a loop calls it, put that inside `with sparse_backend.fuse_time(net):`."


def _convolutions(net: nn.Module) -> str | None:
    """Which convolutions ran on events in their last call, and why others did not."""
    on_events, others = [], []
    for name, module in net.named_modules():
        if type(module) is nn.Conv2d and module.weight in convolution.paths:
            reason = convolution.paths[module.weight]
            if reason is None:
                on_events.append(name)
            else:
                others.append(f"{name} dense: {reason}")
    parts = [f"{', '.join(on_events)} on events"] if on_events else []
    return f"Convolutions: {'; '.join([*parts, *others])}." if on_events or others else None


def _layer(name: str, module: nn.Module, adapter: Any, state: Any) -> LayerReport:
    kind = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
    if state is None:
        reason = enabling.why_not(module, adapter) or "not enabled"
        return LayerReport(name, kind, "framework", reason, None, None, None, None, 0, 0, {}, 0)
    tally = state.tally
    reason = tally.reason
    if reason is not None and tally.path.startswith("dense") and state.b_th == "auto":
        reason = f"{reason}. {policy.CURE_BROAD}"
    return LayerReport(
        name=name,
        kind=kind,
        path=tally.path,
        reason=reason,
        b_th=state.b_th,
        b_th_value=float(policy.resolve_b_th(state.b_th, adapter.spike_grad(module))),
        active=int(tally.active) / tally.counted if tally.counted else None,
        spikes=int(tally.spikes) / tally.counted if tally.counted else None,
        kept_bytes=tally.kept,
        dense_bytes=tally.dense_kept,
        steps={"sparse": tally.sparse_steps, "dense": tally.dense_steps, "framework": tally.framework_steps},
        at_once=tally.at_once,
    )


def _path(layer: LayerReport) -> str:
    taken = {path: count for path, count in layer.steps.items() if count}
    if len(taken) < 2:
        return layer.path
    total = sum(taken.values())
    return ", ".join(f"{path} {100 * count / total:.0f} %" for path, count in taken.items())


def _steps(layer: LayerReport) -> str:
    return f"{layer.at_once} step{'s' if layer.at_once > 1 else ''}" if layer.at_once else "-"


def _b_th(layer: LayerReport) -> str:
    if layer.b_th is None or layer.b_th_value is None:
        return "-"
    value = "inf" if math.isinf(layer.b_th_value) else f"{layer.b_th_value:.3g}"
    return f"auto ({value})" if layer.b_th == "auto" else value


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _bytes(count: int) -> str:
    size, unit = float(count), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if count else "-"


# Tables, for `checking` too.


def table(rows: list[list[str]], right: set[int]) -> str:
    """Rows, the first one the head, as aligned text; the columns in `right` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    return "\n".join("  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows)


def html_table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"
