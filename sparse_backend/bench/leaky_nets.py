"""Networks of snnTorch's `Leaky`, whoever makes the neurons: snnTorch itself, or `for_rebuilt.py` in its place."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_backend import EventTensor, dynamics, functional
from sparse_backend.bench.cases import BTh, Case
from sparse_backend.bench.models import Output, Wrap
from sparse_backend.deferred import DeferredCurrent, WeightHub
from sparse_backend.execute import run_leaky
from sparse_backend.surrogate import SpikeGrad, derivative

BETA = math.exp(-1 / 10)  # a time constant of 10 steps
SLOPE = 100  # of fast_sigmoid

#: (count, surrogate) -> as many neurons of decay `BETA`, the last a readout without reset
MakeNeurons = Callable[[int, Any], nn.ModuleList]


class LeakyNet(nn.Module):
    """Hidden layers of `Leaky` behind `Linear`, a readout without reset, a loop over the steps."""

    return_hidden = False

    def __init__(self, sizes: Sequence[int], spike_grad: Any, make: MakeNeurons) -> None:
        super().__init__()
        self.linears = nn.ModuleList(initial(nn.Linear(m, n)) for m, n in itertools.pairwise(sizes))
        self.neurons = make(len(sizes) - 1, spike_grad)

    def forward(self, x: Tensor) -> Output:  # [T, B, inputs]
        mems = [neuron.reset_mem() for neuron in self.neurons]
        mem_rec: list[Tensor] = []
        spk_rec: list[list[Tensor]] = [[] for _ in self.neurons]
        last, every = len(spk_rec) - 1, self.return_hidden
        for step in range(x.shape[0]):
            spk = x[step]
            for layer, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                spk, mems[layer] = neuron(linear(spk), mems[layer])
                if every or layer == last:
                    spk_rec[layer].append(spk)
            mem_rec.append(mems[-1])
            if self.enough(spk):
                break
        return Output(torch.stack(spk_rec[-1]), torch.stack(mem_rec), [torch.stack(rec) for rec in spk_rec[:-1] if rec])

    def enough(self, spk: Tensor) -> bool:
        return False

    @property
    def inner(self) -> list[Any]:
        """What makes the hidden layers' currents."""
        return list(self.linears)[:-1]


class ForcedNet(LeakyNet):
    """Looks at its spikes at every step, as one that stops early does."""

    def enough(self, spk: Tensor) -> bool:
        return spk.sum().item() > 1e9


class StaticNet(LeakyNet):
    """Is fed one image at every step: which inputs have an event at all."""

    def forward(self, x: Tensor) -> Output:  # [T, B, inputs]
        image = x.sum(0)
        return super().forward(image.expand(x.shape))


