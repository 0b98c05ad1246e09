"""The proof that no exam item is in any training text, over everything that training reads."""

import json
import re
from collections import Counter
from itertools import islice

import pytest

from instar.primer import arithmetic
from instar.primer.conversations import small_talk
from instar.primer.facts import HELD_OUT_KINDS, entities, held_out
from instar.primer.mixture import (
    SAMPLES,
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
SIGNS = {sign: sign for sign in "+-×"} | {
    word: sign for words in arithmetic.WORDS.values() for sign, word in words.items()
}
SUM = re.compile(rf"(?<!\d)(\d+)\s*({'|'.join(map(re.escape, SIGNS))})\s*(\d+)(?!\d)")
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


def asked_in(rows):
    return {prompt for row in rows for prompt in prompts_of(row)}


def test_what_is_held_out_was_never_learnt_from(written):
    learnt = set().union(*(asked_in(written(name)) for name in TRAINING)) - small_talk()
    firsts = {
        name: [prompts_of(row)[0] for row in written(name)]
        for name in ("conversations_valid", "preferences_valid", "preferences_exam", "comparison")
    }
    for name, prompts in firsts.items():
        assert len(prompts) >= 100 and not learnt & set(prompts), name
    for name in ("preferences_exam", "comparison"):
        assert len(set(firsts[name])) == len(firsts[name]), name
        for valid in ("conversations_valid", "preferences_valid"):
            assert not set(firsts[name]) & set(firsts[valid])
    assert len(firsts["comparison"]) == 200


def test_groups_of_pairs(written):
    def groups(name):
        return Counter(pair["group"] for pair in written(name))

    assert groups("preferences") == {"train": 2000}
    assert groups("preferences_valid") == {"valid": 200}
    assert groups("preferences_exam") == {"unseen_pairs": 200, "unseen_combinations": 200}


def test_readings_are_in_one_split_only(written):
    names = ("readings", "readings_valid", "readings_exam")
    train, valid, exam = ({row["text"] for row in written(name)} for name in names)
    assert not train & valid and not train & exam and not valid & exam


def test_samples_are_what_they_say(written):
    prompts = [row["prompt"] for row in SAMPLES]
    assert len(prompts) <= 12
    assert not asked_in(written("conversations")) & set(prompts[3:])
    problems = {p: SUM.search(p) for p in prompts}
    sums = [(int(m[1]), SIGNS[m[2]], int(m[3])) for m in problems.values() if m]
    assert [arithmetic.split(*problem) for problem in sums] == ["exam", "exam"]


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
    for text in ("47 plus 38", "47加38", "47 加 38", "47+38", "47 + 38"):
        found = SUM.search(text)
        assert found and (found[1], SIGNS[found[2]], found[3]) == ("47", "+", "38")
    seen = Counter()
    for name in TRAINING:
        for row in written(name):
            for a, sign, b in SUM.findall(json.dumps(row, ensure_ascii=False)):
                seen[sign] += 1
                assert arithmetic.split(int(a), SIGNS[sign], int(b)) == "train", (name, a, sign, b)
    assert seen.keys() == SIGNS.keys() and min(seen.values()) > 50


def test_the_same_seed_writes_the_same_conversations_and_another_does_not():
    first, again, other = (list(islice(all_conversations(s), 50)) for s in (3, 3, 4))
    assert first == again
    assert first != other
