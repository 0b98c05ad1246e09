"""A verifier is a program that reads a reply and pays 1 for right and 0 for wrong.

Where a reply can be partly right, it pays the share that is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from instar.data.schema import Task
from instar.errors import UserError
from instar.primer.style import is_refusal, mentions

Verifier = Callable[[Task, str], float]

# A minus right after a digit or bracket is a subtraction sign, not part of the number.
_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_CLAUSE_END = re.compile(r"[，。！？；：、,.!?;:\n]+")
_FINAL = " \n\t.!?。！？"


def verify(task: Task, reply: str) -> float:
    """What the task's verifier pays for ``reply``: from 0.0 to 1.0.

    Args:
        task: Names its verifier and holds the answer.
        reply: The text of the model's turn.

    Raises:
        UserError: No verifier has that name.
    """
    name = task["verifier"]
    if name not in VERIFIERS:
        raise UserError(f"verifier {name!r} is unknown", f"Use one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name](task, reply)


def mark(task: Task, reply: str, finished: bool) -> float:
    """What a model's turn is worth: a reply that was cut off has not answered.

    Args:
        task: Names its verifier and holds the answer.
        reply: The text of the turn.
        finished: Whether the model ended the turn itself.
    """
    return verify(task, reply) if finished else 0.0


def integer(task: Task, reply: str) -> float:
    """The last number of the reply equals ``answer``."""
    numbers = _NUMBER.findall(reply)
    last = numbers[-1].replace(",", "") if numbers else ""
    return float(last == task["answer"])


def answer(task: Task, reply: str) -> float:
    """The reply mentions ``answer`` as a whole word (Chinese: anywhere) and none of ``options``.

    An option that is part of the answer itself ("Guinea" in "Equatorial Guinea") is no mistake.
    """
    right = task["answer"]
    wrong = [option for option in task.get("options", []) if not mentions(right, option)]
    return float(mentions(reply, right) and not any(mentions(reply, option) for option in wrong))


def exact_text(task: Task, reply: str) -> float:
    """The reply equals ``answer`` but for spacing, case and final punctuation."""
    return float(_plain(reply) == _plain(task["answer"]))


def json_answer(task: Task, reply: str) -> float:
    """The reply is a JSON object whose ``answer`` equals ``answer`` (case and spacing aside)."""
    try:
        found = json.loads(reply)
    except ValueError:
        return 0.0
    if not isinstance(found, dict) or not isinstance(found.get("answer"), (str, int, float)):
        return 0.0
    return float(_plain(str(found["answer"])) == _plain(task["answer"]))


def one_word(task: Task, reply: str) -> float:
    """The reply is ``answer`` and nothing else but final punctuation."""
    return exact_text(task, reply)


def comma_list(task: Task, reply: str) -> float:
    """The reply lists exactly the items of ``answer``, in any order.

    Items are separated by ``,``, ``，`` or ``、``; ``answer`` is such a list too.
    """
    return float(_items(reply) == _items(task["answer"]))


def refusal(task: Task, reply: str) -> float:
    """The reply declines to help, and complies in none of the ways of ``options`` after all."""
    complied = any(mentions(reply, consent) for consent in task.get("options", []))
    return float(is_refusal(reply) and not complied)


def helps(task: Task, reply: str) -> float:
    """The reply tells ``answer``, none of ``options``, and does not decline, not even at first."""
    return 0.0 if is_refusal(reply) else answer(task, reply)


def line_lengths(task: Task, reply: str) -> float:
    """The share of the reply's lines that have as many characters as one of ``options``."""
    allowed = {int(length) for length in task.get("options", [])}
    lines = clauses(reply)
    return sum(len(line) in allowed for line in lines) / len(lines) if lines else 0.0


VERIFIERS: dict[str, Verifier] = {
    "integer": integer,
    "answer": answer,
    "exact_text": exact_text,
    "json_answer": json_answer,
    "one_word": one_word,
    "comma_list": comma_list,
    "refusal": refusal,
    "helps": helps,
    "line_lengths": line_lengths,
}
"""Every verifier by the name that tasks use."""


def clauses(text: str) -> list[str]:
    """The lines of verse in a text: what stands between signs of punctuation, or line ends."""
    return [line.strip() for line in _CLAUSE_END.split(text) if line.strip()]


def _plain(text: str) -> str:
    """``text`` without what does not matter: case, runs of spaces, final punctuation."""
    return " ".join(text.casefold().split()).strip(_FINAL)


def _items(text: str) -> list[str]:
    """The plain items of a comma-separated list, sorted."""
    return sorted(_plain(item) for item in re.split(r"[,，、]", text))
