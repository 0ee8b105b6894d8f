"""enable, disable, patch: an enabled snnTorch model behaves as the stock one in everything but its speed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import snntorch as snn
import torch
from helpers import (
    INF,
    as_tensor,
    assert_close,
    assert_same_gradients,
    fast_sigmoid,
    masked,
    normal,
    piecewise,
    same_snapshot,
    snapshot,
    spikes,
)
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from snntorch_models import LayerCase, Model, ModelCase, enabled_copy, make_input, run, stock_copy
from torch import nn

import sparse_backend
from sparse_backend import EventTensor, enabling, layer_state, policy
from sparse_backend.adapters import for_snntorch
from sparse_backend.deferred import DeferredCurrent
from sparse_backend.layer_state import STATE
from sparse_backend.ops import hub as hubs

STEEP = fast_sigmoid(100.0)
ONE_SPIKE = torch.zeros(3, 5, dtype=torch.float64)
ONE_SPIKE[1, 2] = 1
CASE = ModelCase(surrogate=fast_sigmoid(5.0))


def steep(x):
    """A surrogate that can be pickled."""
    return STEEP(x)


@pytest.fixture(autouse=True)
def no_instances_left():
    """snnTorch keeps every neuron ever made in a list."""
    before = list(snn.SpikingNeuron.instances)
    yield
    snn.SpikingNeuron.instances[:] = before
    sparse_backend.unpatch()


def test_a_copy_of_the_dict_is_made_real_by_enable():
    """`copy.copy` leaves a copy the original's forward: enable gives it its own, disable the stock one."""
    net = sparse_backend.enable(small_net(), b_th=0.2)
    linear, other, plain = net[0], copy.copy(net[0]), copy.copy(net[0])
    for part in (other, plain):
        part._parameters = dict(part._parameters, weight=nn.Parameter(torch.zeros(8, 6)))
    sparse_backend.enable(nn.Sequential(other, net[1]), b_th=0.2)
    sparse_backend.disable(plain)
    x = torch.ones(2, 6)
    expected = linear.bias.expand(2, 8)
    assert torch.equal(other(x) + 0, expected)
    assert torch.equal(plain(x), expected)
    assert not torch.equal(linear(x) + 0, expected)
    assert STATE in other.__dict__ and STATE not in plain.__dict__


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (3, 1, 2, 5)])
@pytest.mark.parametrize("learned", ["beta", "threshold"])
def test_what_learns_after_steps_without_a_graph(learned, shape, fuse_time):
    """A sequence that warms up under no_grad; the parameter is expanded over channels or images."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            numbers = {"beta": torch.linspace(0.5, 1.1, 5).double(), "threshold": torch.linspace(0.4, 0.9, 5).double()}
            self.lif = snn.Leaky(**numbers, spike_grad=piecewise, **{f"learn_{learned}": True})

        def forward(self, x):
            mem, out = self.lif.reset_mem(), []
            for t, step in enumerate(x):
                with torch.set_grad_enabled(t > 1):
                    spk, mem = self.lif(step, mem)
                out.append(spk * (t + 1) + mem)
            return torch.stack(out)

    x = normal((6, *shape), 1)
    gradients = []
    for enabled in (False, True):
        net = Net()
        if enabled:
            sparse_backend.enable(net, b_th=INF, fuse_time=fuse_time)
        net(x).square().sum().backward()
        gradients.append(getattr(net.lif, learned).grad)
    assert gradients[0].abs().max() > 0.1
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "RLeaky"])
@pytest.mark.parametrize("fuse_time", [True, False])
def test_the_meta_device_runs_snntorchs_own(kind, fuse_time):
    """Shapes can be asked for there, as of the stock model."""
    options = {"Leaky": {}, "Synaptic": {"alpha": 0.8}, "RLeaky": {"linear_features": 8}}[kind]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)
            self.neuron = getattr(snn, kind)(beta=0.9, spike_grad=steep, init_hidden=True, **options)

        def forward(self, x):
            return torch.stack([self.neuron(self.linear(step)) for step in x])

    net = sparse_backend.enable(Net(), b_th=0.2, fuse_time=fuse_time)
    before = net(torch.rand(7, 4, 6)).shape
    net.to("meta")
    assert net(torch.rand(7, 4, 6, device="meta")).shape == before == (7, 4, 8)


def assert_same(ours, stock):
    assert_close(ours.spikes, stock.spikes, "spikes")
    assert_close(ours.mems, stock.mems, "membranes")
    assert_same_gradients(ours.gradients, stock.gradients)


def judge(model, x, b_th=0.3, **kwargs):
    """Enabled against stock, masked to the same band."""
    ours, stock = run(enabled_copy(model, b_th), x, **kwargs), run(stock_copy(model, b_th), as_tensor(x), **kwargs)
    assert_same(ours, stock)
    return ours


def small_net(**options):
    options = {"beta": 0.9, "spike_grad": steep, **options}
    return nn.Sequential(nn.Linear(6, 8), snn.Leaky(init_hidden=True, **options), nn.Linear(8, 3),
                         snn.Leaky(init_hidden=True, output=True, **options))  # fmt: skip


def loop(net, x):
    """An outer loop over an nn.Sequential with hidden states."""
    utils.reset(net)
    spk, mem = [], []
    for step in x:
        s, m = net(step)
        spk.append(s), mem.append(m)
    return torch.stack(spk), torch.stack(mem)


def path_of(net):
    return [layer.path for layer in sparse_backend.report(net).layers]


def reasons_of(net):
    return [layer.reason for layer in sparse_backend.report(net).layers]


# enable and disable.


def test_enable_changes_nothing_a_user_sees():
    net = small_net()
    before, keys, kinds = snapshot(net), list(net.state_dict()), [type(m) for m in net.modules()]
    instances = list(snn.SpikingNeuron.instances)
    assert sparse_backend.enable(net, b_th=0.2) is net
    assert [type(m) for m in net.modules()] == kinds
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(snn.SpikingNeuron.instances, instances, strict=True))
    assert [id(p) for p in net.parameters()] == [id(p) for _, _, ps in before.values() for p in ps.values()]
    assert "_sparse_backend" not in repr(net)
    assert sparse_backend.disable(net) is net
    assert same_snapshot(snapshot(net), before)


def test_disable_after_training_leaves_a_stock_model():
    net, x = small_net(), spikes((4, 2, 6), 0.4, 0, torch.float32)
    sparse_backend.enable(net, b_th=0.2)
    loop(net, x)[1].sum().backward()
    sparse_backend.disable(net)
    assert not any(name.startswith("_sparse") for m in net.modules() for name in m.__dict__)
    assert all("forward" not in m.__dict__ and "_replicate_for_data_parallel" not in m.__dict__ for m in net.modules())
    assert type(net[0](x[0])) is torch.Tensor


def test_enable_is_idempotent_and_updates_b_th():
    net = small_net()
    sparse_backend.enable(net, b_th=0.2)
    before = snapshot(net)
    sparse_backend.enable(net, b_th=0.2)
    assert same_snapshot(snapshot(net), before)
    sparse_backend.enable(net, b_th=0.4)
    assert [layer.b_th for layer in sparse_backend.report(net).layers] == [0.4, 0.4]
    sparse_backend.disable(sparse_backend.disable(net))
    assert "forward" not in net[1].__dict__


def test_a_new_b_th_counts_at_the_next_call():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, 0.1)
    run(net, x)
    sparse_backend.enable(net, b_th=0.5)
    assert_same(run(net, x), run(stock_copy(model, 0.5), x))


def test_b_th_by_layer_name():
    net = small_net()
    sparse_backend.enable(net, b_th={"1": 0.3})
    assert [layer.b_th for layer in sparse_backend.report(net).layers] == [0.3, "auto"]
    sparse_backend.enable(net, b_th={"3": INF})
    assert [layer.b_th for layer in sparse_backend.report(net).layers] == ["auto", INF]


@pytest.mark.parametrize("b_th", [0, -1, float("nan"), "wide", None, {"1": -1}, {"1": "x"}, [0.2]])
def test_a_wrong_b_th_is_refused_before_anything_changes(b_th):
    net = small_net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"b_th.*: expected .* got"):
        sparse_backend.enable(net, b_th=b_th)
    assert same_snapshot(snapshot(net), before)


def test_an_unknown_layer_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected names of layers, one of '1', '3', got 'lif1', '0'"):
        sparse_backend.enable(small_net(), b_th={"lif1": 0.2, "0": 0.2})


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"net: expected a torch\.nn\.Module, got int"):
        sparse_backend.enable(3)
    with pytest.raises(TypeError, match=r"net: expected a torch\.nn\.Module, got int"):
        sparse_backend.disable(3)
    with pytest.raises(TypeError, match=r"net: expected a torch\.nn\.Module, got int"), sparse_backend.fuse_time(3):
        pass


def test_fuse_time_of_a_model_that_was_never_enabled_says_so():
    net = small_net()
    nothing = pytest.warns(UserWarning, match="fuse_time changes nothing: no layer of this model is enabled")
    with nothing as seen, sparse_backend.fuse_time(net):
        net(spikes((2, 6), 0.5, 0, torch.float32))
    assert len(seen) == 1 and seen[0].filename == __file__


def test_a_model_without_spiking_layers_is_told_so_once():
    with pytest.warns(UserWarning, match="changes nothing: it finds no spiking layer of snntorch") as seen:
        net = sparse_backend.enable(nn.Sequential(nn.Linear(3, 3)))
    assert len(seen) == 1
    assert "forward" not in net[0].__dict__
    with pytest.warns(UserWarning, match=r"0: snntorch\.Alpha is not accelerated yet"):
        sparse_backend.enable(nn.Sequential(snn.Alpha(alpha=0.9, beta=0.8)))


def test_a_broad_surrogate_is_named_once_with_the_cure():
    net = small_net(spike_grad=snn_surrogate.atan())
    with pytest.warns(UserWarning, match=r"layers 1, 3 stay dense: .*< 4\.0.*steeper surrogate.*b_th=0\.2") as seen:
        sparse_backend.enable(net)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_backend.enable(net)  # said already
        sparse_backend.enable(small_net(spike_grad=snn_surrogate.atan()), b_th=0.2)
        sparse_backend.enable(small_net(spike_grad=snn_surrogate.fast_sigmoid(100)))


def test_subclasses_are_left_alone():
    class Mine(snn.Leaky):
        def forward(self, input_, mem=None):
            return super().forward(2 * input_, mem)

    class Delta(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif, self.mine = nn.Linear(6, 4), snn.Leaky(beta=0.5, spike_grad=steep), Mine(beta=0.5)
            self.delta = snn.DeltaLeaky(beta=0.9) if hasattr(snn, "DeltaLeaky") else Mine(beta=0.9)

    net = sparse_backend.enable(Delta(), b_th=0.2)
    assert "forward" not in net.mine.__dict__ and "forward" not in net.delta.__dict__
    layers = {layer.name: layer for layer in sparse_backend.report(net).layers}
    assert layers["mine"].path == layers["delta"].path == "framework"
    assert "Mine is a subclass of snntorch.Leaky" in layers["mine"].reason
    spk, _ = net.mine(net.fc(torch.ones(1, 6)))  # a deferred current is a tensor to it
    assert type(spk) is torch.Tensor


# Copies.


@pytest.mark.parametrize("b_th", [0.3, INF])
def test_a_deepcopy_is_an_independent_enabled_net(b_th):
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, b_th)
    other = copy.deepcopy(net)
    assert other.neurons[0].__dict__["forward"].args[0] is other.neurons[0]
    assert other.neurons[0]._sparse_backend is not net.neurons[0]._sparse_backend
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert_same(run(other, x), run(stock_copy(model, b_th), x))
    assert sparse_backend.report(net).layers[0].path == "not called yet"
    sparse_backend.disable(net)
    assert layer_state.is_enabled(other)


def test_pickle_of_the_whole_model():
    net = sparse_backend.enable(small_net(), b_th={"1": 0.2, "3": 0.4})
    x = spikes((5, 2, 6), 0.4, 0, torch.float32)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(net))):
        assert [layer.b_th for layer in sparse_backend.report(other).layers] == [0.2, 0.4]
        snn.SpikingNeuron.instances.extend(m for m in other.modules() if isinstance(m, snn.SpikingNeuron))
        assert torch.equal(loop(other, x)[1], loop(net, x)[1])


def test_state_dict_round_trip():
    net, plain = sparse_backend.enable(small_net(), b_th=0.3), small_net()
    plain.load_state_dict(net.state_dict(), strict=True)
    x = spikes((5, 2, 6), 0.4, 0, torch.float32)
    assert_close(loop(net, x)[1], loop(plain, x)[1], rtol=1e-5)
    net.load_state_dict(small_net().state_dict())
    plain.load_state_dict(net.state_dict())
    assert_close(loop(net, x)[1], loop(plain, x)[1], "after loading", rtol=1e-5)


def test_moving_and_casting():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, 0.3)
    run(net, x)
    net.float()
    ours, stock = run(net, x.float()), run(stock_copy(model, 0.3).float(), x.float())
    assert_close(ours.mems, stock.mems, rtol=1e-4)
    net.double().to("cpu").train().eval()
    assert_same_shape = run(net, x)
    assert assert_same_shape.mems.dtype == torch.float64


def test_a_data_parallel_replica_runs_its_own():
    net = sparse_backend.enable(small_net(), b_th=0.2)
    neuron, linear = net[1], net[0]
    for module in (neuron, linear):
        replica = module._replicate_for_data_parallel()
        assert replica.__dict__["forward"].args[0] is replica
        assert replica._sparse_backend is not module._sparse_backend
    replica = linear._replicate_for_data_parallel()
    replica.weight, replica.bias = (p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias))
    x = spikes((4, 6), 0.2, 0, torch.float32)
    out = replica(x)
    assert_close(out + 0, torch.nn.functional.linear(x, linear.weight, linear.bias), rtol=1e-5)
    out.sum().backward()
    assert replica.weight.grad is not None and linear.weight.grad is None
    again = neuron._replicate_for_data_parallel()
    spk, mem = again(as_tensor(out)), again.mem
    assert mem.shape == spk.shape == (4, 8)
    assert path_of(net) == ["sparse step", "not called yet"], "what replicas do is reported of the original"


# What a call means: module.mem, arguments, return values.


CALLS = {
    "persisting membrane": lambda n, xs: [n(x)[1] for x in xs],
    "explicit membrane": lambda n, xs: [n(x, torch.full_like(xs[0], 0.3))[1] for x in xs],
    "own membrane": lambda n, xs: [n(x, n.mem)[1] for x in xs],
    "keyword": lambda n, xs: [n(input_=x, mem=None)[1] for x in xs],
    "reset between": lambda n, xs: [(n.reset_mem(), n(x)[1])[1] for x in xs],
    "another batch": lambda n, xs: [n(xs[0])[1], n(xs[0][:1])[1], n(xs[0])[1]],
    "membrane of another batch": lambda n, xs: [n(xs[0], torch.ones(7, 4))[1]],
    "one dimension": lambda n, xs: [n(x[0])[1] for x in xs],
    "three dimensions": lambda n, xs: [n(torch.stack([x, -x]))[1] for x in xs],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_membranes_are_kept_and_returned_as_the_framework_does(call, b_th):
    xs = normal((5, 3, 4), 0, torch.float32, 1.0)
    ours, stock = (snn.Leaky(beta=0.9, spike_grad=steep) for _ in range(2))
    sparse_backend.enable(ours, b_th=b_th)
    with torch.no_grad():
        for a, b in zip(CALLS[call](ours, xs), CALLS[call](stock, xs), strict=True):
            assert_close(a, b, rtol=1e-6)
            assert a is not None
        assert_close(ours.mem, stock.mem, rtol=1e-6)
    _, mem = ours(xs[0])
    assert ours.mem is mem


def test_hidden_membranes_may_not_be_passed():
    net = sparse_backend.enable(snn.Leaky(beta=0.9, spike_grad=steep, init_hidden=True), b_th=0.2)
    with pytest.raises(TypeError, match="`mem` should not be passed as an argument while `init_hidden=True`"):
        net(torch.ones(2, 3), torch.zeros(2, 3))
    assert net(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (3, 2, 5, 4)])
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_what_is_handed_out_may_be_detached_in_place(shape, b_th):
    net = sparse_backend.enable(nn.Sequential(nn.Linear(4, 4), snn.Leaky(beta=0.9, spike_grad=steep)), b_th=b_th)
    spk, mem = net(spikes(shape, 0.2, 0, torch.float32))
    assert mem.requires_grad and mem.shape == shape and spk.shape == shape
    mem.detach_(), spk.detach_()
    assert not mem.requires_grad and not spk.requires_grad
    if len(shape) > 1:  # torch's own Linear makes a view of one dimension
        net[0](spikes(shape, 0.2, 0, torch.float32)).detach_()
    spk, mem = net(spikes(shape, 0.2, 0, torch.float32))
    snn.SpikingNeuron.detach(spk, mem)


def test_reset_and_detach_of_hidden_states():
    net, x = small_net(), spikes((4, 2, 6), 0.4, 0, torch.float32)
    sparse_backend.enable(net, b_th=0.2)
    loop(net, x)
    assert net[1].mem.requires_grad and bool(net[1].mem.any())
    snn.Leaky.detach_hidden()
    assert not net[1].mem.requires_grad and bool(net[1].mem.any())
    utils.reset(net)
    assert not bool(net[1].mem.any()) and net[1].mem.shape == (2, 8)


@pytest.mark.parametrize("kind", ["detach_hidden", "detach", "detach_"])
def test_truncated_backpropagation(kind):
    """A backward pass and an optimiser step every two steps of the loop, as tutorials have it."""

    def train(b_th):
        model = Model(ModelCase(layers=[LayerCase(8), LayerCase(4)], steps=8, surrogate=CASE.surrogate))
        snn.SpikingNeuron.instances.extend(model.neurons)
        if b_th is None:
            model = stock_copy(model, 0.3)
            snn.SpikingNeuron.instances.extend(model.neurons)
        else:
            sparse_backend.enable(model, b_th=b_th)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        x = spikes((8, 3, 7), 0.4, 3)
        mems = [neuron.reset_mem() for neuron in model.neurons]
        loss, losses = 0.0, []
        for t in range(8):
            spk = x[t]
            for i in range(2):
                spk, mems[i] = model.neurons[i](model.linears[i](spk), mems[i])
            loss = loss + (mems[-1] ** 2).sum() + spk.sum()
            if t % 2:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                loss = 0.0
                if kind == "detach_hidden":
                    snn.Leaky.detach_hidden()
                elif kind == "detach_":
                    for mem in mems:
                        mem.detach_()
                else:
                    mems = [mem.detach() for mem in mems]
        return losses

    assert train(0.3) == pytest.approx(train(None), rel=1e-9)


# Options: accelerated or the framework's own, and told which.


OPTIONS = [
    ({}, None),
    ({"learn_beta": True, "learn_threshold": True}, None),
    ({"reset_mechanism": "zero", "reset_delay": False}, None),
    ({"graded_spikes_factor": 0.5}, None),
    ({"graded_spikes_factor": 2, "learn_graded_spikes_factor": False}, None),
    ({"beta": torch.rand(8), "threshold": torch.rand(8) + 0.5}, None),
    ({"beta": torch.rand(1, 8)}, None),
    ({"beta": 1.7}, None),
    ({"beta": torch.linspace(-0.5, 1.5, 8), "learn_beta": True}, None),
    ({"beta": 1}, None),
    ({"graded_spikes_factor": torch.rand(8)}, "graded_spikes_factor [8]"),
    ({"beta": torch.rand(3, 8)}, "its beta [3, 8] is not one number, or one per neuron of [8]"),
    ({"threshold": torch.rand(3, 1) + 0.5}, "its threshold [3, 1]"),
    ({"inhibition": True}, "inhibition"),
    ({"state_quant": lambda mem: (mem * 4).round() / 4}, "state_quant"),
    ({"surrogate_disable": True}, "surrogate_disable"),
    ({"spike_grad": lambda x: (x > 0).float()}, "no derivative"),
    ({"spike_grad": lambda x: torch.sigmoid(x)}, "not the step function"),
    ({"spike_grad": snn_surrogate.SSO()}, "random"),
]


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize(("options", "reason"), OPTIONS, ids=["-".join(options) for options, _ in OPTIONS])
def test_every_option_is_accelerated_or_the_frameworks_own(options, reason):
    options = {"beta": 0.9, "spike_grad": fast_sigmoid(5.0), **options}
    x = normal((6, 3, 8), 1, torch.float32, 1.2)
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        net = snn.Leaky(**copy.deepcopy(options))
        if enabled:
            sparse_backend.enable(net, b_th=0.4)
        elif reason is None:
            net.spike_grad = masked(net.spike_grad, 0.4)
        leaf = x.clone().requires_grad_()
        mem, out = net.reset_mem(), []
        for step in leaf:
            spk, mem = net(step, mem)
            out.append((spk * 3 + mem).sum())
        torch.stack(out).pow(2).sum().backward()
        results.append((mem.detach(), {"x": leaf.grad, **{n: p.grad for n, p in net.named_parameters()}}))
        if enabled:
            (layer,) = sparse_backend.report(net).layers
            assert (layer.path == "framework") == (reason is not None), layer.reason
            assert reason is None or reason in layer.reason
    assert_close(results[0][0], results[1][0], "mem", 1e-5)
    assert_same_gradients(results[0][1], results[1][1], 1e-4)


def test_options_may_change_between_calls():
    net = snn.Leaky(beta=0.9, spike_grad=steep)
    sparse_backend.enable(net, b_th=0.3)
    x = normal((3, 5), 0, torch.float32, 1.2)

    def agrees(**changes):
        plain = snn.Leaky(beta=0.9, spike_grad=steep)
        for name, value in changes.items():
            setattr(plain, name, value)
        for _ in range(3):
            (a, b), (c, d) = net(x), plain(x)
            assert_close(as_tensor(a), c), assert_close(b, d, rtol=1e-6)
        net.reset_mem()

    agrees()
    net.state_quant = lambda mem: mem.round()
    agrees(state_quant=net.state_quant)
    net.state_quant = False
    net.beta = torch.tensor(0.5)
    agrees(beta=net.beta)
    net.beta.fill_(1.5)
    agrees(beta=torch.tensor(1.5))
    net.beta.data.fill_(0.2)  # bumps no version: seen where a sequence begins
    agrees(beta=torch.tensor(0.2))
    net.threshold = torch.tensor(0.3)
    agrees(beta=torch.tensor(0.2), threshold=net.threshold)
    net.reset_mechanism = "zero"  # snnTorch heeds this in part: its own code decides
    agrees(beta=torch.tensor(0.2), threshold=net.threshold, reset_mechanism="zero")
    assert "reset_mechanism was changed" in reasons_of(net)[0]
    net.reset_mechanism = "subtract"
    net.spike_grad = fast_sigmoid(5.0)
    agrees(beta=torch.tensor(0.2), threshold=net.threshold)
    net.init_hidden = True
    assert as_tensor(net(x)).shape == (3, 5)


def test_other_dtypes_are_the_frameworks():
    net = sparse_backend.enable(snn.Leaky(beta=0.9, spike_grad=steep), b_th=0.3)
    _, mem = net(torch.ones(2, 3, dtype=torch.bfloat16))
    assert mem.dtype == torch.bfloat16 and "bfloat16" in reasons_of(net)[0]
    net.reset_mem()
    net(torch.ones(2, 3))
    with torch.no_grad():
        net(torch.ones(2, 3, dtype=torch.float64))  # promotes
    assert "its membrane is torch.float32" in reasons_of(net)[0]


CONV_PARTS = {"one": (), "channels": (4, 1, 1), "row": (5,), "each": (4, 5, 5), "lead": (1, 4, 1, 1)}


@pytest.mark.parametrize("part", CONV_PARTS)
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_convolutional_currents(part, b_th):
    x = normal((4, 2, 1, 7, 7), 0, torch.float64)
    shape = CONV_PARTS[part]
    results = []
    for enabled in (True, False):
        conv = nn.Conv2d(1, 4, 3, dtype=torch.float64)
        with torch.no_grad():
            conv.weight.copy_(normal(conv.weight.shape, 1)), conv.bias.zero_()
        beta = normal(shape, 2, torch.float64, 0.1) + 0.8
        lif = snn.Leaky(beta=beta, threshold=normal(shape, 3, torch.float64, 0.1) + 0.6, learn_beta=True,
                        learn_threshold=True, spike_grad=fast_sigmoid(5.0))  # fmt: skip
        head = nn.Linear(16, 3, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(normal(head.weight.shape, 4)), head.bias.zero_()
        net = nn.ModuleList([conv, lif, head])
        if enabled:
            sparse_backend.enable(net, b_th=b_th)
        else:
            lif.spike_grad = masked(lif.spike_grad, b_th)
        mem, total = lif.reset_mem(), 0
        for step in x:
            spk, mem = lif(conv(step), mem)
            total = total + (head(torch.nn.functional.max_pool2d(spk, 2).flatten(1)) ** 2).sum() + mem.sum()
        total.backward()
        results.append(({"loss": total.detach(), "mem": mem.detach()}, {n: p.grad for n, p in net.named_parameters()}))
        if enabled:
            assert path_of(net)[0] != "framework", reasons_of(net)
    assert_same_gradients(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])


# Which Linear feeds which neuron is known from what happens.


class Wiring(nn.Module):
    """Two linears and two neurons, wired by `wire`."""

    def __init__(self, wire):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5, dtype=torch.float64), nn.Linear(5, 5, dtype=torch.float64)
        with torch.no_grad():
            for i, linear in enumerate((self.a, self.b)):
                linear.weight.copy_(normal((5, 5), i, scale=0.8)), linear.bias.copy_(normal((5,), i + 5, scale=0.3))
        kwargs = {"threshold": torch.tensor(0.6, dtype=torch.float64), "spike_grad": fast_sigmoid(5.0)}
        self.one = snn.Leaky(beta=torch.tensor(0.9, dtype=torch.float64), **kwargs)
        self.two = snn.Leaky(beta=torch.tensor(0.8, dtype=torch.float64), **kwargs)
        self.wire = wire

    def forward(self, x):
        m1, m2 = self.one.reset_mem(), self.two.reset_mem()
        out = []
        for step in x:
            value, m1, m2 = self.wire(self, step, m1, m2)
            out.append(value)
        return out


def straight(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.b(s1), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def shared_linear(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.a(s1), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def another_consumer(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    current = net.b(s1)
    s2, m2 = net.two(current, m2)
    return s2.sum() + (current**2).sum() + (m2**2).sum(), m1, m2


def looked_at_first(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    current = net.b(s1)
    penalty = torch.relu(current).sum()
    s2, m2 = net.two(current, m2)
    return s2.sum() + penalty + (m2**2).sum(), m1, m2


def current_changed(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    current = net.b(s1)
    current += 0.1 * x
    s2, m2 = net.two(current, m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def two_branches(net, x, m1, m2):
    current = net.a(x)
    s1, m1 = net.one(current, m1)
    s2, m2 = net.two(current, m2)
    return (net.b(s1) * net.b(s2)).sum() + (m2**2).sum(), m1, m2


def skip(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.b(s1), m2)
    return ((s1 + s2) ** 2).sum() + net.b(s1 + s2).sum() + (m2**2).sum(), m1, m2


def feedback(net, x, m1, m2):
    s1, m1 = net.one(net.a(x) + 0.5 * (m2 if m2.dim() == 2 else 0), m1)
    s2, m2 = net.two(net.b(s1), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def no_linear_between(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(s1, m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def functional_linear(net, x, m1, m2):
    s1, m1 = net.one(torch.nn.functional.linear(x, net.a.weight, net.a.bias), m1)
    s2, m2 = net.two(torch.nn.functional.linear(s1, net.b.weight * 1.5), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def dropout_between(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.b(torch.nn.functional.dropout(s1, 0.5)), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def spikes_changed(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s1 *= 0.5
    s2, m2 = net.two(net.b(s1), m2)
    return s2.sum() + net.a(s1).sum() + (m2**2).sum(), m1, m2


def indexed(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.b(s1), m2)
    return s1[:, 0].sum() * 2 + s2[0].sum() + s1.max() + (torch.cat([s1, s2], 1) ** 2).sum() + m2.sum(), m1, m2


def membrane_fed(net, x, m1, m2):
    _, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.b(m1), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def membrane_masked(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    m1 = m1 * (m1.detach() > 0)
    s2, m2 = net.two(net.b(s1), m2)
    return s2.sum() + (m2**2).sum(), m1, m2


def checkpointed(net, x, m1, m2):
    return torch.utils.checkpoint.checkpoint(straight, net, x, m1, m2, use_reentrant=False)


def checkpointed_reentrant(net, x, m1, m2):
    return torch.utils.checkpoint.checkpoint(straight, net, x, m1, m2, use_reentrant=True)


class Scale(torch.autograd.Function):
    """A custom function that takes spikes and currents: torch does not ask them first."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def custom_function(net, x, m1, m2):
    s1, m1 = net.one(net.a(x), m1)
    s2, m2 = net.two(net.b(s1), m2)
    assert s2.requires_grad
    return Scale.apply(s2).sum() + (m2**2).sum(), m1, m2


