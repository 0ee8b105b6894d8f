"""Spikes in sparse form wherever user code expects a tensor: same answers, and nothing stale after a write."""

from __future__ import annotations

import copy
import math
import operator
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional
from helpers import assert_close, fast_sigmoid, normal, spikes
from torch import Tensor

from sparse_backend import EventTensor, functional
from sparse_backend.deferred import DeferredCurrent, WeightHub
from sparse_backend.tensorlike import TensorLike

SHAPE = (4, 3, 5)
DENSE = spikes(SHAPE, 0.15, 0, torch.float32)
WEIGHT = normal((6, 5), 1, torch.float32)


@pytest.fixture
def spk():
    """Events without gradient."""
    return EventTensor.from_dense(DENSE)


def layer_output(seed=0):
    """Spikes of a layer of ours with a compact handle, and the weight behind them."""
    weight = normal((5, 5), seed, torch.float32, 0.6).requires_grad_()
    x = spikes(SHAPE, 0.15, seed, torch.float32)
    out = functional.linear_leaky(x, weight, beta=0.9, threshold=0.5, spike_grad=fast_sigmoid(5.0), b_th=0.3)
    assert type(out.spikes) is EventTensor
    assert out.spikes.active_ptr is not None, "the draw must stay sparse"
    return out.spikes, weight


def next_layer(x):
    """A consumer that would take the events."""
    return functional.linear_leaky(x, WEIGHT, beta=0.9, spike_grad=fast_sigmoid(5.0), b_th=0.5, return_mem=True).mem


def events_of(x):
    return EventTensor.from_dense(x)


# It passes for a tensor.


def test_it_is_a_tensor_to_whoever_asks(spk):
    assert isinstance(spk, Tensor)
    assert torch.is_tensor(spk)
    assert isinstance(spk, EventTensor)
    assert isinstance(spk, TensorLike)
    assert type(spk) is EventTensor
    assert torch.is_floating_point(spk)


def test_shape_and_kind_need_no_dense_form(spk):
    assert spk.shape == DENSE.shape
    assert spk.size() == DENSE.size()
    assert spk.size(0) == 4 and spk.size(-1) == 5
    assert spk.ndim == spk.dim() == 3
    assert spk.numel() == DENSE.numel()
    assert spk.dtype == torch.float32
    assert spk.device == DENSE.device
    assert not spk.is_cuda and not spk.is_sparse
    assert spk.is_leaf and not spk.requires_grad
    assert spk.is_floating_point()
    assert len(spk) == 4
    assert hash(spk) == id(spk)
    assert spk._dense is None, "one of the above made it dense"
    assert spk.is_events


def test_spikes_of_a_layer_carry_gradient():
    out, _ = layer_output()
    assert out.requires_grad and not out.is_leaf
    assert out.to_dense().requires_grad


UNARY = [
    operator.neg, operator.pos, abs, operator.invert,
    torch.sum, torch.mean, torch.max, torch.exp, torch.sigmoid, torch.nn.functional.relu, torch.zeros_like, torch.clone,
    torch.numel, torch.flatten, torch.isnan, torch.count_nonzero, torch.nonzero,
    lambda x: x.sum(0), lambda x: x.mean((0, 1)), lambda x: x.view(12, 5), lambda x: x.reshape(-1), lambda x: x.mT,
    lambda x: x.permute(2, 0, 1), lambda x: x.flatten(1), lambda x: x.unsqueeze(0), lambda x: x.bool(),
    lambda x: x.half(), lambda x: x.double(), lambda x: x.to(torch.float64), lambda x: x.float(), lambda x: x.cpu(),
    lambda x: x.contiguous(), lambda x: x.clone(), lambda x: x.detach(), lambda x: x.argmax(-1),
    lambda x: x.max(dim=0).values, lambda x: x.cumsum(0),
    lambda x: x[1], lambda x: x[-1], lambda x: x[1:3], lambda x: x[:, 1], lambda x: x[..., 2], lambda x: x[None],
    lambda x: x[1][2], lambda x: x[1, 2, 3], lambda x: x[torch.tensor([0, 2])], lambda x: x[x > 0],
    lambda x: x.new_ones(2),
    lambda x: torch.stack([x, x]), lambda x: torch.stack(list(x)), lambda x: torch.cat([x[0], x[1]], dim=1),
    lambda x: torch.cat([x, DENSE]), lambda x: torch.where(x > 0, x, -1.0), lambda x: torch.matmul(x, WEIGHT.t()),
    lambda x: torch.einsum("tbn,mn->tbm", x, WEIGHT), lambda x: torch.nn.functional.linear(x, WEIGHT),
    lambda x: torch.nn.functional.dropout(x, 0.0), lambda x: torch.nn.functional.layer_norm(x, (5,)),
    lambda x: torch.nn.functional.mse_loss(x, DENSE + 1), lambda x: sum(x), lambda x: torch.stack(x.unbind(0)),
    lambda x: torch.split(x, 2)[1], lambda x: torch.masked_select(x, DENSE > 0),
]  # fmt: skip


