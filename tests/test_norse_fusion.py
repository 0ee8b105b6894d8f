"""Per-step Norse code under time fusion: loops over cells, as people write them, against stock Norse in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import norse.torch as norse
import pytest
import torch
from helpers import assert_close, assert_same_gradients
from norse_models import enabled_copy, masked_threshold
from torch import Tensor, nn

import sparse_backend
from sparse_backend.tensorlike import TensorLike

STEPS, BATCH, INPUTS = 11, 5, 12
INF = float("inf")
LOOPS: dict[str, Callable[..., Any]] = {}


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    LOOPS[function.__name__] = function
    return function


class Net(nn.Module):
    """Layers of every kind, and a loop over them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        gain = nn.Parameter(torch.tensor(300.0).double())
        self.fc1, self.fc2, self.fc3 = nn.Linear(INPUTS, 9), nn.Linear(9, 7), nn.Linear(7, 4)
        self.lif = norse.LIFCell(norse.LIFParameters(tau_mem_inv=gain, v_th=torch.tensor(0.4)))
        self.box = norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=torch.tensor(500.0), v_th=torch.tensor(0.3)))
        self.rec = norse.LIFRecurrentCell(9, 7, norse.LIFParameters(v_th=torch.tensor(0.3)))
        self.readout, self.linear_readout, self.box_readout = (
            norse.LICell(),
            norse.LILinearCell(7, 4),
            norse.LIBoxCell(),
        )
        self.double()
        with torch.no_grad():
            for weight in (self.fc1.weight, self.fc2.weight, self.fc3.weight, self.rec.input_weights):
                weight.mul_(4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@loop
def cells(net: Net, x: Tensor) -> Any:
    a = b = c = None
    out = []
    for t in range(len(x)):
        z, a = net.lif(net.fc1(x[t]), a)
        z, b = net.box(net.fc2(z), b)
        v, c = net.readout(net.fc3(z), c)
        out.append(v)
    return torch.stack(out), a.v, a.i, b.v, c.i


@loop
def recurrent_cells(net: Net, x: Tensor) -> Any:
    a = b = c = None
    total = 0
    for t in range(len(x)):
        z, a = net.lif(net.fc1(x[t]), a)
        z, b = net.rec(z, b)
        v, c = net.linear_readout(z, c)
        total = total + v
    return total, b.z, b.v, b.i


@loop
def a_box_readout_and_spikes_kept(net: Net, x: Tensor) -> Any:
    a = c = None
    spikes = []
    for step in x:
        z, a = net.lif(net.fc1(step), a)
        spikes.append(z)
        v, c = net.box_readout(net.fc2(z), c)
    return torch.stack(spikes), v, c.v


@loop
def states_afresh_at_every_step(net: Net, x: Tensor) -> Any:
    out = []
    for t in range(len(x)):
        z, state = net.lif(net.fc1(x[t]) * 40)
        out.append(net.fc2(z))
    return torch.stack(out), state.v


@loop
def membranes_of_all_steps(net: Net, x: Tensor) -> Any:
    a = None
    v, i = [], []
    for t in range(len(x)):
        _, a = net.lif(net.fc1(x[t]), a)
        v.append(a.v)
        i.append(a.i * 2)
    return torch.stack(v), torch.stack(i)[3:], a.v


@loop
def states_detached_every_third_step(net: Net, x: Tensor) -> Any:
    a = b = None
    out = []
    for t in range(len(x)):
        if a is not None and t % 3 == 0:
            a = type(a)(*[part.detach() for part in a])
            b = type(b)(*[part.detach() for part in b])
        z, a = net.lif(net.fc1(x[t]), a)
        z, b = net.rec(z, b)
        out.append(z)
    return torch.stack(out), a.v, b.i


@loop
def membranes_changed_between_steps(net: Net, x: Tensor) -> Any:
    a = None
    out = []
    for t in range(len(x)):
        z, a = net.lif(net.fc1(x[t]), a)
        if t == 4:
            a = a._replace(v=a.v * 0.5, i=a.i.clone())
        out.append(z)
    return torch.stack(out), a.v


@loop
def parameters_changed_between_steps(net: Net, x: Tensor) -> Any:
    a, p = None, net.box.p
    out = []
    for t in range(len(x)):
        if t == 5:
            net.box.p = p._replace(v_th=torch.tensor(0.6).double())
        z, a = net.box(net.fc1(x[t]), a)
        out.append(z)
    net.box.p = p
    return torch.stack(out), a.v


@loop
def feedback(net: Net, x: Tensor) -> Any:
    a = b = None
    z2 = torch.zeros(len(x[0]), 7, dtype=x.dtype)
    out = []
    for t in range(len(x)):
        z, a = net.lif(net.fc1(x[t]) + z2[:, :1], a)
        z2, b = net.box(net.fc2(z), b)
        out.append(z2)
    return torch.stack(out), a.i


@loop
def a_current_put_together_column_by_column(net: Net, x: Tensor) -> Any:
    a = b = None
    out = []
    for t in range(len(x)):
        z, a = net.lif(net.fc1(x[t]), a)
        current = torch.zeros(BATCH, 2, dtype=torch.float64)
        current[:, 0], current[:, 1] = 2 * z.sum(1), 3 * z[:, 0] + a.v[:, 1]
        z, b = net.box(current, b)
        out.append(z)
    return torch.stack(out), b.v


@loop
def a_value_needed_at_every_step(net: Net, x: Tensor) -> Any:
    a = None
    out = []
    for t in range(len(x)):
        z, a = net.lif(net.fc1(x[t]), a)
        if float(z.detach().sum()) > 1e9:
            break
        out.append(z)
    return torch.stack(out), a.v


def draw(seed: int = 1) -> Tensor:
    return (torch.rand(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(seed)) < 0.4).double()


def outcome(net: Net, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    net.zero_grad()
    out = net(x)
    value = sum((o * torch.linspace(0.1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in out)
    value.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    gain = net.lif.p.tau_mem_inv
    gradients["tau_mem_inv"] = torch.zeros_like(gain) if gain.grad is None else gain.grad.clone()
    gain.grad = None
    return [o.detach() + 0 for o in out], gradients


#: loops of which no layer runs several steps at once
IN_STEPS = {
    "a_current_put_together_column_by_column", "a_value_needed_at_every_step", "feedback",
    "states_afresh_at_every_step",
}  # fmt: skip


@pytest.mark.parametrize("b_th", [INF, 0.25])
@pytest.mark.parametrize("name", LOOPS)
def test_loops_over_cells_are_stock_norse(name: str, b_th: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_backend.policy, "MAX_ACTIVE", 1.0)
    net, x = Net(LOOPS[name]), draw()
    with masked_threshold(b_th):
        expected, gradients = outcome(copy.deepcopy(net), x)  # a copy has no hooks, as ours has none
    ours = enabled_copy(net, b_th)
    for _ in range(2):  # and again, with all plans made
        got, mine = outcome(ours, x)
        for position, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_close(a, b, f"output {position}")
        assert_same_gradients(mine, gradients)
    assert any(gradient.count_nonzero() for gradient in gradients.values())
    report = sparse_backend.report(ours)
    if name not in IN_STEPS:
        assert max(layer.at_once for layer in report.layers) >= 3, report


@pytest.mark.parametrize("b_th", [INF, 0.25])
def test_a_sequential_state_stepped_from_outside(b_th: float) -> None:
    def steps(net: Any, x: Tensor, *, fuse: bool) -> Any:
        state, out = None, []
        if fuse:
            with sparse_backend.fuse_time(net):
                for t in range(len(x)):
                    v, state = net(x[t], state)
                    out.append(v)
        else:
            for t in range(len(x)):
                v, state = net(x[t], state)
                out.append(v)
        (torch.stack(out).square().mean() + state[1].v.sum()).backward()
        return [torch.stack(out).detach(), *(p.grad.clone() for p in net.parameters())], state

    net = norse.SequentialState(
        nn.Linear(INPUTS, 9), norse.LIFCell(), nn.Linear(9, 7), norse.LIFBoxCell(), nn.Linear(7, 4), norse.LICell()
    ).double()
    with torch.no_grad():
        net[0].weight.mul_(8)
        net[2].weight.mul_(8)
    with masked_threshold(b_th):
        expected, _ = steps(net, draw(), fuse=False)
    net.zero_grad()
    ours = enabled_copy(net, b_th)
    got, state = steps(ours, draw(), fuse=True)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    assert not any(isinstance(part, TensorLike) and part._dense_only for s in state if s is not None for part in s)
    assert all(layer.at_once == STEPS for layer in sparse_backend.report(ours).layers)


def test_an_exception_leaves_the_model_usable() -> None:
    def broken(net: Net, x: Tensor) -> Any:
        a = None
        for t in range(len(x)):
            _, a = net.lif(net.fc1(x[t]), a)
            if t == 5 and net.training:
                raise KeyError("on purpose")
        return (a.v,)

    net = Net(broken)
    ours = enabled_copy(net, INF)
    with pytest.raises(KeyError, match="on purpose"):
        ours(draw())
    assert_close(ours.eval()(draw())[0], net.eval()(draw())[0])


class Trainer(nn.Module):
    """A method calls a model of Norse's own containers, one of which holds a loop, as a Lightning module does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = norse.SequentialState(nn.Identity(), norse.ConvNet())

    def training_step(self, images: Tensor) -> Tensor:
        out, _ = self.model(images)
        return out.square().sum()


def test_a_loop_in_a_model_of_norses_that_a_method_calls() -> None:
    torch.manual_seed(0)
    stock = Trainer().double()
    ours = sparse_backend.enable(copy.deepcopy(stock), b_th=float("inf"))
    images = 3 * torch.rand(6, 2, 1, 28, 28, dtype=torch.float64)
    results = []
    for net in (ours, stock):
        loss = net.training_step(images)
        loss.backward()
        results.append({"loss": loss, **{name: p.grad for name, p in net.named_parameters()}})
    for name, value in results[1].items():
        assert_close(results[0][name], value, name)
    report = sparse_backend.report(ours)
    assert {layer.at_once for layer in report.layers} == {6}
    assert "up to 6 steps ran as one sequence" in (report.note or "")
