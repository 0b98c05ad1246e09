"""Exams: a model answers held-out questions greedily and a program marks every reply."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from instar.data.schema import ExamItem, Message
from instar.rollout.verifiers import mark
from instar.tokenizer.chat import prompt_ids

if TYPE_CHECKING:
    from instar.generation.engine import Engine
    from instar.generation.reply import Completion
    from instar.tokenizer.hf import Tokenizer

ENDS = "ends_properly"
"""The exam that all items are part of: whether the model ended its turn itself."""

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)``."""


class Group(TypedDict):
    """Items that share a tag: ``score`` is their mean, ``n`` their number."""

    score: float
    n: int


class Reply(TypedDict):
    """One prompt with what the model made of it; ``finished`` means it ended its turn itself."""

    prompt: str
    reply: str
    finished: bool


@dataclass(frozen=True)
class ExamResult:
    """A score that says how far to trust it.

    Attributes:
        score: The mean over items (bits per byte where the exam is bits per byte).
        stderr: Its standard error; None where one item alone shows no spread.
        n: Number of items.
        groups: The same by tag, keyed ``"digits=2"``.
    """

    score: float
    stderr: float | None
    n: int
    groups: dict[str, Group] = field(default_factory=dict)


def run_exams(
    engine: Engine,
    tokenizer: Tokenizer,
    items: list[ExamItem],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, ExamResult]:
    """Mark a greedy reply to every item, exam by exam; one that was cut off gets no mark.

    One more exam comes for free: ``ends_properly`` is the share of all replies, over every exam,
    in which the model ended its turn itself instead of talking until it was cut off.

    Args:
        engine: Generates the replies.
        tokenizer: Renders the chat turns.
        items: Questions of any number of exams, in any order.
        max_new_tokens: Longest reply, in tokens.
        batch_size: Replies written at once.
        progress: Told after every batch how many replies are done.

    Returns:
        One result an exam, in the order in which exams first appear; empty without items.
    """
    if not items:
        return {}
    marked = mark_all(engine, tokenizer, items, max_new_tokens, batch_size, progress)
    tags: dict[str, list[dict[str, str]]] = defaultdict(list)
    for item in items:
        tags[item["exam"]].append(item.get("tags", {}))
    tags[ENDS] = [{"exam": item["exam"]} for item in items]
    return {exam: summarise(marks, tags[exam]) for exam, marks in marked.items()}


def mark_all(
    engine: Engine,
    tokenizer: Tokenizer,
    items: list[ExamItem],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """The mark of every item, exam by exam, in the items' order; ``run_exams`` says the rest."""
    messages = [item["messages"] for item in items]
    completions = _reply(engine, tokenizer, messages, max_new_tokens, batch_size, progress)
    marks: dict[str, list[float]] = defaultdict(list)
    for item, completion in zip(items, completions, strict=True):
        marks[item["exam"]].append(mark(item, completion.text, completion.finish == "stop"))
    return {**marks, ENDS: [float(c.finish == "stop") for c in completions]}


def summarise(marks: Sequence[float], tags: Sequence[dict[str, str]] = ()) -> ExamResult:
    """Mean, standard error and groups of marks from 0 to 1.

    The mean of ``n`` independent marks with probability ``p`` has standard error
    ``sqrt(p (1 - p) / n)``; ``p`` is estimated by the mean itself. For marks between 0 and 1 that
    is more than it is.

    Args:
        marks: One mark an item.
        tags: The tags of each item, in the same order; none when empty.
    """
    n = len(marks)
    score = sum(marks) / n
    members: dict[str, list[float]] = defaultdict(list)
    for paid, of_item in zip(marks, tags, strict=bool(tags)):
        for tag, value in of_item.items():
            members[f"{tag}={value}"].append(paid)
    groups: dict[str, Group] = {
        name: {"score": sum(some) / len(some), "n": len(some)}
        for name, some in sorted(members.items())
    }
    return ExamResult(score, math.sqrt(score * (1 - score) / n), n, groups)


def sample_replies(engine: Engine, prompts: Sequence[str], max_new_tokens: int = 96) -> list[Reply]:
    """Greedy replies to the same prompts, so that stages can be read side by side.

    Args:
        engine: Generates the replies, with its own tokenizer.
        prompts: What the user says, one turn each.
        max_new_tokens: Longest reply, in tokens.
    """
    turns: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
    completions = _reply(engine, engine.tokenizer, turns, max_new_tokens)
    return [
        {
            "prompt": prompt,
            "reply": completion.text.strip(),
            "finished": completion.finish == "stop",
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _reply(
    engine: Engine,
    tokenizer: Tokenizer,
    conversations: Iterable[list[Message]],
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[Completion]:
    """Greedy completions in the given order."""
    from instar.generation.sampling import GREEDY
    from instar.generation.stopping import Stopping

    prompts = [prompt_ids(tokenizer, turns) for turns in conversations]
    stopping = Stopping(tokenizer.turn_end_ids, max_new_tokens=max_new_tokens)
    return engine.generate(prompts, GREEDY, stopping, batch_size=batch_size, progress=progress)
