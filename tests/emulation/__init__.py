"""The CUDA backend without a GPU: csrc/cuda compiled for the CPU, kernels run by `cuda_runtime.h` beside this file.

The ops are those of the real backend, host code included, as `torch.ops.sparse_backend_emulated.*` for CPU tensors.
`in_place_of_the_cpu_kernels` lets everything above them run on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_backend import _build
from sparse_backend.ops import event_linear, events, hub, leaky, leaky_dense, lif, linear_leaky, linear_lif

NAMESPACE = "sparse_backend_emulated"
HERE = Path(__file__).resolve().parent
ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2
L2_BYTES = 32 << 20

#: whether every access is checked against those of other threads, ten times slower
CHECKS_RACES = os.environ.get("EMULATION_CHECKS_RACES", "") not in ("", "0")

#: every op with kernels
OPS = (
    *(events.events_from_dense, events.events_to_dense, events.events_sum, events.events_gather),
    *(leaky.leaky, leaky.leaky_backward, leaky_dense.leaky_dense, leaky_dense.leaky_dense_backward),
    *(linear_leaky.linear_leaky, linear_leaky.linear_leaky_backward),
    *(lif.lif, lif.lif_backward, linear_lif.linear_lif, linear_lif.linear_lif_backward),
    *(event_linear.event_linear, event_linear.event_linear_backward, hub.outer_accumulate),
)


def describe() -> _build.sources.Description:
    root = _build.sources.csrc_dir().parent
    csrc, cuda, include = root / "csrc", root / "csrc" / "cuda", root / "csrc" / "include"
    headers = (*csrc.glob("*.h"), *cuda.glob("*.cuh"), *cuda.glob("*.h"), *include.rglob("*.h"), *HERE.glob("*.h"))
    cflags, ldflags = _build.settings.flags()
    return _build.sources.Description(
        name=NAMESPACE,
        root=root,
        sources=(*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("*.cpp")), *sorted(HERE.glob("*.cpp"))),
        headers=headers,
        include_dirs=(HERE, include, cuda),
        cflags=(
            *(flag for flag in cflags if flag != "-O3"),
            *("-O1", "-x", "c++", "-include", "emulated.h"),
            *("-DUSE_CUDA", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
            *(["-fsanitize=thread"] if CHECKS_RACES else []),  # without its library: races.cpp answers
        ),
        ldflags=ldflags,
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated library, built at first use, its ops registered."""
    schemas = torch.library.Library(NAMESPACE, "DEF")
    for op in OPS:
        schemas.define(str(op._schema).split("::", 1)[1])
    built = _build.cache.build(describe())
    torch.ops.load_library(str(built.path))
    controls = ctypes.CDLL(str(built.path))
    controls.schemas = schemas  # they go with their library object
    controls.emulation_launches.restype = ctypes.c_int64
    controls.emulation_synchronisations.restype = ctypes.c_int64
    controls.emulation_reaches.restype = ctypes.c_bool
    controls.emulation_run.restype = ctypes.c_char_p
    return controls


def name_of(op: Any) -> str:
    return str(op.name()).split("::")[1].split(".")[0]


def emulated(op: Any) -> Any:
    """The emulated counterpart of an op."""
    library()
    return getattr(getattr(torch.ops, NAMESPACE), name_of(op)).default


@contextlib.contextmanager
def in_place_of_the_cpu_kernels() -> Iterator[None]:
    """CPU tensors run on the emulated device; autograd, fakes and everything above stay as they are."""
    with torch.library._scoped_library("sparse_backend", "IMPL") as overriding, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch mentions the override
        for op in OPS:
            overriding.impl(name_of(op), emulated(op), "CPU")
        yield


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """As if a CUDA graph were captured: waiting for the device is an error. Work runs at once."""
    library().emulation_capture(1)
    try:
        yield
    finally:
        library().emulation_capture(0)


def run(kernel: int, blocks: int, threads: int) -> tuple[str, int]:
    """Run a kernel of controls.cpp; what the device says of it, and the number it wrote."""
    out = ctypes.c_int(7)
    told = library().emulation_run(kernel, blocks, threads, ctypes.byref(out))
    return told.decode(), out.value


def set_device(order: int = ASCENDING, l2_bytes: int = L2_BYTES) -> None:
    library().emulation_set(ctypes.c_int(order), ctypes.c_int64(l2_bytes))
