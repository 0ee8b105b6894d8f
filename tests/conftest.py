"""Settings every test file shares."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("local", **_COMMON)
settings.register_profile("ci", derandomize=True, print_blob=True, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tensors too small for more, which only wait for each other on a busy machine."""
    from helpers import threads

    with threads(1):
        yield


@pytest.fixture
def neurons(monkeypatch):
    """snnTorch's list of all neurons, which `utils.reset` resets, begins empty."""
    snn = pytest.importorskip("snntorch")
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])


@pytest.fixture(params=["inf", "band", "band as events"])
def way(request):
    """How a model is enabled, of those that stand for all; a file that needs every one has a fixture of its own."""
    from pairs import WAYS

    return WAYS[request.param]