class ImageNet(nn.Module):
    """Three layers of `Leaky` over images. A subclass says what makes the current of each from what comes before it."""

    return_hidden = False

    def currents(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Output:  # [T, B, 1, 28, 28]
        (lif1, lif2, lif3), (current1, current2, current3) = self.neurons, self.currents()
        mem1, mem2, mem3 = lif1.reset_mem(), lif2.reset_mem(), lif3.reset_mem()
        rec1, rec2, spk_rec, mem_rec = [], [], [], []
        for step in range(x.shape[0]):
            spk1, mem1 = lif1(current1(x[step]), mem1)
            spk2, mem2 = lif2(current2(spk1), mem2)
            spk3, mem3 = lif3(current3(spk2), mem3)
            if self.return_hidden:
                rec1.append(spk1)
                rec2.append(spk2)
            spk_rec.append(spk3)
            mem_rec.append(mem3)
        hidden = [torch.stack(rec1), torch.stack(rec2)] if self.return_hidden else ()
        return Output(torch.stack(spk_rec), torch.stack(mem_rec), hidden)


class ConvNet(ImageNet):
    """Two convolutions with pooling and one linear layer, `Leaky` behind each."""

    def __init__(self, classes: int, spike_grad: Any, make: MakeNeurons) -> None:
        super().__init__()
        self.conv1, self.conv2 = initial(nn.Conv2d(1, 12, 5)), initial(nn.Conv2d(12, 64, 5))
        self.pool = nn.MaxPool2d(2)
        self.fc = initial(nn.Linear(64 * 4 * 4, classes))
        self.neurons = make(3, spike_grad)

    def currents(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (
            lambda x: self.pool(self.conv1(x)),
            lambda spk: self.pool(self.conv2(spk)),
            lambda spk: self.fc(spk.flatten(1)),
        )

    @property
    def inner(self) -> list[Any]:
        return [self.conv1, self.conv2]


class NormedConvNet(ImageNet):
    """Two convolutions with a batch norm each, `Leaky`, and average pooling of its spikes; a linear layer."""

    def __init__(self, classes: int, spike_grad: Any, make: MakeNeurons) -> None:
        super().__init__()
        self.conv1, self.conv2 = (initial(nn.Conv2d(m, n, 3, padding=1, bias=False)) for m, n in ((1, 16), (16, 32)))
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(32)
        self.pool = nn.AvgPool2d(2)
        self.fc = initial(nn.Linear(32 * 7 * 7, classes))
        self.neurons = make(3, spike_grad)

    def currents(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (
            lambda x: self.norm1(self.conv1(x)),
            lambda spk: self.norm2(self.conv2(self.pool(spk))),
            lambda spk: self.fc(self.pool(spk).flatten(1)),
        )

    @property
    def inner(self) -> list[Any]:
        return [self.norm1, self.norm2]


def initial(layer: Any) -> Any:
    """The layer with other random weights, and biases of 0: these alone would drive some neurons all the time."""
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def nets(make: MakeNeurons, surrogates: dict[str, tuple[str, Callable[[], Any]]]) -> dict[str, Callable[[Case], Any]]:
    """A framework's `NETS`."""

    def sized(net: type[LeakyNet]) -> Callable[[Case], LeakyNet]:
        return lambda case: net((case.inputs, *case.hidden, case.classes), surrogates[case.surrogate][1](), make)

    return {
        "feedforward": sized(LeakyNet),
        "forced": sized(ForcedNet),
        "static": sized(StaticNet),
        "normed conv": lambda case: NormedConvNet(case.classes, surrogates[case.surrogate][1](), make),
        "conv": lambda case: ConvNet(case.classes, surrogates[case.surrogate][1](), make),
    }


def sequence_forward(net: LeakyNet, x: Tensor | EventTensor, b_th: BTh) -> Output:
    """The same network and weights through `functional`, layer by layer. x: [T, B, inputs]."""
    result = functional.LeakySequence(x, x)
    hidden = []
    for layer, (linear, neuron) in enumerate(zip(net.linears, net.neurons, strict=True)):
        last = layer == len(net.linears) - 1
        result = functional.linear_leaky(
            result.spikes,
            linear.weight,
            linear.bias,
            beta=neuron.beta,
            threshold=neuron.threshold,
            spike_grad=neuron.spike_grad,
            b_th=b_th,
            reset=neuron.reset_mechanism,
            return_mem=last,
        )
        if net.return_hidden and not last:
            hidden.append(result.spikes)
    return Output(*result, hidden)


def sparse_forward(net: LeakyNet, x: EventTensor, b_th: float) -> Output:
    """The same where every layer is known to be sparse: nothing waits to see whether it is. x: [T, B, inputs]."""
    spikes: Any = x
    hidden = []
    for linear, neuron in zip(net.linears, net.neurons, strict=True):
        last = linear is net.linears[-1]
        current = DeferredCurrent(spikes, WeightHub(linear.weight, linear.bias, None, 0))
        shape = x.shape[0], x.shape[1], linear.out_features
        result = run_leaky(current, shape, leaky_entry(neuron), None, neuron.spike_grad, b_th, keep_mem=last)
        spikes = result.spikes
        if net.return_hidden and not last:
            hidden.append(spikes)
    assert result.mem_seq is not None
    return Output(spikes, result.mem_seq, hidden)


def leaky_entry(neuron: Any) -> dynamics.Leaky:
    """The neuron as `execute.run_leaky` takes it."""
    return dynamics.Leaky(neuron.beta, neuron.threshold, dynamics.RESETS[neuron.reset_mechanism], True, None)


def given(case: Case) -> Any:
    return nullcontext()


def surrogate_of(net: Any) -> SpikeGrad:
    return net.neurons[0].spike_grad


def currents(net: Any) -> list[list[nn.Parameter]]:
    return [[layer.weight, layer.bias] for layer in net.inner]


@contextmanager
def intercepted(net: Any, wrap: Wrap) -> Iterator[None]:
    own = [neuron.spike_grad for neuron in net.neurons]
    for layer, neuron in enumerate(net.neurons):
        neuron.spike_grad = wrap(layer, own[layer])
    try:
        yield
    finally:
        for neuron, spike_grad in zip(net.neurons, own, strict=True):
            neuron.spike_grad = spike_grad


class _KeepDtype(torch.autograd.Function):
    """H(x) in x's dtype with the derivative of `spike_grad`: snnTorch 1.0's own return float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spike_grad: SpikeGrad) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spike_grad = spike_grad
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * derivative(ctx.spike_grad, x), None


def _keep_dtype(spike_grad: SpikeGrad) -> SpikeGrad:
    return lambda x: _KeepDtype.apply(x, spike_grad)


def exact(net: Any) -> Any:
    net = copy.deepcopy(net).double()
    for neuron in net.neurons:
        neuron.spike_grad = _keep_dtype(neuron.spike_grad)
    return net


def oracle(net: Any) -> Callable[[Any], Output]:
    return net