@pytest.mark.parametrize("function", UNARY)
def test_what_torch_does_to_it_is_what_it_does_to_the_dense_tensor(function):
    for x in (EventTensor.from_dense(DENSE), events_of(DENSE * 0.5)):
        try:
            expected = function(x.to_dense().clone())
        except (TypeError, RuntimeError) as error:
            with pytest.raises(type(error)):
                function(x)
            continue
        result = function(x)
        if isinstance(expected, Tensor):
            assert result.shape == expected.shape
            assert result.dtype == expected.dtype
            result = result.to_dense() if isinstance(result, TensorLike) else result
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
        else:
            assert result == expected
        assert x.is_events, "reading must not cost the sparse form"


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
    torch.add, torch.sub, torch.mul, torch.maximum, torch.eq, torch.logical_and, torch.atan2,
]  # fmt: skip


@pytest.mark.parametrize("function", BINARY)
@pytest.mark.parametrize("other", [2.0, normal(SHAPE, 5, torch.float32), "events"], ids=["number", "tensor", "events"])
def test_arithmetic_from_both_sides(spk, function, other):
    if isinstance(other, float) and function in (torch.maximum, torch.logical_and, torch.atan2):
        pytest.skip("takes no numbers")
    plain = other
    if isinstance(other, str):
        plain = spikes(SHAPE, 0.4, 9, torch.float32)
        other = EventTensor.from_dense(plain)
    assert torch.equal(function(spk, other).nan_to_num(), function(DENSE, plain).nan_to_num())
    if isinstance(plain, Tensor) or function.__module__ == "_operator":
        assert torch.equal(function(other, spk).nan_to_num(), function(plain, DENSE).nan_to_num())
    assert spk.is_events


@pytest.mark.parametrize("function", [operator.and_, operator.or_, operator.xor])
def test_bitwise_operators_raise_as_torch_does(spk, function):
    with pytest.raises(RuntimeError):
        function(spk, spk)
    assert torch.equal(function(spk > 0, EventTensor.from_dense(DENSE) > 0), function(DENSE > 0, DENSE > 0))


def test_matmul_from_both_sides(spk):
    assert torch.equal(spk @ WEIGHT.t(), DENSE @ WEIGHT.t())
    assert torch.equal(WEIGHT @ spk.mT, WEIGHT @ DENSE.mT)


def test_comparison_with_none(spk):
    assert not (spk == None)  # noqa: E711, SIM201  as snnTorch writes it
    assert spk != None  # noqa: E711
    assert spk is not None


def test_truth_numbers_and_text(spk):
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(spk)
    one = EventTensor.from_dense(torch.ones(1))
    assert bool(one) and float(one) == 1.0 and int(one) == 1 and complex(one) == 1 + 0j
    assert one.item() == 1.0
    assert f"{one.sum():.2f}" == "1.00"
    assert f"{spk}" == f"{DENSE}" or "EventTensor" in f"{spk}"
    assert str(spk).startswith("EventTensor(shape=[4, 3, 5]")
    with pytest.raises((TypeError, RuntimeError)):
        format(spk, ".2f")
    assert spk.tolist() == DENSE.tolist()
    assert (1.0 in spk) == (1.0 in DENSE)


