"""What every stage of a recipe will take, before any of them is run."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
from rich.console import Console

from instar.errors import UserError
from instar.evaluation.examine import ExamConfig
from instar.files import read_json
from instar.grow import read_life
from instar.lineage import LINEAGE
from instar.planning import hardware as machines
from instar.planning.hardware import Hardware
from instar.planning.page import show
from instar.planning.prediction import (
    CONTEXT_BYTES,
    LEFT_BYTES,
    SHARDINGS,
    Sitting,
    StagePlan,
    item_bytes,
    kernel_bytes,
    predict,
    products,
)
from instar.planning.reckoned import reckoned
from instar.planning.survey import Survey, sampled_primer
from instar.planning.thumb import rules
from instar.planning.trial import Trial
from instar.planning.whole import process_bytes, tried
from instar.planning.workload import Workload
from instar.recipes import known
from instar.stages.config import StageConfig, TrainedStageConfig
from instar.stages.data import DataConfig
from instar.stages.registry import STAGES
from instar.stages.tokenizer import TokenizerConfig
from instar.training.display import Display

SAMPLE_CONVERSATIONS = 1500
"""About so many conversations are looked at, and as large a part of everything else."""

SAMPLE_VOCABULARY = 4096
"""The most tokens that are learnt from such a sample; there is not text enough for more."""


@dataclass
class Arguments:
    """Predict memory and time of every stage of a recipe, before any of them is run.

    On this machine, the parts of the model and some whole steps are tried, half a minute in all.
    Other machines are reckoned from their data sheets: then what is printed is an estimate that
    nobody has checked.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "mini"
    """A recipe's name, or a folder with a life.yaml."""
    hardware: str = "cpu"
    """`cpu` is this machine's processor; else `H100`, `8xH100`, `2x8xH100` (nodes), A100, H200,
    4090, …"""
    out: Path | None = None
    """Directory of the life; its data is looked at where there is any. runs/RECIPE by default."""
    stage: list[str] = field(default_factory=list)
    """Plan these stages and no others."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    """The verb ``plan``."""
    description = f"{inspect.getdoc(Arguments)}\n\nRecipes: {', '.join(known())}."
    arguments = tyro.cli(Arguments, args=argv, prog="instar plan", description=description)
    life, run, configs = read_life(arguments.recipe, arguments.out)
    hardware = machines.find(arguments.hardware)
    if hardware.is_cpu and (gpus := machines.gpus_here()):
        told = f"this is a plan for the processor; for the GPU add --hardware {gpus}"
        print(f"instar: {told}", file=sys.stderr)
    plans = plan(configs, hardware, arguments.stage, life.exams)
    if arguments.json:
        print(json.dumps(as_json(plans, hardware), indent=1))
    else:
        # What an earlier run took says something of this machine only.
        before = costs(run, list(plans)) if hardware.is_cpu else {}
        show(plans, hardware, before, Console(highlight=False))
    return 0


def plan(
    configs: dict[str, StageConfig],
    hardware: Hardware,
    only: list[str] | None = None,
    exams: ExamConfig | None = None,
) -> dict[str, StagePlan]:
    """Predict the stages of a life.

    Args:
        configs: All stages of the life by name, in order.
        hardware: Where they are to run.
        only: The stages to predict; all that train something where it is empty.
        exams: What is asked after each stage of the life.

    Raises:
        UserError: A stage reads something that no stage makes and that is not there.
    """
    for name in only or ():
        if name not in configs:
            raise UserError(f"this life has no stage {name!r}", f"It has: {', '.join(configs)}.")
    base = process_bytes() if hardware.is_cpu else CONTEXT_BYTES
    plans: dict[str, StagePlan] = {}
    met: set[tuple[object, ...]] = set()
    with surveyed(configs, hardware.is_cpu) as survey:
        trial = Trial(survey.tokenizer)
        exams = exams or ExamConfig()
        exam = Sitting(questions(exams, survey), exams.max_new_tokens)
        for name, config in configs.items():
            needs = STAGES[config.stage].needs
            if needs is None:
                continue
            work = asked(needs(config, survey), config, survey)
            met |= products(work)
            if only and name not in only:
                continue
            if hardware.is_cpu:
                plans[name] = measured(work, trial, hardware, base, met, exam)
            else:
                speed = reckoned(work.model, work.training.optimizer, hardware)
                shared = SHARDINGS if hardware.world_size > 1 else SHARDINGS[:1]
                found = {s: predict(work, speed, hardware, s, base) for s in shared}
                plans[name] = StagePlan(work, found)
    return plans


def asked(work: Workload, config: StageConfig, survey: Survey) -> Workload:
    """What a stage asks, with what learns of its model; later stages may begin with that."""
    assert isinstance(config, TrainedStageConfig)
    begins = config.beginning()
    adapter = config.adapter or (survey.adapter(begins) if begins else None)
    survey.models[config.out], survey.adapters[config.out] = work.model, adapter
    return replace(work, adapter=adapter, quantize=config.quantize)


def measured(
    work: Workload,
    trial: Trial,
    hardware: Hardware,
    base_bytes: float,
    met: Set[tuple[object, ...]],
    exam: Sitting,
) -> StagePlan:
    """Predict a stage on this machine's processor, whose speed is tried.

    Args:
        work: The stage.
        trial: Tries what was not tried for an earlier stage.
        hardware: This machine.
        base_bytes: Memory of a process without a model.
        met: Shapes of products of this stage and all before it.
        exam: What is asked after the stage.
    """
    speed = tried(work, trial.speed(work.model, work.training, work.rollout))
    alone = predict(work, speed, hardware, base_bytes=base_bytes)
    life = predict(work, speed, hardware, base_bytes=base_bytes, met=met)
    kernels = kernel_bytes(len(met), item_bytes(work, hardware))
    sat = exam.memory(work.model, base_bytes, kernels) if work.speaks else 0.0
    return StagePlan(work, {"ddp": alone}, LEFT_BYTES + max(life.memory_bytes, sat))


def questions(exams: ExamConfig, survey: Survey) -> list[int]:
    """Tokens of each exam question, where there are any yet."""
    path = survey.at(exams.exams)
    return survey.whole().prompts([exams.exams]) if path.exists() else []


@contextmanager
def surveyed(configs: dict[str, StageConfig], on_cpu: bool) -> Iterator[Survey]:
    """The life's data if it has any, else a small sample of the primer and a tokenizer of it."""
    data = next((c for c in configs.values() if isinstance(c, DataConfig)), DataConfig())
    tokenizer = next((c for c in configs.values() if isinstance(c, TokenizerConfig)), None)
    scale = max(1.0, data.primer.conversations / SAMPLE_CONVERSATIONS)
    run = next(iter(configs.values())).run
    if (run / "tokenizer").is_dir() and (tokenizer is None or (run / "data").is_dir()):
        yield Survey(run, every=round(scale), on_cpu=on_cpu)
        return
    with TemporaryDirectory() as folder:
        sample = type(data.primer)(**sampled_primer(data.primer.model_dump(), scale))
        quiet = Display(Console(quiet=True))
        here: dict[str, Any] = {"run": Path(folder)}
        STAGES["data"].run(data.model_copy(update=here | {"primer": sample}), quiet)
        trained = tokenizer or TokenizerConfig()
        small = here | {"vocab_size": min(trained.vocab_size, SAMPLE_VOCABULARY)}
        STAGES["tokenizer"].run(trained.model_copy(update=small), quiet)
        yield Survey(Path(folder), scale=scale, vocab_size=trained.vocab_size, on_cpu=on_cpu)


def costs(run: Path, stages: list[str]) -> dict[str, Any]:
    """What the stages of an earlier run took, by name; those that there are."""
    found = {name: run / name / LINEAGE for name in stages}
    return {name: read_json(path)["cost"] for name, path in found.items() if path.exists()}


def as_json(plans: dict[str, StagePlan], hardware: Hardware) -> dict[str, Any]:
    """The plan for programs: seconds, bytes, operations."""
    stages: dict[str, Any] = {}
    for name, one in plans.items():
        first = next(iter(one.alone.values()))
        stages[name] = {
            "parameters": one.work.model.parameters(),
            "learnt_parameters": one.work.weights.learnt,
            "tokens": first.tokens,
            "flops": first.flops,
            "predictions": {
                sharding: asdict(p) | {"memory_bytes": p.memory_bytes, "wall_s": p.wall_s}
                for sharding, p in one.alone.items()
            },
            "in_life_memory_bytes": one.in_life or None,
            "rules_of_thumb": asdict(rules(one.work.model, first.tokens)),
        }
    return {"hardware": asdict(hardware), "stages": stages}
