"""report and check: what they say, and that they leave the model as it was."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import snntorch as snn
import torch
from helpers import INF, SURROGATES, atan, fast_sigmoid, masked, normal, sparse_always, spikes
from snntorch_models import LayerCase, Model, ModelCase, enabled_copy, make_input, run, stock_copy
from torch import nn

import sparse_backend
from sparse_backend import EventTensor
from sparse_backend.checking import CheckResult
from sparse_backend.reporting import Report

CASE = ModelCase(layers=[LayerCase(20), LayerCase(6)], inputs=12, batch=4, steps=5)


@pytest.fixture(autouse=True)
def quiet():
    before = list(snn.SpikingNeuron.instances)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sparse_backend: with b_th='auto'")
        yield
    snn.SpikingNeuron.instances[:] = before


# report.


def test_a_report_before_any_call():
    layers = sparse_backend.report(enabled_copy(Model(CASE), {"neurons.0": 0.2})).layers
    assert [layer.name for layer in layers] == ["neurons.0", "neurons.1"]
    assert [layer.kind for layer in layers] == ["snntorch.Leaky"] * 2
    assert all(layer.path == "not called yet" and layer.reason is None and layer.active is None for layer in layers)
    assert layers[0].b_th == layers[0].b_th_value == 0.2
    assert layers[1].b_th == "auto" and layers[1].b_th_value > 1


def test_models_without_anything_enabled_say_so():
    assert "No spiking layer" in str(sparse_backend.report(nn.Linear(2, 2)))
    report = sparse_backend.report(Model(CASE))
    assert "Nothing is accelerated. Call sparse_backend.enable(net)" in str(report)
    assert [layer.reason for layer in report.layers] == ["not enabled"] * 2
    with pytest.raises(TypeError, match=r"net: expected a torch\.nn\.Module, got str"):
        sparse_backend.report("net")


def counted(model, x, b_th):
    """Active and spiking shares of every layer, from stock's own V - threshold."""
    seen: list[torch.Tensor] = []
    stock = stock_copy(model, INF, seen)
    run(stock, x)
    per_call = seen[1::2]  # each step resets, then fires
    layers = [torch.stack(per_call[i::2]) for i in range(2)]
    return [(float((v.abs() < b_th).double().mean()), float((v > 0).double().mean())) for v in layers]


def test_fractions_are_those_of_the_forward():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, 0.2)
    with sparse_always():
        for _ in range(3):
            run(net, x)
    for layer, (active, spiking) in zip(sparse_backend.report(net).layers, counted(model, x, 0.2), strict=True):
        assert layer.path == "sparse step"
        assert layer.active == pytest.approx(active) and layer.spikes == pytest.approx(spiking)
        assert layer.steps == {"sparse": 15, "dense": 0, "framework": 0}


def test_kept_bytes_are_what_the_docstring_says():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, 0.2)
    with sparse_always(), torch.no_grad():
        net(x)
    assert [layer.kept_bytes for layer in sparse_backend.report(net).layers] == [0, 0]
    with sparse_always():
        run(net, x)
    active, spiking = counted(model, x, 0.2)[0]
    entries = 5 * 4 * 20
    events, pointers = round(entries * (active + spiking)), 5 * 2 * (4 + 1)
    layer = sparse_backend.report(net).layers[0]
    assert layer.kept_bytes == 8 * round(entries * active) + 4 * events + 4 * pointers
    assert layer.dense_bytes == 2 * 8 * entries


def test_counts_begin_again_on_request():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    net = enabled_copy(model, 0.2)
    run(net, x)
    first = sparse_backend.report(net, reset=True).layers[0]
    assert sum(first.steps.values()) == 5
    second = sparse_backend.report(net).layers[0]
    assert sum(second.steps.values()) == 0 and second.active is None and second.kept_bytes == 0


