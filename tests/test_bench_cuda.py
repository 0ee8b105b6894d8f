"""The benchmark on a GPU, as far as a machine without one can tell: the same code measures a CPU in its place.

tests/test_cuda_device_bench.py has what needs a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_backend import EventTensor
from sparse_backend.bench import (
    cases,
    devices,
    for_rebuilt,
    for_snntorch,
    fused_dense,
    graph,
    kernels,
    leaky_nets,
    machine,
    main,
    measure,
    paths,
    render,
    training,
)
from sparse_backend.bench.gate import Gate, may_flip
from sparse_backend.bench.inputs import Inputs
from sparse_backend.bench.models import build, loss_of

ROOT = Path(__file__).resolve().parents[1]
TINY = cases.Case(
    "tiny", 30, (16, 12), 4, steps=10, events=12, coding="latency", aim=15.0, aim_at="spikes", batch=16, train_steps=2,
    trains_with=cases.SEQUENCE_EVENTS, paths=cases.GPU_PATHS, kernels=True,
)  # fmt: skip
CROSSING = dataclasses.replace(
    TINY, name="crossing", coding="random", paths=cases.CROSSOVER_PATHS, train_steps=0, kernels=False, crossover=15.0,
    events=45,
)  # fmt: skip
OURS = (cases.SEQUENCE, cases.SEQUENCE_EVENTS, cases.GRAPH, cases.LOOP, cases.LOOP_EVENTS)


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _calibrated(case):
    torch.manual_seed(0)
    net = build(case)
    training.calibrate(net, case, Inputs(case, 0).batch(16))
    return net


def _net(case=TINY):
    return copy.deepcopy(_calibrated(case))


def _gate(case=TINY):
    inputs = Inputs(case, 0)
    batch = inputs.batch(case.batch)
    return Gate(case, _net(case), inputs.batch(8), batch, batch.dense())


# The registry.


def test_registry_is_consistent():
    for name, case in cases.GPU_CASES.items():
        assert case.name == name and set(case.paths) <= set(paths.PATHS)
        assert cases.Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
        assert case.trains_with == cases.SEQUENCE_EVENTS, "training needs no framework"
        assert case.crossover is not None or case.paths[0] == cases.STOCK
    sizes = {(case.inputs, case.steps, case.hidden) for case in cases.GPU_CASES.values() if case.batch == 256}
    for configuration in ((784, 100), (1156, 300), (700, 500)):
        assert {(*configuration, (n, n)) for n in (100, 200, 400, 600, 800, 1000)} <= sizes
    large = cases.GPU_CASES["cuda-shd-4096"]
    assert (large.steps, large.batch, large.hidden) == (500, 16, (4096, 4096))


def test_what_matters_comes_first():
    names = list(cases.GPU_CASES)
    assert names[:4] == ["cuda-shd-200", "cuda-nmnist-200", "cuda-fmnist-200", "cuda-shd-4096"]
    assert cases.GPU_CASES[names[0]].kernels and sum(case.kernels for case in cases.GPU_CASES.values()) == 1
    assert names[4:11] == list(cases.CROSSOVER)
    quick = [case.name for case in cases.quick(list(cases.GPU_CASES.values()), "cuda")]
    assert quick[:3] == names[:3] and len(quick) < 8
    one = [cases.GPU_CASES["cuda-shd-800"]]
    assert cases.quick(one, "cuda") == one


def test_crossover_goes_from_a_thousandth_to_all():
    shares = sorted(case.crossover for case in cases.CROSSOVER.values())
    assert shares[0] == 0.1 and shares[-1] == 100.0
    for case in cases.CROSSOVER.values():
        assert case.aim == case.crossover
        assert case.events == pytest.approx(case.crossover / 100 * case.inputs * case.steps, abs=0.5)


def test_targets_are_those_of_the_gpu():
    def limits(case, path):
        found = [target for target in cases.TARGETS if (target.case, target.path) == (case, path)]
        return {(target.quantity, target.against): target.limit for target in found}

    for name, whole in (
        ("cuda-shd-200", 150),
        ("cuda-nmnist-1000", 100),
        ("cuda-fmnist-100", 50),
        ("cuda-shd-4096", 150),
    ):
        got = limits(name, cases.SEQUENCE_EVENTS)
        assert got["whole", cases.STOCK] == whole and got["backward", cases.STOCK] == 150
        assert got["whole", cases.FUSED] == 3
        assert got["kept", cases.STOCK] == 0.05 and got["peak", cases.STOCK] == 0.10
        assert limits(name, cases.LOOP)["recording", cases.SEQUENCE] == 4
        assert limits(name, cases.GRAPH)["whole", cases.FUSED_GRAPH] == 3, "a graph against a graph"
    assert 1 / limits("crossover-0.1", cases.SEQUENCE)["whole", cases.FUSED] == pytest.approx(1.05)
    peak = cases.Target("c", "p", "peak", 0.1)
    assert peak.reached(0.1) and not peak.reached(0.11) and peak.text == "peak ≤ 10 %"
    assert cases.Target("c", "p", "whole", 3, cases.FUSED).text == "whole ≥ 3× against the fused dense loop"
    row, stock = {"peak_bytes": 5, "ms": {}}, {"peak_bytes": 100}
    assert measure._got(TINY, peak, row, stock) == 0.05


# Stock, rebuilt.


class _Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "view" not in str(function)
        return function(*args, **(kwargs or {}))


def _trained_step(net, batch):
    with _Counting() as counting:
        output = net(batch.dense())
        loss = loss_of(output, batch.labels)
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return output, gradients, counting.calls


@pytest.mark.parametrize("net", ["feedforward", "forced", "conv"])
def test_rebuilt_stock_is_snntorch_bit_for_bit(net):
    case = dataclasses.replace(TINY, net=net)
    if net == "conv":
        case = dataclasses.replace(cases.CASES["conv"], steps=4, batch=4, aim=20.0)
    batch = Inputs(case, 0).batch(case.batch)
    stock = build(case)
    if net == "conv":
        stock.fc.weight.data *= 20
    training.calibrate(stock, case, batch)
    rebuilt = build(dataclasses.replace(case, framework=cases.REBUILT))
    rebuilt.load_state_dict(stock.state_dict(), strict=False)
    (ours, our_gradients, our_calls), (output, gradients, calls) = (_trained_step(n, batch) for n in (rebuilt, stock))
    assert output.spikes.any() and not output.spikes.all()
    assert torch.equal(ours.spikes, output.spikes) and torch.equal(ours.mem, output.mem)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any() and torch.equal(our_gradients[name], gradient), name
    assert 0.5 * calls < our_calls <= calls, "stock may not be made slower than it is"


def test_rebuilt_framework_answers_what_is_asked():
    assert set(for_rebuilt.__all__) - {"Leaky"} == set(for_snntorch.__all__) - {"neurons"}
    assert for_rebuilt.SURROGATES["fast_sigmoid"][0] == for_snntorch.SURROGATES["fast_sigmoid"][0]


def test_snntorch_is_rebuilt_where_it_is_absent(monkeypatch):
    assert cases.for_this_machine(TINY) == TINY
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cases.for_this_machine(TINY).framework == cases.REBUILT
    norse = cases.CASES["norse-shd"]
    assert cases.for_this_machine(norse) == norse


# The fused dense loop.

BETA = 0.875


def _plain(current, threshold, readout):
    """The loop as docs/design.md has it, differentiable."""
    mem, spikes, out = torch.zeros_like(current[0]), torch.zeros_like(current[0]), []
    surrogate = leaky_nets._keep_dtype(for_rebuilt.SURROGATES["fast_sigmoid"][1]())
    for one in current:
        mem = BETA * mem + one - (0 if readout else spikes.detach() * threshold)
        spikes = surrogate(mem - threshold)
        out.append(mem if readout else spikes)
    return torch.stack(out)


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("readout", [False, True])
def test_the_scans_twin_is_the_plain_loop(steps, readout):
    current = (1.2 * torch.randn(steps, 3, 5, dtype=torch.float64)).requires_grad_()
    expected = _plain(current, 0.75, readout)
    assert expected.any()
    grad = torch.randn_like(expected)
    expected.backward(grad)
    first, x = fused_dense.scan_forward(current.detach(), BETA, 0.75, readout)
    assert torch.equal(first, expected.detach()) and (x is None) == readout
    delta = fused_dense.scan_backward(grad, x, BETA, fused_dense.SLOPE)
    torch.testing.assert_close(delta, current.grad, rtol=1e-12, atol=1e-14)


def _fused(kind):
    return dataclasses.replace(
        paths.PATHS[cases.FUSED], prepare=lambda net, b_th: fused_dense.forward_of(net, kind), note=None
    )


@pytest.mark.parametrize("kind", ["plain PyTorch", "this project's dense kernels"])
@pytest.mark.parametrize("framework", ["snntorch", cases.REBUILT])
def test_gate_passes_the_fused_dense_loop(kind, framework):
    verdict = _gate(dataclasses.replace(TINY, framework=framework)).judge(_fused(kind))
    assert verdict.problem is None
    assert verdict.numbers["gradient_cosine"] > 0.999, "in float32 on the whole batch too"


def test_gate_refuses_a_fused_dense_loop_that_is_wrong(monkeypatch):
    gate = _gate()
    monkeypatch.setattr(fused_dense, "SLOPE", 99)
    assert "gradient" in str(gate.judge(_fused("plain PyTorch")).problem)


def test_the_fused_dense_loop_keeps_one_tensor_a_layer_and_its_spikes():
    net, batch = _net(), Inputs(TINY, 0).batch(16)
    run = paths.Run(_fused("plain PyTorch"), net, 0.2, batch)
    entries = TINY.steps * 16 * sum(TINY.hidden)
    readout = loss_of(run.forward(run.input), run.labels).element_size() * 16 * TINY.classes
    assert 2 * 4 * entries <= run.kept_bytes() <= 2 * 4 * entries + 8 * readout


def test_the_kind_of_scan_is_told(monkeypatch):
    def kind(device, triton):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
        return fused_dense.kind_for(torch.device(device))

    assert kind("cuda", triton=True) == "Triton kernels"
    assert kind("cuda", triton=False) == kind("cpu", triton=True) == "this project's dense kernels"
    assert "one matrix product over T * B a layer, scans by this project's" in paths.PATHS[cases.FUSED].note(
        torch.device("cpu")
    )


AGAINST_TWINS = """
import torch
from sparse_backend.bench import fused_dense, fused_triton
torch.manual_seed(0)
for steps, batch, neurons in ((1, 1, 1), (7, 3, 5), (20, 4, 40)):
    for dtype in (torch.float32, torch.float64):
        for readout in (False, True):
            current, grad = (torch.randn(steps, batch, neurons, dtype=dtype) for _ in range(2))
            current = (8 * current).round() / 8  # sums are exact
            first, x = fused_dense.scan_forward(current, 0.5, 1.0, readout)
            got, got_x = fused_triton.scan_forward(current, 0.5, 1.0, readout)
            assert torch.equal(got, first) and (readout or torch.equal(got_x, x))
            expected = fused_dense.scan_backward(grad, x, 0.5, 100)
            torch.testing.assert_close(fused_triton.scan_backward(grad, x, 0.5, 100), expected)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_are_their_twins():
    """In Triton's interpreter; tests/test_cuda_device_bench.py runs them on a GPU."""
    folders = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": folders, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", AGAINST_TWINS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("spikingjelly") is None, reason="SpikingJelly is not installed")
