"""Values of recorded calls taken in C++ code, by scripts and by sparse matrices: what is computed then keeps its
graph. And loops in modules that a method of the enabled model calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from fusion_loops import (
    BATCH,
    HIDDEN,
    STEPS,
    Loop,
    Net,
    check,
    frames,
    in_inference_mode,
    net_of,
    recorded,
    scripted_list,
    wake,
)
from helpers import assert_close
from pairs import SPIKE_GRAD, WAYS, Way, assert_equal_runs, leaky, longest
from torch import Tensor, nn

import sparse_backend
from sparse_backend.timefusion import recorder


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * 2 + x.sum()


ADJACENCY = (torch.arange(BATCH * BATCH).view(BATCH, BATCH) % 3 == 0).double()

#: what is done with a step's spikes or membrane
LOOKS: dict[str, Callable[[Any], Any]] = {
    "torch.tensor of scalars": lambda x: torch.tensor([x.mean(), x.sum()], dtype=torch.float64),
    "torch.as_tensor of scalars": lambda x: torch.as_tensor([x.mean(), x.sum()], dtype=torch.float64),
    "torch.tensor": lambda x: torch.tensor(x.detach()),
    "Variable": lambda x: torch.autograd.Variable(x).detach().clone(),
    "torch.FloatTensor": lambda x: torch.FloatTensor(x.detach().float()).detach().clone(),
    "a script": scripted,
    "a script of a list": lambda x: scripted_list([x, x]),
    "in inference mode": lambda x: in_inference_mode(x),
    "inside vmap": lambda x: torch.vmap(lambda w: (w * x.detach()).sum())(torch.arange(3.0, dtype=torch.float64)),
    "inside torch.func.grad": lambda x: torch.func.grad(lambda w: (w * x.detach()).sum())(torch.ones(()).double()),
    "a whole number": lambda x: torch.tensor([x[0].argmax(), (x > 0.2).sum()]),
    "a truth": lambda x: torch.tensor([(x > 0.2).any()]),
    "a mask as numbers": lambda x: torch.as_tensor(x > 0.2, dtype=torch.float64),
    "a sparse matrix": lambda x: ADJACENCY.to_sparse() @ x,
    "torch.mm of one": lambda x: torch.mm(ADJACENCY.to_sparse(), x),
    "one in rows": lambda x: ADJACENCY.to_sparse_csr() @ x,
}


def looking(look: Callable[[Any], Any], which: str) -> Loop:
    def loop(net: Net, x: Any) -> Any:
        mems, out, seen = net.mems(), [], []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
            if t == 4:
                seen.append(look(spk if which == "spikes" else mems[-1]))
        return torch.stack(out), mems[-1], seen

    return loop


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:Sparse CSR", "ignore:Converting a tensor")
@pytest.mark.parametrize("which", ["spikes", "membrane"])
@pytest.mark.parametrize("look", LOOKS)
def test_values_taken_in_the_middle_of_a_loop(way: Way, look: str, which: str) -> None:
    check(way, looking(LOOKS[look], which))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:Sparse CSR", "ignore:Converting a tensor")
@pytest.mark.parametrize("look", LOOKS)
def test_values_taken_of_what_a_forward_returns(way: Way, look: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        return torch.stack(spk_rec), torch.stack(mem_rec)

    def go(net: Any) -> Any:
        spk, mem = net(frames())
        return LOOKS[look](spk[2]), spk, mem

    assert_equal_runs(net_of(loop), go, way, runs=2)


def test_a_script_sees_dense_tensors() -> None:
    seen = []

    @torch.jit.script
    def size(x: Tensor) -> int:
        return x.numel()

    def loop(net: Net, x: Any) -> Any:
        spk_rec, _, _ = recorded(net, x)
        seen.append(size(spk_rec[0]))
        return torch.stack(spk_rec)

    net = sparse_backend.enable(net_of(loop)(SPIKE_GRAD), b_th=0.15)
    spk = net(frames())
    assert seen == [spk[0].numel()]
    assert size(spk) == spk.numel()


# Loops in modules inside the enabled one.


class Agent(nn.Module):
    """Two networks with loops of their own, which methods call; its own forward is not called."""

    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        self.actor, self.critic = net_of(usual)(spike_grad), net_of(usual)(spike_grad)

    def training_step(self, x: Any) -> Any:
        return self.actor(x), self.critic(x)


def usual(net: Net, x: Any) -> Any:
    spk_rec, mem_rec, mems = recorded(net, x)
    return torch.stack(spk_rec), torch.stack(mem_rec), mems


def test_loops_in_modules_that_a_method_calls(way: Way) -> None:
    net = assert_equal_runs(Agent, lambda net: net.training_step(frames()), way, runs=2)
    assert longest(net) == STEPS
    assert {layer.at_once for layer in sparse_backend.report(net).layers} == {STEPS}


class Block(nn.Module):
    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(12, HIDDEN), nn.Identity())
        self.lif = net_of(usual)(spike_grad).lif1

    def forward(self, x: Any, mem: Any) -> Any:
        return self.lif(self.inner(x), mem)


class OfBlocks(nn.Module):
    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        self.block = Block(spike_grad)

    def forward(self, x: Any) -> Any:
        mem, out = self.block.lif.reset_mem(), []
        for step in x:
            spk, mem = self.block(step, mem)
            out.append(spk)
        return torch.stack(out), mem


def test_the_outermost_forward_records(way: Way) -> None:
    net = assert_equal_runs(lambda grad: wake(OfBlocks(grad)), lambda net: net(frames()), way, runs=2)
    assert longest(net) == STEPS
    assert sparse_backend.report(net).layers[0].at_once == STEPS


def test_what_is_overridden_and_put_back() -> None:
    net = OfBlocks(SPIKE_GRAD)
    sparse_backend.enable(net, b_th=0.15)
    names = {name for name, module in net.named_modules() if "forward" in module.__dict__}
    assert names == {"", "block", "block.inner.0", "block.lif"}, "not torch's own containers"
    sparse_backend.enable(net, b_th=0.15, fuse_time=False)
    assert {name for name, module in net.named_modules() if "forward" in module.__dict__} == {
        "block.inner.0",
        "block.lif",
    }
    sparse_backend.enable(net, b_th=0.15)
    assert "forward" in net.block.__dict__
    sparse_backend.disable(net)
    assert not any("forward" in module.__dict__ for module in net.modules())


# What the report says of loops.


def note_of(net: nn.Module) -> str:
    return sparse_backend.report(net).note or ""


def test_a_forward_of_one_step_is_told_of_fuse_time() -> None:
    net = sparse_backend.enable(net_of(lambda net, x, mems: net.step(x, mems))(SPIKE_GRAD), b_th=0.15)
    mems = net.mems()
    for step in frames():
        _, mems = net(step, mems)
    assert "the forward is one step" in note_of(net) and "sparse_backend.fuse_time(net)" in note_of(net)


def test_a_loop_in_no_forward_is_told_of_fuse_time() -> None:
    net = sparse_backend.enable(net_of(usual)(SPIKE_GRAD), b_th=0.15)
    usual(net, frames())
    assert "no forward that holds these layers was called" in note_of(net)


def test_a_loop_that_looks_at_every_step_is_named() -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for step in x:
            spk, mems = net.step(step, mems)
            out.append(spk.sum().item())
        return out

    net = sparse_backend.enable(net_of(loop)(SPIKE_GRAD), b_th=0.15)
    net(frames())
    assert "every step ran alone" in note_of(net) and "test_fusion_values.py" in note_of(net)


def adapting(net: Net, x: Any) -> Any:
    """A trace of its spikes is fed back into a layer's current: its steps need each other, those of the last do not."""
    mems, trace, out = list(net.mems()), 0, []
    for step in x:
        spk, mems[0] = net.lif1(net.fc1(step) - trace, mems[0])
        trace = 0.9 * trace + 0.1 * spk
        spk, mems[2] = net.lif3(net.fc3(spk), mems[2])
        out.append(spk)
    return torch.stack(out)