def test_dense_layers_say_why_and_what_cures_it():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    infinite = enabled_copy(model, INF)
    run(infinite, x)
    layer = sparse_backend.report(infinite).layers[0]
    assert (layer.path, layer.reason, layer.active) == ("dense step", "b_th is infinite", 1.0)
    assert layer.kept_bytes <= layer.dense_bytes

    broad = enabled_copy(Model(ModelCase(CASE.layers, 12, surrogate=atan())), "auto")
    run(broad, x)
    layer = sparse_backend.report(broad).layers[0]
    assert layer.path == "dense step"
    assert "95 % of its surrogate's mass needs the band |V - threshold| < 4.0" in layer.reason
    assert "steeper surrogate" in layer.reason and "b_th=0.2" in layer.reason
    assert layer.active > 0.9 and layer.spikes is not None

    diverging = enabled_copy(Model(ModelCase(CASE.layers, 12, surrogate=SURROGATES["straight_through"])), "auto")
    run(diverging, x)
    assert "integral diverges" in sparse_backend.report(diverging).layers[0].reason

    wide = enabled_copy(model, 50.0)
    run(wide, x)
    layer = sparse_backend.report(wide).layers[0]
    assert layer.path == "dense step" and "40 % of its neurons are active" in layer.reason


def test_counts_that_stay_on_the_device_are_the_same(monkeypatch):
    """As on a GPU, where the report is the first to read them."""
    x, reports = make_input("spikes", CASE, 0.4), []
    for there in (False, True):
        monkeypatch.setattr("sparse_backend.policy.reads_at_once", lambda device, there=there: not there)
        net = enabled_copy(Model(CASE), 50.0)
        for _ in range(8):
            run(net, x)
        layer, _ = sparse_backend.report(net).layers
        assert layer.steps["dense"] > 31 and layer.spikes
        tallies = [module._sparse_backend.tally for module in net.modules() if isinstance(module, snn.Leaky)]
        assert all(isinstance(tally.spikes, torch.Tensor if there else int) for tally in tallies)
        reports.append((layer.active, layer.spikes))
    assert reports[0] == reports[1]


def test_the_table_names_every_layer():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    model.other = snn.Alpha(alpha=0.9, beta=0.8)
    net = enabled_copy(model, {"neurons.0": 0.2, "neurons.1": INF})
    run(net, x)
    net.neurons[0].state_quant = lambda mem: mem.round()
    run(net, x)
    report = sparse_backend.report(net)
    assert isinstance(report, Report)
    head, rule, *rows = str(report).splitlines()
    assert head.split("  ")[0] == "layer"
    for column in ("path", "at once", "b_th", "active", "spikes", "kept", "dense", "why not faster"):
        assert column in head
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows[:3]] == ["neurons.0", "neurons.1", "other"]
    assert "framework" in rows[0] and "state_quant" in rows[0]
    assert "inf" in rows[1] and "b_th is infinite" in rows[1]
    assert "snntorch.Alpha is not accelerated yet" in rows[2]
    assert str(report) == repr(report)
    html = report._repr_html_()
    assert html.startswith("<table>") and html.count("<tr>") == 4 and "neurons.0" in html
    told = report.to_dict()
    assert {layer["name"] for layer in told["layers"]} == {"neurons.0", "neurons.1", "other"}
    assert told["layers"][1]["b_th"] == INF


def test_a_lone_neuron_is_the_model():
    neuron = sparse_backend.enable(snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(100.0)), b_th=0.2)
    neuron(torch.ones(2, 3))
    assert "(model)" in str(sparse_backend.report(neuron))


def test_patched_models_are_reported_too():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    with sparse_backend.patch(b_th=0.2):
        run(model, x)
        assert [layer.b_th for layer in sparse_backend.report(model).layers] == [0.2, 0.2]
        assert sum(sparse_backend.report(model).layers[0].steps.values()) == 5


# check.


def expected(model, x, b_th, loss):
    """Gradients of the stock model masked to the band, and of the stock model."""
    result = []
    for width in (b_th, INF):
        stock = stock_copy(model, width)
        value = loss(stock(x))
        names, leaves = zip(*stock.named_parameters(), strict=True)
        result.append((value.item(), dict(zip(names, torch.autograd.grad(value, leaves), strict=True))))
    return result


