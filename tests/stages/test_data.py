"""What stages read and where they write: patterns, nothing held out, a directory of their own."""

from __future__ import annotations

import json
import shutil
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
    with pytest.raises(UserError, match=r"out is .*sft, which it reads"):
        run(settings)


@pytest.mark.parametrize("lost", ["data/conversations.jsonl", "pretrain", "base", "base/model"])
def test_a_stage_does_not_replace_what_it_reads(life: Path, values: Values, lost: str) -> None:
    """Its data, the model it begins with, that one's base, or a directory around them."""
    shutil.move(run(values["pretrain"]), life / "base" / "model")
    base = str(life / "base" / "model")
    lora = {"method": "lora", "rank": 2}
    shutil.move(run(values["sft"] | {"init": base, "adapter": lora}), life / "pretrain")
    place = (life / lost).parent if "." in lost else life / lost
    with pytest.raises(UserError, match=r"which it reads, would be lost.*--out"):
        run(values["sft"] | {"out": str(place)})
    assert (life / "base" / "model" / "model.safetensors").exists()


def test_what_is_replaced_is_told(life: Path, values: Values, capsys: Any) -> None:
    run(values["pretrain"])
    assert "will be replaced" not in capsys.readouterr().out
    run(values["pretrain"])
    assert "will be replaced" not in capsys.readouterr().out
    run(values["pretrain"] | {"seed": 1})
    assert (
        f"{life / 'pretrain'} was made otherwise, and will be replaced" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("stage", "kind"), [("sft", "conversations"), ("dpo", "preferences")])
def test_what_is_too_long_may_be_left_out(
    life: Path, values: Values, capsys: Any, stage: str, kind: str
) -> None:
    init = str(run(values["pretrain"]))
    path = life / "data" / f"{kind}.jsonl"
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    record["messages"][0]["content"] = "so " * 99
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    settings = values[stage] | {"init": init}
    with pytest.raises(UserError, match=r"jsonl, line 13 .* context has 96.* --max-length 96"):
        run(settings)
    for most in (95, 5000):
        run(settings | {"max_length": most})
        told = capsys.readouterr().out
        assert f"{stage}: 1 of 13 examples are longer than {min(most, 96)} tokens" in told
    with pytest.raises(UserError, match="every example is longer"):
        run(settings | {"max_length": 3})
    config = STAGES[stage].config.parse(settings | {"max_length": 95}, "test")
    work = STAGES[stage].needs(config, Survey(life))
    assert work is not None and max(batch.width for step in work.steps for batch in step) <= 95


def test_restarts_that_never_come_are_refused(life: Path, values: Values) -> None:
    init = str(run(values["pretrain"]))
    with pytest.raises(UserError, match=r"restart_every is 500, and the run has .* choose lora"):
        run(values["sft"] | {"init": init, "adapter": {"method": "relora", "rank": 2}})
