"""Tokenizers side by side: how short they make a text, how fast, and what a model learns with them.

Fewer tokens are not better by themselves: each is harder to predict, and a larger vocabulary
takes a larger embedding. So a small model is trained with each tokenizer, and measured in bits
per byte, which no tokenizer can flatter. All of them see the same number of bytes a step and
have the same number of bytes in sight; the number of tokens follows from that.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import regex
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from instar.data.encoding import pack_documents
from instar.data.readers import read_records
from instar.data.sources import PackedSource
from instar.errors import UserError
from instar.evaluation.bits import bits_per_byte
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.verbs import opened, piece, texts_from
from instar.training.interrupt import Interruptible
from instar.training.loop import TrainingConfig, fit
from instar.training.meter import Meter
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner
from instar.training.schedule import ScheduleConfig
from instar.training.state import Progress

HELD_OUT = 0.1
"""Share of the documents that is not learnt from, and measured instead."""

MOST_HELD_OUT = 400_000
"""Bytes of held-out text that are measured."""

DOCUMENT_CHARACTERS = 2000
"""Lines of a .txt file are joined to documents of about this length, one language each."""

ROWS, ROW_BYTES = 8, 512
"""What the small model sees in a step, and of how much text at once."""

TIMED_BYTES, ROUNDS = 1_000_000, 3
"""How much text the speed is measured on, and how often; the median counts."""

HAN, LATIN, LETTER = (regex.compile(p) for p in (r"\p{Han}", r"[A-Za-z]", r"\p{L}"))


@dataclass(frozen=True)
class Sample:
    """A document.

    Attributes:
        text: What it says.
        language: ``zh``, ``en`` or ``other``, or what its record says.
    """

    text: str
    language: str


@dataclass(frozen=True)
class Compared:
    """What was measured of one tokenizer.

    Attributes:
        tokens: How many it has.
        used: Share of them that occurs in the text.
        bytes_per_token: By language.
        errors: Documents that did not come back from their ids as they were.
        batch_mb_s: Megabytes encoded a second, many texts in one call.
        single_mb_s: The same, one text a call.
        longest: The longest tokens, for the eye.
        bits_per_byte: Of the small model, by language; empty if none was trained.
    """

    tokens: int
    used: float
    bytes_per_token: dict[str, float]
    errors: int
    batch_mb_s: float
    single_mb_s: float
    longest: list[str]
    bits_per_byte: dict[str, float]


def language_of(text: str) -> str:
    """``zh``, ``en`` or ``other``, by the script of most letters; a Han character counts thrice."""
    han, latin, letters = (len(which.findall(text)) for which in (HAN, LATIN, LETTER))
    rest = letters - han - latin
    if not letters or rest > max(3 * han, latin):
        return "other"
    return "zh" if 3 * han > latin else "en"


def documents_from(path: Path) -> Iterator[Sample]:
    """Records of a .jsonl file, or joined lines of a .txt file, each with its language."""
    if path.suffix != ".txt":
        for record in read_records(path, ("text",)):
            language = record.get("language") or language_of(record["text"])
            yield Sample(record["text"], language)
        return
    held, language = "", "other"
    for block in texts_from(path):
        for line in block.splitlines(keepends=True):
            own = language_of(line) if LETTER.search(line) else language
            if held and (own != language or len(held) > DOCUMENT_CHARACTERS):
                yield Sample(held, language)
                held = ""
            held, language = held + line, own
    if held:
        yield Sample(held, language)


def measured(
    tokenizer: Tokenizer,
    documents: Sequence[Sample],
    train_steps: int,
    on_step: Callable[[], None],
) -> Compared:
    """Everything about one tokenizer.

    Args:
        tokenizer: Which.
        documents: The text.
        train_steps: Steps of the small model; 0 trains none.
        on_step: Called after each of them.
    """
    sizes, counts, used, errors = defaultdict[str, int](int), defaultdict[str, int](int), set(), 0
    for document in documents:
        ids = tokenizer.encode(document.text)
        language = document.language
        sizes[language] += len(document.text.encode())
        counts[language] += len(ids)
        used.update(ids)
        errors += tokenizer.decode(ids) != document.text
    sample, size = _sample(documents)
    pieces = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    return Compared(
        tokens=tokenizer.vocab_size,
        used=len(used) / tokenizer.vocab_size,
        bytes_per_token={name: sizes[name] / counts[name] for name in sorted(sizes)},
        errors=errors,
        batch_mb_s=size / 1e6 / _seconds(lambda: tokenizer.encode_batch(sample)),
        single_mb_s=size / 1e6 / _seconds(lambda: [tokenizer.encode(text) for text in sample]),
        longest=[piece(token) for token in sorted(pieces, key=len, reverse=True)[:5]],
        bits_per_byte=learnt(tokenizer, documents, train_steps, on_step) if train_steps else {},
    )


def _sample(documents: Sequence[Sample]) -> tuple[list[str], int]:
    """Some documents from all over the text, and their bytes."""
    shuffled = random.Random(0).sample(documents, len(documents))
    chosen = _up_to(shuffled, TIMED_BYTES)
    return [one.text for one in chosen], sum(len(one.text.encode()) for one in chosen)


def _up_to(documents: Sequence[Sample], size: int) -> list[Sample]:
    """The first documents, until they make up so many bytes."""
    sums = accumulate(len(document.text.encode()) for document in documents)
    return list(documents[: 1 + sum(1 for total in sums if total < size)])


def divided(documents: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """What is learnt from, and by chance about a tenth that is measured instead."""
    shuffled = random.Random(0).sample(documents, len(documents))
    cut = max(1, round(len(shuffled) * HELD_OUT))
    return shuffled[cut:], _up_to(shuffled[:cut], MOST_HELD_OUT)


def _seconds(work: Callable[[], object]) -> float:
    """The median time of some rounds."""
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def learnt(
    tokenizer: Tokenizer, documents: Sequence[Sample], steps: int, on_step: Callable[[], None]
) -> dict[str, float]:
    """Bits per byte, by language, of a small model that was trained on most of the documents.

    Args:
        tokenizer: Turns them into ids.
        documents: Some are held out and measured.
        steps: How long it learns; each step is ``ROWS`` rows of ``ROW_BYTES`` bytes on average.
        on_step: Called after each.
    """
    read, held_out = divided(documents)
    texts = [document.text for document in read]
    stream = pack_documents(texts, tokenizer)
    size = sum(len(text.encode()) for text in texts)
    context = max(1, round(ROW_BYTES * len(stream) / max(size, 1)))
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=context,
    )
    training = TrainingConfig(
        steps=steps,
        optimizer=OptimizerConfig(name="muon", lr=1e-2),
        schedule=ScheduleConfig(final=0.1),
    )
    model = CausalLM(shape)
    initialize(model, shape, torch.Generator().manual_seed(0))
    learner = Learner(NextToken(model))
    source = PackedSource(stream, context, ROWS, ROWS, seed=0)
    optimizers = Optimizers(learner.objective, training.optimizer)
    with Interruptible() as interrupt:
        parts = learner, source, optimizers, training, Progress()
        fit(*parts, [lambda _: on_step()], Meter(), interrupt)
    records: list[Any] = [asdict(document) for document in held_out]
    scores = bits_per_byte(model, tokenizer, records)
    return {language: result.score for language, result in scores.items()}


def table(found: dict[str, Compared]) -> Table:
    """A column a tokenizer, a row a measure."""
    result = Table("", *map(escape, found))
    every = list(found.values())

    def row(name: str, *cells: str) -> None:
        result.add_row(name, *map(Text, cells))

    row("tokens", *(f"{one.tokens:,}" for one in every))
    row("of them used", *(f"{one.used:.0%}" for one in every))
    for language in every[0].bytes_per_token:
        row(f"bytes a token, {language}", *(f"{o.bytes_per_token[language]:.2f}" for o in every))
    row("MB/s, in one call", *(f"{one.batch_mb_s:.1f}" for one in every))
    row("MB/s, one by one", *(f"{one.single_mb_s:.1f}" for one in every))
    row("texts not restored", *(f"{one.errors:,}" for one in every))
    for language in every[0].bits_per_byte:
        row(f"bits a byte, {language}", *(f"{o.bits_per_byte[language]:.3f}" for o in every))
    row("longest tokens", *("\n".join(one.longest) for one in every))
    return result


def compare(directories: Sequence[Path], files: Sequence[Path], train_steps: int) -> None:
    """Measure and print; ``instar tokenizer compare --help`` says what.

    Raises:
        UserError: No tokenizer or file is given, or one cannot be read.
    """
    if not directories:
        raise UserError("no tokenizer was given", "Name at least one tokenizer's directory.")
    if not files:
        raise UserError("no text was given", "Name .txt or .jsonl files with --file.")
    # One tokenizer may be given twice, and directories may share a name: paths tell them apart.
    tokenizers = {str(directory): opened(directory) for directory in directories}
    documents = [d for path in files for d in documents_from(path) if d.text]
    if not documents:
        raise UserError(f"no text in {', '.join(map(str, files))}", "Name other files.")
    console = Console()
    columns = *Bar.get_default_columns()[:-1], TextColumn("left"), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=len(tokenizers) * max(train_steps, 1))
        found = {}
        for number, (name, tokenizer) in enumerate(tokenizers.items(), start=1):
            bar.update(task, description=escape(name))
            found[name] = measured(tokenizer, documents, train_steps, lambda: bar.advance(task))
            bar.update(task, completed=number * max(train_steps, 1))
    console.print(table(found))
    if train_steps:
        seen = train_steps * ROWS * ROW_BYTES / 1e6
        console.print(
            f"bits a byte: a model of one layer after {train_steps} steps, which saw {seen:.1f} MB"
            " with every tokenizer; on documents it did not learn from. Fewer are better.",
        )
