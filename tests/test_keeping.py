"""Columns wait for the backward in 8 or 16 bits: the same gradients to the bit, and only where it saves something."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import snntorch as snn
import torch
from helpers import fast_sigmoid, normal, spikes
from torch import Tensor, nn

import sparse_backend
from sparse_backend import EventTensor, functional
from sparse_backend.ops import keeping

INPUTS = 300  #: more than 8 bits tell apart, as the layers' 20 and 12 are not
NEVER = 1 << 40
NARROW = (torch.uint8, torch.int16)
SURROGATE = fast_sigmoid(10.0)


def leaky(x: Any, weights: list[Tensor], **options: Any) -> Tensor:
    """Two layers, a loss on all spikes and on the last membranes."""
    loss = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        x, mem = functional.linear_leaky(x, weight, beta=0.9, spike_grad=SURROGATE, b_th=0.4, **options)
        loss = loss + (mem**2).sum()
    return loss + (x.to_dense() * normal(x.shape, 5)).sum()


def lif(x: Any, weights: list[Tensor], **options: Any) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        x, v, _ = functional.linear_lif(
            x, weight, mem_gain=0.2, syn_decay=0.8, spike_grad=SURROGATE, b_th=0.4, **options
        )
        loss = loss + (v**2).sum()
    return loss + (x.to_dense() * normal(x.shape, 5)).sum()


NETS = {
    "leaky": leaky,
    "leaky to zero": lambda *args: leaky(*args, reset="zero"),
    "leaky at once": lambda *args: leaky(*args, reset="zero", reset_delay=False),
    "lif": lif,
}


def layers(inputs: int = INPUTS, scale: float = 0.4) -> list[Tensor]:
    return [normal(shape, 7 + k, scale=scale).requires_grad_() for k, shape in enumerate([(20, inputs), (12, 20)])]


def saved_by(fn: Any) -> tuple[Tensor, list[Tensor]]:
    """The result, and every tensor its graph saved."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return fn(), seen


def columns_in(tensors: list[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.dtype in dtypes and tensor.dim() == 1]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("learning_input", [False, True])
def test_gradients_are_the_same_to_the_bit(monkeypatch, net, learning_input):
    results = []
    for least in (NEVER, 1):
        monkeypatch.setattr(keeping, "LEAST", least)
        weights, x = layers(), spikes((11, 3, INPUTS), 0.1, seed=1).requires_grad_(learning_input)
        loss, saved = saved_by(lambda x=x, weights=weights: NETS[net](x, weights))
        assert len({tensor.dtype for tensor in columns_in(saved, *NARROW)}) == (2 if least == 1 else 0)
        leaves = [*weights, x] if learning_input else weights
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)])
        again = torch.autograd.grad(loss, leaves)  # what was kept serves every backward
        assert all(map(torch.equal, again, results[-1][1:]))
    assert all(map(torch.equal, *results))


def test_every_list_is_kept_once_and_narrow(monkeypatch):
    """The active entries of a layer are read by its own backward and by that of the layer above: one copy."""
    monkeypatch.setattr(keeping, "LEAST", 1)
    _, saved = saved_by(lambda: leaky(spikes((11, 3, INPUTS), 0.1, seed=1), layers()))
    assert len(storages(columns_in(saved, torch.int16))) == 2  # input: how many events a row has, and their columns
    of_neurons = columns_in(saved, torch.uint8)  # spikes of the first layer, active entries of the first and the second
    assert len(of_neurons) == 2 * 4 and len(storages(of_neurons)) == 2 * 3
    counts = [tensor for tensor in columns_in(saved, *NARROW) if tensor.shape[0] == 11 * 3]
    assert len(counts) == 5 and not columns_in(saved, torch.int32)


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [(255, torch.uint8), (256, torch.int16), ((1 << 15) - 1, torch.int16), (1 << 15, torch.int32)],
)
def test_rows_may_be_full(monkeypatch, inputs, dtype):
    """A row of 256 columns may have 256 events, which 8 bits do not count."""
    grads = []
    for least in (NEVER, 1):
        monkeypatch.setattr(keeping, "LEAST", least)
        x = torch.zeros(3, 2, inputs, dtype=torch.float64)
        x[1, 1], x[2, 0, ::7] = 1, 1
        weights = layers(inputs, scale=0.4 / inputs**0.5)
        loss, saved = saved_by(lambda x=x, weights=weights: leaky(x, weights))
        if least == 1:
            counts = [0, 0, 0, inputs, len(x[2, 0, ::7]), 0]
            pointers = [0, 0, 0, 0, *torch.tensor(counts[3:]).cumsum(0).tolist()]
            expected = counts if dtype is not torch.int32 else pointers
            assert dtype in [tensor.dtype for tensor in saved if tensor.tolist() == expected]
        grads.append(torch.autograd.grad(loss, weights)[0])
    assert torch.equal(*grads) and grads[0].count_nonzero()


