"""Keep freed memory: every training step asks for the blocks that the last one gave back."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to hand freed memory out again instead of returning it to the system.

    By default every large tensor is fresh pages, which the system must find and fill with zeros:
    a seventh of a training step on a CPU (``docs/mini.md``). Blocks that are kept may as well be
    huge pages, which torch asks for if told to before it allocates. What is held afterwards is
    the peak of what was used. Elsewhere than on Linux with glibc, nothing happens.

    Returns:
        Whether the allocator took the advice.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