WIRES = [
    straight, shared_linear, another_consumer, looked_at_first, current_changed, two_branches, skip, feedback,
    no_linear_between, functional_linear, dropout_between, spikes_changed, indexed, membrane_fed, membrane_masked,
    checkpointed, checkpointed_reentrant, custom_function,
]  # fmt: skip


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.__name__)
@pytest.mark.parametrize("b_th", [0.25, 0.8, INF])
@pytest.mark.parametrize("learned_input", [False, True])
def test_wirings(wire, b_th, learned_input):
    x = spikes((5, 3, 5), 0.3, 2)
    results = []
    for enabled in (True, False):
        torch.manual_seed(1)
        net = Wiring(wire)
        if enabled:
            sparse_backend.enable(net, b_th=b_th, fuse_time=False)
        else:
            net.one.spike_grad = net.two.spike_grad = masked(fast_sigmoid(5.0), b_th)
        leaf = x.clone().requires_grad_(learned_input or wire is checkpointed_reentrant)
        out = torch.stack(net(leaf))
        (out * torch.arange(1.0, 6.0, dtype=torch.float64)).sum().backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
        if leaf.grad is not None:
            grads["x"] = leaf.grad
        results.append((out, grads))
    assert_close(results[0][0], results[1][0], "output")
    assert_same_gradients(results[0][1], results[1][1])


