"""The patterns of Norse's documentation train the same with and without the line."""

from __future__ import annotations

from dataclasses import replace

import norse.torch as norse
import pytest
import torch
from helpers import INF, normal, spikes
from norse_models import LayerCase, Model, ModelCase, lif, masked_threshold
from torch import nn

import sparse_backend

F64 = torch.float64


def train(make, call, steps=4, lr=0.05):
    """Losses of a few steps of Adam, stock and enabled, in float64 with b_th = inf."""
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        net, more = make()
        net = net.double()
        if enabled:
            sparse_backend.enable(net, b_th=INF)
        optimiser = torch.optim.Adam([*net.parameters(), *more], lr=lr)
        losses.append([])
        for step in range(steps):
            optimiser.zero_grad()
            loss = call(net, step)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
        losses[-1] += [float(parameter.detach().double().sum()) for parameter in more]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][0] != losses[0][steps - 1], "nothing was learned"
    return net


def test_training_a_stepped_convolutional_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = norse.SequentialState(
                nn.Conv2d(1, 4, 3), norse.LIFCell(lif()), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), norse.LIFCell(lif()),
                nn.Flatten(), nn.Linear(16, 8), norse.LIFCell(lif()), nn.Linear(8, 3, bias=False), norse.LICell(),
            )  # fmt: skip

        def forward(self, x):
            voltages, state = [], None
            for step in x:
                out, state = self.features(step, state)
                voltages.append(out)
            return torch.stack(voltages)

    def call(net, step):
        voltages = net(normal((6, 4, 1, 10, 10), step, F64, 2.0))
        return nn.functional.cross_entropy(voltages.max(0).values, torch.tensor([0, 1, 2, 1]))

    train(lambda: (Net(), []), call)


def test_training_with_lift():
    def make():
        return norse.SequentialState(
            norse.Lift(nn.Conv2d(1, 4, 3)), norse.LIF(lif()), norse.Lift(nn.MaxPool2d(2)), nn.Flatten(2),
            norse.Lift(nn.Linear(36, 8)), norse.LIF(lif()), nn.Linear(8, 3), norse.LI(),
        ), []  # fmt: skip

    def call(net, step):
        out, _ = net(normal((6, 4, 1, 8, 8), step, F64, 2.0))
        return nn.functional.cross_entropy(out[-1], torch.tensor([0, 1, 2, 1]))

    train(make, call)


def test_training_a_recurrent_memory_task():
    class Memory(nn.Module):
        def __init__(self, hidden=10):
            super().__init__()
            self.recurrent = norse.LIFRecurrent(6, hidden, lif())
            self.cell = norse.LIFRecurrentCell(hidden, hidden, lif())
            self.readout = norse.LILinearCell(hidden, 2)

        def forward(self, x):
            z, _ = self.recurrent(x)
            s1 = s2 = None
            for step in z:
                out, s1 = self.cell(step, s1)
                out, s2 = self.readout(out, s2)
            return out

    def call(net, step):
        out = net(spikes((8, 4, 6), 0.5, step))
        return nn.functional.cross_entropy(out, torch.tensor([0, 1, 1, 0]))

    train(lambda: (Memory(), []), call)


def test_training_time_constants():
    def make():
        learned = [
            nn.Parameter(torch.full((8,), 400.0)),
            nn.Parameter(torch.tensor(150.0)),
            nn.Parameter(torch.tensor(0.4)),
        ]
        p = lif(v_th=learned[2])._replace(tau_mem_inv=learned[0], tau_syn_inv=learned[1])
        return norse.SequentialState(nn.Linear(6, 8), norse.LIF(p), nn.Linear(8, 2), norse.LI()), learned

    def call(net, step):
        return net(spikes((8, 4, 6), 0.5, step) * 2)[0].pow(2).mean() + net[1].p.tau_mem_inv.pow(2).mean() * 1e-6

    before = [parameter.detach().clone() for parameter in make()[1]]
    net = train(make, call, lr=0.5)
    assert all(
        not torch.equal(a, b.to(a.dtype))
        for a, b in zip(before, (net[1].p.tau_mem_inv, net[1].p.tau_syn_inv, net[1].p.v_th), strict=True)
    )


def test_training_a_regression_with_a_leaky_integrator():
    def call(net, step):
        out, _ = net(spikes((20, 2, 6), 0.3, step))
        return nn.functional.mse_loss(
            out[:, :, 0], torch.sin(torch.linspace(0, 3, 20, dtype=F64)).unsqueeze(1).expand(20, 2)
        )

    train(lambda: (norse.SequentialState(nn.Linear(6, 8), norse.LIF(lif()), nn.Linear(8, 1), norse.LI()), []), call)


@pytest.mark.parametrize("form", ["sequence", "step", "lifted"])
def test_training_with_a_band_is_training_with_a_masked_surrogate(form):
    layers = [LayerCase("LIFRecurrent", 8), LayerCase("LIFBox", 6), LayerCase("LI", 3)]
    case = ModelCase([replace(layer, method="tanh", alpha=3.0) for layer in layers], form=form, steps=8)
    losses = []
    for enabled in (True, False):
        with masked_threshold(INF if enabled else 0.3):
            model = Model(case)
            if enabled:
                sparse_backend.enable(model, b_th=0.3)
            optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
            losses.append([])
            for step in range(4):
                optimiser.zero_grad()
                out, _ = model(spikes((8, 3, 7), 0.4, step))
                loss = out.pow(2).sum()
                loss.backward()
                optimiser.step()
                losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
