"""Convolutions of spikes: unchanged snnTorch and Norse models with them against stock, in float64; image spikes and the
currents of convolutions wherever user code expects tensors; and that events are what runs."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import norse.torch as norse
import pytest
import torch
from fusion_loops import wake
from helpers import (
    INF,
    RESETS,
    as_tensor,
    assert_close,
    assert_same_gradients,
    masked,
    normal,
    sparse_always,
    spikes,
    threads,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from norse.torch.functional.lif_box import LIFBoxParameters
from norse_models import masked_threshold
from pairs import (
    BAND,
    SPIKE_GRAD,
    UNFUSED,
    WAYS,
    Edge,
    Way,
    assert_same,
    enabled,
    leaky,
    outcome,
    stock,
    weighted,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import sparse_backend
from sparse_backend import EventTensor, _native, convolution, layer_state, policy
from sparse_backend.convolution import DeferredConvolution
from sparse_backend.deferred import DeferredCurrent
from sparse_backend.ops.event_conv import AVERAGE_POOL, MAX_POOL, NO_POOL, Geometry

snn = pytest.importorskip("snntorch")
from snntorch import utils  # noqa: E402

pytestmark = [pytest.mark.usefixtures("neurons", "one_thread")]

STEPS, BATCH, SIDE = 4, 3, 9
F64 = torch.float64
#: how a model is run: the loop in its forward, the same step by step, a loop around it within `fuse_time` or plainly,
#: and with the framework patched
FORMS = ("forward", "unfused", "outer", "outer by steps", "patched")


# Whole models, drawn.

Layer = Callable[[Any], Any]


def two(x: Any) -> Any:
    return F.max_pool2d(x, 2)


#: what stands between a convolution and its neuron, given the number of channels
BETWEEN: dict[str, Callable[[int], Layer]] = {
    "nothing": lambda c: lambda x: x,
    "MaxPool2d": lambda c: nn.MaxPool2d(2),
    "AvgPool2d": lambda c: nn.AvgPool2d(2),
    "max_pool2d": lambda c: two,
    "avg_pool2d": lambda c: lambda x: F.avg_pool2d(x, (2, 1)),
    "max of oblongs": lambda c: lambda x: F.max_pool2d(x, (1, 3), stride=(1, 3)),
    "average of oblongs": lambda c: nn.AvgPool2d((3, 2), stride=(3, 2)),
    "pool of one": lambda c: nn.MaxPool2d(1),
    "overlapping": lambda c: nn.MaxPool2d(3, 2),
    "overlapping average": lambda c: nn.AvgPool2d(3, 1),
    "gaps": lambda c: nn.MaxPool2d(1, 2),
    "ceil": lambda c: nn.MaxPool2d(2, ceil_mode=True),
    "ceil average": lambda c: lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "padded": lambda c: nn.MaxPool2d(2, padding=1),
    "padded average": lambda c: nn.AvgPool2d(2, padding=1, count_include_pad=False),
    "divisor": lambda c: lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "dilated": lambda c: nn.MaxPool2d(2, dilation=2),
    "adaptive": lambda c: nn.AdaptiveMaxPool2d(2),
    "all of the image": lambda c: lambda x: F.max_pool2d(x, x.shape[2:]),
    "average of the image": lambda c: lambda x: F.avg_pool2d(x, x.size()[-2:], stride=[]),
    "BatchNorm2d": nn.BatchNorm2d,
    "norm and pool": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.MaxPool2d(2)),
    "pool and norm": lambda c: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(c)),
    "Dropout2d": lambda c: nn.Dropout2d(0.3),
    "pool and drop": lambda c: lambda x: F.dropout2d(two(x), 0.3),
    "two pools": lambda c: nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d((2, 1))),
    "Dropout": lambda c: nn.Dropout(0.4),
    "Dropout2d in place": lambda c: nn.Dropout2d(0.3, inplace=True),
    "all dropped or none": lambda c: lambda x: F.dropout(F.dropout2d(x, 0.0), 0.5, training=False),
    "alpha dropout": lambda c: nn.FeatureAlphaDropout(0.3),
    "scaled": lambda c: lambda x: two(x) * 1.25 - 0.125,
}
AFTER: dict[str, Callable[[int], Layer]] = {
    name: BETWEEN[name]
    for name in (
        "nothing",
        "MaxPool2d",
        "avg_pool2d",
        "overlapping",
        "Dropout2d",
        "Dropout",
        "alpha dropout",
        "all dropped or none",
        "two pools",
        "norm and pool",
        "pool and drop",
        "max of oblongs",
    )
}
FLATTEN: dict[str, Layer] = {
    "view": lambda x: x.view(x.shape[0], -1),
    "sizes": lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)),
    "a size": lambda x: x.reshape((x.size()[0], -1)),
    "torch.reshape": lambda x: torch.reshape(x, (len(x), -1)),
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "nn.Flatten": nn.Flatten(),
    "in two": lambda x: x.flatten(2).flatten(1),
    "channels last": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1),
}


@dataclass
class Block:
    """A convolution, what stands between it and its neuron, the neuron, and what its spikes go through."""

    channels: int = 3
    conv: dict[str, Any] = field(default_factory=lambda: {"kernel_size": 3, "padding": 1})
    between: str = "MaxPool2d"
    after: str = "nothing"
    per: str = "one"  #: of what there is a beta and a threshold each: "one", "channel", "each" neuron
    neuron: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    blocks: list[Block] = field(default_factory=lambda: [Block(2), Block(3)])
    flatten: str = "flatten"
    skip: bool = False  #: the first block's spikes go to a linear layer and into the output too
    inputs: int = 2  #: channels
    seed: int = 0


class Net(nn.Module):
    """Blocks and a readout. `net(x)` loops over steps [T, B, C, H, W]; `net(x, *mems)` is one step."""

    def __init__(self, spike_grad: Any, case: Case) -> None:
        super().__init__()
        self.case, self.seed = case, case.seed
        self.convs, self.lifs, self.kept = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.between: list[Layer] = []
        self.after: list[Layer] = []
        probe, first = torch.zeros(1, case.inputs, SIDE, SIDE), None
        for i, block in enumerate(case.blocks):
            conv = nn.Conv2d(probe.shape[1], block.channels, **block.conv)
            between, after = BETWEEN[block.between](block.channels), AFTER[block.after](block.channels)
            self.kept.extend(layer.eval() for layer in (between, after) if isinstance(layer, nn.Module))
            probe = between(conv(probe))
            first = probe if first is None else first
            shape = {"one": (), "channel": (block.channels, 1, 1), "each": tuple(probe.shape[1:])}[block.per]
            beta, threshold = (normal(shape, case.seed + 10 * i + k, scale=0.05) for k in range(2))
            self.lifs.append(leaky(spike_grad, beta + 0.85, threshold + 0.6, **block.neuron))
            self.convs.append(conv), self.between.append(between), self.after.append(after)
            probe = after(probe)
        self.flat = FLATTEN[case.flatten]
        self.fc, self.aux = nn.Linear(self.flat(probe).shape[1], 4), nn.Linear(first[0].numel(), 2)
        self.readout = leaky(spike_grad, 0.9, 0.6)
        wake(self.train(), case.seed)
        for block, lif in zip(case.blocks, self.lifs, strict=True):
            with torch.no_grad():
                lif.graded_spikes_factor.fill_(block.neuron.get("graded_spikes_factor", 1.0))

    def mems(self) -> list[Any]:
        return [lif.reset_mem() for lif in (*self.lifs, self.readout)]

    def forward(self, x: Any, *given: Any) -> Any:
        if not given:
            return loop(self.step, self.mems(), x)
        return self.step(x, *given)

    def step(self, x: Any, *given: Any) -> Any:
        mems, first = list(given), None
        for i, (conv, lif) in enumerate(zip(self.convs, self.lifs, strict=True)):
            x, mems[i] = lif(self.between[i](conv(x)), mems[i])
            first = x if first is None else first
            x = self.after[i](x)
        current = self.fc(self.flat(x))
        seen: Any = ()
        if self.case.skip:
            current = current + 0.5 * self.aux(first.flatten(1)).sum(1, keepdim=True)
            seen = first
        spk, mems[-1] = self.readout(current, mems[-1])
        return spk, seen, *mems


def loop(step: Callable[..., Any], mems: list[Any], x: Any) -> Any:
    """Spikes [T, B, 4], those of the first block if kept, last membranes of the readout [T, B, 4], last of all."""
    spk_rec, seen_rec, mem_rec = [], [], []
    for t in range(len(x)):
        spk, seen, *mems = step(x[t], *mems)
        spk_rec.append(spk), seen_rec.append(seen), mem_rec.append(mems[-1])
    return torch.stack(spk_rec), seen_rec[-1] if isinstance(seen_rec[-1], tuple) else torch.stack(seen_rec), \
        torch.stack(mem_rec), mems  # fmt: skip


def run(net: Any, x: Any, form: str) -> Any:
    if not form.startswith("outer"):
        return net(x)
    fused = form == "outer" and layer_state.is_enabled(net)
    with sparse_backend.fuse_time(net) if fused else nullcontext():
        out = loop(net, net.mems(), x)
    return tree_map(lambda value: value + 0, out)  # what was handed out before the values were there


INPUTS = (
    "frames", "counts", "real", "frames grad", "real grad", "events", "graded events", "events by rows",
    "static", "static grad", "static events", "busy",
)  # fmt: skip


def images(kind: str, channels: int, seed: int, batch: int = BATCH) -> Any:
    """[T, B, C, H, W], or the same image at every step."""
    shape = batch, channels, SIDE, SIDE
    if kind.startswith("static"):
        image = normal(shape, seed).clamp(min=0)
        if kind == "static events":
            return [EventTensor.from_dense(spikes(shape, 0.15, seed), row_dims=3)] * STEPS
        return [image.requires_grad_(kind.endswith("grad"))] * STEPS
    x = normal((STEPS, *shape), seed)
    if not kind.startswith("real"):
        x = spikes(x.shape, 0.6 if kind == "busy" else 0.12, seed, graded=kind in ("counts", "graded events"))
    if "events" in kind:
        return EventTensor.from_dense(x, row_dims=1 if kind.endswith("rows") else 3)
    return x.requires_grad_(kind.endswith("grad"))


def densely(x: Any) -> Any:
    return [as_tensor(step) for step in x] if isinstance(x, list) else as_tensor(x)


def leaves_of(x: Any) -> list[Tensor]:
    x = x[0] if isinstance(x, list) else x
    return [x] if type(x) is Tensor and x.requires_grad else []


@contextmanager
def ours_of(recipe: Callable[..., Any], way: Way, form: str = "forward") -> Iterator[Any]:
    """The model enabled, or built while the framework is patched."""
    with way.policy():
        if form == "patched":
            with sparse_backend.patch("snntorch", b_th=way.b_th):
                yield recipe(SPIKE_GRAD)
        else:
            yield sparse_backend.enable(recipe(SPIKE_GRAD), b_th=way.b_th, fuse_time=form != "unfused")


def compare(
    recipe: Callable[..., Any],
    x: Any,
    way: Way,
    form: str = "forward",
    runs: int = 1,
    go: Callable[..., Any] = run,
    drawn: bool = False,
    skip: tuple[str, ...] = (),
) -> Any:
    """Ours does what stock does, `runs` times with the same input; returns both. drawn: reject what is near an edge."""
    theirs, edge = stock(recipe, way.b_th)
    leaves, dense = leaves_of(x), densely(x)
    expected = [outcome(theirs, lambda net: go(net, dense, form), leaves) for _ in range(runs)]
    if drawn:
        assume(edge.is_clear())
    assert edge.is_clear(), "choose other numbers: rounding decides here"
    with ours_of(recipe, way, form) as ours:
        for one in expected:
            assert_same(outcome(ours, lambda net: go(net, x, form), leaves), one, skip)
    return ours, theirs


convolutions = st.fixed_dictionaries({
    "kernel_size": st.sampled_from([1, 2, 3, 3, (3, 1), (2, 3), 5]),
    "stride": st.sampled_from([1, 1, 2, (1, 2), 3]),
    "padding": st.sampled_from([0, 0, 1, 2, (0, 1), "same", "valid"]),
    "dilation": st.sampled_from([1, 1, 1, 2, (1, 2)]),
    "bias": st.booleans(),
    "padding_mode": st.sampled_from(["zeros"] * 5 + ["circular"]),
})  # fmt: skip
neuron_options = st.fixed_dictionaries({
    "learn_beta": st.booleans(),
    "learn_threshold": st.booleans(),
    "graded_spikes_factor": st.sampled_from([1.0, 1.0, 0.5, -2.0]),
    "learn_graded_spikes_factor": st.booleans(),
    "reset_mechanism": st.sampled_from(RESETS),
    "reset_delay": st.booleans(),
})  # fmt: skip


@st.composite
def cases(draw):
    blocks = draw(st.lists(st.builds(
        Block,
        channels=st.sampled_from([2, 3, 4]),
        conv=convolutions,
        between=st.sampled_from(sorted(BETWEEN)),
        after=st.sampled_from(["nothing", "nothing", *sorted(AFTER)]),
        per=st.sampled_from(["one", "channel", "each"]),
        neuron=neuron_options,
    ), min_size=1, max_size=3))  # fmt: skip
    inputs, grouped = draw(st.sampled_from([1, 2])), draw(st.integers(0, 7))
    before = inputs
    for i, block in enumerate(blocks):
        if block.conv["padding"] == "same":
            block.conv["stride"] = 1
        if i == grouped and block.channels % before == 0:
            block.conv["groups"] = before
        before = block.channels
    case = Case(blocks, draw(st.sampled_from(sorted(FLATTEN))), draw(st.booleans()), inputs, draw(st.integers(0, 999)))
    try:
        Net(SPIKE_GRAD, case)
    except RuntimeError:  # nothing is left of the image
        assume(False)
    return case


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60)
@given(cases(), st.sampled_from(sorted(WAYS)), st.sampled_from(INPUTS), st.sampled_from(FORMS))
def test_drawn_models_are_the_frameworks(case: Case, way: str, kind: str, form: str) -> None:
    snn.SpikingNeuron.instances.clear()
    x = images(kind, case.inputs, case.seed + 5)
    compare(lambda grad: Net(grad, case), x, WAYS[way], form, drawn=True)


# Models that keep their states, and other ways of writing one.


def sequential(spike_grad: Any, **options: Any) -> nn.Sequential:
    return wake(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same"),
            nn.AvgPool2d(2),
            leaky(spike_grad, torch.full((3, 1, 1), 0.8), 0.6, init_hidden=True, **options),
            nn.Conv2d(3, 4, 2, bias=False),
            nn.MaxPool2d(2, ceil_mode=True),
            leaky(spike_grad, 0.7, torch.full((4, 1, 1), 0.5), init_hidden=True, **options),
            nn.Flatten(),
            nn.Linear(16, 4),
            leaky(spike_grad, 0.8, 0.5, init_hidden=True, output=True, **options),
        )
    )


def step_sequential(net: Any, x: Any, form: str) -> Any:
    utils.reset(net)
    with sparse_backend.fuse_time(net) if form == "outer" and layer_state.is_enabled(net) else nullcontext():
        steps = [net(x[t]) for t in range(len(x))]
        out = torch.stack([spk for spk, _ in steps]), torch.stack([mem for _, mem in steps])
    return tree_map(lambda value: value + 0, out)


@pytest.mark.parametrize("form", ["outer", "outer by steps", "unfused", "patched"])
@pytest.mark.parametrize("kind", ["frames", "events", "static", "real grad"])
def test_a_sequential_that_keeps_its_states(way: Way, kind: str, form: str) -> None:
    options = {"learn_beta": True, "learn_threshold": True, "reset_delay": kind != "events"}
    compare(lambda grad: sequential(grad, **options), images(kind, 2, 3), way, form, 2, step_sequential)


class Small(nn.Module):
    """Two convolutional layers of 6 x 6 and 3 x 3 and a readout; a test gives the loop, or what it does to one step."""

    def __init__(self, spike_grad: Any, step: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.step = step
        self.conv1, self.lif1 = nn.Conv2d(1, 3, 3, padding=1), leaky(spike_grad, 0.9, 0.7, **options)
        self.conv2, self.lif2 = nn.Conv2d(3, 4, 3, padding=1), leaky(spike_grad, 0.8, 0.6, **options)
        self.fc, self.lif3 = nn.Linear(36, 4), leaky(spike_grad, 0.8, 0.6, **options)
        self.flat = nn.Linear(108, 4)
        self.seen: dict[Any, Any] = {}

    def mems(self) -> list[Any]:
        return [self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()]

    def forward(self, x: Any, *mems: Any) -> Any:
        if mems:
            return self.step(self, x, *mems)
        mems, out = self.mems(), []  # type: ignore[assignment]
        for t in range(len(x)):
            self.t = t
            spk, *mems = self.step(self, x[t], *mems)  # type: ignore[assignment]
            out.append(spk)
        return torch.stack(out), mems


def small(step: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda spike_grad: wake(Small(spike_grad, step, **options))


def pictures(seed: int = 1, batch: int = BATCH) -> Tensor:
    return spikes((STEPS, batch, 1, 6, 6), 0.25, seed)


def with_spikes(edit: Callable[[Any], Any]) -> Callable[..., Any]:
    """A step that does something to the first layer's spikes [B, 3, 6, 6]; what `edit` returns goes on, if anything."""

    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        spk, mem1 = net.lif1(net.conv1(x), mem1)
        edited = edit(spk)
        edited = spk if edited is None else edited
        out, mem2 = net.lif2(two(net.conv2(edited)), mem2)
        last, mem3 = net.lif3(net.fc(out.flatten(1)) + 0.3 * net.flat(spk.flatten(1)), mem3)
        return last, mem1, mem2, mem3

    return step


