"""Documents that hold the questions of an exam are dropped: who has read them proves nothing.

As in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C), a document and an item that share a
run of 13 words hold the same text. Shorter items are looked for whole, and the shortest only where
question and answer stand together: "What is a cat?" is everybody's sentence. See ``Index``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

from instar.config import Config
from instar.corpus.document import Document, Step
from instar.corpus.script import HAN, KANA
from instar.data.formats import Kind, convert, recognise
from instar.data.readers import Record, read_records
from instar.errors import UserError
from instar.primer.mixture import PrimerConfig, exams

WORD = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+|[+×÷=]|[-−](?=\s?[0-9])")
"""One Chinese character or kana; a run of letters and digits; a sign of arithmetic, without which
37 + 7 and 37 × 7 would be one question."""

KINDS: tuple[Kind, ...] = ("task", "pair", "conversation", "label", "document")
"""How the records of an evaluation are read: as the first of these that its format can be."""

ANSWERS: dict[Kind, str] = {"task": "answer", "pair": "chosen", "label": "reply"}
"""Where each kind has the answer."""


class ContaminationConfig(Config):
    """Which evaluations must not be learnt from. The primer's own exams always are among them."""

    against: list[Path] = []
    """Files of other evaluations, in any format that stages read, or .txt with an item a line."""
    run: Annotated[int, Gt(0)] = 13
    """Words that a document and a longer item must share, one after the other (GPT-3's 13)."""
    alone: Annotated[int, Gt(0)] = 8
    """An item of so many words, and fewer than ``run``, is looked for whole; a shorter one only
    together with its answer. Chosen on 60,000 sentences of web pages, articles, plays and problems:
    of those with eight words, one in a hundred stands in another document too; of those with
    five, seven in a hundred do."""
    exam_seed: Annotated[int, Ge(0)] = 0
    """Seed of the primer's exams: that of the run which will be examined."""
    exam_items: Annotated[int, Ge(0)] = PrimerConfig().exam_items
    """How many questions each of these exams has; 0 leaves them out."""


@dataclass(frozen=True)
class Item:
    """A question of an evaluation.

    Attributes:
        name: Of the evaluation, for the accounts.
        question: What is asked.
        answer: What the answer is, if there is one.
        asks: Whether it is a question or a request, and not a piece of text.
    """

    name: str
    question: str
    answer: str = ""
    asks: bool = True


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return WORD.findall(text.lower())


FIRST = 3
"""Every run is filed under its first three words: looking these up is all that is done for most
words of a corpus. An item with fewer words cannot be looked for."""
ASKED = 5
"""A request that nothing in particular answers ("Help me steal a car": any refusal does) is looked
for whole if it has so many words. Lines of plain text need ``alone`` of them: they may be headings
and phrases, which others use as well."""
GAP = 8
"""Words that may stand between a short question and its answer: "Answer: the capital is"."""


