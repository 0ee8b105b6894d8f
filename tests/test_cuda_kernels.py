"""The CUDA backend on the emulated device: every case of test_ops.py, and what only a device has.

Kernels and host code are those of csrc/cuda; tests/emulation runs them on the CPU and checks every access.
"""

from __future__ import annotations

import ctypes
import os

import emulation
import pytest
import test_ops as cases
import torch
from helpers import dyadic, generator, normal
from test_ops import *  # noqa: F403

from sparse_backend import _build, arguments
from sparse_backend.dynamics import LIF_RESETS
from sparse_backend.ops import event_linear as event_linear_ops
from sparse_backend.ops import events as event_ops
from sparse_backend.ops import hub as hub_ops
from sparse_backend.ops import leaky as leaky_ops
from sparse_backend.ops import lif as lif_ops
from sparse_backend.ops import linear_leaky as linear_leaky_ops
from sparse_backend.ops import linear_lif as linear_lif_ops
from sparse_backend.ops.leaky import LeakyOutput
from sparse_backend.reference import events as event_twins
from sparse_backend.reference import leaky as leaky_twins
from sparse_backend.reference import linear_leaky as linear_leaky_twins

pytestmark = [  # not those of test_ops: fibers and the address sanitizer do not go together
    pytest.mark.skipif(_build.tools.find_compiler() is None, reason="no C++ compiler to emulate CUDA kernels with"),
    pytest.mark.skipif(os.environ.get("SPARSE_BACKEND_BUILD") == "none", reason="SPARSE_BACKEND_BUILD=none"),
]

F32, F64 = torch.float32, torch.float64
ORDERS = (emulation.ASCENDING, emulation.DESCENDING, emulation.SHUFFLED)
ONE_STEP, FEW_STEPS = 1, 1 << 15  # second-level caches so small that a sequence runs in chunks


@pytest.fixture(autouse=True, scope="module")
def emulated_device(kernels):
    with emulation.in_place_of_the_cpu_kernels():
        before = emulation.library().emulation_launches()
        yield
    assert emulation.library().emulation_launches() > before, "nothing ran on the emulated device"


@pytest.fixture(autouse=True)
def usual_device():
    emulation.set_device()
    yield
    emulation.set_device()


# The emulated device itself: it must notice what it is there to notice.

WRONG = [
    ("reads past the end", 33, "access to entries 32..32 of a buffer of 32"),
    ("writes before the beginning", 1, "access to entries -1..-1"),
    ("loads 16 bytes at an odd place", 1, "misaligned 16-byte access"),
    ("does not reach the barrier", 2, "deadlock"),
    ("shuffles from outside the mask", 16, "outside the mask"),
]


@pytest.mark.parametrize(("kernel", "threads", "said"), [(i, t, said) for i, (_, t, said) in enumerate(WRONG)])
def test_a_wrong_kernel_is_noticed(kernel, threads, said):
    assert said in emulation.run(kernel, 1, threads)[0]


def test_a_race_shows_in_another_order():
    results = set()
    for order in ORDERS:
        emulation.set_device(order)
        results.add(emulation.run(len(WRONG), 1, 32))
    if emulation.CHECKS_RACES:
        assert all("race: shared memory" in told for told, _ in results)
    else:
        assert len(results) == 3 and not any(told for told, _ in results)


RACES = [
    ("nothing orders threads", 6, 1, 32, "race: shared memory written by thread 0 of block 0, then read"),
    ("a ballot orders nothing", 7, 1, 32, "race: shared memory written by thread 0 of block 0, then read"),
    ("__syncwarp orders a warp", 8, 1, 32, ""),
    ("__syncwarp orders no other warp", 8, 1, 64, "race: shared memory written by thread 0 of block 0, then read"),
    ("a barrier orders a block", 9, 1, 64, ""),
    ("shared memory holds nothing at first", 10, 1, 32, "never written in this block: shared memory read"),
    ("nor in a later block", 10, 2, 32, "never written in this block: shared memory read"),
    ("one block", 11, 1, 32, ""),
    ("nothing orders blocks", 11, 2, 32, "race: global memory written by thread 0 of block 0, then written"),
    ("all write the same", 12, 2, 64, ""),
    ("__ldg of what was written", 13, 1, 32, "__ldg of what the launch writes: global memory written"),
]


@pytest.mark.parametrize(
    ("kernel", "blocks", "threads", "said"), [race[1:] for race in RACES], ids=[r[0] for r in RACES]
)
def test_races_are_noticed_where_they_are_looked_for(kernel, blocks, threads, said):
    told, _ = emulation.run(kernel, blocks, threads)
    assert said in told if said and emulation.CHECKS_RACES else told == ""


