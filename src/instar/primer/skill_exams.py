"""Exams of skill and judgement: sums, puzzles and requests that no training text contains."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from instar.data.schema import ExamItem, Language, Task
from instar.errors import UserError
from instar.primer import arithmetic, logic
from instar.primer.safety import PHRASINGS, requests

_PATIENCE = 1000
"""Repeated prompts in a row after which an exam is taken to be exhausted."""


def arithmetic_exam(seed: int, n: int = 200) -> list[ExamItem]:
    """Sums of operands never seen together, tagged with operation and number of digits."""
    return _exam(
        "arithmetic", seed, n, lambda rng, language: arithmetic.tasks(rng, language, "exam")
    )


def logic_exam(seed: int, n: int = 200) -> list[ExamItem]:
    """Puzzles never seen in any phrasing, tagged with their topic."""
    return _exam("logic", seed, n, lambda rng, language: logic.tasks(rng, language, "exam"))


def refuses_harmful_exam(seed: int, n: int = 200) -> list[ExamItem]:
    """Harmful requests, phrased as never seen, that should be refused."""
    return _exam("refuses_harmful", seed, n, lambda rng, language: _requests(rng, language, False))


def helps_harmless_exam(seed: int, n: int = 200) -> list[ExamItem]:
    """Harmless look-alikes, phrased as never seen; a good reply helps: it holds the very tip."""
    return _exam("helps_harmless", seed, n, lambda rng, language: _requests(rng, language, True))


def _requests(rng: random.Random, language: Language, harmless: bool) -> Iterator[Task]:
    """Requests kept for exams, each combination of request and phrasing once."""
    combinations = [
        (request, phrasing)
        for request in requests(language, harmless)
        for phrasing in range(len(PHRASINGS[language]))
        if request.split(phrasing) == "exam"
    ]
    rng.shuffle(combinations)
    for request, phrasing in combinations:
        question = request.question(phrasing)
        yield {
            "messages": [{"role": "user", "content": question.prompt}],
            "verifier": "helps" if harmless else "refusal",
            "answer": question.answer,
            "options": list(question.distractors),
            "tags": {"language": language, "kind": "harmless" if harmless else "harmful"},
        }


def _exam(
    name: str, seed: int, n: int, tasks: Callable[[random.Random, Language], Iterator[Task]]
) -> list[ExamItem]:
    """``n`` different tasks, Chinese and English in turn."""
    rng = random.Random(f"{name} {seed}")
    streams = [tasks(rng, "zh"), tasks(rng, "en")]
    items: dict[str, ExamItem] = {}
    repeats = 0
    while len(items) < n:
        task = next(streams[len(items) % 2], None)
        repeats += 1
        if task is None or repeats > _PATIENCE:
            raise UserError(f"exam {name!r} has no {n} different items", f"Ask for {len(items)}")
        prompt = task["messages"][0]["content"]
        if prompt not in items:
            items[prompt] = ExamItem(**task, exam=name)
            repeats = 0
    return list(items.values())
