"""Shapes of code people write around snnTorch's layers: each equals stock snnTorch under time fusion, in float64.

A test here is a loop. What is compared is everything: outputs, gradients of parameters and inputs, hidden states and
running statistics, the state of the random generator, twice in a row.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fusion_loops import (
    BATCH,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    STEPS,
    Loop,
    Net,
    check,
    check_with,
    frames,
    net_of,
    recorded,
    right_or_clear_error,
    same_values,
    stock_and_enabled,
    wake,
)
from helpers import assert_close, normal, spikes
from pairs import (
    Way,
    assert_equal_runs,
    assert_no_placeholder,
    assert_same,
    enabled,
    leaky,
    longest,
    outcome,
    stock,
    weighted,
)
from torch import nn
from torch.nn import functional as F

import sparse_backend
from sparse_backend import EventTensor

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")


pytestmark = pytest.mark.usefixtures("neurons")


# What becomes of the recorded steps.


def test_stack_of_steps(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        return torch.stack(spk_rec), torch.stack(mem_rec, dim=0)

    check(way, loop, fuses=STEPS)


def test_stack_along_other_dimensions(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        return (
            torch.stack(spk_rec, dim=1),
            torch.stack(mem_rec, -1),
            torch.stack(spk_rec[1:4]),
            torch.stack(spk_rec[::-1]),
        )

    check(way, loop, fuses=STEPS)


def test_cat_of_steps(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        return torch.cat(spk_rec), torch.cat([m.unsqueeze(0) for m in mem_rec], dim=0), torch.cat(spk_rec, dim=-1)

    check(way, loop, fuses=STEPS)


def test_python_sum_of_a_list(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        return sum(spk_rec), sum(mem_rec) / len(mem_rec), sum(spk_rec[2:5], torch.ones(BATCH, OUTPUTS).double())

    check(way, loop, fuses=STEPS)


def test_python_max_over_a_list(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        busiest = max(spk_rec, key=lambda spk: spk.sum().item())
        return functools.reduce(torch.maximum, mem_rec), max(m.sum() for m in mem_rec), busiest

    check(way, loop, fuses=STEPS)


def test_last_of_a_list(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        return spk_rec[-1], mem_rec[-1], mem_rec[0]

    check(way, loop, fuses=STEPS)


def test_running_sums(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, total, count, scaled = net.mems(), 0, torch.zeros(BATCH, OUTPUTS).double(), None
        for step in x:
            spk, mems = net.step(step, mems)
            total += spk
            count = count + spk
            scaled = mems[-1] if scaled is None else 0.5 * scaled + mems[-1]
        return total, count, scaled

    check(way, loop, fuses=STEPS)


def test_running_maximum(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, best = net.mems(), None
        for step in x:
            _, mems = net.step(step, mems)
            best = mems[-1] if best is None else torch.max(best, mems[-1])
        return best

    check(way, loop)


class Result(typing.NamedTuple):
    spikes: Any
    mem: Any


@dataclass
class Record:
    spikes: Any
    mem: Any


def test_several_outputs(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, mems = recorded(net, x)
        return {
            "spikes": spk_rec,
            "rest": (torch.stack(mem_rec), [mems[0], None]),
            "one": Result(spk_rec[2], mems[1]),
            "T": 7,
        }

    check(way, loop, fuses=STEPS)


def test_outputs_in_an_object_of_the_users(way: Way) -> None:
    theirs, ours = stock_and_enabled(way, lambda net, x: Record(*recorded(net, x)[:2]))
    results = []
    for net, context in (theirs, ours):
        with context:
            record = net(frames())
            weighted([record.spikes, record.mem]).backward()
            results.append([*record.spikes, *record.mem, *(p.grad for p in net.parameters())])
    for a, b in zip(results[1], results[0], strict=True):
        assert_close(a.detach() + 0, b)


def test_one_output_twice(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, _, mems = recorded(net, x)
        assert spk_rec[1] is spk_rec[1]
        return spk_rec[1], spk_rec[1], mems[0], mems[0] * 2

    check(way, loop, fuses=STEPS)


def test_steps_kept_outside_the_forward(way: Way) -> None:
    """What a forward leaves in a list or on the module works like any tensor afterwards."""

    def loop(net: Net, x: Any) -> Any:
        mems = net.mems()
        net.kept.clear()
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mems[0])
            spk2, mem2 = net.lif2(net.fc2(spk1), mems[1])
            mems = (mem1, mem2, mems[2])
            net.kept += [spk1, mem1, spk1 * 2]
        net.last = spk1
        return spk2

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, loop))
        net.kept = []
        return net

    def go(net: Any) -> Any:
        out = net(frames())
        return out, sum(spk.sum() for spk in net.kept), (net.last * 2).mean(0), [k + 0 for k in net.kept[2:5]]

    net = assert_equal_runs(recipe, go, way, runs=2)
    with way.policy(), torch.no_grad():
        net(frames())
        values = [k + 0 for k in net.kept]
        buffer = io.BytesIO()
        torch.save(net.kept, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(net.kept), pickle.loads(pickle.dumps(net.kept)), torch.load(buffer)]
    for again in copies:
        for a, b in zip(again, values, strict=True):
            assert_close(a + 0, b)


def test_steps_written_to_after_the_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, mems = recorded(net, x)
        spk_rec[1] *= 2
        spk_rec[2][0] = 0.5
        mem_rec[3][mem_rec[3] < 0.2] = 0
        mem_rec[-1].mul_(0.5)
        assert torch.equal(mems[-1], mem_rec[-1])
        mems[0].clamp_(max=0.4)
        return torch.stack(spk_rec), torch.stack(mem_rec), mems[0]

    check(way, loop)


def test_mid_loop_losses(way: Way) -> None:
    """A loss per step, summed inside the forward."""
    targets = normal((BATCH, OUTPUTS), 3)
    labels = torch.arange(BATCH) % OUTPUTS

    def loop(net: Net, x: Any) -> Any:
        mems, loss, other = net.mems(), torch.zeros(1).double(), 0
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            loss += F.mse_loss(mems[-1], targets)
            other = other + nn.CrossEntropyLoss()(spk, labels) + 0.01 * mems[0].abs().mean()
        return loss, other

    check(way, loop)


# How layers are connected.


def test_branches_that_meet(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            left = net.fc2(spk1)
            right = net.side(spk1)
            spk2, mem2 = net.lif2(left + right, mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem2

    check_with_side(way, loop, fuses=STEPS)


def test_branches_of_neurons_that_meet(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        side = net.side_lif.reset_mem()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            spk4, side = net.side_lif(net.side(spk1), side)
            spk3, mem3 = net.lif3(net.fc3(spk2 + spk4), mem3)
            out.append(torch.cat([spk3, spk2, spk4], dim=1))
        return torch.stack(out), side

    check_with_side(way, loop, fuses=STEPS)


def test_branches_concatenated(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(net.fc2(torch.cat([spk1[:, :5], spk1[:, 5:]], dim=1)), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem2

    check_with_side(way, loop)


def check_with_side(way: Way, loop: Loop, fuses: int | None = None) -> None:
    def recipe(spike_grad: Any) -> Any:
        net = Net(spike_grad, loop)
        net.side, net.side_lif = nn.Linear(HIDDEN, HIDDEN), leaky(spike_grad, 0.7, 0.8)
        return wake(net)

    x = frames()
    net = assert_equal_runs(recipe, lambda net: net(x), way, runs=2)
    if fuses is not None:
        assert longest(net) >= fuses


def test_residual_adds(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            current = net.fc1(x[t])
            spk1, mem1 = net.lif1(current, mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1) + current, mem2)
            spk3, mem3 = net.lif3(net.fc3(spk1 + spk2), mem3)
            out.append(spk3 + spk1[:, :OUTPUTS])
        return torch.stack(out), mem1

    check(way, loop)


def test_a_layer_used_at_two_places(way: Way) -> None:
    """One Linear and one neuron, each twice a step, every use with its own membrane."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        other = torch.zeros(BATCH, HIDDEN).double()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            spk4, other = net.lif2(net.fc2(spk2), other)
            spk3, mem3 = net.lif3(net.fc3(spk4), mem3)
            out.append(spk3)
        return torch.stack(out), mem2, other

    check(way, loop)


