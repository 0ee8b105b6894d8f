"""The models of snnTorch's tutorials and their training loops, small and in float64, written from their description.

Every model comes with the loop, the loss and the optimiser its tutorial uses. Data are random.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from helpers import SpikeGrad, generator
from pairs import leaky
from snntorch import functional as SF
from snntorch import spikegen, utils
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, CLASSES = 7, 5, 4
SIDE = 16
Batch = tuple[Tensor, Tensor]


def wake(net: nn.Module, seed: int = 0) -> Any:
    """Weights large enough for every layer to spike, in float64."""
    random = generator(seed)
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=random, dtype=torch.float64))
                module.weight.mul_(2.0 / fan_in**0.5).add_(0.3 / fan_in**0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=random, dtype=torch.float64) * 0.1)
    return net


# Models whose forward holds the loop.


class StaticMLP(nn.Module):
    """Tutorial 5: a fully connected network fed the same image at every step."""

    def __init__(self, spike_grad: SpikeGrad, inputs: int = 20, hidden: int = 16, outputs: int = CLASSES) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.lif1 = leaky(spike_grad, 0.95)
        self.fc2 = nn.Linear(hidden, outputs)
        self.lif2 = leaky(spike_grad, 0.95)

    def at(self, x: Tensor, step: int) -> Tensor:
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for step in range(STEPS):
            cur1 = self.fc1(self.at(x, step))
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class RateCodedMLP(StaticMLP):
    """The same, fed a spike train: the image as firing rates."""

    def at(self, x: Tensor, step: int) -> Tensor:
        return x[step]


class ConvNet(nn.Module):
    """Tutorial 6: conv - pool - leaky, twice, and a fully connected readout; membranes are passed by hand."""

    def __init__(self, spike_grad: SpikeGrad) -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, 3, 5), leaky(spike_grad, 0.5)
        self.conv2, self.lif2 = nn.Conv2d(3, 4, 3), leaky(spike_grad, 0.5)
        self.fc1, self.lif3 = nn.Linear(16, CLASSES), leaky(spike_grad, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        spk3_rec, mem3_rec = [], []
        batch_size = x.shape[0]
        for _ in range(STEPS):
            cur1 = F.max_pool2d(self.conv1(x), 2)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = F.max_pool2d(self.conv2(spk1), 2)
            spk2, mem2 = self.lif2(cur2, mem2)
            cur3 = self.fc1(spk2.view(batch_size, -1))
            spk3, mem3 = self.lif3(cur3, mem3)
            spk3_rec.append(spk3)
            mem3_rec.append(mem3)
        return torch.stack(spk3_rec, dim=0), torch.stack(mem3_rec, dim=0)


class Regression(nn.Module):
    """Regression 1: decays and thresholds that learn, one per neuron; the last layer's membrane is the prediction."""

    def __init__(self, spike_grad: SpikeGrad, hidden: int = 12) -> None:
        super().__init__()
        random = generator(5)

        def drawn(count: int) -> Tensor:
            return torch.rand(count, generator=random, dtype=torch.float64)

        self.hidden, self.steps = hidden, 3 * STEPS
        self.fc_in = nn.Linear(1, hidden)
        self.lif_in = leaky(spike_grad, drawn(hidden), drawn(hidden), learn_beta=True, learn_threshold=True)
        self.fc_hidden = nn.Linear(hidden, hidden)
        self.lif_hidden = leaky(spike_grad, drawn(hidden), drawn(hidden), learn_beta=True, learn_threshold=True)
        self.fc_out = nn.Linear(hidden, 1)
        self.li_out = leaky(spike_grad, drawn(1), 1.0, learn_beta=True, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        mem_1 = self.lif_in.init_leaky()
        mem_2 = self.lif_hidden.init_leaky()
        mem_3 = self.li_out.init_leaky()
        mem_rec = []
        for step in range(self.steps):
            cur_in = self.fc_in(x[step, :, :])
            spk_in, mem_1 = self.lif_in(cur_in, mem_1)
            cur_hidden = self.fc_hidden(spk_in)
            spk_hidden, mem_2 = self.lif_hidden(cur_hidden, mem_2)
            cur_out = self.fc_out(spk_hidden)
            _, mem_3 = self.li_out(cur_out, mem_3)
            mem_rec.append(mem_3)
        return torch.stack(mem_rec)


# Models that keep their states, stepped by a loop outside.


def conv_sequential(spike_grad: SpikeGrad, channels: int = 1) -> nn.Sequential:
    """Tutorials 6 and 7: the convolutional network as a Sequential."""
    return nn.Sequential(
        nn.Conv2d(channels, 3, 5),
        nn.MaxPool2d(2),
        leaky(spike_grad, 0.5, init_hidden=True),
        nn.Conv2d(3, 4, 3),
        nn.MaxPool2d(2),
        leaky(spike_grad, 0.5, init_hidden=True),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
        leaky(spike_grad, 0.5, init_hidden=True, output=True),
    )


def event_sequential(spike_grad: SpikeGrad) -> nn.Sequential:
    """Tutorial 7 without convolutions: flattened frames of events."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(2 * 6 * 6, 16),
        leaky(spike_grad, 0.5, init_hidden=True),
        nn.Linear(16, CLASSES),
        leaky(spike_grad, 0.5, init_hidden=True, output=True),
    )


def population_sequential(spike_grad: SpikeGrad) -> nn.Sequential:
    """Population coding: five output neurons per class."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, 16),
        leaky(spike_grad, 0.9, init_hidden=True),
        nn.Linear(16, 5 * CLASSES),
        leaky(spike_grad, 0.9, init_hidden=True, output=True),
    )


