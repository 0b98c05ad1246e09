"""Where a directory came from: a chain of hashes, and what each link cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import instar
from instar.files import read_json, write_json
from instar.memory import release_freed_memory
from instar.processor import processor_name

LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Cost:
    """What a stage took: of rank 0, where there are several, but for tokens and FLOPs.

    Attributes:
        wall_s: Seconds on the clock, set-up and saving included, exams apart.
        cpu_s: Processor seconds, of all threads together.
        tokens: Token positions that went through training, padding included.
        flops: Estimated floating-point operations (see ``ModelConfig.flops_per_token``).
        peak_rss_bytes: The most memory that the stage or its exams held.
        exam_wall_s: Seconds of the exams that followed.
        peak_gpu_bytes: The most of a GPU's memory that tensors of both held; 0 without a GPU.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    tokens: int = 0
    flops: int = 0
    peak_rss_bytes: int = 0
    exam_wall_s: float = 0.0
    peak_gpu_bytes: int = 0


class Stopwatch:
    """Measures wall and processor seconds from its making."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def add(self, wall_s: float, cpu_s: float) -> None:
        """Count what earlier sittings of a resumed run took as well."""
        self._wall -= wall_s
        self._cpu -= cpu_s

    @property
    def wall_s(self) -> float:
        """Seconds on the clock."""
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        """Processor seconds of this process."""
        return time.process_time() - self._cpu


def reset_peak_rss() -> None:
    """Begin to count the peak of memory anew, where the system can (Linux).

    What was freed before is given back first, or it would count for whoever comes next.
    """
    release_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_bytes() -> int:
    """The most memory this process has held since ``reset_peak_rss``; else since its start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def reset_peak_gpu() -> None:
    """Begin to count the peak of the GPU's memory anew, where one is at work."""
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def peak_gpu_bytes() -> int:
    """The most that tensors have held on this process's GPU since ``reset_peak_gpu``."""
    return cuda.max_memory_allocated() if (cuda := _cuda()) else 0


def _cuda() -> Any:
    """``torch.cuda`` where a GPU is at work; work on text alone does not wait for torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_value(value: object) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def environment() -> dict[str, str]:
    """The versions and the machine that a result depends on; a GPU where one was at work."""
    torch = sys.modules.get("torch")  # work on text alone does not wait for it
    gpu = {"gpu": cuda.get_device_name()} if (cuda := _cuda()) else {}
    return gpu | {
        "instar": instar.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": str(torch.get_num_threads() if torch else os.cpu_count()),
        "machine": platform.machine(),
        "processor": processor_name(),
    }


def write_lineage(directory: Path, record: dict[str, Any], cost: Cost) -> None:
    """Write ``lineage.json``: what made this directory, from what, at which cost."""
    write_json(directory / LINEAGE, record | {"cost": asdict(cost), "environment": environment()})


def fingerprint_of(directory: Path) -> str | None:
    """The fingerprint a finished directory was made under; none where it is unfinished."""
    if not (directory / LINEAGE).exists():
        return None
    return read_json(directory / LINEAGE).get("fingerprint")