def feeding_back(net: Net, x: Any) -> Any:
    """The last layer's spikes reach the first at the next step: no layer can run ahead."""
    mems, last, out = list(net.mems()), 0, []
    for step in x:
        spk, mems[0] = net.lif1(net.fc1(step) + last, mems[0])
        spk, mems[2] = net.lif3(net.fc3(spk), mems[2])
        last = spk.sum(1, keepdim=True)
        out.append(spk)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("loop", "what"),
    [
        (adapting, f"up to {STEPS} steps ran as one sequence, other layers one at a time"),
        (feeding_back, "every step ran alone, in their order"),
    ],
)
def test_layers_that_wait_for_each_other_are_told_of(loop: Loop, what: str) -> None:
    net = sparse_backend.enable(net_of(loop)(SPIKE_GRAD), b_th=0.15)
    net(frames())
    why = "what they are given depends on what the step before gave."
    assert note_of(net) == f"Time fusion: {what}: {why}"


class Deep(nn.Module):
    """More layers than Python has calls in one another, and the last one's spikes reach the first every other step."""

    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(350))
        self.lifs = nn.ModuleList(leaky(spike_grad, 0.9, 0.5) for _ in self.fcs)

    def forward(self, x: Any) -> Any:
        mems, back, total = [lif.reset_mem() for lif in self.lifs], 0, 0
        for t, step in enumerate(x):
            spk = step + back
            for i, (fc, lif) in enumerate(zip(self.fcs, self.lifs, strict=True)):
                spk, mems[i] = lif(1.1 * fc(spk), mems[i])
            back = back if t % 2 else 0.1 * spk
            total = total + spk
        return total


