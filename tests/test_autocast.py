"""`torch.autocast` around enabled models: weights as autocast rounds them, currents, membranes and sums in float32.

Judged by stock models whose linear layers multiply with weights rounded that way, outside autocast.
"""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from typing import Any

import norse.torch as norse
import pytest
import snntorch as snn
import torch
from fusion_loops import Net, frames, net_of, recorded
from helpers import INF, assert_close, fast_sigmoid, masked, normal, spikes
from norse_models import masked_threshold
from pairs import BAND, SPIKE_GRAD, Way, enabled, longest, stock, weighted
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_backend
from sparse_backend import autocasting
from sparse_backend import functional as sparse
from sparse_backend.ops import hub

F32, BF16 = torch.float32, torch.bfloat16
NARROW = [torch.bfloat16, torch.float16]
#: a dense input's product is torch's own, rounded too: here everything is events
ALL_WAYS = {
    f"{b_th}{'' if fuse_time else ' unfused'}": Way(b_th, fuse_time, counts_decide=False)
    for b_th in (INF, BAND, 1e6) for fuse_time in (True, False)
}  # fmt: skip


def autocast(dtype: torch.dtype = BF16, enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype, enabled)


class Rounded(nn.Linear):
    """A linear layer that rounds its weight where autocast is on, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            weight = weight.to(torch.get_autocast_dtype("cpu")).to(weight.dtype)
        with autocast(enabled=False):
            return F.linear(x, weight, self.bias)


def rounded(net: Any) -> Any:
    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = Rounded
    return net


def assert_runs_as_rounded(way: Way, loop: Any, around: Any, runs: int = 1, **options: Any) -> Any:
    """Outputs and gradients of an enabled float32 model equal the rounded stock one's. Gradients are rounded to the
    weight's dtype on their way, from sums in another order: by one bfloat16 unit they may differ."""
    theirs, edge = stock(net_of(loop, **options), way.b_th)
    results = []
    for net in (rounded(theirs), enabled(net_of(loop, **options), way)):
        net.float()
        for _ in range(runs):
            net.zero_grad()
            with way.policy(), around():
                out = net(frames().float())
            weighted(out).backward()
        results.append((out, {name: p.grad for name, p in net.named_parameters()}))
    assert min(float((x.abs() - b).abs().min()) for x in edge.seen for b in {0.0, min(way.b_th, 9.0)}) > 1e-5
    (expected, gradients), (got, ours) = results
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is F32
        assert_close(a.detach() + 0, b.detach(), rtol=1e-4)
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        assert bool(gradient.any())
        assert float((ours[name] - gradient).abs().max()) <= 2**-8 * float(gradient.abs().max()), name
    return net


def both(net: Net, x: Any) -> Any:
    spk, mem, _ = recorded(net, x)
    return torch.stack(spk), torch.stack(mem)


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS)
@pytest.mark.parametrize("dtype", NARROW)
def test_layers_run_with_rounded_weights(way: Way, dtype: torch.dtype) -> None:
    net = assert_runs_as_rounded(way, both, functools.partial(autocast, dtype), runs=2)
    assert [layer.steps["framework"] for layer in sparse_backend.report(net).layers] == [0, 0, 0]
    if way.fuse_time:
        assert longest(net) >= 7


@pytest.mark.parametrize("way", [Way(BAND, fuse_time, False) for fuse_time in (True, False)], ids=["fused", "unfused"])
def test_hidden_membranes_and_learned_parameters(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        net.mems()
        return (torch.stack([net.lif3(net.fc3(net.lif2(net.fc2(net.lif1(net.fc1(frame))))))[0] for frame in x]),)

    assert_runs_as_rounded(way, loop, autocast, init_hidden=True, learn_beta=True, learn_threshold=True)


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS)
def test_switched_on_and_off_inside_the_loop(way: Way) -> None:
    """Every step has the weights of its own call, though a layer keeps copies between calls."""

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            with autocast(enabled=t in (1, 2, 5)):
                spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems[-1]

    assert_runs_as_rounded(way, loop, functools.partial(autocast, enabled=False))
    assert_runs_as_rounded(way, loop, autocast)


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS)
def test_values_first_needed_under_another_autocast(way: Way) -> None:
    """What was recorded under autocast runs under it."""

    def loop(net: Net, x: Any) -> Any:
        spk, mem, _ = recorded(net, x)
        with autocast(enabled=False):
            return torch.stack(spk) + 0, torch.stack(mem) * 1

    assert_runs_as_rounded(way, loop, autocast)


