"""The two-state neuron of the CUDA backend on the emulated device: the cases of test_lif_ops.py, also in chunks."""

from __future__ import annotations

import os

import emulation
import pytest
import test_lif_ops as cases
import torch
from helpers import normal
from test_ops import kernels

from sparse_backend import _build
from sparse_backend.ops import lif as lif_ops
from sparse_backend.ops import linear_lif as linear_lif_ops
from sparse_backend.ops.lif import ZERO, LIFOutput

__all__ = ["kernels"]  # the fixture loads them here too

OF_THE_CPU = {
    "test_results_do_not_depend_on_threads",  # but on no order of blocks and threads, see below
    "test_linear_lif_of_many_samples",  # whose sums are cut in another way there
    "test_tiny_numbers_are_zero_inside_a_kernel_alone",  # a GPU computes with them at full speed
}
globals().update(
    {name: case for name, case in vars(cases).items() if name.startswith("test_") and name not in OF_THE_CPU}
)

pytestmark = [  # not those of test_lif_ops: fibers and the address sanitizer do not go together
    pytest.mark.skipif(_build.tools.find_compiler() is None, reason="no C++ compiler to emulate CUDA kernels with"),
    pytest.mark.skipif(os.environ.get("SPARSE_BACKEND_BUILD") == "none", reason="SPARSE_BACKEND_BUILD=none"),
]


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


@pytest.mark.parametrize("l2_bytes", [1, 1 << 15], ids=["one step", "few steps"])
@pytest.mark.parametrize("case", ["lif", "linear_lif"])
def test_chunks_against_the_twins(case, l2_bytes):
    emulation.set_device(l2_bytes=l2_bytes)
    getattr(cases, f"test_{case}_against_its_twin")()


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_without_steps_states_come_back_as_given(discrete, recurrent):
    neuron = cases.make_neuron(33, 2, torch.float64, recurrent, discrete=discrete)
    out = LIFOutput(*lif_ops.lif(torch.zeros(0, 2, 33, dtype=torch.float64), *neuron, *cases.Options(True, True, True)))
    assert torch.equal(out.v_last, neuron.v) and torch.equal(out.i_last, neuron.i)


@pytest.mark.parametrize("l2_bytes", [emulation.L2_BYTES, 1 << 15], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("recurrent", "dense"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("discrete", [False, True])
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(discrete, recurrent, dense, l2_bytes):
    """Bit for bit: a block that walks a sample has barriers where it needs them."""
    steps, batch, inputs, neurons = 9, 5, 60, 70
    x = cases.make_events(steps * batch, inputs, 0.1, 1, torch.float64, graded=True)
    equations = {"discrete": True, "detached": True, "leak": None, "reset": ZERO} if discrete else {}
    neuron = cases.make_neuron(neurons, batch, torch.float64, recurrent, dense=dense, **equations)
    ptr, where = cases.make_active(steps * batch, inputs, 0.1, 5)
    weight, needs = normal((neurons, inputs), 2), 255 if recurrent else 127
    results = []
    for order in (emulation.ASCENDING, emulation.DESCENDING, emulation.SHUFFLED):
        emulation.set_device(order, l2_bytes)
        args = (x.row_ptr, x.indices, x.values, None, None, None, weight, None, None, 0)
        out = LIFOutput(*linear_lif_ops.linear_lif(*args, steps, batch, *neuron, *cases.Options(True, True, True)))
        with_g = neuron._replace(g=normal(out.x.shape, 3).abs())
        saved = lif_ops.saved_for_backward(out, with_g, needs)
        grads = [normal(part.shape, 6 + k) for k, part in enumerate(out[:5])]
        rest = (*grads, *saved, *lif_ops.sizes_of((steps, batch, neurons), neuron, needs))
        events = (x.row_ptr, x.indices, x.values, ptr, where)
        results.append((*out, *linear_lif_ops.linear_lif_backward(*events, weight, 1, True, True, *rest)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