def test_an_op_reaches_its_own_tensors_alone():
    """What an earlier op could reach may have been freed."""
    first, second = torch.eye(40), torch.eye(40)
    event_ops.events_from_dense(first, 1.0)
    assert emulation.library().emulation_reaches(ctypes.c_void_p(first.data_ptr()))
    event_ops.events_from_dense(second, 1.0)
    assert emulation.library().emulation_reaches(ctypes.c_void_p(second.data_ptr()))
    assert not emulation.library().emulation_reaches(ctypes.c_void_p(first.data_ptr()))


# Chunks, orders, waits.


@pytest.mark.parametrize("l2_bytes", [ONE_STEP, FEW_STEPS], ids=["one step", "few steps"])
@pytest.mark.parametrize("case", ["leaky", "linear_leaky", "event_linear"])
def test_chunks_against_the_twins(case, l2_bytes):
    emulation.set_device(l2_bytes=l2_bytes)
    getattr(cases, f"test_{case}_against_its_twin")()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("reset", "rule"), [("zero", 0), ("subtract", 1)])
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(dtype, reset, rule):
    """Bit for bit; with several parts of a weight's sums, chunks of a sequence, and sums over steps."""
    forward, backward = cases.big_layer(dtype, reset, rule)
    x = event_ops.events_from_dense((torch.rand(9000, 5, generator=generator(1)) < 0.2).to(dtype), 1.0)
    delta = normal((9000, 3), 2, dtype)
    results = []
    for order in ORDERS:
        emulation.set_device(order, FEW_STEPS)
        out = LeakyOutput(*linear_leaky_ops.linear_leaky(*forward))
        chunked = backward(out)
        emulation.set_device(order)
        linear = event_linear_ops.event_linear_backward(
            delta, x[0], x[1], None, None, None, normal((3, 5), 3, dtype), 0, True, True
        )
        summed = event_ops.events_sum(delta, x[0], x[1], None, None, None, 5, 30)
        results.append((*out, *chunked, *linear, summed))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_many_rows_and_inputs():
    """More rows than one part of a weight's sums, more inputs than one tile of bits."""
    x = cases.make_events(9000, 1100, 0.002, 1, F64, graded=True)
    delta = normal((9000, 5), 2)
    args = (delta, x.row_ptr, x.indices, x.values, None, None, normal((5, 1100), 3), 0, True, True)
    cases.equal(event_linear_ops.event_linear_backward(*args), linear_leaky_twins.event_linear_backward(*args))


def test_so_many_inputs_that_their_bits_come_in_blocks_of_rows():
    x = cases.make_events(8300, 16000, 0.0002, 1, F32)
    args = (dyadic((8300, 3), 2), x.row_ptr, x.indices, None, None, None, torch.zeros(3, 16000), 0, True, False)
    cases.equal(event_linear_ops.event_linear_backward(*args), linear_leaky_twins.event_linear_backward(*args))


def test_the_sum_over_steps():
    x = cases.make_events(19 * 7, 1100, 0.01, 1, F64, graded=True)
    args = (torch.zeros(0, dtype=F64), x.row_ptr, x.indices, x.values, None, None, 1100, 19)
    cases.equal(event_ops.events_sum(*args), event_twins.events_sum(*args))


def waits(run) -> int:
    before = emulation.library().emulation_synchronisations()
    run()
    return emulation.library().emulation_synchronisations() - before


def test_one_wait_per_forward_and_none_per_backward():
    forward, backward = cases.big_layer(F32, "subtract", 1)
    out = LeakyOutput(*linear_leaky_ops.linear_leaky(*forward))
    assert waits(lambda: linear_leaky_ops.linear_leaky(*forward)) == 1
    assert waits(lambda: backward(out)) == 0
    assert waits(lambda: event_ops.events_from_dense(torch.eye(40), 1.0)) == 1
    sums = torch.zeros(150, 144), torch.zeros(144)
    delta = torch.ones(400, 130)
    assert waits(lambda: hub_ops.outer_accumulate(*sums, delta, *forward[:3])) == 0


def test_a_weight_elsewhere_is_not_looked_at():
    """Whether all of it is finite is known to the device alone."""
    weight = torch.full((3, 4), torch.inf)
    assert not arguments.is_finite(weight) and arguments.is_finite(weight.zero_())
    assert arguments.is_finite(weight.to("meta"))


