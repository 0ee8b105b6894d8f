"""What only a GPU has: streams, several devices, captures, its memory. `make gpu-test` runs it.

test_cuda_device_ops.py has the ops against their twins there; test_cuda_kernels.py, on the emulated device.
"""

from __future__ import annotations

import subprocess
import sys

import emulation
import pytest
import test_ops as cases
import torch
from emulation import gpu
from helpers import dyadic, generator, normal

import sparse_backend
from sparse_backend import EventTensor
from sparse_backend import functional as F
from sparse_backend.ops import event_linear as event_linear_ops
from sparse_backend.ops import events as event_ops
from sparse_backend.ops import leaky as leaky_ops
from sparse_backend.ops import leaky_dense as leaky_dense_ops
from sparse_backend.ops import linear_leaky as linear_leaky_ops
from sparse_backend.ops.leaky import LeakyOutput

gpu.needed()

F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True, scope="module")
def kernels():
    gpu.load()


def test_kernels_are_registered_for_cuda():
    for op in emulation.OPS:
        name = f"sparse_backend::{emulation.name_of(op)}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


def layer(dtype=F64, device="cuda", steps=40, batch=7, inputs=90, neurons=70):
    random = generator(0)
    x = (torch.rand(steps, batch, inputs, generator=random) < 0.05).to(dtype)
    leaves = [
        normal((neurons, inputs), 1, dtype, 0.4),
        normal((neurons,), 2, dtype, 0.1),
        normal((9, neurons), 3, dtype),
    ]
    return x.to(device), [leaf.to(device).requires_grad_() for leaf in leaves]


def train(device, dtype=F64):
    x, leaves = layer(dtype, device)
    surrogate = cases.fast_sigmoid(5.0)
    hidden, _ = F.linear_leaky(x, leaves[0], leaves[1], beta=0.9, threshold=1.0, spike_grad=surrogate, b_th=0.3)
    spikes, _ = F.linear_leaky(hidden, leaves[2], beta=0.8, threshold=0.5, spike_grad=surrogate, b_th=0.3)
    loss = spikes.to_dense().square().sum() + hidden.to_dense().sum()
    loss.backward()
    return [hidden.to_dense(), spikes.to_dense(), *(leaf.grad for leaf in leaves)]


def test_layers_on_the_gpu_are_those_of_the_cpu():
    ours = train("cuda")
    assert all(tensor.is_cuda for tensor in ours)
    for one, other in zip(ours, train("cpu"), strict=True):
        cases.equal(one.detach().cpu(), other.detach().cpu())


def test_runs_are_bit_for_bit_the_same():
    first = train("cuda", F32)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, train("cuda", F32), strict=True))


