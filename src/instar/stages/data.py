"""The data stage: write the primer's texts, conversations, pairs, tasks and exams as files."""

from __future__ import annotations

from pathlib import Path

from instar.files import atomic_directory
from instar.lineage import Cost, Stopwatch, peak_rss_bytes
from instar.primer.mixture import PrimerConfig, write_primer
from instar.stages.base import Stage, StageConfig, finish, up_to_date
from instar.training.display import Display


class DataConfig(StageConfig):
    """Write the embedded primer as JSON-lines files."""

    stage: str = "data"
    out: Path = Path("{run}/data")
    primer: PrimerConfig = PrimerConfig()
    """How much of everything."""


def run(config: DataConfig, display: Display) -> Path:
    """Write the files."""
    out = config.at(config.out)
    if up_to_date(config, display):
        return out
    watch = Stopwatch()
    display.stage("data", "writing the primer")
    with atomic_directory(out) as directory:
        lines = write_primer(config.primer, config.seed, directory)
        cost = Cost(watch.wall_s, watch.cpu_s, peak_rss_bytes=peak_rss_bytes())
        finish(config, directory, cost, {"lines": lines})
    return out


STAGE = Stage("data", "write the embedded primer as files", DataConfig, run)
