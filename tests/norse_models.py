"""Whole Norse models for the adapter's tests, and the stock run they are judged by.

Stock means Norse's own modules in float64. Its surrogate is masked where Norse's step functions look it up, so that the
reset and the recurrence see the mask too (E3).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import norse.torch as norse
import torch
from helpers import INF, as_tensor, normal, spikes
from norse.torch.functional import iaf as iaf_functions
from norse.torch.functional import lif as lif_functions
from norse.torch.functional import lif_box as lif_box_functions
from norse.torch.functional.leaky_integrator import LIState
from norse.torch.functional.leaky_integrator_box import LIBoxState
from norse.torch.functional.lif_box import LIFBoxFeedForwardState
from norse.torch.module import leaky_integrator_box, lif_box
from torch import Tensor, nn

import sparse_backend
from sparse_backend import EventTensor

F64 = torch.float64
SPIKING = ("LIF", "LIFBox", "IAF", "LIFRecurrent")
READOUTS = ("LI", "LILinear", "LIBox")
FORMS = ("sequence", "step", "lifted")
PARAMETERS = ("tau_mem_inv", "tau_syn_inv", "v_leak", "v_th", "v_reset")
STATES = {
    "LIF": norse.LIFFeedForwardState,
    "LIFBox": LIFBoxFeedForwardState,
    "IAF": norse.IAFFeedForwardState,
    "LIFRecurrent": norse.LIFState,
    "LI": LIState,
    "LILinear": LIState,
    "LIBox": LIBoxState,
}
#: in time; the others are lifted cells
IN_TIME = {
    name: found
    for name, found in (
        ("LIF", norse.LIF),
        ("IAF", norse.IAF),
        ("LIFRecurrent", norse.LIFRecurrent),
        ("LI", norse.LI),
        ("LIFBox", getattr(lif_box, "LIFBox", None)),
        ("LIBox", getattr(leaky_integrator_box, "LIBox", None)),
    )
    if found is not None
}
CELLS = {
    "LIF": norse.LIFCell,
    "LIFBox": norse.LIFBoxCell,
    "IAF": norse.IAFCell,
    "LIFRecurrent": norse.LIFRecurrentCell,
    "LI": norse.LICell,
    "LILinear": norse.LILinearCell,
    "LIBox": norse.LIBoxCell,
}


@contextmanager
def masked_threshold(b_th: float, seen: list[Tensor] | None = None) -> Iterator[None]:
    """Norse's surrogate masked to the band; every v - v_th it decides on goes to `seen`."""
    homes = lif_functions, lif_box_functions, iaf_functions
    own = lif_functions.threshold

    def band(x: Tensor, method: str, alpha: Any) -> Tensor:
        if seen is not None:
            seen.append(x.detach())
        fired = own(x, method, alpha)
        return fired if b_th == INF else torch.where(x.detach().abs() < b_th, fired, fired.detach())

    for home in homes:
        home.threshold = band
    try:
        yield
    finally:
        for home in homes:
            home.threshold = own


@dataclass
class LayerCase:
    """One population and, unless it has weights of its own, the linear layer before it."""

    kind: str = "LIF"
    neurons: int = 5
    bias: bool = True
    each: frozenset[str] = frozenset()  #: parameters that are one per neuron
    learn: frozenset[str] = frozenset()  #: parameters that are nn.Parameters
    reset: str = "value"  #: of a LIFBox
    dt: float = 0.001
    method: str = "super"
    alpha: float = 100.0
    autapses: bool = False


@dataclass
class ModelCase:
    layers: list[LayerCase] = field(default_factory=lambda: [LayerCase(neurons=8), LayerCase()])
    inputs: int = 7
    steps: int = 6
    batch: int = 3
    seed: int = 0
    dtype: torch.dtype = F64
    form: str = "sequence"


