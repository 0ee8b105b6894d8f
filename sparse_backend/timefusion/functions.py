"""Torch functions on placeholders: recorded where their shape is known, computed on values otherwise.

A function is recorded if it is pure: it reads its arguments and makes one new tensor. The tables below say how T calls
of one become one call; what is in none of them runs on values.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_backend import autocasting, convolution, policy
from sparse_backend.events import EventTensor, masked
from sparse_backend.tensorlike import StandIn, TensorLike, dense, dense_of, learns_of
from sparse_backend.timefusion import buffers, recorder
from sparse_backend.timefusion.recorder import Placeholder, Recording, is_watchable, owns_memory, paused, take
from sparse_backend.timefusion.sites import FunctionSite, SumSite, is_known

#: entry by entry: one call on [T, ...]
_ELEMENTWISE = {
    torch.relu, F.relu, Tensor.relu, torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.tanh, Tensor.tanh, F.tanh,
    F.leaky_relu, F.elu, F.gelu, F.silu, F.selu, F.softplus, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply,
    torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.subtract, Tensor.subtract,
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__,
    torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, torch.neg, Tensor.neg, Tensor.__neg__,
    torch.exp, Tensor.exp, torch.log, Tensor.log, torch.sqrt, Tensor.sqrt, torch.square, Tensor.square,
    torch.abs, Tensor.abs, Tensor.__abs__, torch.pow, Tensor.pow, Tensor.__pow__,
    torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, torch.where, torch.maximum, torch.minimum,
    torch.gt, Tensor.gt, Tensor.__gt__, torch.lt, Tensor.lt, Tensor.__lt__,
    torch.ge, Tensor.ge, Tensor.__ge__, torch.le, Tensor.le, Tensor.__le__, torch.eq, Tensor.eq, Tensor.__eq__,
    torch.ne, Tensor.ne, Tensor.__ne__, torch.logical_and, Tensor.logical_and, Tensor.__and__, torch.logical_or,
    Tensor.logical_or, Tensor.__or__, torch.logical_xor, Tensor.logical_xor, Tensor.__xor__, torch.logical_not,
    Tensor.logical_not, Tensor.__invert__, torch.masked_fill, Tensor.masked_fill, Tensor.where,
    torch.clamp_min, Tensor.clamp_min, torch.clamp_max, Tensor.clamp_max, torch.round, Tensor.round, torch.floor,
    Tensor.floor, torch.sign, Tensor.sign, torch.sin, Tensor.sin, torch.cos, Tensor.cos, torch.erf, Tensor.erf,
    torch.log1p, Tensor.log1p, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal, Tensor.__rpow__,
    torch.addcmul, Tensor.addcmul, torch.lerp, Tensor.lerp, F.mish, F.softsign, F.logsigmoid,
    Tensor.bool, Tensor.to, masked,
}  # fmt: skip

#: the same numbers in another shape
_RESHAPES = {
    torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view,
    torch.unsqueeze, Tensor.unsqueeze, torch.squeeze, Tensor.squeeze, torch.unflatten, Tensor.unflatten,
}  # fmt: skip

#: sample by sample, of inputs with this many dimensions (0: any from two on): one call on [T * B, ...]
_SAMPLEWISE = {
    F.linear: 0, F.conv1d: 3, F.conv2d: 4, F.conv3d: 5, torch.conv1d: 3, torch.conv2d: 4, torch.conv3d: 5,
    F.max_pool1d: 3, F.max_pool2d: 4, F.max_pool3d: 5, torch.max_pool1d: 3, torch.max_pool2d: 4, torch.max_pool3d: 5,
    F.avg_pool1d: 3, F.avg_pool2d: 4, F.avg_pool3d: 5, torch.avg_pool1d: 3,
    F.adaptive_avg_pool1d: 3, F.adaptive_avg_pool2d: 4, F.adaptive_max_pool1d: 3, F.adaptive_max_pool2d: 4,
}  # fmt: skip

#: the same where the dimensions they normalise over, their second argument, are fewer than all
_OVER_LAST_DIMS = {F.layer_norm, torch.layer_norm}

#: those of them whose cost is memory: no more steps at once than stay in cache
_IN_CHUNKS = {function for function, dims in _SAMPLEWISE.items() if dims}

#: those that stand-ins answer with stand-ins: sequences of events stay events, convolutions of them make no image
_OF_EVENTS = {F.conv2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d, masked, *_RESHAPES}

_TRANSPOSES: set[Any] = {Tensor.T.__get__, Tensor.mT.__get__}

#: anything else that is pure, step by step; not what refuses some of its numbers, indices say, at the user's line
_STEPWISE = {
    torch.cat, torch.concat, torch.softmax, Tensor.softmax, F.softmax, F.log_softmax, torch.log_softmax,
    Tensor.log_softmax, torch.sum, Tensor.sum, torch.mean, Tensor.mean, torch.amax, Tensor.amax, torch.amin,
    Tensor.amin, torch.argmax, Tensor.argmax, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
    torch.bmm, Tensor.bmm, torch.einsum, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute, Tensor.t,
    Tensor.detach, Tensor.clone, torch.clone, Tensor.contiguous, Tensor.__getitem__, F.pad, F.interpolate,
    F.normalize, torch.zeros_like, torch.ones_like, torch.detach,
    F.group_norm, torch.group_norm,  # whose backward takes longer of many samples together
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.stack, torch.max, Tensor.max, torch.min, Tensor.min, torch.prod, Tensor.prod, torch.cumsum, Tensor.cumsum,
    torch.any, Tensor.any, torch.all, Tensor.all, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.mv,
    Tensor.mv, torch.outer, Tensor.outer, torch.narrow, Tensor.narrow, torch.movedim, Tensor.movedim, torch.swapaxes,
    Tensor.swapaxes, torch.roll, Tensor.roll, torch.flip, Tensor.flip, Tensor.expand, Tensor.repeat,
    torch.tile, Tensor.tile, *_TRANSPOSES, F.glu, F.prelu, torch.prelu, F.rms_norm, F.cosine_similarity, F.mse_loss,
}  # fmt: skip

#: what the shape, dtype and device of their first argument decide, not its numbers
_OF_SHAPE = {
    torch.full_like, torch.empty_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty,
    Tensor.new_tensor,
}  # fmt: skip

#: of another tensor they ask its shape alone: what they are then
_AS_ANOTHER: dict[Any, Any] = {
    Tensor.view_as: Tensor.view, Tensor.reshape_as: Tensor.reshape, Tensor.expand_as: Tensor.expand,
}  # fmt: skip

#: to another dtype or device, which often are the same: what those cast to that are not told
_CASTS: dict[Any, Any] = {
    Tensor.to: None, Tensor.type_as: None, Tensor.cpu: "cpu", Tensor.float: torch.float32, Tensor.double: torch.float64,
}  # fmt: skip

#: those that refuse tensors of different dtypes, which meta tensors do not
_ONE_DTYPE = {
    *_SAMPLEWISE, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
    torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.mv, Tensor.mv,
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.batch_norm,
}  # fmt: skip

#: those that refuse floats, which meta tensors do not
_OF_BOOLS = {Tensor.__and__, Tensor.__or__, Tensor.__xor__, Tensor.__invert__}

#: masks drawn when they are recorded
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}

_WITHOUT_GRADIENT = {Tensor.detach, torch.detach, torch.zeros_like, torch.ones_like}

#: whose result may share its argument's memory: a write to the one is a write to the other
_VIEWS = {
    *_RESHAPES, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute, Tensor.t, Tensor.detach, torch.detach,
    Tensor.contiguous, Tensor.__getitem__, Tensor.bool,
    torch.narrow, Tensor.narrow, torch.movedim, Tensor.movedim, torch.swapaxes, Tensor.swapaxes, Tensor.expand,
    *_TRANSPOSES,
}  # fmt: skip

_PURE = {*_ELEMENTWISE, *_RESHAPES, *_SAMPLEWISE, *_OVER_LAST_DIMS, *_STEPWISE}
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


def _names_of(function: Any) -> tuple[str, ...]:
    """The names of a Python function's arguments; none of one in C."""
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


