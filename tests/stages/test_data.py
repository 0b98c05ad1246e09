"""What stages read and where they write: patterns, nothing held out, a directory of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instar.errors import UserError
from instar.files import read_json
from instar.planning.survey import Survey
from instar.stages.registry import STAGES
from instar.training.display import Display

Values = dict[str, dict[str, Any]]


def run(values: dict[str, Any]) -> Path:
    stage = STAGES[values["stage"]]
    with Display() as display:
        return stage.run(stage.config.parse(values, "test"), display)


@pytest.mark.parametrize(
    ("stage", "field"),
    [("sft", "data"), ("reward", "data"), ("dpo", "data"), ("ppo", "prompts"), ("rlvr", "tasks")],
)
def test_a_path_may_be_a_pattern(life: Path, values: Values, stage: str, field: str) -> None:
    init = str(run(values["pretrain"]))
    if stage == "ppo":
        run(values["reward"] | {"init": init})
    [path] = getattr(STAGES[stage].config.parse(values[stage], "test"), field)
    pattern = path.with_name(path.stem[:-1] + "?" + path.suffix)
    out = run(values[stage] | {"init": init, field: [str(pattern)]})
    assert f"{pattern}: {path.name}" in read_json(out / "lineage.json")["data"]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_nothing_need_be_held_out(life: Path, values: Values, stage: str) -> None:
    """People's votes are a file of pairs, and nothing beside it."""
    init = str(run(values["pretrain"]))
    settings = values[stage] | {"init": init, "valid": []}
    rows = (run(settings) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert rows and {json.loads(row)["split"] for row in rows} == {"train"}
    config = STAGES[stage].config.parse(settings, "test")
    work = STAGES[stage].needs(config, Survey(life))
    assert work is not None and not work.validation


@pytest.mark.parametrize("init", ["{run}/m.gguf", "LIFE/m.gguf"])
def test_a_gguf_file_is_to_be_imported_first(life: Path, values: Values, init: str) -> None:
    (life / "m.gguf").touch()
    with pytest.raises(UserError, match=r"instar import .*m\.gguf --out DIR; then name DIR"):
        run(values["sft"] | {"init": init.replace("LIFE", str(life))})


@pytest.mark.parametrize("out", ["{run}/sft", "LIFE/sft", "LIFE/data/../sft"])
def test_a_stage_does_not_replace_what_it_begins_with(life: Path, values: Values, out: str) -> None:
    settings = values["dpo"] | {"init": "{run}/sft", "out": out.replace("LIFE", str(life))}
    with pytest.raises(UserError, match=r"out is .*sft, which it begins with"):
        run(settings)


def test_restarts_that_never_come_are_refused(life: Path, values: Values) -> None:
    init = str(run(values["pretrain"]))
    with pytest.raises(UserError, match=r"restart_every is 500, and the run has .* choose lora"):
        run(values["sft"] | {"init": init, "adapter": {"method": "relora", "rank": 2}})
