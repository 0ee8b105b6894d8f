"""The README's examples run as they stand, on the models they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sparse_backend

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize(
    ("framework", "shape", "layers"),
    [("snntorch", (10, 4, 784), 2), ("norse", (10, 4, 700), 2)],
    ids=["snntorch", "norse"],
)
def test_the_example_trains_with_sparse_gradients(framework, shape, layers):
    pytest.importorskip(framework)
    (example,) = [block for block in BLOCKS if f"import {framework}" in block]
    names = {}
    exec(compile(example, f"README.md, {framework}", "exec"), names)
    net, x = names["net"], (torch.rand(shape) < 0.1).float()
    out = net(x)
    out = out[0] if isinstance(out, tuple) else out
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)
    report = sparse_backend.report(net)
    assert len(report.layers) == layers and {layer.at_once for layer in report.layers} == {10}, report
    assert report.layers[0].path == "sparse sequence", report


def test_every_block_is_one_of_them():
    assert len(BLOCKS) == 2
