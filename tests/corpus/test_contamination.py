import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.corpus.contamination import (
    Contamination,
    ContaminationConfig,
    Index,
    Item,
    items_of,
    words_of,
)
from instar.corpus.document import Document
from instar.errors import UserError
from instar.primer.mixture import exams

SHARED = Path(__file__).parents[3] / "shared" / "data"
ONLY_FILES = 0
"""Items of the primer, where only files are looked for."""


def found(text: str, *items: Item) -> str | None:
    return Index(items, 13, 8).find(words_of(text))


def test_words_are_characters_runs_and_signs() -> None:
    assert words_of("Don't stop: 中文GPT-4, 37 - 7!") == [
        *("don", "t", "stop", "中", "文", "gpt", "-", "4", "37", "-", "7")
    ]
    assert words_of("well-known ÜBER") == ["well", "known", "über"]


LONG = (
    "A ferry carries nine cars and each car carries four people; how many people are aboard if "
    "the crew has six?"
)


def test_a_long_item_is_found_by_any_run_of_thirteen_words() -> None:
    words = LONG.split()
    for begin in range(len(words) - 12):
        part = " ".join(words[begin : begin + 13])
        assert found(f"He asked: {part.upper()} -- and left.", Item("ferries", LONG)) == "ferries"
    assert found(" ".join(words[:12]) + " and so on", Item("ferries", LONG)) is None


def test_a_long_answer_is_an_item_too() -> None:
    assert found(f"The text: {LONG}", Item("ferries", "What?", LONG)) == "ferries"


def test_an_item_of_middling_length_is_found_whole() -> None:
    item = Item("rivers", "Which river runs through the city of Bremen?", "Weser")
    assert found("Which river runs through the city of Bremen, children?", item) == "rivers"
    assert found("Which river runs through the city of Kassel?", item) is None


def test_a_short_item_is_found_only_with_its_answer() -> None:
    item = Item("animals", "What do owls eat?", "mice")
    assert found("What do owls eat? That is a question for a hunter.", item) is None
    assert found("What do owls eat? Answer: Mice.", item) == "animals"
    assert found("Mice? What do owls eat?", item) is None
    assert found("What do owls eat? " + "Nobody knows. " * 8 + "Mice.", item) is None
    assert found("37 × 7 = 259", Item("sums", "37×7=?", "259")) == "sums"
    assert found("37 + 7 = 44, not 259", Item("sums", "37×7=?", "259")) is None


def test_what_cannot_be_told_from_ordinary_text_is_counted() -> None:
    index = Index([Item("a", "Why?", "so"), Item("b", "The end", asks=False)], 13, 8)
    assert index.untold == 2
    assert index.find(words_of("Why? So. The end")) is None


def test_chinese_is_compared_character_by_character() -> None:
    item = Item("河流", "哪一条河流过不来梅市？", "威悉河")
    assert found("老师问：“哪一条河，流过不来梅市？”", item) == "河流"
    assert found("哪一条河流过卡塞尔市？", item) is None


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tasks.jsonl", {"question": LONG, "answer": "#### 42"}),
        ("alpaca.jsonl", {"instruction": LONG, "output": "Forty-two."}),
        ("talk.jsonl", {"messages": [{"role": "user", "content": LONG}] * 2}),
        ("pairs.jsonl", {"prompt": LONG, "chosen": "42", "rejected": "41"}),
        ("labels.jsonl", {"prompt": LONG, "completion": "42", "label": True}),
        ("texts.jsonl", {"text": LONG}),
    ],
)
def test_evaluations_of_any_format_are_read(name: str, line: object, tmp_path: Path) -> None:
    if name == "talk.jsonl":
        assert isinstance(line, dict)
        line["messages"][1] = {"role": "assistant", "content": "42"}
    path = tmp_path / name
    path.write_text(json.dumps(line) + "\n")
    step = Contamination(ContaminationConfig(against=[path], exam_items=ONLY_FILES))
    rule = f"holds an item of {path.stem}"
    assert step(Document(f"Once again: {LONG}", "", "")) == rule
    assert step(Document("Nothing of the kind.", "", "")) is None


def test_plain_text_has_an_item_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(LONG + "\n\nThe seven lamps of the harbour burn all night\n")
    step = Contamination(ContaminationConfig(against=[path], exam_items=ONLY_FILES))
    text = "Look: the seven lamps of the harbour burn all night."
    assert step(Document(text, "", "")) == "holds an item of lines"


def test_mistakes_are_explained(tmp_path: Path) -> None:
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"colour": "red"}\n')
    for path, problem in ((strange, "no known format"), (tmp_path / "no.txt", "no such file")):
        with pytest.raises(UserError, match=problem):
            Contamination(ContaminationConfig(against=[path], exam_items=ONLY_FILES))


def ordinary_sentences() -> Iterator[str]:
    for line in (SHARED / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines():
        yield from json.loads(line)["text"].split("\n")
    yield from (SHARED / "wikitext-2" / "test.txt").read_text(encoding="utf-8").splitlines()
    rows = json.loads((SHARED / "chat" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    for row in rows:
        yield from (row["instruction"], *row["output"].split("\n"))
    poems = json.loads((SHARED / "tang" / "poet.tang.0.json").read_text(encoding="utf-8"))
    yield from ("".join(poem["paragraphs"]) for poem in poems)


BETWEEN = (" ", "\n", " Answer: ", "\nA: ", " 答案：", "——", " The answer is: ")


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
def test_planted_items_are_found_and_ordinary_text_is_not() -> None:
    rng = random.Random(3)
    step = Contamination(ContaminationConfig())
    sentences = [text for text in ordinary_sentences() if text.strip()]
    wrong = [text for text in sentences if step(Document(text, "", ""))]
    missed, planted = [], exams(0, 240)
    for item in planted:
        question = item["messages"][-1]["content"]
        if rng.random() < 0.3:
            question = question.upper()
        leak = question + rng.choice(BETWEEN) + item["answer"]
        before, after = rng.sample(sentences, 2)
        if step(Document(f"{before} {leak} {after}", "", "")) is None:
            missed.append(leak)
    hits = len(planted) - len(missed)
    assert hits / len(planted) >= 0.98, missed[:20]
    # Ordinary sentences are five times as many as planted items.
    assert hits / (hits + len(wrong)) >= 0.98, wrong[:20]


def test_every_exam_of_the_primer_is_looked_for() -> None:
    step = Contamination(ContaminationConfig(exam_seed=4, exam_items=20))
    items = list(items_of(ContaminationConfig(exam_seed=4, exam_items=20)))
    assert len(items) == 20 * 7
    unseen = [
        item for item in items if not step(Document(f"{item.question} {item.answer}", "", ""))
    ]
    assert len(unseen) == step.index.untold
