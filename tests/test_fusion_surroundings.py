"""Loops under time fusion inside everything else a script has: torch's transforms and modes, hooks, other models,
threads, replicas, other neurons."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fusion_loops import (
    BATCH,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    STEPS,
    Net,
    check,
    check_with,
    frames,
    net_of,
    recorded,
    right_or_clear_error,
    same_values,
    stock_and_enabled,
    wake,
)
from helpers import SURROGATES, assert_close, normal
from pairs import (
    SPIKE_GRAD,
    Way,
    assert_equal_runs,
    assert_same,
    enabled,
    leaky,
    outcome,
    stock,
    weighted,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparse_backend
from sparse_backend.deferred import WeightCache

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")


pytestmark = pytest.mark.usefixtures("neurons")


# Torch's own machinery around and inside the loop.


def test_functional_call(way: Way) -> None:
    def go(net: Any) -> Any:
        parameters = {name: 1.1 * p for name, p in net.named_parameters()}
        return torch.func.functional_call(net, parameters, (frames(),))

    assert_equal_runs(net_of(lambda net, x: recorded(net, x)[:2]), go, way, runs=2)


def test_functional_call_of_a_layer_inside_the_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, _ = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            current = torch.func.functional_call(net.fc2, {"weight": net.fc2.weight * (1 + 0.1 * t)}, (spk1,))
            spk2, mem2 = net.lif2(current, mem2)
            out.append(spk2)
        return torch.stack(out), mem1

    check(way, loop)


def test_vmap_and_grad_around(way: Way) -> None:
    """Gradients per sample."""
    x = frames()

    def gradients(net: Any) -> Any:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        buffers = dict(net.named_buffers())

        def loss(parameters: Any, sample: Tensor) -> Tensor:
            out = torch.func.functional_call(net, (parameters, buffers), (sample.unsqueeze(1),))
            return weighted(out)

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)

    def loop(net: Net, x: Any) -> Any:
        mems = tuple(torch.zeros(1, n, dtype=torch.float64) for n in (HIDDEN, HIDDEN, OUTPUTS))
        out = []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems[-1]

    spike_grad = SURROGATES["piecewise"]  # torch.func takes no autograd.Function of the old kind
    expected = gradients(net_of(loop)(spike_grad))  # not masked: under torch.func layers run the framework's own code
    with way.policy():
        got = gradients(enabled(net_of(loop), way, spike_grad))
    assert expected.keys() == got.keys()
    assert any(value.count_nonzero() for value in expected.values())
    for name, value in expected.items():
        assert_close(got[name], value, name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"reset_delay": False}, {"reset_mechanism": "zero", "learn_beta": True}])
def test_checkpoint_around(way: Way, reentrant: bool, options: dict[str, Any]) -> None:
    x = frames().requires_grad_()

    def go(net: Any) -> Any:
        return checkpoint(net, x, use_reentrant=reentrant)

    names = tuple(name for name, _ in net_of(lambda net, x: None)(None).named_buffers() if name.endswith("mem"))
    recipe = net_of(lambda net, x: tuple(map(torch.stack, recorded(net, x)[:2])), **options)
    assert_equal_runs(recipe, go, way, [x], 2, names)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside(way: Way, reentrant: bool) -> None:
    """Every second step is recomputed in the backward."""

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            if t % 2:
                spk, mems = checkpoint(net.step, x[t], mems, use_reentrant=reentrant)
            else:
                spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems[-1]

    check(way, loop, skip=("lif1.mem", "lif2.mem", "lif3.mem"))


def test_checkpoint_of_segments(way: Way) -> None:
    def segment(net: Net, x: Any, *mems: Any) -> Any:
        out = []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), *mems

    def loop(net: Net, x: Any) -> Any:
        start = [torch.zeros(BATCH, n, dtype=torch.float64) for n in (HIDDEN, HIDDEN, OUTPUTS)]
        first, *mems = checkpoint(segment, net, x[:3], *start, use_reentrant=False)
        second, *mems = checkpoint(segment, net, x[3:], *mems, use_reentrant=False)
        return first, second, mems

    check(way, loop, skip=("lif1.mem", "lif2.mem", "lif3.mem"))


def test_no_grad_inside_the_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            with torch.no_grad() if t in (0, 1, 4) else nullcontext():
                spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems

    check(way, loop)


def test_no_grad_around_a_layer(way: Way) -> None:
    """A frozen feature extractor inside a model that learns."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            with torch.no_grad():
                spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            with torch.no_grad():
                rate = spk2.mean()
            spk3, mem3 = net.lif3(net.fc3(spk2) + rate, mem3)
            out.append(spk3)
        return torch.stack(out), mem1

    check(way, loop)