def total(out):
    return (out[1] ** 2).sum() + out[0].sum()


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("fuse_time", [False, True])
def test_check_compares_every_gradient(hidden, fuse_time):
    case = ModelCase([LayerCase(20, init_hidden=hidden, learn_beta=True), LayerCase(6, init_hidden=hidden)], 12)
    model, x = Model(case), make_input("spikes", case, 0.4)
    (sparse_loss, sparse), (dense_loss, dense) = expected(model, x, 0.2, total)
    result = sparse_backend.check(enabled_copy(model, 0.2, fuse_time), x, loss=total)
    assert isinstance(result, CheckResult)
    assert result.loss_sparse == pytest.approx(sparse_loss) and result.loss_dense == pytest.approx(dense_loss)
    assert [g.name for g in result.gradients] == [name for name, _ in model.named_parameters()]
    for gradient in result.gradients:
        a, b = sparse[gradient.name].flatten(), dense[gradient.name].flatten()
        assert gradient.relative_error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6, abs=1e-12)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
        assert gradient.cosine == pytest.approx(float(cosine), rel=1e-9)
    assert any(g.relative_error > 1e-3 for g in result.gradients)


def test_check_of_an_infinite_band_finds_no_difference():
    model = Model(CASE)
    x = make_input("real grad", CASE, 0.4)
    result = sparse_backend.check(enabled_copy(model, INF), x, loss=total)
    assert [g.name for g in result.gradients][-1] == "x"
    assert all(g.relative_error < 1e-9 and g.cosine > 1 - 1e-9 for g in result.gradients)
    assert x.grad is None


def test_check_prints_a_table():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    result = sparse_backend.check(enabled_copy(model, 0.2), x, loss=total)
    first, head, *rest = str(result).splitlines()
    assert first.startswith("loss: sparse ")
    assert head.split() == ["gradient", "of", "cosine", "relative", "error", "sparse", "norm", "dense", "norm"]
    assert len(rest) == 1 + len(list(model.parameters()))
    assert result._repr_html_().count("<tr>") == 1 + len(list(model.parameters()))
    told = result.to_dict()
    assert told["gradients"][0].keys() == {"name", "cosine", "relative_error", "sparse_norm", "dense_norm"}


