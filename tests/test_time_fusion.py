"""Time fusion against the step order: loops as people write them, and loops nobody writes, equal stock snnTorch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparse_backend
from sparse_backend.tensorlike import TensorLike
from sparse_backend.timefusion.recorder import Placeholder

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")

INPUTS, HIDDEN, SECOND, OUTPUTS = 12, 9, 7, 4


def spike_grad(x: torch.Tensor) -> torch.Tensor:
    """Heaviside with the derivative of a fast sigmoid, in the dtype of x."""
    soft = x / (1 + 10 * x.abs())
    return (x > 0).to(x.dtype) + (soft - soft.detach())


class Net(nn.Module):
    """Three layers in float64; a test gives it its forward."""

    def __init__(self, loop: Callable[..., Any], init_hidden: bool = False, **options: Any) -> None:
        super().__init__()
        self.loop = loop
        torch.manual_seed(0)

        def layer(beta: float, threshold: float, **more: Any) -> Any:
            kwargs = {"init_hidden": init_hidden, **options, **more}
            return snn.Leaky(torch.tensor(beta), torch.tensor(threshold), spike_grad, **kwargs)

        self.fc1, self.lif1 = nn.Linear(INPUTS, HIDDEN), layer(0.9, 0.5)
        self.fc2, self.lif2 = nn.Linear(HIDDEN, SECOND), layer(0.8, 0.4)
        self.fc3, self.lif3 = nn.Linear(SECOND, OUTPUTS), layer(0.8, 0.4, output=init_hidden)
        with torch.no_grad():
            for fc in (self.fc1, self.fc2, self.fc3):
                fc.weight.mul_(3)
        self.double()

    def mems(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(0, dtype=torch.float64) for _ in range(3))

    def step(self, x: Any, mems: Any) -> tuple[Any, tuple[Any, ...]]:
        spk1, mem1 = self.lif1(self.fc1(x), mems[0])
        spk2, mem2 = self.lif2(self.fc2(spk1), mems[1])
        spk3, mem3 = self.lif3(self.fc3(spk2), mems[2])
        return spk3, (mem1, mem2, mem3)

    def forward(self, x: Any) -> Any:
        return self.loop(self, x)


LOOPS: dict[str, tuple[Callable[..., Any], int | None]] = {}
STEPS, BATCH = 11, 5


def loop(longest: int | None) -> Callable[..., Any]:
    """A loop under test, and how many steps of a layer have to run as one sequence (None: any number)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LOOPS[function.__name__] = (function, longest)
        return function

    return register


@loop(longest=STEPS)
def explicit_mem(net: Net, x: Any) -> Any:
    mems, spikes, last = net.mems(), [], []
    for t in range(len(x)):
        spk, mems = net.step(x[t], mems)
        spikes.append(spk)
        last.append(mems[-1])
    return torch.stack(spikes), torch.stack(last)


