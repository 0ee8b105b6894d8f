"""The two-state neuron and the leaky integrator against plain loops in float64, and those loops against Norse's steps.

E1: the forward pass is the loop's. E2: with b_th = inf every gradient is. E3: with any b_th every gradient is that of
the loop with its surrogate masked to |u - threshold| < b_th, in the reset and in the recurrence too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import norse.torch.functional.iaf as norse_iaf
import norse.torch.functional.lif as norse_lif
import norse.torch.functional.lif_box as norse_box
import pytest
import torch
from helpers import (
    INF,
    SURROGATES,
    as_tensor,
    assert_close,
    assert_same_gradients,
    fast_sigmoid,
    generator,
    gradients,
    masked,
    normal,
    spikes,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from norse.torch.functional.leaky_integrator import LIParameters, LIState, li_feed_forward_step
from norse.torch.functional.reset import reset_subtract, reset_value
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_backend import EventTensor, functional
from sparse_backend.deferred import DeferredCurrent, WeightHub
from sparse_backend.dynamics import LI, LIF, LIF_RESETS, Leaky
from sparse_backend.execute import run_leaky
from sparse_backend.execute_lif import run_li, run_lif

F64 = torch.float64
EDGE = 1e-9
SEED = st.integers(0, 10_000)
B_TH = st.sampled_from([0.013, 0.11, 0.37, 1.3, INF])
LEARN = ("mem_gain", "syn_decay", "leak", "threshold", "reset_to", "v", "i", "recurrent", "z")


@dataclass
class Layer:
    """Weights and one population; tensors are leaves, those that learn require grad."""

    weight: Tensor
    bias: Tensor | None
    mem_gain: Tensor
    syn_decay: Tensor | None
    leak: Tensor | None
    threshold: Tensor
    reset_to: Tensor
    reset: str = "value"
    detached: bool = False
    v: Tensor | None = None
    i: Tensor | None = None
    recurrent: Tensor | None = None
    z: Tensor | None = None

    def neuron(self) -> LIF:
        coefficients = self.mem_gain, self.syn_decay, self.leak, self.threshold, self.reset_to
        return LIF(*coefficients, LIF_RESETS[self.reset], self.detached)

    def leaves(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("weight", "bias", *LEARN)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}


@dataclass
class Trace:
    """One layer's run by the loop."""

    spikes: Tensor
    v: Tensor  #: [T, B, N], as the rest
    i: Tensor | None
    x: Tensor


def loop(current: Tensor, layer: Layer, spike_grad: Any) -> Trace:
    """The equations, one step after the other."""
    v = layer.v
    if v is None:
        v = torch.zeros_like(current[0]) if layer.leak is None else layer.leak.detach().expand(current.shape[1:])
    i = torch.zeros_like(current[0]) if layer.i is None else layer.i
    z = torch.zeros_like(current[0]) if layer.z is None else layer.z
    zs, vs, currents, xs = [], [], [], []
    for step in current:
        inflow = i + step
        if layer.recurrent is not None:
            inflow = inflow + z @ layer.recurrent.t()
        u = v + layer.mem_gain * (inflow if layer.leak is None else (layer.leak - v) + inflow)
        i = torch.zeros_like(inflow) if layer.syn_decay is None else layer.syn_decay * inflow
        x = u - layer.threshold
        z = spike_grad(x)
        jump = z.detach() if layer.detached else z
        if layer.reset == "value":
            v = (1 - jump) * u + jump * layer.reset_to
        elif layer.reset == "subtract":
            v = u - jump * layer.threshold
        else:
            v = u
        zs.append(z), vs.append(v), currents.append(i), xs.append(x.detach())
    has_current = layer.syn_decay is not None
    return Trace(torch.stack(zs), torch.stack(vs), torch.stack(currents) if has_current else None, torch.stack(xs))


def run_loops(x: Tensor, layers: list[Layer], spike_grad: Any) -> list[Trace]:
    traces = []
    for layer in layers:
        traces.append(loop(torch.nn.functional.linear(x, layer.weight, layer.bias), layer, spike_grad))
        x = traces[-1].spikes
    return traces