def around_it_all(net: Net, x: Any) -> Any:
    with autocast():
        return both(net, x)


def around_layers(under: str) -> Any:
    """A loop whose linear and spiking layers, by turns, are each under autocast, 1, or not, 0."""

    def loop(net: Net, x: Any) -> Any:
        mems, out = list(net.mems()), []
        layers = (net.fc1, net.lif1), (net.fc2, net.lif2), (net.fc3, net.lif3)
        for spk in x:
            for i, (fc, lif) in enumerate(layers):
                with autocast(enabled=under[2 * i] == "1"):
                    current = fc(spk)
                with autocast(enabled=under[2 * i + 1] == "1"):
                    spk, mems[i] = lif(current.float(), mems[i])
            out.append(spk)
        return torch.stack(out), mems[-1]

    return loop


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS)
@pytest.mark.parametrize(
    "loop",
    [around_it_all, around_layers("101010"), around_layers("011101"), around_layers("110011")],
    ids=["it all", "linear layers", "all but two linear layers", "all but a block"],
)
@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside_the_forward(way: Way, loop: Any, outside: bool) -> None:
    """Each call runs under the autocast it was made under, and the steps are fused as ever."""
    net = assert_runs_as_rounded(way, loop, functools.partial(autocast, enabled=outside))
    assert longest(net) == (7 if way.fuse_time else 1)


@pytest.mark.parametrize("fuse_time", [True, False])
def test_values_pick_the_shape_under_autocast(fuse_time: bool) -> None:
    seen = []

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for frame in x:
            spk, mems = net.step(frame, mems)
            above = mems[0][mems[0] > 0]
            seen.append((above.shape, (above + 0).shape))
            out.append(spk)
        return (torch.stack(out),)

    with autocast():
        enabled(net_of(loop), Way(BAND, fuse_time)).float()(frames().float())
    assert all(told == was and told.numel() for told, was in seen)


@pytest.mark.parametrize("fuse_time", [True, False])
def test_float64_models_are_left_alone(fuse_time: bool) -> None:
    way = Way(0.15, fuse_time, counts_decide=False)  # or the second run is dense where the first was crowded
    net = enabled(net_of(both), way)
    with way.policy():
        expected = net(frames())
        with autocast():
            out = net(frames())
    assert all(torch.equal(a + 0, b + 0) for a, b in zip(out, expected, strict=True))


class ConvNet(nn.Module):
    """Convolutions, pooling and a dense linear layer, whose results autocast makes narrow."""

    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        options = {"beta": 0.9, "threshold": 0.5, "spike_grad": spike_grad}
        self.conv1, self.lif1 = nn.Conv2d(1, 4, 3), snn.Leaky(**options)
        self.conv2, self.lif2 = nn.Conv2d(4, 6, 3), snn.Leaky(**options)
        self.norm, self.fc, self.lif3 = nn.LayerNorm(24), nn.Linear(24, 5), snn.Leaky(**options)

    def forward(self, x: Any) -> Any:
        mems = [lif.reset_mem() for lif in (self.lif1, self.lif2, self.lif3)]
        spk_rec, mem_rec = [], []
        for frame in x:
            spk, mems[0] = self.lif1(self.wide(F.max_pool2d(self.conv1(frame), 2)), mems[0])
            spk, mems[1] = self.lif2(self.wide(F.max_pool2d(self.conv2(spk), 2)), mems[1])
            spk, mems[2] = self.lif3(self.wide(self.fc(torch.tanh(self.norm(spk.flatten(1))))), mems[2])
            spk_rec.append(spk)
            mem_rec.append(mems[2])
        return torch.stack(spk_rec), torch.stack(mem_rec)

    def wide(self, x: Any) -> Any:
        return x


class Widened(ConvNet):
    """The same with currents made float32 by hand."""

    def wide(self, x: Any) -> Any:
        return x.float()


