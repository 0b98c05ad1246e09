"""The verb that teaches something new: methods, their exams, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from instar import continual
from instar.continual import ContinualConfig, over
from instar.data.readers import write_jsonl
from instar.errors import UserError
from instar.recipes import CHECKOUT
from instar.stages.registry import STAGES
from instar.tokenizer.hf import save_tokenizer
from instar.training.display import Display

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def talk(question: str, reply: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    }


def question(exam: str, asked: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": asked}]
    return {"exam": exam, "messages": messages, "verifier": "answer", "answer": answer}


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can say two words, and an exam that asks for them."""
    run = tmp_path_factory.mktemp("life")
    save_tokenizer(run / "tokenizer", [], 96)
    (run / "data").mkdir()
    talks = [talk(f"{i}?", "aye." if i % 2 else "nay.") for i in range(40)]
    old = [question("parity", f"{i}?", "aye" if i % 2 else "nay") for i in range(20)]
    files = {"conversations": talks, "conversations_valid": talks[:3], "exams": old}
    files["readings"] = files["readings_exam"] = [{"text": "aye nay " * 12, "language": "en"}] * 4
    files["readings_valid"] = files["readings"]
    for name, records in files.items():
        write_jsonl(run / "data" / f"{name}.jsonl", records)
    common = {"run": str(run), "training": {"steps": 1}}
    stages: dict[str, dict[str, Any]] = {
        "pretrain": {"model": SMALL, "context": 16, "batch_size": 4, "micro_batch": 4},
        "sft": {"batch_size": 8, "training": {"steps": 60, "optimizer": {"lr": 0.02}}},
    }
    with Display() as display:
        for name, own in stages.items():
            stage = STAGES[name]
            stage.run(stage.config.parse({"stage": name, **common, **own}, name), display)
    return run


def recipe(life: Path, path: Path, **changes: Any) -> Path:
    folder = "{run}/continual"
    values: dict[str, Any] = {
        "run": str(life),
        "exams": [f"{folder}/subject/exams.jsonl"],
        "old": {"max_new_tokens": 8},
        "subject": {"conversations": 40, "valid": 4, "exam_items": 12},
        "stage": {
            "data": [f"{folder}/subject/conversations.jsonl"],
            "valid": [f"{folder}/subject/valid.jsonl"],
            "batch_size": 4,
            "training": {"steps": 2, "optimizer": {"lr": 1e-5}},
        },
        "methods": {
            "gentle": {},
            "rough": {"training": {"steps": 12, "optimizer": {"lr": 0.1}}},
        },
    }
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return path


def test_settings_are_changed_at_any_depth() -> None:
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert over(values, {"a": {"c": {"d": 5}}, "f": 6}) == {
        "a": {"b": 1, "c": {"d": 5}},
        "e": 3,
        "f": 6,
    }
    assert values == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_learnt_against_forgotten(life: Path, tmp_path: Path) -> None:
    path = recipe(life, tmp_path / "continual.yaml")
    assert continual.main([str(path), "--only", "gentle"]) == 0
    out = life / "continual"
    assert list(json.loads((out / "table.json").read_text())["methods"]) == ["start", "gentle"]
    before = (out / "gentle" / "lineage.json").stat().st_mtime_ns
    assert continual.main([str(path)]) == 0
    assert (out / "gentle" / "lineage.json").stat().st_mtime_ns == before, "finished ones are kept"
    record = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert "parity" in record["counted"] and "subject" not in record["counted"]
    rows = record["methods"]
    assert rows["start"]["kept"] == {"score": 1.0, "stderr": 0.0} and not rows["start"]["passed"]
    assert rows["gentle"]["kept"]["score"] > 0.9 > rows["rough"]["kept"]["score"]
    assert rows["rough"]["bits"] != rows["gentle"]["bits"]
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2].startswith("| start |")
    assert len(table) == 2 + len(rows)
    picture = (out / "table.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "rough" in picture


def test_what_other_settings_made_is_not_in_the_table(life: Path, tmp_path: Path) -> None:
    changed = {"none": {}, "gentle": {"seed": 5}}
    path = recipe(life, tmp_path / "continual.yaml", methods=changed, out=str(life / "again"))
    assert continual.main([str(path)]) == 0
    changed["gentle"]["seed"] = 6
    path = recipe(life, tmp_path / "continual.yaml", methods=changed, out=str(life / "again"))
    assert continual.main([str(path), "--only", "none"]) == 0
    record = json.loads((life / "again" / "table.json").read_text(encoding="utf-8"))
    assert list(record["methods"]) == ["start", "none"]


def test_a_mistake_in_a_recipe_names_its_method(life: Path, tmp_path: Path) -> None:
    path = recipe(life, tmp_path / "continual.yaml", methods={"odd": {"keep": {"glue": 1}}})
    with pytest.raises(UserError, match=r"methods\.odd: unknown key `keep\.glue`"):
        continual.main([str(path)])
    path = recipe(life, tmp_path / "continual.yaml")
    with pytest.raises(UserError, match="has no method 'none'"):
        continual.main([str(path), "--only", "none"])
    with pytest.raises(UserError, match="is not a checkpoint"):
        continual.main([str(path), "--run", str(tmp_path / "elsewhere")])


def test_our_recipe_is_valid() -> None:
    values = yaml.safe_load((CHECKOUT / "continual.yaml").read_text(encoding="utf-8"))
    config = ContinualConfig.parse(values, "continual.yaml")
    stages = config.stages()
    assert stages["none"].keep == stages["replay"].keep, "only the data differs"
    exams = {str(config.old.exams), *map(str, config.exams)}
    for stage in stages.values():
        assert not exams & {str(path) for path in [*stage.data, *stage.replay_conversations]}
        assert stage.training.steps == stages["none"].training.steps