def with_current(edit: Callable[[Any], Any], pooled: bool) -> Callable[..., Any]:
    """A step that does something to the second layer's current, before or after it is pooled."""

    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        spk, mem1 = net.lif1(net.conv1(x), mem1)
        current = net.conv2(spk)
        current = two(current) if pooled else current
        edited = edit(current)
        current = current if edited is None else edited
        out, mem2 = net.lif2(current if pooled else two(current), mem2)
        last, mem3 = net.lif3(net.fc(out.flatten(1)), mem3)
        return last, mem1, mem2, mem3

    return step


@pytest.fixture(params=["inf", "band as events", "band unfused"])
def each_way(request: pytest.FixtureRequest) -> Way:
    return {**WAYS, **UNFUSED}[request.param]


def form_of(way: Way) -> str:
    return "forward" if way.fuse_time else "unfused"


def check(
    way: Way, step: Callable[..., Any], x: Any = None, skip: tuple[str, ...] = (), runs: int = 1, **options: Any
) -> Any:
    x = pictures() if x is None else x
    return compare(small(step, **options), x, way, form_of(way), runs, skip=skip)


@pytest.fixture
def on_events() -> Iterator[None]:
    """However many."""
    with sparse_always():
        yield


#: writes to spikes or a current [B, C, H, W], some through what shares its memory
WRITES: dict[str, Callable[[Any], Any]] = {
    "+=": lambda s: operator.iadd(s, 0.25),
    "*=": lambda s: operator.imul(s, 0.5),
    "a row": lambda s: s.__setitem__((slice(None), slice(None), slice(1)), 0.0),
    "a mask": lambda s: s.__setitem__(s == 0, 0.125),
    "a channel": lambda s: s[:, 0].zero_(),
    "a sample": lambda s: s[1].mul_(0.5),
    "relu_": torch.relu_,
    "inplace": lambda s: F.relu(s, inplace=True),
    "masked_fill_": lambda s: s.masked_fill_(s > 0.9, 0.5),
    "data": lambda s: s.data.mul_(0.5),
    "data of a view": lambda s: s.flatten(1).data.mul_(0.5),
    "a view": lambda s: s.view(len(s), -1).mul_(0.5),
    "columns of a view": lambda s: s.view(len(s), -1).__setitem__((slice(None), slice(0, 20)), 0.0),
    "reshaped": lambda s: operator.iadd(s.reshape(s.shape[0], -1), 0.25),
    "flattened": lambda s: s.flatten(1)[:, ::2].zero_(),
    "flat": lambda s: s.view(-1).mul_(0.5),
    "a view of a view": lambda s: s.view(len(s), -1).view(len(s), -1, 3).mul_(0.5),
    "a view, without grad": lambda s: without_grad(s.view(len(s), -1).mul_, 0.5),
    "detach_": lambda s: s.detach_(),
}

#: the same through what `detach` gave, which shares the memory too
DETACHED_WRITES: dict[str, Callable[[Any], Any]] = {
    "a numpy array": lambda s: operator.imul(s.detach().numpy(), 0.5),
    "a numpy array of a view": lambda s: operator.imul(s.detach().flatten(1).numpy(), 0.5),
    "detached": lambda s: s.detach().mul_(0.5),
    "a detached view": lambda s: s.detach().flatten(1).mul_(0.5),
    "a view, detached": lambda s: s.flatten(1).detach().mul_(0.5),
    "a channel out of memory": lambda s: torch.mul(s.detach()[:, 0], 0.5, out=s.detach()[:, 0]),
}

