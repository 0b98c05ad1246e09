"""The proof that no exam item is in any training text, over everything that training reads."""

import json
import re
from itertools import islice

import pytest

from instar.primer import arithmetic
from instar.primer.facts import HELD_OUT_KINDS, entities, held_out
from instar.primer.mixture import (
    PrimerConfig,
    all_conversations,
    exams,
    write_primer,
)

SMALL = PrimerConfig(
    reading_bytes=600_000,
    valid_bytes=20_000,
    conversations=4000,
    pairs=2000,
    prompts=1500,
    tasks=1500,
    exam_items=200,
)
TRAINING = ("readings", "conversations", "preferences", "prompts", "tasks")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("primer")
    write_primer(SMALL, 0, directory)

    def rows(name):
        lines = (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return rows


def prompts_of(row):
    return [m["content"] for m in row.get("messages", []) if m["role"] == "user"]


def test_every_exam_has_its_items_and_they_are_distinct():
    items = exams(0, 240)
    names = {item["exam"] for item in items}
    assert names == {
        "knowledge",
        "arithmetic",
        "logic",
        "translation",
        "format",
        "refuses_harmful",
        "helps_harmless",
    }
    for name in names:
        asked = [item["messages"][0]["content"] for item in items if item["exam"] == name]
        assert len(asked) == 240
        assert len(set(asked)) == 240, name


def test_no_exam_prompt_is_a_training_prompt_or_stands_in_a_reading(written):
    asked = {item["messages"][0]["content"] for item in written("exams")}
    for name in TRAINING:
        rows = written(name)
        assert rows
        assert not asked & {prompt for row in rows for prompt in prompts_of(row)}, name
    readings = "\n".join(row["text"] for row in written("readings"))
    assert not [prompt for prompt in asked if prompt in readings]


def test_models_are_compared_on_prompts_that_preference_learning_never_used(written):
    asked = {row["messages"][0]["content"] for row in written("comparison")}
    for name in ("preferences", "prompts", "tasks"):
        assert not asked & {prompt for row in written(name) for prompt in prompts_of(row)}, name


def test_held_out_entities_are_only_ever_read_about(written):
    names = [
        re.compile(rf"\b{re.escape(e.name['en'])}\b", re.IGNORECASE)
        for kind in HELD_OUT_KINDS
        for e in entities(kind)
        if held_out(e)
    ]
    chinese = [e.name["zh"] for k in HELD_OUT_KINDS for e in entities(k) if held_out(e)]
    readings = "\n".join(row["text"] for row in written("readings"))
    assert sum(bool(name.search(readings)) for name in names) == len(names)
    for name in ("conversations", "preferences", "prompts", "tasks"):
        asked = "\n".join(prompt for row in written(name) for prompt in prompts_of(row))
        assert not [n.pattern for n in names if n.search(asked)], name
        assert not [n for n in chinese if n in asked], name


def test_exam_operands_are_in_no_training_text(written):
    pattern = re.compile(r"(?<!\d)(\d+) ?([+×-]) ?(\d+)(?!\d)")
    found = 0
    for name in TRAINING:
        for row in written(name):
            for a, op, b in pattern.findall(json.dumps(row, ensure_ascii=False)):
                if len(a) < 2 or len(b) < 2:
                    continue  # steps of working out; always training
                found += 1
                assert arithmetic.split(int(a), op, int(b)) == "train", (name, a, op, b)
    assert found > 1000


def test_the_same_seed_writes_the_same_conversations_and_another_does_not():
    first, again, other = (list(islice(all_conversations(s), 50)) for s in (3, 3, 4))
    assert first == again
    assert first != other