def test_a_linear_that_feeds_a_neuron_is_fused_with_it():
    net = sparse_backend.enable(Wiring(straight), b_th=0.2, fuse_time=False)
    current = net.a(ONE_SPIKE)
    assert type(current) is DeferredCurrent and isinstance(current, torch.Tensor)
    spk, _ = net.one(current)
    assert type(spk) is EventTensor and isinstance(spk, torch.Tensor) and torch.is_tensor(spk)
    assert current.is_deferred, "the neuron took events and weight"
    assert type(net.b(spk)) is DeferredCurrent


def test_dense_inputs_are_not_looked_at_for_ever():
    net = sparse_backend.enable(Wiring(straight), b_th=0.2, fuse_time=False)
    state = net.a._sparse_backend
    dense = normal((3, 5), 0)
    for _ in range(40):
        assert type(net.a(dense)) is torch.Tensor
    assert state.skip_next > 32
    state.skip = 0
    assert type(net.a(ONE_SPIKE)) is DeferredCurrent


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("b_th", [0.2, INF])
def test_events_of_a_small_input_are_not_looked_for_where_its_current_becomes_a_tensor(monkeypatch, b_th, small):
    monkeypatch.setattr(policy, "SMALL_PRODUCT", 3 * 5 * 5 - (not small))
    net = sparse_backend.enable(Wiring(straight), b_th=b_th, fuse_time=False)
    mem, kinds = net.one.reset_mem(), []
    for _ in range(40):
        current = net.a(ONE_SPIKE.clone())
        kinds.append(type(current))
        _, mem = net.one(current, mem)
    looked_at = kinds.count(DeferredCurrent)
    assert kinds[0] is DeferredCurrent
    if small and b_th == INF:
        assert 1 < looked_at < 5, "now and then"
    else:
        assert looked_at == 40