def test_tied_weights(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(F.linear(spk1, net.fc2.weight.t(), net.fc2.bias) + net.side(spk1), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem2

    def recipe(spike_grad: Any) -> Any:
        net = Net(spike_grad, loop)
        net.side = nn.Linear(HIDDEN, HIDDEN)
        wake(net)
        net.side.weight = net.fc2.weight
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


def test_two_neurons_share_a_learnable_decay(way: Way) -> None:
    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, lambda net, x: recorded(net, x)[:2], learn_beta=True, learn_threshold=True))
        net.lif2.beta, net.lif3.threshold = net.lif1.beta, net.lif1.threshold
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


@pytest.mark.parametrize("source", ["spikes of the last layer", "membrane of the last layer", "recurrent weights"])
def test_feedback_from_a_later_layer(way: Way, source: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        back = torch.zeros(BATCH, HIDDEN).double()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]) + back, mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            if source == "spikes of the last layer":
                back = spk2 * 0.5
            elif source == "membrane of the last layer":
                back = 0.1 * mem3.sum(1, keepdim=True)
            else:
                back = net.fc2(spk2)
            out.append(spk3)
        return torch.stack(out), mem1

    check(way, loop)


def test_lateral_weights(way: Way) -> None:
    """Parameters used without a module."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out, spk2 = [], torch.zeros(BATCH, HIDDEN).double()
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(torch.mm(spk1, net.lateral) - spk2 @ net.lateral * 0.2 + net.bias, mem2)
            spk3, mem3 = net.lif3(F.linear(torch.matmul(spk2, net.lateral.t()), net.fc3.weight), mem3)
            out.append(spk3)
        return torch.stack(out), mem2

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, loop))
        net.lateral, net.bias = nn.Parameter(normal((HIDDEN, HIDDEN), 7, scale=0.5)), nn.Parameter(normal((HIDDEN,), 8))
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


def test_feedback_within_a_step(way: Way) -> None:
    """Two rounds through the layers at every step of the input."""

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            for _ in range(2):
                spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    check(way, loop, fuses=STEPS)


def test_layers_at_different_rates(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            if t % 2 == 0:
                spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem1, mem2

    check(way, loop)


def test_layers_one_after_the_other(way: Way) -> None:
    """The user's own layer-by-layer order: every layer over all steps, then the next."""

    def loop(net: Net, x: Any) -> Any:
        values = [x[t] for t in range(len(x))]
        for fc, lif, mem in zip((net.fc1, net.fc2, net.fc3), (net.lif1, net.lif2, net.lif3), net.mems(), strict=True):
            following = []
            for value in values:
                spk, mem = lif(fc(value), mem)
                following.append(spk)
            values = following
        return torch.stack(values), mem

    check(way, loop, fuses=STEPS)


