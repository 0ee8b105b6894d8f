"""enable, disable, patch: an enabled Norse model behaves as the stock one in everything but its speed."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref

import norse.torch as norse
import pytest
import torch
from helpers import (
    INF,
    as_tensor,
    assert_close,
    assert_same_gradients,
    normal,
    same_snapshot,
    snapshot,
    sparse_always,
    spikes,
)
from norse.torch.functional import lif as lif_functions
from norse.torch.functional import lif_box as lif_box_functions
from norse.torch.functional.leaky_integrator import LIState
from norse.torch.functional.lif_box import LIFBoxFeedForwardState
from norse.torch.module import leaky_integrator_box, lif_box
from norse.torch.utils.state import _is_module_stateful
from norse_models import (
    STEEP,
    LayerCase,
    Model,
    ModelCase,
    enabled_copy,
    given_states,
    lif,
    make_input,
    masked_threshold,
    run,
)
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import sparse_backend
from sparse_backend import EventTensor, layer_state
from sparse_backend.adapters import for_norse
from sparse_backend.bench.memory import kept_bytes
from sparse_backend.deferred import DeferredCurrent
from sparse_backend.ops import hub as hubs

F32, F64 = torch.float32, torch.float64
CASE = ModelCase([LayerCase(neurons=8, method="triangle", alpha=0.7), LayerCase(method="triangle", alpha=0.7)])


@pytest.fixture(autouse=True)
def unpatched():
    yield
    sparse_backend.unpatch()


def small_net(**options):
    net = norse.SequentialState(
        nn.Linear(6, 8), norse.LIF(lif(**options)), nn.Linear(8, 5), norse.LIF(lif(**options)),
        nn.Linear(5, 3), norse.LI(),
    )  # fmt: skip
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(parameter.shape, k, F32, 0.8))
    return net


def small_input(steps=7, batch=3):
    return spikes((steps, batch, 6), 0.4, 0, F32)


def cells_net(**options):
    net = norse.SequentialState(
        nn.Linear(6, 8), norse.LIFCell(lif(**options)), nn.Linear(8, 5), norse.LIFBoxCell(), norse.LICell()
    )
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(parameter.shape, k, F32, 0.8))
    return net


def stock_of(net):
    return sparse_backend.disable(copy.deepcopy(net))


def paths_of(net):
    return [layer.path for layer in sparse_backend.report(net).layers]


def reasons_of(net):
    return [layer.reason for layer in sparse_backend.report(net).layers]


def dense(tree):
    return tree_map(lambda leaf: as_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def assert_same_tree(ours, stock, rtol=1e-5):
    """Same structure, classes, shapes, dtypes and numbers, and the same answer to whether they require grad."""
    assert type(ours) is type(stock) or isinstance(ours, torch.Tensor), (type(ours), type(stock))
    if isinstance(stock, torch.Tensor):
        assert ours.requires_grad == stock.requires_grad
        a, b = (x.to_dense() if x.is_sparse or type(x) is EventTensor else x for x in (ours, stock))
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite)
        assert_close(a.where(finite, 0), b.where(finite, 0), rtol=rtol)
    elif isinstance(stock, (tuple, list)):
        assert len(ours) == len(stock)
        for a, b in zip(ours, stock, strict=True):
            assert_same_tree(a, b, rtol)
    else:
        assert ours == stock


def gradients_of(net, out):
    """Gradients of a random projection of everything in `out`."""
    net.zero_grad()
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if leaves:
        sum((leaf * normal(leaf.shape, k, leaf.dtype)).sum() for k, leaf in enumerate(leaves)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def judge(net, call, b_th=0.3, rtol=1e-5):
    """`call(net)` of an enabled copy against stock with the same band; returns the enabled copy."""
    with masked_threshold(b_th):
        plain = copy.deepcopy(net)
        stock = call(plain)
        expected = gradients_of(plain, stock)
    enabled = sparse_backend.enable(copy.deepcopy(net), b_th=b_th)
    ours = call(enabled)
    assert_same_tree(ours, stock, rtol)
    assert_same_gradients(gradients_of(enabled, ours), expected, rtol)
    return enabled


# enable and disable.


def every_module():
    return norse.SequentialState(
        norse.Lift(nn.Conv2d(1, 2, 3)), nn.Flatten(2), nn.Linear(8, 4), norse.LIF(), norse.Lift(nn.Linear(4, 6)),
        norse.LIFRecurrent(6, 6), norse.LI(),
    )  # fmt: skip


def test_enable_changes_nothing_a_user_sees():
    net = every_module()
    before, keys, kinds, text = snapshot(net), list(net.state_dict()), [type(m) for m in net.modules()], repr(net)
    signatures = [inspect.signature(m.forward) for m in net.modules()]
    assert sparse_backend.enable(net, b_th=0.2) is net
    assert [type(m) for m in net.modules()] == kinds and list(net.state_dict()) == keys and repr(net) == text
    assert [inspect.signature(m.forward) for m in net.modules()] == signatures
    assert sparse_backend.disable(net) is net
    assert same_snapshot(snapshot(net), before)


def test_disable_after_training_leaves_a_stock_model():
    net = every_module()
    sparse_backend.enable(net, b_th=0.2)
    out, _ = net(normal((4, 2, 1, 4, 4), 0, F32))
    out.sum().backward()
    sparse_backend.disable(net)
    assert not any(name.startswith("_sparse") for m in net.modules() for name in m.__dict__)
    assert all("forward" not in m.__dict__ and "_replicate_for_data_parallel" not in m.__dict__ for m in net.modules())
    assert type(net[3](torch.ones(2, 3, 4))[0]) is torch.Tensor


def test_enable_is_idempotent_and_updates_b_th():
    net = every_module()
    sparse_backend.enable(net, b_th=0.2)
    before = snapshot(net)
    sparse_backend.enable(net, b_th=0.2)
    assert same_snapshot(snapshot(net), before)
    sparse_backend.enable(net, b_th=0.4)
    assert [layer.b_th for layer in sparse_backend.report(net).layers] == [0.4, 0.4, INF]
    sparse_backend.disable(sparse_backend.disable(net))
    assert "forward" not in net[3].__dict__


def test_a_new_b_th_counts_at_the_next_call():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, 0.1)
    run(net, x)
    sparse_backend.enable(net, b_th=0.5)
    assert_same_gradients(run(net, x).gradients, run(enabled_copy(model, 0.5), x).gradients)


def test_b_th_by_layer_name_is_for_what_spikes():
    net = sparse_backend.enable(small_net(), b_th={"1": 0.3})
    assert [layer.b_th for layer in sparse_backend.report(net).layers] == [0.3, "auto", INF]
    with pytest.raises(ValueError, match=r"expected names of layers, one of '1', '3', got '5', '7'"):
        sparse_backend.enable(net, b_th={"5": 0.3, "7": 0.2})


def test_a_model_of_readouts_alone_is_enabled_too():
    net = judge(nn.ModuleList([nn.Linear(6, 3), norse.LI()]), lambda m: m[1](m[0](small_input())))
    (layer,) = sparse_backend.report(net).layers
    assert (layer.path, layer.reason, layer.active) == ("dense sequence", "a readout has no spikes", None)
    assert layer.steps == {"sparse": 0, "dense": 7, "framework": 0}


def test_a_broad_surrogate_is_named_once_with_the_cure():
    """SuperSpike of Norse 1.1.0 ignores alpha: its 95 % of mass reach far below rest."""

    net = norse.SequentialState(nn.Linear(6, 8), norse.LIF(), nn.Linear(8, 3), norse.LIF())
    width = for_norse.spike_grad(net[1])
    ignores_alpha = float(torch.autograd.functional.jacobian(width, torch.tensor(0.5))) > 0.1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sparse_backend.enable(net)
        sparse_backend.enable(net)
    said = [str(warning.message) for warning in seen if "sparse_backend" in str(warning.message)]
    if ignores_alpha:
        assert len(said) == 1 and "layers 1, 3 stay dense" in said[0] and "< 19" in said[0] and "b_th=0.2" in said[0]
        net(small_input())
        assert paths_of(net) == ["dense sequence"] * 2 and "needs the band |V - threshold| < 19" in reasons_of(net)[0]
    else:
        assert not said


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_alpha_is_heeded_where_norse_heeds_it(monkeypatch, alpha):
    """As Norse's newest source has it."""

    class SuperSpike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.alpha = alpha
            ctx.save_for_backward(x)
            return (x > 0).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            return grad / (ctx.alpha * ctx.saved_tensors[0].abs() + 1) ** 2, None

    for home in (lif_functions, lif_box_functions):
        monkeypatch.setattr(home, "threshold", lambda x, method, alpha: SuperSpike.apply(x, alpha))
    net = small_net(method="super", alpha=torch.tensor(alpha))
    judge(net, lambda m: m(small_input()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse_backend.enable(net)
    assert sparse_backend.report(net).layers[0].b_th_value == pytest.approx(19 / alpha, rel=0.02)


# Which neurons are accelerated, and which are Norse's own.


OTHERS = {
    "LSNN": lambda: norse.LSNN(), "LSNNRecurrentCell": lambda: norse.LSNNRecurrentCell(4, 4),
    "LIFAdEx": lambda: norse.LIFAdEx(), "LIFRefracCell": lambda: norse.LIFRefracCell(),
    "LIFEx": lambda: norse.LIFEx(), "CobaLIFCell": lambda: norse.CobaLIFCell(4, 4),
    "IzhikevichCell": lambda: norse.IzhikevichCell(norse.tonic_spiking),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_neurons_stay_norses_and_are_named(name):
    net = nn.ModuleList([norse.LIFCell(lif()), OTHERS[name]()])
    sparse_backend.enable(net, b_th=0.2)
    assert "forward" not in net[1].__dict__
    layers = sparse_backend.report(net).layers
    assert len(layers) == 2 and layers[1].path == "framework"
    assert f"norse.torch.{name} is not accelerated yet" in layers[1].reason
    with pytest.warns(UserWarning, match=f"norse.torch.{name} is not accelerated yet"):
        sparse_backend.enable(OTHERS[name]())


def test_subclasses_are_left_alone():
    class Mine(norse.LIFCell):
        def forward(self, x, state=None):
            return super().forward(2 * x, state)

    net = nn.ModuleList([nn.Linear(6, 8), Mine(lif()), norse.LIFCell(lif())])
    sparse_backend.enable(net, b_th=0.2)
    assert "forward" not in net[1].__dict__ and "forward" in net[2].__dict__
    assert "Mine is a subclass of norse.torch.LIFCell" in reasons_of(net)[0]
    assert type(net[1](net[0](torch.zeros(2, 6)))[0]) is torch.Tensor  # a deferred current is a tensor to it


def test_every_class_named_is_accelerated():
    for cell in (norse.LIFCell(lif()), norse.LIFBoxCell(), norse.LICell(), norse.LIBoxCell(),
                 norse.IAFCell(), norse.LIFRecurrentCell(4, 4, lif()), norse.LILinearCell(4, 4)):  # fmt: skip
        sparse_backend.enable(cell, b_th=0.2)
        cell(normal((3, 4), 0, F32))
        assert paths_of(cell)[0].endswith(" step"), reasons_of(cell)
    for layer in (norse.LIF(lif()), norse.LI(), norse.LIFRecurrent(4, 4, lif()), norse.IAF(),
                  norse.Lift(norse.LIFBoxCell())):  # fmt: skip
        sparse_backend.enable(layer, b_th=0.2)
        layer(normal((5, 3, 4), 0, F32))
        assert paths_of(layer)[0].endswith(" sequence"), reasons_of(layer)


@pytest.mark.parametrize(("home", "name"), [(lif_box, "LIFBox"), (leaky_integrator_box, "LIBox")])
def test_layers_that_only_newer_versions_have(home, name):
    found = getattr(home, name, None)
    if found is None:
        assert not any(cls.__name__ == name for cls in for_norse.KINDS)
        return
    assert for_norse.KINDS[found].in_time
    judge(nn.ModuleList([nn.Linear(6, 4), found()]), lambda m: m[1](m[0](small_input())))


# From events to events.


class Watch:
    """What goes into every module of a net."""

    def __init__(self, net):
        self.seen = {}
        for name, module in net.named_modules():
            if name:
                module.register_forward_pre_hook(lambda _, args, name=name: self.seen.update({name: args[0]}))


def test_a_sequential_model_runs_from_events_to_events():
    net = small_net()
    sparse_backend.enable(net, b_th=0.1)
    watch = Watch(net)
    with sparse_always():
        out, _ = net(spikes((50, 4, 6), 0.1, 0, F32))
        out.pow(2).sum().backward()
    assert [type(watch.seen[name]) for name in "12345"] == [
        DeferredCurrent, EventTensor, DeferredCurrent, EventTensor, DeferredCurrent,
    ]  # fmt: skip
    for name in "12345":
        given = watch.seen[name]
        assert given._dense is None, f"the input of module {name} was made dense"
        assert given.is_deferred if type(given) is DeferredCurrent else given.is_events
    assert paths_of(net) == ["sparse sequence", "sparse sequence", "dense sequence"]
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("recurrent", [False, True])
def test_what_is_kept_for_the_backward_pass_is_events(recurrent):
    torch.manual_seed(0)
    p = lif(v_th=torch.tensor(1.0))
    first = [norse.LIFRecurrent(20, 64, p)] if recurrent else [nn.Linear(20, 64), norse.LIF(p)]
    net = norse.SequentialState(*first, nn.Linear(64, 64), norse.LIF(p), nn.Linear(64, 3), norse.LI())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(0.1 if "recurrent" in name else 0.5 if parameter.dim() == 1 else 3)
    x = EventTensor.from_dense(spikes((60, 16, 20), 0.05, 0, F32))
    stock, dense_x = copy.deepcopy(net), as_tensor(x)
    theirs = kept_bytes(lambda: stock(dense_x)[0].sum(), exclude=[*stock.parameters(), dense_x])
    sparse_backend.enable(net, b_th=0.02)
    net(x)
    ours = kept_bytes(lambda: net(x)[0].sum(), exclude=[*net.parameters(), x.indices, x.row_ptr])
    layers = sparse_backend.report(net).layers[:2]
    assert all("sparse" in layer.path and layer.active > 0.002 for layer in layers)
    assert ours < 0.06 * theirs


def test_event_input_is_taken_as_it_is():
    x = small_input()
    net = sparse_backend.enable(small_net(), b_th=0.3)
    watch, events = Watch(net), EventTensor.from_dense(x)
    out, _ = net(events)
    assert watch.seen["0"] is events and watch.seen["1"].events is events
    assert_close(out, stock_of(net)(x)[0], rtol=1e-5)


def test_flatten_with_nothing_to_flatten_keeps_events():
    net = sparse_backend.enable(nn.ModuleList([norse.LIF(lif()), nn.Flatten(2)]), b_th=0.2)
    with sparse_always():
        z, _ = net[0](normal((5, 3, 4), 0, F32))
    assert type(z) is EventTensor and net[1](z) is z and nn.Flatten(-1)(z) is z
    assert type(nn.Flatten()(z)) is torch.Tensor and nn.Flatten()(z).shape == (5, 12)
    with pytest.raises(IndexError):
        nn.Flatten(3)(z)


# What a call means: states.


def chunks(net, x):
    first, state = net(x[:3])
    second, state = net(x[3:], state)
    return torch.cat([as_tensor(first), as_tensor(second)]), state


def stepped(net, x):
    state, outputs = None, []
    for step in x:
        out, state = net(step, state)
        outputs.append(out)
    return torch.stack(outputs), state


def reset_every_call(net, x):
    return torch.stack([net(step)[0] for step in x])


@pytest.mark.parametrize("b_th", [0.2, INF])
@pytest.mark.parametrize("call", [lambda net, x: net(x), chunks], ids=["whole", "chunks"])
def test_sequences_with_and_without_a_state(call, b_th):
    judge(small_net(), lambda net: call(net, small_input()), b_th)


@pytest.mark.parametrize("b_th", [0.2, INF])
@pytest.mark.parametrize("call", [stepped, reset_every_call])
def test_cells_with_and_without_a_state(call, b_th):
    judge(cells_net(), lambda net: call(net, small_input()), b_th)


@pytest.mark.parametrize("b_th", [0.2, INF])
def test_an_outer_loop_under_fuse_time_runs_as_sequences(b_th):
    def call(net):
        with sparse_backend.fuse_time(net) if layer_state.is_enabled(net) else contextlib.nullcontext():
            out, state = stepped(net, small_input())
        return out, [part if part is None else type(part)(*dense(part)) for part in state]

    net = judge(cells_net(), call, b_th)
    assert all(path.endswith("sequence") for path in paths_of(net))


def test_states_are_norses_own_and_keep_their_gradients():
    for cell, state in (
        (norse.LIFCell(lif()), norse.LIFFeedForwardState), (norse.LIFBoxCell(), LIFBoxFeedForwardState),
        (norse.LICell(), LIState), (norse.LIFRecurrentCell(6, 8, lif()), norse.LIFState),
    ):  # fmt: skip
        sparse_backend.enable(cell, b_th=0.3)
        x = normal((3, 6), 0, F32).requires_grad_()
        out, after = cell(x)
        assert type(after) is state and after._fields == state._fields
        assert out.requires_grad and all(part.requires_grad for part in after)
        if hasattr(after, "z"):
            assert after.z is out
        again, _ = cell(x, after)
        again.sum().backward()
        for part in (out, *after):
            part.detach_()
            assert not part.requires_grad
        cell(x, after)[0].sum().backward()  # no second time through what was detached


@pytest.mark.parametrize("with_grad", [True, False])
def test_outputs_require_grad_as_norses_do(with_grad):
    """Norse's initial membrane requires grad, so everything after it does, also where nothing learns."""
    net = small_net().requires_grad_(False)
    with torch.set_grad_enabled(with_grad):
        ours, stock = sparse_backend.enable(copy.deepcopy(net), b_th=0.3)(small_input()), net(small_input())
    assert_same_tree(ours, stock)
    assert ours[0].requires_grad is with_grad


@pytest.mark.parametrize("make", [norse.LIF, norse.LI, lambda p: norse.LIFRecurrent(4, 4, p)])
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_what_is_handed_out_may_be_detached_in_place(make, b_th):
    net = sparse_backend.enable(make(norse.LIParameters() if make is norse.LI else lif()), b_th=b_th)
    for shape in ((5, 4), (5, 3, 4), (5, 3, 2, 4), (5, 2, 3, 2, 4)):
        out, state = net(normal(shape, 0, F32).requires_grad_())
        for part in (out, *state):
            assert part.requires_grad
            part.detach_()
            assert not part.requires_grad


def test_a_user_given_state_receives_its_gradient():
    case = ModelCase([LayerCase(method="tanh", alpha=3.0)], form="step", steps=2)
    model, states = Model(case), given_states(case)
    found = run(enabled_copy(model, 0.4), make_input("spikes", case, 0.4), states).gradients
    assert bool(found["v0"].any()) and bool(found["i0"].any())


STATES = {
    "scalar": lambda s: s(v=torch.tensor(0.3), i=torch.tensor(0.1)),
    "scalar integers": lambda s: s(v=torch.tensor(0), i=torch.tensor(0)),
    "scalar of float64": lambda s: s(v=torch.tensor(0.3, dtype=F64), i=torch.tensor(0.1, dtype=F64)),
    "one row": lambda s: s(v=torch.full((1, 4), 0.3), i=torch.full((4,), 0.1)),
    "one column": lambda s: s(v=torch.full((3, 1), 0.3), i=torch.full((3, 4), 0.1)),
    "float64": lambda s: s(v=torch.full((3, 4), 0.3, dtype=F64), i=torch.full((3, 4), 0.1, dtype=F64)),
    "another batch": lambda s: s(v=torch.zeros(2, 4), i=torch.zeros(2, 4)),
    "larger batch": lambda s: s(v=torch.zeros(5, 3, 4), i=torch.zeros(5, 3, 4)),
    "wrong neurons": lambda s: s(v=torch.zeros(3, 5), i=torch.zeros(3, 5)),
    "numbers": lambda s: s(v=0.3, i=0.1),
    "another tuple": lambda s: LIState(v=torch.zeros(3, 4), i=torch.zeros(3, 4)),
    "plain tuple": lambda s: (torch.zeros(3, 4), torch.zeros(3, 4)),
}


def outcome_of(call):
    """What a call returns, or the exception it raises."""
    try:
        return dense(call())
    except Exception as error:
        return type(error), re.sub(r"\d+", "#", str(error))  # one product of all steps has other sizes


def assert_same_outcome(ours, stock):
    if isinstance(stock, tuple) and isinstance(stock[0], type):
        assert ours == stock
    else:
        assert_same_tree(ours, stock)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("b_th", [0.3, INF])
@pytest.mark.parametrize("make", [norse.LIFCell, norse.LIF])
def test_states_of_any_shape_and_kind_are_norses_business(make, state, b_th):
    net, x = make(lif()), normal((3, 4) if make is norse.LIFCell else (5, 3, 4), 0, F32)
    given = STATES[state](norse.LIFFeedForwardState)
    stock = outcome_of(lambda: net(x, given))
    sparse_backend.enable(net, b_th=b_th)
    assert_same_outcome(outcome_of(lambda: net(x, given)), stock)
    if state.startswith(("scalar", "one ")):
        assert "framework" not in paths_of(net)[0]


def test_given_states_of_another_dtype_are_norses_business():
    """Norse would round what it adds to them."""
    cell, x = norse.LIFCell(lif()), normal((3, 4), 0, F64)
    state = norse.LIFFeedForwardState(v=normal((3, 4), 1, F32), i=normal((3, 4), 2, F32))
    stock = cell(x, state)
    sparse_backend.enable(cell, b_th=0.3)
    assert_same_tree(cell(x, state), stock, rtol=1e-15)
    assert "its state does not fit a current [3, 4] of torch.float64" in reasons_of(cell)[0]


INPUTS = {
    "no dimension": torch.tensor(0.5),
    "one dimension": normal((4,), 0, F32),
    "three dimensions": normal((2, 3, 4), 0, F32),
    "five dimensions": normal((2, 3, 4, 2, 2), 0, F32),
    "no steps": torch.zeros(0, 3, 4),
    "no batch": torch.zeros(2, 0, 4),
    "no neurons": torch.zeros(2, 3, 0),
    "bool": torch.ones(2, 3, dtype=torch.bool),
    "integers": torch.ones(2, 3, dtype=torch.long),
    "float64": normal((2, 3, 4), 0, F64),
    "half": torch.ones(2, 3, dtype=torch.float16),
    "bfloat16": torch.ones(2, 3, 4, dtype=torch.bfloat16),
    "sparse": spikes((2, 3), 0.5, 0, F32).to_sparse(),
    "sparse bool": torch.ones(2, 3, dtype=torch.bool).to_sparse(),
    "nan": torch.full((2, 3, 4), float("nan")),
    "inf": torch.full((2, 3, 4), float("inf")),
}
MODULES = {
    "LIFCell": lambda: norse.LIFCell(lif()),
    "LIF": lambda: norse.LIF(lif()),
    "LIFBoxCell": lambda: norse.LIFBoxCell(),
    "IAFCell": lambda: norse.IAFCell(),
    "IAF": lambda: norse.IAF(),
    "LICell": lambda: norse.LICell(),
    "LI": lambda: norse.LI(),
    "LIBoxCell": lambda: norse.LIBoxCell(),
    "LILinearCell": lambda: norse.LILinearCell(4, 3),
    "LIFRecurrentCell": lambda: norse.LIFRecurrentCell(4, 3, lif()),
    "LIFRecurrent": lambda: norse.LIFRecurrent(4, 3, lif()),
    "Lift(LIFCell)": lambda: norse.Lift(norse.LIFCell(lif())),
    "Lift(LICell)": lambda: norse.Lift(norse.LICell()),
    "Lift(Linear)": lambda: norse.SequentialState(norse.Lift(nn.Linear(4, 3)), norse.LI()),
    "Lift(SequentialState)": lambda: norse.Lift(norse.SequentialState(nn.Linear(4, 3), norse.LIFCell(lif()))),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", MODULES)
def test_inputs_of_any_shape_and_kind_are_norses_business(name, kind):
    net, x = MODULES[name](), INPUTS[kind]
    stock = outcome_of(lambda: copy.deepcopy(net)(x))
    sparse_backend.enable(net, b_th=INF)
    assert_same_outcome(outcome_of(lambda: net(x)), stock)


def test_other_inputs_say_so_in_the_report():
    cell = sparse_backend.enable(norse.LIFCell(lif()), b_th=0.2)
    for x, reason in ((INPUTS["sparse"], "sparse tensor"), (INPUTS["half"], "torch.float16"), (INPUTS["bool"], "bool")):
        cell(x)
        assert paths_of(cell) == ["framework"] and reason in reasons_of(cell)[0]


# record_states.


@pytest.mark.parametrize("b_th", [0.3, INF])
@pytest.mark.parametrize("make", [norse.LIF, norse.LI, lambda **k: norse.LIFRecurrent(6, 6, lif(), **k)])
@pytest.mark.parametrize("shape", [(5, 3, 6), (5, 6), (5, 2, 3, 6)])
def test_recorded_states(make, shape, b_th):
    net = judge(make(record_states=True), lambda m: m(normal(shape, 0, F32)), b_th)
    _, state = net(normal(shape, 0, F32))
    assert all(part.shape == shape for part in state)


# Parameters.


def test_parameters_may_be_replaced_and_changed_between_calls():
    net, x = norse.LIFCell(lif()), normal((3, 5), 0, F32) + 1
    sparse_backend.enable(net, b_th=0.3)

    def agrees(state=None):
        plain = norse.LIFCell(net.p, dt=net.dt)
        for _ in range(3):
            (z, after), (expected, plain_after) = net(x, state), plain(x, state)
            assert_same_tree(z, expected), assert_same_tree(after, plain_after)
            state = after
        return after

    state = agrees()
    net.p = net.p._replace(v_th=torch.tensor(0.2))
    state = agrees(state)
    net.p.v_th.fill_(0.9)
    state = agrees(state)
    net.p.tau_mem_inv.fill_(300.0)
    state = agrees(state)
    net.p.tau_mem_inv.data.fill_(200.0)  # bumps no version: seen where a sequence begins
    agrees()
    net.dt = 0.002
    state = agrees(state)
    net.p = net.p._replace(tau_syn_inv=torch.full((5,), 300.0))
    state = agrees(state)
    net.p = net.p._replace(v_reset=torch.full((3, 5), 0.1))
    agrees(state)
    assert "its v_reset is [3, 5] of torch.float32, not one number, or one per neuron of [5]" in reasons_of(net)[0]
    net.p = net.p._replace(v_reset=torch.tensor(0.1), method="circ", alpha=torch.tensor(0.5))
    agrees()
    assert paths_of(net)[0].endswith("step")


NUMBERS = {"tau_mem_inv": 400, "tau_syn_inv": 150.0, "v_leak": 0.05, "v_th": 0.3, "v_reset": 0, "alpha": 5}


@pytest.mark.parametrize("make", [norse.LIFCell, norse.LIF, lambda p: norse.LIFRecurrent(4, 4, p)])
def test_parameters_may_be_numbers(make):
    net = judge(make(norse.LIFParameters(method="tanh", **NUMBERS)), lambda m: m(normal((6, 3, 4), 0, F32) + 1))
    assert "framework" not in paths_of(net)[0]


@pytest.mark.parametrize("of", [F32, F64])
@pytest.mark.parametrize("given", [F32, F64])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_parameters_of_another_dtype(shape, of, given):
    """A number of another dtype changes nothing; one per neuron promotes, which is Norse's business."""
    cell, x = norse.LIFCell(lif(v_th=torch.full(shape, 0.3, dtype=of))), normal((3, 4), 0, given) + 1
    stock = cell(x)
    sparse_backend.enable(cell, b_th=INF)
    assert_same_tree(cell(x), stock, rtol=1e-6)
    assert ("framework" in paths_of(cell)[0]) == (shape == (4,) and of is F64 and given is F32)


def test_biological_parameters():
    make = getattr(norse.LIFParameters, "bio_default", None)
    bio = lif_functions.default_bio_parameters if make is None else make()
    net = norse.LIF(bio._replace(tau_mem_inv=torch.tensor(300.0), **STEEP))
    judge(net, lambda m: m(normal((6, 3, 4), 0, F32, 60.0)), b_th=5.0)
    with pytest.warns(UserWarning, match="stays dense"):
        sparse_backend.enable(norse.LIF(bio._replace(method="tanh", alpha=torch.tensor(0.1))))
    sparse_backend.enable(norse.LIF(bio._replace(method="tanh", alpha=torch.tensor(0.2))))  # 9 of 15 above rest


def test_box_parameters_may_be_numbers():
    numbers = {name: value for name, value in NUMBERS.items() if name != "tau_syn_inv"}
    cell = norse.LIFBoxCell(norse.LIFBoxParameters(method="tanh", **numbers))
    net = judge(cell, lambda m: m(normal((3, 4), 0, F32) + 1, LIFBoxFeedForwardState(v=torch.zeros(3, 4))))
    assert paths_of(net) == ["sparse step"] or paths_of(net) == ["dense step"]


def test_parameters_that_are_made_from_learned_ones():
    """Time constants kept in (0, 1) by a sigmoid, as people do: `p` is replaced at every forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cell = nn.Linear(6, 8), norse.LIFCell(lif())
            self.raw = nn.Parameter(torch.linspace(-1, 1, 8))

        def forward(self, x):
            self.cell.p = self.cell.p._replace(tau_mem_inv=1000 * torch.sigmoid(self.raw))
            state, out = None, []
            for step in x:
                z, state = self.cell(self.linear(step), state)
                out.append(z)
            return torch.stack(out), state

    net = judge(Net(), lambda m: m(small_input()))
    assert "framework" not in paths_of(net)


def test_truncated_backpropagation_through_time_constants_that_learn():
    """A backward pass every two steps; the state goes on."""
    found = []
    for enabled in (True, False):
        p = lif(v_th=nn.Parameter(torch.tensor(0.4)))._replace(tau_mem_inv=nn.Parameter(torch.tensor(400.0)))
        cell, state = norse.LIFCell(p), None
        with masked_threshold(INF if enabled else 0.3):
            if enabled:
                sparse_backend.enable(cell, b_th=0.3)
            for t, x in enumerate(normal((6, 3, 4), 0, F32) + 1):
                z, state = cell(x, state)
                if t % 2:
                    (z.sum() + state.v.sum()).backward()
                    state.v.detach_(), state.i.detach_()
        found.append({"tau": p.tau_mem_inv.grad, "v_th": p.v_th.grad})
    assert_same_gradients(*found, rtol=1e-5)


REFUSED = {
    "heaviside": (lambda: norse.LIFCell(lif(method="heaviside")), "its surrogate has no derivative"),
    "adjoint": (lambda: norse.LIFCell(lif(method="adjoint")), "its activation is lif_feed_forward_adjoint_step"),
    "unknown": (lambda: norse.LIFCell(lif(method="steep")), "its surrogate cannot be evaluated"),
    "alpha per neuron": (lambda: norse.LIFCell(lif(alpha=torch.rand(4) + 1)), "its surrogate"),
    "reset of one's own": (
        lambda: norse.LIFBoxCell(norse.LIFBoxParameters(**STEEP, reset_method=lambda z, v, reset, th: v * (1 - z))),
        "its reset_method is not one of Norse's",
    ),
    "activation of one's own": (
        lambda: other_activation(norse.LIFCell(lif())), "its activation is <lambda>, not Norse's lif_feed_forward_step"
    ),
}  # fmt: skip


def other_activation(cell):
    cell.activation = lambda x, state, p, dt: lif_functions.lif_feed_forward_step(2 * x, state, p, dt)
    return cell


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engine_cannot_do_is_norses_own(case):
    make, reason = REFUSED[case]
    net, x = make(), normal((3, 4), 0, F32) + 1
    x.requires_grad_()
    stock = outcome_of(lambda: net(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_backend.enable(net)  # nothing is said of a band that does not exist
    sparse_backend.enable(net, b_th=0.3)
    assert_same_outcome(outcome_of(lambda: net(x)), stock)
    assert paths_of(net) == ["framework"] and reason in reasons_of(net)[0]


def test_initial_states_of_ones_own():
    cell = norse.LIFCell(lif())
    learned = nn.Parameter(torch.full((4,), 0.2))
    cell.register_parameter("v0", learned)
    cell.state_fallback = lambda x: norse.LIFFeedForwardState(v=learned, i=torch.zeros_like(x))
    sparse_backend.enable(cell, b_th=INF)
    z, state = cell(normal((3, 4), 0, F32))
    (z.sum() + state.v.sum()).backward()
    assert bool(learned.grad.any()) and paths_of(cell) == ["dense step"]
    cell.state_fallback = lambda x: norse.LIFFeedForwardState(v=x.mean(), i=torch.zeros_like(x))
    x = normal((5, 3, 4), 0, F32)
    assert_same_tree(norse.Lift(cell)(x), norse.Lift(stock_of(cell))(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("b_th", [0.3, INF])
@pytest.mark.parametrize("kind", ["LIFCell", "LIFRecurrentCell", "LICell"])
def test_the_initial_state_that_norse_makes_is_taken_from_users_too(kind, b_th, fused):
    """In float32, whatever the current is."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (5, 5) if kind == "LIFRecurrentCell" else ()
            self.cell = getattr(norse, kind)(*sizes, p=norse.LIParameters() if kind == "LICell" else lif()).double()
            if sizes:
                with torch.no_grad():
                    self.cell.input_weights.copy_(normal((5, 5), 1))
                    self.cell.recurrent_weights.copy_(normal((5, 5), 2))

        def forward(self, x, given):
            state, out = self.cell.initial_state(x[0]) if given else None, []
            for step in x:
                z, state = self.cell(step, state)
                out.append(z)
            return torch.stack(out), *state

    net, x = Loop(), normal((6, 3, 5), 0) * 4
    sparse_backend.enable(net, b_th=b_th, fuse_time=fused)
    results = []
    for given in (False, True):
        leaf = x.clone().requires_grad_()
        out = net(leaf, given)
        sum((part * part).sum() for part in out).backward()
        results.append([*(part.detach() + 0 for part in out), leaf.grad])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    assert sparse_backend.report(net).layers[0].steps["framework"] == 0


# Containers.


def hidden_net():
    net = small_net()
    net.return_hidden = True
    return net


def nested():
    inner = norse.SequentialState(nn.Linear(8, 5), norse.LIF(lif()))
    return norse.SequentialState(nn.Linear(6, 8), norse.LIF(lif()), inner, nn.Linear(5, 3), norse.LI())


def with_recurrence():
    return norse.SequentialState(
        nn.Linear(6, 8), norse.LIF(lif()), norse.Lift(nn.Linear(8, 4)), norse.LIFRecurrent(4, 4, lif())
    )


@pytest.mark.parametrize("make", [hidden_net, nested, with_recurrence])
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_containers_over_sequences(make, b_th):
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    judge(net, lambda m: m(small_input()), b_th)
    judge(net, lambda m: chunks_of(m, small_input()), b_th)


def chunks_of(net, x):
    first, state = net(x[:3])
    return first, net(x[3:], state)


def test_the_list_of_states_is_treated_as_norse_treats_it():
    """1.1.0 writes into the caller's list, newer versions do not."""
    net, x = small_net(), small_input()
    enabled = sparse_backend.enable(copy.deepcopy(net), b_th=0.3)
    for fuse_time in (True, False):
        sparse_backend.enable(enabled, b_th=0.3, fuse_time=fuse_time)
        lists = [[None] * 6, [None] * 6]
        for m, given in zip((enabled, net), lists, strict=True):
            m(x, given)
        assert [type(state) for state in lists[0]] == [type(state) for state in lists[1]]


def test_an_enabled_module_in_a_new_container_keeps_its_state():
    x = small_input()
    for fuse_time in (True, False):
        inner = sparse_backend.enable(small_net(), b_th=INF, fuse_time=fuse_time)
        for module in (inner, inner[1], inner[5]):
            assert _is_module_stateful(module)
        assert not _is_module_stateful(inner[0])
        outer = norse.SequentialState(inner)
        assert outer.stateful_layers == [True]
        out, (states,) = outer(x)
        assert_same_tree((out, states), stock_of(inner)(x))


def test_forward_state_hooks():
    net, seen = small_net(), {}
    for name, m in (("stock", net), ("ours", sparse_backend.enable(copy.deepcopy(net), b_th=0.3))):
        m.register_forward_state_hooks(
            lambda module, args, output, name=name: seen.setdefault(name, []).append((*args, *output))
        )
        _, state = m(small_input())
        m(small_input(), state)
        m.remove_forward_state_hooks()
        m(small_input())
    assert len(seen["ours"]) == len(seen["stock"]) == 6
    assert_same_tree(dense(seen["ours"]), seen["stock"])


@pytest.mark.parametrize("outputs", [-1, 0, [0, 1]])
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_recurrent_sequential(outputs, b_th):
    torch.manual_seed(0)
    net = norse.RecurrentSequential(norse.LIFCell(lif()), nn.Linear(6, 6), norse.LIFBoxCell(), output_modules=outputs)

    def call(m):
        out, state = m(small_input()[0])
        for x in small_input()[1:4] if not isinstance(outputs, list) else []:
            out, state = m(x, state)
        return out, state

    judge(net, call, b_th)


def test_a_lifted_linear_layer_sees_the_whole_sequence_once():
    net = nn.ModuleList([norse.Lift(nn.Linear(6, 8)), norse.LIF(lif())])
    enabled = judge(net, lambda m: m[1](m[0](small_input())))
    assert type(enabled[0](EventTensor.from_dense(small_input()))) is DeferredCurrent
    calls = []
    enabled[0].lifted_module.register_forward_hook(lambda *_: calls.append(1))
    enabled[0](small_input())
    assert len(calls) == 7, "hooks are called at every step, as in Norse"
    assert_close(as_tensor(enabled[0]((small_input(), "ignored"))), net[0](small_input()), rtol=1e-5)


def test_lifted_modules_of_any_kind():
    torch.manual_seed(0)
    x = normal((5, 2, 1, 6, 6), 0, F32)
    conv = norse.SequentialState(
        norse.Lift(nn.Conv2d(1, 3, 3)), norse.LIF(lif()),
        norse.Lift(nn.Sequential(nn.Conv2d(3, 2, 3), nn.MaxPool2d(2))),
    )  # fmt: skip
    net = judge(conv, lambda m: m(x))
    assert paths_of(net) == ["sparse sequence"] or paths_of(net) == ["dense sequence"]
    lifted = norse.Lift(norse.SequentialState(nn.Linear(6, 4), norse.LIFCell(lif()), nn.Linear(4, 2), norse.LICell()))
    net = judge(lifted, lambda m: m(small_input()))
    assert all(path.endswith("sequence") for path in paths_of(net)), "its loop is recorded"
    sparse_backend.enable(net, b_th=0.3, fuse_time=False)
    net(small_input())
    assert all(path.endswith("step") for path in paths_of(net))
    for cell in (norse.LIFCell(lif()), norse.LIFRecurrentCell(6, 6, lif()), norse.LICell(), norse.LIFBoxCell()):
        net = judge(norse.Lift(cell), lambda m: m(small_input()))
        assert paths_of(net)[0].endswith("sequence")
        _, state = net(small_input())
        judge(norse.Lift(cell), lambda m, state=state: m((small_input(), tree_map(torch.Tensor.detach, dense(state)))))


def test_a_lifted_convolution_does_not_write_a_sequence_of_gradients_per_step():
    """Norse's loop indexes the sequence at every step, and every index writes one."""
    net = sparse_backend.enable(nn.ModuleList([norse.Lift(nn.Conv2d(1, 1, 1)), norse.LIF(lif())]), b_th=0.3)
    x = normal((6, 2, 1, 3, 3), 0, F32).requires_grad_()
    out = net[0](x)
    names, todo = [], [out.grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert not any("Select" in name for name in names) and any("Unbind" in name for name in names)


def test_mixed_models_with_other_neurons():
    torch.manual_seed(0)
    net = norse.SequentialState(
        nn.Linear(6, 8), norse.LIF(lif()), norse.LSNN(), nn.Linear(8, 4), norse.LIF(lif()), nn.RNN(4, 3)
    )
    judge(net, lambda m: m(small_input()))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("each", [(), (4,), (3, 1, 4), (3, 4, 4)])
def test_parameters_of_any_shape_per_neuron(shape, each):
    if len(each) > 1 and len(shape) < 3:
        each = (1, 4)
    p = lif(v_th=torch.rand(each) * 0.2 + 0.3, tau_syn_inv=torch.rand(each) * 100 + 200)
    for make in (norse.LIFCell, norse.LIF):
        x = normal(shape if make is norse.LIFCell else (5, *shape), 0, F32) + 0.5
        net = judge(make(p), lambda m, x=x: m(x))
        assert "framework" not in paths_of(net)[0], reasons_of(net)


# Which linear layer feeds which neuron is known from what happens.


class Wiring(nn.Module):
    """Two linear layers, two cells and a readout, wired by `wire` at every step."""

    def __init__(self, wire):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, dtype=F64) for _ in range(3))
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(parameter.shape, k, F64, 0.8))
        self.one, self.two, self.out = (
            norse.LIFCell(lif()),
            norse.LIFBoxCell(norse.LIFBoxParameters(torch.tensor(500.0), v_th=torch.tensor(0.3), **STEEP)),
            norse.LICell(),
        )
        self.wire = wire

    def forward(self, x):
        states, values = [None, None, None], []
        for step in x:
            value, *states = self.wire(self, step, *states)
            values.append(value)
        return torch.stack(values), states


def straight(net, x, s1, s2, s3):
    z, s1 = net.one(net.a(x), s1)
    y, s2 = net.two(net.b(z) * 3, s2)
    v, s3 = net.out(net.c(y), s3)
    return v, s1, s2, s3


def shared_layers(net, x, s1, s2, s3):
    z, s1 = net.one(net.a(x), s1)
    y, s2 = net.one(net.a(z), s2)
    v, s3 = net.out(net.a(y), s3)
    return v, s1, s2, s3


def two_branches(net, x, s1, s2, s3):
    current = net.a(x)
    z, s1 = net.one(current, s1)
    y, s2 = net.two(current, s2)
    v, s3 = net.out(current, s3)
    return net.b(z) * net.b(y) + v, s1, s2, s3


def skip(net, x, s1, s2, s3):
    z, s1 = net.one(net.a(x), s1)
    y, s2 = net.two(net.b(z), s2)
    v, s3 = net.out(net.c(y + z), s3)
    return v + z.sum(1, keepdim=True), s1, s2, s3


def feedback(net, x, s1, s2, s3):
    z, s1 = net.one(net.a(x) + (0 if s3 is None else 0.5 * s3.v), s1)
    y, s2 = net.two(net.b(z), s2)
    v, s3 = net.out(net.c(y), s3)
    return v, s1, s2, s3


def changed(net, x, s1, s2, s3):
    current = net.a(x)
    current += 0.1
    z, s1 = net.one(current, s1)
    z *= 0.5
    y, s2 = net.two(torch.nn.functional.dropout(net.b(z), 0.2), s2)
    v, s3 = net.out(torch.nn.functional.linear(y, net.c.weight * 1.5), s3)
    return v, s1, s2, s3


def states_changed(net, x, s1, s2, s3):
    z, s1 = net.one(net.a(x), s1)
    s1 = s1._replace(v=s1.v * 0.9, i=s1.i + z)
    y, s2 = net.two(s1.v, s2)
    v, s3 = net.out(y, s3)
    return v, s1, s2, s3


def checkpointed(net, x, s1, s2, s3):
    return torch.utils.checkpoint.checkpoint(straight, net, x, s1, s2, s3, use_reentrant=False)


WIRES = [straight, shared_layers, two_branches, skip, feedback, changed, states_changed, checkpointed]


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.__name__)
@pytest.mark.parametrize("b_th", [0.15, INF])
@pytest.mark.parametrize("learned_input", [False, True])
def test_wirings(wire, b_th, learned_input):
    x = spikes((5, 3, 6), 0.3, 2).requires_grad_(learned_input)

    def call(net):
        torch.manual_seed(1)
        return net(x)

    judge(Wiring(wire), call, b_th, rtol=1e-8)


# Copies.


@pytest.mark.parametrize("b_th", [0.3, INF])
def test_a_deepcopy_is_an_independent_enabled_net(b_th):
    net, x = sparse_backend.enable(small_net(), b_th=b_th), small_input()
    expected = dense(net(x)[0])
    other = copy.deepcopy(net)
    for name in ("1", "0"):
        module = other.get_submodule(name)
        assert module.__dict__["forward"].args[0] is module
        assert module._sparse_backend is not net.get_submodule(name)._sparse_backend
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert_close(dense(other(x)[0]), expected)
    sparse_backend.disable(net)
    assert layer_state.is_enabled(other)


def test_pickle_of_the_whole_model():
    """Norse 1.1.0 cannot pickle the parameters of its LIF."""
    readout = norse.SequentialState(norse.Lift(nn.Linear(6, 4)), norse.LI(), norse.LICell())
    net, x = sparse_backend.enable(readout), small_input()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(net))):
        assert layer_state.is_enabled(other) and torch.equal(other(x)[0], net(x)[0])
    spiking = sparse_backend.enable(small_net(), b_th=0.2)
    stock, ours = (outcome_of(lambda m=m: pickle.loads(pickle.dumps(m))[0](x)) for m in (small_net(), spiking))
    assert ours == stock if isinstance(stock, tuple) else torch.equal(ours, stock)