@pytest.mark.parametrize("how", ["looked at", "fed to a layer"])
def test_values_used_first_without_gradient(way: Way, how: str) -> None:
    """A monitor under no_grad takes nothing from the graph."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            current = net.fc1(x[t])
            with torch.no_grad():
                net.lif2(current, mem2) if how == "fed to a layer" else float(current.mean())
            spk1, mem1 = net.lif1(current, mem1)
            with torch.no_grad():
                net.lif2(net.fc2(spk1), mem2) if how == "fed to a layer" else float(spk1.mean() + mem1.max())
            spk2, mem2 = net.lif2(net.fc2(spk1) + 0.1 * mem1, mem2)
            out += [spk2, current]
        return out, mem1, mem3

    check(way, loop)


def test_grad_enabled_inside_no_grad(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            with torch.enable_grad() if t > 3 else nullcontext():
                spk, mems = net.step(x[t], mems)
            out.append(spk)
        return out[-1], mems

    def go(net: Any) -> Any:
        with torch.no_grad():
            return net(frames())

    assert_equal_runs(net_of(loop), go, way, runs=2)


def test_inference_mode_inside_the_loop(way: Way) -> None:
    """Steps to settle, of which nothing is learned, then steps that learn."""

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            with torch.inference_mode(t < 3):
                spk, mems = net.step(x[t], mems)
            if t == 2:
                mems = tuple(mem.clone() for mem in mems)
            out.append(spk.clone())
        return torch.stack(out[3:]), mems

    check(way, loop)


def test_inference_mode_around(way: Way) -> None:
    same_values(way, lambda net, x: tuple(map(torch.stack, recorded(net, x)[:2])), torch.inference_mode)


def test_saved_tensors_hooks_around(way: Way) -> None:
    def go(net: Any) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return net(frames())

    assert_equal_runs(net_of(lambda net, x: recorded(net, x)[:2]), go, way, runs=2)


def test_anomaly_detection_around(way: Way) -> None:
    def go(net: Any) -> Any:
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            return net(frames())

    assert_equal_runs(net_of(lambda net, x: recorded(net, x)[:2]), go, way, runs=2)


def test_backward_twice(way: Way) -> None:
    results = []
    for net, context in stock_and_enabled(way, lambda net, x: recorded(net, x)[:2]):
        with context:
            first, second = net(frames(1)), net(frames(2))
            loss = weighted([first, second])
            loss.backward(retain_graph=True)
            loss.backward()
            weighted(net(frames(3))).backward()
            results.append([p.grad for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        assert_close(b, a)


def test_gradients_of_inputs_alone(way: Way) -> None:
    results = []
    for net, context in stock_and_enabled(way, lambda net, x: recorded(net, x)[:2]):
        with context:
            x = normal((STEPS, BATCH, INPUTS), 4).requires_grad_()
            (grad,) = torch.autograd.grad(weighted(net(x)), x)
            assert all(p.grad is None for p in net.parameters())
            results.append(grad)
    assert results[0].count_nonzero()
    assert_close(results[1], results[0])


def test_torch_modes_around(way: Way) -> None:
    """Tools that look at every operation."""

    def go(net: Any) -> Any:
        with FlopCounterMode(display=False), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            return net(frames())

    assert_equal_runs(net_of(lambda net, x: recorded(net, x)[:2]), go, way, runs=2)


def test_two_losses_on_one_forward(way: Way) -> None:
    results = []
    for net, context in stock_and_enabled(way, lambda net, x: recorded(net, x)):
        with context:
            spk_rec, mem_rec, mems = net(frames())
            weighted(spk_rec).backward(retain_graph=True)
            weighted(mem_rec).backward(retain_graph=True)
            results.append([p.grad.clone() for p in net.parameters()])
            results[-1] += torch.autograd.grad(mems[0].sum(), list(net.fc1.parameters()))
    for a, b in zip(*results, strict=True):
        assert_close(b, a)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Bilinear": lambda: Twice(nn.Bilinear(HIDDEN, HIDDEN, HIDDEN)),
    "GRUCell": lambda: nn.GRUCell(HIDDEN, HIDDEN),
    "LSTMCell": lambda: First(nn.LSTMCell(HIDDEN, HIDDEN)),
    "LSTM": lambda: First(nn.LSTM(HIDDEN, HIDDEN)),
    "MultiheadAttention": lambda: Thrice(nn.MultiheadAttention(HIDDEN, 2)),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(HIDDEN, 2, 8, dropout=0.0),
    "Embedding": lambda: Tokens(nn.Embedding(3, 1)),
    "PReLU": lambda: nn.PReLU(),
    "Sequential": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 5)), nn.AvgPool1d(1), nn.Flatten(), nn.Linear(HIDDEN, HIDDEN)
    ),
    "ConvTranspose1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 5)), nn.ConvTranspose1d(2, 2, 1), nn.Flatten()),
    "Upsample": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 5)), nn.Upsample(scale_factor=2), nn.AvgPool1d(2), nn.Flatten()
    ),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(HIDDEN, HIDDEN)})["a"],
    "Linear without bias": lambda: nn.Linear(HIDDEN, HIDDEN, bias=False),
    "subclass of Linear": lambda: Doubling(HIDDEN, HIDDEN),
    "autograd function": lambda: Applied(),
}


class Twice(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return self[0](x, x)


class Thrice(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return self[0](x, x, x)[0]


class First(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return self[0](x)[0]


class Tokens(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return self[0]((x > 0).long()).squeeze(-1) + x


class Doubling(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Straight(torch.autograd.Function):
    """A user's own function with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.floor(2 * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class Applied(nn.Module):
    def forward(self, x: Any) -> Any:
        return Straight.apply(x)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("where", ["current", "spikes"])