def test_a_static_input_is_read_once():
    net = sparse_backend.enable(Wiring(straight), b_th=0.2, fuse_time=False)
    x = ONE_SPIKE.clone()
    first = net.a(x)
    assert net.a(x).events is first.events
    x[0, 0] = 1
    second = net.a(x)
    assert second.events is not first.events
    assert torch.equal(second.events.to_dense(), x)
    shared = torch.zeros(3, 5, dtype=torch.float64)
    array = shared.numpy()
    net.a(shared)
    array[0, 0] = 1  # bumps no version
    assert torch.equal(net.a(shared).events.to_dense(), shared)
    with torch.inference_mode():
        made = torch.zeros(3, 5, dtype=torch.float64)
        net.a(made)
        made[1, 1] = 1
        assert torch.equal(net.a(made).events.to_dense(), made)


# Weights that change.


@pytest.mark.parametrize("max_active", [0.25, 0.4, 1.0])  # so that some sequences begin densely and go on sparsely
def test_weights_edited_behind_autograds_back_are_seen_by_the_next_sequence(monkeypatch, max_active):
    monkeypatch.setattr(policy, "MAX_ACTIVE", max_active)
    for grad in (True, False):
        model, x = Model(CASE), make_input("spikes", CASE, 0.4)
        net, plain = enabled_copy(model, 0.3), stock_copy(model, 0.3)
        with torch.set_grad_enabled(grad):
            net(x)
            for edit in (
                lambda p: p.data.mul_(0.5), lambda p: p.data.add_(0.1), lambda p: p.detach().numpy().fill(0.2)
            ):  # fmt: skip
                for parameter in (*net.parameters(), *plain.parameters()):
                    edit(parameter)
                assert_close(net(x)[1], plain(x)[1])
            for parameter, other in zip(net.parameters(), plain.parameters(), strict=True):
                parameter.data = other.data = torch.full_like(parameter, 0.15)
            assert_close(net(x)[1], plain(x)[1])