def test_state_dict_round_trip_and_casting():
    net, plain = sparse_backend.enable(every_module(), b_th=0.3), every_module()
    plain.load_state_dict(net.state_dict(), strict=True)
    x = normal((4, 2, 1, 4, 4), 0, F32)
    assert_close(dense(net(x)[0]), plain(x)[0], rtol=1e-5)
    net.double().to("cpu").train().eval()
    plain.double()
    assert_close(dense(net(x.double())[0]), plain(x.double())[0], rtol=1e-6)


def test_a_data_parallel_replica_runs_its_own():
    net = sparse_backend.enable(small_net(), b_th=0.2)
    for module in (net[0], net[1], net[5]):
        replica = module._replicate_for_data_parallel()
        assert replica.__dict__["forward"].args[0] is replica
        assert replica._sparse_backend is not module._sparse_backend
    replica = net[1]._replicate_for_data_parallel()
    replica(normal((4, 2, 8), 0, F32))
    assert sum(sparse_backend.report(net).layers[0].steps.values()) == 4


# Weights.


@pytest.mark.parametrize("fuse_time", [True, False])
def test_a_class_that_changes_after_enable_runs_norses_own(fuse_time):
    """As parametrisations change it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.recurrent = norse.LIFCell(lif()), norse.LIFRecurrentCell(6, 6, lif())
            self.sequence = norse.LIFRecurrent(6, 6, lif())

        def forward(self, x):
            state = before = None
            total = 0
            for step in x:
                z, state = self.cell(step, state)
                z, before = self.recurrent(z, before)
                total = total + z
            return total, self.sequence(x)[0]

    stock, ours = Net().double(), sparse_backend.enable(Net().double(), b_th=INF, fuse_time=fuse_time)
    for net in (stock, ours):
        for cell in (net.recurrent, net.sequence):
            nn.utils.parametrizations.weight_norm(cell, "input_weights")
    x = 3 * spikes((5, 4, 6), 0.4, 1)
    results = []
    for net in (ours, stock):
        total, z = net(x)
        (total.sum() + z.sum()).backward()
        results.append([total, z, *(p.grad for p in net.parameters())])
    for ours_, stocks in zip(*results, strict=True):
        assert_close(ours_, stocks)
    said = {layer.name: layer for layer in sparse_backend.report(ours).layers}
    assert said["recurrent"].path == said["sequence"].path == "framework"
    assert said["recurrent"].reason == "its class became ParametrizedLIFRecurrentCell after enable"


@pytest.mark.parametrize(
    "make", [lambda: norse.LIFCell(), lambda: norse.LIFRecurrentCell(6, 6)], ids=["LIF", "recurrent"]
)
def test_the_meta_device_runs_norses_own(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cell = nn.Linear(5, 6), make()

        def forward(self, x):
            state, out = None, []
            for step in x:
                z, state = self.cell(self.linear(step), state)
                out.append(z)
            return torch.stack(out)

    net = sparse_backend.enable(Net(), b_th=0.2).to("meta")
    assert net(torch.rand(7, 4, 5, device="meta")).shape == (7, 4, 6)
    assert net.cell(torch.rand(4, 6, device="meta"))[0].shape == (4, 6)


def test_weights_edited_behind_autograds_back_are_seen():
    for net, call in ((small_net(), lambda m: m(small_input())), (cells_net(), lambda m: stepped(m, small_input()))):
        plain = copy.deepcopy(net)
        sparse_backend.enable(net, b_th=INF)
        for edit in (
            lambda p: None, lambda p: p.data.mul_(0.5), lambda p: p.data.add_(0.1),
            lambda p: p.detach().numpy().fill(0.2),
        ):  # fmt: skip
            for parameter in (*net.parameters(), *plain.parameters()):
                edit(parameter)
            assert_same_tree(call(net), call(plain))


def test_a_weight_changed_between_a_linear_layer_and_its_neuron_was_read_before():
    net, x = small_net(), small_input()
    plain, found = copy.deepcopy(net), []
    sparse_backend.enable(net, b_th=INF)
    for m in (net, plain):
        current = m[0](x)
        with torch.no_grad():
            m[0].weight.mul_(2)
        found.append(m[1](current))
    assert_same_tree(*found)


def test_weights_that_are_not_finite_come_out_as_in_norse():
    for make in (
        lambda: nn.ModuleList([norse.LIFRecurrent(6, 6, lif())]), lambda: nn.ModuleList([norse.LILinearCell(6, 3)]),
        lambda: nn.ModuleList([norse.LIFRecurrentCell(6, 6, lif())]),
    ):  # fmt: skip
        for name in ("input_weights", "recurrent_weights"):
            net = make()
            if not hasattr(net[0], name):
                continue
            with torch.no_grad():
                getattr(net[0], name)[1, 2] = float("nan")
            x = spikes((5, 3, 6) if type(net[0]) is norse.LIFRecurrent else (3, 6), 0.2, 0, F32)
            ours = sparse_backend.enable(copy.deepcopy(net), b_th=INF)
            assert_same_tree(ours[0](x), net[0](x))


def test_a_linear_layer_that_is_not_finite_comes_out_as_in_norse():
    net, x = nn.ModuleList([nn.Linear(6, 4), norse.LIF(lif())]), spikes((5, 3, 6), 0.1, 0, F32)
    with torch.no_grad():
        net[0].weight[1, 2] = float("nan")
    expected = net[1](net[0](x))
    with sparse_backend.patch("norse", b_th=INF):
        assert_same_tree(net[1](net[0](EventTensor.from_dense(x))), expected)
    sparse_backend.enable(net, b_th=INF)
    assert_same_tree(net[1](net[0](EventTensor.from_dense(x))), expected)


def test_autapses_stay_zero():
    torch.manual_seed(0)
    for net, call in (
        (norse.LIFRecurrent(6, 6, lif()), lambda m: m(small_input() * 2)[0]),
        (norse.LIFRecurrentCell(6, 6, lif()), lambda m: stepped(m, small_input() * 2)[0]),
    ):
        sparse_backend.enable(net, b_th=0.5)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.1)
        before = net.recurrent_weights.detach().clone()
        for _ in range(3):
            optimiser.zero_grad()
            call(net).sum().backward()
            optimiser.step()
        assert not bool(net.recurrent_weights.diag().any()) and not torch.equal(net.recurrent_weights, before)


def test_forwards_without_backward_leak_nothing():
    net, x = sparse_backend.enable(cells_net(), b_th=0.3, fuse_time=False), small_input()

    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), len(hubs._gatherers)

    counts = []
    for _ in range(3):
        for _ in range(10):
            stepped(net, x)
        counts.append(alive())
    assert counts[2][0] - counts[0][0] < 10 and counts[0][1] == counts[2][1], counts
    z, state = net[1](normal((3, 8), 0, F32))
    watches = [weakref.ref(z), weakref.ref(state.v)]
    del z, state
    gc.collect()
    assert all(watch() is None for watch in watches)


def test_patched_modules_are_not_kept_alive():
    with sparse_backend.patch("norse", b_th=0.3):
        net = norse.SequentialState(
            nn.Linear(6, 8), norse.LIF(lif()), norse.LIFRecurrent(8, 4, lif()), norse.Lift(nn.Linear(4, 2)), norse.LI()
        )
        net(small_input())[0].sum().backward()
        watches = [weakref.ref(m) for m in net] + [weakref.ref(p) for p in net.parameters()]
        del net
        gc.collect(), gc.collect()  # what the first finds holds a graph, whose end leaves more to find
        assert all(watch() is None for watch in watches)


# Modes of torch.


def test_functional_transforms_and_inference_mode():
    net, x = small_net(method="super"), small_input()
    plain = copy.deepcopy(net)
    sparse_backend.enable(net, b_th=INF)
    with torch.inference_mode():
        assert_close(dense(net(x)[0]), plain(x)[0], rtol=1e-5)
    with torch.no_grad():
        assert_same_tree(net(x), plain(x))
    judge(plain, lambda m: m(x))
    assert_same_tree(net(x), plain(x))

    def loss(m):
        return lambda weight: torch.func.functional_call(m, {"0.weight": weight}, (x,))[0].pow(2).sum()

    weight = plain[0].weight.detach()
    assert_close(torch.func.grad(loss(net))(weight), torch.func.grad(loss(plain))(weight), rtol=1e-5)


def test_checkpoints_recompute_what_they_saw():
    for b_th in (0.3, INF):
        judge(
            small_net(),
            lambda m: torch.utils.checkpoint.checkpoint(lambda x: m(x)[0], small_input(), use_reentrant=False),
            b_th,
        )


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiling_is_norses_own():
    torch._dynamo.reset()
    net, plain, x = sparse_backend.enable(cells_net(), b_th=0.3, fuse_time=False), cells_net(), small_input()[0]
    step = torch.compile(net, backend="eager")
    assert_same_tree(step(x), plain(x))
    with sparse_backend.patch("norse", b_th=0.3):
        assert_same_tree(torch.compile(plain, backend="eager")(x), plain(x))
    torch._dynamo.reset()


def test_full_backward_hooks():
    net, grads = small_net(), []
    for m in (net, sparse_backend.enable(copy.deepcopy(net), b_th=INF)):
        seen = []
        for name in ("1", "3"):
            m.get_submodule(name).register_full_backward_hook(
                lambda module, gi, go, seen=seen: seen.append([g.clone() for g in (*gi, *go) if g is not None])
            )
        m(small_input())[0].pow(2).sum().backward()
        grads.append(seen)
    for ours, stock in zip(grads[1], grads[0], strict=True):
        for a, b in zip(ours, stock, strict=True):
            assert_close(a, b, rtol=1e-4)


# patch.


def test_patch_as_context_manager_and_as_call():
    before = {cls: cls.__dict__.get("forward") for cls in for_norse.PATCHED}
    net, x = small_net(), small_input()
    with masked_threshold(0.3):
        plain = copy.deepcopy(net)
        stock = gradients_of(plain, plain(x))
    with sparse_backend.patch("norse", b_th=0.3):
        assert_same_gradients(gradients_of(net, net(x)), stock, 1e-5)
        later = small_net()
        assert_same_gradients(gradients_of(later, later(x)), stock, 1e-5)
        assert "forward" not in later[1].__dict__ and "_sparse_backend" not in later[1].__dict__
        assert paths_of(later)[2] == "dense sequence"
        assert [layer.b_th for layer in sparse_backend.report(later).layers] == [0.3, 0.3, INF]
        assert _is_module_stateful(later[1]) and type(later[1](x * 0)[0]) is EventTensor
        assert type(norse.Lift(nn.Linear(6, 2))(EventTensor.from_dense(x))) is DeferredCurrent
    assert {cls: cls.__dict__.get("forward") for cls in for_norse.PATCHED} == before
    sparse_backend.patch("norse", b_th=0.3)
    sparse_backend.unpatch("norse")
    assert {cls: cls.__dict__.get("forward") for cls in for_norse.PATCHED} == before
    assert type(net[1](x)[0]) is torch.Tensor


def test_patch_leaves_subclasses_and_enabled_models_alone():
    class Mine(norse.LIFCell):
        pass

    own = sparse_backend.enable(small_net(), b_th=0.2)
    with sparse_backend.patch("norse", b_th=0.3):
        assert type(Mine(lif())(torch.zeros(2, 3))[0]) is torch.Tensor
        assert type(norse.LIFCell(lif())(torch.zeros(2, 3))[0]) is EventTensor
        own(small_input())
        assert [layer.b_th for layer in sparse_backend.report(own).layers] == [0.2, 0.2, INF]


def test_norses_own_tests_pass_under_patch(tmp_path):
    """Those of the modules that are accelerated, compiling aside."""
    plugin = tmp_path / "sparse_norse.py"
    plugin.write_text("import sparse_backend\nsparse_backend.patch('norse', b_th=float('inf'))\n")
    names = ("lif", "lif_box", "leaky_integrator", "leaky_integrator_box", "lift", "sequential", "snn", "training")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sparse_norse", "-p", "no:cacheprovider", "-W", "ignore",
               "-k", "not compile", "--rootdir", str(tmp_path), "--pyargs",
               *(f"norse.torch.module.test.test_{name}" for name in names)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


# report and check.


def test_report_counts_sequences_and_names_the_way():
    x = small_input()
    net = sparse_backend.enable(small_net(), b_th=0.1)
    with sparse_always():
        net(x)
    seen = []
    with masked_threshold(INF, seen):
        stock_of(net)(x)
    layer = sparse_backend.report(net).layers[0]
    first = torch.cat([part.flatten() for part in seen if part.shape[-1] == 8])
    assert layer.path == "sparse sequence" and layer.steps == {"sparse": 7, "dense": 0, "framework": 0}
    assert layer.active == pytest.approx(float((first.abs() < 0.1).float().mean()))
    assert layer.spikes == pytest.approx(float((first > 0).float().mean()))
    assert layer.kind == "norse.LIF" and layer.kept_bytes > 0 and layer.at_once == 7
    report = sparse_backend.report(net)
    assert "a readout has no spikes" in str(report) and "sparse sequence" in str(report)
    assert report.note is None, "there is no loop to tell of"


def test_check_compares_with_norses_own_code():
    net, x = sparse_backend.enable(small_net(), b_th=INF), small_input()
    result = sparse_backend.check(net, x, lambda out: out[0].pow(2).mean())
    assert all(gradient.relative_error < 1e-4 for gradient in result.gradients)
    assert result.loss_sparse == pytest.approx(result.loss_dense, rel=1e-5)
    sparse_backend.enable(net, b_th=0.05)
    assert max(g.relative_error for g in sparse_backend.check(net, x, lambda out: out[0].sum()).gradients) > 0.01
    assert layer_state.is_enabled(net)


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("tau", [torch.tensor(500.0), nn.Parameter(torch.tensor(500.0))], ids=["", "learnable"])
def test_a_threshold_that_follows_the_activity(fuse_time, tau):
    """A coefficient that does not learn may be written to before the backward pass, as in stock."""

    class Homeostatic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 6)
            self.fc.weight = nn.Parameter(normal((6, 8), 1, F64) + 0.2)
            nn.init.zeros_(self.fc.double().bias)
            self.p = lif(tau_mem_inv=tau, v_th=torch.full((6,), 0.2, dtype=F64))
            self.cell = norse.LIFCell(self.p)

        def forward(self, x):
            state, out = None, []
            for step in x:
                z, state = self.cell(self.fc(step), state)
                self.p.v_th.add_(0.05 * z.detach().mean())
                out.append(z)
            return torch.stack(out)

    stock, ours = Homeostatic(), sparse_backend.enable(Homeostatic(), b_th=INF, fuse_time=fuse_time)
    x = spikes((6, 3, 8), 0.4, 3).double()
    results = []
    for net in (stock, ours):
        out = net(x)
        assert 0 < float(out.sum()) < out.numel()
        (out * normal(out.shape, 5)).sum().backward()
        results.append((as_tensor(out).detach(), net.fc.weight.grad, net.p.v_th.clone()))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


# Who shares memory with whom, and what has a gradient, as in Norse.


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("cell", ["LICell", "LIBoxCell", "LILinearCell", "LIFRecurrentCell"])
def test_what_is_written_to_an_output_is_written_to_the_state_it_is(cell, fuse_time):
    def run(enable):
        torch.manual_seed(0)
        own = cell in ("LILinearCell", "LIFRecurrentCell")
        neuron = [getattr(norse, cell)(4, 3)] if own else [nn.Linear(4, 3), getattr(norse, cell)()]
        written = nn.Dropout(0.5, inplace=True) if cell == "LIFRecurrentCell" else nn.ReLU(inplace=True)
        net, state, out = norse.SequentialState(*neuron, written), None, []
        if enable:
            sparse_backend.enable(net, b_th=INF, fuse_time=fuse_time)
        for step in 3 * normal((6, 2, 4), 0, F32):
            y, state = net(step, state)
            out.append(y)
        out = [*out, *(part for states in state if states is not None for part in states)]
        return out, gradients_of(net, out)

    ours, stock = run(True), run(False)
    assert_same_tree(ours[0], stock[0])
    assert_same_gradients(ours[1], stock[1], 1e-5)


@pytest.mark.parametrize(
    "make", [lambda: norse.LI(record_states=True), lambda: norse.LIFRecurrent(3, 3, record_states=True)]
)
def test_recorded_states_are_not_the_output(make):
    torch.manual_seed(0)
    layer = sparse_backend.enable(make(), b_th=0.2)
    with torch.no_grad():
        if type(layer) is norse.LIFRecurrent:
            layer.input_weights.fill_(1)
        out, states = layer(30 * torch.ones(4, 1, 3))
        recorded = states.v if type(layer) is norse.LI else states.z
        before = as_tensor(recorded).clone()
        assert bool(before.any())
        out.zero_()
    assert_close(as_tensor(recorded), before)


class Parameters(nn.Module):
    """Norse's docstrings: p, "a torch Module"."""

    def __init__(self):
        super().__init__()
        for name, value in norse.LIFParameters()._asdict().items():
            setattr(self, name, nn.Parameter(value.clone()) if isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize(
    "options", [{"p": Parameters}, {"dt": lambda: nn.Parameter(torch.tensor(0.001))}], ids=["p", "dt"]
)
def test_settings_that_are_a_module_or_a_parameter(options):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(6, 5), norse.LIFCell(**{name: make() for name, make in options.items()})])

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net

        def forward(self, x):
            state, out = None, []
            for step in x:
                z, state = self.layers[1](5 * self.layers[0](step), state)
                out.append(z)
            return torch.stack(out), state.v

    judge(Loop(), lambda m: m(torch.ones(5, 2, 6)))