def test_launches_do_not_grow_with_the_steps():
    def launches(steps):
        current = dyadic((steps, 2, 40), 1)
        before = emulation.library().emulation_launches()
        leaky_ops.leaky(current, torch.tensor(0.5), torch.tensor(1.0), None, None, *cases.options())
        return emulation.library().emulation_launches() - before

    assert launches(3) == launches(60)


def test_room_that_was_too_little_is_made_again():
    """In chunks, room for the lists is guessed: half of all entries active is more than the first guess."""
    emulation.set_device(l2_bytes=ONE_STEP)
    current = torch.tensor([1.0, 5.0]).repeat(9, 1, 1501)  # a shape no other test has
    neuron = (torch.tensor(0.0), torch.tensor(1.0), None, None)
    args = (current, *neuron, *cases.options("none", mem=True))
    assert waits(lambda: leaky_ops.leaky(*args)) == 2
    assert waits(lambda: cases.compare_forward(leaky_ops.leaky(*args), leaky_twins.leaky(*args), F32)) == 1
    assert cases.overflowed(leaky_ops.leaky(*args[:-1], 0.4))


def test_room_is_that_of_the_busiest_layer_of_a_shape():
    emulation.set_device(l2_bytes=ONE_STEP)
    shape = (9, 1, 1503)  # one no other test has
    neuron = (torch.tensor(0.0), torch.tensor(1.0), None, None)
    layers = [torch.full(shape, 1.0), torch.full(shape, -9.0), torch.full(shape, -9.0)]  # one active, two not
    for layer in layers:
        leaky_ops.leaky(layer, *neuron, *cases.options("none"))
    for layer in layers * 3:
        assert waits(lambda: leaky_ops.leaky(layer, *neuron, *cases.options("none"))) == 1  # noqa: B023


def test_room_fades_when_the_busiest_layer_is_gone():
    shape = (4, 1, 1505)  # one no other test has
    neuron = (torch.tensor(0.0), torch.tensor(1.0), None, None)
    rooms = []
    for current in (1.0, *[-9.0] * 60):
        leaky_ops.leaky(torch.full(shape, current), *neuron, *cases.options("none"))
        with emulation.capture():
            out = LeakyOutput(*leaky_ops.leaky(torch.full(shape, -9.0), *neuron, *cases.options("none")))
        rooms.append(out.active_indices.numel())
    assert rooms[0] == 4 * 1505 and rooms[1:] == sorted(rooms[1:], reverse=True) and rooms[-1] < 0.8 * rooms[0]


