"""The one `torch.library` namespace of the project, and the small steps every op repeats.

An op is defined in one file of this folder: schema, fake, autograd. Its plain-PyTorch twin (`reference/`) is
registered for every device, and the compiled kernels, once loaded, take precedence on the devices they serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from sparse_backend import autocasting
from sparse_backend.compiling import not_compiled
from sparse_backend.differentiating import once
from sparse_backend.tensorlike import dense_of

NAMESPACE = "sparse_backend"

library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op from its schema, its twin and its fake; returns the op's callable overload."""
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class Call(Protocol):
    """How Python calls an op that has a backward."""

    #: runs the op without autograd: (*args) -> result
    plain: Callable[..., Any]
    #: gives a `plain` result the backward it would have: (args, result) -> result. args may hold what was made of the
    #: result meanwhile and what the backward alone reads, a surrogate's derivative
    attach: Callable[[tuple[Any, ...], Any], Any]

    def __call__(self, *args: Any) -> Any: ...


def autograd(
    op: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    *,
    learns: tuple[int, ...],
    outputs: int = 1,
) -> Call:
    """Give `op` its backward, and return the way to call it from Python.

    learns: positions of the arguments that may require grad; outputs: how many of its results are differentiable, the
    first ones. Which arguments need a gradient is in `ctx.needs`. Absent gradients stay absent: dense zeros are never
    made.

    This is `torch.library.register_autograd` for ops called a thousand times per forward pass. torch's own rebuilds
    its list of the schema's arguments once per argument at every call, 100 us for two dozen of them, and wraps every
    argument and result for autograd; ops here have no defaults to fill in, and a handful of them learn. What is
    returned goes from Python straight to the kernel, autograd around it, instead of through the dispatcher twice; it
    is the op itself where torch.compile traces it.
    """

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: tuple[Any, tuple[Any, ...], Any, list[Any]], *_: Any) -> Any:
            keyset, args, result, results = call
            if result is None:
                result = below(keyset, args)
            ctx.needs = _needs(len(args), learns, ctx.needs_input_grad)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args, result)
            if isinstance(result, torch.Tensor):
                return result
            results.extend(result[outputs:])
            return tuple(result[:outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    at_once = super(torch.autograd.Function, Backward).apply  # without torch's own Python around it

    @once
    @not_compiled  # compiled code runs this op, whose Python the compiler would look into
    def gradients(ctx: Any, *grads: Any) -> Any:
        # Autograd's zeros without memory (behind sgn, say) are no tensors that kernels could read.
        given = [grad.clone() if grad is not None and grad._is_zerotensor() else grad for grad in grads]
        result = exactly(backward, ctx, *given)
        return None, *[result[position] for position in learns]

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if autocasting.is_on():
                with autocasting.Off():
                    return below(keyset, args)
            if keyset is None:
                return op(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    @not_compiled
    def run(keyset: Any, args: tuple[Any, ...], result: Any = None) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            rest: list[Any] = []
            apply = Backward.apply if torch._C._are_functorch_transforms_active() else at_once
            learners = [dense_of(args[position]) for position in learns]
            result = apply((keyset, args, result, rest), *learners)
            return (*result, *rest) if rest else result
        return below(keyset, args) if result is None else result

    def direct(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else run(None, args)

    call: Any = direct
    call.plain = lambda *args: below(None, args)
    call.attach = lambda args, result: run(None, args, result)

    library.impl(
        op.name().split("::")[1].split(".")[0], lambda keyset, *args: run(keyset, args), "Autograd", with_keyset=True
    )
    return call


@functools.cache
def _needs(n_args: int, learns: tuple[int, ...], seen: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of every argument of an op whether it needs a gradient, given what autograd says of those that learn."""
    needs = dict(zip(learns, seen[1:], strict=True))
    return tuple([needs.get(position, False) for position in range(n_args)])


def exactly(function: Callable[..., Any], *args: Any) -> Any:
    """A call in the precision of its arguments: no autocast touches the products inside."""
    if not autocasting.is_on():
        return function(*args)
    with autocasting.Off():
        return function(*args)


def dynamic_size() -> Any:
    """A size only the kernel knows: how many events there are."""
    return torch.library.get_ctx().new_dynamic_size()