@pytest.mark.parametrize("fuse_time", [True, False])
def test_narrow_currents_are_widened(fuse_time: bool) -> None:
    torch.manual_seed(0)
    surrogate = fast_sigmoid(5.0)
    net = ConvNet(surrogate)
    theirs = Widened(masked(surrogate, 0.2))
    theirs.load_state_dict(net.state_dict())
    sparse_backend.enable(net, 0.2, fuse_time=fuse_time)
    x = torch.rand(6, 3, 1, 14, 14, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (theirs, net, net):
        model.zero_grad()
        with autocast():
            out = model(x)
        assert all(part.dtype is F32 and bool(part.any()) for part in out)
        weighted(out).backward()
        gradients.append([*(part.detach() + 0 for part in out), *(p.grad.clone() for p in model.parameters())])
    for run in gradients[1:]:
        for a, b in zip(run, gradients[0], strict=True):
            assert float((a - b).abs().max()) <= 2**-7 * float(b.abs().max())
    assert [layer.steps["framework"] for layer in sparse_backend.report(net).layers] == [0, 0, 0]
    if fuse_time:
        assert longest(net) == 6


def test_a_linear_layer_gives_float32_for_events_and_dense_inputs() -> None:
    net = sparse_backend.enable(nn.Sequential(nn.Linear(40, 7), snn.Leaky(0.9, spike_grad=SPIKE_GRAD)), 0.2)
    plain = Rounded(40, 7)
    plain.load_state_dict(net[0].state_dict())
    few, many = spikes((4, 40), 0.05, 0, F32), spikes((4, 40), 1.0, 0, F32) * normal((4, 40), 1, F32)
    with autocast():
        event, dense, narrow = net[0](few), net[0](many), net[0](many.bfloat16())
        assert event.dtype is dense.dtype is narrow.dtype is F32
        assert event.float() is event.to(F32) is event
        assert_close(event + 0, plain(few), rtol=1e-6)
        assert torch.equal(dense, F.linear(many, net[0].weight, net[0].bias).float())


def test_a_narrow_membrane_of_the_users_is_widened() -> None:
    net = sparse_backend.enable(nn.Sequential(nn.Linear(8, 7), snn.Leaky(0.9, spike_grad=SPIKE_GRAD)), 0.2)
    plain = snn.Leaky(0.9, spike_grad=SPIKE_GRAD)
    current, mem = normal((3, 7), 0, F32), normal((3, 7), 1, F32).bfloat16()
    with autocast():
        spk, after = net[1](current, mem)
    expected = plain(current, mem.float())
    assert_close(spk + 0, expected[0])
    assert_close(after, expected[1], rtol=1e-6)
    assert sparse_backend.report(net).layers[0].steps["framework"] == 0


def test_patched_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 8), snn.Leaky(0.9, spike_grad=SPIKE_GRAD), nn.Linear(8, 5))
    theirs = rounded(copy.deepcopy(net)[2:])
    x = normal((4, 9), 0, F32, 3.0)
    with sparse_backend.patch("snntorch", b_th=0.2), autocast():
        spk, mem = net[1](net[0](x))
        assert type(spk) is not Tensor and spk.dtype is mem.dtype is F32
        out = net[2](spk)
        assert out.dtype is F32
        assert_close(out + 0, theirs(spk.to_dense()), rtol=1e-6)


@pytest.mark.parametrize("under", [(False, True), (True, False), (True, True)])
def test_patched_layers_keep_their_weights_of_a_forward(under: tuple[bool, bool], monkeypatch: Any) -> None:
    """Rounded where the linear layer was called, not where its neuron was; their gradients are formed once."""
    formed = []
    call_hub = hub.call_hub
    monkeypatch.setattr(hub, "call_hub", lambda *args: formed.append(args) or call_hub(*args))
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(9, 8), snn.Leaky(0.9, spike_grad=SPIKE_GRAD))
    theirs = rounded(copy.deepcopy(ours))
    x, results = spikes((5, 4, 9), 0.5, 0, F32), []
    for net, spk in ((theirs, list(x)), (ours, list(sparse_backend.EventTensor.from_dense(x)))):
        with sparse_backend.patch("snntorch", b_th=INF) if net is ours else nullcontext():
            mem, out = net[1].reset_mem(), []
            for frame in spk:
                with autocast(enabled=under[0]):
                    current = net[0](frame)
                with autocast(enabled=under[1]):
                    out.append(net[1](current, mem)[1])
                mem = out[-1]
        weighted(out).backward()
        results.append([*map(Tensor.detach, out), net[0].bias.grad, net[0].weight.grad])
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= (2**-8 if a is results[0][-1] else 1e-5) * float(a.abs().max())
    assert len(formed) == 1