def test_freezing_and_unfreezing():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net, plain = enabled_copy(model, 0.3), stock_copy(model, 0.3)
    for frozen in ("linears.0.weight", "linears.1.bias", "linears.0.bias", "linears.1.weight"):
        for m in (net, plain):
            dict(m.named_parameters())[frozen].requires_grad_(False)
        assert_same(run(net, x), run(plain, x))
    for m in (net, plain):
        m.requires_grad_(True)
    assert_same(run(net, x), run(plain, x))


def test_a_weight_edited_between_forward_and_backward_is_torchs_error():
    net = sparse_backend.enable(Wiring(straight), b_th=0.5, fuse_time=False)
    out = torch.stack(net(spikes((4, 3, 5), 0.3, 0))).sum()
    with torch.no_grad():
        net.b.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    # The first layer's weight is not needed by anything: as in stock torch.
    out = torch.stack(net(spikes((4, 3, 5), 0.3, 0))).sum()
    with torch.no_grad():
        net.a.weight.mul_(2)
    out.backward()


def test_gradient_accumulation_and_repeated_backward():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net, plain = enabled_copy(model, 0.3), stock_copy(model, 0.3)
    grads = []
    for m in (net, plain):
        for _ in range(2):
            (m(x)[1] ** 2).sum().backward()
        loss = (m(x)[0] * 3 + m(x)[1]).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append({name: p.grad for name, p in m.named_parameters()})
    assert_same_gradients(*grads)
    loss = (net(x)[1] ** 2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_forwards_then_one_backward():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    grads = []
    for m in (enabled_copy(model, 0.3), stock_copy(model, 0.3)):
        first, second = m(x)[1], m(x * 0.5)[1]
        (first * second).sum().backward()
        grads.append({name: p.grad for name, p in m.named_parameters()})
    assert_same_gradients(*grads)


def test_a_gradient_for_something_else_leaves_nothing_behind():
    net = sparse_backend.enable(Wiring(straight), b_th=0.5, fuse_time=False)
    x = spikes((4, 3, 5), 0.3, 0).requires_grad_()
    out = torch.stack(net(x)).sum()
    (grad,) = torch.autograd.grad(out, x, retain_graph=True)
    assert grad.shape == x.shape
    gatherers = list(hubs._gatherers.values())
    assert gatherers and all(not gatherer.sums for gatherer in gatherers)
    out.backward()
    assert all(not gatherer.sums for gatherer in gatherers)


def test_a_second_derivative_is_refused():
    net = sparse_backend.enable(Wiring(straight), b_th=0.5, fuse_time=False)
    x = spikes((4, 3, 5), 0.3, 0).requires_grad_()
    out = torch.stack(net(x)).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError):
        (grad**2).sum().backward()


