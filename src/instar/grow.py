"""A whole life: every stage in turn, exams after each of them, and a report at the end."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from instar.adapters.opening import holds_model
from instar.config import Config, read_config, read_yaml
from instar.corpus.lessons import EXAMS, TITLED
from instar.distributed import is_main, launched, on_main
from instar.errors import UserError
from instar.evaluation.examine import ExamConfig, Examiner
from instar.recipes import find, known
from instar.stages.config import StageConfig, TrainedStageConfig
from instar.stages.corpus import INSTEAD, OwnTextConfig, own_text
from instar.stages.registry import STAGES
from instar.stages.sft import SFTConfig
from instar.training.display import Display
from instar.training.parallel import Parallel
from instar.training.track import TrackerName

REPLY_TOKENS = 192
"""Tokens that a reply may have where it may be a whole document of the user's."""


class LifeConfig(Config):
    """A whole life: which stages, in which order, and what is asked after each."""

    stages: list[str]
    """Stage files beside this one, without `.yaml`, each after those that it builds on."""
    exams: ExamConfig = ExamConfig()
    """What is asked after each stage."""
    compare: list[str] = ["dpo", "ppo", "rlvr"]
    """Stages whose replies are compared with those of `against`."""
    against: str = "sft"
    """The stage that they are compared with."""
    judge: str = "reward"
    """The reward model of that comparison."""


@dataclass
class Arguments:
    """Raise a language model from raw text to a chat partner.

    Finished stages whose config and parents have not changed are kept; an interrupted one goes
    on where it stopped. The report is written to OUT/report.html and OUT/report.json.
    """

    recipe: Annotated[str, tyro.conf.Positional] = "mini"
    """A recipe's name, or a folder with a life.yaml."""
    out: Path | None = None
    """Directory of the life; runs/RECIPE by default."""
    corpus: str | None = None
    """Your own text: a file, folder, pattern or hub dataset. The tokenizer and pretraining learn
    from it in place of the primer's readings; the primer's lessons follow."""
    corpus_recipe: str = "books"
    """How that text is cleaned: a corpus recipe, as for `instar data prepare`."""
    only: list[str] = field(default_factory=list)
    """Run these stages and no others."""
    skip: list[str] = field(default_factory=list)
    """Leave these stages out."""
    until: str | None = None
    """Stop after this stage."""
    track: list[TrackerName] = field(default_factory=list)
    """Trackers that show the metrics of every stage as well, if they are installed."""
    parallel: Parallel | None = None
    """What each of several processes holds, in every stage: `ddp` a copy of the models, `zero2`
    shards of gradients and optimizer state, `zero3` (FSDP) shards of all that learns, `hsdp` those
    within each node. By default as each stage's file says."""


def main(argv: list[str]) -> int:
    """The verb ``grow``."""
    description = (
        f"{inspect.getdoc(Arguments)}\n\nRecipes: {', '.join(known())}. To change what a stage "
        f"does, copy the folder {find('mini')}, edit its YAML files, and give the copy: "
        "instar grow FOLDER."
    )
    arguments = tyro.cli(Arguments, args=argv, prog="instar grow", description=description)
    life, run, configs = read_life(arguments.recipe, arguments.out)
    if arguments.corpus:
        own = own_text(arguments.corpus, arguments.corpus_recipe, run, configs.get("data"))
        life, configs = on_own_text(life, configs, own)
    configs = {name: launched_as(config, arguments) for name, config in configs.items()}
    names = choose(life.stages, arguments)
    with launched(), Display() as display:
        grow(life, {name: configs[name] for name in names}, run, display)
    return 0


def read_life(recipe: str, out: Path | None) -> tuple[LifeConfig, Path, dict[str, StageConfig]]:
    """A recipe's life, its directory, and the config of every stage by name, in order.

    Args:
        recipe: A recipe's name, or a folder with a life.yaml.
        out: Directory of the life; runs/RECIPE by default.

    Raises:
        UserError: There is no such recipe, or a file of it is not valid.
    """
    folder = find(recipe)
    life = read_config(LifeConfig, folder / "life.yaml")
    run = out or Path("runs") / folder.name
    return life, run, {name: read_stage(folder / f"{name}.yaml", run) for name in life.stages}


def on_own_text(
    life: LifeConfig, configs: dict[str, StageConfig], own: OwnTextConfig
) -> tuple[LifeConfig, dict[str, StageConfig]]:
    """A life that begins with a user's own text, and learns to write to its titles.

    Args:
        life: What it was.
        configs: Its stages.
        own: The stage that reads the text.
    """
    stages = {name: type(c).parse(_instead(c.model_dump()), name) for name, c in configs.items()}
    for name, config in stages.items():
        if isinstance(config, SFTConfig):
            data = [*config.data, Path("{run}/corpus") / TITLED]
            stages[name] = config.model_copy(update={"data": data})
    exams = ExamConfig.parse(_instead(life.exams.model_dump()), "exams")
    asked = {"own": Path("{run}/corpus") / EXAMS}
    longest = {"max_new_tokens": max(exams.max_new_tokens, REPLY_TOKENS)}
    exams = exams.model_copy(update=asked | longest)
    life = life.model_copy(update={"stages": ["corpus", *life.stages], "exams": exams})
    return life, {"corpus": own, **stages}


