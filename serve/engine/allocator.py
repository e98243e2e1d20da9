"""On CPUs, keeps freed memory for the next step instead of returning it to the kernel.

Every step allocates and frees tensors of a few megabytes, such as a member's logits and probabilities. By default glibc returns
that memory to the kernel, and faulting in fresh pages then takes longer than the work done in them (bench/LOG.md). A preloaded
allocator that already keeps memory is unaffected.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES = 32 * 2**20
"""The largest threshold that glibc accepts."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of up to 32 MiB. Returns False if that failed, as with C libraries that lack `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
