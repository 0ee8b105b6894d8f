"""pytest plugin: the tests of a whole run use the emulated device where they would use the CPU kernels.

PYTHONPATH=tests python -m pytest -p emulation.everywhere tests/test_snntorch_equality.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import emulation
from sparse_backend import _native


@pytest.fixture(autouse=True, scope="session")
def emulated_everywhere() -> Iterator[None]:
    _native.load()
    with emulation.in_place_of_the_cpu_kernels():
        yield
