"""Memory on CPUs: what is freed is kept for the next step.

A tensor of some megabytes lives for a moment and comes again in every step: a member's logits, their probabilities. As it is,
glibc gives such memory back to the kernel, which hands out fresh pages the next time, and to fault those in takes longer than
what is done in them (bench/LOG.md). A better allocator, preloaded, does the same and is not disturbed.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES = 32 * 2**20
"""Bytes; glibc allows no more."""


def keep_freed_memory() -> bool:
    """Have glibc keep blocks of up to 32 MB that are freed; whether it does. Other C libraries have no such choice."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