#: what takes the place of spikes or a current
USES: dict[str, Callable[[Any], Any]] = {
    "a written view": lambda s: s.view(len(s), -1).mul_(0.5).view(s.shape),
    "a view of what is written": lambda s: written_after(s, s.view(len(s), -1)).view(s.shape),
    "flattened before a write": lambda s: written_after(s, s.flatten(1)).reshape(s.shape),
    "one of two views": lambda s: written_after(s.view(len(s), -1), s.flatten(2)).view_as(s),
    "detach": lambda s: s.detach(),
    "clone": lambda s: s.clone(),
    "a written clone": lambda s: s.clone().mul_(0.5),
    "a clone of what is written": lambda s: written_after(s, s.clone()),
    "channels last": lambda s: s.contiguous(memory_format=torch.channels_last),
    "double": lambda s: s.to(F64).double(),
    "float and back": lambda s: s.float().double(),
    "arithmetic": lambda s: 0.5 * s + 1 - s / 4,
    "transposed": lambda s: s.transpose(2, 3),
    "transposed twice": lambda s: s.transpose(2, 3).transpose(2, 3),
    "flipped": lambda s: s.flip(-1),
    "halves": lambda s: torch.cat([s[..., :3], 0.5 * s[..., 3:]], 3),
    "channels": lambda s: torch.cat([s[:, 1:], s[:, :1]], 1),
    "samples": lambda s: torch.stack(list(s)),
    "parts of the batch": lambda s: torch.cat([s[:1], s[1:]]),
    "samples and channels as one": lambda s: s.view(-1, *s.shape[2:]).view(s.shape),
    "flat": lambda s: s.flatten().reshape(s.shape),
    "unflattened": lambda s: s.flatten(1).unflatten(1, s.shape[1:]),
    "a dimension more": lambda s: s.unsqueeze(0).squeeze(0)[None][0],
    "padded": lambda s: F.pad(s, (1, 0, 0, 0))[..., :-1],
    "resized": lambda s: F.interpolate(s, scale_factor=2)[..., ::2, ::2],
    "norm": lambda s: F.layer_norm(s, s.shape[1:]),
    "softmax": lambda s: s.flatten(2).softmax(-1).view_as(s) * 8,
    "where": lambda s: torch.where(s > 0.5, s, -0.5 * s),
    "a linear layer over the rows": lambda s: F.linear(s, torch.eye(s.shape[-1], dtype=F64).flip(0)),
    "dropout2d": lambda s: F.dropout2d(s, 0.3),
}


def without_grad(function: Callable[..., Any], *args: Any) -> None:
    with torch.no_grad():
        function(*args)


def written_after(x: Any, view: Any) -> Any:
    """The view, after its base was written to."""
    x.mul_(0.5)
    return view


def done(to: str, edit: Callable[[Any], Any]) -> Callable[..., Any]:
    return with_spikes(edit) if to == "spikes" else with_current(edit, to == "pooled current")