def test_forwards_without_backward_leak_nothing():
    model = Model(CASE)
    net = sparse_backend.enable(model, b_th=0.3, fuse_time=False)
    x = make_input("spikes", CASE, 0.4)

    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), len(hubs._gatherers)

    counts = []
    for _ in range(3):
        for _ in range(20):
            net(x)
        counts.append(alive())
    assert counts[2][0] - counts[0][0] < 10 and counts[0][1] == counts[2][1], counts
    spk, mem = net(x)
    watch = weakref.ref(spk)
    del spk, mem
    for neuron in net.neurons:
        neuron.reset_mem()
    gc.collect()
    assert watch() is None


def test_patched_modules_are_not_kept_alive():
    with sparse_backend.patch(b_th=0.3):
        net = Model(CASE)
        net(make_input("spikes", CASE, 0.4))[1].sum().backward()
        watches = [weakref.ref(m) for m in (*net.neurons, *net.linears)]
        weights = [weakref.ref(p) for p in net.parameters()]
        del net
        for _ in range(3):  # a graph goes in one pass, what it held in the next
            gc.collect()
        assert all(watch() is None for watch in watches + weights)


# Hooks.


def test_forward_hooks_see_tensors_and_may_replace_them():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    outcomes = []
    for m in (enabled_copy(model, 0.3), stock_copy(model, 0.3)):
        seen = []
        m.linears[1].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].sum().item()))
        m.linears[1].register_forward_hook(lambda module, args, out, seen=seen: out * 0.5)
        m.neurons[0].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0].mean().item()))
        outcomes.append((run(m, x), seen))
    assert_same(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == pytest.approx(outcomes[1][1])


@pytest.mark.parametrize("where", ["linears.0", "linears.1", "neurons.0", "neurons.1"])
def test_full_backward_hooks(where):
    case = ModelCase(surrogate=fast_sigmoid(5.0), steps=3)
    model, x = Model(case), make_input("spikes grad", case, 0.4)
    outcomes = []
    for m in (enabled_copy(model, INF), stock_copy(model, INF)):
        seen = []
        m.get_submodule(where).register_full_backward_hook(
            lambda module, gi, go, seen=seen: seen.append([g.clone() for g in (*gi, *go) if g is not None])
        )
        outcomes.append((run(m, x), seen))
    assert_same(outcomes[0][0], outcomes[1][0])
    for ours, stock in zip(outcomes[0][1], outcomes[1][1], strict=True):
        for a, b in zip(ours, stock, strict=True):
            assert_close(a, b)


def test_full_backward_hooks_in_the_sparse_regime():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net, plain = enabled_copy(model, 0.3), stock_copy(model, 0.3)
    count = []
    for module in (*net.linears, *net.neurons, net):
        module.register_full_backward_hook(lambda *_: count.append(1))
    assert_same(run(net, x), run(plain, x))
    assert count


# Modes of torch.


def test_no_grad_and_inference_mode_and_back():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net, plain = enabled_copy(model, 0.3), stock_copy(model, 0.3)
    with torch.no_grad():
        assert_close(net(x)[1], plain(x)[1])
    with torch.inference_mode():
        assert_close(as_tensor(net(x)[1]), plain(x)[1])
    for m in (net, plain):
        for neuron in m.neurons:
            neuron.mem = torch.zeros(0, dtype=torch.float64)  # not the inference tensor
    assert_same(run(net, x), run(plain, x))


def test_functional_transforms_run_the_frameworks_code():
    net = sparse_backend.enable(nn.Sequential(nn.Linear(4, 3), snn.Leaky(beta=0.9, spike_grad=piecewise)), 0.3)
    plain = sparse_backend.disable(copy.deepcopy(net))
    x = normal((3, 4), 0, torch.float32)

    def f(model):
        def inner(weight, value):
            spk, mem = torch.func.functional_call(model, {"0.weight": weight, "1.mem": torch.zeros(3, 3)}, (value,))
            return (mem**2).sum() + spk.sum()

        return inner

    weight = net[0].weight.detach()
    assert_close(torch.func.grad(f(net))(weight, x), torch.func.grad(f(plain))(weight, x))
    assert "torch.func" in reasons_of(net)[0]


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, m1, m2):
        net = self.model
        s1, m1 = net.neurons[0](net.linears[0](x), m1)
        s2, m2 = net.neurons[1](net.linears[1](s1), m2)
        return s2, m1, m2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("b_th", [0.3, INF])
