"""What the benchmark asks of a framework, and what its networks give back.

The networks themselves are in `leaky_nets.py` and `for_norse.py`, written as their frameworks' users write them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from sparse_backend.bench.cases import REBUILT
from sparse_backend.surrogate import SpikeGrad

if TYPE_CHECKING:
    from sparse_backend.bench.cases import Case


class Output(NamedTuple):
    """Of a network's forward pass over [T, B, ...]."""

    spikes: Any  #: of the readout [T, B, classes]; None where it has none
    mem: Tensor  #: of the readout [T, B, classes]
    hidden: Sequence[Any] = ()  #: spikes of the hidden layers [T, B, ...], where the network's `return_hidden` is set


#: makes of a population's number, counted from the input, and its surrogate what is used in its stead
Wrap = Callable[[int, SpikeGrad], SpikeGrad]


class Framework(Protocol):
    """One module for each framework."""

    SURROGATES: Mapping[str, tuple[str, Callable[[], Any]]]  #: as printed, and how it is made
    NETS: Mapping[str, Callable[[Case], nn.Module]]

    def given(self, case: Case) -> AbstractContextManager[None]:
        """What holds of the framework itself while the case is measured."""

    def surrogate_of(self, net: Any) -> SpikeGrad:
        """The hidden layers'."""

    def currents(self, net: Any) -> list[list[nn.Parameter]]:
        """The parameters behind each hidden layer's current."""

    def intercepted(self, net: Any, wrap: Wrap) -> AbstractContextManager[None]:
        """The stock network with every surrogate wrapped."""

    def exact(self, net: Any) -> Any:
        """A copy in float64, spikes included."""

    def oracle(self, net: Any) -> Callable[[Any], Output]:
        """Stock's forward pass, in a form that computes the same faster where there is one."""


FRAMEWORKS = {"snntorch": "for_snntorch", "norse": "for_norse", REBUILT: "for_rebuilt"}


def framework_of(case: Case) -> Framework:
    return cast(Framework, importlib.import_module(f"sparse_backend.bench.{FRAMEWORKS[case.framework]}"))


def build(case: Case) -> nn.Module:
    """The case's network with random weights, from torch's generator."""
    return framework_of(case).NETS[case.net](case)


def loss_of(output: Output, labels: Tensor, samples: Tensor | None = None) -> Tensor:
    """Cross entropy on the maximum over time of the readout's membrane (the paper's appendix E.4).

    labels: [B]; samples: indices of those that count, all if None.
    """
    most = output.mem.max(dim=0).values
    if samples is not None:
        most, labels = most[samples], labels[samples]
    return nn.functional.cross_entropy(most, labels)