@pytest.mark.parametrize("to", ["spikes", "current", "pooled current"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_show_wherever_torch_shows_them(each_way: Way, write: str, to: str) -> None:
    def edit(s: Any) -> None:
        WRITES[write](s)

    check(each_way, done(to, edit))


@pytest.mark.parametrize("to", ["current", "pooled current"])
@pytest.mark.parametrize("write", DETACHED_WRITES)
def test_writes_through_what_is_detached(each_way: Way, write: str, to: str) -> None:
    def edit(s: Any) -> None:
        DETACHED_WRITES[write](s)

    check(each_way, done(to, edit))


@pytest.mark.parametrize("to", ["spikes", "current"])
@pytest.mark.parametrize("use", USES)
def test_what_becomes_of_spikes_and_currents(each_way: Way, use: str, to: str) -> None:
    check(each_way, done(to, USES[use]))


# Loops that are more than one layer behind the other.

Step = Callable[..., Any]


def layers(net: Small, x: Any, mems: Any) -> Any:
    """The usual step: (spikes of the readout, those of the first and second layer, membranes)."""
    mem1, mem2, mem3 = mems
    spk1, mem1 = net.lif1(net.conv1(x), mem1)
    spk2, mem2 = net.lif2(two(net.conv2(spk1)), mem2)
    last, mem3 = net.lif3(net.fc(spk2.flatten(1)), mem3)
    return last, spk1, spk2, (mem1, mem2, mem3)


STEPS_OF_OTHERS: dict[str, Step] = {}


def other(function: Callable[..., Any]) -> None:
    """A way of wiring the layers: `function(net, spk)` gives the second layer's current [B, 4, 3, 3], and what is added
    to the readout's."""

    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        spk, mem1 = first(net, x, mem1)
        given_ = function(net, spk)
        current, more = given_ if isinstance(given_, tuple) else (given_, 0)
        last, mem2, mem3 = rest(net, current, mem2, mem3, more)
        return last, mem1, mem2, mem3

    whole(step, function.__name__)


def whole(step: Step, name: str | None = None) -> None:
    """The same as a step, `step(net, x, mem1, mem2, mem3)`."""
    STEPS_OF_OTHERS[name or step.__name__] = step


def rest(net: Small, current: Any, mem2: Any, mem3: Any, more: Any = 0) -> Any:
    spk2, mem2 = net.lif2(current, mem2)
    last, mem3 = net.lif3(net.fc(spk2.flatten(1)) + more, mem3)
    return last, mem2, mem3


def first(net: Small, x: Any, mem1: Any) -> Any:
    return net.lif1(net.conv1(x), mem1)


@other
def residual(net, spk):
    return two(net.conv2(spk)[:, :3] + spk).repeat(1, 2, 1, 1)[:, :4]


@other
def the_current_before_and_after_pooling(net, spk):
    current = net.conv2(spk)
    pooled = two(current)
    return pooled, current.mean((1, 2, 3)).unsqueeze(1) + pooled.amax((2, 3))


@other
def the_current_written_after_pooling(net, spk):
    current = net.conv2(spk)
    pooled = two(current)
    current.data += 1
    return pooled, 0.1 * current.mean((1, 2, 3)).unsqueeze(1)


@other
def two_pools_of_one_current(net, spk):
    current = net.conv2(spk)
    one, same, average = two(current), two(current), F.avg_pool2d(current, 2)
    one *= 0.5
    return same, (one + average).sum((1, 2, 3)).unsqueeze(1) * 0.05


@other
def two_pools_of_a_written_current(net, spk):
    current = net.conv2(spk)
    before = two(current)
    current.data.mul_(0.5)
    return two(current) + 0.5 * before


@other
def a_current_through_views(net, spk):
    current = net.conv2(spk)
    view = current.view(1, *current.shape).view(current.shape)
    current *= 0.5
    return two(view)


@other
def a_view_written_then_pooled(net, spk):
    current = net.conv2(spk)
    current.view(1, *current.shape).mul_(0.5)
    return two(current)


@other
def one_convolution_twice(net, spk):
    one, again = net.conv2(spk), net.conv2(spk)
    one *= 0.5
    return two(one + 0.75 * again)


@other
def one_convolution_of_two_inputs(net, spk):
    return two(net.conv2(spk)) + two(net.conv2(spk.flip(3)))


@whole
def functional_convolutions(net, x, mem1, mem2, mem3):
    spk, mem1 = net.lif1(F.conv2d(x, net.conv1.weight, padding="same"), mem1)
    current = torch.conv2d(input=spk, weight=2 * net.conv2.weight, bias=net.conv2.bias, stride=(1, 1), padding=[1, 1])
    last, mem2, mem3 = rest(net, F.max_pool2d(input=current, kernel_size=(2, 2), stride=2), mem2, mem3)
    return last, mem1, mem2, mem3


@other
def weights_that_are_computed(net, spk):
    weight = net.conv2.weight / net.conv2.weight.flatten(1).norm(dim=1)[:, None, None, None]
    return two(F.conv2d(spk, weight.transpose(2, 3), padding=1))


@other
def spikes_as_other_images(net, spk):
    by_channel = F.conv2d(spk.view(-1, 1, 6, 6), net.conv1.weight, padding=1).view(len(spk), 3, 3, 6, 6)
    rows = F.conv2d(spk.reshape(len(spk), 9, 2, 6), net.conv2.weight.repeat(1, 3, 1, 1), padding=1)
    one = F.conv2d(spk.view(1, -1, 6, 6), net.conv2.weight.repeat(1, len(spk), 1, 1), padding=1)
    more = by_channel.mean((2, 3, 4)).sum(1, keepdim=True) + rows.mean((1, 2, 3)).unsqueeze(1) + 0.1 * one.mean()
    return two(net.conv2(spk)), more


@other
def a_sample_at_a_time(net, spk):
    current = torch.stack([net.conv2(sample) for sample in spk])
    return two(current)


@other
def part_of_a_batch(net, spk):
    current = torch.cat([net.conv2(spk[:2]), net.conv2(spk[2:])])
    return two(current)


@whole
def feedback_of_images(net, x, mem1, mem2, mem3):
    before = getattr(net, "before", None) if net.t else None
    current = net.conv1(x)
    current = current if before is None else current + F.conv2d(before, net.conv2.weight[:3].mean(0, keepdim=True))[
        :, :, :1, :1
    ].expand_as(current) * 0.1  # fmt: skip
    spk, mem1 = net.lif1(current, mem1)
    net.before = spk
    last, mem2, mem3 = rest(net, two(net.conv2(spk)), mem2, mem3)
    return last, mem1, mem2, mem3


@other
def image_spikes_as_a_current(net, spk):
    again, _ = net.lif1(spk)
    return two(net.conv2(again))


@whole
def weights_frozen_now_and_then(net, x, mem1, mem2, mem3):
    for conv in (net.conv1, net.conv2):
        conv.weight.requires_grad_(net.t % 2 == 0)
    spk, mem1 = first(net, x, mem1)
    current = net.conv2(spk)
    for conv in (net.conv1, net.conv2):
        conv.weight.requires_grad_(True)
    last, mem2, mem3 = rest(net, two(current), mem2, mem3)
    return last, mem1, mem2, mem3


@whole
def convolutions_without_gradient_now_and_then(net, x, mem1, mem2, mem3):
    with torch.no_grad() if net.t % 2 else nullcontext():
        spk, mem1 = first(net, x, mem1)
    with torch.no_grad() if net.t == 2 else nullcontext():
        current = net.conv2(spk)
    last, mem2, mem3 = rest(net, two(current), mem2, mem3)
    return last, mem1, mem2, mem3


@other
def pooled_without_gradient(net, spk):
    current = net.conv2(spk)
    with torch.no_grad():
        shown = two(current)
    return two(current) + 0.1 * shown


@other
def currents_first_looked_at_without_gradient(net, spk):
    current = net.conv2(spk)
    pooled = two(current)
    view = current.view(1, *current.shape)
    with torch.no_grad():
        net.log = float(pooled.mean() + view.mean())
    more = 0.1 * view.mean((0, 2, 3, 4)).unsqueeze(1)
    with torch.no_grad():
        more = more + 0.1 * current.mean()
    return pooled + 0.1 * two(current), more


@other
def a_current_first_looked_at_without_gradient(net, spk):
    current = net.conv2(spk)
    with torch.no_grad():
        net.log = float(current.mean())
    return two(current)


@other
def no_sample_of_a_batch(net, spk):
    current = torch.cat([two(net.conv2(spk[:0])), two(net.conv2(spk))])
    return current


@whole
def the_first_current_pooled_in_several_ways(net, x, mem1, mem2, mem3):
    current = net.conv1(x)
    maxima, again = two(current), two(current)
    with torch.no_grad() if net.t == 1 else nullcontext():
        means = F.avg_pool2d(current, 2)
    if net.t == 2:
        again.zero_()
    spk, mem1 = net.lif1(F.interpolate(maxima + means, scale_factor=2) + again.mean(), mem1)
    last, mem2, mem3 = rest(net, two(net.conv2(spk)), mem2, mem3)
    return last, mem1, mem2, mem3


@whole
def the_first_current_without_gradient_now_and_then(net, x, mem1, mem2, mem3):
    with torch.no_grad() if net.t % 2 else nullcontext():
        current = net.conv1(x)
    if net.t == 2:
        current.detach_()
    spk, mem1 = net.lif1(current, mem1)
    last, mem2, mem3 = rest(net, two(net.conv2(spk)), mem2, mem3)
    return last, mem1, mem2, mem3


@whole
def a_hook_on_one_of_the_first_currents(net, x, mem1, mem2, mem3):
    current = net.conv1(x)
    if net.t == 1:
        current.register_hook(lambda grad: 2 * grad)
    spk, mem1 = net.lif1(current, mem1)
    last, mem2, mem3 = rest(net, two(net.conv2(spk)), mem2, mem3)
    return last, mem1, mem2, mem3


@other
def spikes_pooled_twice(net, spk):
    maxima, means = two(spk), F.avg_pool2d(spk, (3, 2))
    again = F.max_pool2d(maxima, 3)
    more = again.flatten(1).sum(1, keepdim=True) + means.flatten(1).sum(1, keepdim=True)
    current = two(net.conv2(spk)) + net.conv2(maxima) - F.avg_pool2d(net.conv2(spk), 2)
    return current, 0.1 * more


@other
def pooled_spikes_written(net, spk):
    pooled, kept = two(spk), F.avg_pool2d(spk, 2)
    pooled[:, 0] = 0.5
    kept.view(len(kept), -1).mul_(0.5)
    return net.conv2(pooled + kept)


@other
def indices_of_maxima(net, spk):
    pooled, indices = F.max_pool2d(net.conv2(spk), 2, return_indices=True)
    _, where = F.max_pool2d(spk, 2, return_indices=True)
    return pooled + 0.01 * indices, 0.01 * where.sum()


@other
def transposed_convolution(net, spk):
    wide = F.conv_transpose2d(spk, net.conv1.weight, stride=2)
    return two(net.conv2(spk)), 0.1 * wide.mean((1, 2, 3)).unsqueeze(1)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("step", STEPS_OF_OTHERS)
def test_other_wirings(each_way: Way, step: str, static: bool) -> None:
    x = [pictures()[0]] * STEPS if static else pictures()
    check(each_way, STEPS_OF_OTHERS[step], x, runs=1 if static else 2)


STATIC_WRITES: dict[str, Callable[[Any, int], Any]] = {
    "+= noise": lambda current, t: operator.iadd(current, 0.1 * torch.rand_like(current)),
    "another factor at every step": lambda current, t: current.mul_(1 - 0.2 * t),
    "once": lambda current, t: t == 1 and current.zero_(),
    "a channel": lambda current, t: current[:, t % 3].zero_(),
    "a view": lambda current, t: current.flatten(1).mul_(1 - 0.2 * t),
    "data": lambda current, t: current.data.mul_(1 - 0.2 * t),
}


@pytest.mark.parametrize("image", ["sparse", "dense", "events"])
@pytest.mark.parametrize("write", STATIC_WRITES)
def test_writes_to_the_current_of_a_static_image(each_way: Way, write: str, image: str) -> None:
    """Each step's current is a tensor of its own, though it is computed once."""

    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        current, kept = net.conv1(x), net.conv1(x)
        STATIC_WRITES[write](current, net.t)
        spk, mem1 = net.lif1(current + 0.25 * kept, mem1)
        last, mem2, mem3 = rest(net, two(net.conv2(spk)), mem2, mem3)
        return last, mem1, mem2, mem3

    still: Any = normal((BATCH, 1, 6, 6), 2) if image == "dense" else pictures()[0].clone()
    still = EventTensor.from_dense(still, row_dims=3) if image == "events" else still
    check(each_way, step, [still] * STEPS, runs=2)


def test_a_static_image_rewritten_between_the_steps(each_way: Way) -> None:
    still = pictures()[0].clone()

    def step(net: Small, x: Any, *mems: Any) -> Any:
        still.copy_(pictures()[net.t])
        return usual(net, x, *mems)

    def go(net: Any, x: Any, form: str) -> Any:
        with torch.no_grad():  # torch needs the old image for a gradient
            return net([still] * STEPS)

    compare(small(step), still, each_way, form_of(each_way), 2, go)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("looked_at", ["the current", "the pooled current", "a view", "the spikes", "flat spikes"])
@pytest.mark.usefixtures("on_events")
def test_what_is_first_looked_at_without_gradients_keeps_its_own(looked_at: str, mode: Any) -> None:
    """Statistics of a current, say, are taken on the way."""
    gradients = []
    for ours in (False, True):
        net = small(usual)(SPIKE_GRAD if ours else masked(SPIKE_GRAD, BAND))
        if ours:
            sparse_backend.enable(net, b_th=BAND, fuse_time=False)
        spk, _ = net.lif1(net.conv1(pictures()[0]), net.lif1.reset_mem())
        flat, current = spk.flatten(1), net.conv2(spk)
        pooled, view = two(current), current.view(1, *current.shape)
        given_ = {"the current": current, "the pooled current": pooled, "a view": view, "the spikes": spk}
        with mode():
            float(given_.get(looked_at, flat).mean())
        loss = weighted([current + 0, pooled + 0, view + 0, spk + 0, net.flat(flat) + 0])
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert_same_gradients(gradients[1], gradients[0])


# Programs: everything that shares memory, or does not, in any order.

KERNELS = {c: normal((4, c, 3, 3), c, scale=0.4) for c in range(1, 13)}


def image_of(x: Any) -> Any:
    """x [B, C * S * S] as images, as far as it can be."""
    side = {36: 6, 9: 3}.get(next((size for size in (36, 9) if x.shape[-1] % size == 0), 0))
    return x.view(x.shape[0], -1, side, side) if side and x.dim() == 2 else None


def without_gradient(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def run_so(net: Any, x: Any) -> Any:
        with torch.no_grad():
            return function(net, x)

    return run_so


def writing(write: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    def run_so(net: Any, x: Any) -> None:
        write(x)

    return run_so


def convolved(net: Any, x: Any) -> Any:
    return F.conv2d(x, KERNELS[x.shape[1]], padding=1) if x.dim() == 4 and 0 < x.shape[1] < 13 else None


def learned_convolution(net: Any, x: Any) -> Any:
    return net.conv2(x) if x.dim() == 4 and x.shape[1] == 3 else None


def pooled_by(pool: Callable[[Any, int], Any]) -> Callable[[Any, Any], Any]:
    return lambda net, x: pool(x, 2) if x.dim() == 4 and min(x.shape[2:]) > 1 else None


#: what makes a value of a value, if anything, or writes to it
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "flatten": lambda net, x: x.flatten(1) if x.dim() > 1 else None,
    "view": lambda net, x: x.view(x.shape[0], -1),
    "one more dimension": lambda net, x: x.view(1, *x.shape),
    "channels as samples": lambda net, x: x.view(-1, 1, *x.shape[2:]) if x.dim() == 4 else None,
    "steps as samples": lambda net, x: x.reshape(-1, *x.shape[2:]) if x.dim() == 5 else None,
    "image": lambda net, x: image_of(x),
    "part": lambda net, x: x[1:] if len(x) > 1 else None,
    "channel": lambda net, x: x[:, 0] if x.dim() > 1 else None,
    "clone": lambda net, x: x.clone(),
    "scaled": lambda net, x: x * 0.5,
    "stack": lambda net, x: torch.stack([x, x]),
    "convolved": convolved,
    "learned convolution": learned_convolution,
    "without gradient": without_gradient(learned_convolution),
    "maxima": pooled_by(F.max_pool2d),
    "means": pooled_by(F.avg_pool2d),
    "maxima without gradient": without_gradient(pooled_by(F.max_pool2d)),
    "spikes": lambda net, x: net.lif2(x, torch.zeros_like(x))[0],
    "linear": lambda net, x: net.flat(x) if x.shape[-1] == 108 else None,
    "mul_": writing(lambda x: x.mul_(0.75)),
    "mul_ without gradient": without_gradient(writing(lambda x: x.mul_(0.75))),
    "set": lambda net, x: operator.setitem(x, 0, 0.5),
    "read": writing(lambda x: x.sum().item()),
}


def program(operations: list[tuple[str, int]]) -> Callable[..., Any]:
    """A step that applies operations to the values there are, spikes at first; all are looked at when all is done."""

    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        spk, mem1 = first(net, x, mem1)
        values = [spk]
        for name, number in operations:
            made = OPERATIONS[name](net, values[number % len(values)])
            if made is not None:
                values.append(made)
        total = sum((k + 1) * value.mean() for k, value in enumerate(values))
        last, mem2, mem3 = rest(net, two(net.conv2(spk)), mem2, mem3, 0.1 * total)
        return last, mem1, mem2, mem3

    return step


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9)), min_size=1, max_size=8),
    st.sampled_from(["inf", "band as events", "band unfused"]),
)
def test_drawn_programs_are_torchs(operations: list[tuple[str, int]], way: str) -> None:
    snn.SpikingNeuron.instances.clear()
    try:
        outcome(small(program(operations))(SPIKE_GRAD), lambda net: net(pictures()[:2]))
    except RuntimeError:  # what autograd wanted was written to
        assume(False)
    chosen = {**WAYS, **UNFUSED}[way]
    compare(small(program(operations)), pictures()[:2], chosen, form_of(chosen), drawn=True)


# Hooks, and the gradients of spikes and currents themselves.