@loop(longest=STEPS)
def final_mem(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        spk, mems = net.step(x[t], mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[-1]


@loop(longest=STEPS)
def hidden_mem_returned(net: Net, x: Any) -> Any:
    mems, spikes, first = net.mems(), [], []
    for t in range(len(x)):
        spk, mems = net.step(x[t], mems)
        spikes.append(spk)
        first.append(mems[0])
    return torch.stack(spikes).sum(0), first[3], first[-1], torch.stack(first[2:5]), torch.stack(first)


@loop(longest=STEPS)
def running_sums(net: Net, x: Any) -> Any:
    mems, total, other = net.mems(), 0, None
    for step in x:
        spk, mems = net.step(step, mems)
        total = total + spk
        other = spk if other is None else other + spk
    return total, other, mems[-1]


@loop(longest=STEPS)
def running_sum_kept(net: Net, x: Any) -> Any:
    mems, total, kept = net.mems(), torch.zeros(x.shape[1], OUTPUTS, dtype=torch.float64), []
    for step in x:
        spk, mems = net.step(step, mems)
        total = total + spk
        kept.append(total)
    return torch.stack(kept), total


@loop(longest=None)
def sum_in_place(net: Net, x: Any) -> Any:
    mems, total = net.mems(), torch.zeros(x.shape[1], OUTPUTS, dtype=torch.float64)
    for step in x:
        spk, mems = net.step(step, mems)
        total += spk
    return total, mems[-1]


@loop(longest=STEPS)
def python_sum_and_last(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for step in x:
        spk, mems = net.step(step, mems)
        spikes.append(spk)
    return sum(spikes), spikes[-1], torch.cat(spikes, dim=1)


@loop(longest=STEPS)
def static_slice(net: Net, x: Any) -> Any:
    mems, spikes, image = net.mems(), [], x[0]
    for _ in range(STEPS):
        spk, mems = net.step(image, mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[0]


@loop(longest=STEPS)
def static_tensor(net: Net, x: Any) -> Any:
    mems, spikes, image = net.mems(), [], x[0].clone()
    for _ in range(STEPS):
        spk, mems = net.step(image, mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[0]


@loop(longest=STEPS)
def fresh_tensors(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        spk, mems = net.step(x[t].clone(), mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[1]


@loop(longest=STEPS)
def batch_first_input(net: Net, x: Any) -> Any:
    x = x.transpose(0, 1).contiguous()
    mems, spikes = net.mems(), []
    for t in range(x.shape[1]):
        spk, mems = net.step(x[:, t], mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[2]


@loop(longest=STEPS)
def residual(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes = []
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        spk3, mem3 = net.lif3(net.fc3(spk2 * 0.5 + spk2), mem3)
        spikes.append(spk3 + spk3 * 2)
    return torch.stack(spikes), mem1


@loop(longest=None)
def feedback(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes, spk2 = [], torch.zeros(x.shape[1], SECOND, dtype=torch.float64)
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]) + spk2[:, :1], mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
        spikes.append(spk3)
    return torch.stack(spikes), mem1


@loop(longest=3)
def truncated_every_three(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        if t % 3 == 0:
            mems = tuple(mem.detach() for mem in mems)
        spk, mems = net.step(x[t], mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[-1]


@loop(longest=None)
def early_exit(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        spk, mems = net.step(x[t], mems)
        spikes.append(spk)
        if torch.stack(spikes).sum().item() > 20:
            break
    return torch.stack(spikes), mems[-1]


@loop(longest=STEPS)
def preallocated(net: Net, x: Any) -> Any:
    mems, out = net.mems(), torch.zeros(len(x), x.shape[1], OUTPUTS, dtype=torch.float64)
    for t in range(len(x)):
        spk, mems = net.step(x[t], mems)
        out[t] = spk
    return out, mems[-1]


@loop(longest=None)
def in_place_on_states(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes = []
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        spk2 = spk2.clone()
        spk2 *= 0.5
        spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
        if t == 4:
            mem3 = mem3.clone()
            mem3[mem3 < 0.1] = 0
        spikes.append(spk3)
    return torch.stack(spikes), mem3


@loop(longest=STEPS)
def dropout(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes = []
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        spk1 = nn.functional.dropout(spk1, 0.3, net.training)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
        spikes.append(nn.functional.dropout(spk3, 0.1, net.training))
    return torch.stack(spikes), mem3


@loop(longest=None)
def random_in_between(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        spk, mems = net.step(x[t] * (torch.rand_like(x[t]) < 0.8), mems)
        spikes.append(spk + torch.rand(1, dtype=torch.float64))
    return torch.stack(spikes), mems[-1]


@loop(longest=None)
def layer_used_twice(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes = []
    for t in range(len(x)):
        current = net.fc1(x[t])
        spk1, mem1 = net.lif1(current, mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        again = net.fc2(spk1)
        spk3, mem3 = net.lif3(net.fc3(spk2) + again[:, :OUTPUTS] + current[:, :OUTPUTS], mem3)
        spikes.append(spk3)
    return torch.stack(spikes), mem3


@loop(longest=STEPS)
def state_branches(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes = []
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        current = net.fc3(spk2)
        spk3, following = net.lif3(current, mem3)
        other, _ = net.lif3(current * 2, mem3)
        mem3 = following
        spikes.append(spk3 + other)
    return torch.stack(spikes), mem3


@loop(longest=None)
def grad_mode_changes(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        with torch.set_grad_enabled(t > 3):
            spk, mems = net.step(x[t], mems)
        spikes.append(spk)
    return torch.stack(spikes), mems[-1]


@loop(longest=None)
def grad_mode_changes_with_mem_kept(net: Net, x: Any) -> Any:
    for lif in (net.lif1, net.lif2, net.lif3):
        lif.mem = torch.zeros(0, dtype=torch.float64)
    spikes = []
    for t in range(len(x)):
        with torch.set_grad_enabled(t % 4 != 2):
            spk1, _ = net.lif1(net.fc1(x[t]))
            spk2, _ = net.lif2(net.fc2(spk1))
        spk3, mem = net.lif3(net.fc3(spk2))
        spikes.append(spk3)
    return torch.stack(spikes), mem


class Doubled(torch.autograd.Function):
    """A function of the user's own, which computes in its forward without a graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


@loop(longest=None)
def custom_function(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    spikes = []
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        dense = spk1 if type(spk1) is torch.Tensor else spk1.to_dense()
        spk2, mem2 = net.lif2(net.fc2(Doubled.apply(dense)), mem2)
        spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
        spikes.append(spk3)
    return torch.stack(spikes), mem3


@loop(longest=None)
def mem_attribute_read(net: Net, x: Any) -> Any:
    mems, spikes = net.mems(), []
    for t in range(len(x)):
        spk, mems = net.step(x[t], mems)
        spikes.append(spk + net.lif1.mem.sum())
    return torch.stack(spikes), net.lif3.mem


@loop(longest=STEPS)
def mem_kept_by_the_layer(net: Net, x: Any) -> Any:
    for lif in (net.lif1, net.lif2, net.lif3):
        lif.mem = torch.zeros(0, dtype=torch.float64)
    spikes = []
    for t in range(len(x)):
        spk1, _ = net.lif1(net.fc1(x[t]))
        spk2, _ = net.lif2(net.fc2(spk1))
        spk3, mem = net.lif3(net.fc3(spk2))
        spikes.append(spk3)
    return torch.stack(spikes), mem


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reset_mechanism": "zero", "learn_beta": True},
    {"learn_threshold": True, "reset_delay": False},
    {"reset_mechanism": "none", "learn_beta": True, "learn_threshold": True},
]


def draw_input(seed: int = 1, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(steps, BATCH, INPUTS, generator=generator) < 0.3).double()


def outcome(net: Net, x: Any) -> dict[str, Any]:
    """Everything that must be equal: outputs, gradients, hidden states, the random state."""
    torch.manual_seed(2)
    out = net(x)
    assert not any(type(value) is Placeholder for value in out), "a placeholder left the forward"
    drawn = torch.rand(3)
    loss = sum((o * torch.linspace(0.1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in out)
    loss.backward()
    states = [lif.mem for lif in (net.lif1, net.lif2, net.lif3)]
    assert not any(isinstance(mem, TensorLike) for mem in states), "a placeholder stayed in a layer"
    return {
        "outputs": [o.detach() + 0 for o in out],
        "gradients": [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()],
        "states": [mem.detach() for mem in states],
        "random": [drawn],
    }


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        for position, (a, b) in enumerate(zip(got[name], values, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name, p=position: f"{n}[{p}]: {m}")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("name", LOOPS)
def test_equals_stock(name: str, options: dict[str, Any]) -> None:
    function, longest = LOOPS[name]
    x = draw_input()
    expected = outcome(Net(function, **options), x)
    for b_th in (float("inf"), 1e6):
        net = sparse_backend.enable(Net(function, **options), b_th=b_th)
        assert_equal(outcome(net, x), expected)
        if longest is not None:
            ran = net.__dict__["_sparse_backend"].tally.longest
            assert ran >= longest, f"{ran} steps ran as one sequence, expected {longest}"


@pytest.mark.parametrize("name", ["explicit_mem", "running_sums", "residual", "dropout"])
def test_equals_the_step_form(name: str) -> None:
    """With a band that masks, the step form is the judge: it is held to stock elsewhere."""
    function, _ = LOOPS[name]
    x = draw_input()
    expected = outcome(sparse_backend.enable(Net(function), b_th=0.15, fuse_time=False), x)
    assert_equal(outcome(sparse_backend.enable(Net(function), b_th=0.15), x), expected)


def test_events_indexed_by_the_loop() -> None:
    x = draw_input()
    expected = outcome(Net(explicit_mem), x)
    net = sparse_backend.enable(Net(explicit_mem), b_th=1e6)
    assert_equal(outcome(net, sparse_backend.EventTensor.from_dense(x)), expected)
    assert net.__dict__["_sparse_backend"].tally.longest == STEPS


def test_a_refilled_input_buffer() -> None:
    def refill(net: Net, x: Any) -> Any:
        mems, spikes, buffer = net.mems(), [], torch.empty_like(x[0])
        for t in range(len(x)):
            buffer.copy_(x[t])
            spk, mems = net.step(buffer, mems)
            spikes.append(spk)
        return torch.stack(spikes), mems[-1]

    x = draw_input()
    with torch.no_grad():
        expected, got = (net(x) for net in (Net(refill), sparse_backend.enable(Net(refill), b_th=0.2)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a + 0, b, rtol=1e-9, atol=1e-9)


def test_variable_lengths_and_several_batches() -> None:
    stock, net = Net(explicit_mem), sparse_backend.enable(Net(explicit_mem), b_th=1e6)
    for seed, steps in enumerate((5, 11, 1, 7)):
        x = draw_input(seed, steps)
        for model in (stock, net):
            model.zero_grad()
        assert_equal(outcome(net, x), outcome(stock, x))


def test_init_hidden_sequential_stepped_outside() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        lif = {"spike_grad": spike_grad, "init_hidden": True}
        net = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN),
            snn.Leaky(0.9, **lif),
            nn.Linear(HIDDEN, OUTPUTS),
            snn.Leaky(0.8, output=True, **lif),
        )
        return net.double()

    def run(net: nn.Sequential, x: Any, fuse: bool) -> dict[str, Any]:
        utils.reset(net)
        spikes, mems = [], []

        def go() -> None:
            for t in range(len(x)):
                spk, mem = net(x[t])
                spikes.append(spk)
                mems.append(mem)

        if fuse:
            with sparse_backend.fuse_time(net):
                go()
        else:
            go()
        out = [torch.stack(spikes), torch.stack(mems)]
        (out[0].sum() + (out[1] ** 2).sum()).backward()
        return {"outputs": [o.detach() + 0 for o in out], "gradients": [p.grad for p in net.parameters()]}

    x = draw_input()
    expected = run(build(), x, False)
    assert_equal(run(sparse_backend.enable(build(), b_th=1e6), x, True), expected)
    assert_equal(run(sparse_backend.enable(build(), b_th=1e6), x, False), expected)


@pytest.mark.parametrize("at", range(0, 3 * STEPS, 4))
def test_an_exception_leaves_the_model_usable(at: int) -> None:
    calls = [0]

    def breaks(net: Net, x: Any) -> Any:
        mems, spikes = net.mems(), []
        for t in range(len(x)):
            for mem in mems:
                if calls[0] == at:
                    calls[0] += 1
                    raise KeyboardInterrupt
                calls[0] += 1
                del mem
            spk, mems = net.step(x[t], mems)
            spikes.append(spk)
        return torch.stack(spikes), mems[-1]

    x = draw_input()
    net = sparse_backend.enable(Net(breaks), b_th=1e6)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    assert not any(isinstance(lif.mem, TensorLike) for lif in (net.lif1, net.lif2, net.lif3))
    assert_equal(outcome(net, x), outcome(Net(final_mem), x))


def test_wrong_shapes_raise_at_the_users_own_line() -> None:
    def wrong(net: Net, x: Any) -> Any:
        mems = net.mems()
        for t in range(len(x)):
            current = net.fc3(net.fc1(x[t]))  # the user's line
            _, mem = net.lif3(current, mems[2])
        return mem

    with pytest.raises(RuntimeError, match="cannot be multiplied") as stock:
        Net(wrong)(draw_input())
    with pytest.raises(RuntimeError, match="cannot be multiplied") as ours:
        sparse_backend.enable(Net(wrong), b_th=0.2)(draw_input())
    lines = [[entry.lineno for entry in info.traceback if entry.name == "wrong"] for info in (stock, ours)]
    assert lines[0] == lines[1]


def test_a_weight_changed_in_mid_loop_is_never_ignored() -> None:
    def edits(net: Net, x: Any) -> Any:
        mems, spikes = net.mems(), []
        for t in range(len(x)):
            if t == 5:
                with torch.no_grad():
                    net.fc2.weight.mul_(0.5)
            spk, mems = net.step(x[t], mems)
            spikes.append(spk)
        return torch.stack(spikes), mems[-1]

    with torch.no_grad(), pytest.raises(RuntimeError, match="changed in place after a recorded call"):
        sparse_backend.enable(Net(edits), b_th=0.2)(draw_input())


def test_weights_may_change_between_values() -> None:
    """An optimiser step after loss.backward() inside the loop: what was recorded has run by then."""

    def online(net: Net, x: Any) -> Any:
        mems, losses = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], tuple(mem.detach() for mem in mems))
            loss = (spk.sum() + (mems[-1] ** 2).sum()) / 10
            net.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
            losses.append(loss.detach())
        return (torch.stack(losses),)

    stock, net = Net(online), sparse_backend.enable(Net(online), b_th=float("inf"))
    x = draw_input()
    torch.testing.assert_close(net(x), stock(x), rtol=1e-9, atol=1e-9)
    for a, b in zip(net.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_settings_changed_in_mid_loop() -> None:
    def changes(net: Net, x: Any) -> Any:
        mems, spikes = net.mems(), []
        for t in range(len(x)):
            net.lif2.beta = torch.tensor(0.8 if t < 5 else 0.3, dtype=torch.float64)
            net.lif3.threshold = torch.tensor(0.4 if t < 7 else 0.2, dtype=torch.float64)
            spk, mems = net.step(x[t], mems)
            spikes.append(spk)
        return torch.stack(spikes), mems[-1]

    x = draw_input()
    assert_equal(outcome(sparse_backend.enable(Net(changes), b_th=1e6), x), outcome(Net(changes), x))


def test_nothing_recorded_outlives_the_forward() -> None:
    alive: list[weakref.ref] = []

    def watched(net: Net, x: Any) -> Any:
        mems, spikes = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            alive.append(weakref.ref(spk))
            spikes.append(spk)
        return torch.stack(spikes), mems[-1]

    net = sparse_backend.enable(Net(watched), b_th=0.2)
    out = net(draw_input())
    assert not any(ref() is not None for ref in alive)
    del out


def test_threads_record_their_own_forwards() -> None:
    x = draw_input()
    expected = outcome(Net(explicit_mem), x)
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        net = nets[number]
        out = net(x)
        sum((o * torch.linspace(0.1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in out).backward()
        results[number] = [p.grad for p in net.parameters()]

    nets = [sparse_backend.enable(Net(explicit_mem), b_th=1e6) for _ in range(3)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grads in results.values():
        for a, b in zip(grads, expected["gradients"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_two_models_in_one_forward() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Net(explicit_mem), Net(running_sums)

        def forward(self, x: Any) -> Any:
            spikes, mems = self.a(x)
            total, *_ = self.b(x)
            return spikes, mems, total

    x = draw_input()
    stock, net = Two(), sparse_backend.enable(Two(), b_th=1e6)
    for a, b in zip(net(x), stock(x), strict=True):
        torch.testing.assert_close(a + 0, b, rtol=1e-9, atol=1e-9)


def test_checkpoint_around_and_inside() -> None:
    from torch.utils.checkpoint import checkpoint

    def inside(net: Net, x: Any) -> Any:
        mems, spikes = net.mems(), []
        for t in range(len(x)):
            spk, mems = checkpoint(net.step, x[t], mems, use_reentrant=False)
            spikes.append(spk)
        return torch.stack(spikes), mems[-1]

    x = draw_input()
    expected = outcome(Net(final_mem), x)
    got = outcome(sparse_backend.enable(Net(inside), b_th=1e6), x)
    # what a layer's mem is after recomputing depends on where the recomputation stops, in stock too
    assert_equal(got, {name: expected[name] for name in ("outputs", "gradients")})
    reentrant = sparse_backend.enable(Net(final_mem), b_th=1e6)
    for a, b in zip(
        checkpoint(reentrant, x.clone().requires_grad_(), use_reentrant=True), expected["outputs"], strict=True
    ):
        torch.testing.assert_close(a.detach() + 0, b, rtol=1e-9, atol=1e-9)
    net = sparse_backend.enable(Net(final_mem), b_th=1e6)
    spikes, mems = checkpoint(net, x, use_reentrant=False)
    loss = sum((o * torch.linspace(0.1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in (spikes, mems))
    loss.backward()
    for p, grad in zip(net.parameters(), expected["gradients"], strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


def test_the_report_names_the_line_that_forced_values() -> None:
    net = sparse_backend.enable(Net(early_exit), b_th=1e6)
    net(draw_input())
    assert "test_time_fusion.py:" in str(sparse_backend.report(net))
    net = sparse_backend.enable(Net(explicit_mem), b_th=1e6)
    net(draw_input())
    assert f"up to {STEPS} steps" in str(sparse_backend.report(net))


def test_fusion_can_be_turned_off() -> None:
    net = sparse_backend.enable(Net(explicit_mem), b_th=0.2, fuse_time=False)
    assert "forward" not in net.__dict__
    sparse_backend.enable(net, b_th=0.2)
    assert "forward" in net.__dict__
    sparse_backend.disable(net)
    assert "forward" not in net.__dict__


def test_a_custom_function_takes_sparse_spikes() -> None:
    """torch hands a custom function's input to C++ without asking it; a gradient must not get lost there."""

    def applied(net: Net, x: Any) -> Any:
        spk, mem = net.lif1(net.fc1(x[0]), net.mems()[0])
        return Doubled.apply(spk), mem

    assert_equal(
        outcome(sparse_backend.enable(Net(applied), b_th=1e6), draw_input()), outcome(Net(applied), draw_input())
    )


# Programs nobody wrote: every step does the same few random things to what it has.

ACTIONS = ["lif1", "lif2", "add", "scale", "linear", "force", "detach", "relu", "dropout", "sum", "feed"]


def program(actions: list[str], static: bool) -> Callable[..., Any]:
    def run(net: Net, x: Any) -> Any:
        square1, square2 = net.lif1, net.lif2
        mem1 = mem2 = torch.zeros(0, dtype=torch.float64)
        last = torch.zeros(x.shape[1], HIDDEN, dtype=torch.float64)
        total, rec, mems = 0, [], []
        for t in range(len(x)):
            values = [net.fc1(x[0] if static else x[t])]
            for action in actions:
                value = values[-1]
                if action == "lif1":
                    value, mem1 = square1(value, mem1)
                elif action == "lif2":
                    value, mem2 = square2(value, mem2)
                elif action == "add":
                    value = value + values[0]
                elif action == "scale":
                    value = value * 0.7
                elif action == "linear":
                    value = net.square(value)
                elif action == "force" and t % 3 == 1:
                    value = value + 0.01 * float(value.detach().sum() > 1)
                elif action == "detach" and t % 4 == 2:
                    mem1 = mem1.detach()
                elif action == "relu":
                    value = torch.relu(value)
                elif action == "dropout":
                    value = nn.functional.dropout(value, 0.2)
                elif action == "sum":
                    total = total + value
                elif action == "feed":
                    value = value + 0.1 * last
                values.append(value)
            last = values[-1]
            rec.append(last)
            mems.append(mem1)
        out = [torch.stack(rec), torch.stack(mems)] if mem1.numel() else [torch.stack(rec)]
        return (*out, total) if isinstance(total, torch.Tensor) else tuple(out)

    return run


@settings(max_examples=40, deadline=None)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=7),
    static=st.booleans(),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 3),
)
def test_random_programs(actions: list[str], static: bool, options: dict[str, Any], seed: int) -> None:
    def build() -> Net:
        net = Net(program(actions, static), **options)
        torch.manual_seed(3)
        net.square = nn.Linear(HIDDEN, HIDDEN).double()
        return net

    x = draw_input(seed, 6)
    expected = outcome(build(), x)
    assert_equal(outcome(sparse_backend.enable(build(), b_th=1e6), x), expected)