def parameters_of(layer: LayerCase, seed: int, dtype: torch.dtype = F64) -> Any:
    """The `p` of a layer: gains and decays per step of about a half, thresholds within reach."""

    def draw(index: int, name: str, low: float, scale: float) -> Tensor:
        value = low + scale * normal((layer.neurons,) if name in layer.each else (), seed + index, dtype).clamp(-2, 2)
        if name.startswith("tau"):
            value = value / layer.dt
        if name == "v_leak":
            value = value.float().to(dtype)  # Norse makes its initial membranes float32
        return nn.Parameter(value) if name in layer.learn else value

    common = {
        "tau_mem_inv": draw(0, "tau_mem_inv", 0.5, 0.1),
        "v_leak": draw(1, "v_leak", 0.1, 0.05),
    }
    if layer.kind in ("LI", "LILinear"):
        return norse.LIParameters(tau_syn_inv=draw(2, "tau_syn_inv", 0.4, 0.1), **common)
    if layer.kind == "LIBox":
        return norse.LIBoxParameters(**common)
    spiking = {
        "v_th": draw(3, "v_th", 0.5, 0.05),
        "v_reset": draw(4, "v_reset", 0.0, 0.1),
        "method": layer.method,
        "alpha": torch.tensor(layer.alpha, dtype=dtype),
    }
    if layer.kind == "LIFBox":
        method = {"value": norse.reset_value, "subtract": norse.reset_subtract}[layer.reset]
        return norse.LIFBoxParameters(reset_method=method, **common, **spiking)
    if layer.kind == "IAF":
        return norse.IAFParameters(**spiking)
    return norse.LIFParameters(tau_syn_inv=draw(2, "tau_syn_inv", 0.4, 0.1), **common, **spiking)


#: a surrogate that is narrow beside a threshold of about a half
STEEP = {"method": "tanh", "alpha": torch.tensor(20.0)}


def lif(**options):
    """Parameters that spike in a few steps."""
    return norse.LIFParameters(**{"tau_mem_inv": torch.tensor(500.0), "v_th": torch.tensor(0.4), **STEEP, **options})


def weights(shape: tuple[int, int], seed: int, dtype: torch.dtype, scale: float = 2.0) -> nn.Parameter:
    return nn.Parameter(normal(shape, seed, dtype, scale / math.sqrt(max(1, shape[1]))) + 0.1)


class Model(nn.Module):
    """Populations one behind the other; returns what the last one gives, [T, B, N], and all states."""

    def __init__(self, case: ModelCase) -> None:
        super().__init__()
        self.form = case.form
        sizes = [case.inputs, *(layer.neurons for layer in case.layers)]
        self.linears, self.neurons = nn.ModuleList(), nn.ModuleList()
        for k, layer in enumerate(case.layers):
            seed, (inputs, neurons) = 100 * case.seed + 20 * k, sizes[k : k + 2]
            kwargs = {"p": parameters_of(layer, seed, case.dtype), "dt": layer.dt}
            in_time = self.form == "sequence" and layer.kind in IN_TIME
            made = (IN_TIME if in_time else CELLS)[layer.kind]
            own = weights((neurons, inputs), seed + 10, case.dtype)
            if layer.kind == "LIFRecurrent":
                recurrent = weights((neurons, neurons), seed + 11, case.dtype, 0.7)
                neuron = made(
                    inputs, neurons, input_weights=own, recurrent_weights=recurrent, autapses=layer.autapses, **kwargs
                )
            elif layer.kind == "LILinear":
                neuron = made(inputs, neurons, **kwargs)
                neuron.input_weights = own
            else:
                neuron = made(**kwargs)
            linear: nn.Module = nn.Identity()
            if layer.kind not in ("LIFRecurrent", "LILinear"):
                linear = nn.Linear(inputs, neurons, layer.bias, dtype=case.dtype)
                linear.weight = own
                if layer.bias:
                    linear.bias = nn.Parameter(normal((neurons,), seed + 12, case.dtype, 0.3))
            self.linears.append(linear)
            self.neurons.append(neuron if in_time or self.form == "step" else norse.Lift(neuron))

    def forward(self, x: Any, states: list[Any] | None = None) -> tuple[Any, list[Any]]:
        states = [None] * len(self.neurons) if states is None else list(states)
        if self.form == "step":
            outputs = []
            for t in range(x.shape[0]):
                out = x[t]
                for k, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                    out, states[k] = neuron(linear(out), states[k])
                outputs.append(out)
            return torch.stack(outputs), states
        for k, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
            x = linear(x)
            x, states[k] = neuron((x, states[k])) if type(neuron) is norse.Lift else neuron(x, states[k])
        return x, states

    def cells(self) -> list[Any]:
        return [neuron.lifted_module if type(neuron) is norse.Lift else neuron for neuron in self.neurons]

    def leaves(self) -> dict[str, Tensor]:
        """Everything that learns: parameters, and those that hide in `p`."""
        found = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        for k, cell in enumerate(self.cells()):
            for name in PARAMETERS:
                value = getattr(cell.p, name, None)
                if isinstance(value, nn.Parameter):
                    found[f"p{k}.{name}"] = value
        return found


