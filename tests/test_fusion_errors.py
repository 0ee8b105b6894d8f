"""Errors under time fusion: raised where stock raises them, and the model works afterwards."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fusion_loops import (
    BATCH,
    STEPS,
    Net,
    check,
    frames,
    net_of,
    recorded,
    stock_and_enabled,
)
from pairs import (
    Way,
    assert_no_placeholder,
    assert_same,
    enabled,
    outcome,
    states,
    stock,
    weighted,
)
from torch import Tensor
from torch.nn import functional as F

import sparse_backend

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")


pytestmark = pytest.mark.usefixtures("neurons")


# Errors.


WRONG: dict[str, Callable[[Net, Any, Any], Any]] = {
    "linear": lambda net, spk, mem: net.fc3(net.fc1(spk)),
    "add": lambda net, spk, mem: spk + torch.ones(3, 3).double(),
    "add of two": lambda net, spk, mem: net.fc3(spk) + mem,
    "view": lambda net, spk, mem: spk.view(7, -1),
    "flatten": lambda net, spk, mem: spk.flatten(4),
    "conv": lambda net, spk, mem: F.conv2d(spk.view(BATCH, 1, 2, 5), torch.ones(1, 2, 2, 2).double()),
    "pool": lambda net, spk, mem: F.max_pool2d(mem, 3),
    "matmul": lambda net, spk, mem: spk @ spk,
    "cat": lambda net, spk, mem: torch.cat([spk, mem[:2]], dim=1),
    "stack": lambda net, spk, mem: torch.stack([spk, net.fc3(spk)]),
    "index": lambda net, spk, mem: spk[99],
    "dtype": lambda net, spk, mem: F.linear(spk.float(), net.fc2.weight),
    "dim": lambda net, spk, mem: spk.sum(5),
    "attribute": lambda net, spk, mem: spk.no_such_attribute,
    "write": lambda net, spk, mem: mem.__setitem__((slice(None), 0), torch.zeros(9).double()),
    "neuron": lambda net, spk, mem: net.lif2(),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_rise_at_the_users_own_line(way: Way, what: str) -> None:
    """The same exception as stock's, at the same line of the user's code; the model works afterwards."""
    armed = [True]

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mems[0])
            if t == 4 and armed[0]:
                WRONG[what](net, spk1, mem1)
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems

    kinds = []
    for net, context in stock_and_enabled(way, loop):
        with context, pytest.raises((RuntimeError, TypeError, IndexError, AttributeError, ValueError)) as info:
            net(frames())
        lines = [entry.lineno for entry in info.traceback if entry.path.name == "test_fusion_shapes.py"]
        kinds.append((info.type, lines))
        assert_no_placeholder(list(net.buffers()))
    assert kinds[0] == kinds[1]
    armed[0] = False
    x = frames()
    theirs, edge = stock(net_of(loop), way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    with way.policy():
        assert_same(outcome(net, lambda net: net(x)), expected)


def test_errors_caught_inside_the_loop(way: Way) -> None:
    """The user catches the error and goes on."""

    def loop(net: Net, x: Any) -> Any:
        mems, out, failed = net.mems(), [], 0
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            try:
                spk = net.fc1(spk)
            except RuntimeError:
                failed += 1
            try:
                net.lif1(spk, torch.zeros(1), None)
            except TypeError:
                failed += 1
            out.append(spk)
        return torch.stack(out), mems, failed

    check(way, loop)


@pytest.mark.parametrize("at", [0, 3, STEPS - 1])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_exceptions_leave_the_model_usable(way: Way, kind: type[BaseException], at: int) -> None:
    armed = [True]

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
            if armed[0] and t == at:
                raise kind("stop")
        return torch.stack(out), mems

    x = frames()
    with way.policy():
        ours = enabled(net_of(loop), way)
        with pytest.raises(kind, match="stop"):
            ours(x)
        assert_no_placeholder(list(ours.buffers()))
        states(ours)
        assert torch.equal(torch.ones(3) + 1, torch.full((3,), 2.0))  # nothing records any more
    armed[0] = False
    theirs, edge = stock(net_of(loop), way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    with way.policy():
        for _ in range(2):
            assert_same(outcome(ours, lambda net: net(x)), expected)


@pytest.mark.parametrize("at", [0, 2, 5, 11])
def test_exceptions_from_a_surrogate(way: Way, at: int) -> None:
    """It is called when the recorded steps run: wherever that is, the error comes out and the next forward is right."""
    left = [math.inf]

    def failing(grad: Any) -> Any:
        def inner(x: Tensor) -> Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise ZeroDivisionError
            return grad(x)

        return inner

    def recipe(grad: Any) -> Any:
        return net_of(lambda net, x: recorded(net, x)[:2])(failing(grad))

    x = frames()
    theirs, edge = stock(recipe, way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    with way.policy():
        ours = enabled(recipe, way)
        weighted(ours(x)).backward()
        left[0] = at % 3
        with pytest.raises(ZeroDivisionError):
            for _ in range(at + 1):
                weighted(ours(x)).backward()
        left[0] = math.inf
        states(ours)
        for _ in range(2):
            assert_same(outcome(ours, lambda net: net(x)), expected)


@pytest.mark.parametrize("at", [0, 3])
def test_exceptions_inside_fuse_time(way: Way, at: int) -> None:
    """Caught around the `with`; then the sequence is begun anew."""

    def build(grad: Any) -> Any:
        return net_of(lambda net, x: net.lif3(net.fc3(net.lif2(net.fc2(net.lif1(net.fc1(x)))))), init_hidden=True)(grad)

    def go(net: Any, fuse: bool = False) -> Any:
        x = frames()
        if fuse:
            with pytest.raises(OSError, match="camera"), sparse_backend.fuse_time(net):
                for t in range(len(x)):
                    net(x[t])
                    if t == at:
                        raise OSError("camera unplugged")
        utils.reset(net)
        out = []
        with sparse_backend.fuse_time(net) if fuse else nullcontext():
            for t in range(len(x)):
                out.append(net(x[t]))
        return [(spk + 0, mem + 0) for spk, mem in out]

    theirs, edge = stock(build, way.b_th)
    expected = outcome(theirs, go)
    assert edge.is_clear()
    with way.policy():
        assert_same(outcome(enabled(build, way), functools.partial(go, fuse=True)), expected)


def test_the_error_about_a_change_leaves_the_model_usable(way: Way) -> None:
    """A weight edited in mid-loop: an error or the right result, and after an error all is as before."""
    armed = [True]

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            if armed[0] and t == 3:
                with torch.no_grad():
                    net.fc2.weight.mul_(2).div_(2)
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems

    with way.policy():
        ours = enabled(net_of(loop), way)
        for _ in range(2):
            try:
                ours(frames())
            except RuntimeError as error:
                assert "changed in place" in str(error)
            states(ours)
        armed[0] = False
        theirs, edge = stock(net_of(loop), way.b_th)
        expected = outcome(theirs, lambda net: net(frames()))
        assert edge.is_clear()
        assert_same(outcome(ours, lambda net: net(frames())), expected)
