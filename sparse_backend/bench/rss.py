"""Peak memory of one training step, measured from outside torch: in a child process, from the system's own count.

`python -m sparse_backend.bench.rss FILE PATH` is the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_backend import EventTensor
from sparse_backend.bench.cases import Case
from sparse_backend.bench.inputs import Batch
from sparse_backend.bench.models import build, framework_of
from sparse_backend.bench.paths import PATHS, Run


def peak_bytes(case: Case, net: nn.Module, batch: Batch, path: str) -> int:
    """By how much the step's peak resident memory exceeds what the process held before, input and model included.

    Raises RuntimeError with the child's last words if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.pt"
        events = (list(batch.events.shape), batch.events.row_ptr, batch.events.indices)
        content = {"case": case.to_dict(), "state": net.state_dict(), "events": events, "labels": batch.labels}
        torch.save({**content, "threads": torch.get_num_threads()}, file)
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [sys.executable, "-m", "sparse_backend.bench.rss", str(file), path],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise RuntimeError(f"the child that measures peak memory of {path} failed: " + " | ".join(last))
    return int(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    file, path = sys.argv[1:] if argv is None else argv
    content: dict[str, Any] = torch.load(file, weights_only=True)
    torch.set_num_threads(content["threads"])
    case = Case.from_dict(content["case"])
    with framework_of(case).given(case):
        return _measure(case, content, path)


def _measure(case: Case, content: dict[str, Any], path: str) -> int:
    net = build(case)
    net.load_state_dict(content["state"])
    shape, row_ptr, indices = content["events"]
    batch = Batch(EventTensor(shape, row_ptr, indices), content["labels"], case.image)
    content.clear()

    warm = Batch(EventTensor((2, 1, case.inputs), row_ptr[:3] * 0, indices[:0]), batch.labels[:1], case.image)
    Run(PATHS[path], net, case.b_th, warm).step()  # libraries, threads, the kernels
    run = Run(PATHS[path], net, case.b_th, batch)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what the C library keeps of freed memory would hide a part
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    if not _restart_peak() and _peak() > 1.02 * before:
        print("this system cannot restart its count of peak memory", file=sys.stderr)
        return 1
    run.step()
    print(max(0, _peak() - before))
    return 0


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return None


def _resident() -> int:
    return _status("VmRSS") or _peak()


def _peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _status("VmHWM") or most


def _restart_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
