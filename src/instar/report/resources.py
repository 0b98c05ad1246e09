"""What a life took of the machine from beginning to end: one chart a quantity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from markupsafe import Markup

from instar.report import plots
from instar.report.tables import Record, Stage

GIB = 2**30


def _gpus(row: Record, quantity: str) -> list[float]:
    """What each GPU of a sample tells."""
    return [v for k, v in row.items() if k.startswith("gpu") and k.endswith(f"_{quantity}")]


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _sum(values: list[float], unit: float = 1.0) -> float | None:
    return sum(values) / unit if values else None


QUANTITIES: tuple[tuple[str, str, Callable[[Record], float | None]], ...] = (
    ("Processor", "% of one core", lambda row: row.get("cpu_percent")),
    ("Memory of the process", "GiB", lambda row: row["rss_bytes"] / GIB),
    ("GPUs, mean", "% busy", lambda row: _mean(_gpus(row, "percent"))),
    ("Memory of all GPUs", "GiB", lambda row: _sum(_gpus(row, "bytes"), GIB)),
    ("Power of all GPUs", "W", lambda row: _sum(_gpus(row, "watts"))),
)
"""Title, unit, and where a sample has it."""


def timelines(stages: Sequence[Stage]) -> list[Markup]:
    """A chart for every quantity that was sampled, stages side by side.

    Args:
        stages: In order; those that were not sampled are left out.
    """
    charts = []
    for title, unit, of in QUANTITIES:
        stretches = []
        for stage in stages:
            points = [(at, of(row)) for at, row in _on_one_clock(stage.resources)]
            known = [(at, value) for at, value in points if value is not None]
            if known:
                times, values = zip(*known, strict=True)
                stretches.append(plots.Stretch(stage.name, times, values))
        if stretches:
            charts.append(plots.timeline(stretches, title, unit))
    return charts


def _on_one_clock(rows: Sequence[Record]) -> list[tuple[float, Record]]:
    """Samples with the seconds since the stage began: every sitting has a clock of its own."""
    clocked: list[tuple[float, Record]] = []
    before = last = 0.0
    for row in rows:
        if row["elapsed_s"] < last:
            before += last
        last = row["elapsed_s"]
        clocked.append((before + last, row))
    return clocked
