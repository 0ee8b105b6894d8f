"""Sparse against dense gradient, on the user's own model, batch and loss."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_backend import enabling
from sparse_backend.layer_state import STATE
from sparse_backend.reporting import html_table, table
from sparse_backend.tensorlike import dense_of

#: what nn.Module keeps for itself, and what enabling adds
_INTERNAL = frozenset(nn.Module().__dict__) | {STATE}


@dataclass
class GradientCheck:
    """One gradient: the model as enabled against the framework's own code."""

    name: str
    cosine: float | None  #: None where both are zero or absent
    relative_error: float | None  #: |sparse - dense| / |dense|
    sparse_norm: float
    dense_norm: float


class CheckResult:
    """The losses and gradients of both runs; prints as a table, in notebooks too."""

    def __init__(self, loss_sparse: float, loss_dense: float, gradients: list[GradientCheck]) -> None:
        self.loss_sparse, self.loss_dense, self.gradients = loss_sparse, loss_dense, gradients

    def to_dict(self) -> dict[str, Any]:
        return {
            "loss_sparse": self.loss_sparse,
            "loss_dense": self.loss_dense,
            "gradients": [asdict(gradient) for gradient in self.gradients],
        }

    def _cells(self) -> list[list[str]]:
        def number(value: float | None, style: str) -> str:
            return "-" if value is None else format(value, style)

        head = ["gradient of", "cosine", "relative error", "sparse norm", "dense norm"]
        return [head, *([
            g.name, number(g.cosine, ".6f"), number(g.relative_error, ".3g"), number(g.sparse_norm, ".4g"),
            number(g.dense_norm, ".4g"),
        ] for g in self.gradients)]  # fmt: skip

    def _losses(self) -> str:
        return f"loss: sparse {self.loss_sparse:.8g}, dense {self.loss_dense:.8g}"

    def __str__(self) -> str:
        return f"{self._losses()}\n{table(self._cells(), right={1, 2, 3, 4})}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{self._losses()}</p>{html_table(self._cells())}"


def check(
    net: nn.Module,
    x: Any,
    loss: Callable[[Any], Tensor],
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> CheckResult:
    """Run `net` on the batch `x` as enabled and as the framework alone, and compare every gradient.

    loss: takes the model's output, returns a scalar tensor. run: how the model is run, `net(x)` if not given; for
    models that are called once per step, a function (net, x) that holds the loop. Gradients of `x` are compared where
    it requires grad. Parameters, their gradients, buffers, hidden states and random states are left as they were.

    Raises ValueError where `net` is not enabled, or the loss is not a scalar that requires grad.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
    if not any(enabling.state_of(module) is not None for _, module, _ in enabling.neurons(net)):
        raise ValueError("net: expected an enabled model, got one without an enabled layer. Call enable(net) first")
    run = run or (lambda model, batch: model(batch))
    sparse_loss, sparse = _gradients(net, x, loss, run)
    with enabling.as_stock(net):
        dense_loss, dense = _gradients(net, x, loss, run)
    return CheckResult(sparse_loss, dense_loss, [_compare(name, sparse[name], dense[name]) for name in dense])


def _gradients(
    net: nn.Module, x: Any, loss: Callable[[Any], Tensor], run: Callable[[nn.Module, Any], Any]
) -> tuple[float, dict[str, Tensor | None]]:
    with _untouched(net), torch.enable_grad():
        leaves = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        if isinstance(x, Tensor) and x.requires_grad:
            dense = dense_of(x)
            leaves["x"] = x = dense.detach().clone().requires_grad_()
        value = loss(run(net, x))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a function that returns a scalar tensor, got {got}")
        if not value.requires_grad:
            raise ValueError("loss: expected a scalar that requires grad, got one that depends on no parameter")
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        return value.item(), dict(zip(leaves, gradients, strict=True))


def _compare(name: str, sparse: Tensor | None, dense: Tensor | None) -> GradientCheck:
    if sparse is None and dense is None:
        return GradientCheck(name, None, None, 0.0, 0.0)
    like = dense if dense is not None else sparse
    assert like is not None
    a, b = (torch.zeros_like(like) if g is None else g for g in (sparse, dense))
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    norm_a, norm_b = float(a.norm()), float(b.norm())
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else None
    error = float((a - b).norm()) / norm_b if norm_b else float("inf") if norm_a else None
    return GradientCheck(name, cosine, error, norm_a, norm_b)


@contextlib.contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    """Within this `net` works on copies of its buffers and tensor attributes; all is put back at the end."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in net.modules()]
    parameters = [(parameter, parameter._version, parameter.detach().clone()) for parameter in net.parameters()]
    states = [state for module in net.modules() if hasattr(state := enabling.state_of(module), "__dict__")]
    own = [(state, dict(state.__dict__)) for state in states]
    tallies = [(state.tally, type(state.tally)()) for state in states if state.tally is not None]
    for tally, saved in tallies:
        saved.copy_from(tally)
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone()
            return copies[id(value)]
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        if type(value) is dict:
            return {key: copied(item) for key, item in value.items()}
        return value

    for module, attributes, buffers in before:
        for name, value in attributes.items():
            if name not in _INTERNAL:
                module.__dict__[name] = copied(value)
        module._buffers.update((name, copied(value)) for name, value in buffers.items())
    devices = sorted({p.device.index for p in net.parameters() if p.device.type == "cuda"})
    python_state = random.getstate()
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for parameter, version, value in parameters:
            if parameter._version != version:
                with torch.no_grad():
                    parameter.copy_(value)
        for state, saved_attributes in own:
            state.__dict__.clear()
            state.__dict__.update(saved_attributes)
        for tally, saved in tallies:
            tally.copy_from(saved)
