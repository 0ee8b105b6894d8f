"""What scripts do that no other file here thought of, against stock in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import norse.torch as norse
import pytest
import torch
from fusion_loops import BATCH, HIDDEN, INPUTS, STEPS, Net, check, frames, net_of, wake
from helpers import as_tensor, normal, spikes
from norse_models import lif
from pairs import SPIKE_GRAD, UNFUSED, WAYS, Way, assert_equal_runs, enabled, leaky, longest, weighted
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparse_backend
from sparse_backend import EventTensor

pytestmark = pytest.mark.usefixtures("neurons")

UNFUSED_BAND = UNFUSED["band unfused"]
every_way = pytest.mark.parametrize("way", [*WAYS.values(), UNFUSED_BAND], ids=[*WAYS, "band unfused"])


def through(between: Callable[..., Any]) -> Any:
    """The usual loop with something between the first neuron and the second layer."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(net.fc2(between(net, spk1)), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem1

    return loop


# Dropout where nothing is dropped.


def evaluated_then_trained(net: Any) -> Any:
    net.eval()
    before = net(frames())
    net.train()
    return before, net(frames())


def test_dropout_in_evaluation_ends_no_sequence(way: Way) -> None:
    def recipe(spike_grad: Any) -> Any:
        net = net_of(through(lambda net, spk: net.dropout(spk)))(spike_grad)
        net.dropout = nn.Dropout(0.3)
        return net

    net = assert_equal_runs(recipe, evaluated_then_trained, way, runs=2)
    net.eval()(frames())
    assert longest(net) == STEPS


@pytest.mark.parametrize("dropout", [nn.Dropout(0.0), nn.Dropout1d(0.3), nn.Dropout2d(0.3)], ids=str)
def test_other_dropouts_end_no_sequence(way: Way, dropout: nn.Module) -> None:
    def between(_: Any, spk: Any) -> Any:
        return dropout(spk.view(BATCH, 5, 2, 1)[..., 0] if type(dropout) is nn.Dropout1d else spk.view(BATCH, 5, 2, 1))

    loop = through(lambda net, spk: between(net, spk).reshape(BATCH, HIDDEN))
    check(way, loop, fuses=STEPS)


def test_spikes_pass_dropout_as_events() -> None:
    spk = EventTensor.from_dense(spikes((3, 5), 0.3, 0))
    for dropout in (nn.Dropout(0.3).eval(), nn.Dropout2d(0.3).eval(), nn.Dropout(0.0)):
        assert dropout(spk) is spk
    assert type(nn.Dropout(0.3)(spk)) is EventTensor


# Shapes.


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 3, 2)], ids=str)
def test_linear_layers_of_other_ranks_end_no_sequence(way: Way, shape: tuple[int, ...]) -> None:
    check(way, through(lambda net, spk: spk), spikes((STEPS, *shape, INPUTS), 0.3, 1), fuses=STEPS)


def test_a_batch_that_shrinks_inside_the_loop(way: Way) -> None:
    """Samples that have ended are taken out; a later batch may be another one."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, _ = net.mems()
        out = []
        for t in range(len(x)):
            size = BATCH if t < 3 or t > 5 else 2
            if t == 3:
                mem1, mem2 = mem1[:size], mem2[:size]
            spk1, mem1 = net.lif1(net.fc1(x[t, :size]), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            out.append(spk2)
        return out, mem1, mem2

    check(way, loop, fuses=3)


def test_two_batch_sizes_in_turns(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems = {size: [torch.zeros(size, HIDDEN, dtype=x.dtype)] * 2 for size in (BATCH, 2)}
        out = []
        for t in range(len(x)):
            for size, (mem1, mem2) in mems.items():
                spk1, mem1 = net.lif1(net.fc1(x[t, :size]), mem1)
                spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
                mems[size] = [mem1, mem2]
                out.append(spk2)
        return out, mems

    check(way, loop)


@every_way
@pytest.mark.parametrize("name", ["beta", "threshold"])
def test_settings_of_more_dimensions_than_the_current(way: Way, name: str) -> None:
    """Stock's spikes then have as many, and so have those of its own code."""
    settings = {"beta": 0.8, "threshold": 0.5, name: torch.linspace(0.4, 0.8, HIDDEN).unsqueeze(0)}

    def recipe(spike_grad: Any) -> Any:
        net = net_of(lambda net, x: torch.stack([net.lif1(net.fc1(step))[0] for step in x]))(spike_grad)
        net.lif1 = leaky(spike_grad if way.b_th > 1 else SPIKE_GRAD, **settings)
        return net

    net = assert_equal_runs(recipe, lambda net: net(frames(batch=1)[:, 0]), way)
    assert net(frames(batch=1)[:, 0]).shape == (STEPS, 1, HIDDEN)
    assert "neuron" in sparse_backend.report(net).layers[0].reason


def test_norse_parameters_of_more_dimensions_than_the_current() -> None:
    x = normal((5,), 0, torch.float32, 3.0)
    for v_th in (torch.full((1, 5), 0.3), torch.full((1, 1), 0.3)):
        stock, ours = norse.LIFCell(lif(v_th=v_th)), norse.LIFCell(lif(v_th=v_th))
        sparse_backend.enable(ours, b_th=0.2)
        (spk, state), (expected, after) = ours(x), stock(x)
        assert torch.equal(as_tensor(spk), expected)
        assert torch.equal(state.v, after.v)
        assert "more dimensions" in sparse_backend.report(ours).layers[0].reason