def watched_step(watch: Callable[[Any, str, Small], Any]) -> Step:
    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        spk, mem1 = first(net, x, mem1)
        watch(spk, "spikes", net)
        flat = spk.flatten(1)
        watch(flat, "flat spikes", net)
        current = net.conv2(spk)
        watch(current, "current", net)
        pooled = two(current)
        watch(pooled, "pooled current", net)
        last, mem2, mem3 = rest(net, pooled, mem2, mem3, 0.3 * net.flat(flat))
        return last, mem1, mem2, mem3

    return step


WATCHED = ("spikes", "flat spikes", "current", "pooled current")


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("what", WATCHED)
def test_hooks_see_every_entry_and_may_change_it(each_way: Way, what: str, factor: float) -> None:
    def watch(x: Any, name: str, net: Small) -> None:
        def hook(grad: Tensor, t: int = net.t) -> Tensor:
            net.seen[t] = grad.clone()
            return grad * factor

        if name == what:
            x.register_hook(hook)

    ours, theirs = check(each_way, watched_step(watch))
    assert_same_gradients(ours.seen, theirs.seen)
    assert len(ours.seen) == STEPS


@pytest.mark.parametrize("what", WATCHED)
def test_retained_gradients_have_every_entry(each_way: Way, what: str) -> None:
    def watch(x: Any, name: str, net: Small) -> None:
        if name == what:
            x.retain_grad()
            net.seen[net.t] = x

    ours, theirs = check(each_way, watched_step(watch))
    for t in range(STEPS):
        assert_close(ours.seen[t].grad, theirs.seen[t].grad, f"{what} of step {t}")


@pytest.mark.parametrize("hooked", ["conv1", "conv2", "lif1"])
def test_module_hooks(each_way: Way, hooked: str) -> None:
    def recipe(spike_grad: Any) -> Any:
        net = wake(Small(spike_grad, lambda net, *args: usual(net, *args)))
        module = getattr(net, hooked)
        module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        module.register_forward_hook(lambda module, args, out: out if isinstance(out, tuple) else out + 0.125)
        return net

    compare(recipe, pictures(), each_way, form_of(each_way))


def usual(net: Small, x: Any, *mems: Any) -> Any:
    last, _, _, mems = layers(net, x, mems)
    return last, *mems


def test_backward_hooks_of_modules(each_way: Way) -> None:
    seen: dict[Any, dict[Any, Tensor]] = {}

    def recipe(spike_grad: Any) -> Any:
        net = wake(Small(spike_grad, usual))
        found: dict[Any, Tensor] = {}
        seen[spike_grad] = found

        def hook(module: Any, into: Any, out: Any) -> None:
            found[len(found)] = out[0].clone()

        net.conv2.register_full_backward_hook(hook)
        return net

    compare(recipe, pictures(), each_way, form_of(each_way))
    theirs, ours = seen.values()
    assert_same_gradients(ours, theirs)


def test_a_hook_on_a_weight(each_way: Way) -> None:
    def recipe(spike_grad: Any) -> Any:
        net = wake(Small(spike_grad, usual))
        net.conv2.weight.register_hook(lambda grad: 2 * grad)
        net.conv1.bias.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
        return net

    compare(recipe, pictures(), each_way, form_of(each_way))


# Modules that are not quite an nn.Conv2d, and settings of it.