def test_iteration_gives_the_steps(spk):
    rows = list(spk)
    assert len(rows) == 4
    for row, expected in zip(rows, DENSE, strict=True):
        assert type(row) is EventTensor
        assert torch.equal(row.to_dense(), expected)
    vectors = list(spk[0])
    assert [v.shape for v in vectors] == [torch.Size([5])] * 3
    assert torch.equal(torch.stack(list(reversed(spk))), torch.stack(list(reversed(DENSE))))


def test_numpy(spk):
    assert np.array_equal(np.asarray(spk), DENSE.numpy())
    assert np.array_equal(spk.numpy(), DENSE.numpy())
    assert np.array_equal(np.asarray(spk, dtype=np.float64), DENSE.double().numpy())
    assert np.allclose(np.mean(spk.numpy()), DENSE.mean())
    out, _ = layer_output()
    with pytest.raises(RuntimeError, match="requires grad"):
        out.numpy()
    assert out.detach().numpy().shape == SHAPE


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's own has no copy either
def test_a_numpy_copy(spk):
    assert np.array_equal(np.array(spk), DENSE.numpy())
    assert np.array_equal(np.array(spk, copy=True), DENSE.numpy())


def test_unknown_names_are_attribute_errors(spk):
    with pytest.raises(AttributeError, match="'EventTensor' object has no attribute 'no_such_name'"):
        _ = spk.no_such_name
    assert not hasattr(spk, "__cuda_array_interface_of_nobody__")


def test_assignment_into_other_tensors(spk):
    buffer = torch.zeros(SHAPE)
    buffer[1] = spk[1]
    buffer[2:] = spk[2:]
    assert torch.equal(buffer[1:], DENSE[1:])
    assert torch.equal(torch.zeros(SHAPE).copy_(spk), DENSE)
    assert torch.equal(torch.zeros(SHAPE).add_(spk, alpha=2), 2 * DENSE)
    assert spk.is_events

    module = torch.nn.Module()
    module.register_buffer("state", torch.zeros(1))
    module.state = spk
    assert module.state is spk


def test_modules_take_it(spk):
    linear = torch.nn.Linear(5, 2)
    assert_close(linear(spk), linear(DENSE), rtol=1e-6)
    network = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(15, 4), torch.nn.ReLU())
    assert_close(network(spk), network(DENSE), rtol=1e-6)


# Gradients through the dense form.


DENSE_USES = {
    "sum": lambda s: s.sum(),
    "rate": lambda s: (s.mean(0) ** 2).sum(),
    "loss": lambda s: torch.nn.functional.mse_loss(s, torch.full(SHAPE, 0.3)),
    "stack": lambda s: (torch.stack([s[t] for t in range(4)]) * normal(SHAPE, 3, torch.float32)).sum(),
    "cat": lambda s: (torch.cat([s, 2 * s], -1) * normal((4, 3, 10), 3, torch.float32)).sum(),
    "where": lambda s: torch.where(DENSE > 0, s, 2 * s).sum(),
    "matmul": lambda s: (s @ WEIGHT.t()).pow(2).sum(),
    "numbers": lambda s: ((1 - s) * 3).sum(),
    "double": lambda s: (s.double() * normal(SHAPE, 3)).sum(),
    "detached part": lambda s: (s * s.detach()).sum(),
}