def test_modules_of_torch_between(way: Way, module: str, where: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, _ = net.mems()
        out = []
        for t in range(len(x)):
            current = net.fc1(x[t])
            spk1, mem1 = net.lif1(net.module(current) if where == "current" else current, mem1)
            spk2, mem2 = net.lif2(net.fc2(net.module(spk1) if where == "spikes" else spk1), mem2)
            out.append(spk2)
        return torch.stack(out), mem1, mem2

    def make() -> nn.Module:
        torch.manual_seed(4)
        return MODULES[module]()

    check_with(way, loop, module=make)


# Hooks and parametrisations.


def test_forward_hooks(way: Way) -> None:
    """Hooks see every call, with values, in the order of the steps."""
    logs: list[list[Any]] = []

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2]))
        log: list[Any] = []
        logs.append(log)
        net.fc2.register_forward_hook(lambda module, args, out: log.append(("fc2", args[0].sum() + out.mean())))
        net.lif1.register_forward_hook(lambda module, args, out: log.append(("lif1", out[0].sum(), out[1].max())))
        net.lif3.register_forward_pre_hook(lambda module, args: log.append(("lif3", args[0].sum().item())))
        net.fc3.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
        net.lif2.register_forward_hook(lambda module, args, out: (out[0] * 1.1, out[1]))
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)
    assert len(logs[0]) == len(logs[1]) == 2 * 3 * STEPS
    for a, b in zip(*logs, strict=True):
        assert a[0] == b[0]
        for u, v in zip(a[1:], b[1:], strict=True):
            assert float(u) == pytest.approx(float(v), rel=1e-9)


def test_hooks_that_keep_activations(way: Way) -> None:
    """The usual way of looking inside: a hook puts what it sees into a list, read after the forward."""
    kept: dict[int, list[Any]] = {}

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[0]))
        kept[id(net)] = []
        net.lif1.register_forward_hook(lambda module, args, out, net=net: kept[id(net)].append(out[0]))
        return net

    def go(net: Any) -> Any:
        kept[id(net)].clear()
        out = net(frames())
        return out, 0.1 * torch.stack(kept[id(net)]).sum()

    assert_equal_runs(recipe, go, way, runs=2)