def run_ours(
    x: Any, layers: list[Layer], spike_grad: Any, b_th: float, fused: bool, keep_states: bool, dense: bool
) -> list[Any]:
    results = []
    for layer in layers:
        events = EventTensor.from_dense(x)
        current: Any = DeferredCurrent(events, WeightHub(layer.weight, layer.bias, None, 0))
        shape = tuple(current.shape)
        if not fused:
            current = current.to_dense()
        result = run_lif(
            current, shape, layer.neuron(), layer.v, layer.i, spike_grad, b_th, recurrent=layer.recurrent, z=layer.z,
            keep_states=keep_states, dense=dense,
        )  # fmt: skip
        results.append(result)
        x = result.spikes
    return results


@dataclass
class Options:
    """What one layer is made of."""

    reset: str = "value"
    detached: bool = False
    synaptic: bool = True
    leaks: bool = True
    recurrent: bool = False
    bias: bool = True
    given: frozenset[str] = frozenset()  # of v, i, z
    vectors: frozenset[str] = frozenset()  # coefficients of one entry per neuron
    learn: frozenset[str] = frozenset(LEARN)


OPTIONS = st.builds(
    Options,
    reset=st.sampled_from(sorted(LIF_RESETS)),
    detached=st.booleans(),
    synaptic=st.booleans(),
    leaks=st.booleans(),
    recurrent=st.booleans(),
    bias=st.booleans(),
    given=st.frozensets(st.sampled_from(["v", "i", "z"])),
    vectors=st.frozensets(st.sampled_from(LEARN[:5])),
    learn=st.frozensets(st.sampled_from(LEARN)),
)


def make_layer(options: Options, inputs: int, neurons: int, batch: int, density: float, seed: int) -> Layer:
    def uniform(name: str, low: float, high: float) -> Tensor:
        shape = (neurons,) if name in options.vectors else ()
        random = generator(seed + LEARN.index(name))
        return low + (high - low) * torch.rand(shape, generator=random, dtype=F64)

    def state(name: str, scale: float) -> Tensor | None:
        wanted = name in options.given and (name != "z" or options.recurrent)
        return normal((batch, neurons), seed + 10 + LEARN.index(name), scale=scale) if wanted else None

    scale = 2.5 / (1 + inputs * density) ** 0.5
    layer = Layer(
        normal((neurons, inputs), seed + 20, scale=scale) + 0.4 * scale,
        normal((neurons,), seed + 21, scale=0.3) if options.bias else None,
        uniform("mem_gain", 0.1, 0.6),
        uniform("syn_decay", 0.0, 0.9) if options.synaptic else None,
        uniform("leak", -0.3, 0.3) if options.leaks else None,
        uniform("threshold", 0.3, 1.0),
        uniform("reset_to", -0.5, 0.2),
        options.reset,
        options.detached,
        state("v", 0.7),
        state("i", 0.7),
        normal((neurons, neurons), seed + 22, scale=1.5 / neurons**0.5) if options.recurrent else None,
        state("z", 1.0),
    )
    layer.weight.requires_grad_()
    if layer.bias is not None:
        layer.bias.requires_grad_()
    for name in options.learn:
        tensor = getattr(layer, name)
        if tensor is not None:
            tensor.requires_grad_()
    return layer


def loss_of(parts: list[dict[str, Any]], terms: str, seed: int) -> Tensor:
    """Looks at what `terms` name: spikes, v, i of the last layer, spikes of the others where "hidden"."""
    loss = torch.zeros((), dtype=F64)
    for name in ("spikes", "v", "i"):
        tensor = parts[-1][name]
        if name in terms.split() and tensor is not None:
            loss = loss + (tensor * normal(tensor.shape, seed + len(name))).sum()
    if "hidden" in terms:
        for depth, part in enumerate(parts[:-1]):
            loss = loss + (part["spikes"] * normal(part["spikes"].shape, seed + 10 + depth)).sum()
    return loss


def edge_distance(trace: Trace, b_th: float) -> float:
    size = trace.x.abs()
    return min(float(size.min()), float((size - b_th).abs().min()) if b_th < INF else INF)