def test_another_stream_waits_for_nobody_else():
    source = dyadic((500, 300), 1).cuda()
    expected = event_ops.events_from_dense(source, 1.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dense = torch.zeros(500, 300, device="cuda")
        torch.cuda._sleep(20_000_000)  # kernels on another stream would see the zeros
        dense.copy_(source)  # from the CPU it would itself wait for the stream
        got = event_ops.events_from_dense(dense, 1.0)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    x = event_ops.events_from_dense(torch.eye(40, device="cuda:1"), 1.0)
    assert torch.cuda.current_device() == 0 and x[1].device.index == 1
    assert x[1].tolist() == list(range(40))


def test_tensors_on_different_devices_are_named():
    x = event_ops.events_from_dense(torch.eye(4, device="cuda"), 1.0)
    with pytest.raises(RuntimeError, match=r"weight: expected a CUDA tensor, as another one is, got one on cpu"):
        event_linear_ops.event_linear(*x[:2], None, None, None, None, torch.ones(3, 4), None, None, 0)
    with pytest.raises(RuntimeError, match=r"beta: expected a tensor on cuda:0 as the other tensors, got cpu"):
        leaky_ops.leaky(
            torch.zeros(3, 2, 5, device="cuda"), torch.tensor(0.9), torch.tensor(1.0).cuda(), None, None,
            *cases.options(),
        )  # fmt: skip


def test_an_unsupported_dtype_is_named():
    with pytest.raises(RuntimeError, match=r"events_from_dense: expected float32 or float64"):
        event_ops.events_from_dense(torch.eye(4, device="cuda", dtype=torch.int64), 1.0)
    assert EventTensor.from_dense(torch.eye(4, device="cuda", dtype=torch.int64)).indices.tolist() == [0, 1, 2, 3]


# Half and bfloat16.

NARROW = [torch.float16, torch.bfloat16]


def three_layers(stored, dtype, x_dtype, density=0.05, autocast=False):
    """A leaky layer, a recurrent one and a readout, all numbers such as `stored` holds: outputs, gradients."""
    drawn = torch.rand(20, 4, 90, generator=generator(0))
    x = torch.where(drawn < density, drawn / density, 0).to(stored).to(x_dtype).cuda().requires_grad_()
    sizes = [(70, 90), (70,), (9, 70), (9, 9), (3, 9)]
    numbers = [normal(size, k, F32, 0.4).to(stored).to(dtype) for k, size in enumerate(sizes)]
    leaves = [leaf.cuda().requires_grad_() for leaf in numbers]
    weight, bias, second, recurrent, readout = leaves
    surrogate = cases.fast_sigmoid(5.0)
    with torch.autocast("cuda", dtype=stored, enabled=autocast):
        hidden, mem = F.linear_leaky(x, weight, bias, beta=0.9, threshold=1.0, spike_grad=surrogate, b_th=0.3)
        lif = F.linear_lif(
            hidden, second, mem_gain=0.5, syn_decay=0.8, recurrent=recurrent, spike_grad=surrogate, b_th=0.3
        )
        li = F.linear_li(lif.spikes, readout, mem_gain=0.1)
    (li.v.sum() + mem.sum()).backward()
    outputs = hidden.to_dense(), mem, lif.spikes.to_dense(), li.v
    assert all(out.dtype == F32 and bool(out.any()) for out in outputs)
    assert all(leaf.grad.dtype == leaf.dtype and bool(leaf.grad.any()) for leaf in (x, *leaves))
    return outputs, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_weights_are_their_widened_copies(dtype):
    """Membranes and sums are float32, bit for bit those of the copies; gradients are rounded where they arrive."""
    (ours, grads), (wide, wide_grads) = three_layers(dtype, dtype, dtype), three_layers(dtype, F32, F32)
    assert all(torch.equal(one, other) for one, other in zip(ours, wide, strict=True))
    for one, other in zip(grads, wide_grads, strict=True):
        rounded = torch.finfo(dtype).eps / 2 * other.abs() + 2e-5 * other.abs().max()  # test_ops' own for float32
        assert bool(((one.float() - other).abs() <= rounded).all())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x_dtype", [F32, *NARROW])
def test_autocast_on_cuda_casts_the_weight_and_nothing_else(dtype, x_dtype):
    (ours, _), (narrow, _) = three_layers(dtype, F32, x_dtype, autocast=True), three_layers(dtype, dtype, dtype)
    if x_dtype in (F32, dtype):  # the other one cannot hold the same input
        assert all(torch.equal(one, other) for one, other in zip(ours, narrow, strict=True))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_weights_of_a_dense_input(dtype, autocast):
    """torch's own linear, rounding its results, and float32 from there on."""
    three_layers(dtype, F32 if autocast else dtype, dtype, 0.9, autocast)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("fuse_time", [True, False])
def test_autocast_around_an_enabled_model(dtype, fuse_time):
    """Bit for bit a model whose weights hold such numbers already, its gradients rounded where they arrive."""
    snn = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(90, 70), torch.nn.Linear(70, 60)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_((3 * layer.weight).to(dtype).to(F32))
    surrogate = cases.fast_sigmoid(5.0)
    neurons = [snn.Leaky(0.9, spike_grad=surrogate, init_hidden=True) for _ in layers]

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.neurons = torch.nn.ModuleList(layers), torch.nn.ModuleList(neurons)

        def forward(self, x):
            for neuron in self.neurons:
                neuron.reset_mem()
            out = []
            for spk in x:
                for layer, neuron in zip(self.layers, self.neurons, strict=True):
                    spk = neuron(layer(spk))
                out.append(spk)
            return torch.stack(out)

    net = sparse_backend.enable(Net().cuda(), 0.3, fuse_time=fuse_time)
    x = (torch.rand(20, 4, 90, generator=generator(0)) < 0.05).float().cuda()
    results = []
    for narrow in (True, False):
        net.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=narrow):
            spikes = net(x).to_dense()
        spikes.sum().backward()
        results.append((spikes.detach(), [p.grad.clone() for p in net.parameters()]))
    (ours, grads), (wide, wide_grads) = results
    assert ours.dtype == F32 and bool(ours.any()) and torch.equal(ours, wide)
    for one, other in zip(grads, wide_grads, strict=True):
        assert bool(other.any())
        rounded = torch.finfo(dtype).eps / 2 * other.abs() + 2e-5 * other.abs().max()
        assert bool(((one - other).abs() <= rounded).all())
    assert all(layer.steps["framework"] == 0 for layer in sparse_backend.report(net).layers)


def test_the_dense_regime_can_be_captured():
    current = dyadic((6, 3, 50), 1).cuda()
    beta, threshold = torch.tensor(0.5, device="cuda"), torch.tensor(1.0, device="cuda")
    args = (beta, threshold, None, None, 0, True, cases.INF, False)
    leaky_dense_ops.leaky_dense(current, *args)
    graph = torch.cuda.CUDAGraph()
    static = current.clone()
    with torch.cuda.graph(graph):
        out = leaky_dense_ops.leaky_dense(static, *args)
    for seed in (2, 3):
        static.copy_(dyadic((6, 3, 50), seed))
        graph.replay()
        expected = leaky_dense_ops.leaky_dense(static.clone(), *args)
        assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))


