"""`out[t] = x` in a recorded loop: writes to a tensor of the caller's that wait until somebody reads it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sparse_backend.compiling import not_compiled
from sparse_backend.tensorlike import StandIn, dense_of, is_vmap, nothing_of
from sparse_backend.timefusion import recorder
from sparse_backend.timefusion.recorder import Node, Placeholder, Recording, is_watchable, owns_memory, use, value

#: what a tensor is asked that no write changes
_LASTING = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,
    Tensor.is_cuda.__get__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point,
}  # fmt: skip


class Write(NamedTuple):
    """`buffer.select(dim, position).copy_(what the reference stands for)`"""

    dim: int
    position: int
    ref: tuple[Node, int]


class Waiting:
    """A tensor of the caller's and the writes that it waits for.

    Meanwhile what C++ code sees of it is the empty tensor of any stand-in, and its memory belongs to `memory`. Who has
    taken the empty one in C++ is answered by the target later too.
    """

    __slots__ = ("into", "memory", "target", "writes")

    def __init__(self, into: Recording, target: Any) -> None:
        self.into, self.target = into, target
        self.memory: Any = Tensor._make_subclass(Buffer, *nothing_of(target.dtype))
        self.writes: list[Write] = []
        torch._C._swap_tensor_impl(target, self.memory)
        target.waiting, target.__class__, self.memory.__class__ = self, Buffer, Tensor

    def release(self) -> None:
        """Let the target be a plain tensor again, as it was before the writes."""
        empty, self.memory = self.memory, self.target
        torch._C._swap_tensor_impl(self.target, empty)
        del self.target.waiting
        self.target.__class__, empty.__class__, empty.waiting = Tensor, Buffer, self

    def write(self) -> None:
        """Make the writes, in their order, to the released target. Steps of one sequence that follow one another are
        one copy, and one node of the graph."""
        target = self.target
        for group in _groups(self.writes):
            dim, position, (node, slot) = group[0]
            run, n = node.run, len(group)
            assert run is not None
            sequence = run.sequence(slot) if n > 1 else None
            if sequence is None:
                for write in group:
                    target.select(write.dim, write.position).copy_(dense_of(value(write.ref)))
                continue
            steps = dense_of(sequence)
            steps = steps if n == run.length else steps.narrow(0, node.index, n)
            place = target if n == target.shape[dim] else target.narrow(dim, position, n)
            place.copy_(steps.movedim(0, dim))


class Buffer(StandIn):
    """The class of a caller's tensor as long as writes to it wait: whatever torch is asked of it, but its shape, makes
    them first, and it is a `torch.Tensor` again."""

    waiting: Waiting

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The tensor itself, with everything written to it."""
        target = self.waiting.target
        if type(target) is Buffer:
            target.waiting.into.flush(forced=True)
        return target

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LASTING and not (func is Tensor.size and is_vmap(sys._getframe(1))):
            return func(args[0].waiting.memory, *args[1:], **kwargs)
        if func is Tensor.__setitem__ and record(recorder.current(), *args):
            return None
        args, kwargs = tree_map(lambda leaf: leaf.to_dense() if type(leaf) is Buffer else leaf, (args, kwargs))
        return func(*args, **kwargs)


def record(into: Recording | None, target: Any, index: Any, x: Any) -> bool:
    """Let `target[index] = x` wait, if x is the output of a recorded call, one step of the target in shape, and nobody
    else sees the target's memory."""
    if into is None or type(x) is not Placeholder or x._dense_only or x.has_value or x.spec.recording is not into:
        return False
    waiting = target.waiting if type(target) is Buffer else None
    if waiting is None and not (type(target) is Tensor and _is_alone(target)):
        return False
    if waiting is not None and waiting.into is not into:
        return False
    memory = target if waiting is None else waiting.memory
    shape = memory.shape
    place = _place(index, shape)
    if place is None or x.device != memory.device:
        return False
    dim, position = place
    if x.shape != (*shape[:dim], *shape[dim + 1 :]):
        return False
    if waiting is None:
        waiting = Waiting(into, target)
        into.waiting.append(waiting)
    waiting.writes.append(Write(dim, position, use(x.ref)))
    return True


def _is_alone(target: Tensor) -> bool:
    """Whether this tensor is all there is of its memory, and may be written to under autograd."""
    if not is_watchable(target) or target._base is not None or (target.requires_grad and target.is_leaf):
        return False
    return target._use_count() == 1 and owns_memory(target)


def _place(index: Any, shape: torch.Size) -> tuple[int, int] | None:
    """The dimension and the position of an index that selects one step: `t`, `(t, ...)`, `(slice(None), t)`, ..."""
    parts = list(index) if type(index) is tuple else [index]
    at = next((at for at, part in enumerate(parts) if part is Ellipsis), None)
    if at is not None:
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    numbers = [dim for dim, part in enumerate(parts) if type(part) is int]
    if len(numbers) != 1 or len(parts) > len(shape):
        return None
    if any(type(part) is not int and not (type(part) is slice and part == slice(None)) for part in parts):
        return None
    (dim,) = numbers
    position = parts[dim] + (shape[dim] if parts[dim] < 0 else 0)
    return (dim, position) if 0 <= position < shape[dim] else None


def _groups(writes: list[Write]) -> Iterator[list[Write]]:
    first = 0
    for n in range(1, len(writes) + 1):
        if n == len(writes) or not _follows(writes[n - 1], writes[n]):
            yield writes[first:n]
            first = n


def _follows(before: Write, after: Write) -> bool:
    (node, slot), (later, its_slot) = before.ref, after.ref
    return (
        after.dim == before.dim
        and after.position == before.position + 1
        and later.run is node.run
        and later.index == node.index + 1
        and its_slot == slot
    )
