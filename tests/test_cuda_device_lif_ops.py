"""The cases of test_lif_ops.py on a GPU. `make gpu-test` runs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_lif_ops as cases
from emulation import gpu
from test_ops import kernels

gpu.needed()

__all__ = ["kernels"]  # the fixture fills what is not initialised

OF_THE_CPU = {"test_tiny_numbers_are_zero_inside_a_kernel_alone"}  # a GPU computes with them at full speed

globals().update(
    {name: case for name, case in vars(cases).items() if name.startswith("test_") and name not in OF_THE_CPU}
)


@pytest.fixture(autouse=True, scope="module")
def the_gpu(kernels: None) -> Iterator[None]:
    gpu.load()
    with gpu.in_place_of_the_cpu_kernels():
        yield