def given_states(case: ModelCase) -> list[Any]:
    """A state for every layer, all leaves that require grad."""
    states = []
    for k, layer in enumerate(case.layers):
        shape, seed = (case.batch, layer.neurons), 100 * case.seed + 20 * k + 15
        parts = {"v": normal(shape, seed, case.dtype, 0.3), "i": normal(shape, seed + 1, case.dtype, 0.3),
                 "z": spikes(shape, 0.4, seed + 2, case.dtype)}  # fmt: skip
        cls = STATES[layer.kind]
        states.append(cls(**{name: parts[name].requires_grad_() for name in cls._fields}))
    return states


def make_input(kind: str, case: ModelCase, density: float) -> Any:
    """ "spikes", "events" or "real", [T, B, M]; with "grad" behind it, one that requires grad."""
    shape = case.steps, case.batch, case.inputs
    if kind.startswith("real"):
        x: Any = normal(shape, case.seed + 7, case.dtype)
    else:
        x = spikes(shape, density, case.seed + 7, case.dtype)
    if kind.startswith("events"):
        return EventTensor.from_dense(x)
    return x.requires_grad_() if kind.endswith("grad") else x


@dataclass
class Outcome:
    out: Tensor
    states: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]


def run(model: Model, x: Any, states: list[Any] | None = None, loss: str = "both") -> Outcome:
    """Forward and backward; every gradient, zeros where there is none. loss: on the "out"put, "states" or "both"."""
    leaves = model.leaves()
    if type(x) is not EventTensor and x.requires_grad:
        leaves["x"] = x = x.detach().clone().requires_grad_()
    if states is not None:
        states = [
            type(state)(*(part.detach().clone().requires_grad_(part.requires_grad) for part in state))
            for state in states
        ]
        leaves |= {
            f"{name}{k}": part for k, state in enumerate(states) for name, part in state._asdict().items()
            if part.requires_grad
        }  # fmt: skip
    out, after = model(x, states)
    value = out.new_zeros(())
    if loss != "states":
        value = value + (out * normal(out.shape, 20, out.dtype)).sum()
    if loss != "out":
        for k, state in enumerate(after):
            for j, part in enumerate(state):
                value = value + (part * normal(part.shape, 30 + 5 * k + j, part.dtype)).sum()
    for leaf in leaves.values():
        leaf.grad = None
    if value.requires_grad:
        value.backward()
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()
    }
    parts = [{name: as_tensor(part).detach() for name, part in state._asdict().items()} for state in after]
    return Outcome(as_tensor(out).detach(), parts, gradients)


def stock_run(model: Model, b_th: float, x: Any, states: list[Any] | None = None, loss: str = "both") -> Any:
    """The stock outcome of E3, and every v - v_th that was decided on."""
    seen: list[Tensor] = []
    with masked_threshold(b_th, seen):
        outcome = run(copy.deepcopy(model), as_tensor(x), states, loss)
    return outcome, seen


def enabled_copy(model: Any, b_th: Any, fuse_time: bool = True) -> Any:
    return sparse_backend.enable(copy.deepcopy(model), b_th=b_th, fuse_time=fuse_time)
