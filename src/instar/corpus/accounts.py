"""What came in, what went out, and what became of the rest: every document is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from instar.corpus.document import Document

MANIFEST = "manifest.json"
"""Where they are written, in the directory of the corpus."""

EXAMPLES = 10
"""Drops that are shown for each rule."""

SHOWN = 200
"""Characters of an example."""


@dataclass
class Drop:
    """What one rule took away.

    Attributes:
        documents: How many.
        characters: How many they had.
        examples: The first of them: place, and how they begin.
    """

    documents: int = 0
    characters: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, document: Document, note: str = "") -> None:
        """One more."""
        self.documents += 1
        self.characters += len(document.text)
        if len(self.examples) < EXAMPLES:
            example = {"place": document.place, "text": document.text[:SHOWN]}
            self.examples.append(example | ({"note": note} if note else {}))


@dataclass
class Flow:
    """What one step did: ``in = out + dropped``, and for characters what it edited away.

    Attributes:
        documents_in: Documents that came.
        characters_in: Their characters.
        documents_out: Documents that went on.
        characters_out: Their characters, after its edits.
        edited: Characters that edits removed from those that went on, less those they added.
        drops: Rule to what it took away.
        counts: What else it counted, by kind.
    """

    documents_in: int = 0
    characters_in: int = 0
    documents_out: int = 0
    characters_out: int = 0
    edited: int = 0
    drops: dict[str, Drop] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def passed(self, before: int, after: int) -> None:
        """A document went on; its characters before the step and after it."""
        self.documents_in += 1
        self.documents_out += 1
        self.characters_in += before
        self.characters_out += after
        self.edited += before - after

    def dropped(self, rule: str, document: Document, before: int, note: str = "") -> None:
        """A document went, as it stands now; ``before`` is what it had when it came."""
        self.documents_in += 1
        self.characters_in += before
        self.edited += before - len(document.text)
        self.drops.setdefault(rule, Drop()).add(document, note)

    def check(self, name: str) -> None:
        """Raise ``ArithmeticError`` if something is not accounted for."""
        gone = self.drops.values()
        documents = self.documents_out + sum(drop.documents for drop in gone)
        characters = self.characters_out + self.edited + sum(drop.characters for drop in gone)
        if (documents, characters) != (self.documents_in, self.characters_in):
            raise ArithmeticError(f"the accounts of step {name!r} do not add up: {self}")

    def merge(self, other: Flow) -> None:
        """Add what the same step did elsewhere, later."""
        self.documents_in += other.documents_in
        self.characters_in += other.characters_in
        self.documents_out += other.documents_out
        self.characters_out += other.characters_out
        self.edited += other.edited
        self.counts.update(other.counts)
        for rule, drop in other.drops.items():
            mine = self.drops.setdefault(rule, Drop())
            mine.documents += drop.documents
            mine.characters += drop.characters
            mine.examples += drop.examples[: EXAMPLES - len(mine.examples)]

    def record(self) -> dict[str, Any]:
        """As JSON; rules that took most come first."""
        ranked = sorted(self.drops.items(), key=lambda item: (-item[1].documents, item[0]))
        return vars(self) | {
            "drops": {rule: vars(drop) for rule, drop in ranked},
            "counts": dict(sorted(self.counts.items())),
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Flow:
        """What ``record`` wrote."""
        drops = {rule: Drop(**drop) for rule, drop in record["drops"].items()}
        return cls(**record | {"drops": drops, "counts": Counter(record["counts"])})


@dataclass
class Accounts:
    """The flows of all steps, in order.

    Attributes:
        flows: Step to what it did.
        lengths: For each source, how many documents have about 2^k characters: k to number.
        languages: For each source, language to documents and characters.
        faults: What could not be read.
    """

    flows: dict[str, Flow] = field(default_factory=dict)
    lengths: dict[str, Counter[str]] = field(default_factory=dict)
    languages: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    faults: Drop = field(default_factory=Drop)

    def flow(self, step: str) -> Flow:
        """The flow of a step."""
        if step not in self.flows:
            self.flows[step] = Flow()
        return self.flows[step]

    def finished(self, document: Document) -> None:
        """A document has passed: count its length and language."""
        lengths = self.lengths.setdefault(document.source, Counter())
        lengths[str(len(document.text).bit_length())] += 1
        languages = self.languages.setdefault(document.source, {})
        share = languages.setdefault(document.language, [0, 0])
        share[0] += 1
        share[1] += len(document.text)

    def merge(self, other: Accounts) -> None:
        """Add what happened in a later partition."""
        for step, flow in other.flows.items():
            self.flow(step).merge(flow)
        for source, lengths in other.lengths.items():
            self.lengths.setdefault(source, Counter()).update(lengths)
        for source, languages in other.languages.items():
            mine = self.languages.setdefault(source, {})
            for language, share in languages.items():
                held = mine.setdefault(language, [0, 0])
                mine[language] = [held[0] + share[0], held[1] + share[1]]
        self.faults.documents += other.faults.documents
        left = EXAMPLES - len(self.faults.examples)
        self.faults.examples += other.faults.examples[:left]

    def check(self) -> None:
        """Raise ``ArithmeticError`` if a step lost something, or got what none before let go."""
        before: Flow | None = None
        for name, flow in self.flows.items():
            flow.check(name)
            come = (flow.documents_in, flow.characters_in)
            if before and come != (before.documents_out, before.characters_out):
                raise ArithmeticError(f"step {name!r} did not get what the one before let pass")
            before = flow

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "flows": {name: flow.record() for name, flow in self.flows.items()},
            "lengths": {source: dict(counts) for source, counts in self.lengths.items()},
            "languages": self.languages,
            "faults": vars(self.faults),
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Accounts:
        """What ``record`` wrote."""
        return cls(
            {name: Flow.of(flow) for name, flow in record["flows"].items()},
            {source: Counter(counts) for source, counts in record["lengths"].items()},
            record["languages"],
            Drop(**record["faults"]),
        )


def total(parts: Iterable[dict[str, Any]]) -> Accounts:
    """The accounts of all partitions together, given in order as they were recorded."""
    accounts = Accounts()
    for part in parts:
        accounts.merge(Accounts.of(part))
    return accounts
