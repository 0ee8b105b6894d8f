"""Where numbers were measured: machine, versions, commit; nothing that names the machine or its folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparse_backend import _native
from sparse_backend._version import __version__
from sparse_backend.bench.devices import Cpu

FEATURES = ("avx2", "fma", "avx512f", "neon", "asimd", "sve")


def describe(device: Cpu | None = None) -> dict[str, Any]:
    """device: what the numbers were measured on, where it is not the CPU."""
    if device is not None and device.type == "cuda":
        return _with_gpu(describe(), device)
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    native = _native.status()
    return {
        "machine": {
            "cpu": info.get("model name") or platform.processor() or platform.machine(),
            "architecture": platform.machine(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "memory_gb": _memory_gb(),
            "features": [name for name in FEATURES if name in flags],
            "system": platform.system(),
        },
        "versions": {
            "sparse_backend": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "snntorch": _version("snntorch"),
            "norse": _version("norse"),
        },
        "kernels": {"state": native["state"], "origin": native["origin"]},
        "commit": _commit(),
    }


def _with_gpu(described: dict[str, Any], device: Cpu) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties()
    native = _native.status()["cuda"]
    described["machine"]["gpu"] = {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "processors": gpu.multi_processor_count,
        "memory_gb": round(gpu.total_memory / 2**30),
        "cache_mb": round(gpu.L2_cache_size / 2**20),
        "copy_gb_s": round(device.copy_rate() / 1e9),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    described["versions"] |= {"driver": _driver(), "cuda": torch.version.cuda, "triton": _version("triton")}
    described["kernels"] = {"state": native["state"], "origin": native["origin"]}
    return described


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count()


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with + where tracked files other than results and what is made of them differ from it;
    None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        done.check_returncode()
        return done.stdout.strip()

    try:
        results = (":!README.md", ":!docs/benchmarks", ":!docs/benchmarks.md")
        changed = git("status", "--porcelain", "-uno", "--", str(root), *results)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