class OwnConv(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return self._conv_forward(x, self.weight.clamp(-0.5, 0.5), self.bias)


def with_conv2(make: Callable[[nn.Conv2d], nn.Module]) -> Callable[[Any], Any]:
    def recipe(spike_grad: Any) -> Any:
        net = wake(Small(spike_grad, usual))
        net.conv2 = make(net.conv2).double()
        return net

    return recipe


def own_conv(conv: nn.Conv2d) -> nn.Module:
    made = OwnConv(3, 4, 3, padding=1).double()
    made.load_state_dict(conv.state_dict())
    return made


def frozen(conv: nn.Conv2d, *names: str) -> nn.Module:
    for name in names:
        getattr(conv, name).requires_grad_(False)
    return conv


def in_memory_order(conv: nn.Conv2d) -> nn.Module:
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def of_value(value: float) -> Callable[[nn.Conv2d], nn.Module]:
    def put(conv: nn.Conv2d) -> nn.Module:
        with torch.no_grad():
            conv.weight[1, 0, 0, 1] = value
        return conv

    return put


def tied(conv: nn.Conv2d) -> nn.Module:
    """The same weight in two modules, as a sum."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = conv, nn.Conv2d(3, 4, 3, padding=1)
            self.other.weight, self.other.bias = conv.weight, None

        def forward(self, x: Any) -> Any:
            return self.one(x) + 0.5 * self.other(x)

    return Both()


CONVOLUTIONS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "a subclass": own_conv,
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "frozen weight": lambda conv: frozen(conv, "weight"),
    "frozen bias": lambda conv: frozen(conv, "bias"),
    "frozen": lambda conv: frozen(conv, "weight", "bias"),
    "channels last": in_memory_order,
    "a weight of zero": of_value(0.0),
    "two convolutions": lambda conv: nn.Sequential(conv, wake(nn.Conv2d(4, 4, 3, padding=1), 3)),
    "two convolutions, relu between": lambda conv: nn.Sequential(
        conv, nn.ReLU(inplace=True), wake(nn.Conv2d(4, 4, 1), 3)
    ),
    "tied": tied,
    "circular": lambda conv: wake(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 4),
    "grouped": lambda conv: nn.Sequential(
        wake(nn.Conv2d(3, 6, 3, padding=1, groups=3), 4), wake(nn.Conv2d(6, 4, 1), 5)
    ),
    "upsampled": lambda conv: nn.Sequential(nn.Upsample(scale_factor=2), conv, nn.AvgPool2d(2)),
    "identity": lambda conv: nn.Sequential(nn.Identity(), conv, nn.Identity()),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_other_convolutions(each_way: Way, conv: str) -> None:
    compare(with_conv2(CONVOLUTIONS[conv]), pictures(), each_way, form_of(each_way), 2)


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_a_weight_that_is_not_finite_reaches_what_torch_lets_it_reach(value: float) -> None:
    current = []
    for ours in (False, True):
        net = with_conv2(of_value(value))(SPIKE_GRAD)
        if ours:
            sparse_backend.enable(net, b_th=BAND, fuse_time=False)
        spk, _ = net.lif1(net.conv1(pictures()[0]), net.lif1.reset_mem())
        current.append(net.conv2(spk) + 0)
    torch.testing.assert_close(current[1], current[0], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_an_image_that_is_not_finite(each_way: Way) -> None:
    x = pictures()
    for t, value in enumerate((float("nan"), INF, -INF)):
        x[t, 0, 0, 2, 3] = value
    with each_way.policy():
        ours = enabled(small(usual), each_way)
        got = ours.conv1(x[0]) + 0, ours.conv1(x[1]) + 0, ours.conv1(x[2]) + 0
    theirs = small(usual)(SPIKE_GRAD)
    for mine, step in zip(got, x, strict=False):
        torch.testing.assert_close(mine, theirs.conv1(step), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("call", ["wrong channels", "wrong dtype", "too small an image", "rows of another length"])
def test_errors_are_torchs(call: str) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "wrong channels": lambda spk, net: F.conv2d(spk, torch.ones(4, 2, 3, 3, dtype=F64)),
        "wrong dtype": lambda spk, net: F.conv2d(spk, torch.ones(4, 3, 3, 3)),
        "too small an image": lambda spk, net: F.conv2d(spk, torch.ones(4, 3, 7, 7, dtype=F64)),
        "rows of another length": lambda spk, net: nn.Linear(108, 4).double()(spk),
    }
    messages = []
    for ours in (False, True):
        net = small(usual)(SPIKE_GRAD)
        if ours:
            sparse_backend.enable(net, b_th=BAND, fuse_time=False)
        spk, _ = net.lif1(net.conv1(pictures()[0]), net.lif1.reset_mem())
        with pytest.raises(RuntimeError) as info:
            calls[call](spk, net)
        messages.append(str(info.value))
    assert messages[1] == messages[0]


@pytest.mark.parametrize(("steps", "batch"), [(STEPS, 0), (1, 1), (1, BATCH)])
def test_few_samples_and_steps(each_way: Way, steps: int, batch: int) -> None:
    check(each_way, usual, pictures(batch=batch)[:steps])


# Weights that change, modes, and when the backward pass runs.


@pytest.mark.usefixtures("on_events")
@pytest.mark.parametrize("pooled", [False, True])
def test_a_current_looked_at_after_its_weight_has_changed(pooled: bool) -> None:
    """It is that of the weight it was computed with, or an error that says so."""
    net = sparse_backend.enable(small(usual)(SPIKE_GRAD), b_th=BAND, fuse_time=False)
    spk, _ = net.lif1(net.conv1(pictures()[0]), net.lif1.reset_mem())
    expected = two(F.conv2d(as_tensor(spk), net.conv2.weight, net.conv2.bias, padding=1)).detach()
    current = two(net.conv2(spk)) if pooled else net.conv2(spk)
    with torch.no_grad():
        net.conv2.weight.mul_(2)
    try:
        got = current if pooled else two(current)
        got = got + 0
    except RuntimeError as error:
        assert "was changed in place" in str(error)
        assert _native.load()
    else:
        assert_close(got, expected)


@pytest.mark.parametrize("which", ["weight", "bias", "both", "another parameter"])
def test_parameters_that_change_between_the_steps(each_way: Way, which: str) -> None:
    def step(net: Small, x: Any, *mems: Any) -> Any:
        for conv in (net.conv1, net.conv2):
            if which == "another parameter":
                conv.weight = nn.Parameter(conv.weight.detach() * 0.9)
            if which in ("weight", "both"):
                conv.weight.mul_(0.9)
            if which in ("bias", "both"):
                conv.bias.add_(0.05)
        return usual(net, x, *mems)

    for x in (pictures(), [pictures()[0]] * STEPS):
        theirs, edge = stock(small(step), each_way.b_th)
        with torch.no_grad():
            expected = theirs(densely(x))
        assert edge.is_clear()
        with each_way.policy():
            ours = enabled(small(step), each_way)
            try:
                with torch.no_grad():
                    got = ours(x)
            except RuntimeError as error:
                assert each_way.fuse_time and which != "another parameter"
                assert "changed in place after a recorded call" in str(error)
                continue
        for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            assert_close(a + 0, b)


@pytest.mark.parametrize("kind", ["frames", "events", "static"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_then_training_on_the_same_input(each_way: Way, mode: Any, kind: str) -> None:
    case, x = Case(), images(kind, 2, 3)
    theirs, edge = stock(lambda grad: Net(grad, case), each_way.b_th)
    expected, trained = theirs(densely(x)), outcome(theirs, lambda net: net(densely(x)))
    assert edge.is_clear()
    with each_way.policy():
        ours = enabled(lambda grad: Net(grad, case), each_way)
        for _ in range(2):
            with mode():
                got = ours(x)
            for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
                assert not a.requires_grad
                assert_close(a + 0, b)
            assert_same(outcome(ours, lambda net: net(x)), trained)


@pytest.mark.parametrize("frozen_", [("conv1",), ("conv2",), ("conv1", "lif1", "conv2"), ("conv1", "conv2", "fc")])
def test_requires_grad_toggled_between_the_runs(each_way: Way, frozen_: tuple[str, ...]) -> None:
    def go(net: Any, x: Any, form: str) -> Any:
        toggle = not net.seen.setdefault("learns", True)
        net.seen["learns"] = toggle
        for name in frozen_:
            getattr(net, name).requires_grad_(toggle)
        return net(x)

    compare(small(usual), pictures(), each_way, form_of(each_way), 4, go)


def test_backward_twice_and_two_losses(each_way: Way) -> None:
    def go(net: Any, x: Any, form: str) -> Any:
        out, mems = net(x)
        loss = weighted(mems)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        out.mean().backward(retain_graph=True)
        return out, mems

    compare(small(usual), pictures(), each_way, form_of(each_way), 2, go)


def test_a_backward_inside_the_loop(each_way: Way) -> None:
    """Truncated at half of the steps, whose loss is back-propagated there."""

    def step(net: Small, x: Any, *mems: Any) -> Any:
        last, *mems = usual(net, x, *mems)  # type: ignore[assignment]
        if net.t == STEPS // 2:
            (last.sum() + weighted(mems)).backward()
            mems, last = [mem.detach() for mem in mems], last.detach()  # type: ignore[assignment]
        return last, *mems

    def go(net: Any, x: Any, form: str) -> Any:
        return net(x)[1]

    compare(small(step), pictures(), each_way, form_of(each_way), 2, go)


def test_an_optimiser_step_inside_the_loop(each_way: Way) -> None:
    def step(net: Small, x: Any, *mems: Any) -> Any:
        last, *mems = usual(net, x, *mems)  # type: ignore[assignment]
        if net.t == STEPS // 2:
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
            weighted(mems).backward()
            optimizer.step()
            optimizer.zero_grad()
            mems, last = [mem.detach() for mem in mems], last.detach()  # type: ignore[assignment]
        return last, *mems

    compare(small(step), pictures(), each_way, form_of(each_way), 1, lambda net, x, form: net(x)[1])


def test_training_with_an_optimiser(each_way: Way) -> None:
    def go(net: Any, x: Any, form: str) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        losses = []
        for shift in range(3):
            _, mems = net(x.roll(shift, -1))
            loss = weighted(mems)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    compare(small(usual), pictures(), each_way, form_of(each_way), 1, go)


MEMBRANES = tuple(f"lif{i}.mem" for i in (1, 2, 3))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", ["all", "a step", "a block", "a convolution"])
def test_checkpoints(each_way: Way, around: str, reentrant: bool) -> None:
    x = pictures().requires_grad_()

    def again(function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=reentrant)

    def block(net: Small, x: Any, mem: Any) -> Any:
        return net.lif2(two(net.conv2(x)), mem)

    def step(net: Small, x: Any, mem1: Any, mem2: Any, mem3: Any) -> Any:
        spk, mem1 = first(net, x, mem1)
        if around == "a block":
            spk2, mem2 = again(block, net, spk, mem2)
        elif around == "a convolution":
            spk2, mem2 = net.lif2(two(again(net.conv2, spk)), mem2)
        else:
            spk2, mem2 = block(net, spk, mem2)
        last, mem3 = net.lif3(net.fc(spk2.flatten(1)), mem3)
        return last, mem1, mem2, mem3

    def maybe(net: Small, *args: Any) -> Any:
        return again(step, net, *args) if around == "a step" else step(net, *args)

    def go(net: Any, x: Any, form: str) -> Any:
        return again(net, x) if around == "all" else net(x)

    compare(small(maybe), x, each_way, form_of(each_way), 2, go, skip=MEMBRANES)


@pytest.mark.parametrize("form", ["forward", "unfused", "outer", "patched"])
def test_under_autocast_torchs_own_convolution_runs(form: str) -> None:
    """The current is that of stock, rounded as autocast rounds it; the neuron takes it as before."""
    x = images("frames", 2, 3).float()
    way = Way(BAND, counts_decide=False)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    with ours_of(lambda grad: Net(grad, Case()).float(), way, form) as ours, autocast():
        spk, _ = ours.lifs[0](ours.between[0](ours.convs[0](x[0])), ours.lifs[0].reset_mem())
        current = ours.convs[1](spk)
        assert type(current) is Tensor
        conv = ours.convs[1]
        expected = F.conv2d(as_tensor(spk), conv.weight, conv.bias, padding=1)
        assert current.dtype is expected.dtype is torch.bfloat16
        assert torch.equal(current, expected)
        weighted(run(ours, x, form)).backward()
    assert all(p.grad is not None for name, p in ours.named_parameters() if "convs" in name)


# Copies, and models put away.


def test_an_enabled_model_is_copied_saved_and_disabled(each_way: Way) -> None:
    x = pictures()
    theirs, edge = stock(small(usual), each_way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    plain = outcome(small(usual)(SPIKE_GRAD), lambda net: net(x))
    with each_way.policy():
        ours = enabled(small(usual), each_way)
        assert_same(outcome(ours, lambda net: net(x)), expected)
        for lif in (ours.lif1, ours.lif2, ours.lif3):
            lif.reset_mem()
        twin = copy.deepcopy(ours)
        with torch.no_grad():
            ours.conv2.weight.mul_(1.5)
        assert_same(outcome(twin, lambda net: net(x)), expected)
        twin.load_state_dict(small(usual)(SPIKE_GRAD).state_dict())
        assert_same(outcome(twin, lambda net: net(x)), expected)
        sparse_backend.disable(twin)
        assert_same(outcome(twin, lambda net: net(x)), plain)
        assert "forward" not in twin.conv2.__dict__


def image_events(learns: bool = False) -> tuple[EventTensor, Tensor]:
    """Image spikes, and the same dense."""
    net = sparse_backend.enable(small(usual)(SPIKE_GRAD), b_th=BAND, fuse_time=False)
    with sparse_always(), nullcontext() if learns else torch.no_grad():
        spk, _ = net.lif1(net.conv1(pictures()[0]), net.lif1.reset_mem())
    assert type(spk) is EventTensor
    return spk, as_tensor(spk).detach().clone()


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "torch.save": lambda s: saved(s, weights_only=False),
    "weights only": lambda s: saved(s, weights_only=True),
    "to and back": lambda s: s.to(torch.float32).to(F64),
    "detach": lambda s: s.detach(),
    "reshaped": lambda s: copy.deepcopy(s.view(*s.shape[:-3], -1)).view(s.shape),
    "a pickled view": lambda s: pickle.loads(pickle.dumps(s.flatten(-3))).reshape(s.shape),
}


def saved(x: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    return torch.load(file, **options)["x"]


@pytest.mark.usefixtures("on_events")
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", ["spikes", "frames", "graded frames", "a frame"])
def test_copies_of_image_spikes(kind: str, copied: str) -> None:
    if kind == "spikes":
        spk, dense = image_events()
    else:
        dense = spikes((STEPS, BATCH, 3, 6, 6), 0.1, 0, graded="graded" in kind)
        spk = EventTensor.from_dense(dense, row_dims=3)
        if kind == "a frame":
            spk, dense = spk[1], dense[1]
    weight = normal((4, 3, 3, 3), 5)
    result = COPIES[copied](spk)
    assert type(result) is EventTensor and result.is_events
    assert result.columns == 108 and result.shape == dense.shape and result.dtype is F64
    assert torch.equal(as_tensor(result), dense)
    frame, plain = (result, dense) if dense.dim() == 4 else (result[2], dense[2])
    assert_close(two(F.conv2d(frame, weight)) + 0, two(F.conv2d(plain, weight)))
    assert torch.equal(as_tensor(spk), dense)


@pytest.mark.usefixtures("on_events")
def test_image_spikes_inside_a_graph_are_not_copied() -> None:
    spk, _ = image_events(learns=True)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(spk)
    current = F.conv2d(spk, normal((4, 3, 3, 3), 5).requires_grad_())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(current)


@pytest.mark.usefixtures("on_events")
def test_a_current_without_gradient_is_copied() -> None:
    spk, dense = image_events()
    current = F.conv2d(spk, normal((4, 3, 3, 3), 5))
    expected = F.conv2d(dense, normal((4, 3, 3, 3), 5))
    for made in (copy.deepcopy(current), pickle.loads(pickle.dumps(current)), saved(current), current.clone()):
        assert_close(made + 0, expected)
        made.zero_()
    assert_close(current + 0, expected)


@pytest.mark.usefixtures("on_events")
@pytest.mark.parametrize("learns", [False, True])
def test_what_is_asked_of_a_current(learns: bool) -> None:
    spk, dense = image_events()
    weight = normal((4, 3, 3, 2), 5).requires_grad_(learns)
    for pooled in (False, True):
        current, expected = F.conv2d(spk, weight), F.conv2d(dense, weight)
        if pooled:
            current, expected = two(current), two(expected)
        assert isinstance(current, Tensor)
        assert torch.is_tensor(current)
        assert current.shape == current.size() == expected.shape
        assert current.size(-1) == expected.size(-1)
        assert (current.dim(), current.ndim, current.numel(), len(current)) == (4, 4, expected.numel(), BATCH)
        assert (current.dtype, current.device) == (expected.dtype, expected.device)
        assert current.is_floating_point()
        assert current.requires_grad is expected.requires_grad is learns
        assert current.is_leaf is expected.is_leaf
        assert (current.grad_fn is None) is not learns
        assert current.is_contiguous() == expected.is_contiguous()
        assert "shape=[3, 4" in repr(current) or "tensor" in repr(current)
        assert_close(current.detach() + 0, expected)
        assert_close(torch.as_tensor(current.detach().numpy()), expected)
        if learns:
            with pytest.raises(RuntimeError, match="requires grad"):
                current.numpy()


class Recordings(torch.utils.data.Dataset[Any]):
    """Camera recordings [T, C, H, W] as events, and their labels."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> Any:
        return EventTensor.from_dense(spikes((STEPS, 2, SIDE, SIDE), 0.1, number), row_dims=3), number % 4


@pytest.mark.parametrize("workers", [0, 1])
def test_recordings_from_a_loader(each_way: Way, workers: int) -> None:
    case = Case()
    loader = DataLoader(Recordings(), batch_size=BATCH, collate_fn=sparse_backend.collate, num_workers=workers)
    for number, (x, labels) in enumerate(loader):
        assert type(x) is EventTensor and x.shape == (STEPS, BATCH, 2, SIDE, SIDE)
        samples = [spikes((STEPS, 2, SIDE, SIDE), 0.1, BATCH * number + i) for i in range(BATCH)]
        assert torch.equal(as_tensor(x), torch.stack(samples, 1))
        assert labels.shape == (BATCH,)
        compare(lambda grad: Net(grad, case), x, each_way, form_of(each_way))


@pytest.mark.usefixtures("on_events")
def test_a_current_made_outside_autocast_and_looked_at_inside() -> None:
    spk, dense = image_events()
    weight = normal((4, 3, 3, 3), 5).requires_grad_()
    current = F.conv2d(spk, weight)
    with torch.autocast("cpu", torch.bfloat16):
        got = two(current) + 0
        assert got.dtype is F64
    got.sum().backward()
    mine, weight.grad = weight.grad, None
    expected = two(F.conv2d(dense, weight))
    assert_close(got, expected)
    expected.sum().backward()
    assert_close(mine, weight.grad)


# Norse: loops over cells, and sequences at once.


def gain(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=F64))


