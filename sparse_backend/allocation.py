"""What the C library does with memory that is freed."""

from __future__ import annotations

import functools

import torch

#: a little less than the largest block that moves glibc's thresholds (DEFAULT_MMAP_THRESHOLD_MAX, 32 MB)
_BLOCK_BYTES = 31 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MB that this process has freed, instead of some hundred kB, once per process.

    It keeps twice the largest block that it ever mapped and unmapped. What a layer makes of T steps is T times what it
    makes of one; given back and asked for again at every training step, its pages are new each time, and touching
    them first costs dense layers of images a tenth to a quarter of their time. The block made here is never touched:
    it takes no memory. Other C libraries and allocators are not changed by it. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    torch.empty(_BLOCK_BYTES, dtype=torch.uint8, device="cpu")
