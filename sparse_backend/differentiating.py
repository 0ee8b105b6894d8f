"""Backwards that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` (ctx, *gradients) -> tuple of gradients whose own derivative is torch's error.

    torch's `once_differentiable` says so only where the gradients that arrive require grad themselves. Those of a loss
    that is linear in its input do not, and what the backward multiplies them with would be taken for constant.
    """

    def wrapped(ctx: Any, *arrived: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *arrived)
        with torch.no_grad():
            found = backward(ctx, *arrived)
        error = torch._C._functions.DelayedError(
            b"trying to differentiate twice a function that was marked with @once_differentiable", len(found)
        )
        return error(*[x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in found])

    return wrapped