def cells(kind: str) -> list[Any]:
    """Two cells whose gains learn; `v_th` of the second is one per channel."""
    own = normal((4, 1, 1), 3, scale=0.05) + 0.4
    steep = {"method": "tanh", "alpha": torch.tensor(10.0)}
    if kind == "LIF":
        made = [norse.LIFParameters(tau_mem_inv=gain(500.0), tau_syn_inv=torch.tensor(400.0), v_th=v_th, **steep)
                for v_th in (torch.tensor(0.3), own)]  # fmt: skip
        return [norse.LIFCell(p) for p in made]
    if kind == "LIFBox":
        return [norse.LIFBoxCell(LIFBoxParameters(tau_mem_inv=gain(500.0), v_th=v_th, **steep))
                for v_th in (torch.tensor(0.3), own)]  # fmt: skip
    return [norse.IAFCell(norse.IAFParameters(v_th=nn.Parameter(v_th), **steep)) for v_th in (gain(0.6).data, own)]


class NorseLoop(nn.Module):
    def __init__(self, kind: str, pool: str) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.cell1, self.cell2 = cells(kind)
        self.fc, self.readout = nn.Linear(36, 4), norse.LICell()
        wake(self)

    def forward(self, x: Any) -> Any:
        a = b = c = None
        out, total = [], 0
        for t in range(len(x)):
            z, a = self.cell1(self.conv1(x[t]), a)
            z2, b = self.cell2(self.pool(self.conv2(z)), b)
            v, c = self.readout(self.fc(z2.flatten(1)), c)
            total = total + z.mean((1, 2, 3))
            out.append(v)
        return torch.stack(out), total, a, b, c


def norse_sequence(kind: str, pool: str) -> Any:
    """The same for whole sequences."""
    of_sequences = {"LIF": norse.LIF, "IAF": norse.IAF}.get(kind, lambda p: norse.Lift(norse.LIFBoxCell(p)))
    cell1, cell2 = (of_sequences(cell.p) for cell in cells(kind))
    if pool == "max":
        net = norse.SequentialState(
            norse.Lift(nn.Conv2d(1, 3, 3, padding=1)), cell1, norse.Lift(nn.Conv2d(3, 4, 3, padding=1)),
            norse.Lift(nn.MaxPool2d(2)), cell2, norse.Lift(nn.Flatten()), nn.Linear(36, 4), norse.LI(),
        )  # fmt: skip
    else:
        net = norse.SequentialState(
            norse.Lift(nn.Conv2d(1, 3, 3, padding=1)), cell1, norse.Lift(nn.AvgPool2d(2)),
            norse.Lift(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))), cell2,
            norse.Lift(nn.Flatten()), nn.Linear(36, 4), norse.LI(),
        )  # fmt: skip
    return wake(net)


def norse_steps(kind: str, pool: str) -> Any:
    """The same as a stepped SequentialState."""
    cell1, cell2 = cells(kind)
    pooled = (nn.MaxPool2d(2), cell2) if pool == "max" else (cell2, nn.AvgPool2d(2))
    made = nn.Conv2d(1, 3, 3, padding=1), cell1, nn.Conv2d(3, 4, 3, padding=1), *pooled
    return wake(norse.SequentialState(*made, nn.Flatten(), nn.Linear(36, 4), norse.LICell()))


def stepped(net: Any, x: Any) -> Any:
    state, out = None, []
    with sparse_backend.fuse_time(net) if layer_state.is_enabled(net) else nullcontext():
        for t in range(len(x)):
            v, state = net(x[t], state)
            out.append(v)
        out = torch.stack(out)
    return out + 0


NORSE: dict[str, tuple[Any, Any]] = {
    "loop": (NorseLoop, lambda net, x: net(x)),
    "sequence": (norse_sequence, lambda net, x: net(x)[0]),
    "steps": (norse_steps, stepped),
}


def learned(net: nn.Module) -> list[Tensor]:
    """What learns and is in no `parameters()`."""
    found = [part for module in net.modules() if hasattr(module, "p") for part in module.p]
    return [part for part in found if isinstance(part, nn.Parameter)]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("kind", ["LIF", "LIFBox", "IAF"])
@pytest.mark.parametrize("form", NORSE)
@pytest.mark.parametrize("way", ["inf", "band as events"], indirect=True)
def test_norse(way: Way, form: str, kind: str, pool: str, events: bool, patched: bool) -> None:
    (make, go), x = NORSE[form], pictures()
    edge = Edge(way.b_th)
    with masked_threshold(way.b_th, edge.seen):
        theirs = make(kind, pool)
        expected = outcome(theirs, lambda net: go(net, x), learned(theirs))
    assert edge.is_clear()
    assert float(expected.outputs[0].abs().max()) > 0
    given_ = EventTensor.from_dense(x, row_dims=3) if events else x
    with way.policy():
        ours = make(kind, pool)
        with sparse_backend.patch("norse", b_th=way.b_th) if patched else nullcontext():
            ours = ours if patched else sparse_backend.enable(ours, b_th=way.b_th)
            assert_same(outcome(ours, lambda net: go(net, given_), learned(ours)), expected)


# That events are what runs.


class Calls(list[tuple[int, int]]):
    """The rows and the pooling of every call of `event_conv`."""

    def rows(self) -> list[int]:
        return [rows for rows, _ in self]

    def pools(self) -> set[int]:
        return {pool for _, pool in self}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    if not _native.load():
        pytest.skip("without kernels torch's own convolution runs")
    found, call = Calls(), convolution.call_event_conv

    def spy(row_ptr: Tensor, *args: Any) -> Any:
        found.append((row_ptr.numel() - 1, Geometry(*args[7:-1]).pool))
        return call(row_ptr, *args)

    monkeypatch.setattr(convolution, "call_event_conv", spy)
    return found