#: writes to their first argument: the pure function whose result it then holds
_IN_PLACE = {
    Tensor.add_: Tensor.add, Tensor.sub_: Tensor.sub, Tensor.mul_: Tensor.mul, Tensor.div_: Tensor.div,
    Tensor.clamp_: Tensor.clamp, Tensor.relu_: Tensor.relu, torch.relu_: torch.relu,
}  # fmt: skip
_WITH_INPLACE_FLAG = {function for function in _PURE if "inplace" in _names_of(function)}

_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device, slice, type(Ellipsis))

_shapes: dict[Any, tuple[torch.Size, torch.dtype] | None] = {}
_SHAPES_MOST = 4096


def on_placeholders(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function that met a placeholder returns; NotImplemented where it has to see values."""
    into = recorder.current()
    if function is torch.stack and "out" not in kwargs:
        whole = _stacked(*args, **kwargs)
        if whole is not None:
            return whole
    if into is None or "out" in kwargs:
        return NotImplemented
    if function in _CASTS:
        told = _CASTS[function] is None or len(args) > 1
        return _cast(into, *args, **kwargs) if told else _cast(into, *args, _CASTS[function], **kwargs)
    if function in _AS_ANOTHER:
        return _AS_ANOTHER[function](args[0], (kwargs["other"] if "other" in kwargs else args[1]).shape)
    if function in _OF_SHAPE:
        return _of_shape(function, *args, **kwargs)
    if function in _PURE:
        if function in _WITH_INPLACE_FLAG and kwargs.get("inplace"):
            return _written(into, function, args[0], (args[0],), {k: v for k, v in kwargs.items() if k != "inplace"})
        result = _running_sum(into, *args) if function in _ADDITIONS and len(args) == 2 and not kwargs else None
        if result is None:
            result = _record(into, function, args, kwargs)
            if result is not None and function in _VIEWS and type(args[0] if args else None) is Placeholder:
                result.views(args[0], functools.partial(_again, function, args[1:], kwargs))
        return NotImplemented if result is None else result
    if function is Tensor.add_ and type(args[0]) is Tensor:
        total = None
        if sys.getrefcount(args[0]) <= _HELD_ONCE and len(args) == 2 and not kwargs:
            frame = sys._getframe(2)
            rebinds = _is_plus_equals(frame) and _is_whole(*args) and not _is_borrowed(args[0], frame)
            total = _running_sum(into, *args) if rebinds else None
        return NotImplemented if total is None else total
    if function is Tensor.__setitem__:
        return None if buffers.record(into, *args) else NotImplemented
    if function in _IN_PLACE:
        return _written(into, _IN_PLACE[function], args[0], args, kwargs)
    if function in _DROPOUTS:
        return _dropout(into, function, *args, **kwargs)
    if function is F.batch_norm:
        result = _batch_norm(into, *args, **kwargs)
        return NotImplemented if result is None else result
    return NotImplemented


def record_convolution(
    into: Recording, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> Placeholder | None:
    """Record `conv2d` of a step of the caller's own, a slice of a longer tensor."""
    return _record(into, F.conv2d, (input, weight, bias, *options), {})


def _cast(into: Recording, x: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.to(...)`: x itself where it is so already, as torch has it; another dtype is recorded."""
    device, dtype = x.device, x.dtype
    for name, value in (*((None, value) for value in args), *kwargs.items()):
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = torch.device(value)
        elif name != "non_blocking":
            return NotImplemented
    if type(x) is not Placeholder or x._dense_only or x.spec.recording is not into or device != x.device:
        return NotImplemented
    if dtype is x.dtype:
        return x
    result = _record(into, Tensor.to, (x, dtype), {}) if dtype.is_floating_point else None
    return NotImplemented if result is None else result


def _of_shape(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A new tensor like x, made now."""
    if type(x) is not Placeholder or any(isinstance(part, TensorLike) for part in (*args, *kwargs.values())):
        return NotImplemented
    with paused():
        return function(torch.empty(x.shape, dtype=x.dtype, device=x.device), *args, **kwargs)


def _again(function: Any, args: Any, kwargs: dict[str, Any], base: Tensor) -> Tensor:
    """A view made of a tensor's values as it was recorded of its placeholder."""
    args, kwargs = dense((args, kwargs))
    return function(base, *args, **kwargs)


class _Probe(Tensor):
    """Counts how often a tensor is held that one variable holds, where `tensor += probe` asks `__torch_function__`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return sys.getrefcount(args[0])


def _held_by_one_variable() -> int:
    total: Any = torch.empty(0)
    total += Tensor._make_subclass(_Probe, torch.empty(0))
    return total


_HELD_ONCE = _held_by_one_variable()


@functools.cache
def _plus_equals(code: CodeType) -> frozenset[int]:
    """Where in a function's code a `+=` runs."""
    return frozenset(
        step.offset for step in dis.get_instructions(code) if step.opname == "INPLACE_ADD" or step.argrepr == "+="
    )


def _is_plus_equals(frame: FrameType) -> bool:
    """Whether a frame is at a `+=`, which stores what it is given, and not at a call of `add_`."""
    return frame.f_lasti in _plus_equals(frame.f_code)


def _is_borrowed(total: Tensor, frame: FrameType) -> bool:
    """Whether a caller's variable holds what is counted once: Python 3.14 and newer lend it to a call uncounted."""
    if sys.version_info < (3, 14):  # where asking a frame for its variables would hold them
        return False
    caller = frame.f_back
    while caller is not None:
        if any(value is total for value in list(caller.f_locals.values())):  # other threads may add to a module's
            return True
        caller = caller.f_back
    return False


def _is_whole(total: Tensor, x: Any) -> bool:
    """Whether `total += x` may make a new tensor instead of writing to `total`, which one variable holds: nobody else
    sees its memory."""
    return owns_memory(total) and not total.requires_grad and torch.promote_types(total.dtype, x.dtype) is total.dtype


def _written(into: Recording, function: Any, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Record a write to a placeholder: it stands for the result from now on. Where a recorded call has taken its
    numbers already, maybe through a view, it is written as torch does."""
    if type(target) is not Placeholder or target._dense_only or target.spec.recording is not into or target.is_view:
        return NotImplemented
    node, slot = target.ref
    if (node.used | node.taken) >> slot & 1 or target._dense is not None:
        return NotImplemented
    result = _running_sum(into, *args) if function in _ADDITIONS and len(args) == 2 and not kwargs else None
    if result is None:
        result = _record(into, function, args, kwargs)
    if result is None or result.spec.shape != target.spec.shape or result.spec.dtype is not target.spec.dtype:
        return NotImplemented
    target.ref, target.spec = result.ref, result.spec
    target.ref[0].watch_outputs([target])
    return target


def _stacked(tensors: Any, dim: int = 0, **_: Any) -> Any:
    """All steps of one output stacked are the sequence itself."""
    if dim != 0 or not isinstance(tensors, (list, tuple)) or not tensors or type(tensors[0]) is not Placeholder:
        return None
    if any(type(t) is not Placeholder or t._dense_only for t in tensors):
        return None
    first, then = tensors[0].ref[0], tensors[-1].ref[0]
    if first.run is None and len(tensors) > 1 and (then is first or then.site is not first.site):
        return None  # what layers gave in one step, side by side
    tensors[0].run()
    refs = [t.ref for t in tensors]
    pieces: list[Any] = []
    while refs:
        node = refs[0][0]
        if node.run is None:
            return None
        length = node.run.length
        if node.index != 0 or len(refs) < length or node.run.sequence(refs[0][1]) is None:
            return None
        here, refs = refs[:length], refs[length:]
        if any(ref[0].run is not node.run or ref[1] != here[0][1] or ref[0].index != i for i, ref in enumerate(here)):
            return None
        pieces.append(node.run.hand_out(here[0][1]))
    if len(pieces) == 1:
        return pieces[0]
    if all(
        type(piece) is EventTensor and is_known(piece) and (piece.active_ptr is not None or not piece.learns)
        for piece in pieces
    ):
        return EventTensor.cat(pieces)
    return torch.cat([dense_of(piece) for piece in pieces])


def _running_sum(into: Recording, a: Any, b: Any) -> Placeholder | None:
    """total + x, if that continues a sum over steps, or begins one."""
    if type(b) is Placeholder:
        if type(b.ref[0].site) is SumSite:
            a, b = b, a
    elif type(b) in (int, float) and b == 0:  # `0 + x` arrives as x + 0
        a, b = b, a
    if type(b) is not Placeholder or b.spec.recording is not into or b._dense_only:
        return None
    spec = b.spec
    shape, dtype, learns = spec.shape, spec.dtype, spec.learns
    if not dtype.is_floating_point:
        return None
    if type(a) is Placeholder:
        if a.spec.recording is not into or a._dense_only or a.spec.shape != shape:
            return None
        continues = type(a.ref[0].site) is SumSite
        begins = a.ref[0].site is b.ref[0].site and a.ref[1] == b.ref[1] and a.ref[0] is not b.ref[0]
        if not (continues or begins):
            return None
        site: Any = a.ref[0].site if continues else SumSite(into)
        dtype, learns = torch.promote_types(a.spec.dtype, dtype), a.spec.learns or learns
        start: Any = take(a.ref)
    elif isinstance(a, (int, float)) and a == 0:
        site, start = SumSite(into), a
    elif type(a) is Tensor and a.device == spec.device and a.dim() and a.shape == shape and is_watchable(a):
        if not a.is_floating_point() or id(a) in into.summed:
            return None  # the same tensor added to every step is no running sum
        into.summed[id(a)] = a
        site, start = SumSite(into), a
        dtype, learns = torch.promote_types(a.dtype, dtype), learns or (a.requires_grad and torch.is_grad_enabled())
        into.watch(a)
    else:
        return None
    if site.mode != into.mode():
        return None
    site.outputs(spec.device, (shape, dtype, learns))
    into.sites[site] = site
    (total,) = site.add((into.input_ref(b),), (start,))
    return total


def _dropout(
    into: Recording, function: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """The mask is drawn now, in the order of the steps; the product with it is recorded. Where nothing is dropped, in
    evaluation, torch gives what it was given."""
    if type(input) is not Placeholder or not 0 <= p < 1:
        return NotImplemented
    if not training or p == 0:
        return input
    if inplace:
        return NotImplemented
    with paused(), torch.no_grad():
        mask = function(torch.ones(input.shape, dtype=input.dtype, device=input.device), p, True)
    result = _record(into, masked, (input, mask), {})
    return result if result is not None else input.to_dense() * mask


def _batch_norm(into: Recording, *args: Any, **kwargs: Any) -> Any:
    """Statistics of the batch are those of one step, and running ones are read and written in the order of the calls:
    calls that share them form one queue, run step by step."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    mean, var, training = given.get("running_mean"), given.get("running_var"), given.get("training", False)
    if type(given.get("input")) is not Placeholder or len(args) > len(names):
        return None
    if not training:
        if into.has_queued_writes(mean, var):
            into.flush(forced=True)
            return None
        return _record(into, F.batch_norm, args, kwargs, samplewise=0)
    return _record(into, F.batch_norm, args, kwargs, writes=tuple(t for t in (mean, var) if t is not None))


def _record(
    into: Recording,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    samplewise: int | None = None,
    writes: tuple[Tensor, ...] = (),
) -> Placeholder | None:
    """Record a function of one step; None if it cannot be. Its arguments are placeholders, tensors and constants.

    writes: tensors among them that it changes; calls that change the same ones run in order.
    """
    tensors: list[Any] = []  # that differ from call to call
    fixed: list[Tensor] = []  # that belong to the place in the code
    frame = _frame((args, tuple(kwargs.values())), into, tensors, fixed, writes)
    if frame is None:
        return None
    names = tuple(kwargs)
    key = (
        function, frame, names, into.mode(), autocasting.state(), tuple([t.requires_grad for t in fixed]),
        tuple([t.spec if type(t) is Placeholder else (t.shape, t.dtype, learns_of(t)) for t in tensors]),
    )  # fmt: skip
    site: Any = into.sites.get(key)
    if writes and into.has_queued_writes(*writes) and into.writer_of(*writes) is not site:
        into.flush(forced=True)  # other settings on the same statistics: what is recorded runs first
        return None
    if site is None:
        known = _shape_of(function, frame, names, tensors, fixed)
        if known is None:
            return None
        shape, dtype = known
        first = next((t for t in tensors if type(t) is Placeholder), tensors[0])

        def call(*values: Any) -> Any:
            if function is F.conv2d:
                values = (convolution.as_events(values[0], fixed), *values[1:])
            return _apply(function, frame, names, values, fixed)

        if function in _OVER_LAST_DIMS:
            over = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            samplewise = 0 if len(over) < len(first.shape) else None
        folded = None if writes else _folded(function, call, first.shape, known, samplewise)
        reads = [t for t in fixed if not _is_one_of(t, writes)]
        into.sites[key] = site = FunctionSite(into, call, folded, reads, of_events=function in _OF_EVENTS)
        learns = torch.is_grad_enabled() and any(map(learns_of, (*tensors, *fixed)))
        learns = learns and dtype.is_floating_point and function not in _WITHOUT_GRADIENT
        site.outputs(first.device, (shape, dtype, learns))
        if function in _IN_CHUNKS and folded is not None:
            size = dtype.itemsize * (first.shape.numel() + shape.numel())
            if function in _OF_EVENTS and convolution.available(first.device):
                size /= policy.EVENT_CHUNKS
            site.most, site.pulled = max(1, int(policy.CHUNK_BYTES // max(size, 1))), False
    elif not site.queue:
        site.read_again()
    if writes:
        into.will_write(site, *writes)
    for tensor in tensors:
        if type(tensor) is not Placeholder:
            into.watch(tensor)
    (out,) = site.add(tuple([into.input_ref(t) for t in tensors]))
    return out


class _Hole:
    """The place of a tensor in a call's arguments: the n-th that differs from call to call, or that is fixed."""

    __slots__ = ("identity", "number")

    def __init__(self, number: int, identity: int | None) -> None:
        self.number, self.identity = number, identity

    def __eq__(self, other: object) -> bool:
        return type(other) is _Hole and self.number == other.number and self.identity == other.identity

    def __hash__(self) -> int:
        return hash((self.number, self.identity))


def _frame(value: Any, into: Recording, tensors: list[Any], fixed: list[Tensor], writes: tuple[Tensor, ...]) -> Any:
    """`value` as something hashable, with holes for its tensors; None where there is a thing in it that is neither."""
    kind = type(value)
    if kind is Placeholder:
        if value._dense_only or value.spec.recording is not into:
            return None
        tensors.append(value)
        return _Hole(len(tensors) - 1, None)
    if kind is EventTensor and value.is_events:
        tensors.append(value)
        return _Hole(len(tensors) - 1, None)
    if isinstance(value, Tensor):
        if isinstance(value, StandIn) or not is_watchable(value):
            return None
        if kind is torch.nn.Parameter or _is_one_of(value, writes):
            fixed.append(value)
            return _Hole(len(fixed) - 1, id(value))
        tensors.append(value)
        return _Hole(len(tensors) - 1, None)
    if kind is tuple or kind is list or kind is torch.Size:
        parts = []
        for part in value:
            inner = _frame(part, into, tensors, fixed, writes)
            if inner is None:
                return None
            parts.append(inner)
        return (kind, *parts)
    if kind is slice:
        return None if not all(part is None or type(part) is int for part in (value.start, value.stop, value.step)) \
            else (slice, value.start, value.stop, value.step)  # fmt: skip
    return (None, kind, value) if isinstance(value, _CONSTANTS) else None


def _is_one_of(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


def _filled(frame: Any, tensors: Sequence[Any], fixed: Sequence[Tensor]) -> Any:
    if type(frame) is _Hole:
        return tensors[frame.number] if frame.identity is None else fixed[frame.number]
    kind = frame[0]
    if kind is None:
        return frame[2]
    if kind is slice:
        return slice(*frame[1:])
    parts = [_filled(part, tensors, fixed) for part in frame[1:]]
    return parts if kind is list else tuple(parts)


def _apply(function: Callable[..., Any], frame: Any, names: Any, tensors: Sequence[Any], fixed: Sequence[Any]) -> Any:
    args, values = _filled(frame, tensors, fixed)
    return function(*args, **dict(zip(names, values, strict=True)))


def _shape_of(
    function: Any, frame: Any, names: Any, tensors: Sequence[Any], fixed: Sequence[Tensor]
) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of a result, told by meta tensors; None where it is not one tensor, or where the call is wrong:
    made on values, it raises what torch raises at the user's own line. Autocast, which passes meta tensors by, is
    shown zeros, but for an index: a mask of zeros would decide the shape."""
    metas = tuple([(t.shape, t.dtype) for t in (*tensors, *fixed)])
    autocast = None if function is Tensor.__getitem__ else autocasting.state()
    if function in _ONE_DTYPE and autocast is None and len({dtype for _, dtype in metas}) > 1:
        return None
    if function in _OF_BOOLS and any(dtype is not torch.bool for _, dtype in metas):
        return None
    device = "meta" if autocast is None else next(t.device for t in tensors if type(t) is Placeholder)
    key = (function, _anonymous(frame), names, metas, torch.get_default_dtype(), autocast, device)
    if key in _shapes:
        return _shapes[key]
    try:
        with paused(), torch.no_grad():
            made = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in metas]
            result = _apply(function, frame, names, made[: len(tensors)], made[len(tensors) :])
        known = (result.shape, result.dtype) if type(result) is Tensor else None
    except Exception:
        known = None
    if len(_shapes) >= _SHAPES_MOST:
        _shapes.clear()
    _shapes[key] = known
    return known


def _anonymous(frame: Any) -> Any:
    """A frame without the identities of its tensors."""
    if type(frame) is _Hole:
        return (_Hole, frame.number, frame.identity is None)
    if type(frame) is tuple and frame[0] in (tuple, list, torch.Size):
        return (frame[0], *map(_anonymous, frame[1:]))
    return frame


def _folded(
    function: Any,
    call: Callable[..., Any],
    shape: torch.Size,
    known: tuple[torch.Size, torch.dtype],
    samplewise: int | None,
) -> Callable[..., Tensor | None] | None:
    """How T calls become one: (T, which tensors are one for all steps, *tensors) -> [T, *out], None where they cannot.
    shape: of the first placeholder in one step; known: shape and dtype of the result."""
    out, dtype = known
    if function in _RESHAPES:
        return lambda steps, constant, x, *_: None if constant[0] else x.reshape(steps, *out)
    if function in _ELEMENTWISE:
        return lambda steps, constant, *tensors: _elementwise(call, steps, constant, out, dtype, tensors)
    dims = _SAMPLEWISE.get(function, samplewise)
    if dims is None or len(shape) < 2 or (dims and len(shape) != dims) or len(out) < 1 or out[0] != shape[0]:
        return None
    return lambda steps, constant, x, *others: (
        None if not all(constant[1:]) or constant[0]
        else call(x.reshape(steps * shape[0], *shape[1:]), *others).view(steps, *out)
    )  # fmt: skip


def _elementwise(
    call: Callable[..., Tensor],
    steps: int,
    constant: Sequence[bool],
    out: torch.Size,
    dtype: torch.dtype,
    tensors: Sequence[Tensor],
) -> Tensor | None:
    """Sequences must have as many dimensions as the result, so that what is one for all steps lines up with them. The
    dtype is another where a step has no dimension: a constant without one then counts as much as it, but less than
    the sequence."""
    for same, tensor in zip(constant, tensors, strict=True):
        if tensor.dim() > len(out) if same else tensor.dim() != len(out) + 1:
            return None
    result = call(*tensors)
    return result if result.shape == (steps, *out) and result.dtype is dtype else None