class WideLinear(nn.Linear):
    """Torch's own under autocast, its result made float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_steps() -> None:
    """The masked gradient, and membranes in float32."""
    torch._dynamo.reset()

    def run(linear: Any, spike_grad: Any, finish: Any) -> list[Tensor]:
        torch.manual_seed(0)
        options = {"threshold": 0.4, "spike_grad": spike_grad}
        net = nn.Sequential(linear(12, 30), snn.Leaky(0.9, **options), linear(30, 20), snn.Leaky(0.9, **options))

        def step(x: Tensor, mem1: Tensor, mem2: Tensor) -> Any:
            spk, mem1 = net[1](net[0](x), mem1)
            return (*net[3](net[2](spk), mem2), mem1)

        step = finish(net, step)
        mem1, mem2, out = torch.zeros(4, 30), torch.zeros(4, 20), []
        with autocast():
            for x in 2 * frames().float()[:4]:
                spk, mem2, mem1 = step(x, mem1, mem2)
                out.append(spk + mem2)
        assert out[0].dtype is mem1.dtype is mem2.dtype is F32
        weighted(out).backward()
        return [*map(Tensor.detach, out), *(p.grad for p in net.parameters())]  # type: ignore[misc]

    def compiled(net: Any, step: Any) -> Any:
        sparse_backend.enable(net, 0.2)
        return torch.compile(step, backend="aot_eager", fullgraph=True)

    expected = run(WideLinear, masked(SPIKE_GRAD, 0.2), lambda net, step: step)
    for a, b in zip(expected, run(nn.Linear, SPIKE_GRAD, compiled), strict=True):
        assert bool(a.any())
        assert float((a - b).abs().max()) <= 2**-7 * float(a.abs().max())
    torch._dynamo.reset()


def test_autocast_of_another_device() -> None:
    net = sparse_backend.enable(nn.Sequential(nn.Linear(4, 3), snn.Leaky(0.9, spike_grad=SPIKE_GRAD)), 0.2).bfloat16()
    torch.set_autocast_enabled("cuda", True)
    try:
        spk, mem = net[1](net[0](normal((2, 4), 0, BF16)))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert spk.dtype is mem.dtype is BF16


def test_gradients_scaled_for_float16() -> None:
    """A GradScaler's step, as one without autocast on the rounded model."""
    nets = [rounded(net_of(both)(SPIKE_GRAD)).float(), enabled(net_of(both), Way(INF)).float()]
    for net in nets:
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(net.parameters(), 0.01)
        with autocast(torch.float16):
            loss = weighted(net(frames().float())) / 100
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    before = net_of(both)(SPIKE_GRAD).float().state_dict()
    for (name, theirs), ours in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        if name.endswith("weight"):
            moved = theirs - before[name]
            assert float((ours - theirs).abs().max()) <= 2**-9 * float(moved.abs().max())
            assert bool(moved.any())


# The ops.


@pytest.mark.parametrize("name", ["linear_leaky", "linear_lif"])
def test_functional_rounds_the_weight_alone(name: str) -> None:
    x, weight, bias = normal((6, 3, 20), 0, F32), normal((9, 20), 1, F32), normal((9,), 2, F32)
    x = torch.where(x > 1, x, 0)
    recurrent = {"mem_gain": 0.5, "recurrent": normal((9, 9), 3, F32), "z": normal((3, 9), 4, F32)}
    options = {"beta": 0.9} if name == "linear_leaky" else recurrent
    op, out = getattr(sparse, name), []
    for around, cast in ((autocast(), False), (autocast(enabled=False), True)):
        given = {**options, "recurrent": options["recurrent"].bfloat16().float()} if cast and "recurrent" in options \
            else options  # fmt: skip
        leaf = x.clone().requires_grad_()
        with around:
            w = weight.bfloat16().float() if cast else weight
            result = op(leaf, w, bias, spike_grad=SPIKE_GRAD, b_th=0.3, **given)
            result[1].sum().backward()  # under autocast too: products in a backward are exact
        out.append((result[0].to_dense(), result[1], leaf.grad))
    assert all(a.dtype is F32 and torch.equal(a, b) for a, b in zip(*out, strict=True))


