import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.data.schema import Language
from instar.primer import arithmetic, logic, safety
from instar.primer.question import IDEAL, Question, Style
from instar.primer.rubric import Score, from_record, score, to_record
from instar.primer.style import SFT_STYLES, attainable, draw_style, mentions, say

PARIS = Question(
    prompt="What is the capital of France?",
    answer="Paris",
    sentence="The capital of France is Paris.",
    distractors=("Rome", "Oslo"),
    language="en",
    kind="knowledge",
)
APPLE = Question(
    prompt="“apple”用中文怎么说？",
    answer="苹果",
    sentence="apple 的中文是苹果。",
    distractors=("梨", "桃子"),
    language="zh",
    kind="translation",
)
SENTENCE = Question(
    prompt="Translate: 猫很黑。",
    answer="The cat is black.",
    sentence="The cat is black.",
    distractors=("The dog is black.", "The cat is white."),
    language="en",
    kind="translation",
)
STYLES = [Style(*flags) for flags in itertools.product((True, False), repeat=5)]


def samples() -> list[Question]:
    """Hand-written questions, and some of every kind and language that this half generates."""
    found = [PARIS, APPLE, SENTENCE]
    languages: tuple[Language, ...] = ("en", "zh")
    for language in languages:
        rng = random.Random(1)
        for pool in (arithmetic, logic, safety):
            found += itertools.islice(pool.questions(rng, language), 25)
    return found


def flags(found: Score) -> Style:
    return Style(
        correct=bool(found.correctness),
        complete=bool(found.completeness),
        brief=bool(found.brevity),
        polite=bool(found.manners),
        safe=bool(found.safety),
    )


def test_the_rubric_recovers_every_style_from_the_text() -> None:
    rng = random.Random(0)
    for question in samples():
        for style in STYLES:
            reply = say(question, style, rng)
            assert flags(score(question, reply)) == attainable(question, style), (question, reply)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The capital of France is Paris.", Score(1, 1, 1, 1, 1)),
        ("It's Paris, of course.", Score(1, 1, 1, 1, 1)),
        ("Paris", Score(1, 0, 1, 1, 1)),
        ("Paris.", Score(1, 0, 1, 1, 1)),
        ("The capital of France is Paris", Score(1, 0, 1, 1, 1)),
        ("The capital of France is", Score(0, 0, 1, 1, 1)),
        ("The capital of France is Rome.", Score(0, 1, 1, 1, 1)),
        ("The capital of France is Rome or Paris.", Score(0, 1, 1, 1, 1)),
        ("Stupid! The capital of France is Paris.", Score(1, 1, 0, 0, 1)),
        ("The capital is Paris. The capital is Paris.", Score(1, 1, 0, 1, 1)),
        ("I cannot help with that, sorry.", Score(0, 1, 1, 1, 0)),
        ("   ", Score(0, 0, 0, 0, 0)),
    ],
)
def test_replies_that_no_table_holds(reply: str, expected: Score) -> None:
    assert score(PARIS, reply) == expected


def test_a_worked_sum_is_complete_and_brief() -> None:
    worst = arithmetic.Problem(989, "+", 999)
    languages: tuple[Language, ...] = ("en", "zh")
    for language in languages:
        question = worst.question(language)
        worked = arithmetic.worked(worst, language)
        assert score(question, worked) == Score(1, 1, 1, 1, 1)
        assert score(question, worked[:-6]).completeness == 0
        assert score(question, worked[:-6]).correctness == 0


def test_totals_by_hand() -> None:
    assert Score(1, 1, 1, 1, 1).total == 1
    assert Score(0, 1, 1, 1, 1).total == 0.6
    assert Score(1, 0, 0, 0, 1).total == 0.7
    assert Score(0, 1, 1, 1, 0).total == 0.3


@given(st.text(max_size=80))
def test_any_text_can_be_judged(reply: str) -> None:
    assert 0 <= score(PARIS, reply).total <= 1


def test_a_question_survives_json() -> None:
    for question in samples():
        assert from_record(json.loads(json.dumps(to_record(question)))) == question


def test_mentions_means_whole_words() -> None:
    assert mentions("It is PARIS!", "Paris")
    assert not mentions("Parisian", "Paris")
    assert mentions("答案是Paris。", "Paris")
    assert mentions("法国的首都是巴黎。", "巴黎")
    assert not mentions("185", "85")
    assert not mentions("anything", "")


def test_demonstrations_are_always_right_and_seldom_perfect() -> None:
    assert sum(share for _, share in SFT_STYLES) == pytest.approx(1)
    rng = random.Random(0)
    drawn = [draw_style(rng) for _ in range(4000)]
    assert all(style.correct and style.safe for style in drawn)
    assert 0.32 < drawn.count(IDEAL) / len(drawn) < 0.38
