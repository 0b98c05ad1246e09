"""The data stage: write the primer's texts, conversations, pairs, tasks and exams as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instar.files import atomic_directory
from instar.lineage import (
    Cost,
    Stopwatch,
    hash_file,
    hash_value,
    peak_rss_bytes,
    write_lineage,
)
from instar.primer import mixture
from instar.primer.mixture import PrimerConfig, write_primer
from instar.stages.base import Stage, by_main, up_to_date
from instar.stages.config import StageConfig
from instar.training.display import Display

PRIMER = Path(mixture.__file__).parent


class DataConfig(StageConfig):
    """Write the embedded primer as JSON-lines files."""

    stage: str = "data"
    out: Path = Path("{run}/data")
    primer: PrimerConfig = PrimerConfig()
    """How much of everything."""

    def provenance(self) -> dict[str, Any]:
        """Includes the primer's own tables and code, so that a change there writes data anew."""
        parts = sorted(f for f in PRIMER.rglob("*") if f.suffix in (".py", ".tsv"))
        primer = hash_value([hash_file(part) for part in parts])
        record = super().provenance() | {"primer": primer}
        return record | {"fingerprint": hash_value(record)}


def run(config: DataConfig, display: Display) -> Path:
    """Write the files."""
    out, provenance = config.at(config.out), config.provenance()
    if up_to_date(out, provenance, display):
        return out
    watch = Stopwatch()
    display.stage("data", "writing the primer")
    with atomic_directory(out) as directory:
        lines = write_primer(config.primer, config.seed, directory)
        cost = Cost(watch.wall_s, watch.cpu_s, peak_rss_bytes=peak_rss_bytes())
        write_lineage(directory, provenance | {"stage": "data", "lines": lines}, cost)
    return out


STAGE = Stage("data", "write the embedded primer as files", DataConfig, by_main(run))
