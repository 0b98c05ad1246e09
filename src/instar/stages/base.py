"""What all stages share: a verb, and the job that a stage which trains makes of its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from instar.data.sources import Source
from instar.distributed import on_main
from instar.errors import UserError
from instar.lineage import LINEAGE, fingerprint_of
from instar.model import CausalLM, ScoreModel
from instar.objectives.base import Objective
from instar.planning.survey import Survey
from instar.planning.workload import Workload
from instar.stages.config import StageConfig
from instar.tokenizer.hf import Tokenizer
from instar.training.display import Display


@dataclass
class Job:
    """A stage, ready to be trained.

    Attributes:
        objective: Owns what learns.
        source: What it learns from.
        product: The model to keep.
        tokenizer: Saved beside it.
        flops: Floating-point operations of a run that trained on so many tokens, annotating and
            sampling included.
        validate: Measures held-out data; at least `loss`.
        finish: What is done to the product when training is over.
        notes: What was left out of the data.
    """

    objective: Objective
    source: Source
    product: CausalLM | ScoreModel
    tokenizer: Tokenizer
    flops: Callable[[int], int]
    validate: Callable[[], dict[str, float]] | None = None
    finish: Callable[[], None] = lambda: None
    notes: Sequence[str] = ()


S = TypeVar("S", bound=StageConfig)


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A verb: its name, its config and what it does.

    Attributes:
        name: The verb.
        summary: One line for `--help`.
        config: Class of its config.
        run: Does it; returns the directory it wrote.
        build: Makes what is trained; none for stages that train nothing.
        needs: What it will ask of a machine, given its data; the same.
    """

    name: str
    summary: str
    config: type[S]
    run: Callable[[S, Display], Path]
    build: Callable[[S], Job] | None = None
    needs: Callable[[S, Survey], Workload] | None = None


def up_to_date(out: Path, provenance: dict[str, Any], display: Display) -> bool:
    """Whether the output exists and was made from the same.

    Raises:
        UserError: Something is there that no stage has written; it would be replaced.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / LINEAGE).exists():
        raise UserError(f"{out} exists, and no stage has made it", "Choose another `out`.")
    if fingerprint_of(out) != provenance["fingerprint"]:
        if (out / LINEAGE).exists():
            display.note(f"{out} was made otherwise, and will be replaced; another --out keeps it")
        return False
    display.note(f"{out} is up to date; delete it to make it again")
    return True


def by_main(run: Callable[[S, Display], Path]) -> Callable[[S, Display], Path]:
    """The run of a stage that is no work for many: rank 0 does it, the others wait."""
    return lambda config, display: on_main(lambda: run(config, display))
