"""What a corpus itself can teach after pretraining: to write to a title, in its own form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from instar.corpus.accounts import MANIFEST
from instar.data.readers import Record, read_records, write_jsonl
from instar.data.schema import ExamItem, Message
from instar.files import matching, read_json, write_json
from instar.rollout.verifiers import clauses

TITLED = "titled.jsonl"
"""Conversations: a title is asked for, the document answers."""

EXAMS = "exams.jsonl"
"""Titles of held-out documents, to be written to in lines as long as the corpus' lines are."""

MADE_OF = "lessons.json"
"""The fingerprint of the corpus that both were made of; written last."""

MOST_LESSONS = 8000
MOST_ITEMS = 200

LONGEST = 64
"""Characters of a document that is short enough to be written in one reply."""

FORM_SHARE = 0.85
"""If so large a share of all lines has one of ``FORM_LENGTHS`` lengths, the text has a form."""

FORM_LENGTHS = 2


def write_lessons(corpus: Path) -> None:
    """Write ``titled.jsonl`` and ``exams.jsonl``, unless they are there.

    Both are empty where documents have no titles, the exams also where they have no form.

    Args:
        corpus: Directory of a corpus; its documents are read.
    """
    fingerprint = read_json(corpus / MANIFEST)["fingerprint"]
    if (corpus / MADE_OF).exists() and read_json(corpus / MADE_OF) == fingerprint:
        return
    write_jsonl(corpus / TITLED, ({"messages": _turns(r)} for r in _titled(corpus, "train")))
    lengths = form(corpus)
    items: list[ExamItem] = [
        {
            "messages": _turns(record)[:1],
            "verifier": "line_lengths",
            "answer": record["text"],
            "options": [str(length) for length in lengths],
            "exam": "form",
        }
        for record, _ in zip(_titled(corpus, "valid"), range(MOST_ITEMS), strict=False)
    ]
    write_jsonl(corpus / EXAMS, items if lengths else [])
    write_json(corpus / MADE_OF, fingerprint)


def form(corpus: Path) -> list[int]:
    """The lengths, in characters, of nearly all lines of a corpus with titles; none if they vary.

    A line ends with punctuation, as in verse: `秦川雄帝宅，函谷壯皇居。` has two, of five each.
    """
    counts: Counter[int] = Counter()
    for record in _titled(corpus, "train"):
        counts.update(map(len, clauses(record["text"])))
    common = counts.most_common(FORM_LENGTHS)
    has_form = sum(count for _, count in common) >= FORM_SHARE * counts.total() > 0
    return sorted(length for length, _ in common) if has_form else []


def _titled(corpus: Path, part: str) -> Iterator[Record]:
    """Documents with a title that fit into one reply."""
    found = 0
    for path in matching(corpus / "documents" / f"{part}-*.jsonl"):
        for record in read_records(path):
            if record.get("title") and len(record["text"]) <= LONGEST:
                yield record
                found += 1
                if found == MOST_LESSONS:
                    return


def _turns(record: Record) -> list[Message]:
    """Somebody asks for a title, and gets the document."""
    title, is_chinese = record["title"], record.get("language") == "zh"
    asked = f"以《{title}》为题写一篇。" if is_chinese else f"Write a text titled “{title}”."
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": record["text"]}]
