"""The cases of test_cuda_half_ops.py on a GPU. `make gpu-test` runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_cuda_half_ops as cases
import torch
from emulation import gpu
from test_ops import kernels

gpu.needed()

__all__ = ["kernels"]  # the fixture fills what is not initialised

globals().update({name: case for name, case in vars(cases).items() if name.startswith("test_")})


@pytest.fixture(autouse=True, scope="module")
def the_gpu(kernels: None) -> Iterator[None]:
    gpu.load()
    products = torch.backends.cuda.matmul
    before = products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction
    # the cases have the sums of a product in float32, which cuBLAS may otherwise round where it splits them
    products.allow_fp16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction = False
    with gpu.in_place_of_the_cpu_kernels():
        yield
    products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction = before
