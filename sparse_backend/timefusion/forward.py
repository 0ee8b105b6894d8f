"""An enabled module's forward, recorded; and the same for a loop outside it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from sparse_backend.deferred import unusual
from sparse_backend.events import EventTensor
from sparse_backend.layer_state import STATE, Tally, check_module, is_enabled
from sparse_backend.tensorlike import dense, under_saved_tensor_hooks
from sparse_backend.timefusion import recorder
from sparse_backend.timefusion.recorder import Placeholder, Recording

_SKIP_FIRST, _SKIP_MOST = 4, 256


class Patience:
    """Whether to record once more: what hardly fuses steps is recorded ever more rarely."""

    def __init__(self) -> None:
        self.skip, self.skip_next = 0, _SKIP_FIRST

    def is_lost(self) -> bool:
        """Whether this time is one of those that are not recorded."""
        lost = self.skip > 0
        self.skip -= lost
        return lost

    def saw(self, into: Recording) -> None:
        if into.was_worth_it:
            self.skip_next = _SKIP_FIRST
        else:
            self.skip, self.skip_next = self.skip_next, min(2 * self.skip_next, _SKIP_MOST)


class FusionTally(Tally):
    """What the last recording of a module or a replica of it did, for `report`."""

    __slots__ = ("calls", "forced", "forced_by", "in_order", "longest", "recorded")

    def reset(self) -> None:
        self.recorded = False  #: whether there is anything to report
        self.longest = 0  #: steps that a neuron layer ran as one sequence
        self.calls = 0  #: calls of one layer
        self.in_order = False  #: whether some layer had to run in step order
        self.forced_by: str | None = None  #: the user's line that needed values before the forward ended
        self.forced = 0  #: how often that happened

    def note(self, into: Recording) -> None:
        self.recorded = True
        self.longest, self.calls, self.in_order = into.longest, into.calls, into.in_order
        self.forced_by, self.forced = into.forced_by, into.forced


class FusionState:
    """What an enabled module remembers of its recordings."""

    def __init__(self, tally: FusionTally | None = None) -> None:
        self.inside, self.outside = Patience(), Patience()  #: with its forwards, and with loops around them
        self.tally = tally or FusionTally()

    def fresh(self, tally: FusionTally | None = None) -> FusionState:
        return type(self)(tally)

    def __deepcopy__(self, memo: Any) -> FusionState:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


def fused_forward(module: Any, state: FusionState, *args: Any, **kwargs: Any) -> Any:
    """Run a module's own forward while its layers record, then hand back values."""
    forward = type(module).forward
    if torch.compiler.is_compiling() or recorder.is_recording_here() or unusual() is not None:
        return forward(module, *args, **kwargs)
    again = under_saved_tensor_hooks()  # a checkpoint may run this once more, and must find it the same
    if not again and state.inside.is_lost():
        return forward(module, *args, **kwargs)
    into = Recording()
    try:
        with recorder.recording(into):
            out = forward(module, *args, **kwargs)
    except BaseException:
        into.abandon()
        raise
    into.finish()
    state.tally.note(into)
    if not again:
        state.inside.saw(into)
    _settle(module)
    return values(out)


def values(out: Any) -> Any:
    """`out` with every placeholder in it replaced by what it stands for."""
    if type(out) is Placeholder:
        return _own(out)
    owned: dict[Placeholder, Any] = {}  # what is one tensor to the caller stays one

    def own(leaf: Any) -> Any:
        if type(leaf) is not Placeholder:
            return leaf
        if leaf not in owned:
            owned[leaf] = _own(leaf)
        return owned[leaf]

    return tree_map(own, out)


def _own(placeholder: Placeholder) -> Any:
    """A value that leaves the forward: not a view of all steps, which its owner could not write to or detach."""
    value = _kept(placeholder)
    if type(value) is not torch.Tensor or value._base is None:
        return value
    return value.clone() if value.requires_grad else torch.ops.aten._unsafe_view(value, value.shape)


def _kept(placeholder: Placeholder) -> Any:
    """A value that a module keeps: of its own, where it is the value of every step."""
    value = placeholder.value()
    shared = not placeholder._dense_only and placeholder.ref[0].run.is_constant  # type: ignore[union-attr]
    return dense(value).clone() if shared and type(value) is not EventTensor else value


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _settle(net: nn.Module) -> None:
    """Give values to the placeholders that a forward has left in attributes, buffers, and lists and dicts there."""
    for module in net.modules():
        _settle_in(module._buffers)
        for name, kept in module.__dict__.items():
            if type(kept) is Placeholder:
                module.__dict__[name] = _kept(kept)
            elif name not in _OF_EVERY_MODULE:
                _settle_in(kept)


def _settle_in(kept: Any) -> None:
    """The same in a container, which stays the object it is."""
    if isinstance(kept, dict):
        items: Any = kept.items()
    elif isinstance(kept, (list, deque)):
        items = enumerate(kept)
    else:
        return
    for key, value in items:
        if type(value) is Placeholder:
            kept[key] = _kept(value)
        elif type(value) is tuple and any(type(part) is Placeholder for part in value):
            kept[key] = values(value)
        elif value is not kept:
            _settle_in(value)


@contextmanager
def fuse_time(net: nn.Module) -> Iterator[None]:
    """Run a loop that calls `net`, enabled, once per step as sequences: what `enable` does for a loop inside a forward.

    ::

        with sparse_backend.fuse_time(net):
            for t in range(T):
                spk, mem = net(x[t])
                spikes.append(spk)
        loss = loss_fn(torch.stack(spikes), target)

    Values are there when the `with` ends, or when something inside it needs them. Raises TypeError for a net that is no
    module; warns (UserWarning) where nothing in it is enabled.
    """
    check_module(net)
    if not is_enabled(net):
        warnings.warn(
            "sparse_backend.fuse_time changes nothing: no layer of this model is enabled. "
            "Call net = sparse_backend.enable(net) before the loop",
            UserWarning,
            stacklevel=3,
        )
    state = net.__dict__.get(STATE)
    patience = state.outside if type(state) is FusionState and not under_saved_tensor_hooks() else None
    if recorder.is_recording() or unusual() is not None or (patience is not None and patience.is_lost()):
        yield
        return
    into = Recording()
    try:
        with recorder.recording(into):
            yield
    except BaseException:
        into.abandon()
        raise
    into.finish()
    if type(state) is FusionState:
        state.tally.note(into)
    if patience is not None:
        patience.saw(into)
    _settle(net)