def test_backward_hooks(way: Way) -> None:
    logs: list[list[Tensor]] = []

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2]))
        log: list[Tensor] = []
        logs.append(log)
        net.fc2.register_full_backward_hook(lambda module, given, out: log.append(out[0].clone()))
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)
    assert len(logs[0]) == 2 * STEPS
    for a, b in zip(logs[1], logs[0], strict=True):
        assert_close(a, b)


def test_tensor_hooks(way: Way) -> None:
    """A hook on spikes changes their gradient. One on a membrane is called, with what arrives there and not with what
    comes back through this step's spikes (docs/limits.md)."""
    seen = []

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk1.register_hook(lambda grad: grad * 0.5)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            mem2.register_hook(lambda grad: seen.append(grad))
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem3

    check(way, loop)
    assert len(seen) >= 2 * STEPS


def test_retain_grad(way: Way) -> None:
    """Of spikes it is stock's gradient. Keeping a membrane's changes no other gradient."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out, net.kept = [], []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk1.retain_grad()
            net.kept.append(spk1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            mem2.retain_grad()
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem3

    results = []
    for net, context in stock_and_enabled(way, loop):
        with context:
            weighted(net(frames())).backward()
            results.append([spk.grad for spk in net.kept] + [p.grad for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        assert_close(b, a)


def after_a_reset(net: Any, x: Tensor) -> Any:
    """What a net with hidden states gives; they are not left behind."""

    def reset() -> None:
        for module in net.modules():
            if isinstance(module, snn.SpikingNeuron):
                module.reset_mem()

    reset()
    out = net(x)
    reset()
    return out


class Swapped:
    """Hooks that give a module another parameter's numbers for the time of each call."""

    def __init__(self, module: nn.Module, name: str, how: str) -> None:
        self.name, self.how = name, how
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: Any) -> None:
        parameter = getattr(module, self.name)
        self.kept = parameter.data
        if self.how == "other memory":
            parameter.data = 1.25 * self.kept
        elif self.how == "in place":
            self.kept = self.kept.clone()
            parameter.data.mul_(1.25)

    def after(self, module: nn.Module, args: Any, out: Any) -> None:
        parameter = getattr(module, self.name)
        if self.how == "other memory":
            parameter.data = self.kept
        else:
            parameter.data.copy_(self.kept)


@pytest.mark.parametrize("how", ["other memory", "in place"])
@pytest.mark.parametrize("layer", ["fc1", "fc2", "lif2", "recurrent", "synaptic", "conv"])
def test_hooks_that_give_a_layer_other_weights_for_a_call(way: Way, layer: str, how: str) -> None:
    """As quantised or noisy evaluation does, and offloading."""

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2]))
        options: dict[str, Any] = {"init_hidden": True, "spike_grad": spike_grad, "threshold": 0.6, "beta": 0.8}
        if layer in ("recurrent", "synaptic"):
            make = snn.RLeaky if layer == "recurrent" else functools.partial(snn.Synaptic, alpha=0.5)
            if layer == "recurrent":
                options["linear_features"] = HIDDEN
            net.fc2 = nn.Sequential(net.fc2, make(**options, learn_threshold=True).double())
            Swapped(wake(net.fc2, 3)[1], "threshold", how)
        elif layer == "conv":
            net.fc2 = nn.Sequential(nn.Unflatten(1, (1, HIDDEN, 1)), nn.Conv2d(1, 1, 1), nn.Flatten(), net.fc2)
            Swapped(wake(net.fc2, 3)[1], "weight", how)
        elif layer == "lif2":
            net.lif2 = leaky(spike_grad, 0.8, 0.6, learn_threshold=True)
            Swapped(net.lif2, "threshold", how)
        else:
            Swapped(getattr(net, layer), "weight", how)
        return net

    x = frames()

    def go(net: Any) -> Any:
        with torch.no_grad():
            return after_a_reset(net, x)

    assert_equal_runs(recipe, go, way, runs=2)


