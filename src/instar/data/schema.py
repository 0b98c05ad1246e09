"""The records that instar reads and writes, one JSON object a line.

They are the shapes the field already uses (``messages`` of role and content, ``chosen`` and
``rejected``), so that a user's own files fit without conversion.
"""

from typing import Literal, NotRequired, TypedDict

Language = Literal["zh", "en"]
Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


class Document(TypedDict):
    """Text to pretrain on."""

    text: str
    language: NotRequired[Language]


class Conversation(TypedDict):
    """Turns to fine-tune on; loss is taken on every assistant turn."""

    messages: list[Message]


class PreferencePair(TypedDict):
    """One prompt with a better and a worse reply.

    ``messages`` is the prompt and ends with a user turn. ``group`` says which part of a data set
    the pair belongs to (the primer marks rubric combinations that training never shows).
    """

    messages: list[Message]
    chosen: str
    rejected: str
    group: NotRequired[str]


class Task(TypedDict):
    """A prompt whose replies a program can check: ``verifier`` names it, ``answer`` is the truth.

    ``answer`` and ``options`` mean what the verifier says they mean; ``tags`` group results
    (number of digits, language, ...).
    """

    messages: list[Message]
    verifier: str
    answer: str
    options: NotRequired[list[str]]
    tags: NotRequired[dict[str, str]]


class ExamItem(Task):
    """A task that belongs to an exam; it never appears in training text."""

    exam: str