MANY = 1 << 31
NEURON = (torch.tensor(0.5), torch.tensor(1.0))
LIF_NEURON = (torch.tensor(0.5), None, None, torch.tensor(1.0), torch.tensor(0.0), None, None, None, None)
LIF_OPTIONS = (LIF_RESETS["value"], False, False, 0.5, False, False, False, False, 1.0)
OPTIONS, SIZES = cases.options(), (MANY // 2, 2)


def many_rows():
    ptr, none = torch.zeros(1, dtype=torch.int32).expand(MANY + 1), torch.zeros(0, dtype=torch.int32)
    return ptr, none, None, None, None, None, torch.ones(3, 4)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("events_from_dense", lambda: event_ops.events_from_dense(torch.zeros(1, 1).expand(MANY, 1), 1.0)),
        ("events_from_dense", lambda: event_ops.events_from_dense(torch.zeros(1, 1).expand(MANY // 2, 256), 1.0)),
        ("leaky", lambda: leaky_ops.leaky(torch.zeros(1, 1, 1).expand(MANY, 1, 1), *NEURON, None, None, *OPTIONS)),
        ("linear_leaky", lambda: linear_leaky_ops.linear_leaky(*many_rows(), None, *NEURON, None, None, None, 0, *SIZES,
                                                               *OPTIONS)),
        ("lif", lambda: lif_ops.lif(torch.zeros(1, 1, 1).expand(MANY, 1, 1), *LIF_NEURON, *LIF_OPTIONS)),
        ("linear_lif", lambda: linear_lif_ops.linear_lif(*many_rows(), None, None, 0, *SIZES, *LIF_NEURON,
                                                         *LIF_OPTIONS)),
    ],
    ids=["rows of a dense input", "words of a dense input", "leaky", "linear_leaky", "lif", "linear_lif"],
)  # fmt: skip
def test_more_rows_than_can_be_counted_are_named(name, run):
    """Before anything is allocated: what is given here is one entry, repeated."""
    with pytest.raises(RuntimeError, match=rf"{name}: expected fewer than 2\*\*31 rows and 2\*\*32 words .* Split"):
        run()


# Captures: room is fixed beforehand, lists are longer than what they hold.


def cut(out: LeakyOutput) -> LeakyOutput:
    """The same lists without the room that is left."""
    active, spikes, resets = int(out.active_ptr[-1]), int(out.spike_ptr[-1]), int(out.reset_ptr[-1])
    assert out.active_indices.numel() > active and not bool(out.x[active:].any())
    return out._replace(
        x=out.x[:active],
        p=out.p[:active],
        active_indices=out.active_indices[:active],
        spike_indices=out.spike_indices[:spikes],
        reset_indices=out.reset_indices[:resets],
    )


@pytest.mark.parametrize("l2_bytes", [emulation.L2_BYTES, FEW_STEPS], ids=["one chunk", "chunks"])
def test_a_captured_layer_is_the_layer(l2_bytes):
    emulation.set_device(l2_bytes=l2_bytes)
    forward, backward = cases.big_layer(F64, "zero", 1)
    expected = LeakyOutput(*linear_leaky_ops.linear_leaky(*forward))
    with emulation.capture():
        captured = LeakyOutput(*linear_leaky_ops.linear_leaky(*forward))
        grads = backward(captured._replace(x=expected.x))  # gradients are drawn in the shape of x
    for one, other in zip(cut(captured), expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(grads, backward(expected), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_room_that_is_left_are_zero():
    x = cases.make_events(6, 20, 0.3, 1, F64)
    longer = torch.cat([x.indices, x.indices.new_zeros(5)])
    weight, delta = normal((7, 20), 2), normal((6, 7), 3)
    grad = event_linear_ops.event_linear_backward(
        delta, x.row_ptr, x.indices, None, x.row_ptr, longer, weight, 1, False, False
    )[0]
    assert grad.shape == longer.shape and not bool(grad[-5:].any()) and bool(grad[:-5].all())
    gathered = event_ops.events_gather(normal((6, 20), 4), x.row_ptr, longer)
    assert gathered.shape == longer.shape and not bool(gathered[-5:].any())


@pytest.mark.parametrize("which", ["active", "spike", "reset"])
@pytest.mark.parametrize("l2_bytes", [emulation.L2_BYTES, FEW_STEPS], ids=["one chunk", "chunks"])
def test_a_replay_that_needs_more_room_than_there_is_fails(which, l2_bytes):
    """Whichever list is too short: one without its end would pass for a result, further on in finite numbers."""
    emulation.set_device(l2_bytes=l2_bytes)
    steps = ["active", "spike", "reset"].index(which) + 5
    shape = (steps, 3, 401 if l2_bytes == FEW_STEPS else 411)  # shapes no other test has
    current, mem = {"active": (1.0, 0.0), "spike": (9.0, 0.0), "reset": (-9.0, 9.0)}[which]
    args = (torch.full(shape, current), torch.tensor(0.0), torch.tensor(1.0), torch.full(shape[1:], mem), None)
    found = LeakyOutput(*leaky_twins.leaky(*args, *cases.options("none")))._asdict()
    for name in ("active", "spike", "reset"):
        assert (int(found[f"{name}_ptr"][-1]) > 1024) == (name == which)
    leaky_ops.leaky(torch.full(shape, -9.0), *args[1:3], None, None, *cases.options("none"))
    with emulation.capture(), pytest.raises(RuntimeError, match=r"CUDA: .*trap"):
        leaky_ops.leaky(*args, *cases.options("none"))


def test_a_failure_is_told_once():
    """The runtime keeps the last error for whoever asks next, which would be torch, about a kernel of its own."""
    neuron = (torch.tensor(0.5), torch.tensor(1.0), None, None)
    leaky_ops.leaky(torch.full((5, 3, 409), -9.0), *neuron, *cases.options())  # a shape no other test has
    with emulation.capture(), pytest.raises(RuntimeError, match="CUDA: "):
        leaky_ops.leaky(torch.full((5, 3, 409), 9.0), *neuron, *cases.options())
    assert emulation.library().emulation_last_error() == 0
    out = LeakyOutput(*leaky_ops.leaky(torch.full((5, 3, 409), 9.0), *neuron, *cases.options()))
    assert out.spike_indices.numel() == 5 * 3 * 409


def test_what_a_capture_cannot_do_is_named():
    neuron = (torch.tensor(0.5), torch.tensor(1.0), None, None)
    with emulation.capture():
        with pytest.raises(RuntimeError, match="expected sequences of this shape to have been run before the capture"):
            leaky_ops.leaky(torch.zeros(2, 3, 403), *neuron, *cases.options())
        with pytest.raises(RuntimeError, match="events_from_dense: expected a stream that is not captured"):
            event_ops.events_from_dense(torch.eye(4), 1.0)
