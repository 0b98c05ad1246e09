"""Keep freed memory: every training step asks for the blocks that the last one gave back."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def _glibc(name: str) -> Callable[..., int]:
    """A function of glibc; elsewhere one that does nothing, and says so by returning 0."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return lambda *_: 0


def keep_freed_memory() -> bool:
    """Tell glibc to hand freed memory out again instead of returning it to the system.

    By default every large tensor is fresh pages, which the system must find and fill with zeros:
    a seventh of a training step on a CPU (``docs/mini.md``). Blocks that are kept may as well be
    huge pages, which torch asks for if told to before it allocates. What is held afterwards is
    about the peak of what was used, until ``release_freed_memory``. Elsewhere than on Linux with
    glibc, nothing happens.

    Returns:
        Whether the allocator took the advice.
    """
    mallopt = _glibc("mallopt")
    took = bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
    if took:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return took


def release_freed_memory() -> None:
    """Give back what was freed, at the end of something large, and what only cycles still hold."""
    gc.collect()
    _glibc("malloc_trim")(0)
