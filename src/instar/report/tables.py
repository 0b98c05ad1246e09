"""The numbers of a run, gathered from its directories into one record (``docs/report.md``)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instar.errors import UserError

LIFE = ("corpus", "data", "tokenizer", "pretrain", "sft", "reward", "dpo", "ppo", "rlvr")
"""The order in which stages are shown; others follow by name."""

REFERENCE = "sft"
"""The stage that later ones are compared with."""

SCHEMA = 1

PEAKS = ("peak_rss_bytes", "peak_gpu_bytes")
"""What a stage held of the machine's memory and of a GPU's."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What one stage left behind; empty where it left nothing.

    Attributes:
        name: Name of its directory.
        lineage: Where it came from, its config and its cost.
        metrics: Rows of the training log.
        resources: Samples of what it took of the machine.
        exams: Exam name to score, stderr, n and groups.
        samples: Prompts with this stage's replies.
        comparison: The stage against another one, usually SFT.
        ngram: Bits per byte of the n-gram baseline, by language.
    """

    name: str
    lineage: Record
    metrics: list[Record] = field(default_factory=list)
    resources: list[Record] = field(default_factory=list)
    exams: Record = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    comparison: Record = field(default_factory=dict)
    ngram: Record = field(default_factory=dict)

    @property
    def parents(self) -> list[str]:
        """Names of the directories that it was made from."""
        return [Path(parent).name for parent in self.lineage.get("parents", [])]


def read_run(run: Path) -> list[Stage]:
    """The finished stages of a run, in the order of a life.

    Args:
        run: Holds one directory a stage, each with a ``lineage.json`` once it is finished.

    Raises:
        UserError: There is no finished stage, or a file is not what it should be.
    """
    if not run.is_dir():
        raise UserError(f"no such directory: {run}", "Give the directory of a run.")
    found = [path.parent.name for path in run.glob("*/lineage.json")]
    # Names with a dot are directories that were still being written when something stopped it.
    names = sorted(name for name in found if not name.startswith("."))
    if not names:
        raise UserError(
            f"{run} holds no finished stage (no */lineage.json)",
            "Give the directory of a run: the one that holds pretrain/, sft/ and so on.",
        )
    known = [name for name in LIFE if name in names]
    return [_read_stage(run / name) for name in known + [n for n in names if n not in LIFE]]


def _read_stage(directory: Path) -> Stage:
    def read(name: str, default: Any) -> Any:
        path = directory / name
        return _parse(path, path.read_text(encoding="utf-8")) if path.exists() else default

    def rows(name: str) -> list[Record]:
        log = directory / name
        lines = log.read_text(encoding="utf-8").split("\n") if log.exists() else [""]
        # Whatever follows the last line break is a row that was still being written.
        return [_parse(log, line) for line in lines[:-1] if line]

    return Stage(
        name=directory.name,
        lineage=read("lineage.json", {}),
        metrics=rows("metrics.jsonl"),
        resources=rows("resources.jsonl"),
        exams=read("exams.json", {}).get("exams", {}),
        samples=read("samples.json", []),
        comparison=read("comparison.json", {}),
        ngram=read("ngram.json", {}),
    )


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}", "Run its stage again.") from None


def collect(run: Path) -> Record:
    """The record that is written as ``report.json``; ``docs/report.md`` describes every field.

    Args:
        run: Directory of the run.

    Raises:
        UserError: As ``read_run``.
    """
    return summarise(run.resolve().name, read_run(run))


def summarise(name: str, stages: list[Stage]) -> Record:
    """The same, from stages that were already read.

    Args:
        name: Name of the run.
        stages: Its stages, in the order of a life.
    """
    return {
        "schema": SCHEMA,
        "run": name,
        "total": _total([stage.lineage.get("cost", {}) for stage in stages]),
        "stages": {
            stage.name: {
                "parents": stage.parents,
                "parameters": stage.lineage.get("parameters"),
                "cost": stage.lineage.get("cost", {}),
                "exams": stage.exams,
            }
            for stage in stages
        },
        "comparisons": {
            f"{stage.name}_vs_{stage.comparison.get('against', REFERENCE)}": stage.comparison
            for stage in stages
            if stage.comparison
        },
        "forgetting": _forgetting(stages),
        "baselines": {"ngram": next((stage.ngram for stage in stages if stage.ngram), {})},
        "environment": next(
            (s.lineage["environment"] for s in reversed(stages) if s.lineage.get("environment")), {}
        ),
    }


def _total(costs: list[Record]) -> Record:
    """Sums over stages; of memory the most that any needed."""

    def add(key: str) -> float:
        return sum(cost.get(key) or 0 for cost in costs)

    return {
        "wall_s": add("wall_s") + add("exam_wall_s"),
        "stages_wall_s": add("wall_s"),
        "exam_wall_s": add("exam_wall_s"),
        "cpu_s": add("cpu_s"),
        "tokens": add("tokens"),
        "flops": add("flops"),
        **{name: max((cost.get(name) or 0 for cost in costs), default=0) for name in PEAKS},
    }


def _forgetting(stages: list[Stage]) -> Record:
    """What each stage after SFT changed in every exam that both sat.

    The standard error of the difference takes both scores as independent. They share their
    questions, which makes them alike, so the true error is smaller: a change of two of these is
    a change.
    """
    names = [stage.name for stage in stages]
    if REFERENCE not in names:
        return {}
    at = names.index(REFERENCE)
    before = stages[at].exams
    changes = {
        stage.name: {
            exam: _change(before[exam], stage.exams[exam]) for exam in before if exam in stage.exams
        }
        for stage in stages[at + 1 :]
    }
    return {name: change for name, change in changes.items() if change}


def _change(before: Record, after: Record) -> Record:
    errors = before.get("stderr"), after.get("stderr")
    known = [error for error in errors if error is not None]
    return {
        "delta": after["score"] - before["score"],
        "stderr": math.hypot(*known) if len(known) == 2 else None,
    }