def test_a_list_of_the_callers_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(keeping, "LEAST", 1)
    x = EventTensor.from_dense(spikes((11, 3, INPUTS), 0.1, seed=1))
    _, saved = saved_by(lambda: leaky(x, layers()))
    assert x.indices.untyped_storage().data_ptr() in storages(columns_in(saved, torch.int32))
    assert not columns_in(saved, torch.int16)


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)],
)
def test_the_last_column_that_fits(monkeypatch, inputs, dtype):
    grads = []
    for least in (NEVER, 1):
        monkeypatch.setattr(keeping, "LEAST", least)
        x, columns = torch.zeros(3, 2, inputs, dtype=torch.float64), [0, inputs - 2, inputs - 1]
        x[..., columns] = 1
        weights = layers(inputs)
        loss, saved = saved_by(lambda x=x, weights=weights: leaky(x, weights))
        kept = [tensor.dtype for tensor in columns_in(saved, torch.int32, *NARROW) if tensor.tolist() == 6 * columns]
        assert kept == [torch.int32 if least == NEVER else dtype]
        grads.append(torch.autograd.grad(loss, weights)[0])
    assert torch.equal(*grads) and grads[0][:, inputs - 1].count_nonzero()


def test_short_lists_are_left_alone():
    _, saved = saved_by(lambda: leaky(spikes((11, 3, INPUTS), 0.1, seed=1), layers()))
    assert not columns_in(saved, *NARROW)


@pytest.mark.parametrize("inputs", [INPUTS, (1 << 15) + 1])
def test_nothing_outlives_the_graph(monkeypatch, inputs):
    monkeypatch.setattr(keeping, "LEAST", 1)
    gc.collect()
    before = len(keeping._made)
    loss = leaky(spikes((11, 3, inputs), 0.1, seed=1), layers(inputs))
    loss.backward()
    del loss
    gc.collect()
    assert len(keeping._made) == before


def test_a_model_in_a_loop(monkeypatch):
    """Recorded and run as a sequence: what comes of the caller's dense input is kept narrow too, and reported so."""
    snn = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(INPUTS, 20), nn.Linear(20, 12)
            self.lif1 = snn.Leaky(beta=0.9, spike_grad=snn.surrogate.fast_sigmoid(slope=10))
            self.lif2 = snn.Leaky(beta=0.9, spike_grad=snn.surrogate.fast_sigmoid(slope=10))

        def forward(self, x: Tensor) -> Tensor:
            mem1, mem2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
            for step in x:
                spk1, mem1 = self.lif1(self.fc1(step), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                out.append(spk2)
            return torch.stack(out)

    results = []
    for least in (NEVER, 1):
        monkeypatch.setattr(keeping, "LEAST", least)
        torch.manual_seed(0)
        net = sparse_backend.enable(Net(), b_th=0.4)
        x = spikes((11, 3, INPUTS), 0.1, seed=1).float()
        out, saved = saved_by(lambda net=net, x=x: net(x).to_dense())
        (out * normal(out.shape, 3).float()).sum().backward()
        narrow = storages(columns_in(saved, torch.uint8))
        kept = sum(layer.kept_bytes for layer in sparse_backend.report(net).layers)
        results.append(([p.grad for p in net.parameters()], narrow, kept))
    (wide_grads, none, wide_kept), (grads, narrow, kept) = results
    assert not none and len(narrow) == 2 * 3  # spikes of the first layer, active entries of both: counts and columns
    assert all(map(torch.equal, grads, wide_grads))
    rows = 11 * 3
    of_output = int(out.sum()) + rows  # counted with its layer, saved by nobody: the loss reads its dense form
    first = 4 * 4  # bytes of what is not kept at all: that pointers begin at 0
    assert wide_kept - kept == 3 * (sum(narrow.values()) + of_output) + first


@pytest.mark.parametrize("b_th", [0.2, float("inf")])
@pytest.mark.parametrize("fuse_time", [True, False])
def test_nothing_absent_is_among_what_is_saved(fuse_time, b_th):
    """Who draws a graph asks every saved tensor for its size."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(20, 16), nn.Linear(16, 4)
            self.lif1, self.lif2 = (snn.Leaky(beta=0.9, spike_grad=SURROGATE) for _ in range(2))

        def forward(self, x):
            mem1, mem2, out = self.lif1.reset_mem(), self.lif2.reset_mem(), []
            for step in x:
                spk, mem1 = self.lif1(self.fc1(step), mem1)
                spk, mem2 = self.lif2(self.fc2(spk), mem2)
                out.append(spk)
            return torch.stack(out).sum() + mem2.sum()

    net = sparse_backend.enable(Net(), b_th=b_th, fuse_time=fuse_time)
    nodes, seen, saving = [net(spikes((5, 3, 20), 0.3, 1).float()).grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = getattr(node, "saved_tensors", ())
        saving += bool(saved)
        assert all(isinstance(tensor, Tensor) for tensor in saved), node.name()
        nodes.extend(following for following, _ in node.next_functions)
    assert saving > 3