def step_static(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass of tutorial 6: one image, several steps."""
    mem_rec, spk_rec = [], []
    utils.reset(net)
    for _ in range(STEPS):
        spk_out, mem_out = net(x)
        spk_rec.append(spk_out)
        mem_rec.append(mem_out)
    return torch.stack(spk_rec), torch.stack(mem_rec)


def step_events(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass of tutorial 7: one frame of events a step."""
    spk_rec, mem_rec = [], []
    utils.reset(net)
    for step in range(x.size(0)):
        spk_out, mem_out = net(x[step])
        spk_rec.append(spk_out)
        mem_rec.append(mem_out)
    return torch.stack(spk_rec), torch.stack(mem_rec)


# Data.


def labels(seed: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, (BATCH,), generator=generator(seed + 1000))


def image(seed: int, *shape: int) -> Tensor:
    """An image in [0, 1], most of it dark."""
    x = torch.rand(BATCH, *shape, generator=generator(seed), dtype=torch.float64)
    return torch.where(x > 0.6, x, torch.zeros(()).double())


def images(seed: int) -> Batch:
    return image(seed, 20), labels(seed)


def rate_coded(seed: int) -> Batch:
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    x = spikegen.rate(image(seed, 20), num_steps=STEPS).double()
    torch.set_rng_state(before)
    return x, labels(seed)


def pictures(seed: int) -> Batch:
    return image(seed, 1, SIDE, SIDE), labels(seed)


def camera_events(side: int) -> Callable[[int], Batch]:
    """Frames of two polarities, 8 % of them set; counts above 1 occur, as after binning."""

    def draw(seed: int) -> Batch:
        random = generator(seed)
        on = torch.rand(STEPS, BATCH, 2, side, side, generator=random) < 0.08
        counts = torch.randint(1, 3, on.shape, generator=random)
        return (on * counts).double(), labels(seed)

    return draw


def curve(seed: int) -> Batch:
    """A curve over time and what it has to become."""
    time = torch.linspace(0, 1, 3 * STEPS, dtype=torch.float64).view(-1, 1, 1)
    phase = torch.rand(1, 2, 1, generator=generator(seed), dtype=torch.float64)
    return 2 * time + phase, torch.sin(6 * (time + phase))


# Training.


def own_loop(net: nn.Module, x: Tensor) -> Any:
    return net(x)


def summed_over_steps(out: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Tutorial 5: cross entropy of the membranes, step by step."""
    loss = nn.CrossEntropyLoss()
    total = torch.zeros(1, dtype=torch.float64)
    for step in range(STEPS):
        total = total + loss(out[1][step], targets)
    return total.sum()


def on_spikes(loss: Any) -> Callable[..., Tensor]:
    return lambda out, targets: loss(out[0], targets)


def mse(out: Tensor, targets: Tensor) -> Tensor:
    return nn.MSELoss()(out, targets)


@dataclass(frozen=True)
class Tutorial:
    build: Callable[[SpikeGrad], nn.Module]
    data: Callable[[int], Batch]
    loss: Callable[[Any, Tensor], Tensor]
    forward: Callable[[Any, Tensor], Any] = own_loop  #: a loop outside where it is another
    learning_rate: float = 1e-2

    def recipe(self, spike_grad: SpikeGrad) -> Any:
        return wake(self.build(spike_grad))


TUTORIALS = {
    "5 static": Tutorial(StaticMLP, images, summed_over_steps, learning_rate=5e-4),
    "5 rate coded": Tutorial(RateCodedMLP, rate_coded, summed_over_steps, learning_rate=5e-4),
    "6 class": Tutorial(ConvNet, pictures, on_spikes(SF.ce_rate_loss())),
    "6 sequential": Tutorial(conv_sequential, pictures, on_spikes(SF.ce_rate_loss()), step_static),
    "7 conv": Tutorial(
        lambda spike_grad: conv_sequential(spike_grad, 2),
        camera_events(SIDE),
        on_spikes(SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2)),
        step_events,
        2e-2,
    ),
    "7 fully connected": Tutorial(
        event_sequential,
        camera_events(6),
        on_spikes(SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2)),
        step_events,
        2e-2,
    ),
    "regression 1": Tutorial(Regression, curve, mse),
    "population": Tutorial(
        population_sequential,
        pictures,
        on_spikes(SF.ce_count_loss(population_code=True, num_classes=CLASSES)),
        step_static,
    ),
}


@dataclass
class History:
    losses: list[Tensor]
    outputs: list[Any]


def train(
    net: nn.Module,
    tutorial: Tutorial,
    batches: int = 4,
    around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda net: nullcontext(),
) -> History:
    """Adam over `batches` batches; the forward runs within `around(net)`."""
    optimizer = torch.optim.Adam(net.parameters(), lr=tutorial.learning_rate, betas=(0.9, 0.999))
    history = History([], [])
    for number in range(batches):
        x, targets = tutorial.data(number)
        net.train()
        with around(net):
            out = tutorial.forward(net, x)
        loss = tutorial.loss(out, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.losses.append(loss.detach().clone())
        history.outputs.append(out)
    return history
