"""What enabled modules remember between calls. It lies in a module's `__dict__`, outside its state_dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_backend import policy

#: its name in a module's `__dict__`
STATE = "_sparse_backend"


def is_enabled(net: nn.Module) -> bool:
    """Whether any module of a net is enabled."""
    return any(STATE in module.__dict__ for module in net.modules())


def check_module(net: Any) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")


class Tally:
    """What an enabled module and its replicas have done, for `report`."""

    __slots__: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        raise NotImplementedError

    def copy_from(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))


class LayerTally(Tally):
    """The same of a neuron layer. Entries are samples times neurons, summed over steps."""

    __slots__ = (
        "active", "at_once", "counted", "dense_kept", "dense_steps", "entries", "framework_steps", "kept", "path",
        "reason", "sparse_steps", "spikes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.path = "not called yet"  #: of the last call
        self.reason: str | None = None  #: why it was not a faster one
        super().__init__()

    def reset(self) -> None:
        self.sparse_steps = self.dense_steps = self.framework_steps = self.entries = 0
        #: out of the `counted` entries; the dense regime looks at some, and on a GPU leaves the numbers there
        self.active: int | Tensor = 0
        self.spikes: int | Tensor = 0
        self.counted = 0
        self.kept = self.dense_kept = 0  #: bytes
        self.at_once = 0  #: most steps that ran as one sequence

    def add(self, active: int | Tensor, spikes: int | Tensor, counted: int) -> None:
        """So many of `counted` entries, as numbers or as tensors that nobody waits for."""
        self.active, self.spikes = _sum(self.active, active), _sum(self.spikes, spikes)
        self.counted += counted


def _sum(total: int | Tensor, more: int | Tensor) -> int | Tensor:
    if isinstance(total, Tensor) and isinstance(more, Tensor) and total.device != more.device:
        total = int(total)
    return total + more


class LayerState:
    """The state of one neuron layer; `plan` is its adapter's, rebuilt whenever what it was made from changes."""

    DENSE_STEPS_FIRST, DENSE_STEPS_MOST = 8, 256
    #: of dense steps one in so many is counted: a prime, so that it is not the same one of every sequence
    COUNT_DENSE_EVERY = 31
    #: of a dense sequence so many entries are counted: those of some samples, at all steps
    COUNT_DENSE_MOST = 1 << 16

    def __init__(self, name: str, b_th: policy.BTh, tally: LayerTally | None = None) -> None:
        self.name, self.b_th = name, b_th
        self.tally = tally or LayerTally()
        self.plan: Any = None
        self.weights: Any = None  #: WeightCache of a linear layer that has none itself
        self.site: Any = None  #: of the layer's last call in the forward that records now
        self.last_mem: Any = None  #: weak reference to the membrane handed out last
        self.begins = True  #: a sequence has begun, and no step of it has yet looked whether weights were written to
        self.dense_for = 0  #: steps still to be run densely because activity was high
        self.dense_because: str | None = None  #: what was seen, where it was not too many active entries
        self.dense_next = self.DENSE_STEPS_FIRST
        # What torch.compile may not find out while it traces: see the adapter's `prepare_to_trace`.
        self.traced_for: Any = None
        self.traced_b_th = 0.0
        self.traced_reset = ""
        self.traced_graded = False

    def go_dense(self, because: str | None = None) -> None:
        """A step was too active to be kept as events: run the next ones densely, more of them each time."""
        self.dense_because = because
        self.dense_for = self.dense_next
        self.dense_next = min(2 * self.dense_next, self.DENSE_STEPS_MOST)

    def fresh(self, tally: LayerTally | None = None) -> LayerState:
        """A state for another module with the same choices."""
        other = type(self)(self.name, self.b_th, tally)
        other.traced_for, other.traced_b_th = self.traced_for, self.traced_b_th
        other.traced_reset, other.traced_graded = self.traced_reset, self.traced_graded
        return other

    def __deepcopy__(self, memo: Any) -> LayerState:
        return self.fresh()

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.b_th)


class NoState:
    """The state of an enabled module that remembers nothing between calls."""

    __slots__ = ()
    tally = None

    def fresh(self, tally: Any = None) -> NoState:
        return self