def _instead(value: Any) -> Any:
    """Settings that name the user's text where the primer's readings stood."""
    if isinstance(value, dict):
        return {key: _instead(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_instead(part) for part in value]
    return INSTEAD.get(str(value), value) if isinstance(value, (str, Path)) else value


def launched_as(config: StageConfig, arguments: Arguments) -> StageConfig:
    """A stage with the trackers and the sharding of the command line; its outcome is the same."""
    asked: dict[str, Any] = {"track": arguments.track, "parallel": arguments.parallel}
    asked = {name: value for name, value in asked.items() if value}
    if not asked or not isinstance(config, TrainedStageConfig):
        return config
    training = config.training.model_copy(update=asked)
    return config.model_copy(update={"training": training})


def choose(stages: list[str], arguments: Arguments) -> list[str]:
    """The stages to run, in the life's order.

    Raises:
        UserError: An option names a stage that the life does not have.
    """
    asked = [*arguments.only, *arguments.skip, *([arguments.until] if arguments.until else [])]
    for name in asked:
        if name not in stages:
            raise UserError(f"this life has no stage {name!r}", f"It has: {', '.join(stages)}.")
    last = stages.index(arguments.until) if arguments.until else len(stages)
    chosen = [
        name
        for place, name in enumerate(stages)
        if place <= last
        and name not in arguments.skip
        and (not arguments.only or name in arguments.only)
    ]
    if not chosen:
        raise UserError("these options leave no stage to run", f"Choose of: {', '.join(stages)}.")
    return chosen


def read_stage(path: Path, run: Path) -> StageConfig:
    """A stage's config from its file, with the life's directory filled in.

    Raises:
        UserError: As ``read_config`` does, or where the file names no known stage.
    """
    values: dict[str, Any] = read_yaml(path)
    name = values.get("stage")
    if name not in STAGES:
        raise UserError(f"{path}: `stage` is {name!r}", f"Known stages: {', '.join(STAGES)}.")
    return STAGES[name].config.parse(values | {"run": str(run)}, str(path))


def grow(life: LifeConfig, configs: dict[str, StageConfig], run: Path, display: Display) -> None:
    """Run the stages, examine what they made, write the report.

    Args:
        life: What is asked after each stage.
        configs: Stage file to its config, in order.
        run: Directory of the life.
        display: Shows how far it is.
    """
    from instar.report.page import write_report

    try:
        _grow(life, configs, Examiner(life.exams, run, display), run, display)
    finally:
        # Also when a later stage fails or is stopped: what is there can be read.
        if is_main() and any(run.glob("[!.]*/lineage.json")):
            _, page = write_report(run)
            display.note(f"report: {page}")
    able = [n for n in configs if (run / n / "generation_config.json").exists()]
    if able:
        display.note(f"talk to it: instar chat {run / able[-1]}")


def _grow(
    life: LifeConfig,
    configs: dict[str, StageConfig],
    examiner: Examiner,
    run: Path,
    display: Display,
) -> None:
    """The stages, each with its exams."""
    for place, (name, config) in enumerate(configs.items(), start=1):
        display.note(f"[bold]{place}/{len(configs)} {name}[/bold]  {STAGES[config.stage].summary}")
        out = STAGES[config.stage].run(config, display)
        against, judge = run / life.against, run / life.judge
        compared = (against, judge) if name in life.compare else (None, None)
        display.note(on_main(lambda out=out, models=compared: _examine(examiner, out, *models)))


def _examine(examiner: Examiner, out: Path, against: Path | None, judge: Path | None) -> str:
    """Ask what there is to ask; returns the summary."""
    if holds_model(out):
        ready = against and judge and against.is_dir() and judge.is_dir()
        examiner.examine(out, against if ready else None, judge if ready else None)
    return summary(out)


def summary(directory: Path) -> str:
    """One line on what a stage cost and how it did."""
    from instar.evaluation.examine import RESULT
    from instar.files import read_json
    from instar.lineage import LINEAGE

    cost = read_json(directory / LINEAGE)["cost"]
    text = f"  {cost['wall_s']:.0f} s"
    if cost["tokens"]:
        text += f", {cost['tokens'] / 1e6:.2f}M tokens"
    text += f", peak {cost['peak_rss_bytes'] / 2**30:.1f} GiB"
    if gpu := cost.get("peak_gpu_bytes"):
        text += f", of the GPU {gpu / 2**30:.1f} GiB"
    if (directory / RESULT).exists():
        exams = read_json(directory / RESULT)["exams"]
        text += f"; exams in {cost['exam_wall_s']:.0f} s: "
        text += ", ".join(f"{name} {_figure(name, e['score'])}" for name, e in exams.items())
    return text


def _figure(exam: str, score: float) -> str:
    return f"{score:.3f}" if exam.startswith("bits") else f"{score:.0%}"
