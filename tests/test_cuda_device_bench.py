"""The benchmark on a GPU, in small: all it would time agrees with stock, the rebuilt one, so no framework is needed.

`make gpu-test` runs it; test_bench_cuda.py has what a machine without a GPU can tell.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from emulation import gpu

from sparse_backend import EventTensor
from sparse_backend.bench import cases, devices, fused_dense, graph, measure, paths, training
from sparse_backend.bench.inputs import Inputs
from sparse_backend.bench.models import build

gpu.needed()

SMALL = dataclasses.replace(
    cases.GPU_CASES["cuda-fmnist-100"], framework=cases.REBUILT, batch=32, train_steps=4, kernels=True
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def kernels():
    gpu.load()


def test_a_case_is_checked_and_measured():
    result = measure.measure(SMALL, measure.Settings(repeats=2, device=devices.Cuda()))
    rows = {row["path"]: row for row in result["rows"]}
    assert not [row["refused"] for row in rows.values() if "refused" in row]
    for name in (cases.STOCK, cases.FUSED, cases.FUSED_GRAPH, cases.SEQUENCE, cases.SEQUENCE_EVENTS, cases.GRAPH):
        assert "ms" in rows[name], rows[name]
    assert 0 < rows[cases.SEQUENCE]["peak_bytes"] < rows[cases.STOCK]["peak_bytes"]
    streaming = {row["kernel"] for row in result["kernels"]["rows"] if row["kind"] == "streaming"}
    assert {"events_from_dense: mark", "event lists: count", "event lists: emit"} <= streaming


@pytest.mark.parametrize("share", [1.0, 100.0])
def test_a_crossover_case_is_checked_and_measured(share):
    case = dataclasses.replace(cases.CROSSOVER[f"crossover-{share:g}"], framework=cases.REBUILT, batch=8, steps=50)
    case = dataclasses.replace(case, events=round(share / 100 * case.inputs * case.steps))
    result = measure.measure(case, measure.Settings(repeats=2, device=devices.Cuda()))
    assert all("ms" in row for row in result["rows"]), result["rows"]
    assert result["active_pct"] == pytest.approx(share, rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (100, 33, 65)])
def test_triton_kernels_are_their_twins(shape, readout, dtype):
    from sparse_backend.bench import fused_triton

    torch.manual_seed(0)
    current, grad = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
    current = (8 * current).round() / 8  # few sums round
    first, x = fused_dense.scan_forward(current, 0.5, 1.0, readout)
    got, got_x = fused_triton.scan_forward(current, 0.5, 1.0, readout)
    if readout:
        torch.testing.assert_close(got, first)
    else:
        assert torch.equal(got, first)
        torch.testing.assert_close(got_x, x)
    torch.testing.assert_close(
        fused_triton.scan_backward(grad, x, 0.5, 100), fused_dense.scan_backward(grad, x, 0.5, 100)
    )


def test_a_graph_reads_the_events_it_is_given():
    batch = Inputs(SMALL, 0, device="cuda").batch(SMALL.batch)
    net = build(SMALL).cuda()
    training.calibrate(net, SMALL, batch)
    runs = [graph.run_of(paths.PATHS[name], net, 0.2, batch) for name in (cases.GRAPH, cases.SEQUENCE_EVENTS)]
    silent = EventTensor(batch.events.shape, torch.zeros_like(batch.events.row_ptr), batch.events.indices)
    for run in runs:
        run.rotate([batch.events, silent])
    for _ in range(2):
        for run in runs:
            run.step()
        ours, plain = (run.gradients() for run in runs)
        assert plain["linears.2.bias"].any()
        for name, gradient in plain.items():
            torch.testing.assert_close(ours[name], gradient)
