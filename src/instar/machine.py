"""What this machine can do: measured on it once, and remembered."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from instar.errors import UserError
from instar.files import read_json, write_json
from instar.processor import processor_name

MEASURED_S = 0.2
"""Seconds that one measurement may take, after warming up."""

CLEARLY = 1.1
"""How much faster than the default something must be to be chosen; noise is less."""


CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where a container reads the most memory that it may take, of both kinds of control groups."""


def product_flops(dtype: torch.dtype, device: torch.device) -> float:
    """How fast ``device`` multiplies matrices: the peak that training is compared with.

    The best of several square products, each large enough for the processor's full speed and
    small enough for its cache; noise of other programs only ever makes a product slower.

    Args:
        dtype: Format of the factors and of the product.
        device: Where.

    Returns:
        Floating-point operations per second, two for each multiplication with its addition.
    """
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    # Reading a value waits for the device.
    return 2 * size**3 / best_s(lambda: (a @ b.T)[0, 0].item())


def best_s(call: Callable[[], object]) -> float:
    """The fewest seconds that ``call`` took, of as many as ``MEASURED_S`` has room for."""
    call()  # choosing a kernel takes time, the first time
    best, end = float("inf"), time.perf_counter() + MEASURED_S
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def remembered(question: str, measure: Callable[[], Any]) -> Any:
    """What ``measure`` found (a JSON value), the first time that ``question`` was asked here.

    Answers are kept in ``instar/machine.json`` in the user's cache directory, apart for each
    processor, GPU, number of threads and version of torch; delete the file to have it all measured
    again. What a run chooses by them so stays the same when it is stopped and goes on.
    """
    path, key = cache_directory() / "machine.json", identity()
    try:
        known = read_json(path)
        answers = known.get(key, {})
    except (UserError, OSError, AttributeError):
        known, answers = {}, {}  # not there, or not ours
    if question not in answers:
        answers[question] = measure()
        with contextlib.suppress(OSError):  # a home that cannot be written to: measured each time
            write_json(path, {**known, key: answers})
    return answers[question]


def fastest(question: str, speeds: Callable[[], dict[str, float]], default: str) -> str:
    """Which of several ways to the same end is the fastest here.

    Another than the default is taken only if it is ``CLEARLY`` faster.

    Args:
        question: What is to be chosen.
        speeds: Measures how fast each way is, by name, in any unit.
        default: The way to take if nothing is clearly better.
    """
    found = remembered(question, speeds)
    best = max(found, key=found.__getitem__)
    return best if found[best] > CLEARLY * found.get(default, 0.0) else default


def identity() -> str:
    """What answers belong to: processor, threads and version of torch, and the GPU if any."""
    told = f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{told}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else told


def cache_directory() -> Path:
    """Where is kept what was found out, or built, for this machine.

    Where there is no home that can be written to, it is a directory that ends with the process.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instar"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except (OSError, RuntimeError):
        pass
    return Path(_for_now().name)


@functools.cache
def _for_now() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="instar-")


def memory_bytes(device: torch.device) -> int:
    """All the memory of a device, in use or not: a GPU's own, else the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [psutil.virtual_memory().total]
    for limit in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the word max is none
            found.append(int(limit.read_text(encoding="ascii")))
    return min(found)


def cache_bytes(device: torch.device) -> int:
    """Memory for keys and values where nobody says how much.

    Of a GPU a third of what is free now, so that it is asked once the models are there: while they
    move, they exist twice. Else a quarter of all.
    """
    if device.type != "cuda":
        return memory_bytes(device) // 4
    torch.cuda.empty_cache()  # what torch has only put by is free
    return torch.cuda.mem_get_info(device)[0] // 3


@functools.cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 faster than float32.

    A GPU is asked; a processor is asked too, and believed unless its products, measured once,
    clearly say otherwise: not every kind of hardware support is known by name.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    told = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))

    def speeds() -> dict[str, float]:
        formats = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        return {name: product_flops(dtype, device) for name, dtype in formats.items()}

    return fastest("products", speeds, "bfloat16" if told else "float32") == "bfloat16"