class Everything(nn.Module):
    """State of every kind that a forward may change."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.dropout = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.lif = snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(5.0), init_hidden=True, learn_threshold=True)
        self.calls, self.history, self.trace = 0, [], torch.zeros(3, 8)
        self.register_buffer("count", torch.zeros(1))
        self.noise = []

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.noise = [random.random(), np.random.rand()]  # noqa: NPY002 (what people's models call)
        spk = self.lif(self.dropout(self.norm(self.fc(x))))
        self.history.append(spk)
        self.trace += spk.detach()
        with torch.no_grad():
            self.fc.weight.clamp_(-0.4, 0.4)
        return spk, self.lif.mem


def test_check_leaves_everything_as_it_was():
    net = sparse_backend.enable(Everything(), b_th=0.5)
    x = normal((3, 6), 0, torch.float32)
    for _ in range(2):
        total(net(x)).backward(retain_graph=True)
    net.lif.train(False)
    pending = total(net(x))
    before = {
        "parameters": [p.detach().clone() for p in net.parameters()],
        "grads": [p.grad for p in net.parameters()],
        "grad values": [p.grad.clone() for p in net.parameters()],
        "buffers": dict(net.named_buffers()),
        "buffer values": {name: b.detach().clone() for name, b in net.named_buffers()},
        "attributes": {name: dict(m.__dict__) for name, m in net.named_modules()},
        "trace": net.trace.clone(),
        "history": list(net.history),
        "noise": list(net.noise),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "report": str(sparse_backend.report(net)),
        "training": [m.training for m in net.modules()],
        "versions": [b._version for b in net.buffers()],
    }
    with torch.no_grad():
        first = sparse_backend.check(net, x, loss=total)
        assert not torch.is_grad_enabled()
    second = sparse_backend.check(net, x, loss=total)
    assert first.to_dict() == second.to_dict(), "both runs start from the same state and random numbers"
    assert first.loss_sparse == pytest.approx(first.loss_dense, rel=1e-5)
    for p, value, grad, grad_value in zip(
        net.parameters(), before["parameters"], before["grads"], before["grad values"], strict=True
    ):
        assert torch.equal(p, value) and p.grad is grad and torch.equal(p.grad, grad_value)
    assert all(b is before["buffers"][name] for name, b in net.named_buffers())
    assert all(torch.equal(b, before["buffer values"][name]) for name, b in net.named_buffers())
    assert [b._version for b in net.buffers()] == before["versions"]
    for name, module in net.named_modules():
        assert module.__dict__.keys() == before["attributes"][name].keys()
        assert all(module.__dict__[key] is value for key, value in before["attributes"][name].items())
    assert torch.equal(net.trace, before["trace"]) and net.noise == before["noise"]
    assert len(net.history) == len(before["history"])
    assert torch.equal(torch.get_rng_state(), before["random"][0])
    assert random.getstate() == before["random"][1]
    assert np.random.get_state()[1].tolist() == before["random"][2]  # noqa: NPY002
    assert str(sparse_backend.report(net)) == before["report"]
    assert [m.training for m in net.modules()] == before["training"]
    pending.backward()  # a graph recorded before still works


def test_check_of_a_model_called_once_per_step():
    net = nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.9, spike_grad=fast_sigmoid(5.0), init_hidden=True))
    sparse_backend.enable(net, b_th=0.3)
    x = spikes((5, 2, 6), 0.4, 0, torch.float32)

    def loop(model, batch):
        return torch.stack([model(step) for step in batch])

    mem = net[1].mem
    result = sparse_backend.check(net, x, loss=lambda out: (out.mean(0) ** 2).sum() + out.sum(), run=loop)
    assert len(result.gradients) == 2 and net[1].mem is mem
    assert sparse_backend.check(net, EventTensor.from_dense(x), lambda out: out.sum(), loop).loss_dense >= 0


def test_check_under_patch():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    (_, sparse), (_, dense) = expected(model, x, 0.2, total)
    with sparse_backend.patch(b_th=0.2):
        result = sparse_backend.check(model, x, loss=total)
    name = "linears.0.weight"
    error = float((sparse[name] - dense[name]).norm() / dense[name].norm())
    assert result.gradients[0].relative_error == pytest.approx(error, rel=1e-6)


def test_gradients_that_are_absent_on_both_sides():
    model = Model(CASE)
    model.unused = nn.Linear(2, 2, dtype=torch.float64)
    result = sparse_backend.check(enabled_copy(model, 0.2), make_input("spikes", CASE, 0.4), loss=total)
    unused = {g.name: g for g in result.gradients}["unused.weight"]
    assert unused.cosine is None and unused.relative_error is None and unused.dense_norm == 0
    assert " -  " in str(result)


def test_check_refuses_what_it_cannot_compare():
    model, x = Model(CASE), make_input("spikes", CASE, 0.4)
    with pytest.raises(ValueError, match=r"net: expected an enabled model.*Call enable\(net\) first"):
        sparse_backend.check(model, x, loss=total)
    net = enabled_copy(model, 0.2)
    with pytest.raises(ValueError, match=r"loss: expected a function that returns a scalar .*, got a tensor \[5, 4"):
        sparse_backend.check(net, x, loss=lambda out: out[1])
    with pytest.raises(ValueError, match="loss: expected a function that returns a scalar tensor, got tuple"):
        sparse_backend.check(net, x, loss=lambda out: out)
    with pytest.raises(ValueError, match="loss: expected a scalar that requires grad"):
        sparse_backend.check(net, x, loss=lambda out: out[1].detach().sum())
    with pytest.raises(TypeError, match=r"net: expected a torch\.nn\.Module, got int"):
        sparse_backend.check(1, x, loss=total)
    assert sparse_backend.report(net).layers[0].path == "not called yet"


def test_the_judge_of_this_file_is_stock():
    assert math.isinf(INF) and masked(fast_sigmoid(), INF)(torch.ones(2)).sum() == 2
