"""What every object of ours that stands in for a tensor shares.

A `TensorLike` is a `torch.Tensor` to whoever asks, without numbers of its own: torch functions see it through
`__torch_function__`, where a handler may keep it sparse and everything else gets its dense form. The empty tensor
below it is what C++ code that asks nobody would see; `__torch_dispatch__` answers there. Making one costs 1 us more
than a plain object (a wrapper subclass costs ten), and a plain object that claims to be a tensor crashes such code.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_any, tree_map

from sparse_backend.compiling import not_compiled

#: torch functions that have a sparse form: function -> handler(*args, **kwargs), NotImplemented to go dense
_handlers: dict[Any, Callable[..., Any]] = {}

#: methods through which the caller could write to, or watch, the dense form: from then on only that form counts
_DENSE_FROM_NOW_ON = {
    "numpy", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__", "register_hook", "retain_grad",
    "register_post_accumulate_grad_hook", "__setitem__", "__set__",
}  # fmt: skip
_IN_PLACE = {
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__",
    "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip

_make_subclass = Tensor._make_subclass
#: what C++ code that asks nobody sees of a stand-in: requiring grad, so that code which records a gradient for it fails
#: in the backward (sizes differ) instead of losing it
NOTHING = torch.empty(0)


@functools.cache
def nothing_of(dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The same of this dtype, and whether it can require grad."""
    return torch.empty(0, dtype=dtype, device="cpu"), dtype.is_floating_point or dtype.is_complex


def implements(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the sparse form of these torch functions."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            _handlers[function] = handler
        return handler

    return register


def dense_of(x: Any) -> Any:
    """`x`, or the dense tensor of a stand-in."""
    return x.to_dense() if isinstance(x, StandIn) else x


#: what has nothing below it
_LEAVES = {Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device}


def dense(value: Any) -> Any:
    """`value` with every stand-in below it replaced by its dense tensor."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is tuple:  # arguments mostly are flat: a tree's general walk costs more than a small function
        return tuple([dense(part) for part in value])
    if kind is list:
        return [dense(part) for part in value]
    if kind is dict:
        return {key: dense(part) for key, part in value.items()}
    if isinstance(value, StandIn):
        return value.to_dense()
    return tree_map(dense_of, value)


def shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """x in this shape, which shows what x does and yet is no view: users detach_() what they are handed."""
    return x if x.shape == shape else torch.ops.aten._unsafe_view(x, shape)


def learns_of(x: Any) -> bool:
    """Whether gradients flow to a tensor, without asking a stand-in for its dense form."""
    return x.learns if isinstance(x, TensorLike) else x.requires_grad


def _mutates(name: str) -> bool:
    return name in _IN_PLACE or name in _DENSE_FROM_NOW_ON or (name.endswith("_") and not name.endswith("__"))


def is_vmap(frame: FrameType) -> bool:
    """Whether torch.vmap asks, which then takes in C++ what it has asked for its size."""
    return frame.f_globals.get("__name__") == "torch._functorch.vmap"


def under_saved_tensor_hooks() -> bool:
    """Whether a checkpoint may run this forward again: then nothing may depend on what was called before."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
_AUTOGRAD = _Keys(_Key.AutogradFunctionality) | _Keys(_Key.ADInplaceOrView)


@contextmanager
def undisturbed(wanted: Any = None, inference: bool = False) -> Iterator[None]:
    """Torch as it is to user code: what a stand-in stands for is computed once, not in its first reader's mode.

    Without the saved-tensor hooks entered since `wanted` were the innermost; with none by default: a stand-in that is
    made dense inside a checkpoint has its numbers when the checkpoint runs again, which must save as much. Outside
    every torch.func transform, and outside inference mode unless `inference` says that it may stay on. And with
    autograd where C++ code has gone below it, as `torch.tensor(spk)` does.
    """
    if torch._C._are_functorch_transforms_active():
        with temporarily_clear_interpreter_stack(), undisturbed(wanted, inference):
            yield
        return
    if torch.is_inference_mode_enabled() and not inference:
        with torch.inference_mode(False), undisturbed(wanted):
            yield
        return
    innermost = torch._C._autograd._top_saved_tensors_default_hooks
    popped = []
    while (hooks := innermost(True)) is not None and hooks != wanted:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        popped.append(hooks)
    excluded = torch._C._dispatch_tls_local_exclude_set()
    below = excluded.has(_Key.AutogradFunctionality) and not torch.is_inference_mode_enabled()
    try:
        if below:
            included = torch._C._dispatch_tls_local_include_set()
            with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD):
                yield
        else:
            yield
    finally:
        for hooks in reversed(popped):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


