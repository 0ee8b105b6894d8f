"""Who shares memory with whom under time fusion: writes through views, containers, tensors handed out twice."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fusion_loops import BATCH, HIDDEN, INPUTS, STEPS, Net, check, frames, net_of, recorded, same_values, wake
from helpers import assert_close
from pairs import WAYS, Way, assert_equal_runs, enabled
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_backend
from sparse_backend.tensorlike import TensorLike
from sparse_backend.timefusion import functions


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


#: writes to a membrane through something that shares its memory
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda mem: mem.view(-1).mul_(0.5),
    "view of a view": lambda mem: mem.view(-1).view(BATCH, -1).mul_(0.5),
    "slice": lambda mem: mem[:, :2].mul_(0.5),
    "column": lambda mem: mem[:, 0].fill_(0.25),
    "flat entries": lambda mem: mem.view(-1).__setitem__(slice(0, 3), 0.25),
    "zeros": lambda mem: mem.view(-1).zero_(),
    "transpose": lambda mem: mem.t().mul_(0.5),
    "float of a double": lambda mem: mem.double().mul_(0.5),
    "contiguous": lambda mem: mem.contiguous().mul_(0.5),
    "base itself": lambda mem: mem.mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_through_what_shares_memory(way: Way, write: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for t in range(len(x)):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            mem = mem * 1.0
            WRITES[write](mem)
            out.append(spk)
        return torch.stack(out), mem

    check(way, loop)


def test_a_view_sees_a_write_to_its_base(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for t in range(len(x)):
            _spk, mem = net.lif1(net.fc1(x[t]), mem)
            scaled = mem * 1.0
            flat = scaled.view(-1)
            scaled.mul_(0.5)
            out.append(flat)
        return torch.stack(out), mem

    check(way, loop)


def test_two_stacks_of_the_same_steps(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        _, mems, _ = recorded(net, x)
        a, b = torch.stack(mems), torch.stack(mems)
        a = a * 1.0
        a.mul_(0.5)
        return a, b

    check(way, loop)


def test_a_stack_written_to_before_its_steps_are_read() -> None:
    def loop(net: Net, x: Any) -> Any:
        _, mems, _ = recorded(net, x)
        whole = torch.stack(mems)
        with torch.no_grad():
            whole.mul_(0.5)
        return (mems[2] + 0,)

    net = enabled(net_of(loop), WAYS["inf"])
    with pytest.raises(RuntimeError, match="was changed in place, and then one of the steps was read"):
        net(frames())


def test_a_stack_made_without_gradient_holds_no_graph(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        spikes, mems, _ = recorded(net, x)
        with torch.no_grad():
            net.log = torch.stack(mems), torch.stack(spikes)
        return torch.stack(spikes), mems[-1]

    net = check(way, loop)
    assert not any(part.requires_grad for part in net.log)


def test_lists_of_steps_that_leave_the_forward_can_be_written_to(way: Way) -> None:
    net = enabled(net_of(lambda net, x: recorded(net, x)[1]), way)
    with way.policy():
        mems = net(frames())
        kept = mems[2].detach().clone()
        mems[1].mul_(2)
        mems[3].detach_()
    assert_close(mems[2], kept)


def test_containers_in_attributes_stay_the_objects_they_are() -> None:
    def loop(net: Net, x: Any) -> Any:
        spikes, mems, _ = recorded(net, x)
        net.found.extend(spikes)
        net.queue.append(mems[0])
        net.by_name["last"].append(mems[-1])
        return torch.stack(spikes)

    net = wake(enabled(net_of(loop), WAYS["inf"]))
    net.config = config = {"inner": {"a": 1}, "list": [1, 2]}
    net.found, net.queue, net.by_name = [], deque(), defaultdict(list)
    inner, found = config["inner"], net.found
    net(frames())
    assert net.config is config
    assert config["inner"] is inner
    assert net.found is found
    kept = [*net.found, *net.queue, *net.by_name["last"]]
    assert len(kept) == STEPS + 2
    assert not any(type(part).__name__ == "Placeholder" for part in kept)


def test_states_taken_in_another_order(way: Way) -> None:
    """A spike tensor as the next membrane is no continuation of the layer's run."""

    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for t in range(len(x)):
            spk, after = net.lif1(net.fc1(x[t]), mem)
            mem = spk if t % 2 else after
            out.append(after)
        return torch.stack(out)

    check(way, loop)


