"""What a loop is handed under time fusion looks like the tensor it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fusion_loops import (
    BATCH,
    HIDDEN,
    OUTPUTS,
    STEPS,
    Net,
    check,
)
from pairs import (
    WAYS,
    Way,
)
from torch import Tensor
from torch.nn import functional as F

snn = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")


pytestmark = pytest.mark.usefixtures("neurons")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


# Placeholders seen as tensors.

LOOKS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda v: (tuple(v.shape), v.size(), v.size(0), v.size(-1), v.size(dim=1), v.ndim, v.dim(), len(v)),
    "numbers": lambda v: (v.numel(), v.nelement(), v.element_size(), v.itemsize, v.nbytes),
    "dtype": lambda v: (v.dtype, v.type(), v.is_floating_point(), v.is_complex(), torch.is_floating_point(v)),
    "device": lambda v: (v.device, v.is_cuda, v.is_cpu, v.get_device(), v.device.type, v.is_meta),
    "layout": lambda v: (v.layout, v.is_sparse, v.is_quantized, v.is_contiguous(), v.stride(), v.storage_offset()),
    "gradient": lambda v: (v.requires_grad, v.is_leaf, v.grad_fn is not None, v.detach().requires_grad),
    "kind": lambda v: (isinstance(v, Tensor), torch.is_tensor(v), torch.is_nonzero(v.sum() * 0 + 1)),
    "arithmetic": lambda v: [
        v + 1,
        1 + v,
        v - 2,
        2 - v,
        v * 3,
        3 * v,
        v / 2,
        2 / (v + 5),
        -v,
        +v,
        abs(v),
        v**2,
        2**v,
    ],
    "integer arithmetic": lambda v: [v.detach() // 0.3, v % 0.4, 1 // (v.detach() + 5)],
    "comparison": lambda v: [v > 0, v >= 0, v < 1, v <= 0, v == 1, v != 1, torch.lt(0 * v, 1), torch.eq(v, 1)],
    "logic": lambda v: [~(v > 0), (v > 0) & (v < 0.5), (v > 0) | (v < 0), (v > 0) ^ (v > 1), torch.logical_not(v)],
    "between two": lambda v: [
        v + v,
        v * v,
        v - v.detach(),
        v @ v.t(),
        torch.maximum(v, -v),
        v.mul(v),
        v.add(v, alpha=2),
    ],
    "broadcast": lambda v: [
        v + torch.ones(HIDDEN).double(),
        v * v.mean(0),
        v.unsqueeze(0) + v.unsqueeze(1),
        v + v[:1],
    ],
    "indexing": lambda v: [
        v[0],
        v[:, 1],
        v[..., -1],
        v[None],
        v[1:3, ::2],
        v[v > 0],
        v[torch.tensor([0, 2])],
        v[-1, -1],
    ],
    "iteration": lambda v: [*v, *v.unbind(1), *v.split(2), *v.chunk(3, 1), *torch.tensor_split(v, 2)],
    "shapes": lambda v: [
        v.view(-1),
        v.reshape(2, -1),
        v.flatten(),
        v.t(),
        v.T,
        v.transpose(0, 1),
        v.permute(1, 0),
        v.mT,
    ],
    "more shapes": lambda v: [
        v.unsqueeze(1),
        v[:, None].squeeze(1),
        v.expand(3, -1, -1),
        v.repeat(2, 1),
        v.view_as(v),
    ],
    "even more shapes": lambda v: [
        v.unflatten(1, (2, 5)),
        v.movedim(0, 1),
        v.flip(0),
        v.roll(1, 1),
        v.narrow(1, 2, 3),
    ],
    "reductions": lambda v: [
        v.sum(),
        v.sum(0),
        v.mean(1, keepdim=True),
        v.max(),
        v.min(1)[0],
        v.argmax(1),
        v.std(),
        v.norm(),
    ],
    "more reductions": lambda v: [
        v.any(),
        v.all(dim=0),
        v.count_nonzero(),
        v.cumsum(1),
        v.prod(0),
        v.amax(1),
        v.topk(2)[0],
    ],
    "activations": lambda v: [
        v.relu(),
        v.sigmoid(),
        v.tanh(),
        F.gelu(v),
        F.softmax(v, 1),
        F.leaky_relu(v),
        F.elu(v),
        v.exp(),
    ],
    "clamping": lambda v: [
        v.clamp(0, 0.5),
        v.clip(max=0.2),
        torch.clamp(v, min=0.1),
        v.clamp_min(0),
        v.round(),
        v.sign(),
        v.floor(),
    ],
    "copies": lambda v: [
        v.clone(),
        v.detach(),
        v.contiguous(),
        v.cpu(),
        v.double(),
        v.float(),
        v.to(torch.float32),
        v.to("cpu"),
        v.half(),
    ],
    "to": lambda v: [
        v.to(v),
        v.to(device="cpu", dtype=torch.float64),
        v.type(torch.float32),
        v.type_as(v),
        v.long(),
        v.bool(),
        v.int(),
    ],
    "like": lambda v: [
        torch.zeros_like(v),
        torch.ones_like(v),
        v.new_zeros(2),
        v.new_full((2,), 3),
        torch.full_like(v, 2),
        v.new_tensor([1.0]),
    ],
    "layers": lambda v: [
        F.linear(v, torch.ones(3, HIDDEN).double()),
        F.layer_norm(v, (HIDDEN,)),
        F.normalize(v + 1),
        F.pad(v, (1, 1)),
    ],
    "conv": lambda v: [
        F.conv1d(v.unsqueeze(1), torch.ones(2, 1, 3).double()),
        F.max_pool1d(v.unsqueeze(1), 2),
        F.avg_pool1d(v.unsqueeze(1), 3, stride=1, padding=1),
        F.conv2d(v.view(BATCH, 1, 2, 5), torch.ones(2, 1, 1, 3).double(), padding="same"),
        F.max_pool2d(v.view(BATCH, 1, 2, 5), (1, 2), ceil_mode=True),
        F.interpolate(v.view(BATCH, 1, 2, 5), scale_factor=2),
    ],
    "pooling with indices": lambda v: list(F.max_pool1d(v.unsqueeze(1), 2, return_indices=True)),
    "products": lambda v: [
        torch.einsum("bi,bj->bij", v, v),
        torch.matmul(v, v.T),
        torch.outer(v[0], v[1]),
        torch.bmm(v[None], v.T[None]),
    ],
    "joining": lambda v: [
        torch.cat([v, v]),
        torch.stack([v, v]),
        torch.hstack([v, v]),
        torch.vstack([v, v]),
        torch.cat((v, v), -1),
    ],
    "choosing": lambda v: [
        torch.where(v > 0, v, -v),
        v.masked_fill(v > 0, 7.0),
        v.gather(1, torch.zeros(BATCH, 1).long()),
        v.index_select(1, torch.tensor([1])),
    ],
    "losses": lambda v: [
        F.mse_loss(v, v.detach() * 0),
        F.cross_entropy(v, torch.arange(BATCH)),
        F.log_softmax(v, -1),
        F.smooth_l1_loss(v, v.detach() + 2),
    ],
    "python numbers": lambda v: [
        float(v.detach().sum()),
        int(v.sum()),
        bool(v.sum() > 3),
        v.sum().item(),
        v.tolist(),
        complex(v.detach()[0, 0]),
    ],
    "numpy": lambda v: [
        v.detach().numpy().tolist(),
        np.asarray(v.detach()).tolist(),
        v.numpy(force=True).tolist(),
    ],
    "printing": lambda v: [repr(v + 0).split(", dtype")[0], str(v * 2).split(", dtype")[0], f"{v.sum():.6f}"],
    "membership": lambda v: [
        1.0 in v,
        hash(v) == hash(v),
        v is v,
        any(x is v for x in [v]),
        v.equal(v),
        torch.allclose(v, v),
    ],
    "dictionary": lambda v: [{v: 1}[v], len({v, v})],
    "in place on a copy": lambda v: [
        v.clone().mul_(2),
        v.clone().zero_(),
        v.clone().fill_(3),
        v.clone().add_(v),
        v.clone().clamp_(0, 1),
    ],
    "copied by copy": lambda v: [copy.copy(v) + 0],
    "keyword arguments": lambda v: [
        torch.sum(input=v, dim=1),
        torch.mul(input=v, other=2),
        torch.relu(input=v),
        torch.flatten(input=v),
    ],
    "einops by hand": lambda v: [
        v.view(BATCH, 2, 5).permute(0, 2, 1).reshape(BATCH, -1),
        v.swapaxes(0, 1).contiguous().view(-1),
    ],
    "apply": lambda v: [
        torch.stack([row * 2 for row in v]),
        torch.vmap(lambda row: row.sum())(v),
        torch.atleast_3d(v),
    ],
}


@pytest.mark.parametrize("what", ["spikes", "membrane", "current"])
@pytest.mark.parametrize("look", LOOKS)
def test_placeholders_are_tensors(look: str, what: str) -> None:
    """What user code sees of a value in mid-loop is what it sees of stock's; and gradients flow through it."""
    for way in (WAYS["inf"], WAYS["band as events"]):

        def loop(net: Net, x: Any) -> Any:
            mem, found = net.lif1.reset_mem(), []
            for t in range(3):
                current = net.fc1(x[t])
                spk, mem = net.lif1(current, mem)
                found.append(LOOKS[look]({"spikes": spk, "membrane": mem, "current": current}[what]))
            return found, mem

        check(way, loop)


def test_isinstance_and_assignment(way: Way) -> None:
    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            assert isinstance(spk, torch.Tensor)
            assert torch.is_tensor(mems[0])
            net.register_buffer("last", spk, persistent=False)
            net.last = mems[-1]
            out.append(net.last * 2)
        net.last = torch.zeros(1)
        return torch.stack(out)

    check(way, loop)


def test_placeholders_are_light_to_look_at() -> None:
    """Shape, dtype, device and requires_grad need no numbers: the loop stays one sequence."""

    def loop(net: Net, x: Any) -> Any:
        mems, out = net.mems(), []
        for t in range(len(x)):
            spk, mems = net.step(x[t], mems)
            assert spk.shape == (BATCH, OUTPUTS)
            assert (spk.dtype, spk.device.type, spk.ndim, len(spk), spk.size(1)) == (
                torch.float64,
                "cpu",
                2,
                BATCH,
                OUTPUTS,
            )
            assert isinstance(mems[0], Tensor)
            assert not spk.is_cuda
            out.append(spk.view(BATCH, -1))
        return torch.stack(out)

    check(WAYS["inf"], loop, fuses=STEPS)