def test_a_net_deeper_than_pythons_stack() -> None:
    torch.manual_seed(0)
    net = Deep(SPIKE_GRAD).double()
    with torch.no_grad():
        for fc in net.fcs:
            fc.bias += 0.4
        ours, x = sparse_backend.enable(copy.deepcopy(net), b_th=0.15), frames()[:, :, :4]
        assert_close(ours(x), net(x))


class Refused(nn.Module):
    """Neurons that record nothing: snnTorch's own code runs them."""

    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        self.alpha = snn.Alpha(alpha=0.9, beta=0.8, spike_grad=spike_grad)
        self.lif = leaky(spike_grad, inhibition=True)

    def forward(self, x: Any) -> Any:
        state, mem = self.alpha.reset_mem(), self.lif.reset_mem()
        for step in x:
            spk, *state = self.alpha(step, *state)
            spk, mem = self.lif(step + spk, mem)
        return spk


def test_a_forward_that_records_nothing_is_not_called_missing() -> None:
    net = sparse_backend.enable(Refused(SPIKE_GRAD).double(), b_th=0.15)
    net(frames())
    assert note_of(net) == "Time fusion: every step ran alone."


def test_what_cannot_be_accelerated_is_not_told_to_be() -> None:
    net = nn.Sequential(snn.Alpha(alpha=0.9, beta=0.8))
    assert note_of(net) == "Nothing is accelerated, nor can be."
    assert note_of(nn.Sequential(leaky(SPIKE_GRAD))) == "Nothing is accelerated. Call sparse_backend.enable(net)."


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that begin from now on."""
    begun, begin = [], recorder.Recording.__init__

    def counted(self: Any) -> None:
        begun.append(self)
        begin(self)

    monkeypatch.setattr(recorder.Recording, "__init__", counted)
    return begun


@pytest.mark.parametrize("where", ["in the forward", "around it", "of neurons that record nothing", "of feedback"])
def test_a_loop_that_never_fuses_is_recorded_ever_more_rarely(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is tried again now and then."""

    def loop(net: Net, x: Any) -> Any:
        mems = net.mems()
        for step in x:
            spk, mems = net.step(step, mems)
            spk.sum().item()
        return mems

    make = Refused if where == "of neurons that record nothing" else net_of(adapting if "feedback" in where else loop)
    net = sparse_backend.enable(make(SPIKE_GRAD).double(), b_th=0.15)
    begun = recordings(monkeypatch)
    for _ in range(4 + 1 + 8 + 1 + 3):
        if where == "around it":
            with sparse_backend.fuse_time(net):
                loop(net, frames())
        else:
            net(frames())
    assert len(begun) == 3