def test_a_weight_whose_memory_changes_in_the_loop(way: Way) -> None:
    """`weight.data = …` before a call and back after it: seen, and an error, where the call is still to run."""

    def loop(net: Net, x: Any) -> Any:
        mems, kept, out = net.mems(), net.fc2.weight.data, []
        for step in x:
            net.fc2.weight.data = 1.25 * kept
            spk, mems = net.step(step, mems)
            net.fc2.weight.data = kept
            out.append(spk)
        return torch.stack(out)

    right_or_clear_error(way, loop)


def test_hooks_for_all_modules_see_a_recurrent_connection(way: Way) -> None:
    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2]))
        neuron = snn.RLeaky(0.8, linear_features=HIDDEN, init_hidden=True, spike_grad=spike_grad, threshold=0.6)
        net.fc2 = wake(nn.Sequential(net.fc2, neuron), 3)
        return net

    calls = []

    def double(module: nn.Module, args: Any, out: Any) -> Any:
        if type(module) is nn.Linear and args[0].shape[1] == module.out_features:
            calls.append(module)
            return 2 * out
        return None

    x = frames()
    with nn.modules.module.register_module_forward_hook(double):
        assert_equal_runs(recipe, lambda net: after_a_reset(net, x), way, runs=2)
    assert len(calls) == 2 * 2 * 2 * STEPS


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights(way: Way, kind: str) -> None:
    def recipe(spike_grad: Any) -> Any:
        torch.manual_seed(0)
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2]))
        getattr(torch.nn.utils.parametrizations, kind)(net.fc2)
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


def as_buffer(module: Any) -> None:
    bias = module.bias.detach()
    del module.bias
    module.register_buffer("bias", bias)


BIASES: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda module: prune.l1_unstructured(module, "bias", amount=0.5),
    "pruned, then left so": lambda module: prune.remove(prune.l1_unstructured(module, "bias", amount=0.5), "bias"),
    "of a weight that was pruned": lambda module: prune.remove(
        prune.l1_unstructured(prune.l1_unstructured(module, "bias", amount=0.5), "weight", amount=0.3), "weight"
    ),
    "a buffer": as_buffer,
    "parametrized": lambda module: torch.nn.utils.parametrize.register_parametrization(module, "bias", nn.Tanh()),
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_that_are_no_parameters(way: Way, kind: str) -> None:
    def loop(net: Any, x: Any) -> Any:
        mems, rec, out = net.mems(), net.lif4.reset_mem(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            spk, *rec = net.lif4(spk, *rec)
            image = F.relu(net.conv(x[t].view(-1, 1, 1, INPUTS)))
            out.append(spk + image.flatten(1).sum(1, keepdim=True))
        net.lif4.spk = net.lif4.spk + 0  # which may be events
        return torch.stack(out)

    def recipe(spike_grad: Any) -> Any:
        net: Any = net_of(loop)(spike_grad)
        net.lif4 = snn.RLeaky(beta=0.8, threshold=0.6, spike_grad=spike_grad, linear_features=OUTPUTS)
        net.conv = nn.Conv2d(1, 2, (1, 3))
        wake(net)
        for layer in (net.fc1, net.fc3, net.lif4.recurrent, net.conv):
            BIASES[kind](layer)
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


def test_pruned_weights(way: Way) -> None:
    """torch.nn.utils.prune sets the weight anew in a hook before each call."""

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2]))
        prune.l1_unstructured(net.fc2, "weight", amount=0.3)
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("was_on", [False, True])
def test_the_garbage_collector_waits_while_a_forward_records(way: Way, was_on: bool, raises: bool) -> None:
    seen = []

    def loop(net: Any, x: Any) -> Any:
        seen.append(gc.isenabled())
        if raises:
            raise OSError("camera")
        return recorded(net, x)[0]

    net = sparse_backend.enable(net_of(loop)(SURROGATES["fast_sigmoid"]), b_th=way.b_th)
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(OSError, match="camera") if raises else nullcontext():
            net(frames())
        assert seen == [False] and gc.isenabled() == was_on
    finally:
        gc.enable()


# Several models, threads, replicas.


