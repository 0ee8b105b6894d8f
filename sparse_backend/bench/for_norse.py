"""Norse's networks, and what the benchmark asks of the framework (`models.Framework`)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import norse.torch as norse
import torch
from norse.torch.functional import lif as lif_functions
from norse.torch.functional.heaviside import heaviside
from norse.torch.module.snn import SNN, SNNRecurrent
from torch import Tensor, nn

from sparse_backend.bench.cases import Case
from sparse_backend.bench.models import Output, Wrap
from sparse_backend.surrogate import SpikeGrad, derivative

ALPHA = 100.0

#: the method is what Norse calls it, "super" in both: what it does is decided by `given`
SURROGATES: dict[str, tuple[str, Callable[[], Any]]] = {
    "super_alpha": ("SuperSpike(alpha=100) as documented", lambda: "super"),
    "super": ("SuperSpike as installed", lambda: "super"),
}


class LIFNet(nn.Module):
    """Layers with their neurons in a `SequentialState`, `LI` as the readout, over whole sequences."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = norse.SequentialState(*modules)

    @property
    def return_hidden(self) -> bool:
        return self.layers.return_hidden

    @return_hidden.setter
    def return_hidden(self, value: bool) -> None:
        self.layers.return_hidden = value

    def forward(self, x: Tensor) -> Output:  # [T, B, inputs]
        out, _ = self.layers(x)
        if self.return_hidden:
            hidden = [z for z, layer in zip(out, self.layers, strict=True) if isinstance(layer, _SPIKING)]
            return Output(None, out[-1], hidden)
        return Output(None, out)


class CellNet(nn.Module):
    """The same layers, its neurons cells in a loop over the steps."""

    return_hidden = False

    def __init__(self, net: LIFNet) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_CELLS.get(type(layer), _itself)(layer) for layer in net.layers)

    def forward(self, x: Tensor) -> Output:  # [T, B, inputs]
        states: list[Any] = [None] * len(self.layers)
        rec: list[list[Tensor]] = [[] for _ in self.layers]
        every = self.return_hidden
        for step in range(x.shape[0]):
            z = x[step]
            for k, layer in enumerate(self.layers):
                if isinstance(layer, nn.Linear):
                    z = layer(z)
                else:
                    z, states[k] = layer(z, states[k])
                if every and isinstance(layer, _SPIKING):
                    rec[k].append(z)
            rec[-1].append(z)
        return Output(None, torch.stack(rec[-1]), [torch.stack(spikes) for spikes in rec[:-1] if spikes])


def _itself(layer: nn.Module) -> nn.Module:
    return layer


def _recurrent_cell(layer: Any) -> nn.Module:
    return norse.LIFRecurrentCell(
        int(layer.input_size), int(layer.hidden_size), p=layer.p, dt=layer.dt, autapses=True,
        input_weights=layer.input_weights, recurrent_weights=layer.recurrent_weights,
    )  # fmt: skip


_SPIKING = norse.LIF, norse.LIFRecurrent, norse.LIFCell, norse.LIFRecurrentCell
_CELLS: dict[type, Callable[[Any], nn.Module]] = {
    norse.LIF: lambda layer: norse.LIFCell(p=layer.p, dt=layer.dt),
    norse.LI: lambda layer: norse.LICell(p=layer.p, dt=layer.dt),
    norse.LIFRecurrent: _recurrent_cell,
}


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(inputs))
    nn.init.zeros_(linear.bias)
    return linear


def _parameters(case: Case) -> Any:
    return norse.LIFParameters(method=SURROGATES[case.surrogate][1](), alpha=torch.as_tensor(ALPHA))


def _feedforward(case: Case) -> LIFNet:
    layers: list[nn.Module] = []
    for inputs, neurons in itertools.pairwise((case.inputs, *case.hidden)):
        layers += [_linear(inputs, neurons), norse.LIF(p=_parameters(case))]
    return LIFNet(*layers, _linear(case.hidden[-1], case.classes), norse.LI())