def test_the_sparse_regime_can_be_captured_once_it_has_run():
    forward, _ = cases.big_layer(F32, "subtract", 1)
    args = tuple(arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in forward)
    weight = args[6]

    def check(captured):
        active, spikes = int(captured.active_ptr[-1]), int(captured.spike_ptr[-1])
        expected = LeakyOutput(*linear_leaky_ops.linear_leaky(*args))
        assert (active, spikes) == (expected.x.numel(), expected.spike_indices.numel())
        assert torch.equal(captured.x[:active], expected.x) and not bool(captured.x[active:].any())
        assert torch.equal(captured.spike_indices[:spikes], expected.spike_indices)
        assert torch.equal(captured.mem_seq, expected.mem_seq)

    with pytest.raises(RuntimeError, match="run before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        leaky_ops.leaky(torch.zeros(4, 3, 77, device="cuda"), *args[8:10], None, None, *cases.options())
    torch.cuda.synchronize()
    linear_leaky_ops.linear_leaky(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = LeakyOutput(*linear_leaky_ops.linear_leaky(*args))
    for factor in (1.0, 0.9, 1.1):
        weight.mul_(factor)
        graph.replay()
        check(captured)


SHORT = """
import torch
from sparse_backend import _native
from sparse_backend.ops import leaky as leaky_ops

torch.cuda.init()
_native.load()
current = torch.full((5, 3, 401), -9.0, device="cuda")
neuron = (torch.tensor(0.5, device="cuda"), torch.tensor(1.0, device="cuda"), None, None)
rest = (leaky_ops.NONE, True, 0.5, False, False, False, False, 1.0)
leaky_ops.leaky(current, *neuron, *rest)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    leaky_ops.leaky(current, *neuron, *rest)
graph.replay()
torch.cuda.synchronize()
print("as long as it fits", flush=True)
current.fill_(9.0)  # 6015 spikes, room for 1024
graph.replay()
torch.cuda.synchronize()
print("no further", flush=True)
"""


def test_a_replay_that_needs_more_room_than_there_is_fails():
    """In a process of its own, which can use the device no more."""
    answer = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, timeout=300)
    assert answer.stdout == "as long as it fits\n" and answer.returncode != 0
    assert "CUDA error" in answer.stderr


def test_out_of_memory_leaves_the_next_call_working():
    free, total = torch.cuda.mem_get_info()
    current = torch.zeros(64, 64, 4096, device="cuda")
    neuron = (torch.tensor(0.5, device="cuda"), torch.tensor(1.0, device="cuda"))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(max(torch.cuda.memory_reserved() / total, 1e-6) * 1.05)
    try:
        with pytest.raises(RuntimeError):  # torch's own, or what its stable ABI makes of it
            leaky_dense_ops.leaky_dense(current, *neuron, None, None, 0, True, cases.INF, True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    x, _, _ = leaky_dense_ops.leaky_dense(current, *neuron, None, None, 0, True, cases.INF, True)
    assert free > 0 and torch.equal(x, torch.full_like(x, -1.0))


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_out_of_memory_in_the_middle_of_a_layer_corrupts_nothing(fails):
    """Lists half made are dropped: the same call then gives the same bits."""
    x, leaves = layer(F32, steps=200, batch=64, inputs=700, neurons=500)
    events = EventTensor.from_dense(x)

    def run(between=lambda: None):
        for leaf in leaves[:2]:
            leaf.grad = None
        spikes, mem = F.linear_leaky(
            events, *leaves[:2], beta=0.9, threshold=1.0, spike_grad=cases.fast_sigmoid(5.0), b_th=0.3
        )
        between()
        (spikes.to_dense().square().sum() + mem.sum()).backward()
        return [spikes.to_dense().detach(), mem.detach(), *(leaf.grad for leaf in leaves[:2])]

    def no_more_memory():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (2 << 20)) / total)

    expected = run()
    before = [leaf.detach().clone() for leaf in leaves]
    try:
        with pytest.raises(RuntimeError):  # torch's own, or what its stable ABI makes of it
            if fails == "forward":
                no_more_memory()
            run(no_more_memory)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))


def test_more_events_than_an_index_counts_are_named():
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")
    dense = torch.ones(1 << 16, (1 << 15) + 5, dtype=torch.bool, device="cuda")
    with pytest.raises(RuntimeError, match=r"events: expected fewer than 2\*\*31, got more"):
        event_ops.events_from_dense(dense, 1.0)


def test_more_entries_than_an_index_counts():
    """2**31 entries and more of a dense tensor; the events are few."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    dense = torch.zeros(1 << 16, (1 << 15) + 5, dtype=torch.bool, device="cuda")
    where = torch.tensor([[0, 3], [1 << 15, 77], [(1 << 16) - 1, (1 << 15) + 4]], device="cuda")
    dense[where[:, 0], where[:, 1]] = True
    row_ptr, indices, _ = event_ops.events_from_dense(dense, 1.0)
    assert indices.tolist() == where[:, 1].tolist() and int(row_ptr[-1]) == 3
    back = event_ops.events_to_dense(torch.zeros(0, device="cuda"), row_ptr, indices, None, None, None, dense.shape[1])
    assert torch.equal(back.bool(), dense)