def compare(
    x: Tensor, layers: list[Layer], spike_grad: Any, b_th: float, terms: str, fused: bool, keep_states: bool,
    dense: bool, seed: int,
) -> None:  # fmt: skip
    leaves = {f"{name} {depth}": leaf for depth, layer in enumerate(layers) for name, leaf in layer.leaves().items()}
    if x.requires_grad:
        leaves["x"] = x
    traces = run_loops(x, layers, masked(spike_grad, b_th))
    assume(min(edge_distance(trace, b_th) for trace in traces) > EDGE)
    results = run_ours(x, layers, spike_grad, b_th, fused, keep_states, dense)
    ours, stock = [], []
    for depth, (result, trace) in enumerate(zip(results, traces, strict=True)):
        assert_close(as_tensor(result.spikes), trace.spikes, f"spikes of layer {depth}")
        assert_close(result.v_last, trace.v[-1], f"v of layer {depth}")
        assert (result.i_last is None) == (trace.i is None)
        if trace.i is not None:
            assert_close(result.i_last, trace.i[-1], f"i of layer {depth}")
        if keep_states:
            assert_close(result.v_seq, trace.v, f"every v of layer {depth}")
            if trace.i is not None:
                assert_close(result.i_seq, trace.i, f"every i of layer {depth}")
        if type(result.spikes) is EventTensor:
            inside = int((trace.x.abs() < b_th).sum())
            assert (result.n_active, result.n_spikes) == (inside, int(trace.spikes.sum()))
        ours.append(
            {
                "spikes": as_tensor(result.spikes),
                "v": result.v_seq if keep_states else result.v_last,
                "i": result.i_seq if keep_states else result.i_last,
            }
        )
        i = trace.i if trace.i is None or keep_states else trace.i[-1]
        stock.append({"spikes": trace.spikes, "v": trace.v if keep_states else trace.v[-1], "i": i})
    expected = gradients(loss_of(stock, terms, seed), leaves)
    assert_same_gradients(gradients(loss_of(ours, terms, seed), leaves), expected)


