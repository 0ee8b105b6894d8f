"""The real device in the CPU kernels' place: CPU tensors go to a GPU, through its kernels, and back."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import emulation
from sparse_backend import _native
from sparse_backend.ops import hub as hub_ops


def needed() -> None:
    """Skip the calling test module, in one visible line, where the real device cannot be tested."""
    mode = os.environ.get("SPARSE_BACKEND_BUILD")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and a torch that uses it", allow_module_level=True)
    if mode in ("none", "cpu"):
        pytest.skip(f"SPARSE_BACKEND_BUILD={mode} leaves the CUDA kernels out", allow_module_level=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product: deterministic ones need it


def load() -> None:
    torch.cuda.init()
    _native.load()
    assert _native.status()["cuda"]["state"] == "loaded", _native.status()


def moved(value: Any, device: str) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def in_place_of_the_cpu_kernels() -> Iterator[None]:
    """CPU tensors go to the GPU, through its kernels, and back: test_ops.py as it is, autograd and all."""

    def through_the_gpu(op):
        def run(*args):
            return moved(op(*moved(args, "cuda")), "cpu")

        return run

    def outer_accumulate(weight_sum, bias_sum, *rest):
        there = moved((weight_sum, bias_sum, *rest), "cuda")
        hub_ops.outer_accumulate(*there)
        weight_sum.copy_(there[0]), bias_sum.copy_(there[1])

    with torch.library._scoped_library("sparse_backend", "IMPL") as overriding, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch mentions the override
        for op in emulation.OPS:
            run = outer_accumulate if op is hub_ops.outer_accumulate else through_the_gpu(op)
            overriding.impl(emulation.name_of(op), run, "CPU")
        yield