def of_torch(function: Callable[[], Any]) -> int:
    """How many convolutions torch runs within a call, forwards."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return sum(event.name == "aten::convolution" for event in profile.function_events)


ALL = STEPS * BATCH


@pytest.mark.parametrize("between", ["MaxPool2d", "max_pool2d", "AvgPool2d", "nothing"])
@pytest.mark.parametrize("kind", ["frames", "counts", "events", "static events"])
def test_every_convolution_of_a_forward_runs_once_on_events_with_its_pooling(
    calls: Calls, kind: str, between: str
) -> None:
    case = Case([Block(3, between=between), Block(4, between=between)])
    x, way = images(kind, 2, 3), WAYS["band as events"]
    compare(lambda grad: Net(grad, case), x, way)
    assert calls.rows() == [BATCH if kind.startswith("static") else ALL, ALL]
    pool = {"AvgPool2d": AVERAGE_POOL, "nothing": NO_POOL}.get(between, MAX_POOL)
    assert calls.pools() == {pool}, "the image before pooling was made"


@pytest.mark.parametrize("form", FORMS)
def test_torch_runs_no_convolution(calls: Calls, form: str) -> None:
    way = Way(BAND, counts_decide=False)
    for kind in ("frames", "events"):
        with ours_of(lambda grad: Net(grad, Case()), way, form) as ours:
            x = images(kind, 2, 3)
            run(ours, x, form)  # shapes that are not known yet are asked of torch, with tensors without numbers
            calls.clear()
            count = of_torch(lambda ours=ours, x=x: weighted(run(ours, x, form)).backward())
            dense = form == "patched" and kind == "frames"  # nn.Conv2d is nobody's framework's
            assert count == (STEPS if dense else 0)
            assert sum(calls.rows()) == (ALL if dense else 2 * ALL)
            assert calls.pools() == {MAX_POOL}


@pytest.mark.parametrize("form", ["forward", "outer"])
def test_a_static_image_is_convolved_once(calls: Calls, form: str) -> None:
    image = spikes((BATCH, 2, SIDE, SIDE), 0.1, 3)
    for x in ([image] * STEPS, [EventTensor.from_dense(image, row_dims=3)] * STEPS, image.expand(STEPS, *image.shape)):
        calls.clear()
        compare(lambda grad: Net(grad, Case()), x, WAYS["band as events"], form)
        assert calls.rows() == [BATCH, ALL]


@pytest.mark.parametrize(
    ("block", "rows"),
    [
        (Block(4, {"kernel_size": 3, "groups": 2}), []),
        (Block(4, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}), []),
        (Block(4, {"kernel_size": 3, "padding": "valid"}), [(ALL, 1)]),
        (Block(4, {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)}), [(ALL, 1)]),
        (Block(4, between="overlapping"), [(ALL, 0)]),
        (Block(4, between="ceil"), [(ALL, 0)]),
        (Block(4, between="BatchNorm2d"), [(ALL, 0)]),
        (Block(4, between="two pools"), [(ALL, 1)]),
    ],
)
def test_what_runs_on_events_and_what_does_not(calls: Calls, block: Block, rows: list[tuple[int, int]]) -> None:
    """Of 9 x 9 images, with the pooling that goes with it: 0 none, 1 a maximum."""
    compare(lambda grad: Net(grad, Case([block])), images("frames", 2, 3), WAYS["band as events"])
    assert (MAX_POOL, NO_POOL) == (1, 0)
    assert calls == rows


@pytest.mark.parametrize("after", ["MaxPool2d", "avg_pool2d", "nothing"])
def test_pooled_spikes_stay_events(calls: Calls, after: str) -> None:
    case = Case([Block(3, between="nothing", after=after), Block(4)])
    compare(lambda grad: Net(grad, case), images("events", 2, 3), WAYS["band as events"])
    assert calls == [(ALL, NO_POOL), (ALL, MAX_POOL)]


@pytest.mark.parametrize("kind", ["busy", "real", "frames grad"])
def test_a_busy_input_takes_torchs_own(calls: Calls, kind: str) -> None:
    net = enabled(lambda grad: Net(grad, Case([Block(4)])), WAYS["band"])
    x = images(kind, 2, 3)
    assert kind == "frames grad" or float((x != 0).double().mean()) > policy.MAX_INPUT
    assert of_torch(lambda: net(x)) >= 1
    assert not calls


@pytest.mark.parametrize(("pooled", "events", "runs"), [(True, 8, 1), (True, 9, 0), (False, 4, 1), (False, 5, 0)])
def test_the_limit_is_that_of_the_policy(calls: Calls, pooled: bool, events: int, runs: int) -> None:
    weight = normal((4, 2, 3, 3), 5)
    dense = torch.zeros(1, 2, 4, 4, dtype=F64)
    dense.view(-1)[:events] = 1
    limit = policy.MAX_INPUT if pooled else policy.MAX_CONVOLVED
    assert (events / dense.numel() > limit) is (runs == 0)
    current, expected = (F.conv2d(x, weight) for x in (EventTensor.from_dense(dense, row_dims=3), dense))
    got = (two(current) if pooled else current) + 0
    assert len(calls) == runs
    assert_close(got, two(expected) if pooled else expected)


@pytest.mark.parametrize(("window", "pool"), [(16, MAX_POOL), (17, NO_POOL)])
def test_the_place_of_a_maximum_fits_a_byte(calls: Calls, window: int, pool: int) -> None:
    dense, weight = spikes((2, 1, 18, 18), 0.1, 3), normal((2, 1, 2, 2), 5)
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    got = F.max_pool2d(F.conv2d(EventTensor.from_dense(dense, row_dims=3), mine), window)
    expected = F.max_pool2d(F.conv2d(dense, theirs), window)
    assert_close(got + 0, expected)
    assert calls.pools() == {pool}
    weighted(got).backward(), weighted(expected).backward()
    assert_close(mine.grad, theirs.grad)


def test_one_thread_and_two_agree_bit_for_bit(calls: Calls) -> None:
    case, x = Case([Block(3), Block(4, per="each", neuron={"learn_beta": True})]), images("frames", 2, 3, 33).float()
    results = []
    for count in (1, 2):
        with threads(count), sparse_always():
            net = sparse_backend.enable(Net(SPIKE_GRAD, case).float(), b_th=BAND)
            results.append(outcome(net, lambda net: net(x)))
    assert calls
    one, other_ = results
    assert all(torch.equal(a, b) for a, b in zip(one.outputs, other_.outputs, strict=True))
    for name, gradient in one.gradients.items():
        assert torch.equal(gradient, other_.gradients[name]), name


@pytest.mark.usefixtures("on_events")
def test_spikes_reach_the_linear_layer_as_events(calls: Calls) -> None:
    net = sparse_backend.enable(small(usual)(SPIKE_GRAD), b_th=BAND, fuse_time=False)
    spk, _ = net.lif1(net.conv1(pictures()[0]), net.lif1.reset_mem())
    current = net.conv2(spk)
    assert type(spk) is type(two(spk)) is EventTensor and type(current) is type(two(current)) is DeferredConvolution
    for flat in (
        spk.view(BATCH, -1),
        spk.flatten(1),
        torch.flatten(spk, 1),
        spk.reshape(BATCH, 108),
        nn.Flatten()(spk),
    ):
        assert type(flat) is EventTensor and flat.shape == (BATCH, 108)
        assert type(net.flat(flat)) is DeferredCurrent
    assert spk._dense is None and current._dense is None, "somebody made it dense"


def test_norses_sequences_are_convolved_at_once(calls: Calls) -> None:
    x = pictures()
    for given_ in (x, EventTensor.from_dense(x, row_dims=3)):
        calls.clear()
        with sparse_always():
            net = sparse_backend.enable(norse_sequence("LIF", "max"), b_th=BAND)
            assert of_torch(lambda net=net, x=given_: net(x)) == 0
        assert calls == [(ALL, NO_POOL), (ALL, MAX_POOL)]


@pytest.mark.parametrize("kind", ["frames", "events", "static", "real grad"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sequences_in_chunks(monkeypatch: pytest.MonkeyPatch, way: Way, steps: int, kind: str) -> None:
    """As many steps at once as stay in cache, here few; the last chunk may be shorter."""
    case = Case([Block(3), Block(4, between="nothing", after="MaxPool2d")], skip=True)
    bytes_of_a_step = BATCH * (3 * 4 * 4 + 4 * 4 * 4) * 8
    monkeypatch.setattr(policy, "CHUNK_BYTES", bytes_of_a_step * steps // policy.EVENT_CHUNKS + 1)
    compare(lambda grad: Net(grad, case), images(kind, 2, 3), way)


# A static image's current is one value, handed out at every step.


class Static(nn.Module):
    """A convolution of one image at every step; `body(net, x, t)` gives the current."""

    def __init__(self, body: Callable[[Any, Tensor, int], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lif = nn.Conv2d(1, 3, 3).double(), snn.Leaky(beta=0.8, threshold=0.3, spike_grad=SPIKE_GRAD)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        mem, total = self.lif.reset_mem(), 0
        for t in range(4):
            spk, mem = self.lif(self.body(self, x, t), mem)
            total = total + spk + mem
        return total


def static_image(kind: str) -> Tensor:
    return spikes((2, 1, 6, 6), 0.2, 3) if kind == "sparse" else normal((2, 1, 6, 6), 3)


def runs_of(body: Callable[[Any, Tensor, int], Any], kind: str) -> list[list[Tensor]]:
    """Output and gradients of the stock and of the enabled model."""
    results = []
    for is_enabled in (False, True):
        net = Static(body)
        if is_enabled:
            sparse_backend.enable(net, b_th=float("inf"))
        torch.manual_seed(1)
        out = net(static_image(kind))
        out.square().sum().backward()
        results.append([as_tensor(out).detach(), *(p.grad for p in net.conv.parameters())])
    return results


CHANGES: dict[str, Callable[[Any], Any]] = {
    "leaky_relu": lambda cur: F.leaky_relu(cur, 0.5, inplace=True),
    "relu_": lambda cur: cur.relu_(),
    "add_": lambda cur: cur.add_(0.1),
    "indexed": lambda cur: cur.__setitem__((slice(None), 0), 0.0),
    "dropout": lambda cur: F.dropout(cur, 0.5, inplace=True),
}


@pytest.mark.parametrize("kind", ["sparse", "real"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("looks", [False, True])
def test_writes_on_a_static_current_stay_in_their_step(kind: str, change: str, looks: bool) -> None:
    def body(net: Any, x: Tensor, t: int) -> Any:
        current = net.conv(x)
        CHANGES[change](current)
        if looks:
            current.sum().item()
        return current

    theirs, ours = runs_of(body, kind)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["sparse", "real"])
def test_a_static_image_under_other_settings(kind: str) -> None:
    def body(net: Any, x: Tensor, t: int) -> Any:
        net.conv.padding = (t % 2, t % 2)
        return net.conv(x).mean((2, 3))

    theirs, ours = runs_of(body, kind)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["sparse", "real"])
def test_backward_at_every_step_of_a_static_image(kind: str) -> None:
    def body(net: Any, x: Tensor, t: int) -> Any:
        current = net.conv(x)
        current.square().sum().backward()
        return current.detach()

    results = []
    for is_enabled in (False, True):
        net = Static(body)
        if is_enabled:
            sparse_backend.enable(net, b_th=float("inf"))
        net(static_image(kind))
        results.append([p.grad for p in net.conv.parameters()])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["sparse", "real"])
def test_kept_static_currents_are_apart(kind: str) -> None:
    net = sparse_backend.enable(Static(lambda net, x, t: net.kept.append(net.conv(x)) or net.kept[-1]), b_th=0.4)
    net.kept = []
    net(static_image(kind))
    expected = [as_tensor(current).detach().clone() for current in net.kept]
    with torch.no_grad():
        net.kept[0].mul_(0)
    assert_close(as_tensor(net.kept[1]), expected[1])


# Events as they were when they were taken.


@pytest.mark.parametrize("density", [0.1, 0.2])
def test_events_written_after_a_convolution_took_them(density: float) -> None:
    dense, weight = spikes((4, 2, 6, 6), density, 1), normal((3, 2, 3, 3), 2)
    events = EventTensor.from_dense(dense, row_dims=3)
    current = F.conv2d(events, weight)
    events.mul_(3)
    assert_close(current + 0, F.conv2d(dense, weight))


def test_events_written_after_a_recorded_call_are_read_as_they_were() -> None:
    class Loop(Static):
        writes = False

        def forward(self, x: Any) -> Any:
            mem = self.lif.reset_mem()
            for t in range(2):
                current = self.conv(x[t])
                if self.writes:
                    x[t].mul_(0)
                _, mem = self.lif(current, mem)
            return mem

    net = sparse_backend.enable(Loop(lambda *_: None), b_th=0.4)
    expected = net(EventTensor.from_dense(spikes((2, 2, 1, 6, 6), 0.2, 3), row_dims=3))
    net.writes = True
    assert torch.equal(net(EventTensor.from_dense(spikes((2, 2, 1, 6, 6), 0.2, 3), row_dims=3)), expected)


def test_what_is_cut_without_gradient_has_none() -> None:
    dense = spikes((3, 2, 4, 4), 0.3, 1)
    base = EventTensor.from_dense(dense, row_dims=3)
    spk = EventTensor(
        base.shape, base.row_ptr, base.indices, handle=torch.ones(base.nnz, dtype=F64, requires_grad=True),
        active_ptr=base.row_ptr, active_indices=base.indices, columns=base.columns,
    )  # fmt: skip
    sequence = spk.reshaped(torch.Size((3, 1, 2, 4, 4)))
    with torch.no_grad():
        view, step = spk.flatten(1), sequence[0]
    weight = normal((5, 32), 2).requires_grad_()
    for part in (view, step.flatten(1)):
        for loss in (F.linear(part, weight).sum(), (part * weight[0]).sum()):
            assert torch.autograd.grad(loss, spk.handle, allow_unused=True) == (None,)
    for part in (spk.flatten(1), sequence[1].flatten(1)):  # whoever asked first
        (grad,) = torch.autograd.grad(F.linear(part, weight).sum(), spk.handle)
        assert bool(grad.any())


def test_flatten_of_events_whose_dense_form_is_strided() -> None:
    dense = spikes((3, 4, 5, 5), 0.3, 1).to(memory_format=torch.channels_last).requires_grad_()
    flat = EventTensor.from_dense(dense, row_dims=3).flatten(1)
    assert_close((flat + 0).detach(), dense.detach().flatten(1))
    (grad,) = torch.autograd.grad((flat * torch.arange(100.0).double()).sum(), dense)
    assert_close(grad.flatten(1), torch.arange(100.0).double().expand(3, 100))