def _recurrent(case: Case) -> LIFNet:
    layers: list[nn.Module] = []
    for inputs, neurons in itertools.pairwise((case.inputs, *case.hidden)):
        # autapses: what forbids them is a hook on the weights, which copies of a network do not have
        layers.append(norse.LIFRecurrent(inputs, neurons, p=_parameters(case), autapses=True))
    return LIFNet(*layers, _linear(case.hidden[-1], case.classes), norse.LI())


NETS: dict[str, Callable[[Case], nn.Module]] = {"feedforward": _feedforward, "recurrent": _recurrent}


# Stock without its quadratic flaw.


class Steps:
    """A sequence as Norse's loop reads it, its steps outputs of one node of the graph: the gradient of `x[t]` is a
    tensor of the whole sequence, for every t."""

    is_sparse = False

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self._steps = x.unbind(0)

    def __getitem__(self, t: int) -> Tensor:
        return self._steps[t]


def _mended_forward(layer: Any, x: Tensor, state: Any = None) -> Any:
    return type(layer).forward(layer, Steps(x), state)


def mended(net: LIFNet) -> LIFNet:
    """The network itself, its modules for whole sequences reading their input by `Steps`."""
    for layer in net.layers:
        if isinstance(layer, (SNN, SNNRecurrent)):
            layer.forward = partial(_mended_forward, layer)
    return net


# The surrogate.


class _SuperSpike(torch.autograd.Function):
    """Zenke and Ganguli's (Neural Computation 30, 2018), with the steepness that Norse's parameters document."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return heaviside(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad / (ctx.alpha * x.abs() + 1.0).pow(2), None


_own_threshold = lif_functions.threshold


def _threshold(x: Tensor, method: str, alpha: Any) -> Tensor:
    """Norse's, whose "super" honours alpha."""
    return _SuperSpike.apply(x, alpha) if method == "super" else _own_threshold(x, method, alpha)


def honours_alpha() -> bool:
    """Whether the installed Norse's SuperSpike does: 1.1.0's does not."""
    at = torch.full((1,), 0.1, dtype=torch.float64)
    steep = derivative(lambda x: _own_threshold(x, "super", torch.as_tensor(ALPHA)), at)
    return math.isclose(float(steep), 1 / (ALPHA * 0.1 + 1) ** 2, rel_tol=1e-6)


@contextmanager
def _replaced(threshold: Callable[..., Tensor]) -> Iterator[None]:
    """Norse's step functions of LIF with another threshold, which the adapter reads too."""
    before = lif_functions.threshold
    lif_functions.threshold = threshold
    try:
        yield
    finally:
        lif_functions.threshold = before


def given(case: Case) -> Any:
    """ "super_alpha": a Norse whose SuperSpike honours alpha, for stock and for us."""
    return _replaced(_threshold) if case.surrogate == "super_alpha" and not honours_alpha() else nullcontext()


def _populations(net: LIFNet) -> Sequence[Any]:
    return [layer for layer in net.layers if isinstance(layer, _SPIKING)]


def surrogate_of(net: Any) -> SpikeGrad:
    return partial(_decide, lif_functions.threshold, _populations(net)[0].p)


def _decide(threshold: Callable[..., Tensor], p: Any, x: Tensor) -> Tensor:
    return threshold(x, p.method, p.alpha)


def currents(net: Any) -> list[list[nn.Parameter]]:
    found = []
    for before, layer in itertools.pairwise([None, *net.layers]):
        if isinstance(layer, norse.LIFRecurrent):
            found.append([layer.input_weights])
        elif isinstance(layer, norse.LIF):
            found.append([before.weight, before.bias])
    return found


@contextmanager
def intercepted(net: Any, wrap: Wrap) -> Iterator[None]:
    own, running = lif_functions.threshold, 0

    def enter(layer: int, *_: Any) -> None:
        nonlocal running
        running = layer

    def threshold(x: Tensor, method: str, alpha: Any) -> Tensor:
        return wrap(running, lambda x: own(x, method, alpha))(x)

    hooks = [layer.register_forward_pre_hook(partial(enter, k)) for k, layer in enumerate(_populations(net))]
    try:
        with _replaced(threshold):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def exact(net: Any) -> Any:
    return copy.deepcopy(net).double()


def oracle(net: Any) -> Callable[[Any], Output]:
    return mended(net)
