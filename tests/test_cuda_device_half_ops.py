"""The cases of test_cuda_half_ops.py on a GPU. `make gpu-test` runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_cuda_half_ops as cases
from emulation import gpu
from test_ops import kernels

gpu.needed()

__all__ = ["kernels"]  # the fixture fills what is not initialised

globals().update({name: case for name, case in vars(cases).items() if name.startswith("test_")})


@pytest.fixture(autouse=True, scope="module")
def the_gpu(kernels: None) -> Iterator[None]:
    gpu.load()
    with gpu.in_place_of_the_cpu_kernels():
        yield