def test_linear_over_stacked_spikes(way: Way) -> None:
    """A readout applied to all steps at once, inside the forward."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem3 = net.lif1.reset_mem(), net.lif3.reset_mem()
        spk_rec, out = [], []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk_rec.append(spk1)
        currents = net.fc3(torch.stack(spk_rec))
        for current in currents:
            spk3, mem3 = net.lif3(current, mem3)
            out.append(spk3)
        return torch.stack(out), currents, mem3

    check(way, loop, fuses=STEPS)


# What is fed.


def test_static_input(way: Way) -> None:
    image = normal((BATCH, INPUTS), 3, scale=0.7)

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for _ in range(STEPS):
            spk, mems = net.step(x, mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    check(way, loop, image, fuses=STEPS)
    check(way, loop, image.requires_grad_(), fuses=STEPS)


def test_static_current(way: Way) -> None:
    """The first Linear taken out of the loop by hand."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, _ = net.mems()
        current, out = net.fc1(x), []
        for _ in range(STEPS):
            spk1, mem1 = net.lif1(current, mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            out.append(spk2)
        return torch.stack(out), mem1, mem2

    check(way, loop, frames()[0], fuses=STEPS)


def test_input_that_learns(way: Way) -> None:
    x = normal((STEPS, BATCH, INPUTS), 4).requires_grad_()
    check(way, lambda net, x: recorded(net, x)[:2], x, fuses=STEPS)


def test_input_made_inside_the_forward(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(STEPS):
            frame = torch.relu(x * math.sin(t + 1)) + 0.1
            spk, mems = net.step(frame, mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    check(way, loop, normal((BATCH, INPUTS), 5), fuses=STEPS)


@pytest.mark.parametrize("cut", ["iterated", "unbound", "batch first", "flattened pictures", "strided", "backwards"])
def test_slices_of_one_tensor(way: Way, cut: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        if cut == "unbound":
            steps = x.unbind(0)
        elif cut == "batch first":
            steps = [x.transpose(0, 1).contiguous()[:, t] for t in range(len(x))]
        elif cut == "flattened pictures":
            steps = [x.view(STEPS, BATCH, 3, 4)[t].flatten(1) for t in range(len(x))]
        elif cut == "strided":
            steps = list(x[::2])
        elif cut == "backwards":
            steps = [x[t] for t in reversed(range(len(x)))]
        else:
            steps = x
        for step in steps:
            spk, mems = net.step(step, mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    check(way, loop, fuses=2)


def test_events_indexed_by_the_loop(way: Way) -> None:
    x = frames()
    theirs, edge = stock(net_of(lambda net, x: recorded(net, x)[:2]), way.b_th)
    expected = outcome(theirs, lambda net: net(x))
    assert edge.is_clear()
    with way.policy():
        ours = enabled(net_of(lambda net, x: recorded(net, x)[:2]), way)
        for _ in range(2):
            assert_same(outcome(ours, lambda net: net(EventTensor.from_dense(x))), expected)
    assert longest(ours) == STEPS


def test_input_buffer_refilled_by_copy(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out, buffer = net.mems(), [], torch.empty(BATCH, INPUTS).double()
        for t in range(len(x)):
            buffer.copy_(x[t])
            spk, mems = net.step(buffer, mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    same_values(way, loop)  # stock has no gradients through a refilled buffer


def test_input_buffer_refilled_by_numpy(way: Way) -> None:
    """A camera's buffer: written to without torch knowing."""

    def loop(net: Net, x: Any) -> Any:
        memory = np.zeros((BATCH, INPUTS))
        mems, out, buffer = net.mems(), [], torch.from_numpy(memory)
        for t in range(len(x)):
            memory[:] = x[t].numpy()
            spk, mems = net.step(buffer, mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    same_values(way, loop)


def test_input_ring_buffer(way: Way) -> None:
    """A buffer of two frames written in turn: right, or one clear error, never the wrong frames."""

    def loop(net: Net, x: Any) -> Any:
        mems, out, ring = net.mems(), [], torch.zeros(2, BATCH, INPUTS).double()
        for t in range(len(x)):
            ring[t % 2] = x[t]
            spk, mems = net.step(ring[t % 2], mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    right_or_clear_error(way, loop)


def test_input_ring_buffer_written_by_numpy(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        memory = np.zeros((2, BATCH, INPUTS))
        mems, out, ring = net.mems(), [], torch.from_numpy(memory)
        for t in range(len(x)):
            memory[t % 2] = x[t].numpy()
            spk, mems = net.step(ring[t % 2], mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    right_or_clear_error(way, loop)


def test_delay_line(way: Way) -> None:
    """The last three frames kept in one tensor made anew at every step."""

    def loop(net: Net, x: Any) -> Any:
        mems, out, line = net.mems(), [], torch.zeros(3, BATCH, INPUTS).double()
        for t in range(len(x)):
            line = torch.roll(line, 1, 0)
            line[0] = x[t]
            spk, mems = net.step(line[2], mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    check(way, loop)


@pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (2, 3, INPUTS)], ids=["one sample", "batch of 1", "3-d"])
def test_other_ranks(way: Way, shape: tuple[int, ...]) -> None:
    check(way, lambda net, x: recorded(net, x)[:2], spikes((STEPS, *shape), 0.4, 3))


def test_variable_lengths_and_batches(way: Way) -> None:
    theirs, edge = stock(net_of(lambda net, x: recorded(net, x)), way.b_th)
    with way.policy():
        ours = enabled(net_of(lambda net, x: recorded(net, x)), way)
        for seed, (steps, batch) in enumerate([(5, 4), (9, 4), (6, 2), (6, 7), (2, 1), (1, 4)]):
            x = frames(seed, steps, batch)
            expected = outcome(theirs, lambda net, x=x: net(x))
            assert_same(outcome(ours, lambda net, x=x: net(x)), expected)
            assert longest(ours) == steps
    assert edge.is_clear()


# Hidden states.


def test_states_returned_and_fed_back(way: Way) -> None:
    """A long recording in chunks: states go out to the caller and come back, with and without their history."""

    def loop(net: Net, x: Any, mems: Any = None) -> Any:
        mems, out = mems or net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems

    for detach in (False, True):

        def go(net: Any, detach: bool = detach) -> Any:
            mems, chunks = None, []
            for seed in range(3):
                out, mems = net(frames(seed), mems)
                assert_no_placeholder([out, mems])
                chunks.append(out)
                if detach:
                    mems = tuple(mem.detach() for mem in mems)
            return chunks, mems

        net = assert_equal_runs(net_of(loop), go, way, runs=2)
        assert longest(net) == STEPS


def test_states_kept_by_the_layers_between_calls(way: Way) -> None:
    """init_hidden: a second call goes on where the first one stopped, after `detach_hidden`."""

    def loop(net: Net, x: Any) -> Any:
        out = []
        for t in range(len(x)):
            spk, mem = net.lif3(net.fc3(net.lif2(net.fc2(net.lif1(net.fc1(x[t]))))))
            out.append(spk)
        return torch.stack(out), mem

    def go(net: Any) -> Any:
        utils.reset(net)
        first = net(frames(1))
        snn.Leaky.detach_hidden()
        return first, net(frames(2))

    net = assert_equal_runs(net_of(loop, init_hidden=True), go, way, runs=2)
    assert longest(net) == STEPS


def test_learnable_initial_state(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = (net.start.expand(BATCH, HIDDEN), net.start.expand(BATCH, HIDDEN) * 0.5, net.lif3.reset_mem()), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, loop))
        net.start = nn.Parameter(normal((HIDDEN,), 9, scale=0.3))
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


@pytest.mark.parametrize("how", ["detach", "detach_", "leaky detach"])
def test_truncated_every_three_steps(way: Way, how: str) -> None:
    """TBPTT within the forward: the loss is propagated back inside the loop."""

    def loop(net: Net, x: Any) -> Any:
        mems, loss, losses = net.mems(), torch.zeros(()).double(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            loss = loss + weighted([spk, mems[-1]])
            if t % 3 == 2:
                loss.backward()
                losses.append(loss.detach())
                loss = torch.zeros(()).double()
                if how == "detach":
                    mems = tuple(mem.detach() for mem in mems)
                elif how == "detach_":
                    for mem in mems:
                        mem.detach_()
                else:
                    snn.Leaky.detach(*mems)
        return loss, losses

    check(way, loop)


def test_detached_without_a_loss(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            if t == 4:
                mems = (mems[0].detach(), mems[1], mems[2].detach())
            spk, mems = net.step(x[t], mems)
            out.append(spk if t % 2 else spk.detach())
        return torch.stack(out), mems[0]

    check(way, loop, fuses=3)


def test_optimiser_step_inside_the_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        mems, losses = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], tuple(mem.detach() for mem in mems))
            loss = weighted([spk, mems[-1]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    check(way, loop)


def test_mem_read_in_mid_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            assert net.lif1.mem is mems[0]
            out.append(spk + net.lif1.mem.sum() * net.lif2.mem.mean())
        return torch.stack(out), net.lif3.mem

    check(way, loop)


def test_mem_written_in_mid_loop(way: Way) -> None:
    """Layers that keep their own state; the user sets it between steps."""

    def loop(net: Net, x: Any) -> Any:
        for lif in (net.lif1, net.lif2, net.lif3):
            lif.reset_mem()
        out = []
        for t in range(len(x)):
            spk1, _ = net.lif1(net.fc1(x[t]))
            spk2, _ = net.lif2(net.fc2(spk1))
            spk3, _ = net.lif3(net.fc3(spk2))
            if t == 2:
                net.lif1.mem = net.lif1.mem * 0.5
            if t == 3:
                net.lif2.reset_mem()
            if t == 4:
                net.lif3.mem = torch.full((BATCH, OUTPUTS), 0.2).double()
            out.append(spk3)
        return torch.stack(out)

    check(way, loop)


def test_reset_in_mid_loop(way: Way) -> None:
    """Several samples one after the other in one forward."""

    def loop(net: Net, x: Any) -> Any:
        out = []
        for t in range(len(x)):
            if t % 3 == 0:
                utils.reset(net)
            spk, mem = net.lif3(net.fc3(net.lif2(net.fc2(net.lif1(net.fc1(x[t]))))))
            out += [spk, mem]
        return out

    check(way, loop, init_hidden=True)


def test_reset_at_the_end_of_the_forward(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, _, mems = recorded(net, x)
        net.lif1.reset_mem()
        net.lif2.mem = torch.full((BATCH, HIDDEN), 0.25).double()
        net.lif3.mem = mems[-1] * 0.5
        return torch.stack(spk_rec), mems

    check(way, loop)


def test_mem_masked_in_place(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            mem1[mem1 < 0.1] = 0
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            mem2[:, :2] = 0.25
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            if t % 2:
                mem3.clamp_(max=0.5)
            assert torch.equal(net.lif1.mem, mem1)
            out.append(spk3)
        return torch.stack(out), mem1, mem2, mem3

    check(way, loop)


def test_mem_changed_through_the_layer_in_place(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        for lif in (net.lif1, net.lif2, net.lif3):
            lif.reset_mem()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]))
            mem1 *= 0.5  # the layer's own state
            spk2, _ = net.lif2(net.fc2(spk1))
            net.lif2.mem.mul_(0.9)
            spk3, mem3 = net.lif3(net.fc3(spk2))
            out.append(spk3)
        return torch.stack(out), mem1, mem3

    check(way, loop)


def test_spikes_masked_in_place(way: Way) -> None:
    mask = spikes((HIDDEN,), 0.6, 8)

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk1 *= mask
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            spk2[:, 0] = 1
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3.mul_(2))
        return torch.stack(out), mem1

    check(way, loop)


def test_spikes_masked(way: Way) -> None:
    mask = spikes((HIDDEN,), 0.6, 8)

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]) * 1.1 - 0.05, mem1)
            spk2, mem2 = net.lif2(net.fc2(mask * spk1), mem2)
            spk3, mem3 = net.lif3(net.fc3(1 - spk2) / 2, mem3.neg().neg())
            out.append(torch.where(spk3 > 0, spk3, mem3))
        return torch.stack(out), mem1

    check(way, loop)


# Writing elsewhere.


def test_preallocated_outputs(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems = net.mems()
        spk_rec = torch.zeros(len(x), BATCH, OUTPUTS).double()
        mem_rec = torch.zeros(BATCH, OUTPUTS, len(x)).double()
        sums = torch.zeros(len(x)).double()
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            spk_rec[t] = spk
            mem_rec[..., t] = mems[-1]
            sums[t] += mems[0].sum()
        return spk_rec, mem_rec, sums

    check(way, loop)


def test_preallocated_outputs_by_copy(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out, total = (
            net.mems(),
            torch.zeros(len(x), BATCH, OUTPUTS).double(),
            torch.zeros(BATCH, OUTPUTS).double(),
        )
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out[t].copy_(spk)
            total.add_(spk).add_(mems[-1], alpha=0.5)
        return out, total

    check(way, loop)


def test_out_argument(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spk_rec, mem_rec, _ = recorded(net, x)
        out = torch.empty(0, dtype=torch.float64)
        torch.stack(spk_rec, out=out)
        return out, torch.add(mem_rec[0], mem_rec[1])

    same_values(way, loop)


# Control flow.


def test_early_exit_on_a_spike_count(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, total, out = net.mems(), 0, []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            out.append(spk)
            total += spk.sum().item()
            if total > 12:
                break
        assert 1 < len(out) < STEPS
        return torch.stack(out), mems[-1]

    net = check(way, loop)
    assert "test_fusion_shapes.py" in str(sparse_backend.report(net))


def test_data_dependent_control_flow(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out, taken = [], []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            if spk1.any() and bool((mem1.mean() > 0.1).item()):
                spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
                taken.append(1)
            else:
                spk2 = torch.zeros_like(spk1)
                taken.append(0)
            rounds = 0
            while rounds < 3 and float(mem3.detach().sum()) < 1.5:
                _, mem3 = net.lif3(net.fc3(spk2 + 0.1), mem3)
                rounds += 1
            out.append(mem3 * rounds)
        return torch.stack(out), taken

    check(way, loop)


def test_winner_takes_all(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            winner = F.one_hot(mem2.argmax(1), HIDDEN).double()
            spk3, mem3 = net.lif3(net.fc3(spk2 * winner), mem3)
            out.append(spk3)
        return torch.stack(out), mem3

    check(way, loop)


def test_forced_values_of_every_kind(way: Way) -> None:
    """Looking at numbers changes none."""

    def loop(net: Net, x: Any) -> Any:
        mems, out, seen = net.mems(), [], []
        looks: list[Callable[[Any, Any], Any]] = [
            lambda spk, mem: repr(spk),
            lambda spk, mem: f"{mem.mean():.6f} {spk.sum().item()}",
            lambda spk, mem: mem.detach().numpy().round(6).tolist(),
            lambda spk, mem: spk.tolist(),
            lambda spk, mem: int(spk.sum()) + float(mem.max() > 0.2),
            lambda spk, mem: [len(row) for row in spk] + [round(float(mem[0, 1]), 6)],
            lambda spk, mem: np.asarray(spk.detach()).shape,
        ]
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            seen.append(looks[t % len(looks)](spk, mems[-1]))
            out.append(spk)
        return torch.stack(out), seen[1:]

    check(way, loop)


# Settings changed in mid-loop.


def test_decay_and_threshold_assigned_in_mid_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            net.lif1.beta = torch.tensor(0.9 - 0.05 * (t // 3), dtype=torch.float64)
            net.lif2.threshold = torch.tensor(0.6 if t < 4 else 0.4, dtype=torch.float64)
            net.lif3.graded_spikes_factor = torch.tensor(1.0 if t < 5 else 2.0, dtype=torch.float64)
            net.lif3.reset_delay = t < 3
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        return torch.stack(out), mems

    check(way, loop)


@pytest.mark.parametrize("what", ["beta", "threshold", "weight", "bias"])
def test_parameters_changed_in_place_in_mid_loop(way: Way, what: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            with torch.no_grad():
                changed = getattr(net.lif2 if what in ("beta", "threshold") else net.fc2, what)
                changed.mul_(0.5 if t == 3 else 1.0) if t in (3, 5) else None
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        with torch.no_grad():
            changed.mul_(2.0)
        return torch.stack(out), mems

    right_or_clear_error(way, loop)


def test_weight_replaced_in_mid_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out, before = net.mems(), [], net.fc2.weight
        for t in range(len(x)):
            if t == 3:
                net.fc2.weight = net.other
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        net.fc2.weight = before
        return torch.stack(out), mems

    def recipe(spike_grad: Any) -> Any:
        net = wake(Net(spike_grad, loop))
        net.other = nn.Parameter(normal((HIDDEN, HIDDEN), 12))
        return net

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


def test_layers_frozen_in_mid_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            net.fc2.requires_grad_(t < 4)
            spk, mems = net.step(x[t], mems)
            out.append(spk)
        net.fc2.requires_grad_(True)
        return torch.stack(out), mems

    check(way, loop)


def test_train_and_eval_in_mid_loop(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            net.train(t % 3 != 1)
            spk1, mem1 = net.lif1(net.norm(net.fc1(x[t])), mem1)
            spk2, mem2 = net.lif2(net.fc2(net.drop(spk1)), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        net.train()
        return torch.stack(out), mem1

    check_with(way, loop, norm=lambda: nn.BatchNorm1d(HIDDEN), drop=lambda: nn.Dropout(0.4))


# Norms and random numbers.


def norm_loop(net: Net, x: Any) -> Any:
    mem1, mem2, mem3 = net.mems()
    out = []
    for t in range(len(x)):
        spk1, mem1 = net.lif1(net.norm(net.fc1(x[t])), mem1)
        spk2, mem2 = net.lif2(net.norm2(net.fc2(spk1)), mem2)
        spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
        out.append(spk3)
    return torch.stack(out), mem1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_in_training(way: Way, momentum: float | None) -> None:
    def norm() -> nn.Module:
        return nn.BatchNorm1d(HIDDEN, momentum=momentum)

    check_with(way, norm_loop, norm=norm, norm2=norm)


def test_one_batch_norm_for_two_layers(way: Way) -> None:
    """Its running statistics depend on the order of the calls."""

    def recipe(spike_grad: Any) -> Any:
        net = Net(spike_grad, norm_loop)
        net.norm = net.norm2 = nn.BatchNorm1d(HIDDEN, momentum=0.3)
        return wake(net)

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


@pytest.mark.parametrize("there", ["recorded", "computed"])
def test_batch_norm_called_against_the_order_of_the_layers(way: Way, there: str) -> None:
    """First on what comes late, then on what was there before: recorded too, or a tensor of the caller's."""
    given = normal((STEPS, BATCH, HIDDEN), 13)

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, _ = net.mems()
        out = []
        for t in range(len(x)):
            current = net.fc1(x[t])
            spk1, mem1 = net.lif1(current, mem1)
            late = net.norm(spk1)
            early = net.norm(current if there == "recorded" else given[t])
            spk2, mem2 = net.lif2(net.fc2(late) + early, mem2)
            out.append(spk2)
        return torch.stack(out), mem1

    check_with(way, loop, norm=lambda: nn.BatchNorm1d(HIDDEN, momentum=0.3))


def test_batch_norm_through_time(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.bntt[t](net.fc1(x[t])), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(spk3)
        return torch.stack(out), mem1

    check_with(way, loop, bntt=lambda: snn.BatchNormTT1d(HIDDEN, STEPS))


@pytest.mark.parametrize("kind", ["batch", "layer", "group"])
def test_norms_in_evaluation(way: Way, kind: str) -> None:
    def norm() -> nn.Module:
        made: nn.Module = {
            "batch": lambda: nn.BatchNorm1d(HIDDEN),
            "layer": lambda: nn.LayerNorm(HIDDEN),
            "group": lambda: nn.GroupNorm(2, HIDDEN),
        }[kind]()
        for name, buffer in made.named_buffers():
            if name == "running_mean":
                buffer.copy_(normal((HIDDEN,), 3, scale=0.2))
        return made

    def recipe(spike_grad: Any) -> Any:
        net = Net(spike_grad, norm_loop)
        net.norm, net.norm2 = norm(), norm()
        return wake(net).eval()

    x = frames()
    assert_equal_runs(recipe, lambda net: net(x), way, runs=2)


DRAWS: dict[str, Callable[[Any, Any], Any]] = {
    "module": lambda net, spk: net.drop(spk),
    "function": lambda net, spk: F.dropout(spk, 0.3, net.training),
    "function in place": lambda net, spk: F.dropout(spk, 0.3, True, True),
    "alpha": lambda net, spk: F.alpha_dropout(spk, 0.2, True),
    "channels": lambda net, spk: F.dropout1d(spk.unsqueeze(-1), 0.3, True).squeeze(-1),
    "noise": lambda net, spk: spk + 0.1 * torch.randn_like(spk),
    "mask": lambda net, spk: spk * (torch.rand(spk.shape, dtype=torch.float64) < 0.7),
    "bernoulli": lambda net, spk: torch.bernoulli(spk.detach().clamp(0, 1) * 0.5) + spk,
    "permutation": lambda net, spk: spk[:, torch.randperm(spk.shape[1])],
    "rrelu": lambda net, spk: F.rrelu(spk - 0.5, training=True),
    "dropout 0": lambda net, spk: F.dropout(spk, 0.0),
    "dropout 1": lambda net, spk: F.dropout(spk, 1.0) + 0.5 * spk,
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_in_the_loop(way: Way, draw: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, mem3 = net.mems()
        out = []
        for t in range(len(x)):
            spk1, mem1 = net.lif1(net.drop(net.fc1(x[t])), mem1)
            spk2, mem2 = net.lif2(net.fc2(DRAWS[draw](net, spk1)), mem2)
            spk3, mem3 = net.lif3(net.fc3(spk2), mem3)
            out.append(DRAWS[draw](net, spk3))
        return torch.stack(out), mem1

    check_with(way, loop, drop=lambda: nn.Dropout(0.25))


def test_dropout_of_a_static_input(way: Way) -> None:
    """The same image, but another mask at every step."""
    image = normal((BATCH, INPUTS), 3)

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for _ in range(STEPS):
            spk, mems = net.step(F.dropout(image, 0.3), mems)
            out.append(spk)
        return torch.stack(out), mems[0]

    check(way, loop)


# Convolutions.


class ConvNet(nn.Module):
    def __init__(self, spike_grad: Any, norm: str = "none") -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, 3, 3, padding=1), leaky(spike_grad, 0.9, 0.7)
        self.conv2, self.lif2 = nn.Conv2d(3, 4, 3), leaky(spike_grad, 0.8, 0.6)
        self.fc, self.lif3 = nn.Linear(16, OUTPUTS), leaky(spike_grad, 0.8, 0.6)
        self.norm: Any = {
            "none": nn.Identity,
            "batch": lambda: nn.BatchNorm2d(3),
            "bntt": lambda: snn.BatchNormTT2d(3, STEPS),
            "group": lambda: nn.GroupNorm(3, 3),
        }[norm]()
        self.drop: Any = nn.Dropout2d(0.3) if norm == "none" else nn.Identity()

    def forward(self, x: Any) -> Any:
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        out = []
        for t in range(len(x)):
            norm = self.norm[t] if isinstance(self.norm, nn.ModuleList) else self.norm
            spk1, mem1 = self.lif1(F.max_pool2d(norm(self.conv1(x[t])), 2), mem1)
            spk2, mem2 = self.lif2(self.conv2(self.drop(spk1)), mem2)
            pooled = F.avg_pool2d(spk2, 2) if t % 2 else F.adaptive_avg_pool2d(spk2, 2)
            spk3, mem3 = self.lif3(self.fc(pooled.flatten(1)), mem3)
            out.append(spk3)
        return torch.stack(out), mem1, mem2, mem3


@pytest.mark.parametrize("norm", ["none", "batch", "bntt", "group"])
def test_conv_net(way: Way, norm: str) -> None:
    x = spikes((STEPS, BATCH, 1, 12, 12), 0.2, 6)
    assert_equal_runs(lambda grad: wake(ConvNet(grad, norm)), lambda net: net(x), way, runs=2)


def test_conv_net_fed_one_picture(way: Way) -> None:
    x = normal((BATCH, 1, 12, 12), 7).requires_grad_()
    static = [x] * STEPS
    assert_equal_runs(lambda grad: wake(ConvNet(grad)), lambda net: net(static), way, [x], runs=2)


class ConvNet1d(nn.Module):
    def __init__(self, spike_grad: Any) -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv1d(2, 3, 3, stride=2), leaky(spike_grad, torch.full((3, 9), 0.9), 0.7)
        self.conv2, self.lif2 = nn.Conv1d(3, 4, 3, groups=1, dilation=2), leaky(spike_grad, 0.8, 0.6)

    def forward(self, x: Any) -> Any:
        mem1, mem2, out = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for step in x:
            spk1, mem1 = self.lif1(self.conv1(step), mem1)
            spk2, mem2 = self.lif2(F.max_pool1d(torch.tanh(self.conv2(spk1)), 2), mem2)
            out.append(spk2.reshape(step.shape[0], -1))
        return torch.stack(out), mem1, mem2


def test_conv_net_1d(way: Way) -> None:
    x = spikes((STEPS, BATCH, 2, 19), 0.3, 6)
    assert_equal_runs(lambda grad: wake(ConvNet1d(grad)), lambda net: net(x), way, runs=2)
