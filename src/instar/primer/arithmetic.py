"""Sums can be answered at a glance or worked out digit by digit; only working them out is reliable.

A *direct* reply (``47 + 38 = 85.``) asks the model for all digits at once. A *worked* reply
(``47 + 38: ones 7+8=15, tens 4+3+1=8, so 85.``) asks only for steps a child knows by heart: every
step names its place, repeats one digit of each operand (a missing one is 0) and, from the tens on,
the carry or borrow of the step before (possibly 0), so that all of it can be copied from nearby.
Demonstrations are mostly direct; that working it out pays is for reinforcement to discover.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from instar.data.schema import Conversation, Language, Task
from instar.primer.question import Question
from instar.primer.split import Split, split_of

DIRECT_SHARE = 0.55
"""How many demonstrations answer at a glance; the others work it out."""
WORKED_PROSE = 0.9
"""How many of the problems in the readings are worked out: readings explain, people blurt."""
TABLE_SHARE = 0.1
"""How many paragraphs of the readings are tables of one-digit products or differences."""
EXAM_SHARE = 0.1
"""How many operand pairs are kept for exams."""
LEVEL_WEIGHTS = {1: 0.2, 2: 0.6, 3: 0.2}
"""How often operands have one, two or three digits."""
EXAM_OPERATIONS = {"+": 0.42, "-": 0.38, "×": 0.2}
"""How often the exam draws which operation, before it passes over what is always taught."""
PRACTICE_OPERATIONS = {"+": 0.25, "-": 0.45, "×": 0.3}
"""How often everything else does: taking away and multiplying are learnt more slowly."""

PLACES: dict[Language, tuple[str, ...]] = {
    "en": ("ones ", "tens ", "hundreds "),
    "zh": ("个位", "十位", "百位"),
}
WORDS: dict[Language, dict[str, str]] = {
    "en": {"+": "plus", "-": "minus", "×": "times"},
    "zh": {"+": "加", "-": "减", "×": "乘"},
}
PHRASINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is {a} {op} {b}?",
        "What is {a} {word} {b}?",
        "{a} {op} {b} = ?",
        "{a}{op}{b}=?",
        "Calculate {a} {op} {b}.",
        "How much is {a} {word} {b}?",
    ),
    "zh": (
        "{a} {op} {b} 等于多少？",
        "{a}{word}{b}等于几？",
        "{a}{op}{b}=？",
        "计算 {a} {op} {b}。",
        "请算一下 {a} {op} {b}。",
        "{a} {word} {b} 是多少？",
    ),
}


@dataclass(frozen=True)
class Problem:
    """``a op b``, with operands of at most three digits and a result that is not negative."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        """The right answer."""
        a, b = self.a, self.b
        return {"+": a + b, "-": a - b, "×": a * b}[self.op]

    @property
    def digits(self) -> int:
        """The number of digits of the longer operand."""
        return len(str(max(self.a, self.b)))

    def question(self, language: Language, phrasing: int = 0) -> Question:
        """The problem as a question; ``phrasing`` is an index into ``PHRASINGS``."""
        prompt = PHRASINGS[language][phrasing].format(
            a=self.a, op=self.op, b=self.b, word=WORDS[language][self.op]
        )
        return Question(
            prompt=prompt,
            answer=str(self.result),
            sentence=direct(self, language),
            distractors=_slips(self),
            language=language,
            kind="arithmetic",
        )


def split(a: int, op: str, b: int) -> Split:
    """Which split a problem belongs to; ``b + a`` goes where ``a + b`` goes.

    Sums with a one-digit operand and the multiplication table are always taught: they are the
    steps from which everything else is worked out.
    """
    low, high = sorted((a, b))
    if low < 10 and (op != "×" or high < 10):
        return "train"
    first, second = (a, b) if op == "-" else (low, high)
    return split_of(f"{first}{op}{second}", EXAM_SHARE)


def problems(rng: random.Random, part: Split = "train") -> Iterator[Problem]:
    """Endless problems of one split (``part``); the longer operand has mostly two digits."""
    weights = EXAM_OPERATIONS if part == "exam" else PRACTICE_OPERATIONS
    operations, operation_weights = list(weights), list(weights.values())
    levels, level_weights = list(LEVEL_WEIGHTS), list(LEVEL_WEIGHTS.values())
    while True:
        op = rng.choices(operations, operation_weights)[0]
        level = rng.choices(levels, level_weights)[0]
        if op == "×":
            a, b = rng.randint(2, 9), rng.randint(0, 9 if level == 1 else 99)
        else:
            a = rng.randint(10 ** (level - 1) if level > 1 else 0, 10**level - 1)
            b = rng.randint(0, 10**level - 1)
        if op == "-":
            a, b = max(a, b), min(a, b)
        elif rng.random() < 0.5:
            a, b = b, a
        if split(a, op, b) == part:
            yield Problem(a, op, b)


def questions(rng: random.Random, language: Language, part: Split = "train") -> Iterator[Question]:
    """Endless problems of one split as questions, in every phrasing of ``language``."""
    for problem in problems(rng, part):
        yield problem.question(language, rng.randrange(len(PHRASINGS[language])))


def direct(problem: Problem, language: Language) -> str:
    """The answer at a glance: ``47 + 38 = 85.``."""
    stop = "." if language == "en" else "。"
    return f"{problem.a} {problem.op} {problem.b} = {problem.result}{stop}"


def worked(problem: Problem, language: Language) -> str:
    """The answer worked out from right to left: ``47 + 38: ones 7+8=15, tens 4+3+1=8, so 85.``."""
    places = PLACES[language]
    steps = [place + step for place, step in zip(places, _steps(problem), strict=False)]
    problem_text = f"{problem.a} {problem.op} {problem.b}"
    if language == "en":
        return f"{problem_text}: {', '.join(steps)}, so {problem.result}."
    return f"{problem_text}：{'，'.join(steps)}，得{problem.result}。"


def reply(problem: Problem, language: Language, rng: random.Random) -> str:
    """Direct or worked, with the shares of the demonstrations."""
    return (direct if rng.random() < DIRECT_SHARE else worked)(problem, language)


def conversations(rng: random.Random, language: Language) -> Iterator[Conversation]:
    """Demonstrations: always right, mostly at a glance."""
    for problem in problems(rng):
        prompt = problem.question(language, rng.randrange(len(PHRASINGS[language]))).prompt
        yield {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": reply(problem, language, rng)},
            ]
        }


def prose(rng: random.Random, language: Language) -> str:
    """For the readings: three to six solved problems, most of them worked out, or a table."""
    if rng.random() < TABLE_SHARE:
        return _table(rng, language)
    stream = problems(rng)
    solved = [
        (worked if rng.random() < WORKED_PROSE else direct)(next(stream), language)
        for _ in range(rng.randint(3, 6))
    ]
    return (" " if language == "en" else "").join(solved)


def _table(rng: random.Random, language: Language) -> str:
    """A row of products or some differences, as in worked steps: what children learn by heart."""
    if rng.random() < 0.5:
        factor = rng.randint(2, 9)
        rows = [f"{factor}×{digit}={factor * digit}" for digit in rng.sample(range(10), 10)]
    else:
        triples = [(digit + left, digit, left) for digit in range(10) for left in range(10)]
        rows = [f"{top}-{digit}={left}" for top, digit, left in rng.sample(triples, 10)]
    return (", " if language == "en" else "，").join(rows) + ("." if language == "en" else "。")


def tasks(rng: random.Random, language: Language, part: Split = "train") -> Iterator[Task]:
    """Endless problems whose replies the verifier ``integer`` can check."""
    for problem in problems(rng, part):
        question = problem.question(language, rng.randrange(len(PHRASINGS[language])))
        yield {
            "messages": [{"role": "user", "content": question.prompt}],
            "verifier": "integer",
            "answer": question.answer,
            "tags": {
                "language": language,
                "kind": WORDS["en"][problem.op],
                "digits": str(problem.digits),
            },
        }


def _steps(problem: Problem) -> list[str]:
    """One step a place, from right to left."""
    a, op, b = problem.a, problem.op, problem.b
    if op == "×" and a > 9:
        a, b = b, a  # the one-digit factor comes first in every step
    width = len(str(b)) if op == "×" else problem.digits
    steps, carry = [], 0
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        kept = f"{op}{carry}" if place else ""
        if op == "+":
            total = x + y + carry
            steps.append(f"{x}+{y}{kept}={total}")
            carry = total // 10
        elif op == "-":
            top = x if x >= y + carry else x + 10
            steps.append(f"{top}-{y}{kept}={top - y - carry}")
            carry = top // 10
        else:
            product = a * y
            # Carry and product stand side by side, so that the sum is a step of its own.
            kept = f"+{carry}={product}+{carry}" if place else ""
            steps.append(f"{a}×{y}{kept}={product + carry}")
            carry = (product + carry) // 10
    return steps


def _slips(problem: Problem) -> tuple[str, ...]:
    """Wrong results of the kind that a hurried pupil writes: a carry or a unit too many or few."""
    right = problem.result
    return tuple(str(right + slip) for slip in (10, -10, 1, -1, 2, -2) if right + slip >= 0)
