"""snnTorch's tutorials train identically with and without the line, to rounding in float64; its losses, accuracies and
ready-made training loops give what they give for stock models."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import INF, assert_close
from pairs import UNFUSED, WAYS, Edge, Way, assert_no_placeholder, enabled, states, stock, weighted
from torch import Tensor, nn
from tutorials import STEPS, TUTORIALS, Tutorial, conv_sequential, event_sequential, labels, own_loop, train, wake

import sparse_backend

snn = pytest.importorskip("snntorch")
SF = pytest.importorskip("snntorch.functional")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from snntorch import backprop


pytestmark = pytest.mark.usefixtures("neurons", "errors_of_two_dtypes")


@pytest.fixture
def errors_of_two_dtypes(monkeypatch):
    """snnTorch's losses compare with float32 in every model; torch 2.11 has no gradient for that in float64."""
    error = nn.MSELoss.forward
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    try:
        nn.MSELoss()(one, torch.zeros(1)).backward()
    except RuntimeError:
        monkeypatch.setattr(nn.MSELoss, "forward", lambda self, x, target: error(self, x, target.to(x.dtype)))


def trained(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and states; taken before another model runs, since `utils.reset` resets the states of all."""
    return {**{name: p.detach().clone() for name, p in net.named_parameters()}, **states(net)}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(ours[name], value, name)


def train_both(tutorial: Tutorial, way: Way, around: Any, batches: int = 3) -> Any:
    """Returns the enabled model, trained as the stock one."""
    theirs, edge = stock(tutorial.recipe, way.b_th)
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    expected = train(theirs, tutorial, batches)
    assert edge.is_clear()
    after = trained(theirs)
    for name, p in theirs.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} does not train: the case proves nothing"
    with way.policy():
        ours = enabled(tutorial.recipe, way)
        history = train(ours, tutorial, batches, around)
    assert_no_placeholder([history.outputs, list(ours.buffers())])
    for a, b in zip(history.losses, expected.losses, strict=True):
        assert_close(a, b, "loss")
    for a, b in zip(history.outputs, expected.outputs, strict=True):
        for mine, stocks in zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]:
            assert_close(mine.detach() + 0, stocks, "outputs")
    assert_alike(trained(ours), after)
    return ours


def cases() -> list[Any]:
    """(tutorial, way, what the loop runs within): outer loops with and without `fuse_time`."""
    found = []
    for name, tutorial in TUTORIALS.items():
        outer = tutorial.forward is not own_loop
        for way in (*WAYS, *UNFUSED):
            fused = outer and way in WAYS
            found.append(pytest.param(name, way, fused, id=f"{name}-{way}" + ("-fuse_time" if fused else "")))
        if outer:
            found.append(pytest.param(name, "band", False, id=f"{name}-band-called step by step"))
    return found


@pytest.mark.parametrize(("name", "way", "fused"), cases())
def test_tutorial_trains_as_stock(name: str, way: str, fused: bool) -> None:
    tutorial = TUTORIALS[name]
    around = sparse_backend.fuse_time if fused else lambda net: nullcontext()
    ours = train_both(tutorial, {**WAYS, **UNFUSED}[way], around)
    paths = {layer.path for layer in sparse_backend.report(ours).layers}
    sequences = fused or (way in WAYS and tutorial.forward is own_loop)
    assert all(path.endswith("sequence" if sequences else "step") for path in paths), paths


def test_tutorial_5_evaluated_under_no_grad() -> None:
    """Test accuracy between training batches, as the tutorial prints it."""
    tutorial = TUTORIALS["5 static"]
    theirs, _ = stock(tutorial.recipe, WAYS["inf"].b_th)
    ours = enabled(tutorial.recipe, WAYS["inf"])
    for net in (theirs, ours):
        train(net, tutorial, 1)
    results = []
    for net in (theirs, ours):
        x, targets = tutorial.data(11)
        with torch.no_grad():
            net.eval()
            spk, mem = net(x)
            _, predicted = spk.sum(dim=0).max(1)
            results.append((spk + 0, mem + 0, (targets == predicted).double().mean()))
    for a, b in zip(*results, strict=True):
        assert not a.requires_grad
        assert_close(a, b)


# Losses, accuracies and regularisation of snntorch.functional, on what a model returned.

LOSSES: dict[str, Any] = {
    "ce_rate": lambda spk, mem, y: SF.ce_rate_loss()(spk, y),
    "ce_count": lambda spk, mem, y: SF.ce_count_loss()(spk, y),
    "ce_count weighted": lambda spk, mem, y: SF.ce_count_loss(weight=torch.arange(1.0, 5).double())(spk, y),
    "ce_count population": lambda spk, mem, y: SF.ce_count_loss(population_code=True, num_classes=2)(spk, y % 2),
    "ce_max_membrane": lambda spk, mem, y: SF.ce_max_membrane_loss()(mem, y),
    "ce_temporal": lambda spk, mem, y: SF.ce_temporal_loss()(spk, y),
    "ce_temporal reciprocal": lambda spk, mem, y: SF.ce_temporal_loss(inverse="reciprocal")(spk, y),
    "mse_count": lambda spk, mem, y: SF.mse_count_loss(correct_rate=0.75, incorrect_rate=0.25)(spk, y),
    "mse_count population": lambda spk, mem, y: SF.mse_count_loss(0.8, 0.2, population_code=True, num_classes=2)(
        spk, y % 2
    ),
    "mse_membrane": lambda spk, mem, y: SF.mse_membrane_loss(on_target=1.1, off_target=0.2)(mem, y),
    "mse_temporal": lambda spk, mem, y: SF.mse_temporal_loss(on_target=1, off_target=5)(spk, y),
    "mse_temporal tolerance": lambda spk, mem, y: SF.mse_temporal_loss(target_is_time=True, tolerance=1)(
        spk, (y.double() + torch.arange(4.0).view(-1, 1)).T.contiguous()
    ),
    "mse_temporal several spikes": lambda spk, mem, y: SF.mse_temporal_loss(target_is_time=True, multi_spike=True)(
        spk, torch.stack([(y.double() + torch.arange(4.0).view(-1, 1)).T + shift for shift in (0, 2)])
    ),
    "l1_rate_sparsity": lambda spk, mem, y: SF.ce_count_loss()(spk, y) + SF.l1_rate_sparsity(1e-2)(spk),
}


@pytest.mark.parametrize("b_th", [INF, 0.5])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_snntorch(name: str, b_th: float) -> None:
    results = []
    for net, context in _both("5 rate coded", Way(b_th, counts_decide=False)):
        with context:
            x, targets = TUTORIALS["5 rate coded"].data(3)
            spk, mem = net(x)
            assert float(spk.detach().sum()) > 0
            loss = LOSSES[name](spk, mem, targets)
            loss.backward()
            results.append({"loss": loss.detach(), **{n: p.grad for n, p in net.named_parameters()}})
    ours, theirs = results
    assert any(grad.count_nonzero() for n, grad in theirs.items() if n != "loss")
    for key, value in theirs.items():
        assert_close(ours[key], value, key)


@pytest.mark.parametrize("way", ["inf", "band as events"])
def test_accuracies_of_snntorch(way: str) -> None:
    results = []
    for net, context in _both("5 rate coded", WAYS[way]):
        with context:
            found = []
            for seed in range(4):
                x, targets = TUTORIALS["5 rate coded"].data(seed)
                spk, _ = net(x)
                found += [
                    SF.accuracy_rate(spk, targets),
                    SF.accuracy_rate(spk, targets % 2, population_code=True, num_classes=2),
                    SF.accuracy_temporal(spk, targets),
                ]
            results.append(found)
    assert results[0] == results[1]
    assert len(set(results[1])) > 2


def _both(name: str, way: Way) -> list[Any]:
    """The enabled and the stock model, each with what it runs within."""
    theirs, _ = stock(TUTORIALS[name].recipe, way.b_th)
    with way.policy():
        ours = enabled(TUTORIALS[name].recipe, way)
    return [(ours, way.policy()), (theirs, nullcontext())]


# The ready-made training loops.


class FromClass(nn.Module):
    """A model that keeps its states, written as a class whose last module is its last neuron."""

    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        inner = event_sequential(spike_grad)
        self.fc1, self.lif1, self.fc2, self.lif2 = inner[1], inner[2], inner[3], inner[4]

    def forward(self, x: Tensor) -> Any:
        return self.lif2(self.fc2(self.lif1(self.fc1(x.flatten(1)))))


def loader(kind: str = "time first", data: str = "7 fully connected") -> list[tuple[Tensor, Tensor]]:
    batches = [TUTORIALS[data].data(seed) for seed in range(2)]
    return [(x[0] if kind == "static" else x.transpose(0, 1) if kind == "batch first" else x, y) for x, y in batches]


# With time-varying data stock runs BPTT only: TBPTT and RTRL stop at a name they never bind.
SCHEDULES: dict[str, Any] = {
    "BPTT": lambda net, opt, loss: backprop.BPTT(net, loader(), opt, loss),
    "BPTT batch first": lambda net, opt, loss: backprop.BPTT(net, loader("batch first"), opt, loss, time_first=False),
    "BPTT regularised": lambda net, opt, loss: backprop.BPTT(
        net, loader(), opt, loss, regularization=SF.l1_rate_sparsity(1e-3)
    ),
    "BPTT static": lambda net, opt, loss: backprop.BPTT(net, loader("static"), opt, loss, STEPS, time_var=False),
    "TBPTT": lambda net, opt, loss: backprop.TBPTT(net, loader("static"), opt, loss, 6, time_var=False, K=2),
    "TBPTT rest": lambda net, opt, loss: backprop.TBPTT(net, loader("static"), opt, loss, 7, time_var=False, K=3),
    "RTRL": lambda net, opt, loss: backprop.RTRL(net, loader("static"), opt, loss, STEPS, time_var=False),
}


def train_by_schedule(net: nn.Module, schedule: str, loss: Any) -> Tensor:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    return SCHEDULES[schedule](net, optimizer, loss)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fuse_time"])
@pytest.mark.parametrize("way", ["inf", "band as events"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_backprop_schedules(schedule: str, way: str, fused: bool) -> None:
    net = FromClass if schedule == "BPTT" else event_sequential
    _assert_schedule_trains_alike(lambda grad: wake(net(grad)), WAYS[way], schedule, fused, SF.mse_count_loss())


@pytest.mark.parametrize("loss", ["mse_membrane_loss", "ce_max_membrane_loss", "ce_rate_loss", "ce_temporal_loss"])
def test_backprop_with_other_losses(loss: str) -> None:
    def recipe(spike_grad: Any) -> Any:
        return wake(event_sequential(spike_grad))

    _assert_schedule_trains_alike(recipe, WAYS["band as events"], "TBPTT", True, getattr(SF, loss)())


def test_backprop_of_a_conv_net() -> None:
    def recipe(spike_grad: Any) -> Any:
        return wake(conv_sequential(spike_grad, 2))

    frames = loader("static", "7 conv")
    for fused in (True, False):
        theirs, edge = stock(recipe, WAYS["band"].b_th)
        ours = enabled(recipe, WAYS["band"])
        results = []
        for net in (theirs, ours):
            optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
            with sparse_backend.fuse_time(net) if fused and net is ours else nullcontext():
                loss = backprop.TBPTT(net, frames, optimizer, SF.ce_rate_loss(), 7, time_var=False, K=3)
            results.append({"average loss": loss.detach() + 0, **trained(net)})
        assert edge.is_clear()
        assert_alike(results[1], results[0])


def _assert_schedule_trains_alike(recipe: Any, way: Way, schedule: str, fused: bool, loss: Any) -> None:
    theirs, edge = stock(recipe, way.b_th)
    before = weighted(list(theirs.parameters())).item()
    expected = train_by_schedule(theirs, schedule, loss)
    assert edge.is_clear()
    assert weighted(list(theirs.parameters())).item() != before
    after = trained(theirs)
    with way.policy():
        ours = enabled(recipe, way)
        with sparse_backend.fuse_time(ours) if fused else nullcontext():
            got = train_by_schedule(ours, schedule, loss)
    assert_close(got.detach() + 0, expected.detach(), "average loss")
    assert_alike(trained(ours), after)


def test_losses_inside_fuse_time() -> None:
    """The loss, the backward and the optimiser step within the `with`."""
    for way in (WAYS["inf"], WAYS["band as events"]):
        tutorial = TUTORIALS["7 fully connected"]
        theirs, edge = stock(tutorial.recipe, way.b_th)
        ours = enabled(tutorial.recipe, way)
        losses: list[list[Tensor]] = []
        ends = []
        for net in (theirs, ours):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            losses.append([])
            with way.policy(), sparse_backend.fuse_time(net) if net is ours else nullcontext():
                for seed in range(3):
                    x, targets = tutorial.data(seed)
                    loss = tutorial.loss(tutorial.forward(net, x), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses[-1].append(loss.detach())
            ends.append(trained(net))
        assert edge.is_clear()
        for a, b in zip(*losses, strict=True):
            assert_close(b + 0, a, "loss")
        assert_alike(ends[1], ends[0])


def test_the_edge_is_noticed() -> None:
    """What keeps these comparisons honest: a membrane at the threshold, or at the band's edge, is seen."""
    for b_th, x, clear in ((0.5, 0.0, False), (0.5, -0.5, False), (0.5, 0.3, True), (float("inf"), 0.5, True)):
        edge = Edge(b_th)
        edge.seen.append(torch.tensor([x, 2.0], dtype=torch.float64))
        assert edge.is_clear() is clear
    assert labels(0).unique().numel() > 1