@pytest.mark.parametrize("use", DENSE_USES)
def test_dense_uses_reach_the_handle(use):
    """The gradient at the handle is the dense gradient at the active entries, whatever looked at the spikes."""
    out, weight = layer_output()
    loss = DENSE_USES[use](out)
    (compact,) = torch.autograd.grad(loss, out.handle, retain_graph=True)

    leaf = out.to_dense().detach().clone().requires_grad_()
    (full,) = torch.autograd.grad(DENSE_USES[use](leaf), leaf)
    rows = torch.repeat_interleave(torch.arange(12), out.active_ptr.diff().long())
    assert_close(compact, full.view(12, 5)[rows, out.active_indices.long()], use, 1e-5)
    loss.backward()
    assert weight.grad is not None


def test_two_consumers_add_up():
    out, weight = layer_output(2)
    ours = next_layer(out).sum() + (out * 2).sum() + out[1].sum()
    (both,) = torch.autograd.grad(ours, weight)
    parts = torch.zeros_like(weight)
    for consumer in (lambda s: next_layer(s).sum(), lambda s: (s * 2).sum(), lambda s: s[1].sum()):
        out, weight = layer_output(2)
        parts += torch.autograd.grad(consumer(out), weight)[0]
    assert_close(both, parts, rtol=1e-5)


# Writes: from then on the dense form is the truth, for every consumer.


def halve(x):
    x *= 0.5
    return x


WRITES = {
    "imul": lambda s: operator.imul(s, 0.5),
    "iadd": lambda s: operator.iadd(s, 1.0),
    "isub": lambda s: operator.isub(s, 1.0),
    "itruediv": lambda s: operator.itruediv(s, 4.0),
    "ipow": lambda s: operator.ipow(s, 0.0),
    "statement": halve,
    "setitem": lambda s: s.__setitem__(0, 0.0),
    "mask": lambda s: s.__setitem__(DENSE == 0, 0.25),
    "slice": lambda s: s.__setitem__((slice(None), 1), 1.0),
    "step": lambda s: operator.setitem(s, 0, s[0] * 3),
    "zero_": lambda s: s.zero_(),
    "mul_": lambda s: s.mul_(0.5),
    "fill_": lambda s: s.fill_(1.0),
    "clamp_": lambda s: s.clamp_(max=0.5),
    "masked_fill_": lambda s: s.masked_fill_(DENSE == 0, 0.125),
    "copy_": lambda s: s.copy_(torch.full(SHAPE, 0.125)),
    "torch.relu_": lambda s: torch.relu_(s.neg_()),
    "init": lambda s: torch.nn.init.ones_(s),
    "out": lambda s: torch.mul(DENSE, 0.5, out=s),
    "out tuple": lambda s: torch.max(torch.full((2, *SHAPE), 0.5), 0, out=(s, torch.zeros(SHAPE, dtype=torch.long))),
    "data": lambda s: s.data.fill_(0.5),
    "numpy": lambda s: s.numpy().fill(0.5),
    "asarray": lambda s: np.asarray(s).fill(0.5),
    "relu inplace": lambda s: torch.nn.functional.relu(s, inplace=True),
    "hardtanh inplace": lambda s: torch.nn.functional.hardtanh(s, 0.0, 0.5, inplace=True),
    "view": lambda s: s.view(-1).mul_(0.5),
    "slice view": lambda s: s[1:].mul_(0.5),
    "permuted view": lambda s: s.permute(2, 0, 1)[0].add_(0.5),
    "threshold module": lambda s: torch.nn.Threshold(2.0, 0.5, inplace=True)(s),
}