@pytest.mark.parametrize("options", [{}, {"learn_beta": True, "learn_threshold": True, "learn_graded": True}])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiling_a_step_with_fullgraph(backend, b_th, options):
    torch._dynamo.reset()
    case = ModelCase([LayerCase(8, **options), LayerCase(5, reset="zero")], surrogate=fast_sigmoid(5.0))
    model, x = Model(case), make_input("spikes", case, 0.4)
    outcomes = []
    for m, compiled in ((copy.deepcopy(enabled_copy(model, b_th)), True), (stock_copy(model, b_th), False)):
        step = torch.compile(Step(m), backend=backend, fullgraph=True) if compiled else Step(m)
        m1, m2 = x.new_zeros(3, 8), x.new_zeros(3, 5)
        total = 0
        for t in range(4):
            spk, m1, m2 = step(x[t], m1, m2)
            assert type(spk) is torch.Tensor
            total = total + (m2**2).sum() + spk.sum() * (t + 1)
        total.backward()
        outcomes.append({"loss": total.detach(), **{n: p.grad for n, p in m.named_parameters()}})
    torch._dynamo.reset()
    assert_same_gradients(*outcomes)


def test_compiling_what_is_not_accelerated_is_the_frameworks_own():
    torch._dynamo.reset()
    neuron = snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(5.0), reset_delay=False)
    sparse_backend.enable(neuron, b_th=0.3)
    step = torch.compile(neuron, backend="eager")
    plain = snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(5.0), reset_delay=False)
    x = normal((3, 4), 0, torch.float32).requires_grad_()
    for _ in range(2):
        assert_close(step(x)[1], plain(x)[1], rtol=1e-5)
    torch._dynamo.reset()


# patch.


def test_patch_as_context_manager_and_as_call():
    original = snn.Leaky.__dict__["forward"]
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    stock = run(stock_copy(model, 0.3), x)
    with sparse_backend.patch("snntorch", b_th=0.3):
        assert snn.Leaky.__dict__["forward"] is not original
        assert_same(run(model, x), stock)
        later = Model(CASE)
        assert_same(run(later, x), stock)
        assert "forward" not in later.neurons[0].__dict__ and "_sparse_backend" not in later.neurons[0].__dict__
        assert path_of(later)[0] in ("sparse step", "dense step")
        mem, later = torch.zeros(3, 8, dtype=torch.float64), Model(CASE)
        spk, mem = later.neurons[0](later.linears[0](x[0]) * 0, mem)
        assert type(spk) is EventTensor and type(later.linears[1](spk)) is DeferredCurrent
    assert snn.Leaky.__dict__["forward"] is original
    sparse_backend.patch(b_th=0.3)
    assert_same(run(model, x), stock)
    sparse_backend.unpatch()
    sparse_backend.unpatch()
    assert snn.Leaky.__dict__["forward"] is original
    assert type(model.neurons[0](x[0].new_ones(2, 8))[0]) is torch.Tensor


def test_patches_nest_and_enabled_models_keep_their_own_b_th():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    own = enabled_copy(model, 0.2)
    stock = {b_th: run(stock_copy(model, b_th), x) for b_th in (0.2, 0.3, 0.6)}
    with sparse_backend.patch(b_th=0.3):
        assert_same(run(own, x), stock[0.2])
        with sparse_backend.patch(b_th=0.6):
            assert_same(run(model, x), stock[0.6])
        assert_same(run(model, x), stock[0.3])
        sparse_backend.disable(own)
        assert_same(run(own, x), stock[0.3])


def test_an_exception_inside_patch_undoes_it():
    original = snn.Leaky.forward
    with pytest.raises(ZeroDivisionError), sparse_backend.patch(b_th=0.3):
        _ = 1 / 0
    assert snn.Leaky.forward is original


def test_patch_leaves_subclasses_alone():
    class Mine(snn.Leaky):
        pass

    with sparse_backend.patch(b_th=0.3):
        mine = Mine(beta=0.9, spike_grad=fast_sigmoid(5.0))
        assert type(mine(torch.ones(2, 3))[0]) is torch.Tensor
        assert type(snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(5.0))(torch.zeros(2, 3))[0]) is EventTensor


def test_patch_refuses_what_it_does_not_know(monkeypatch):
    with pytest.raises(ValueError, match=r"framework: expected one of 'snntorch'.*, got 'brian'"):
        sparse_backend.patch("brian")
    with pytest.raises(ValueError, match=r"framework: expected one of 'snntorch'.*, got 'brian'"):
        sparse_backend.unpatch("brian")
    with pytest.raises(ValueError, match="b_th"):
        sparse_backend.patch("snntorch", b_th=-1)

    def missing(name):
        raise ModuleNotFoundError("No module named 'snntorch'", name="snntorch")

    monkeypatch.setattr(enabling.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"snntorch cannot be imported.*pip install 'sparse_backend\[snntorch\]'"):
        sparse_backend.patch("snntorch")


# Bad input: as stock or one clear error.


def test_wrong_shapes_raise_at_the_linear_as_torch_does():
    net = sparse_backend.enable(small_net(), b_th=0.2)
    for x in (torch.zeros(2, 7), EventTensor.from_dense(torch.zeros(2, 7)), torch.zeros(7)):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            net(x)
    with pytest.raises(RuntimeError, match="dtype"):
        net(torch.zeros(2, 6, dtype=torch.float64))


