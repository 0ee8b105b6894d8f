"""What is built: the two descriptions, of the CPU's extension and of CUDA's, and where files lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cpu, nvidia, settings

LIBRARY_NAME = "sparse_backend_native"
CUDA_LIBRARY_NAME = "sparse_backend_cuda"
HEADER_SUFFIXES = (".h", ".hpp", ".inl", ".cuh")
NVCC_FLAGS = (
    "-O3",
    "-fmad=false",  # rounds as the CPU kernels and torch do
    "-Xcompiler=-fvisibility=hidden",
)
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Description:
    """Everything that decides what the library contains, apart from torch, compiler and machine."""

    name: str
    root: Path  # sources and headers are named relative to it, so that a moved tree keeps its cached build
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    isa: str = "scalar"  # its flags are among cflags; "cuda" for the CUDA kernels
    archs: tuple[str, ...] = ()  # what nvcc makes: sm_XX machine code, compute_XX for the driver to translate
    nvcc_flags: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        return f"{self.name}.so"

    def fingerprint(self) -> str:
        """Hash of the contents of all sources and headers."""
        digest = hashlib.sha256()
        for path in sorted({*self.sources, *self.headers}):
            content = path.read_bytes()
            digest.update(f"{os.path.relpath(path, self.root)}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()


def csrc_dir() -> Path:
    """The directory of the C++ sources: inside an installed package, beside the package in a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def prebuilt_dir() -> Path:
    """Where setup.py puts the libraries built at install time, one directory per instruction set."""
    return _PACKAGE / "_prebuilt"


def extend_path(package_path: list[str]) -> None:
    """Let `sparse_backend.adapters` be imported from a checkout, where adapters/ lies beside the package.

    An installed package contains it and nothing is changed.
    """
    beside = _PACKAGE.parent
    if not (_PACKAGE / "adapters").is_dir() and (beside / "adapters" / "__init__.py").is_file():
        package_path.append(str(beside))


def describe(root: Path | None = None, isa: str | None = None) -> Description:
    """The description of the CPU extension for one instruction set, with the flags that the environment asks for."""
    isa = cpu.choose_isa() if isa is None else isa
    root = csrc_dir() if root is None else root
    sources = sorted((root / "cpu").glob("*.cpp"))
    cflags, ldflags = settings.flags()
    cflags = (*cflags, *cpu.ISA_FLAGS[isa])
    return Description(
        LIBRARY_NAME, root, tuple(sources), _headers(root, "cpu"), (root / "include",), cflags, ldflags, isa
    )


def describe_cuda(archs: Sequence[str], root: Path | None = None) -> Description:
    """The description of the CUDA extension for these targets of nvcc: sm_90, compute_90, ..."""
    root = csrc_dir() if root is None else root
    cuda = root / "cuda"
    sources = sorted([*cuda.glob("*.cu"), *cuda.glob("*.cpp")])
    cflags, ldflags = settings.flags()
    return Description(
        name=CUDA_LIBRARY_NAME,
        root=root,
        sources=tuple(sources),
        headers=_headers(root, "cuda"),
        include_dirs=(root / "include",),
        cflags=(*cflags, "-DUSE_CUDA"),  # torch's own name: it declares the current CUDA stream
        ldflags=ldflags,
        isa="cuda",
        archs=tuple(archs),
        nvcc_flags=(*NVCC_FLAGS, *(nvidia.gencode(arch) for arch in archs)),
    )


def _headers(root: Path, device: str) -> tuple[Path, ...]:
    """All that the sources of one device may include: a change to the other's is no reason to compile again."""
    folders = (root, root / "include", root / device)
    paths = {path for folder in folders for path in folder.glob("*" if folder == root else "**/*")}
    return tuple(sorted(path for path in paths if path.suffix in HEADER_SUFFIXES))
