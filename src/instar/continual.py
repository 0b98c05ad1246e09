"""Teach a finished model something new, in several ways, and see what each way forgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from instar.config import Config, read_config
from instar.data.readers import read_all
from instar.distributed import launched, on_main
from instar.errors import UserError
from instar.evaluation.examine import ExamConfig
from instar.evaluation.forgetting import Sitting, blind, counted, kept, learnt, sit, worst
from instar.files import matching, read_json, write_json, write_text
from instar.lineage import fingerprint_of, hash_file, hash_value
from instar.primer.subject import NAME, SubjectConfig, write_subject
from instar.report.keeping import as_markdown, drawn
from instar.stages.registry import STAGES
from instar.stages.sft import SFTConfig
from instar.training.display import Display

KEPT, LEARNT = 0.98, 0.95
"""The bar: of the old exams, and of the best score in the new one."""


class ContinualConfig(Config):
    """A model, something new, and ways to teach it. Paths may begin with `{run}`."""

    run: Path = Path("runs/mini")
    """Directory of a finished life."""
    out: Path = Path("{run}/continual")
    """Directory to write: one checkpoint a method, and the table."""
    init: Path = Path("{run}/sft")
    """The checkpoint that is taught."""
    seed: int = 0
    """Decides the subject's conversations and the order of everything."""
    subject: SubjectConfig | None = SubjectConfig()
    """The primer's own new subject, written to `{run}/continual/subject`; null where `exams` and
    the stage's `data` and `valid` are yours."""
    exams: list[Path] = [Path("{run}/continual/subject/exams.jsonl")]
    """Questions about what is new; their `exam` is `subject`."""
    old: ExamConfig = ExamConfig()
    """The exams that the start has sat."""
    stage: dict[str, Any]
    """Settings of the fine-tuning stage that all methods share."""
    methods: dict[str, dict[str, Any]]
    """Methods by name, each with the settings that it changes."""

    def at(self, path: Path) -> Path:
        """A path of this config with `{run}` filled in."""
        return Path(str(path).replace("{run}", str(self.run)))

    def stages(self) -> dict[str, SFTConfig]:
        """Each method's stage.

        Raises:
            UserError: A setting is not one of fine-tuning's.
        """
        common = {"run": str(self.run), "init": str(self.init), "seed": self.seed}
        made = {}
        for name, changes in self.methods.items():
            values = over(over(common, self.stage), changes) | {"out": str(self.out / name)}
            made[name] = SFTConfig.parse(values, f"methods.{name}")
        return made


def over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them changed, at any depth."""
    merged = dict(values)
    for key, change in changes.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(change, Mapping)
        merged[key] = over(merged[key], change) if both else change
    return merged


@dataclass
class Arguments:
    """Teach a finished model something new, and see what each way of doing so forgets.

    Every method is a fine-tuning stage of its own, from the same checkpoint. Finished ones are
    kept, an interrupted one goes on where it stopped. The table is written to
    RUN/continual/table.md, table.json and table.svg.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """A YAML file, such as recipes/continual.yaml."""
    run: Path | None = None
    """Directory of a finished life; by default the recipe's."""
    only: list[str] = field(default_factory=list)
    """Run these methods and no others; the table holds all that are finished."""


def main(argv: list[str]) -> int:
    """The verb ``continual``."""
    arguments = tyro.cli(Arguments, args=argv, prog="instar continual")
    config = read_config(ContinualConfig, arguments.recipe)
    if arguments.run:
        config = config.model_copy(update={"run": arguments.run})
    for name in arguments.only:
        if name not in config.methods:
            known = ", ".join(config.methods)
            raise UserError(f"{arguments.recipe} has no method {name!r}", f"It has: {known}.")
    with launched(), Display() as display:
        continual(config, arguments.only or list(config.methods), display)
    return 0