# Rules of plasticity.


def plus(layer: nn.Linear, before: Any, after: Any) -> None:
    layer.weight.data += 0.1 * after.t() @ before + 0.02


def add(layer: nn.Linear, before: Any, after: Any) -> None:
    layer.weight.data.add_(0.1 * after.t() @ before)


def normalise(layer: nn.Linear, before: Any, after: Any) -> None:
    layer.weight.data /= layer.weight.data.norm(dim=1, keepdim=True) + after.mean()


def biased(layer: nn.Linear, before: Any, after: Any) -> None:
    layer.bias.data.add_(0.1 * after.mean(0))


def by_torch(layer: nn.Linear, before: Any, after: Any) -> None:
    layer.weight.add_(0.1 * after.t() @ before)


@pytest.mark.parametrize("rule", [plus, add, normalise, biased, by_torch], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("b_th", [0.15, float("inf")])
def test_weights_that_a_rule_writes_to_at_every_step(b_th: float, fuse_time: bool, rule: Any) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mems[0])
            spk2, mem2 = net.lif2(net.fc2(spk1), mems[1])
            spk3, mem3 = net.lif3(net.fc3(spk2), mems[2])
            mems = mem1, mem2, mem3
            out.append(mem3)
            rule(net.fc2, spk1, spk2)
            rule(net.fc3, spk2, spk3)
        return torch.stack(out)

    results = []
    for ours in (False, True):
        net = net_of(loop)(SPIKE_GRAD)
        if ours:
            sparse_backend.enable(net, b_th=b_th, fuse_time=fuse_time)
        with torch.no_grad():
            results.append([net(frames()).clone() for _ in range(2)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


# In-place detaching where nothing learns, and the framework's own code between recorded calls.


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_spikes_and_states_may_be_detached_in_place(way: Way, every: int, grad: bool) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            if t % every == every - 1:
                spk.detach_(), [mem.detach_() for mem in mems]
            out.append(spk * 2)
        return torch.stack(out), spk, mems

    if grad:
        check(way, loop)
        return
    with torch.no_grad():
        spk_rec, spk, mems = sparse_backend.enable(net_of(loop)(SPIKE_GRAD), b_th=way.b_th)(frames())
        for value in (spk_rec, spk, *mems):
            value.detach_()


@pytest.mark.parametrize("kind", [snn.RLeaky, snn.RSynaptic])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_neurons_that_run_the_frameworks_own_code_in_a_fused_loop(kind: Any, reset: str) -> None:
    def recipe(spike_grad: Any) -> Any:
        states = {"alpha": 0.8} if kind is snn.RSynaptic else {}
        lif = kind(beta=0.9, linear_features=HIDDEN, spike_grad=spike_grad, reset_mechanism=reset, inhibition=True,
                   init_hidden=True, **states)  # fmt: skip
        return wake(Mixed(lif, spike_grad))

    net = assert_equal_runs(recipe, lambda net: net(frames()), WAYS["inf"], runs=2)
    assert sparse_backend.report(net).layers[0].path == "framework"


class Mixed(nn.Module):
    def __init__(self, lif: Any, spike_grad: Any) -> None:
        super().__init__()
        self.fc1, self.lif1, self.fc2 = nn.Linear(12, HIDDEN), lif, nn.Linear(HIDDEN, HIDDEN)
        self.lif2 = net_of(usual)(spike_grad).lif2

    def forward(self, x: Any) -> Any:
        self.lif1.reset_mem()
        mem, out = self.lif2.reset_mem(), []
        for step in x:
            spk, mem = self.lif2(self.fc2(self.lif1(self.fc1(step))), mem)
            out.append(spk)
        return torch.stack(out), mem