@settings(deadline=None, max_examples=150)
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=3),
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 5, 9, 17])] * 4),
    steps=st.sampled_from([1, 2, 3, 8]),
    batch=st.sampled_from([1, 2, 3]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    x_learns=st.booleans(),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    b_th=B_TH,
    terms=st.sampled_from(["spikes", "v", "i", "spikes v", "spikes v i hidden", "hidden"]),
    fused=st.booleans(),
    keep_states=st.booleans(),
    dense=st.booleans(),
    seed=SEED,
)
@example(
    options=[Options(), Options("subtract", recurrent=True), Options("value", recurrent=True, given=frozenset("viz"))],
    sizes=(9, 17, 9, 5), steps=8, batch=3, density=0.5, x_learns=True, surrogate="lopsided", b_th=0.37,
    terms="spikes v i hidden", fused=True, keep_states=True, dense=False, seed=1,
)  # fmt: skip
@example(
    options=[Options(), Options("subtract", synaptic=False), Options("none", given=frozenset("vi"))],
    sizes=(9, 17, 9, 5), steps=8, batch=3, density=0.5, x_learns=True, surrogate="atan", b_th=INF,
    terms="spikes v i hidden", fused=True, keep_states=False, dense=True, seed=2,
)  # fmt: skip
def test_layers_against_the_loop(
    options, sizes, steps, batch, density, x_learns, surrogate, b_th, terms, fused, keep_states, dense, seed
):
    x = spikes((steps, batch, sizes[0]), density, seed)
    if x_learns:
        x.requires_grad_()
    layers = [
        make_layer(option, sizes[depth], sizes[depth + 1], batch, density, seed + 100 * depth)
        for depth, option in enumerate(options)
    ]
    compare(x, layers, SURROGATES[surrogate], b_th, terms, fused, keep_states, dense, seed)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.sampled_from([1, 2, 8]), batch=st.sampled_from([1, 3]), inputs=st.sampled_from([1, 9]),
    neurons=st.sampled_from([1, 5, 17]), density=st.sampled_from([0.0, 0.3, 1.0]), synaptic=st.booleans(),
    given_states=st.frozensets(st.sampled_from(["v", "i"])), vectors=st.frozensets(st.sampled_from(LEARN[:3])),
    fused=st.booleans(), keep_states=st.booleans(), x_learns=st.booleans(),
    terms=st.sampled_from(["v", "i", "last", "v i last"]), seed=SEED,
)  # fmt: skip
def test_a_leaky_integrator_against_the_loop(
    steps, batch, inputs, neurons, density, synaptic, given_states, vectors, fused, keep_states, x_learns, terms, seed
):
    options = Options("none", synaptic=synaptic, given=given_states, vectors=vectors)
    layer = make_layer(options, inputs, neurons, batch, density, seed)
    x = spikes((steps, batch, inputs), density, seed)
    x.requires_grad_(x_learns)
    current: Any = DeferredCurrent(EventTensor.from_dense(x), WeightHub(layer.weight, layer.bias, None, 0))
    current = current if fused else current.to_dense()
    li = LI(layer.mem_gain, layer.syn_decay, layer.leak)
    result = run_li(current, (steps, batch, neurons), li, layer.v, layer.i, keep_states=keep_states)
    trace = loop(torch.nn.functional.linear(x, layer.weight, layer.bias), layer, lambda x: (x > 0).to(x.dtype))
    pairs = {"v": (result.v_seq, trace.v), "last": (result.v_last, trace.v[-1])}
    if synaptic:
        pairs["i last"] = (result.i_last, trace.i[-1])
        if keep_states:
            pairs["i"] = (result.i_seq, trace.i)
    else:
        assert result.i_last is None and result.i_seq is None
    losses = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for name, (ours, stock) in pairs.items():
        assert_close(ours, stock, name)
        if set(name.split()) <= set(terms.split()):
            factor = normal(stock.shape, seed + len(name))
            losses = losses[0] + (ours * factor).sum(), losses[1] + (stock * factor).sum()
    leaves = {name: leaf for name, leaf in layer.leaves().items() if name not in ("threshold", "reset_to")}
    leaves |= {"x": x} if x_learns else {}
    assert_same_gradients(gradients(losses[0], leaves), gradients(losses[1], leaves))


