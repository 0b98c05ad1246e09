import itertools
import random
import re
from collections import Counter

import pytest

from instar.data.schema import Language
from instar.primer import logic
from instar.primer.logic import puzzles
from instar.primer.skill_exams import logic_exam
from instar.rollout.verifiers import verify

LANGUAGES: tuple[Language, ...] = ("en", "zh")


def drawn(topic: str, language: Language, n: int = 400) -> list[logic.Puzzle]:
    found = (p for p in puzzles(random.Random(6), language) if p.topic == topic)
    return list(itertools.islice(found, n))


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_are_compared_sorted_and_counted_rightly(language: Language) -> None:
    for puzzle in drawn("larger", language):
        prompt, answer = puzzle.question.prompt, int(puzzle.question.answer)
        numbers = list(map(int, re.findall(r"\d+", prompt)))
        assert answer == (min(numbers) if re.search("smaller|小", prompt) else max(numbers))
    for puzzle in drawn("sorting", language):
        numbers = sorted(map(int, re.findall(r"\d+", puzzle.question.prompt)))
        assert list(map(int, re.findall(r"\d+", puzzle.question.answer))) == numbers
    for puzzle in drawn("counting", language):
        head, row = re.split("[:：]", puzzle.question.prompt)
        letter = re.findall(r"(?:many|几个) ([abc])", head)[0]
        assert row.count(letter) == int(puzzle.question.answer)


@pytest.mark.parametrize("language", LANGUAGES)
def test_comparisons_follow_from_their_facts(language: Language) -> None:
    order = r"(\w+) is \w+ than (\w+)\." if language == "en" else "(小.)比(小.)."
    for puzzle in drawn("comparison", language):
        above = re.findall(order, puzzle.question.prompt)
        names = {name for fact in above for name in fact}
        rank = {name: 0 for name in names}
        for _ in names:
            for high, low in above:
                rank[high] = max(rank[high], rank[low] + 1)
        assert sorted(rank.values()) == [0, 1, 2]
        last = re.search(
            r"shortest|youngest|slowest|weakest|poorest|最[矮慢弱穷]|最年轻", puzzle.question.prompt
        )
        assert rank[puzzle.question.answer] == (0 if last else 2)


@pytest.mark.parametrize("language", LANGUAGES)
def test_syllogisms_are_balanced_and_valid(language: Language) -> None:
    answers = Counter()
    for puzzle in drawn("syllogism", language, 1000):
        prompt, answer = puzzle.question.prompt, puzzle.question.answer
        denies = re.search(r"^No | is not |不", prompt) is not None
        assert answer in (("no", "否") if denies else ("yes", "是"))
        answers[answer] += 1
    assert min(answers.values()) > 430


def test_exam_puzzles_never_occur_in_training_text() -> None:
    exam = {item["messages"][0]["content"] for item in logic_exam(0, 400)}
    for language in LANGUAGES:
        rng = random.Random(9)
        for conversation in itertools.islice(logic.conversations(rng, language), 3000):
            assert conversation["messages"][0]["content"] not in exam
        prose = "".join(logic.prose(rng, language) for _ in range(500))
        assert not any(prompt in prose for prompt in exam)


def test_the_exam_pays_for_the_right_sentence_only() -> None:
    for language in LANGUAGES:
        for puzzle in itertools.islice(puzzles(random.Random(1), language, "exam"), 200):
            task, question = logic.task(puzzle), puzzle.question
            assert verify(task, question.sentence) == verify(task, question.answer) == 1
            for wrong in question.distractors:
                assert verify(task, question.sentence.replace(question.answer, wrong)) == 0


def test_the_exam_is_balanced() -> None:
    exam = logic_exam(0, 300)
    tags = [item.get("tags", {}) for item in exam]
    assert Counter(tag["language"] for tag in tags) == {"zh": 150, "en": 150}
    assert min(Counter(tag["kind"] for tag in tags).values()) > 30
    assert len({item["messages"][0]["content"] for item in exam}) == 300
