"""``instar data inspect``: what a file holds, and what a model would learn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from instar.data.formats import KEYS, Kind, recognise
from instar.data.packing import check_place
from instar.data.readers import Record, read_records
from instar.errors import UserError
from instar.tokenizer.chat import Rendered, render
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.verbs import opened, piece

USES: dict[Kind, str] = {
    "document": "pretrain, tokenizer",
    "conversation": "sft (and ppo, for its prompts)",
    "pair": "reward, dpo",
    "task": "rlvr",
    "label": "no stage yet",
}
"""Which stages learn from each kind of record."""

LEARNT, READ = "black on green", "dim"

MOST_SHOWN = 400
"""So many tokens of a row are shown."""


def inspect(
    file: Annotated[Path, tyro.conf.Positional],
    tokenizer: Path | None = None,
    show: int = 2,
) -> None:
    """Say which format a file is in, check every record, and show some as a stage would see them.

    Green is what the loss is taken on.

    Args:
        file: JSON lines, or a .json file with a list; also packed with gzip.
        tokenizer: A tokenizer's directory, or a name on the hub; without it, text is shown instead
            of tokens.
        show: How many records to show.
    """
    console = Console(highlight=False)
    first = next(read_records(file), None)
    if first is None:
        raise UserError(f"{file} holds no record", "Name a file with at least one.")
    found = recognise(first)
    if found is None:
        raise UserError(
            f"{first.place} has the columns {', '.join(first)}, which no known format has",
            "`instar data inspect --help` and the README name the formats.",
        )
    console.print(f"{file}: [bold]{found.name}[/bold] ({', '.join(found.columns)})")
    known = opened(tokenizer) if tokenizer else None
    for kind in found.makes:
        records = list(read_records(file, KEYS[kind]))
        for record in records:
            _check(record, kind)
        console.print(f"\nas {kind}s, for {USES[kind]}:")
        console.print(_summary(kind, records, known))
        for record in records[:show]:
            console.print(_shown(record, kind, known))


def _check(record: Record, kind: Kind) -> None:
    """That a stage could take it."""
    if kind != "document":
        check_place(record["messages"], record.place, needs_reply=kind == "conversation")


def _dialogues(record: Record, kind: Kind) -> list[tuple[str, list[Any]]]:
    """The conversations that a record stands for, each with a name."""
    asked = record.get("messages", [])
    replies = {"pair": ("chosen", "rejected"), "label": ("reply",)}.get(kind, ())
    if not replies:
        return [("", asked)]
    return [(name, [*asked, {"role": "assistant", "content": record[name]}]) for name in replies]


def _rendered(record: Record, kind: Kind, tokenizer: Tokenizer) -> list[Rendered]:
    """Its tokens, and which of them are to be learnt."""
    if kind == "document":
        before = tokenizer.before
        ids = [*before, *tokenizer.encode(record["text"]), tokenizer.eos_id]
        read = max(1, len(before))
        return [Rendered(ids, [False] * read + [True] * (len(ids) - read))]
    asks = kind == "task"
    return [render(tokenizer, turns, asks) for _, turns in _dialogues(record, kind)]


def _summary(kind: Kind, records: Sequence[Record], tokenizer: Tokenizer | None) -> Table:
    """How many there are, how long, who speaks."""
    table = Table(show_header=False)
    table.add_row("records", f"{len(records):,}")
    roles = Counter(
        turn["role"]
        for record in records
        for _, turns in _dialogues(record, kind)
        for turn in turns
    )
    if roles:
        table.add_row("turns", ", ".join(f"{role} {count:,}" for role, count in roles.items()))
    if kind == "task":
        verifiers = Counter(record["verifier"] for record in records)
        table.add_row("verifiers", ", ".join(f"{v} {n:,}" for v, n in verifiers.items()))
    if tokenizer:
        rows = [row for record in records for row in _rendered(record, kind, tokenizer)]
        lengths = sorted(len(row.ids) for row in rows)
        learnt = sum(sum(row.assistant_mask) for row in rows)
        middle, longest = lengths[len(lengths) // 2], lengths[-1]
        table.add_row("tokens", f"{sum(lengths):,}; median {middle:,}, longest {longest:,}")
        if learnt:
            table.add_row("learnt", f"{learnt:,} tokens, {learnt / sum(lengths):.0%}")
    return table


def _shown(record: Record, kind: Kind, tokenizer: Tokenizer | None) -> Text:
    """A record for the eye."""
    text = Text.assemble((f"{record.place}\n", "bold"))
    answer = f"answer: {record['answer']}\n" if kind == "task" else ""
    if tokenizer:
        names = [name for name, _ in _dialogues(record, kind)]
        for name, row in zip(names, _rendered(record, kind, tokenizer), strict=True):
            text.append(f"{name}\n" if name else "", style="italic")
            tokens = list(zip(row.ids, row.assistant_mask, strict=True))
            for number, (token, learnt) in enumerate(tokens[:MOST_SHOWN]):
                # Neighbours differ in weight, so that one sees where a token ends.
                weight = " bold" if number % 2 else ""
                text.append(_piece(tokenizer, token), style=(LEARNT if learnt else READ) + weight)
            left = len(tokens) - MOST_SHOWN
            text.append(f" … and {left} more\n" if left > 0 else "\n")
        return text.append(answer)
    if kind == "document":
        return text.append(record["text"][:500] + "\n")
    for name, turns in _dialogues(record, kind):
        text.append(f"{name}\n" if name else "", style="italic")
        for turn in turns:
            learnt = turn["role"] == "assistant"
            text.append(f"{turn['role']}: ", style="bold")
            text.append(f"{turn['content']}\n", style=LEARNT if learnt else READ)
    return text.append(answer)


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """A token for the eye, its line breaks broken as well; control tokens by their names."""
    content = tokenizer.token_bytes(token)
    if not content:
        return tokenizer.decode([token], skip_special=False)
    return piece(content) + "\n" * content.count(b"\n")