def test_sums_of_whole_numbers_and_of_wider_floats(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem = net.lif1.reset_mem()
        fired = torch.zeros(BATCH, HIDDEN, dtype=torch.bool)
        total = 0
        for t in range(len(x)):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            fired = fired + (mem > 0.1)
            total = total + spk
        return fired, total, mem

    net = check(way, loop, fuses=STEPS)
    assert net(frames())[0].dtype is torch.bool


def test_a_float64_total_of_float32_steps() -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, total = net.lif1.reset_mem(), torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
        steps = []
        for t in range(len(x)):
            _spk, mem = net.lif1(net.fc1(x[t]), mem)
            total = total + mem
            steps.append(mem)
        return total, torch.stack(steps)

    net = enabled(net_of(loop), WAYS["inf"]).float()
    total, steps = net(torch.rand(200, BATCH, INPUTS))
    assert torch.equal(total, steps.double().cumsum(0)[-1])


def test_noise_added_to_the_current_of_a_static_input(way: Way) -> None:
    """Every step's current is a tensor of its own, though all have the same values."""

    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        currents = [net.fc1(x[0]) for _ in range(STEPS)]
        for current in currents:
            current.add_(torch.rand_like(current) * 0.1)
        for current in currents:
            spk, mem = net.lif1(current, mem)
            out.append(spk)
        return torch.stack(out), mem

    check(way, loop)


def test_numpy_memory_refilled_at_every_step(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        buffer = np.zeros((BATCH, HIDDEN))
        current = torch.from_numpy(buffer)
        for t in range(STEPS):
            buffer[:] = 0.3 * (t % 3) + 0.1
            spk, mem = net.lif1(current, mem)
            out.append(spk * net.fc1.weight.sum())
        return torch.stack(out), mem

    check(way, loop)


@pytest.mark.parametrize(
    "change",
    [
        lambda mem: F.mish(mem, inplace=True),
        lambda mem: mem.unsqueeze_(0).squeeze_(0),
        lambda mem: mem.t_().t_(),
        lambda mem: mem.mul_(0.5).add_(0.1),
    ],
    ids=["mish in place", "unsqueeze_ and squeeze_", "t_ and t_", "mul_ and add_"],
)
def test_a_membrane_changed_in_place_is_what_the_next_step_takes(way: Way, change: Any) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for t in range(len(x)):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            assert change(mem) is mem
            out.append(spk)
        return torch.stack(out), mem

    check(way, loop)


def test_every_function_with_a_flag_for_in_place_is_known() -> None:
    named = {F.relu, F.leaky_relu, F.elu, F.silu, F.selu, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.mish}
    assert named <= functions._WITH_INPLACE_FLAG


def test_shapes_that_do_not_fold(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        still = torch.rand(HIDDEN, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for t in range(len(x)):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            out.append(still.view_as(mem) * spk + F.layer_norm(mem, mem.shape) + F.layer_norm(mem, mem.shape[1:]))
        return torch.stack(out), mem

    check(way, loop)


AS_ANOTHER = {
    "view_as": lambda x, spk: x.view_as(spk),
    "view_as other=": lambda x, spk: x.view_as(other=spk),
    "reshape_as": lambda x, spk: x.reshape_as(spk),
    "expand_as": lambda x, spk: x.expand_as(spk),
}


@pytest.mark.parametrize("of", ["sum", "spikes"])
@pytest.mark.parametrize("how", AS_ANOTHER)
def test_a_tensor_in_the_shape_of_another_shares_its_memory(way: Way, how: str, of: str) -> None:
    """Of the spikes only the shape is asked, and what is written through the view is written to the tensor."""

    def loop(net: Net, x: Any) -> Any:
        mem, total, out = net.lif1.reset_mem(), torch.zeros(BATCH, HIDDEN, dtype=torch.float64), []
        for step in x:
            spk, mem = net.lif1(net.fc1(step), mem)
            if of == "sum":
                AS_ANOTHER[how](total, spk).add_(spk.detach())
                out.append(spk * total.clone())
            else:
                out.append(AS_ANOTHER[how](spk, mem) * mem)
        return torch.stack(out), total

    check(way, loop, fuses=None if of == "sum" else len(frames()))


# Sums with `+=`, of a tensor that others hold as well: they see it grow.


def _zeros() -> Tensor:
    return torch.zeros(BATCH, HIDDEN, dtype=torch.float64)


def _one_variable(spikes: Iterator[Any]) -> Any:
    total = _zeros()
    for spk in spikes:
        total += spk
    return total


def _two_variables(spikes: Iterator[Any]) -> Any:
    total = same = _zeros()
    for spk in spikes:
        total += spk
    return same


def _a_list(spikes: Iterator[Any]) -> Any:
    kept = [_zeros()]
    (total,) = kept
    for spk in spikes:
        total += spk
    return kept


def _a_view(spikes: Iterator[Any]) -> Any:
    total = _zeros()
    first = total[0]
    for spk in spikes:
        total += spk
    return first


def _add(total: Any, spk: Any) -> None:
    total += spk


def _a_caller(spikes: Iterator[Any]) -> Any:
    total = _zeros()
    for spk in spikes:
        _add(total, spk)
    return total


def _a_callers_caller(spikes: Iterator[Any]) -> Any:
    def add(total: Any, spk: Any) -> None:
        _add(total, spk=spk)

    total = _zeros()
    for spk in spikes:
        add(total, spk)
    return total


def _a_generator(spikes: Iterator[Any]) -> Any:
    def added(total: Any) -> Iterator[Any]:
        for spk in spikes:
            total += spk
            yield spk

    total = _zeros()
    seen = [spk * total.clone() for spk in added(total)]
    return [*seen, total]


def _lent_to_a_generator(spikes: Iterator[Any]) -> Any:
    def seen(total: Any) -> Iterator[Any]:
        for spk in spikes:
            yield spk
            yield total.clone()

    total = _zeros()
    out = []
    each = seen(total)
    for spk in each:
        total += spk
        out.append(next(each))
    return [*out, total]


def _a_closure(spikes: Iterator[Any]) -> Any:
    total = _zeros()

    def so_far() -> Any:
        return total * 1.0

    out = []
    for spk in spikes:
        total += spk
        out.append(so_far())
    return [*out, total]


HOLDERS = {
    holder.__name__[1:].replace("_", " "): holder
    for holder in (_one_variable, _two_variables, _a_list, _a_view, _a_caller, _a_callers_caller, _a_generator,
                   _lent_to_a_generator, _a_closure)
}  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_sum_that_is_held(way: Way, holder: str) -> None:
    def spikes(net: Net, x: Any) -> Iterator[Any]:
        mem = net.lif1.reset_mem()
        for step in x:
            spk, mem = net.lif1(net.fc1(step), mem)
            yield spk.detach()

    def loop(net: Net, x: Any) -> Any:
        spk, _ = net.lif1(net.fc1(x[0]), net.lif1.reset_mem())
        return HOLDERS[holder](spikes(net, x)), spk

    check(way, loop, fuses=STEPS if holder == "one variable" else None)


@pytest.mark.parametrize("fuse_time", [True, False])
def test_a_current_looked_at_after_its_weight_has_changed(fuse_time: bool) -> None:
    """It is that of the weight it was computed with, or an error."""
    seen: list[Any] = []

    def loop(net: Net, x: Any) -> Any:
        spk, mem = net.lif1(net.fc1(x[0]), net.lif1.reset_mem())
        return spk, mem

    net = enabled(net_of(loop), WAYS["band as events"])
    sparse_backend.disable(net)
    sparse_backend.enable(net, b_th=1.0, fuse_time=fuse_time)
    net.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    x = frames(density=0.1)
    expected = F.linear(x[0], net.fc1.weight, net.fc1.bias).detach()
    net(x)[1].sum().backward()
    with torch.no_grad():
        net.fc1.weight.mul_(2)
    try:
        got = seen[0] + 0
    except RuntimeError as error:
        assert "was changed in place" in str(error)
    else:
        assert_close(got, expected)


def test_evaluated_in_inference_mode_and_trained_on_the_same_input(way: Way) -> None:
    net = enabled(net_of(lambda net, x: torch.stack(recorded(net, x)[1])), way)
    x, events = frames(), sparse_backend.EventTensor.from_dense(frames())
    with way.policy():
        for data in (x, events):
            with torch.inference_mode():
                net(data)
            net(data).sum().backward()
            assert isinstance(data, (Tensor, TensorLike))
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in net.fc1.parameters())


#: writes to a current after a neuron has taken it
AFTERWARDS: dict[str, Callable[[Any], Any]] = {
    "+=": lambda cur: cur.__iadd__(1.0),
    "an entry": lambda cur: cur.__setitem__(0, 2.0),
    "zeros": lambda cur: cur.zero_(),
    "relu": lambda cur: torch.relu_(cur),
    "copy": lambda cur: cur.copy_(torch.ones_like(cur)),
    "looked at before": lambda cur: (cur.sum().item(), cur.mul_(0.0)),
}


@pytest.mark.parametrize("write", AFTERWARDS)
def test_a_current_of_events_written_to_after_a_neuron_took_it(way: Way, write: str) -> None:
    """Whose Linear is not recorded, since its input is no slice."""

    def loop(net: Net, x: Any) -> Any:
        mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
        for t in range(len(x)):
            current = net.fc1(x[t].clone())
            _spk, mem1 = net.lif1(current, mem1)
            AFTERWARDS[write](current)
            spk, mem2 = net.lif2(current, mem2)
            out.append(spk + mem1)
        return torch.stack(out), mem2

    check(way, loop, frames(density=0.12))


def test_a_current_of_events_written_to_through_a_view(way: Way) -> None:
    """The neuron that was given it had it as it was."""

    def loop(net: Net, x: Any) -> Any:
        mem = net.lif1.reset_mem()
        for t in range(len(x)):
            current = net.fc1(x[t].clone())
            _spk, mem = net.lif1(current, mem)
            current.t()[0] *= 2
        return mem

    check(way, loop, frames(density=0.12))


@pytest.mark.parametrize("at", [range(STEPS), [0], [2]], ids=["every", "first", "third"])
def test_events_written_to_after_a_linear_layer_took_them(way: Way, at: Any) -> None:
    """Without gradients, of which torch's own linear layer would say that they need the input."""

    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        whole = sparse_backend.EventTensor.from_dense(x) if hasattr(net, "_sparse_backend") else x
        for t in range(STEPS):
            step = whole[t].clone() if whole is x else whole[t]
            spk, mem = net.lif1(net.fc1(step), mem)
            if t in at:
                step.mul_(0.5)
            out.append(spk + net.fc1(step).mean())
        return torch.stack(out), mem

    same_values(way, loop)


def test_events_that_two_recordings_read() -> None:
    """A model in a checkpoint records for itself, and has read them before the loop around it has."""
    inner, outer = (
        enabled(net_of(lambda net, x: net.lif1(net.fc1(x), torch.zeros(BATCH, HIDDEN).double())), WAYS["band"])
        for _ in range(2)
    )
    x = frames(density=0.12)

    def run(writes: bool) -> Tensor:
        whole, out = sparse_backend.EventTensor.from_dense(x), []
        with sparse_backend.fuse_time(outer), torch.no_grad():
            for t in range(STEPS):
                out.append(outer(whole[t])[1])
                with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
                    inner(whole[t])
                if writes:
                    whole[t].copy_(torch.ones(BATCH, INPUTS))
        return torch.stack([mem + 0 for mem in out])

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("alias", ["transposed", "leaves", "a function's own"])
def test_currents_that_share_memory_and_are_not_the_same(way: Way, alias: str) -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    square = torch.rand(BATCH, BATCH, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.4
    leaves = [square.detach().requires_grad_() for _ in range(3)]

    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        own = square * net.fc1.bias[0] * 4
        currents = {
            "transposed": [square, square.t(), square],
            "leaves": leaves,
            "a function's own": [own, Halved.apply(own)],
        }
        for current in currents[alias]:
            spk, mem = net.lif1(current, mem)
            out.append(spk * net.fc2.bias[:BATCH])
        return torch.stack(out), mem

    assert_equal_runs(net_of(loop), lambda net: net(frames()), way, leaves if alias == "leaves" else (), runs=2)


@pytest.mark.parametrize("refilled", ["buffer", "an alias", "two buffers", "of what learns"])
def test_a_neurons_own_input_buffer_refilled_at_every_step(way: Way, refilled: str) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out = net.lif1.reset_mem(), []
        buffers = [
            torch.zeros(BATCH, HIDDEN, dtype=torch.float64) for _ in range(2 if refilled == "two buffers" else 1)
        ]
        for t in range(STEPS):
            current = x[t, :, :HIDDEN] * (1.5 + 0.1 * t)
            if refilled == "of what learns":
                current = current * net.fc1.bias
            buffer = buffers[t % len(buffers)].copy_(current)
            spk, mem = net.lif1(buffer.detach() if refilled == "an alias" else buffer, mem)
            out.append(spk * net.fc2.bias)
        return torch.stack(out), mem

    if refilled == "two buffers":
        with pytest.raises(RuntimeError, match="was changed in place"):
            check(way, loop)
    else:
        check(way, loop, fuses=STEPS)


def test_the_same_dense_current_at_every_step(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mem, out, current = net.lif1.reset_mem(), [], torch.tanh(net.fc1.weight[:, :BATCH].t() + 1)
        for _ in range(STEPS):
            spk, mem = net.lif1(current, mem)
            out.append(spk)
        return torch.stack(out), mem

    check(way, loop, fuses=STEPS)
