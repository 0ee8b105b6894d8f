"""Turning sparse gradients on and off in models people already have.

An enabled module keeps its class, parameters, buffers and state_dict. It gains three entries in its instance's
`__dict__`: `forward`, bound to it; `_replicate_for_data_parallel`, so that replicas run their own; and its private
state (`layer_state.py`). Deleting them is all `disable` does.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparse_backend import _native, allocation, policy, surrogate
from sparse_backend.layer_state import STATE, LayerState, NoState, check_module
from sparse_backend.layers import InputState, LinearState, batch_norm_forward, convolution_forward, linear_forward
from sparse_backend.timefusion.forward import FusionState, fused_forward

#: root package of a framework's classes -> its adapter
_ADAPTERS = {"snntorch": "for_snntorch", "norse": "for_norse"}

_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}

_OVERRIDES = ("forward", "_replicate_for_data_parallel", STATE)


def _adapter_of(module: nn.Module) -> Any:
    """The adapter for the framework that a module's class, or a base of it, comes from."""
    for base in type(module).__mro__:
        root = base.__module__.partition(".")[0]
        if root in _ADAPTERS:
            return _load_adapter(root)
    return None


def _check_framework(framework: str) -> None:
    if framework not in _ADAPTERS:
        raise ValueError(f"framework: expected one of {', '.join(map(repr, _ADAPTERS))}, got {framework!r}")


def _load_adapter(framework: str) -> Any:
    return importlib.import_module(f"sparse_backend.adapters.{_ADAPTERS[framework]}")