class Outer(nn.Module):
    """A model in a model: both hold a loop."""

    def __init__(self, spike_grad: Any, per_step: bool) -> None:
        super().__init__()
        self.inner = wake(Net(spike_grad, lambda net, x: recorded(net, x)[0]), 1)
        self.fc, self.lif = nn.Linear(OUTPUTS, HIDDEN), leaky(spike_grad, 0.9, 0.5)
        self.per_step = per_step
        wake(self)

    def forward(self, x: Any) -> Any:
        mem, out = self.lif.reset_mem(), []
        if self.per_step:  # the inner model sees windows of two frames
            fed = [sum(self.inner(x[t : t + 2])) for t in range(len(x))]
        else:
            fed = self.inner(x)
        for t in range(len(x)):
            spk, mem = self.lif(self.fc(fed[t]), mem)
            out.append(spk)
        return torch.stack(out), mem


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("which", ["outer", "inner then outer", "outer then inner", "inner"])
def test_nested_enabled_modules(way: Way, per_step: bool, which: str) -> None:
    x = frames()
    theirs, edge = stock(lambda grad: Outer(grad, per_step), way.b_th)
    if which == "inner":
        theirs.lif.spike_grad = SPIKE_GRAD  # the outer neuron stays stock, unmasked
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    with way.policy():
        ours = Outer(SPIKE_GRAD, per_step)
        for part in which.split(" then "):
            sparse_backend.enable(ours if part == "outer" else ours.inner, b_th=way.b_th)
        for _ in range(2):
            assert_same(outcome(ours, lambda net: net(x)), expected)


def test_two_models_in_one_loop(way: Way) -> None:
    """A student driven by a teacher's spikes, both stepped by one loop outside, each within its own `fuse_time`."""

    def build(spike_grad: Any) -> Any:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.teacher = wake(Net(spike_grad, lambda net, x: net.step(x, net.states), learn_beta=True), 1)
                self.student = wake(Net(spike_grad, lambda net, x: net.step(x, net.states)), 2)

        return Both()

    def go(net: Any, fuse: Any = lambda net: nullcontext()) -> Any:
        net.teacher.states, net.student.states = net.teacher.mems(), net.student.mems()
        out = []
        with fuse(net.teacher), fuse(net.student):
            for t in range(STEPS):
                taught, net.teacher.states = net.teacher(frames()[t])
                spk, net.student.states = net.student(torch.cat([taught, taught * 0.5, 1 - taught], dim=1))
                out.append((spk - taught) ** 2)
        return torch.stack(out), [mem + 0 for mem in net.student.states]

    theirs, edge = stock(build, way.b_th)
    expected = outcome(theirs, go)
    assert edge.is_clear()
    with way.policy():
        for fuse in (sparse_backend.fuse_time, lambda net: nullcontext()):
            ours = enabled(build, way)
            sparse_backend.enable(ours.teacher, b_th=way.b_th)
            sparse_backend.enable(ours.student, b_th=way.b_th)
            for _ in range(2):
                assert_same(outcome(ours, functools.partial(go, fuse=fuse)), expected)


def test_an_enabled_and_a_stock_model_in_one_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        others = others_net.mems()
        for t in range(len(x)):
            given, others = others_net.step(x[t], others)
            spk, mems = net.step(x[t], mems)
            again, others = others_net.step(torch.cat([spk, spk, given], 1), others)
            out.append(spk + again)
        return torch.stack(out), mems

    others_net = wake(Net(lambda x: (x > 0).to(x.dtype), lambda net, x: None), 3)
    check(way, loop)