def test_the_batch_may_change_between_steps():
    net, plain = (snn.Leaky(beta=0.9, spike_grad=steep) for _ in range(2))
    sparse_backend.enable(net, b_th=0.2)
    for batch in (3, 5, 5, 2):
        x = normal((batch, 4), batch, torch.float32)
        assert_close(net(x)[1], plain(x)[1], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_empty_batches(shape):
    net, plain = sparse_backend.enable(small_net(), b_th=0.2), small_net()
    plain.load_state_dict(net.state_dict())
    for m in (net, plain):
        spk, mem = m(torch.zeros(shape))
        assert as_tensor(spk).shape == mem.shape == (*shape[:-1], 3)
        (as_tensor(spk).sum() + mem.sum()).backward()
    assert_close(net[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("where", ["input", "weight", "inf weight", "bias"])
@pytest.mark.parametrize("b_th", [0.3, INF])
def test_nan_and_inf_come_out_where_stock_has_them(where, b_th):
    model, x = Model(CASE), make_input("spikes", CASE, 0.3)
    with torch.no_grad():
        if where == "input":
            x[2, 1, 3] = float("nan")
        elif where == "bias":
            model.linears[0].bias[2] = float("nan")
        else:
            model.linears[0].weight[2, 3] = float("inf" if where.startswith("inf") else "nan")
    ours, stock = run(enabled_copy(model, b_th), x), run(stock_copy(model, b_th), x)
    assert_close(ours.spikes, stock.spikes)
    assert_close(ours.mems, stock.mems)


def test_the_engine_is_not_imported_by_a_framework_and_imports_none():
    assert for_snntorch.is_neuron(snn.Synaptic(alpha=0.9, beta=0.9))
    assert not for_snntorch.is_neuron(nn.Linear(1, 1))


# What has a gradient, and what is a copy, as in snnTorch.


@pytest.mark.parametrize("fuse_time", [True, False])
@pytest.mark.parametrize("b_th", [0.2, INF])
@pytest.mark.parametrize("reset", ["zero", "none", "subtract"])
@pytest.mark.parametrize(
    "make", [snn.Leaky, lambda **options: snn.Synaptic(alpha=0.8, **options)], ids=["Leaky", "Synaptic"]
)
def test_a_threshold_that_nothing_depends_on_has_no_gradient(make, reset, b_th, fuse_time):
    """A membrane that is reset to zero, or never, does not depend on it: of zeros, weight decay would move it."""

    def run(enable):
        torch.manual_seed(0)
        neuron = make(beta=0.9, learn_threshold=True, reset_mechanism=reset, init_hidden=True, output=True)
        net = nn.Sequential(nn.Linear(3, 3), neuron)
        if enable:
            sparse_backend.enable(net, b_th=b_th, fuse_time=fuse_time)
        for _ in range(3):
            mem = net(torch.full((2, 3), 3.0))[-1]
        mem.sum().backward()
        return neuron.threshold.grad

    ours, stock = run(True), run(False)
    assert (ours is None) is (stock is None) is (reset != "subtract")
    if stock is not None:
        assert_close(ours, stock, rtol=1e-5)


@pytest.mark.parametrize("spikes", [1, 3])
def test_graded_spikes_keep_the_factor_they_were_made_with(spikes):
    lif = snn.Leaky(
        beta=0.9, graded_spikes_factor=1.5, learn_graded_spikes_factor=True, init_hidden=True, spike_grad=steep
    )  # fmt: skip
    net = sparse_backend.enable(nn.Sequential(nn.Identity(), lif), b_th=0.2)
    current = torch.zeros(1, 10)
    current[0, :spikes] = 2.0
    out = net(current)
    with torch.no_grad():
        lif.graded_spikes_factor.fill_(7.0)
    assert out.max().item() == 1.5


@pytest.mark.parametrize("fuse_time", [True, False])
def test_parameters_that_are_not_contiguous(fuse_time):
    def column(size):
        return nn.Parameter((torch.rand(size, 2, dtype=torch.float64) * 0.5 + 0.3)[:, 0])

    class Net(nn.Module):
        def __init__(self, spike_grad):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(12, 9).double()
            self.fc.weight, self.fc.bias = nn.Parameter(torch.rand(12, 9).double().t() * 0.3), column(9)
            self.lif = snn.Leaky(beta=0.9, learn_beta=True, learn_threshold=True, spike_grad=spike_grad)
            self.lif.beta, self.lif.threshold = column(9), column(9)
            self.weight, self.one = nn.Parameter(torch.rand(5, 9).double()), nn.Parameter(torch.rand(1).double())

        def forward(self, x):
            mem, out = self.lif.reset_mem(), []
            for step in x:
                spk, mem = self.lif(self.fc(step), mem)
                out.append(torch.nn.functional.linear(spk, self.weight, self.one.expand(5)))
            return torch.stack(out), mem

    x = (torch.rand(6, 4, 12, generator=torch.Generator().manual_seed(0)) < 0.2).double()
    surrogate, results = fast_sigmoid(5.0), []
    for net in (Net(masked(surrogate, 0.3)), sparse_backend.enable(Net(surrogate), b_th=0.3, fuse_time=fuse_time)):
        assert not (net.fc.bias.is_contiguous() or net.lif.beta.is_contiguous())
        out, mem = net(x)
        (out.sum() + mem.square().sum()).backward()
        results.append((out, mem, *(p.grad for p in net.parameters())))
    for ours, stock in zip(*results, strict=True):
        assert_close(ours, stock)


# What others have done to a layer.


@pytest.mark.parametrize("which", [0, 1])
def test_a_forward_that_was_replaced_before_is_kept(which):
    net = nn.Sequential(nn.Linear(4, 3), snn.Leaky(beta=0.9, spike_grad=STEEP, init_hidden=True, output=True))
    inner, replaced = net[which].forward, []

    def forward(*args):
        replaced.append(args)
        return inner(*args)

    net[which].forward = forward
    x = torch.rand(2, 4)
    expected = net(x)[1]
    net[1].reset_mem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the second net, in which nothing is left to enable
        sparse_backend.enable(net, b_th=0.2)
    assert torch.equal(net(x)[1], expected) and len(replaced) == 2
    assert net[which].forward is forward
    if which == 1:
        assert "its forward was replaced" in sparse_backend.report(net).layers[0].reason
    assert sparse_backend.disable(net)[which].forward is forward


def test_a_forward_that_was_replaced_since_is_not_taken_away():
    net = sparse_backend.enable(nn.Sequential(nn.Linear(4, 3), snn.Leaky(beta=0.9, init_hidden=True)), b_th=0.2)
    ours = net[0].forward
    net[0].forward = lambda x: ours(x) + 1
    with pytest.warns(UserWarning, match="0 stays enabled, its forward was replaced"):
        sparse_backend.disable(net)
    net(torch.rand(2, 4))
    net[0].forward = ours
    sparse_backend.disable(net)
    assert "forward" not in net[0].__dict__ and not layer_state.is_enabled(net)


@pytest.mark.parametrize("b_th", ["auto", INF, 0.3])
def test_a_second_derivative_is_an_error_for_a_linear_loss_too(b_th):
    """Whose gradient requires none itself, so that torch's own check would let it pass, and be wrong."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 3), snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(1.0))

        def forward(self, x):
            mem, total = self.lif.reset_mem(), 0
            for step in x:
                spk, mem = self.lif(self.fc(step), mem)
                total = total + spk
            return total

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # b_th="auto" stays dense
        net = sparse_backend.enable(Net(), b_th=b_th)
    x = torch.rand(8, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()
