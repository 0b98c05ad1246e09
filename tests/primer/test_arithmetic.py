import itertools
import random
import re

import pytest

from instar.data.schema import Language
from instar.primer import arithmetic
from instar.primer.arithmetic import (
    DIRECT_SHARE,
    PHRASINGS,
    PRACTICE_OPERATIONS,
    Problem,
    problems,
    split,
    worked,
)
from instar.primer.skill_exams import arithmetic_exam

LANGUAGES: tuple[Language, ...] = ("en", "zh")


@pytest.mark.parametrize(
    ("problem", "reply"),
    [
        (Problem(47, "+", 38), "47 + 38: ones 7+8=15, tens 4+3+1=8, so 85."),
        (Problem(7, "+", 95), "7 + 95: ones 7+5=12, tens 0+9+1=10, so 102."),
        (
            Problem(300, "-", 158),
            "300 - 158: ones 10-8=2, tens 10-5-1=4, hundreds 3-1-1=1, so 142.",
        ),
        (Problem(52, "-", 48), "52 - 48: ones 12-8=4, tens 5-4-1=0, so 4."),
        (Problem(46, "×", 7), "46 × 7: ones 7×6=42, tens 7×4+4=28+4=32, so 322."),
        (Problem(8, "×", 7), "8 × 7: ones 8×7=56, so 56."),
    ],
)
def test_worked_by_hand(problem: Problem, reply: str) -> None:
    assert worked(problem, "en") == reply


def test_every_step_is_true_and_the_digits_add_up_to_the_answer() -> None:
    for language in LANGUAGES:
        for problem in itertools.islice(problems(random.Random(3)), 3000):
            body = re.split("[:：]", worked(problem, language))[1]
            *steps, conclusion = re.split("[,，]", body)
            results = []
            for step in steps:
                chain = re.sub("[^0-9+×=-]", "", step).replace("×", "*").split("=")
                values = {eval(part) for part in chain}
                assert len(values) == 1, step
                results.append(values.pop())
            places = [value % 10 for value in results[:-1]] + results[-1:]
            total = sum(value * 10**place for place, value in enumerate(places))
            assert total == problem.result == int(re.findall(r"\d+", conclusion)[-1])


def test_problems_stay_in_bounds_and_no_result_is_negative() -> None:
    drawn = list(itertools.islice(problems(random.Random(0)), 5000))
    assert all(0 <= p.a < 1000 and 0 <= p.b < 1000 and p.result >= 0 for p in drawn)
    assert all(min(p.a, p.b) < 10 for p in drawn if p.op == "×")
    assert sum(p.digits == 2 for p in drawn) > len(drawn) / 2


def test_practice_is_about_what_is_hard_and_exams_keep_their_own_shares() -> None:
    drawn = [p.op for p in itertools.islice(problems(random.Random(0)), 5000)]
    asked = [p.op for p in itertools.islice(problems(random.Random(0), "exam"), 5000)]
    for op, share in PRACTICE_OPERATIONS.items():
        assert drawn.count(op) / 5000 == pytest.approx(share, abs=0.03)
    # Products by one digit that every pupil knows by heart are never asked in an exam.
    assert asked.count("+") / asked.count("-") == pytest.approx(0.42 / 0.38, abs=0.1)
    assert 0.14 < asked.count("×") / 5000 < 0.2


def test_a_tenth_of_long_sums_and_no_short_one_is_kept() -> None:
    long = [split(a, "+", b) for a in range(10, 100) for b in range(10, 100)]
    assert 0.08 < long.count("exam") / len(long) < 0.12
    assert all(split(a, "+", b) == split(b, "+", a) for a in range(10, 60) for b in range(10, 60))
    short = [split(a, op, b) for a in range(100) for b in range(10) for op in "+-"]
    assert set(short) == {"train"}
    assert {split(a, "×", b) for a in range(10) for b in range(10)} == {"train"}


def test_no_training_text_contains_an_exam_problem() -> None:
    pattern = re.compile(r"(\d+) ?(plus|minus|times|[-+×加减乘]) ?(\d+)")
    signs = {"plus": "+", "加": "+", "minus": "-", "减": "-", "times": "×", "乘": "×"}
    for language in LANGUAGES:
        rng = random.Random(5)
        texts = [arithmetic.prose(rng, language) for _ in range(400)]
        for conversation in itertools.islice(arithmetic.conversations(rng, language), 2000):
            texts += [message["content"] for message in conversation["messages"]]
        for text in texts:
            for a, op, b in pattern.findall(text):
                assert split(int(a), signs.get(op) or op, int(b)) == "train", text


def test_tables_are_true() -> None:
    signs = {"×": int.__mul__, "-": int.__sub__}
    for language in LANGUAGES:
        rng = random.Random(6)
        text = "\n".join(arithmetic.prose(rng, language) for _ in range(500))
        equations = re.findall(
            r"(?:^|[,，] ?)(\d+)([×-])(\d)=(\d+)(?=[,，.。])", text, re.MULTILINE
        )
        assert {op for _, op, _, _ in equations} == {"×", "-"}
        assert all(signs[op](int(a), int(b)) == int(c) for a, op, b, c in equations)


def test_demonstrations_are_right_and_mostly_direct() -> None:
    rng = random.Random(2)
    replies = [
        conversation["messages"][1]["content"]
        for conversation in itertools.islice(arithmetic.conversations(rng, "en"), 2000)
    ]
    direct = sum(" = " in text for text in replies) / len(replies)
    assert abs(direct - DIRECT_SHARE) < 0.04


def test_wrong_answers_are_wrong_and_every_phrasing_names_both_operands() -> None:
    for problem in itertools.islice(problems(random.Random(4)), 500):
        for language in LANGUAGES:
            for phrasing in range(len(PHRASINGS[language])):
                question = problem.question(language, phrasing)
                assert re.findall(r"\d+", question.prompt) == [str(problem.a), str(problem.b)]
                assert len(question.distractors) >= 3
                assert question.answer not in question.distractors


def test_the_exam_is_balanced_unseen_and_repeatable() -> None:
    exam = arithmetic_exam(0, 300)
    assert exam == arithmetic_exam(0, 300) != arithmetic_exam(1, 300)
    tags = [item.get("tags", {}) for item in exam]
    assert sum(tag["language"] == "zh" for tag in tags) == 150
    assert {tag["digits"] for tag in tags} == {"2", "3"}
    assert len({item["messages"][0]["content"] for item in exam}) == 300
