"""One image fed at every step is multiplied once, however its loop spells it: dense or sparse, itself or a view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_loops import BATCH, INPUTS, STEPS, Net, check, net_of, same_values, stock_and_enabled
from helpers import normal, spikes
from pairs import WAYS, Way, enabled, outcome
from torch import Tensor

IMAGE = (BATCH, 3, 2, 2)  #: as many entries as the first layer has inputs


def dense_image() -> Tensor:
    return normal(IMAGE, 3)


def sparse_image() -> Tensor:
    return spikes(IMAGE, 0.2, 3)


def loop_over(spelling: Callable[[Tensor, int], Any]) -> Callable[[Net, Any], Any]:
    """The usual loop; what a step is fed is spelled out in the step."""

    def loop(net: Net, x: Tensor) -> Any:
        mems, out = net.mems(), []
        for t in range(STEPS):
            spk, mems = net.step(spelling(x, t), mems)
            out.append(spk)
        return torch.stack(out), mems[-1]

    return loop


#: the input of every step, of an image [B, C, H, W]
STATIC: dict[str, Callable[[Tensor, int], Any]] = {
    "flatten": lambda x, t: x.flatten(1),
    "view": lambda x, t: x.view(len(x), -1),
    "reshape of a view": lambda x, t: x.view(len(x), 3, 4).reshape(len(x), -1),
    "first of one": lambda x, t: x.flatten(1).unsqueeze(0)[0],
    "detached": lambda x, t: x.flatten(1).detach(),
}


@pytest.fixture
def products(monkeypatch):
    """Shapes of the inputs of every `linear` that torch itself runs."""
    calls: list[torch.Size] = []
    linear = torch.nn.functional.linear

    def counted(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = linear(input, *args, **kwargs)
        if type(input) is Tensor and type(result) is Tensor:
            calls.append(input.shape)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return calls


@pytest.mark.parametrize("spelling", STATIC)
@pytest.mark.parametrize("image", [dense_image, sparse_image])
def test_results_are_stocks(way: Way, image: Any, spelling: str) -> None:
    check(way, loop_over(STATIC[spelling]), image(), fuses=STEPS)


@pytest.mark.parametrize("spelling", [name for name in STATIC if name != "detached"])  # whose views nobody can tell
def test_a_dense_image_is_multiplied_once(products: list[torch.Size], spelling: str) -> None:
    net, x = enabled(net_of(loop_over(STATIC[spelling])), WAYS["band"]), dense_image()
    for _ in range(2):
        products.clear()
        net(x)
        assert products.count(torch.Size((BATCH, INPUTS))) == 1


@pytest.mark.parametrize("image", [dense_image, sparse_image])
def test_an_image_itself(way: Way, products: list[torch.Size], image: Any) -> None:
    net = check(way, loop_over(lambda x, t: x), image().flatten(1).clone(), fuses=STEPS)
    products.clear()
    net(image().flatten(1).clone())
    assert products.count(torch.Size((BATCH, INPUTS))) <= 1


def test_transposed_views(way: Way) -> None:
    """`x` and `x.t()` begin in one place and have one shape."""

    def loop(net: Net, x: Tensor) -> Any:
        mems, out = net.mems(), []
        for t in range(STEPS):
            spk, mems = net.step(x.t() if t % 2 else x.view(x.shape), mems)
            out.append(spk)
        return torch.stack(out)

    check(way, loop, normal((INPUTS, INPUTS), 3))


@pytest.mark.parametrize("image", [dense_image, sparse_image])
def test_an_image_written_to_between_steps(way: Way, image: Any) -> None:
    def loop(net: Net, x: Tensor) -> Any:
        x, mems, out = x.clone(), net.mems(), []
        for t in range(STEPS):
            spk, mems = net.step(x.flatten(1) if t % 2 else x.view(len(x), -1), mems)
            out.append(spk)
            if t == 2:
                _ = spk.sum().item()  # everything has run
                x.mul_(0.5)
        return out

    same_values(way, lambda net, _: loop(net, image()))


@pytest.mark.parametrize("image", [dense_image, sparse_image])
def test_an_image_itself_written_to_between_steps(way: Way, image: Any) -> None:
    """What is fed as it is has been multiplied when the step was recorded."""

    def loop(net: Net, x: Tensor) -> Any:
        x, mems, out = x.clone(), net.mems(), []
        for t in range(STEPS):
            spk, mems = net.step(x, mems)
            out.append(spk)
            if t == 2:
                x.mul_(0.5)
        return out

    same_values(way, lambda net, _: loop(net, image().flatten(1)))


@pytest.mark.parametrize("image", [dense_image, sparse_image])
def test_the_current_of_a_static_image_written_to(way: Way, image: Any) -> None:
    """The next step's is not that one."""

    def loop(net: Net, x: Tensor) -> Any:
        mems, out = net.mems(), []
        for t in range(STEPS):
            current = net.fc1(x)
            if t % 2:
                current.add_(0.25)
            spk, mem1 = net.lif1(current, mems[0])
            mems = (mem1, *mems[1:])
            out.append(net.lif2(net.fc2(spk), mems[1])[0])
        return out

    check(way, loop, image().flatten(1).clone())


@pytest.mark.parametrize("image", [dense_image, sparse_image])
@pytest.mark.parametrize("static", [True, False])
def test_weights_that_change_between_steps(way: Way, image: Any, static: bool) -> None:
    def loop(net: Net, x: Tensor) -> Any:
        mems, out = net.mems(), []
        for t in range(STEPS):
            spk, mems = net.step(x if static else x.clone(), mems)
            out.append(spk)
            if t == 3:
                with torch.no_grad():
                    net.fc1.weight.mul_(0.75)
        return out

    same_values(way, lambda net, _: loop(net, image().flatten(1).clone()))


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_stop_learning(way: Way, frozen: bool) -> None:
    """Steps of one image, some of them without gradient."""

    def loop(net: Net, x: Tensor) -> Any:
        mems, out = net.mems(), []
        net.fc1.weight.requires_grad_(not frozen)
        for t in range(STEPS):
            with torch.set_grad_enabled(t != 2):
                spk, mems = net.step(x, mems)
            out.append(spk)
        return out

    check(way, loop, dense_image().flatten(1).clone())


def test_an_image_that_learns(way: Way) -> None:
    check(way, loop_over(lambda x, t: x.flatten(1)), dense_image().requires_grad_(), fuses=STEPS)


def test_backward_through_every_step(way: Way) -> None:
    """Numbers asked for in the loop: what was computed once is not used behind a backward pass that has freed it."""

    def loop(net: Net, x: Tensor) -> Any:
        out = []
        for _ in range(3):
            mems, total = net.mems(), 0
            for _ in range(2):
                spk, mems = net.step(x, mems)
                total = total + mems[-1].sum()
            total.backward()
            out.append(spk.detach())
        return out

    x = dense_image().flatten(1).clone()
    outcomes = []
    for net, policy in stock_and_enabled(way, loop):
        with policy:
            outcomes.append(outcome(net, lambda net: net(x)))
    theirs, ours = outcomes
    assert theirs.gradients.keys() == ours.gradients.keys()
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-8, atol=1e-12)