def test_a_number_per_step_times_a_wider_constant() -> None:
    """Two tensors without dimensions promote each other; with the steps as a dimension only one of them would."""
    half = torch.tensor(0.5, dtype=torch.float64)

    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for step in x:
            _, mem = net.lif1(net.fc1(step), mem)
            out.append(mem.mean() * half)
        return torch.stack(out)

    stock, ours = net_of(loop)(SPIKE_GRAD).float(), enabled(net_of(loop), WAYS["band"]).float()
    expected, got = stock(frames().float()), ours(frames().float())
    assert got.dtype is expected.dtype is torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# Functions between layers.

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "casts": lambda spk, mem: spk.to(mem.dtype).to("cpu").type_as(mem).cpu() + (mem > 0.4).to(torch.float64),
    "bools": lambda spk, mem: (spk.bool() | ~(mem > 0.3)) * spk + (mem != 0).masked_fill(mem < 0.2, False),
    "side by side": lambda spk, mem: torch.stack([spk, mem]).sum(0) + torch.stack([spk, mem], -1).max(),
    "new ones": lambda spk, mem: spk * spk.new_tensor(0.5) + mem.new_ones(mem.shape) + torch.full_like(mem, 0.1),
    "transposes": lambda spk, mem: (spk.T * mem.swapaxes(0, 1)).mT + mem.flip(1).roll(1, 0),
    "pieces": lambda spk, mem: torch.addmm(spk, mem.narrow(1, 0, BATCH), mem).expand_as(mem).repeat(1, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_end_no_sequence(name: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, _ = net.mems()
        out = []
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk2, mem2 = net.lif2(net.fc2(FUNCTIONS[name](spk1, mem1)), mem2)
            out.append(spk2)
        return torch.stack(out), mem2

    check(WAYS["band as events"], loop, fuses=STEPS)


def mul_(values: Any) -> None:
    values.mul_(0.5)


def write_a_column(values: Any) -> None:
    values[:, 0] = 0


@pytest.mark.parametrize("write", [mul_, write_a_column])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(BATCH, HIDDEN), lambda x: x.detach(), lambda x: x.data])
def test_a_write_after_a_look_and_a_use(way: Way, write: Callable[[Any], None], view: Callable[[Any], Any]) -> None:
    """What was recorded before the write takes the numbers before it."""

    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for step in x:
            spk, mem = net.lif1(net.fc1(step), mem)
            changed = 1.5 * spk
            float(changed.detach().sum())
            out.append(2 * changed)
            write(view(changed))
            out.append(changed)
        return torch.stack(out), mem

    check(way, loop)


# Checkpoints of a part of a step.


@every_way
@pytest.mark.parametrize("what", ["spikes", "spikes twice", "layers", "current", "neuron", "current and neuron"])
def test_checkpoints_around_a_part_of_a_step(way: Way, what: str) -> None:
    """What a checkpoint is given from outside must be the same when it runs again."""

    def part(net: Net, spk1: Any, mem2: Any) -> tuple[Any, Any]:
        def run(function: Any, *args: Any) -> Any:
            return checkpoint(function, *args, use_reentrant=False)

        def neuron(current: Any, mem: Any) -> Any:
            return net.lif2(current, mem)

        if what == "neuron":
            return run(neuron, net.fc2(spk1), mem2)
        if what == "current and neuron":
            spk2, mem2, current = run(lambda c, mem: (*neuron(c, mem), 0.1 * c), net.fc2(spk1), mem2)
            return spk2 + current, mem2
        current = {
            "spikes": lambda: run(lambda spk: net.fc2(F.relu(2 * spk)), spk1),
            "spikes twice": lambda: run(lambda spk: net.fc2(spk * spk + spk), spk1),
            "layers": lambda: run(nn.Sequential(net.fc2, nn.Tanh()), spk1),
            "current": lambda: run(torch.tanh, net.fc2(spk1)),
        }[what]()
        return neuron(current, mem2)

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, out = net.lif1.reset_mem(), torch.zeros(BATCH, HIDDEN, dtype=x.dtype), []
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk2, mem2 = part(net, spk1, mem2)
            out.append(spk2)
        return torch.stack(out), mem2

    check(way, loop, skip=("lif2.mem",))


# Compiled code inside the model.


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="eager")


@pytest.mark.parametrize("way", [WAYS["band as events"], UNFUSED_BAND], ids=["fused", "unfused"])
def test_compiled_code_inside_the_loop(way: Way) -> None:
    """It is handed what stands in for tensors, and takes it step by step."""
    plain = [lambda spk: spk.view(spk.size(0), -1).relu() * len(spk), lambda spk: spk * 2 if spk.shape[1] > 2 else spk]

    def between(net: Any, spk: Any) -> Any:
        for function in net.functions:
            spk = function(spk)
        return 0.1 * net.layer(spk)

    def recipe(spike_grad: Any) -> Any:
        net = net_of(through(between))(spike_grad)
        net.functions, net.layer = plain, wake(nn.Linear(HIDDEN, HIDDEN))
        return net

    def go(net: Any) -> Any:
        return net(frames())

    stock, ours = recipe(SPIKE_GRAD), enabled(recipe, Way(float("inf"), way.fuse_time))
    ours.functions, ours.layer = [compiled(function) for function in plain], compiled(ours.layer)
    expected, got = go(stock), go(ours)
    torch.testing.assert_close(tuple(map(as_tensor, got)), expected, rtol=1e-8, atol=1e-8)
    weighted(expected).backward()
    weighted(got).backward()
    torch.testing.assert_close(ours.fc1.weight.grad, stock.fc1.weight.grad, rtol=1e-8, atol=1e-8)
    with way.policy(), torch.no_grad():
        sparse_backend.enable(ours, b_th=way.b_th, fuse_time=way.fuse_time)
        torch.testing.assert_close(tuple(map(as_tensor, go(ours))), go(stock), rtol=1e-8, atol=1e-8)
    torch.compiler.reset()