@pytest.mark.parametrize("write", WRITES)
def test_after_a_write_every_consumer_sees_the_new_values(write):
    spk, plain = EventTensor.from_dense(DENSE), DENSE.clone()
    same_before = spk  # another name for the same spikes
    WRITES[write](spk)
    WRITES[write](plain)
    if write != "relu inplace":
        assert not torch.equal(plain, DENSE), "this write changes nothing: it tests nothing"
    for x in (spk, same_before):
        assert torch.equal(x.to_dense(), plain)
        assert torch.equal(x[1], plain[1])
        assert torch.equal(torch.stack(list(x)), plain)
        assert torch.equal(torch.as_tensor(x + 0), plain)
        assert_close(next_layer(x), next_layer(plain), write, 1e-5)
        assert torch.equal(events_of(x).to_dense(), plain)
        assert torch.equal(functional.leaky(x, beta=0.5, spike_grad=fast_sigmoid(), b_th=0.5).mem,
                           functional.leaky(plain, beta=0.5, spike_grad=fast_sigmoid(), b_th=0.5).mem)  # fmt: skip
        assert torch.equal(copy.deepcopy(x).to_dense(), plain)
        assert torch.equal(pickle.loads(pickle.dumps(x)).to_dense(), plain)
        assert torch.equal(x.to(torch.float64).to_dense(), plain.double())
        assert torch.equal(x.detach().to_dense(), plain)
        assert torch.equal(EventTensor.collate([x.to_dense()[:, 0]]).to_dense()[:, 0], plain[:, 0])
        assert "EventTensor" not in repr(x), "its repr would show the old events"


@pytest.mark.parametrize("write", ["relu inplace", "out", "init", "data", "numpy", "torch.relu_"])
def test_a_write_ends_the_sparse_form(write):
    spk = EventTensor.from_dense(DENSE)
    WRITES[write](spk)
    assert not spk.is_events


def test_gradients_follow_a_write():
    out, weight = layer_output()
    mask = normal(SHAPE, 4, torch.float32)
    plain = out.to_dense().clone()
    (expected,) = torch.autograd.grad((next_layer(plain * mask) ** 2).sum(), weight, retain_graph=True)
    out *= mask
    (got,) = torch.autograd.grad((next_layer(out) ** 2).sum(), weight)
    assert_close(got, expected, rtol=1e-5)


def test_partial_write_with_gradient():
    out, weight = layer_output()
    plain = out.to_dense().clone()
    plain[0] = 0
    (expected,) = torch.autograd.grad((next_layer(plain) ** 2).sum(), weight, retain_graph=True)
    out[0] = 0
    assert not out.is_events
    (got,) = torch.autograd.grad((next_layer(out) ** 2).sum(), weight)
    assert_close(got, expected, rtol=1e-5)


# Looking at the spikes' own gradient.


def dense_gradient(seed):
    """dL/dS of every entry, with a dense consumer chain that a compact hand-over would have cut."""
    out, _ = layer_output(seed)
    leaf = out.to_dense().detach().clone().requires_grad_()
    (full,) = torch.autograd.grad((next_layer(leaf) ** 2).sum(), leaf)
    return full


def test_retain_grad_gives_every_entry():
    out, _ = layer_output()
    out.retain_grad()
    assert not out.is_events
    (next_layer(out) ** 2).sum().backward()
    assert_close(out.grad, dense_gradient(0), rtol=1e-5)


def test_a_hook_sees_every_entry_and_may_change_it():
    seen = []
    out, weight = layer_output()
    out.register_hook(seen.append)
    (next_layer(out) ** 2).sum().backward()
    assert_close(seen[0], dense_gradient(0), rtol=1e-5)

    plain_grad = weight.grad
    out, weight = layer_output()
    out.register_hook(lambda grad: 2 * grad)
    (next_layer(out) ** 2).sum().backward()
    assert_close(weight.grad, 2 * plain_grad, rtol=1e-5)


def test_autograd_grad_of_spikes_is_refused_with_the_cure():
    out, _ = layer_output()
    loss = next_layer(out).sum()
    with pytest.raises(RuntimeError, match=r"(?s)torch\.autograd\.grad: expected .* got .*spk = spk\.to_dense\(\)"):
        torch.autograd.grad(loss, out)
    with pytest.raises(RuntimeError, match=r"to_dense"):
        torch.autograd.grad(outputs=loss, inputs=[out])


def test_the_cure_works():
    out, _ = layer_output()
    out = out.to_dense()
    (grad,) = torch.autograd.grad((next_layer(out) ** 2).sum(), out)
    assert_close(grad, dense_gradient(0), rtol=1e-5)