@pytest.mark.parametrize("fuse", [False, True])
def test_init_hidden_sequential_stepped_outside(way: Way, fuse: bool) -> None:
    def build(grad: Any) -> Any:
        return wake(
            nn.Sequential(
                nn.Linear(INPUTS, HIDDEN),
                leaky(grad, 0.9, 0.7, init_hidden=True),
                nn.Dropout(0.2),
                nn.Linear(HIDDEN, OUTPUTS),
                leaky(grad, 0.8, 0.6, init_hidden=True, output=True),
            )
        )

    def go(net: Any, around: Any = lambda net: nullcontext()) -> Any:
        utils.reset(net)
        spk_rec, mem_rec = [], []
        x = frames()
        with around(net):
            for t in range(len(x)):
                spk, mem = net(x[t])
                spk_rec.append(spk)
                mem_rec.append(mem)
        out = torch.stack(spk_rec), torch.stack(mem_rec)
        return out, net[1].mem, spk_rec[2] + mem_rec[3], sum(spk_rec)

    theirs, edge = stock(build, way.b_th)
    expected = [outcome(theirs, go) for _ in range(2)]
    assert edge.is_clear()
    with way.policy():
        ours = enabled(build, way)
        for run in expected:
            assert_same(outcome(ours, functools.partial(go, around=sparse_backend.fuse_time) if fuse else go), run)


def test_fuse_time_over_several_samples(way: Way) -> None:
    """One `with` around many sequences, with resets, losses and optimiser steps inside."""

    def build(grad: Any) -> Any:
        return net_of(lambda net, x: net.lif3(net.fc3(net.lif2(net.fc2(net.lif1(net.fc1(x)))))), init_hidden=True)(grad)

    def go(net: Any, around: Any = lambda net: nullcontext()) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        losses = []
        with around(net):
            for seed in range(3):
                utils.reset(net)
                total, x = 0, frames(seed)
                for t in range(len(x)):
                    spk, mem = net(x[t])
                    total = total + spk + 0.1 * mem
                loss = weighted(total)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return [loss + 0 for loss in losses]

    theirs, edge = stock(build, way.b_th)
    expected = outcome(theirs, go)
    assert edge.is_clear()
    with way.policy():
        assert_same(outcome(enabled(build, way), functools.partial(go, around=sparse_backend.fuse_time)), expected)


def test_two_threads(way: Way) -> None:
    """Each its own model, the forwards interleaved as the machine likes; stock models in a third."""
    x = frames()
    theirs, edge = stock(net_of(lambda net, x: recorded(net, x)[:2]), way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            for _ in range(4):
                net = nets[number]
                net.zero_grad()
                out = net(x)
                weighted(out).backward()
                results[number] = {name: p.grad for name, p in net.named_parameters()}
        except Exception as error:  # reported in the main thread
            results[number] = error

    with way.policy():
        nets = [enabled(net_of(lambda net, x: recorded(net, x)[:2]), way) for _ in range(3)]
        nets[2] = stock(net_of(lambda net, x: recorded(net, x)[:2]), way.b_th)[0]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results.values():
        assert not isinstance(result, Exception), result
        for name, grad in result.items():
            assert_close(grad, expected.gradients[name], name)


def test_a_thread_that_evaluates_while_another_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever one has made a weight's hub, the other, which records no graph, makes its own before it is used."""
    way, x = Way(0.15, fuse_time=False, counts_decide=False), frames()
    net_for = net_of(lambda net, x: recorded(net, x)[:2])
    theirs, edge = stock(net_for, way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    with way.policy():
        ours, trains, made = enabled(net_for, way), threading.current_thread(), []
        serve = WeightCache._serve

        def evaluate() -> None:
            with torch.no_grad():
                ours(x)

        def interrupted(*args: Any) -> Any:
            served = serve(*args)
            if threading.current_thread() is trains and len(made) < 3:
                made.append(served)
                other = threading.Thread(target=evaluate)
                other.start(), other.join()
            return served

        monkeypatch.setattr(WeightCache, "_serve", interrupted)
        got = outcome(ours, lambda net: net(x))
    assert len(made) == 3
    assert_same(got, expected, skip=tuple(name for name in got.buffers if name.endswith("mem")))


def test_a_thread_inside_the_forward(way: Way) -> None:
    """Another thread looks at this forward's values and runs a model of its own."""

    def loop(net: Net, x: Any) -> Any:
        mems, out, seen = net.mems(), [], []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            thread = threading.Thread(target=lambda spk=spk: seen.append(float(spk.detach().sum())))
            thread.start()
            thread.join()
            out.append(spk)
        return torch.stack(out), seen

    check(way, loop)


def replicate(net: nn.Module, count: int) -> list[Any]:
    """What nn.DataParallel makes on one device: modules of their own, parameters that lead back to the original's."""
    modules = list(net.modules())
    replicas = []
    for _ in range(count):
        copies: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in modules}
        for module, replica in copies.items():
            for name, child in module._modules.items():
                if child is not None:
                    setattr(replica, name, copies[child])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter * 1)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    replica._buffers[name] = buffer.clone()
        replicas.append(copies[net])
    return replicas


