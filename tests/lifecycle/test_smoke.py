"""The smallest life, from the primer to the report, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from instar.exchange.card import card
from instar.report.templates import amount, duration, size

ROOT = Path(__file__).parents[2]
STAGES = ["data", "tokenizer", "pretrain", "sft", "reward", "dpo", "ppo", "rlvr"]
TRAINED = STAGES[2:]


def grow(recipe: str | Path, out: Path, *options: str) -> str:
    command = [sys.executable, "-m", "instar.cli", "grow", str(recipe), "--out", str(out), *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def made(run: Path) -> dict[str, int]:
    """Stage to a number that changes whenever its directory is made again."""
    return {path.parent.name: path.parent.stat().st_ino for path in run.glob("*/lineage.json")}


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "smoke"
    grow("smoke", run)
    return run


@pytest.fixture(scope="module")
def report(life: Path) -> dict[str, Any]:
    return json.loads((life / "report.json").read_text(encoding="utf-8"))


def test_every_stage_is_in_the_report(report: dict[str, Any]) -> None:
    assert list(report["stages"]) == STAGES
    for name, stage in report["stages"].items():
        cost = stage["cost"]
        assert cost["wall_s"] > 0 and cost["cpu_s"] > 0 and cost["peak_rss_bytes"] > 0
        trained = name in TRAINED
        assert (cost["tokens"] > 0) == (cost["flops"] > 0) == bool(stage["parameters"]) == trained
        assert bool(stage["exams"]) == trained
    total = report["total"]
    costs = [stage["cost"] for stage in report["stages"].values()]
    assert total["tokens"] == sum(cost["tokens"] for cost in costs)
    assert total["wall_s"] == pytest.approx(
        sum(cost["wall_s"] + cost["exam_wall_s"] for cost in costs)
    )


def test_exams_have_error_bars(report: dict[str, Any]) -> None:
    for name in TRAINED:
        for exam, result in report["stages"][name]["exams"].items():
            assert result["n"] > 0 and result["score"] >= 0, (name, exam)
            assert exam.startswith("bits") or result["score"] <= 1, (name, exam)
            assert result["stderr"] is None or result["stderr"] >= 0, (name, exam)
    assert {"knowledge", "arithmetic", "logic", "translation", "refuses_harmful"} <= set(
        report["stages"]["sft"]["exams"]
    )
    assert {"bits_per_byte_zh", "bits_per_byte_en"} <= set(report["stages"]["pretrain"]["exams"])


def test_comparisons_baselines_and_forgetting(report: dict[str, Any]) -> None:
    assert set(report["comparisons"]) == {"dpo_vs_sft", "ppo_vs_sft", "rlvr_vs_sft"}
    for comparison in report["comparisons"].values():
        assert 0 <= comparison["gold_win_rate"] <= 1
        assert 0 <= comparison["reward_win_rate"] <= 1
    assert set(report["baselines"]["ngram"]) == {"zh", "en"}
    assert {"dpo", "ppo", "rlvr"} <= set(report["forgetting"])
    assert report["environment"]["torch"]


def test_the_page_is_written_and_alone(life: Path) -> None:
    page = (life / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and page.rstrip().endswith("</html>")
    assert "<script src" not in page and "<link " not in page, "nothing is fetched"


def rows(text: str, first: str) -> dict[str, list[str]]:
    """The table of a card whose first column has this name, by the cells of that column."""
    [table] = [part for part in text.split("\n\n") if part.startswith(f"| {first} |")]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def shown(name: str, exam: dict[str, Any]) -> list[str]:
    """An exam's score and number of questions, as a card has them."""
    digits, unit, times = (3, "", 1) if name.startswith("bits") else (1, " %", 100)
    error = "" if exam["stderr"] is None else f" ± {times * exam['stderr']:.{digits}f}"
    return [f"{times * exam['score']:.{digits}f}{unit}{error}", f"{exam['n']:,}"]


@pytest.mark.parametrize(
    ("last", "before"),
    [("rlvr", ["pretrain", "sft", "dpo"]), ("ppo", ["pretrain", "sft", "reward"])],
)
def test_a_card_tells_of_every_stage_before(
    last: str, before: list[str], life: Path, report: dict[str, Any]
) -> None:
    text = card(life / last)
    expected = {}
    for name in (*before, last):
        made = json.loads((life / name / "lineage.json").read_text(encoding="utf-8"))
        values = yaml.safe_load((ROOT / "recipes" / "smoke" / f"{name}.yaml").read_text())
        assert made["steps"] == values["training"]["steps"]
        cost = report["stages"][name]["cost"]
        expected[name] = [
            f"{made['steps']:,}",
            amount(cost["tokens"]),
            duration(cost["wall_s"]),
            amount(cost["flops"]),
            size(cost["peak_rss_bytes"]),
        ]
    found = rows(text, "stage | steps")
    assert found == expected and list(found) == list(expected)
    exams = report["stages"][last]["exams"]
    assert exams and rows(text, "exam") == {
        name.replace("_", " "): shown(name, exam) for name, exam in exams.items()
    }
    assert "has been made again" not in text, "every parent is the one that it was made from"


def test_nothing_is_left_over(life: Path) -> None:
    assert not [path.name for path in life.iterdir() if path.name.startswith(".")]


def test_a_second_life_runs_nothing_again(life: Path) -> None:
    before = made(life)
    exams = {path: path.stat().st_ino for path in life.glob("*/exams.json")}
    shown = grow("smoke", life)
    assert made(life) == before
    assert {path: path.stat().st_ino for path in life.glob("*/exams.json")} == exams
    assert shown.count("is up to date") == len(STAGES)


def test_a_changed_stage_and_its_children_run_again(life: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "changed"
    shutil.copytree(ROOT / "recipes" / "smoke", recipe)
    path = recipe / "sft.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["seed"] = values.get("seed", 0) + 1
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    run = tmp_path / "run"
    shutil.copytree(life, run)
    before = made(run)
    grow(recipe, run, "--until", "reward")
    after = made(run)
    assert [name for name in STAGES if after[name] != before[name]] == ["sft", "reward"]
