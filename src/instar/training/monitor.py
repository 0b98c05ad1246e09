"""What a run takes of the machine, sampled in the background."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil

from instar.files import whole_lines

PERIOD_S = 2.0
"""Seconds between two samples: one takes well under a millisecond."""

ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
"""Microjoules that the processor has used, where the system lets one read it (AMD's as well)."""


class Monitor:
    """Appends a row to a file every ``PERIOD_S`` seconds while entered.

    A row holds ``elapsed_s``; ``cpu_percent`` of this process (200 is two cores) and its
    ``rss_bytes``; ``memory_percent`` of the whole machine; for each GPU that NVML knows
    ``gpu<i>_percent``, ``gpu<i>_bytes`` and ``gpu<i>_watts``; where the machine tells, ``joules``
    of the processor. Times and joules begin anew with each sitting.

    Args:
        path: JSON lines; an earlier sitting's are kept, but for half a row at their end, which a
            power cut or a full disk may leave.
        period_s: Seconds between two rows.
    """

    def __init__(self, path: Path, period_s: float = PERIOD_S) -> None:
        self.path, self.period_s = path, period_s
        self._process = psutil.Process()
        self._gpus = _nvml_handles()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._began = time.perf_counter()
        self._energy = _read_energy()

    def __enter__(self) -> Monitor:
        whole_lines(self.path)
        self._process.cpu_percent()  # the first call only sets the mark
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> dict[str, float]:
        """One row."""
        row = {
            "elapsed_s": round(time.perf_counter() - self._began, 3),
            "cpu_percent": self._process.cpu_percent(),
            "rss_bytes": self._process.memory_info().rss,
            "memory_percent": psutil.virtual_memory().percent,
        }
        for index, handle in enumerate(self._gpus):
            row |= {f"gpu{index}_{name}": value for name, value in _read_gpu(handle).items()}
        energy = _read_energy()
        # The counter begins again at nothing when it is full.
        if energy is not None and self._energy is not None and energy >= self._energy:
            row["joules"] = (energy - self._energy) / 1e6
        return row

    def _watch(self) -> None:
        while not self._stop.wait(self.period_s):
            try:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(self.sample()) + "\n")
            except OSError:
                return  # a full disk is for those to report who save something that matters


def _nvml_handles() -> list[object]:
    """The GPUs that NVML can read; none where it is not installed."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            _read_gpu(handle)  # a slice of a GPU may not tell what it uses
        return handles
    except Exception:  # NVML's own errors have no base class that is there without NVML
        return []


def _read_gpu(handle: object) -> dict[str, float]:
    import pynvml  # pyright: ignore[reportMissingImports]

    return {
        "percent": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }


def _read_energy() -> float | None:
    """Microjoules on the processor's counter."""
    try:
        return float(ENERGY.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