class StandIn(Tensor):
    """What is asked before its numbers count."""

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError

    @classmethod
    @not_compiled
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls from C++ that `__torch_function__` never saw, below autograd."""
        return func(*dense(args), **dense(kwargs or {}))


class TensorLike(StandIn):
    """Base of `EventTensor` and `DeferredCurrent`. Subclasses give `shape`, `dtype`, `device`, `learns` and
    `to_dense()`, which must return the same tensor every time."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    learns: bool  #: whether gradients flow to where it comes from
    _dense_only = False  #: the sparse form is not used any more
    _embodied = False  #: the dense form is what C++ code sees
    _readers: tuple[Any, ...] = ()  #: the recordings of time fusion with calls that have yet to read it

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _make_subclass(cls, NOTHING, True)

    def as_view(self, shape: torch.Size) -> TensorLike | None:
        """`x.view(shape)` as a stand-in too, or this one; None where that takes the dense form."""
        return None

    def dense_from_now_on(self) -> Tensor:
        """The dense form, after which the sparse one is never used again: someone may write to it or watch it. Calls
        recorded before that read what it is now."""
        for reader in self._readers:
            reader.flush(forced=True)
        tensor = self.to_dense()
        self._dense_only = True
        return tensor

    def take_shape(self) -> None:
        """Have the shape of the dense form, after a function such as `unsqueeze_`."""
        if self.shape != self.to_dense().shape:
            self.shape = self.to_dense().shape

    # What user code asks of a tensor without needing its numbers.

    @property
    @not_compiled
    def requires_grad(self) -> bool:
        """Whether gradients flow. Whoever asks may be about to record this tensor in C++ (module hooks do)."""
        learns = self._dense.requires_grad if self._dense_only else self.learns
        if learns and torch.is_grad_enabled():
            self._embody()
        return learns

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.dense_from_now_on().requires_grad = value

    def _embody(self) -> None:
        """Put an alias of the dense form in the place of the empty tensor below."""
        if not self._embodied:
            self._embodied = True
            torch._C._swap_tensor_impl(self, self.to_dense().view_as(self.to_dense()))

    @property
    def data(self) -> Tensor:
        return self.dense_from_now_on().data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.dense_from_now_on().data = value
        self.take_shape()

    @property
    def grad(self) -> Tensor | None:
        return self.dense_from_now_on().grad

    @property
    def grad_fn(self) -> Any:
        return self.dense_from_now_on().grad_fn

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def is_leaf(self) -> bool:
        return not self.learns

    def dim(self) -> int:
        return len(self.shape)

    @not_compiled
    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        if is_vmap(sys._getframe(1)):
            self._embody()
        return self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _handlers.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is torch.autograd.grad and len(args) > 1 and tree_any(lambda x: isinstance(x, TensorLike), args[1]):
            raise RuntimeError(
                "torch.autograd.grad: expected inputs whose gradient exists, got spikes (or a current) in sparse form,"
                " whose consumers return a part of it. Take the dense form before they do: spk = spk.to_dense()."
            )
        written = []
        if _mutates(getattr(func, "__name__", "")) or "out" in kwargs or kwargs.get("inplace") is True:
            written = [leaf for leaf in (*args[:1], kwargs.get("out")) if isinstance(leaf, TensorLike)]
        for leaf in written:
            leaf.dense_from_now_on()
        result = func(*dense(args), **dense(kwargs))
        for leaf in written:
            leaf.take_shape()
            if result is leaf._dense:  # as in torch, what was written to is handed back
                return leaf
        return result


@implements(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(x: Any, *shape: Any, **more: Any) -> Any:
    """The same numbers in another shape, where the sparse form has it too."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if more or not isinstance(x, TensorLike) or not all(type(size) is int for size in sizes):
        return NotImplemented
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known:
        sizes = [x.numel() // known if size == -1 else size for size in sizes]
    if min(sizes, default=0) < 0 or math.prod(sizes) != x.numel():
        return NotImplemented
    view = x.as_view(torch.Size(sizes))
    return NotImplemented if view is None else view


@implements(Tensor.detach_)
def _detach_(x: Any) -> Any:
    """Nothing to do where no gradient flows: a step of a sequence, which is a view, would refuse it."""
    return NotImplemented if x.learns or x._dense_only else x


@implements(torch.flatten, Tensor.flatten)
def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """`nn.Flatten`; of nothing to flatten the same object, as torch has it."""
    dims = len(x.shape)
    if not (isinstance(x, TensorLike) and -dims <= start_dim < dims and -dims <= end_dim < dims):
        return NotImplemented
    first, last = start_dim % dims, end_dim % dims
    if first > last:
        return NotImplemented
    view = x.as_view(torch.Size((*x.shape[:first], x.shape[first : last + 1].numel(), *x.shape[last + 1 :])))
    return NotImplemented if view is None else view


# Custom autograd functions and scripts take their arguments in C++, and ask nobody.

_here = threading.local()
_apply_of: Any = torch.autograd.Function.__dict__["apply"].__get__  # a class method, in C from torch 2.15 on


def inside_custom_function() -> bool:
    """Whether a custom autograd function's forward is running: what it returns is taken in C++ too."""
    return getattr(_here, "depth", 0) > 0


@functools.wraps(_apply_of(None, torch.autograd.Function))
def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.Function.apply`, given dense tensors in the place of stand-ins."""
    if torch.compiler.is_compiling():
        return _apply_of(None, cls)(*args, **kwargs)
    before = getattr(_here, "depth", 0)
    _here.depth = before + 1
    try:
        return _apply_of(None, cls)(*[dense_of(arg) for arg in args], **kwargs)
    finally:
        _here.depth = before


torch.autograd.Function.apply = classmethod(_apply)


def _given_tensors(own: Any) -> Any:
    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *dense(args), **dense(kwargs))

    return call


for _script in (torch._C.ScriptFunction, torch._C.ScriptMethod):
    _script.__call__ = _given_tensors(_script.__call__)


def _keep(cls: Any, *args: Any) -> Any:
    """How older torch keeps what a checkpoint was given, for when it runs again: the same objects, with their values
    where a write to them would count as one after they were kept."""
    return _apply_of(None, cls)(*[arg if isinstance(arg, TensorLike) else dense_of(arg) for arg in args])


_keeper = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
if _keeper is not None:
    _keeper.apply = classmethod(_keep)
