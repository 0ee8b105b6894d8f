"""pytest plugin: the tests of a whole run use the GPU where they would use the CPU kernels.

PYTHONPATH=tests python -m pytest -p emulation.gpu_everywhere tests/test_snntorch_equality.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def gpu_everywhere() -> Iterator[None]:
    from emulation import gpu

    gpu.load()
    with gpu.in_place_of_the_cpu_kernels():
        yield