def test_backward_on_spikes_themselves():
    out, weight = layer_output()
    out.backward(torch.ones(SHAPE))
    again, other = layer_output()
    again.sum().backward()
    assert_close(weight.grad, other.grad, rtol=1e-6)


def test_input_spikes_may_be_made_to_require_grad(spk):
    spk.requires_grad_()
    assert spk.requires_grad
    (next_layer(spk) ** 2).sum().backward()
    leaf = DENSE.clone().requires_grad_()
    (next_layer(leaf) ** 2).sum().backward()
    assert_close(spk.grad, leaf.grad, rtol=1e-5)


def test_copies_of_spikes_inside_a_graph_are_torchs_own_answer():
    out, _ = layer_output()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(out)


# The deferred current.


@pytest.fixture
def deferred(spk):
    weight, bias = WEIGHT.clone().requires_grad_(), torch.ones(6, requires_grad=True)
    return DeferredCurrent(spk, WeightHub(weight, bias, None, 0)), weight, bias


def test_a_deferred_current_is_computed_when_looked_at(deferred):
    current, weight, bias = deferred
    assert current.shape == (4, 3, 6)
    assert current.requires_grad
    assert current.dtype == torch.float32
    assert current.is_deferred
    assert "DeferredCurrent(shape=[4, 3, 6]" in repr(current)
    expected = torch.nn.functional.linear(DENSE, weight, bias)
    assert_close(current * 1, expected, rtol=1e-5)
    assert not current.is_deferred
    assert current.to_dense() is current.to_dense()


def test_gradients_through_a_deferred_current(deferred):
    current, weight, bias = deferred
    (torch.relu(current) ** 2).sum().backward()
    grads = weight.grad, bias.grad
    weight.grad = bias.grad = None
    (torch.relu(torch.nn.functional.linear(DENSE, weight, bias)) ** 2).sum().backward()
    assert_close(grads[0], weight.grad, rtol=1e-5)
    assert_close(grads[1], bias.grad, rtol=1e-5)


def test_a_deferred_current_may_be_a_layers_current(deferred):
    current, weight, bias = deferred
    expected = functional.leaky(torch.nn.functional.linear(DENSE, weight, bias), beta=0.5, spike_grad=fast_sigmoid(),
                                b_th=0.5)  # fmt: skip
    got = functional.leaky(current, beta=0.5, spike_grad=fast_sigmoid(), b_th=0.5)
    assert_close(got.mem, expected.mem, rtol=1e-5)
    got = next_layer(DeferredCurrent(events_of(DENSE), WeightHub(torch.eye(5), None, None, 0)))
    assert_close(got, next_layer(DENSE), rtol=1e-5)


def test_no_number_is_lost_on_the_way(spk):
    nan = EventTensor.from_dense(torch.tensor([[1.0, math.nan, math.inf, -math.inf, -0.0, 1e-45]]))
    torch.testing.assert_close(
        nan.to_dense(), torch.tensor([[1.0, math.nan, math.inf, -math.inf, 0.0, 1e-45]]), equal_nan=True, rtol=0, atol=0
    )


def test_functions_that_change_a_shape_in_place():
    x = EventTensor.from_dense(torch.eye(4))
    assert x.unsqueeze_(0).shape == x.shape == x.to_dense().shape == (1, 4, 4) and x.dim() == 3
    x.data = torch.ones(2, 3)
    assert x.shape == (2, 3) and x.sum().item() == 6


APPLY_IN_C = """
import torch
torch.autograd.Function.apply = torch._C._FunctionBase.__dict__["apply"]
from sparse_backend import EventTensor

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        assert type(x) is torch.Tensor
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

x = torch.eye(3, requires_grad=True)
Doubled.apply(EventTensor.from_dense(x)).sum().backward()
assert x.grad.eq(2).all()
"""


def test_where_custom_functions_are_applied_in_c():
    """As in torch 2.15."""
    done = subprocess.run([sys.executable, "-c", APPLY_IN_C], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