def test_gate_passes_spikingjelly_and_refuses_another_neuron():
    gate, path = _gate(), paths.PATHS[cases.SPIKINGJELLY]
    verdict = gate.judge(path)
    assert verdict.problem is None and verdict.numbers["gradient_cosine"] > 0.999
    assert gate.judge(dataclasses.replace(path, judge=lambda net: net)).problem is not None


def test_without_spikingjelly_its_path_is_left_out(monkeypatch):
    for name in ("spikingjelly", "spikingjelly.activation_based"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(paths.Unavailable, match="SpikingJelly is not installed"):
        _gate().judge(paths.PATHS[cases.SPIKINGJELLY])


# Time, memory, captures.


class Ticking(devices.Cpu):
    """A clock that goes on by a second at each look."""

    waits = 0

    def __init__(self):
        self._clock = itertools.count()

    def mark(self):
        return next(self._clock)

    def wait(self):
        self.waits += 1


@pytest.mark.parametrize("name", [cases.SEQUENCE_EVENTS, cases.GRAPH])
def test_a_step_is_timed_by_its_device(name):
    run = graph.run_of(paths.PATHS[name], _net(), 0.2, Inputs(TINY, 0).batch(4))
    run.device = Ticking()
    times = run.step()
    parts = 3 if name == cases.GRAPH else 4
    assert times == paths.Times(1.0, 1.0, parts) and run.device.waits == 1


def test_a_gpus_seconds_are_of_its_events(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            assert other.waited
            return 1e3 * (other.at - self.at)

    clock = itertools.count()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = devices.Cuda()
    start, _, end = gpu.mark(), gpu.mark(), gpu.mark()
    assert gpu.between(start, end) == 2.0


def test_a_gpu_captures_in_one_pool_after_warming_up_aside(monkeypatch):
    seen = []

    class Graph:
        def replay(self):
            seen.append("replayed")

    class Stream:
        def wait_stream(self, other):
            seen.append("waited")

    @contextlib.contextmanager
    def aside(stream):
        yield seen.append("aside")

    @contextlib.contextmanager
    def captured(graph, pool):
        yield seen.append(pool)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", aside)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    replays = devices.Cuda().capture(lambda: seen.append(1), lambda: seen.append(2))
    assert seen == ["waited", "aside", *[1, 2] * devices.Cuda.warm, "waited", "pool", 1, "pool", 2]
    for replay in replays:
        replay()
    assert len(replays) == 2 and seen[-2:] == ["replayed"] * 2


def test_a_gpus_memory_and_kernels(monkeypatch):
    for name, value in (("synchronize", None), ("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    assert devices.Cuda().peak_bytes(lambda: calls.append("step")) == 250 and calls == ["reset", "step"]

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    time = SimpleNamespace(elapsed_us=lambda: 5.0)
    seconds = [
        devices.Cuda()._kernel_seconds(SimpleNamespace(device_type=device, is_user_annotation=note, time_range=time))
        for device, note in ((cuda, False), (cuda, True), (cpu, False))
    ]
    assert seconds == [pytest.approx(5e-6), None, None]


def test_a_gpu_is_described(monkeypatch):
    gpu = SimpleNamespace(
        name="G", major=9, minor=0, multi_processor_count=2, total_memory=3 << 30, L2_cache_size=4 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    monkeypatch.setattr(devices.Cuda, "copy_rate", lambda self: 5e9)
    monkeypatch.setattr(machine, "_driver", lambda: "1.2")
    described = machine.describe(devices.Cuda())
    assert described["machine"]["gpu"] == GPU
    assert described["versions"]["driver"] == "1.2" and described["kernels"]["state"] == "not loaded"
    assert devices.Cuda().cache_bytes == 16 << 20
    assert "gpu" not in machine.describe(devices.Cpu())["machine"]


def test_the_driver_is_unknown_where_nobody_answers(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._driver() is None


def test_inputs_are_gone_through_in_turn():
    run = paths.Run(paths.PATHS[cases.SEQUENCE_EVENTS], _net(), 0.2, Inputs(TINY, 0).batch(4))
    size = run.input.row_ptr.nbytes + run.input.indices.nbytes
    inputs = measure.copies(run.input, 3 * size + 1)
    assert len(inputs) == 4 and len({x.indices.data_ptr() for x in inputs}) == 4
    assert all(torch.equal(x.indices, run.input.indices) and torch.equal(x.row_ptr, run.input.row_ptr) for x in inputs)
    run.rotate(inputs)
    seen = []
    for _ in range(5):
        run.step()
        seen.append(run.input.indices.data_ptr())
    assert seen[:4] == [x.indices.data_ptr() for x in inputs] and seen[4] == seen[0]
    assert len(measure.copies(torch.zeros(4), 0)) == 1
    assert sum(x.nbytes for x in measure.copies(torch.zeros(4), 100)) >= 100


def test_a_captured_run_computes_the_same_of_the_input_it_is_given():
    net, inputs = _net(), Inputs(TINY, 0)
    batch, other = inputs.batch(8), inputs.batch(8)
    run, plain = (graph.run_of(paths.PATHS[name], net, 0.2, batch) for name in (cases.GRAPH, cases.SEQUENCE_EVENTS))
    assert isinstance(run, graph.CapturedRun) and not isinstance(plain, graph.CapturedRun)
    for samples in (None, torch.tensor([1, 5])):
        got, expected = run.evaluate(samples), plain.evaluate(samples)
        assert got.loss == expected.loss and torch.equal(got.mem, expected.mem)
        assert all(torch.equal(got.gradients[name], gradient) for name, gradient in expected.gradients.items())
    run._capture(None)
    few = min(batch.events.nnz, other.events.nnz)  # a graph's input has a fixed number of events
    changed = EventTensor(other.events.shape, other.events.row_ptr.clamp(max=few), other.events.indices[:few])
    room = EventTensor(run._static.shape, run._static.row_ptr, run._static.indices[:few].clone())
    run._static = room
    run.rotate([changed])
    run.step()
    expected = paths.Run(paths.PATHS[cases.SEQUENCE_EVENTS], net, 0.2, dataclasses.replace(batch, events=changed))
    gradients = expected.evaluate().gradients
    assert any(gradient.any() for gradient in gradients.values())
    assert all(torch.equal(run.gradients()[name], gradient) for name, gradient in gradients.items())


def test_no_earlier_pass_lives_when_a_captured_one_begins():
    """Its nodes would be taken again, and with them the stream they were made on."""
    run = graph.run_of(paths.PATHS[cases.GRAPH], _net(), 0.2, Inputs(TINY, 0).batch(4))
    forward, alive = run.forward, []
    run.forward = lambda x: [alive.append(run._loss), forward(x)][1]
    run.evaluate()
    run.step()
    assert alive == [None] * 3 and run._loss.requires_grad


def test_what_cannot_be_captured_is_left_out(monkeypatch):
    def fail(self, *works):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(devices.Cpu, "capture", fail)
    case = dataclasses.replace(TINY, paths=(cases.STOCK, cases.GRAPH), kernels=False)
    row = measure.measure(case, measure.Settings(repeats=1))["rows"][1]
    assert row["left_out"] == "it cannot be captured: operation not permitted when stream is capturing"
    assert "ms" not in row


def test_a_capture_that_fails_after_the_check_leaves_the_other_paths(monkeypatch):
    def run_of(path, *rest):
        if path.captured:
            raise paths.Unavailable("it cannot be captured: no memory")
        return graph.run_of(path, *rest)

    monkeypatch.setattr(measure, "run_of", run_of)
    case = dataclasses.replace(TINY, paths=(cases.STOCK, cases.GRAPH), kernels=False)
    stock, captured = measure.measure(case, measure.Settings(repeats=1))["rows"]
    assert "ms" in stock and captured["left_out"] == "it cannot be captured: no memory"


def test_a_copy_rate_is_that_of_the_clock():
    device = Ticking()
    device.copy_bytes = 4096
    assert device.copy_rate() == 2 * 4096


# Kernel by kernel.


def test_cuda_kernels_are_named_as_their_sources_name_them():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    named = [kernel.pattern for kernel in kernels.KERNELS["cuda"] if kernel.kind != "rest"]
    for pattern in named:
        name = pattern.split(r"\b")[1]
        assert f" {name}(" in sources, name
    assert len(named) == 10


SEEN = {
    "void sparse_backend::(anonymous namespace)::mark_nonzero_kernel<float, float>(float const*)": (1, 2e-3),
    "void sparse_backend::(anonymous namespace)::forward_kernel<float, 0, false, false>(X)": (3, 3e-3),
    "void sparse_backend::(anonymous namespace)::backward_kernel<float, 0, false>(X)": (3, 1e-3),
    "void sparse_backend::(anonymous namespace)::dense_backward_kernel<float, 0, false>(X)": (1, 5e-3),
    "void at::native::max_backward_kernel<float>(X)": (2, 7e-3),
    "Memset (Device)": (1, 1e-3),
}


class Profiled(devices.Cpu):
    type = "cuda"

    def kernels(self, step, repeats):
        return {name: devices.Launches(*seen) for name, seen in SEEN.items()}

    def copy_rate(self):
        return 1e9


def _sequence_run(case=TINY):
    return paths.Run(paths.PATHS[cases.SEQUENCE], _net(case), 0.2, Inputs(case, 0).batch(case.batch))


def test_kernels_are_held_against_what_must_move():
    table = kernels.table(_sequence_run(), Profiled())
    rows = {row["kernel"]: row for row in table["rows"]}
    rest = ["other kernels of ours", "torch: surrogate, loss, optimiser, copies"]
    assert list(rows) == ["events_from_dense: mark", "scan", "reverse scan, δ", *rest]
    mark = rows["events_from_dense: mark"]
    moved = 4 * 10 * 16 * 30 + 4 * 10 * 16  # the dense input, and a word of bits a row
    assert mark["bytes"] == moved and mark["times"] == pytest.approx(2e-3 * 1e9 / moved) and not mark["reached"]
    assert rows["scan"]["us_per_step"] == pytest.approx(300) and rows["scan"]["launches"] == 3
    assert rows["other kernels of ours"]["ms"] == pytest.approx(5)
    assert rows["torch: surrogate, loss, optimiser, copies"]["ms"] == pytest.approx(8)


def test_layers_are_counted():
    run = _sequence_run()
    xs = training.hidden_x(run.net, Inputs(TINY, 0).batch(TINY.batch))
    made = kernels.layers_of(run)
    assert [(layer.inputs, layer.neurons, layer.dense_input) for layer in made] == [
        (30, 16, True), (16, 12, False), (12, 4, False),
    ]  # fmt: skip
    assert made[0].events == int(run.input.count_nonzero()) and made[1].events == made[0].spikes > 0
    for layer, x in zip(made[:2], xs, strict=True):
        assert layer.rows == 160
        assert layer.spikes == int((x > 0).sum()) and layer.active == int((x.abs() < 0.2).sum())
    assert not run.net.return_hidden


def test_bytes_of_a_layer_by_hand():
    layer = kernels.Layer(rows=10, inputs=33, neurons=64, events=7, active=5, spikes=3, dense_input=True)
    moved = {kernel.label: kernel.moved(layer) for kernel in kernels.KERNELS["cuda"] if kernel.kind == "streaming"}
    assert list(moved.values()) == [
        4 * 330 + 80,
        80 + 2 * 80,
        80 + 4 * 17 + 2 * 80 + 4 * (20 + 3 + 15),
        4 * 17 + 80,
    ]
    later = layer._replace(dense_input=False)
    moved = [kernel.moved(later) for kernel in kernels.KERNELS["cuda"] if kernel.kind == "streaming"]
    assert moved == [0, 160, 160 + 4 * 38, 4 * 17 + 80]


def test_a_cpus_kernels_are_its_ops():
    found = devices.Cpu().kernels(_sequence_run().step, 2)
    assert found["sparse_backend::linear_leaky"].launches == 3 and found["sparse_backend::linear_leaky"].seconds > 0


# Activity.


def test_dense_kernels_count_what_stock_does():
    """snnTorch asks its surrogate twice a step, first for the reset."""
    net, batch = _net(CROSSING), Inputs(CROSSING, 0).batch(16)
    asked = [[] for _ in net.neurons]

    def wrap(layer, spike_grad):
        return lambda x: asked[layer].append(x) or spike_grad(x)

    with for_snntorch.intercepted(net, wrap), torch.no_grad():
        net(batch.dense())
    xs = [torch.stack(calls[1::2]) for calls in asked[:2]]
    got = training.dense_activity(net, batch, 0.2)
    assert got.spikes == pytest.approx([100 * float((x > 0).double().mean()) for x in xs])
    assert got.active == pytest.approx([100 * float((x.abs() < 0.2).double().mean()) for x in xs])


@pytest.mark.parametrize("share", [0.1, 10.0, 60.0])
def test_the_band_is_made_to_fit(share):
    net, batch = _net(CROSSING), Inputs(CROSSING, 0).batch(16)  # membranes that differ
    b_th = training.fitted_band(net, share, batch)
    got = training.dense_activity(net, batch, b_th).active
    hidden = sum(active * n for active, n in zip(got, CROSSING.hidden, strict=True)) / sum(CROSSING.hidden)
    assert hidden == pytest.approx(share, rel=0.02, abs=0.05)
    assert training.fitted_band(net, 100.0, batch) == math.inf


def test_random_input_has_the_stated_events():
    for share in (0.02, 1.0):
        events = round(share * 30 * 10)
        batch = Inputs(dataclasses.replace(CROSSING, events=events), 0).batch(64)
        EventTensor(batch.events.shape, batch.events.row_ptr, batch.events.indices)  # its parts fit together
        assert batch.events_per_sample == pytest.approx(events, rel=0.15)
    assert batch.events.density == 1.0


def test_the_same_batches_again():
    inputs = Inputs(TINY, 0)
    first = [inputs.batch(4), inputs.batch(2)]
    inputs.rewind()
    assert all(a is b for a, b in zip(first, [inputs.batch(4), inputs.batch(2)], strict=True))
    assert inputs.batch(4) is not first[0]


def test_more_samples_may_flip_where_there_is_more_to_round():
    def share(name):
        return round(may_flip(cases.GPU_CASES[name]), 2)

    assert [share(f"cuda-shd-{n}") for n in (200, 1000, 4096)] == [0.05, 0.25, 0.5]
    assert [share(f"crossover-{n}") for n in (1, 30)] == [0.05, 0.18]


# The command, with a CPU in the GPU's place.


class StandIn(devices.Cpu):
    cache_bytes = 1 << 14
    warm = 2
    copy_bytes = 1 << 16

    def peak_bytes(self, step):
        step()
        return 1000


GPU = {
    "name": "G", "capability": "9.0", "processors": 2, "memory_gb": 3, "cache_mb": 4, "copy_gb_s": 5, "tf32": False,
}  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch):
    registry = {case.name: case for case in (TINY, CROSSING)}
    monkeypatch.setattr(cases, "GPU_CASES", registry)
    monkeypatch.setattr(devices, "choose", lambda name: StandIn())
    described = machine.describe()
    described["machine"]["gpu"] = GPU
    described["versions"] |= {"driver": "1.2", "cuda": "13.0"}
    monkeypatch.setattr(machine, "describe", lambda device=None: described)
    targets = (
        cases.Target("tiny", cases.SEQUENCE, "whole", 1e-6, cases.FUSED),
        cases.Target("tiny", cases.SEQUENCE, "peak", 0.1),
        cases.Target("crossing", cases.SEQUENCE, "whole", 1e-6, cases.FUSED),
    )
    monkeypatch.setattr(measure, "TARGETS", targets)
    return registry


def test_main_measures_writes_and_renders(stand_in, tmp_path, capsys):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    file = folder / "gpu.json"
    assert main(["--device", "cuda", "--repeats", "2", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for words in (
        "fused dense loop: one matrix product",
        "Kernels of one step",
        "event input ms",
        "peak MB",
        "G, 3 GB",
    ):
        assert words in out
    content = json.loads(file.read_text())
    assert content["title"] == "GPU" and content["machine"]["gpu"] == GPU and content["commit"] == machine._commit()
    tiny, crossing = content["cases"]
    rows = {row["path"]: row for row in tiny["rows"]}
    assert list(rows) == list(cases.GPU_PATHS)
    for name in (cases.STOCK, cases.FUSED, cases.FUSED_GRAPH, *OURS):
        assert set(rows[name]["ms"]) == set(render.PARTS), rows[name].get("refused")
        assert ("peak_bytes" in rows[name]) == ("kept_bytes" in rows[name]) == (not paths.PATHS[name].captured)
    assert rows[cases.SEQUENCE]["peak_share"] == 1
    assert [target["reached"] for target in rows[cases.SEQUENCE]["targets"]] == [True, False]
    assert tiny["kernels"]["copy_gb_s"] > 0 and tiny["kernels"]["rows"][0]["kind"] == "streaming"
    assert crossing["active_pct"] == pytest.approx(15, abs=0.5) and crossing["case"]["b_th"] != CROSSING.b_th

    assert main(["--render", str(folder)]) == 0
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    for words in (
        "## GPU", "### tiny: 30-16-12-4", "| events_from_dense | streaming | 1 |", "CUDA events",
        "### Crossover: 30-16-12-4, T 10, B 16", "| 15 % | ", "at most 1.05× of it: 1 of 1",
        "G, 3 GB, capability 9.0, copies at 5 GB/s", "cuda 13.0", "driver 1.2",
    ):  # fmt: skip
        assert words in text
    assert "### crossing" not in text and "Not measured" not in text
    table = render.summary([render.load(file)])
    assert "| tiny: 30-16-12-4, T 10 | " in table and "crossing" not in table and "your loop, dense input" in table
    medians = {cases.STOCK: 100, cases.FUSED: 10, cases.FUSED_GRAPH: 4, cases.SEQUENCE: 5, cases.GRAPH: 2}
    for name, median in medians.items():
        rows[name]["ms"]["whole"]["median"] = median
    table = render.summary([content])
    assert "| 20.0× / 2.0× | " in table and "| 50.0× / 2.0× | " in table, "a graph is held against a graph"


def test_a_case_that_fails_does_not_end_the_run(stand_in, tmp_path, monkeypatch, capsys):
    own, file = measure.measure, tmp_path / "a.json"

    def fail(case, *rest):
        if case.name == "crossing":
            assert json.loads(file.read_text())["cases"][0]["case"]["name"] == "tiny", "written after each case"
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return own(case, *rest)

    monkeypatch.setattr(measure, "measure", fail)
    stand_in["tiny"] = dataclasses.replace(TINY, paths=(cases.STOCK, cases.SEQUENCE), kernels=False)
    assert main(["--device", "cuda", "--repeats", "1", "--json", str(file)]) == 1
    failure = "crossing: FAILED, OutOfMemoryError: CUDA out of memory"
    assert failure + "\n" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert [result["case"]["name"] for result in content["cases"]] == ["tiny"]
    assert content["failed"] == {"crossing": "OutOfMemoryError: CUDA out of memory"}
    assert f"- {failure}\n" in render.markdown([content])
    content["failed"]["tiny"] = "measured in another file"
    assert "tiny: FAILED" not in render.markdown([content])


def test_a_run_whose_cases_all_fail_is_written_too(stand_in, tmp_path, monkeypatch):
    def fail(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr(measure, "measure", fail)
    file = tmp_path / "a.json"
    assert main(["--device", "cuda", "--json", str(file)]) == 1
    content = json.loads(file.read_text())
    assert content["cases"] == [] and content["failed"] == dict.fromkeys(stand_in, "AttributeError: no such thing")
    assert "## GPU" in render.markdown([content])


def test_without_snntorch_stock_is_rebuilt_and_says_so(stand_in, monkeypatch, capsys):
    own = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "snntorch" else own(name))
    assert main(["--device", "cuda", "--case", "tiny", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "snnTorch was not installed: *stock* is its loop rebuilt" in out
    assert "unmodified loop, fused, dense input: LEFT OUT, it needs snnTorch, which is not installed" in out
    assert "REFUSED" not in out


def test_crossover_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(cases, "CROSSOVER", {"crossing": CROSSING})
    assert main(["--crossover", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "B 32" in out and "15 %" in out and "fused dense ms" in out


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_without_a_gpu_it_says_what_to_do(cuda, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert main(["--device", "cuda"]) == 1
    error = capsys.readouterr().err
    assert "--device cuda: expected a GPU that torch can use, got " in error
    assert ("built without CUDA" if cuda is None else "nvidia-smi") in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cuda", "--case", "fmnist"], "expected one of tiny, crossing, got 'fmnist'"),
        (["--case", "tiny"], "expected one of fmnist, "),
        (["--device", "cuda", "--rss"], "on a GPU peak memory is measured anyway"),
    ],
)
def test_main_says_what_is_wrong(stand_in, argv, words, capsys):
    assert main(argv) == 1
    assert words in capsys.readouterr().err


def test_list(capsys):
    assert main(["--device", "cuda", "--list"]) == 0
    assert "cuda-shd-4096        700-4096-4096-20, T 500" in capsys.readouterr().out


# The documents.


def test_documents_say_where_no_gpu_was_measured(stand_in, tmp_path):
    file = tmp_path / "a.json"
    stand_in["tiny"] = dataclasses.replace(TINY, paths=(cases.STOCK, cases.SEQUENCE, cases.FUSED), kernels=False)
    assert main(["--device", "cuda", "--case", "tiny", "--repeats", "1", "--json", str(file)]) == 0
    of_gpu = json.loads(file.read_text())
    of_cpu = json.loads(file.read_text())
    del of_cpu["machine"]["gpu"]
    of_cpu["title"] = "CPU"
    assert "Not measured: " in render.markdown([of_cpu]) and "Not measured" not in render.markdown([of_cpu, of_gpu])
    both = render.summary([of_gpu, of_cpu])
    assert both.index("One training step against stock snnTorch") < both.index("One training step on a GPU")
    assert "on a GPU" not in render.summary([of_cpu])
    alone = render.summary([of_gpu])
    assert "fused ms" in alone and "the unmodified model after" not in alone