def continual(config: ContinualConfig, names: list[str], display: Display) -> dict[str, Any]:
    """Run some methods, examine them, and write the table of all that are finished.

    Args:
        config: The start, what is new, and the methods.
        names: Which methods.
        display: Shows how far it is.

    Returns:
        What ``table.json`` holds.

    Raises:
        UserError: There is no life to go on from, or a setting is wrong.
    """
    stages = config.stages()
    on_main(lambda: _write_subject(config))
    start = on_main(lambda: _sitting(config, config.at(config.init), "start", display))
    sittings: dict[str, Sitting] = {}
    for name, stage in stages.items():
        out = config.at(stage.out)
        if name in names:
            display.note(f"[bold]{name}[/bold]")
            STAGES["sft"].run(stage, display)
        elif on_main(lambda o=out, s=stage: fingerprint_of(o) != s.provenance()["fingerprint"]):
            continue  # not made yet, or with other settings
        sittings[name] = on_main(lambda o=out, n=name: _sitting(config, o, n, display))
    return on_main(lambda: _write_table(config, start, sittings, display))


def _write_subject(config: ContinualConfig) -> None:
    if config.subject is None:
        return
    directory = config.at(Path("{run}/continual/subject"))
    directory.mkdir(parents=True, exist_ok=True)
    write_subject(config.subject, config.seed, directory)


def _found(config: ContinualConfig, *paths: Path) -> list[Path]:
    return [file for path in paths for file in matching(config.at(path))]


def _sitting(config: ContinualConfig, directory: Path, name: str, display: Display) -> Sitting:
    """What a checkpoint answers; read where that was asked before."""
    own = [config.old.own] if config.old.own else []
    asked = _found(config, config.old.exams, *own, *config.exams)
    readings = _found(config, config.old.readings)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{directory} is not a checkpoint", "Grow the life first: instar grow.")
    hashes = [hash_file(path) for path in [*asked, *readings, *weights]]
    key = hash_value([config.old.max_new_tokens, hashes])
    result = config.at(config.out) / "sittings" / f"{name}.json"
    if result.exists() and (known := read_json(result))["key"] == key:
        return Sitting(known["marks"], known["bits"])
    display.stage(name, "exams")
    items: list[Any] = read_all(asked, ("messages", "verifier", "exam"))
    texts: list[Any] = read_all(readings, ("text",))
    sitting = sit(directory, items, texts, config.old.max_new_tokens, display.step)
    write_json(result, {"key": key, **asdict(sitting)})
    return sitting


def _write_table(
    config: ContinualConfig, start: Sitting, sittings: dict[str, Sitting], display: Display
) -> dict[str, Any]:
    """Learnt against forgotten, as JSON, as a table and as a picture."""
    old = read_all(_found(config, config.old.exams), ("messages", "verifier", "exam"))
    guessed = blind(old)  # type: ignore[arg-type]
    known = Sitting({k: v for k, v in start.marks.items() if k in guessed}, start.bits)
    exams = counted(known, guessed)
    if not exams:
        raise UserError(f"{config.init} passed none of its exams", "There is nothing to forget.")
    best = max((s.score(NAME) for s in sittings.values()), default=0.0)
    rows = {}
    for name, sitting in {"start": start, **sittings}.items():
        share, new = kept(start, sitting, exams), learnt(sitting, NAME)
        lost, left = worst(start, sitting, exams)
        rows[name] = {
            "kept": share._asdict(),
            "learnt": new._asdict(),
            "of_best": new.score / best if best else 0.0,
            "worst": {"exam": lost, "left": left},
            "bits": sum(sitting.bits.values()) / len(sitting.bits),
            "exams": {exam: sitting.score(exam) for exam in sitting.marks},
        }
        passed = share.score >= KEPT and rows[name]["of_best"] >= LEARNT
        rows[name]["passed"] = passed and name != "start"
    guesses = {exam: guessed[exam] for exam in known.marks}
    record = {"counted": exams, "guessed": guesses, "bar": [KEPT, LEARNT], "methods": rows}
    out = config.at(config.out)
    write_json(out / "table.json", record)
    write_text(out / "table.md", as_markdown(record))
    write_text(out / "table.svg", drawn(record))
    display.note(f"{out / 'table.md'}:\n{as_markdown(record)}")
    return record