def neurons(net: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, adapter) of every spiking module of a known framework, accelerated or not."""
    for name, module in net.named_modules():
        adapter = _adapter_of(module)
        if adapter is not None and adapter.is_neuron(module):
            yield name, module, adapter


def why_not(module: nn.Module, adapter: Any) -> str | None:
    """Why `enable` leaves a neuron alone; None where it does not."""
    if STATE not in module.__dict__ and _is_replaced(module):
        return "its forward was replaced on the instance before enable, and may do anything"
    return adapter.why_not(module)


def _is_replaced(module: nn.Module) -> bool:
    """Whether somebody else has given an instance a forward of its own."""
    return "forward" in module.__dict__ and type(module.__dict__["forward"]) is not _Forward


def state_of(module: nn.Module) -> Any:
    """The state of an enabled or patched layer, None for any other module."""
    own = module.__dict__.get(STATE)
    if own is not None:
        return own
    for patched in _patches.values():
        if type(module) in patched.originals:
            return patched.state(module)
    return None


# enable and disable.


def enable(net: nn.Module, b_th: policy.BThSpec = "auto", *, fuse_time: bool = True) -> nn.Module:
    """Let the spiking layers of `net` train with sparse gradients; in place, returns `net`.

    b_th: half-width of the band |V - threshold| < b_th whose neurons back-propagate; a positive number, inf, "auto"
    (per layer, the band that holds 95 % of the surrogate's mass), or a mapping from names of layers to these, "auto"
    for layers it does not name. Calling it again changes b_th. What is not accelerated runs the framework's own code;
    `report` says what and why.

    fuse_time: run the time loop inside the forward of `net`, or of a module in it, layer by layer, as sequences, with
    the results of the step order (docs/time-fusion.md); False runs every step when it is called.

    Raises TypeError for a net that is no module, ValueError for a wrong b_th or an unknown name, before anything is
    changed. Warns (UserWarning) where nothing can be accelerated, and of surrogates whose automatic band is too broad.
    Source: Perez-Nieves & Goodman 2021, equations 9-14; docs/design.md.
    """
    check_module(net)
    found = list(neurons(net))
    layers = [(name, module, adapter) for name, module, adapter in found if why_not(module, adapter) is None]
    chosen = _b_th_per_layer(b_th, [name for name, module, adapter in layers if adapter.has_spikes(module)])
    if not layers:
        warnings.warn(f"sparse_backend.enable changes nothing: {_why_nothing(found)}", UserWarning, stacklevel=2)
        return net
    _native.load()
    allocation.keep_freed_memory()
    for module in net.modules():
        if _is_of_another(module):
            _restore(module)
    changed = []
    for name, module, adapter in layers:
        state, value = module.__dict__.get(STATE), chosen.get(name, math.inf)  # a readout has no surrogate
        if state is None:
            state = LayerState(name, value)
            _override(module, adapter.forward_of(module), state)
        elif state.b_th != value:
            state.b_th, state.plan = value, None
        else:
            continue
        adapter.prepare_to_trace(module, state)
        changed.append((name, module, adapter))
    for module in _holding(net, [module for _, module, _ in layers]):
        fusion = module.__dict__.get(STATE)
        if fuse_time and fusion is None and not _is_replaced(module):
            _override(module, _fused, FusionState())
        elif not fuse_time and type(fusion) is FusionState:
            _restore(module)
    for module in net.modules():
        if STATE not in module.__dict__ and not _is_replaced(module):
            if type(module) is nn.Linear:
                _override(module, linear_forward, LinearState())
            elif type(module) is nn.Conv2d:
                _override(module, convolution_forward, InputState())
            elif type(module) in _BATCH_NORMS:
                _override(module, batch_norm_forward, NoState())
            elif (adapter := _adapter_of(module)) is not None and type(module) in adapter.CONTAINERS:
                container_forward, container_state = adapter.CONTAINERS[type(module)]
                _override(module, container_forward, container_state())
    _warn_of_broad_surrogates(changed)
    return net


def _holding(net: nn.Module, layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose own forward may hold a time loop: `net`, and every one in it that has spiking layers and is
    not torch's nor such a layer, for methods of `net` may call it. The outermost forward that runs is the one that
    records."""
    spiking = {id(layer) for layer in layers}
    for module in net.modules():
        adapter = _adapter_of(module)
        known = adapter is not None and (adapter.is_neuron(module) or type(module) in adapter.CONTAINERS)
        torchs = type(module).__module__.partition(".")[0] == "torch"
        inside = (id(part) in spiking for part in module.modules() if part is not module)
        if module is net or (not (known or torchs) and any(inside)):
            yield module


def disable(net: nn.Module) -> nn.Module:
    """Undo `enable`: every module is exactly as before. Returns `net`.

    A layer whose forward somebody has replaced since stays enabled, and a UserWarning names it: what replaced it may
    call ours. Raises TypeError for a net that is no module.
    """
    check_module(net)
    for name, module in net.named_modules():
        if STATE not in module.__dict__:
            continue
        if _is_replaced(module):
            warnings.warn(
                f"sparse_backend.disable: {name or type(module).__name__} stays enabled, its forward was replaced "
                "after enable. Put that back first",
                UserWarning,
                stacklevel=2,
            )
        else:
            _restore(module)
    return net


def _restore(module: nn.Module) -> None:
    for name in _OVERRIDES:
        module.__dict__.pop(name, None)


def _fused(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an enabled module that may hold a time loop."""
    return fused_forward(module, module.__dict__[STATE], *args, **kwargs)


class _Forward(functools.partial):
    """A forward bound to its module. Who asks for its arguments is told those of the class's own."""

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(type(module).forward.__get__(module))


def _override(module: nn.Module, forward: Any, state: Any) -> None:
    module.__dict__[STATE] = state
    module.__dict__["forward"] = _Forward(forward, module)
    module.__dict__["_replicate_for_data_parallel"] = functools.partial(_replicate, module)


def _is_of_another(module: nn.Module) -> bool:
    """Whether a module is a copy made of an enabled one's `__dict__`, as copy.copy makes it: its forward is the
    original's."""
    forward = module.__dict__.get("forward")
    return type(forward) is _Forward and forward.args[0] is not module


def _replicate(module: nn.Module) -> Any:
    """A replica for nn.DataParallel, which runs itself and counts into the original's tally."""
    replica: Any = type(module)._replicate_for_data_parallel(module)
    state = module.__dict__[STATE]
    _override(replica, module.__dict__["forward"].func, state.fresh(state.tally))
    return replica


def _b_th_per_layer(b_th: policy.BThSpec, names: list[str]) -> dict[str, policy.BTh]:
    if not isinstance(b_th, Mapping):
        value = policy.check_b_th(b_th)
        return {name: value for name in names}
    unknown = [name for name in b_th if name not in names]
    if unknown:
        raise ValueError(
            f"b_th: expected names of layers, one of {', '.join(map(repr, names)) or 'none'}, got "
            f"{', '.join(map(repr, unknown))}"
        )
    return {name: policy.check_b_th(b_th.get(name, "auto"), f"b_th[{name!r}]") for name in names}


def _why_nothing(found: list[tuple[str, nn.Module, Any]]) -> str:
    if not found:
        loaded = [name for name in _ADAPTERS if name in sys.modules]
        which = " or ".join(_ADAPTERS)
        return f"it finds no spiking layer of {which} in it" + ("" if loaded else f" (and {which} is not imported)")
    reasons = (f"{name or type(module).__name__}: {why_not(module, adapter)}" for name, module, adapter in found)
    return "; ".join(reasons)


def _warn_of_broad_surrogates(layers: list[tuple[str, nn.Module, Any]]) -> None:
    broad: dict[float, list[str]] = {}
    for name, module, adapter in layers:
        if module.__dict__[STATE].b_th == "auto":
            known = surrogate.inspect(adapter.spike_grad(module))
            width = known.auto_b_th
            if known.problem is None and policy.is_broad(width, adapter.lowest_threshold(module)):
                broad.setdefault(width, []).append(name)
    for width, names in broad.items():
        what = f"layers {', '.join(names)} stay" if len(names) > 1 else f"layer {names[0] or '(the model)'} stays"
        warnings.warn(
            f"sparse_backend: with b_th='auto', {what} dense: {policy.why_broad(width)}. "
            f"It runs fused, but its gradient is not sparse. {policy.CURE_BROAD}",
            UserWarning,
            stacklevel=3,
        )


@contextmanager
def as_stock(net: nn.Module) -> Iterator[None]:
    """Within this, `net` runs the framework's own code throughout."""
    taken = [(module, {name: module.__dict__.pop(name) for name in _OVERRIDES if name in module.__dict__})
             for module in net.modules() if STATE in module.__dict__]  # fmt: skip
    token = object()
    _suspended.add(token)
    try:
        yield
    finally:
        _suspended.discard(token)
        for module, entries in taken:
            module.__dict__.update(entries)


_suspended: set[object] = set()  # not empty: patched classes run their own forward


# patch and unpatch.


class _Patched:
    """A framework whose classes run sparse: their own `forward` functions, and the state of each instance."""

    def __init__(self, adapter: Any, b_th: policy.BTh) -> None:
        self.adapter, self.b_th = adapter, b_th
        self.originals: dict[type, Any] = {}
        self.states: weakref.WeakKeyDictionary[nn.Module, LayerState] = weakref.WeakKeyDictionary()

    def state(self, module: nn.Module) -> LayerState:
        state = self.states.get(module)
        b_th = self.b_th if self.adapter.has_spikes(module) else math.inf
        if state is None:
            state = self.states[module] = LayerState("", b_th)
        elif state.b_th != b_th:
            state.b_th, state.plan = b_th, None
        return state

    def install(self) -> None:
        for cls, forward in self.adapter.PATCHED.items():
            self.originals[cls] = cls.__dict__.get("forward")  # None where it is inherited
            cls.forward = self._dispatcher(cls, forward)

    def restore(self) -> None:
        for cls, original in self.originals.items():
            if original is None:
                del cls.forward  # type: ignore[attr-defined]
            else:
                cls.forward = original  # type: ignore[attr-defined]

    def _dispatcher(self, cls: type, run: Any) -> Any:
        original = cls.forward  # type: ignore[attr-defined]

        @functools.wraps(original)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if type(module) is not cls or _suspended:
                return original(module, *args, **kwargs)
            return run(self.state, module, *args, **kwargs)

        return forward


_patches: dict[str, _Patched] = {}
_lock = threading.RLock()


class _Undo:
    """What `patch` returns: leaving it as a context manager puts back what was there before."""

    def __init__(self, framework: str, before: policy.BTh | None) -> None:
        self._framework, self._before = framework, before

    def __enter__(self) -> _Undo:
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            if self._before is None:
                unpatch(self._framework)
            elif self._framework in _patches:
                _patches[self._framework].b_th = self._before


def patch(framework: str = "snntorch", b_th: policy.BTh = "auto") -> Any:
    """Let every spiking layer of a framework in this process train with sparse gradients, existing or built later.

    As a plain call until `unpatch()`, or as a context manager. Exactly the framework's own classes are patched, not
    their subclasses; modules that are enabled keep their own b_th. Linear layers run fused with the neurons they feed
    where their inputs are a patched layer's spikes.

    Raises ValueError for a framework that is not known or not installed, and for a wrong b_th.
    """
    value = policy.check_b_th(b_th)
    _check_framework(framework)
    try:
        adapter = _load_adapter(framework)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != framework:
            raise
        raise ValueError(
            f"framework: expected an installed one, but {framework} cannot be imported. "
            f"Install it: pip install 'sparse_backend[{framework}]'"
        ) from error
    _native.load()
    with _lock:
        patched = _patches.get(framework)
        if patched is not None:
            before, patched.b_th = patched.b_th, value
            return _Undo(framework, before)
        patched = _patches[framework] = _Patched(adapter, value)
        patched.install()
        return _Undo(framework, None)


def unpatch(framework: str | None = None) -> None:
    """Undo `patch`: the framework's classes have their own functions again. All frameworks where none is named.

    Raises ValueError for a framework that is not known.
    """
    if framework is not None:
        _check_framework(framework)
    with _lock:
        for name in [framework] if framework is not None else list(_patches):
            patched = _patches.pop(name, None)
            if patched is not None:
                patched.restore()