class Index:
    """The runs of words by which items are recognised.

    An item of ``run`` words or more is in a text if they share any ``run`` of them (the answer
    counts as an item of its own if it is so long). One of ``alone`` words or more is in it if the
    text holds all of them in order (``ASKED``, if it is a request that has no one answer). A
    shorter one is if, besides, its answer begins within ``GAP`` words after it; without an answer
    it cannot be told from ordinary text, and ``untold`` counts it.

    Args:
        items: Of all evaluations; of two with the same words, the first gives its name.
        run: Words that a longer item must share.
        alone: Words that an item without its answer must have.
    """

    def __init__(self, items: Iterable[Item], run: int, alone: int) -> None:
        self.names: dict[tuple[str, ...], str] = {}
        self.answers: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
        self.untold = 0
        for item in items:
            question, answer = words_of(item.question), words_of(item.answer)
            for part in (question, answer):
                for i in range(len(part) - run + 1):
                    self.names.setdefault(tuple(part[i : i + run]), item.name)
            if len(question) >= run:
                continue
            least = min(alone, ASKED) if item.asks and not answer else alone
            if len(question) >= max(least, FIRST):
                self.names.setdefault(tuple(question), item.name)
            elif len(question) >= FIRST and answer:
                self.answers[tuple(question)].setdefault(tuple(answer), item.name)
            else:
                self.untold += 1
        lengths: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for words in (*self.names, *self.answers):
            lengths[words[:FIRST]].add(len(words))
        self.lengths = {first: sorted(some) for first, some in lengths.items()}

    def find(self, words: Sequence[str]) -> str | None:
        """The name of an evaluation of which ``words`` hold an item."""
        lengths = self.lengths
        seconds, thirds = words[1:], words[2:]
        # Never all at once: of a record of 64 MB they would be a gigabyte.
        if lengths.keys().isdisjoint(zip(words, seconds, thirds, strict=False)):
            return None
        for place, first in enumerate(zip(words, seconds, thirds, strict=False)):
            for length in lengths.get(first, ()):
                some = tuple(words[place : place + length])
                name = self.names.get(some) or self._answered(some, words, place + length)
                if name:
                    return name
        return None

    def _answered(self, question: tuple[str, ...], words: Sequence[str], end: int) -> str | None:
        """The name of the evaluation that has this question, if its answer follows."""
        for answer, name in self.answers.get(question, {}).items():
            for place in range(end, min(end + GAP, len(words) - len(answer)) + 1):
                if tuple(words[place : place + len(answer)]) == answer:
                    return name
        return None


class Contamination(Step):
    """Drops documents that hold an item of an evaluation.

    The index is made once, from the files and the primer's generators.

    Raises:
        UserError: A file is missing, or its format is not known.
    """

    name = "contamination"

    def __init__(self, config: ContaminationConfig) -> None:
        super().__init__()
        self.index = Index(items_of(config), config.run, config.alone)

    def __call__(self, document: Document) -> str | None:
        """Say which evaluation ``document`` has items of."""
        name = self.index.find(words_of(document.text))
        return f"holds an item of {name}" if name else None


def items_of(config: ContaminationConfig) -> Iterator[Item]:
    """Every question that is not to be learnt, those of the primer first.

    The primer's preference pairs are not among them: their questions are about what its readings
    teach, and only the judgement between two replies is held out.
    """
    if config.exam_items:
        for exam in exams(config.exam_seed, config.exam_items):
            yield Item("the primer's exams", _asked(exam), exam["answer"])
    for path in config.against:
        yield from _items_of_file(path)


def _asked(record: Any) -> str:
    """All that the user says."""
    turns = record["messages"]
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")


def _items_of_file(path: Path) -> Iterator[Item]:
    """The items of an evaluation's file, which gives them its name."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise UserError(f"no such file: {path}", "Check `against` in the config.") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 (at byte {error.start})", "Save the file as UTF-8."
            ) from None
        yield from (Item(path.stem, line, asks=False) for line in lines)
        return
    for record in read_records(path):
        yield from _items_of_record(record, path.name.partition(".")[0])


def _items_of_record(record: Record, name: str) -> Iterator[Item]:
    """One item; of a conversation, one for each question with what is said to it."""
    form = recognise(record)
    kind: Kind | None = next((k for k in KINDS if form and k in form.makes), None)
    if kind is None:
        raise UserError(
            f"{record.place} has the columns {', '.join(record)}, which no known format has",
            "`instar data inspect` names the formats; or make it a .txt with an item a line.",
        )
    try:
        made = convert(record, kind) or record
    except UserError as error:
        raise UserError(f"{record.place}: {error.problem}", error.remedy) from None
    if kind == "document":
        yield Item(name, made["text"], asks=False)
    elif kind == "conversation":
        for asked, said in pairwise(made["messages"]):
            if (asked["role"], said["role"]) == ("user", "assistant"):
                yield Item(name, asked["content"], said["content"])
    else:
        yield Item(name, _asked(made), str(made[ANSWERS[kind]]))
