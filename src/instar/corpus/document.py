"""A document on its way from a raw file into the corpus, and what a step may do with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from instar.errors import installing

EXTRA = installing("corpus")
"""The remedy where a library is missing."""


@dataclass(slots=True)
class Document:
    """One text, and where it came from.

    Attributes:
        text: What will be learnt.
        place: File and line (or row, or record) for whoever looks for it later.
        source: Name of the input that it belongs to.
        title: Its title, if the input had one; not part of the text.
        language: ISO 639-1 code, once a step has found it out; empty before.
    """

    text: str
    place: str
    source: str
    title: str = ""
    language: str = ""


class Step(ABC):
    """What is done with one document after the other: edit it, or say why it must go.

    A step is deterministic and remembers nothing from document to document but its counts, so
    that documents can be divided over processes in any way. A rule of one's own is a subclass;
    ``instar data prepare --help`` says how to name it in a recipe.

    Attributes:
        name: What the accounts call it.
        counts: What it did, by kind ("repaired", "email", ...); only for the accounts.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def __call__(self, document: Document) -> str | None:
        """Edit ``document`` in place.

        Returns:
            The rule that it breaks, in a few words without its figures ("too short"), if it is
            to be dropped; otherwise None.
        """