@pytest.mark.parametrize("net", [small_net, cells_net])
def test_another_dtype_after_a_first_call(net):
    net, x = sparse_backend.enable(net(), b_th=0.3), small_input()
    x = x if any(type(m) is norse.LIF for m in net) else x[0]
    with sparse_always():
        net(x)
        assert net.double()(x.double())[0].dtype is F64
        assert net.float()(x)[0].dtype is F32


@pytest.mark.parametrize("around", [contextlib.nullcontext, sparse_backend.fuse_time])
def test_each_step_of_a_loop_in_a_checkpoint_of_its_own(around):
    p = norse.LIFParameters(v_th=torch.tensor(0.3), tau_mem_inv=torch.tensor(400.0))
    for seed in range(6):
        torch.manual_seed(seed)
        net, total, state = (
            sparse_backend.enable(norse.SequentialState(norse.LIFRecurrentCell(6, 5, p)), b_th=0.3),
            0,
            None,
        )
        with around() if around is contextlib.nullcontext else around(net):
            for step in (torch.rand(8, 3, 6) < 0.3).float():
                z, state = torch.utils.checkpoint.checkpoint(
                    lambda x, s, net=net: net(x, s and list(s)), step, state, use_reentrant=False
                )
                total = total + z
        total.sum().backward()


@pytest.mark.parametrize("steps", [1, 2])
def test_recurrent_weights_have_a_gradient_after_one_step_too(steps):
    torch.manual_seed(0)
    x = torch.rand(steps, 2, 4)
    judge(norse.LIFRecurrent(4, 3), lambda m: m(x)[0], INF)
    net = sparse_backend.enable(norse.LIFRecurrent(4, 3), b_th=0.2)
    net(x)[0].sum().backward()
    assert net.recurrent_weights.grad is not None