def test_data_parallel_replicas(way: Way) -> None:
    """Replicas run in threads, each on its part of the batch; gradients add up in the original. The whole batch through
    the stock model is the judge: stock replicas share the original's state."""

    def loop(net: Net, x: Any) -> Any:
        mems = tuple(torch.zeros(x.shape[1], n, dtype=torch.float64) for n in (HIDDEN, HIDDEN, OUTPUTS))
        out = []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems[-1]

    x = frames(batch=6)
    theirs, edge = stock(net_of(loop, learn_beta=True), way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    results: dict[int, Any] = {}

    def work(number: int, replica: Any) -> None:
        try:
            results[number] = replica(x[:, 3 * number : 3 * number + 3])
        except Exception as error:  # reported in the main thread
            results[number] = error

    with way.policy():
        ours = enabled(net_of(loop, learn_beta=True), way)
        for _ in range(2):
            ours.zero_grad()
            threads = [threading.Thread(target=work, args=item) for item in enumerate(replicate(ours, 2))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(not isinstance(result, Exception) for result in results.values()), results
            out = [torch.cat([results[0][0] + 0, results[1][0] + 0], 1), torch.cat([results[0][1], results[1][1]])]
            weighted(out).backward()
            for a, b in zip(out, expected.outputs, strict=True):
                assert_close(a, b)
            for name, p in ours.named_parameters():
                assert_close(p.grad, expected.gradients[name], name)
    report = sparse_backend.report(ours)
    assert all(layer.at_once == (len(x) if way.fuse_time else 1) for layer in report.layers), report
    assert all(layer.path.endswith("sequence" if way.fuse_time else "step") for layer in report.layers), report
    assert report.note == (f"Time fusion: up to {len(x)} steps ran as one sequence." if way.fuse_time else None)


# Other neurons in the same loop.

OTHERS: dict[str, Callable[[Any], Any]] = {
    "Synaptic": lambda grad: snn.Synaptic(alpha=0.8, beta=0.9, threshold=0.6, spike_grad=grad),
    "Lapicque": lambda grad: snn.Lapicque(beta=0.9, threshold=0.6, spike_grad=grad),
    "RLeaky": lambda grad: snn.RLeaky(beta=0.9, threshold=0.6, spike_grad=grad, linear_features=HIDDEN),
    "Alpha": lambda grad: snn.Alpha(alpha=0.9, beta=0.8, threshold=0.6, spike_grad=grad),
    "inhibition": lambda grad: snn.Leaky(beta=0.9, threshold=0.3, spike_grad=grad, inhibition=True),
    "quantised": lambda grad: snn.Leaky(
        beta=0.9,
        threshold=0.6,
        spike_grad=grad,
        state_quant=lambda mem: mem + (mem.detach().mul(8).round() / 8 - mem.detach()),
    ),
}


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("other", OTHERS)
def test_other_neurons_between(way: Way, other: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, _, mem3 = net.mems()
        states, out = None, []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, *states = net.other(net.fc2(spk1), *(states or ()))
            if other == "RLeaky":
                states = [spk2, *states]
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), states[-1], mem3

    def recipe(grad: Any) -> Any:
        net = Net(grad, loop)
        masked = other in ("Synaptic", "RLeaky")  # what is not accelerated is not masked either
        net.other = OTHERS[other](grad if masked else SPIKE_GRAD).double()
        return wake(net)

    def reset(net: Any) -> Any:
        for name in list(net.other._buffers):
            if name in ("mem", "syn", "spk", "syn_exc", "syn_inh"):
                net.other._buffers[name] = torch.zeros(0, dtype=torch.float64)
        return net(x)

    x = frames()
    assert_equal_runs(recipe, reset, way, runs=2)