def test_state_is_restored() -> None:
    assert autocasting.state() is None
    with autocast():
        seen = autocasting.state()
        with autocasting.restored(None):
            assert not autocasting.is_on()
    with autocast(torch.float16), autocasting.restored(seen):
        assert autocasting.state() == seen
    with autocasting.restored(seen):
        assert torch.mm(torch.eye(2), torch.eye(2)).dtype is BF16
    assert autocasting.state() is None


# Norse.


def norse_net() -> Any:
    torch.manual_seed(1)
    p = norse.LIFParameters(v_th=torch.tensor(0.3), method="super", alpha=torch.tensor(10.0))
    net = norse.SequentialState(
        nn.Linear(12, 10), norse.LIFCell(p), nn.Linear(10, 8), norse.LIFRecurrentCell(8, 6, p), nn.Linear(6, 3),
        norse.LICell(),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    return net


class RoundedRecurrent:
    """Norse's own linear steps with weights rounded."""

    def __enter__(self) -> None:
        self.own = F.linear

        def linear(x: Any, weight: Tensor, bias: Any = None) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                weight = weight.to(BF16).float()
            with autocast(enabled=False):
                return self.own(x, weight, bias)

        F.linear = linear

    def __exit__(self, *_: Any) -> None:
        F.linear = self.own


@pytest.mark.parametrize("form", ["lifted", "stepped fused", "stepped"])
def test_norse(form: str) -> None:
    net, theirs = norse_net(), norse_net()

    class Stepped(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            state, out = None, []
            for frame in x:
                v, state = self.inner(frame, state)
                out.append(v)
            return torch.stack(out)

    def make(model: Any) -> Any:
        return norse.Lift(model) if form == "lifted" else Stepped(model)

    ours = sparse_backend.enable(make(net), 0.2, fuse_time=form == "stepped fused")
    x = spikes((9, 4, 12), 0.3, 0, F32)
    seen: list[Tensor] = []
    results = []
    with masked_threshold(0.2, seen), RoundedRecurrent(), autocast():
        expected = make(theirs)(x)
    with autocast():
        got = ours(x)
    for out, model in ((expected, theirs), (got, net)):
        out = out[0] if isinstance(out, tuple) else out
        weighted(out).backward()
        results.append([out.detach() + 0, *(p.grad for p in model.parameters())])
    assert min(float((x.abs() - b).abs().min()) for x in seen for b in (0.0, 0.2)) > 1e-5
    assert any(bool((x > 0).any()) for x in seen)
    for a, b in zip(*results, strict=True):
        assert a.dtype is F32
        assert bool(b.any())
        assert float((a - b).abs().max()) <= 2**-7 * float(b.abs().max())
    assert all(layer.steps["framework"] == 0 for layer in sparse_backend.report(ours).layers)


def test_a_narrow_state_of_the_users_is_widened() -> None:
    p = norse.LIFParameters(v_th=torch.tensor(0.3), method="super", alpha=torch.tensor(10.0))
    cell = norse.LIFCell(p)
    current, state = normal((3, 7), 0, F32), norse.LIFFeedForwardState(*normal((2, 3, 7), 1, BF16))
    expected, after = cell(current, norse.LIFFeedForwardState(*map(Tensor.float, state)))
    net = sparse_backend.enable(nn.Sequential(cell), 0.2)
    with autocast():
        spk, got = cell(current, state)
    assert_close(spk + 0, expected)
    assert_close(got.v, after.v, rtol=1e-6)
    assert sparse_backend.report(net).layers[0].steps["framework"] == 0
