"""What `enable` lets the C library do with freed memory, in a process of its own: its thresholds never go back."""

import ctypes
import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, torch
from sparse_backend import allocation

class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info

def mapped_bytes(kept=[]):
    before = mallinfo2().hblkhd
    kept.append(torch.empty(20 << 20, dtype=torch.uint8))
    return mallinfo2().hblkhd - before

before = mapped_bytes()
allocation.keep_freed_memory()
print(before, mapped_bytes())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="it is glibc's thresholds that move, which glibc 2.33 and later tell of",
)
def test_large_blocks_are_not_given_back_when_freed() -> None:
    run = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before >= 20 << 20
    assert after == 0