class OpsSeen(TorchDispatchMode):
    """Names of the ops of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("sparse_backend."):
            self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("b_th", [0.4, INF])
def test_a_reset_through_which_gradients_flow_runs_the_forward_once(b_th):
    current, weight = normal((6, 3, 5), 1).requires_grad_(), normal((5, 5), 2).requires_grad_()
    beta, threshold = torch.tensor(0.9, dtype=F64), torch.tensor(0.5, dtype=F64)
    leaky = Leaky(beta, threshold, reset_delay=False)
    lif = LIF(beta / 4, beta, beta * 0, threshold, beta * 0)
    surrogate = fast_sigmoid()
    runs = {
        "leaky": lambda: run_leaky(current, (6, 3, 5), leaky, None, surrogate, b_th),
        "lif": lambda: run_lif(current, (6, 3, 5), lif, None, None, surrogate, b_th),
        "lif recurrent": lambda: run_lif(current, (6, 3, 5), lif, None, None, surrogate, b_th, recurrent=weight),
    }
    for name, run in runs.items():
        with OpsSeen() as seen:
            result = run()
        assert seen.names == [f"{name.split()[0]}{'_dense' if name == 'leaky' and b_th == INF else ''}"], name
        assert as_tensor(result.spikes).requires_grad


# The public functions.


def test_the_public_functions_are_the_same_layers():
    options = Options(given=frozenset("vi"), vectors=frozenset(["leak"]))
    layer = make_layer(options, 9, 5, 3, 0.3, 1)
    x = spikes((8, 3, 9), 0.2, 2)
    names = ("mem_gain", "syn_decay", "leak", "threshold", "reset_to", "v", "i")
    arguments = {name: getattr(layer, name) for name in names}
    rest = {"spike_grad": SURROGATES["atan"], "b_th": 0.4}
    current = torch.nn.functional.linear(x, layer.weight, layer.bias)
    trace = loop(current, layer, masked(rest["spike_grad"], 0.4))
    one = functional.linear_lif(x, layer.weight, layer.bias, **arguments, **rest)
    two = functional.lif(current, **arguments, **rest, return_states=True)
    for spk, v, i in ((one.spikes, one.v, one.i), (two.spikes, two.v[-1], two.i[-1])):
        assert type(spk) is EventTensor
        assert_close(spk.to_dense(), trace.spikes, "spikes")
        assert_close(v, trace.v[-1], "v")
        assert_close(i, trace.i[-1], "i")
    factor = normal(trace.spikes.shape, 3)
    expected = gradients((trace.spikes * factor).sum(), layer.leaves())
    assert_same_gradients(gradients((one.spikes * factor).sum(), layer.leaves()), expected)

    integrator = {name: arguments[name] for name in ("mem_gain", "syn_decay", "leak", "v", "i")}
    three = functional.linear_li(x, layer.weight, layer.bias, **integrator)
    four = functional.li(current, **integrator)
    layer.reset = "none"
    trace = loop(current, layer, masked(rest["spike_grad"], 0.4))
    for out in (three, four):
        assert_close(out.v, trace.v, "v of the integrator")
        assert_close(out.v_last, trace.v[-1], "last v of the integrator")
        assert_close(out.i_last, trace.i[-1], "i of the integrator")


def test_numbers_are_coefficients_and_box_neurons_have_no_current():
    x = torch.tensor([3.0, 0.0, 3.0]).view(3, 1, 1)
    spk, v, i = functional.lif(x, mem_gain=0.5, reset="subtract", spike_grad=fast_sigmoid(), b_th=0.2)
    assert i is None
    assert spk.to_dense().flatten().tolist() == [1.0, 0.0, 1.0]
    assert v.tolist() == [[0.625]]  # 1.5 - 1, then halved, then half way to 3, less 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mem_gain": "fast"}, TypeError, "mem_gain: expected a number or a tensor"),
        ({"leak": torch.zeros(4)}, ValueError, "leak: expected one entry or 3, got [4]"),
        ({"reset": "zero"}, ValueError, "reset: expected one of ['none', 'subtract', 'value'], got 'zero'"),
        ({"v": torch.zeros(3, 3)}, ValueError, "v: expected [2, 3], got [3, 3]"),
        ({"i": [0.0]}, TypeError, "i: expected a tensor, got list"),
        ({"i": torch.zeros(2, 3), "syn_decay": None}, ValueError, "i: expected None without syn_decay, got a tensor"),
        ({"v": torch.zeros(2, 3, dtype=F64)}, TypeError, "v: expected torch.float32 as the other tensors"),
        ({"recurrent": torch.zeros(2, 3)}, ValueError, "recurrent: expected [3, 3], got [2, 3]"),
        ({"z": torch.zeros(2, 3)}, ValueError, "z: expected None without recurrent weights"),
        ({"b_th": -1.0}, ValueError, "b_th: expected a positive number"),
        ({"spike_grad": torch.relu}, ValueError, "spike_grad: expected the step function"),
        ({"current": torch.zeros(0, 2, 3)}, ValueError, "T: expected at least one step"),
        ({"current": torch.zeros(2, 3)}, ValueError, "current: expected [T, B, N]"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    arguments = {"current": torch.zeros(4, 2, 3), "mem_gain": 0.1, "syn_decay": 0.8, "spike_grad": fast_sigmoid()}
    with pytest.raises(error) as raised:
        functional.lif(**(arguments | change))
    assert message in str(raised.value)


def test_integrators_without_a_synaptic_current_take_none():
    with pytest.raises(ValueError, match="i: expected None without syn_decay, got a tensor"):
        functional.li(torch.zeros(4, 2, 3), mem_gain=0.1, i=torch.zeros(2, 3))


# The loop itself, against Norse's steps.


def norse_p(layer: Layer, kind: Any, dt: float, **rest: Any) -> Any:
    if layer.syn_decay is not None:
        rest["tau_syn_inv"] = (1 - layer.syn_decay) / dt
    return kind(tau_mem_inv=layer.mem_gain / dt, v_leak=layer.leak, **rest)


@pytest.mark.parametrize("which", ["lif", "lif recurrent", "box value", "box subtract", "li", "iaf"])
@pytest.mark.parametrize("seed", range(5))
def test_the_loop_is_norses(which, seed, monkeypatch):
    dt, steps, batch, neurons = 0.001, 6, 2, 4
    surrogate = masked(fast_sigmoid(10.0), 0.4)
    monkeypatch.setattr(norse_lif, "threshold", lambda x, method, alpha: surrogate(x))
    monkeypatch.setattr(norse_box, "threshold", lambda x, method, alpha: surrogate(x))
    monkeypatch.setattr(norse_iaf, "threshold", lambda x, method, alpha: surrogate(x))
    recurrent = which == "lif recurrent"
    options = Options(
        "subtract" if which == "box subtract" else "none" if which == "li" else "value", detached=recurrent,
        synaptic=which[:3] not in ("box", "iaf"), leaks=which != "iaf", recurrent=recurrent,
        given=frozenset("viz" if which[:3] not in ("box", "iaf") else "v"),
    )  # fmt: skip
    layer = make_layer(options, 3, neurons, batch, 1.0, seed)
    if which == "iaf":
        layer.mem_gain = torch.tensor(1.0, dtype=F64)
    current = normal((steps, batch, neurons), seed + 50, scale=2.0)
    z, v, i = layer.z, layer.v, layer.i
    zs, vs = [], []
    eye = torch.eye(neurons, dtype=F64)
    spiking = {"v_th": layer.threshold, "v_reset": layer.reset_to}
    for step in current:
        if which == "lif":
            p = norse_p(layer, norse_lif.LIFParameters, dt, **spiking)
            z, (v, i) = norse_lif.lif_feed_forward_step(step, norse_lif.LIFFeedForwardState(v, i), p, dt)
        elif recurrent:
            p = norse_p(layer, norse_lif.LIFParameters, dt, **spiking)
            z, (_, v, i) = norse_lif.lif_step(step, norse_lif.LIFState(z, v, i), eye, layer.recurrent, p, dt)
        elif which == "li":
            z, (v, i) = li_feed_forward_step(step, LIState(v, i), norse_p(layer, LIParameters, dt), dt)
            z = torch.zeros_like(z)
        elif which == "iaf":
            p = norse_iaf.IAFParameters(v_th=layer.threshold, v_reset=layer.reset_to)
            z, (v,) = norse_iaf.iaf_feed_forward_step(step, norse_iaf.IAFFeedForwardState(v), p, dt)
        else:
            method = reset_value if which == "box value" else reset_subtract
            p = norse_p(layer, norse_box.LIFBoxParameters, dt, reset_method=method, **spiking)
            z, (v,) = norse_box.lif_box_feed_forward_step(step, norse_box.LIFBoxFeedForwardState(v), p, dt)
        zs.append(z), vs.append(v)
    trace = loop(current, layer, surrogate if which != "li" else lambda x: torch.zeros_like(x))
    assert_close(trace.spikes, torch.stack(zs), "spikes")
    assert_close(trace.v, torch.stack(vs), "v")
    leaves = {name: leaf for name, leaf in layer.leaves().items() if name not in ("weight", "bias")}
    if which == "li":
        leaves = {name: leaf for name, leaf in leaves.items() if name not in ("threshold", "reset_to")}
    weights = normal(trace.v.shape, seed + 60), normal(trace.v.shape, seed + 61)
    stock = gradients((torch.stack(zs) * weights[0] + torch.stack(vs) * weights[1]).sum(), leaves)
    assert_same_gradients(gradients((trace.spikes * weights[0] + trace.v * weights[1]).sum(), leaves), stock)
    assert which == "li" or float(trace.spikes.detach().sum()) > 0, "nothing spiked: take other numbers"
