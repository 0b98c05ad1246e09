"""``instar tokenizer``: train one, watch it cut text, look inside, compare it with others.

Only this file of the package reads files and prints.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from instar.data.readers import read_records
from instar.errors import UserError
from instar.files import atomic_directory
from instar.hub import located
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.learning import Kind, learn_tokenizer
from instar.tokenizer.reading import FILES

BLOCK = 1 << 20  # bytes of a .txt file that are read at a time


def texts_from(path: str | Path) -> Iterator[str]:
    """The texts of one file.

    A ``.txt`` file comes in blocks of whole lines, about a megabyte each; a ``.jsonl`` file gives
    the field ``text`` of each line.

    Raises:
        UserError: The file is missing, empty, not UTF-8 or of another kind.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path} is neither .txt nor .jsonl", "Convert it to one of the two.")
    if not path.is_file():
        raise UserError(f"{path} does not exist", "Check the spelling, and the current folder.")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty", "Give a file that holds text.")
    if path.suffix == ".txt":
        return _blocks(path)
    return (record["text"] for record in read_records(path, ("text",)))


def _blocks(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK):
            raw = b"".join(lines)
            try:
                yield raw.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 at byte {offset + error.start}",
                    "Convert it, for example with `iconv -f GB18030 -t UTF-8`.",
                ) from None
            offset += len(raw)


def _check_place(out: Path) -> None:
    """Refuse to replace a directory that holds anything but an older tokenizer."""
    others = sorted({path.name for path in out.iterdir()} - set(FILES)) if out.exists() else []
    if others:
        raise UserError(
            f"{out} holds {others[0]!r}, which is no part of a tokenizer",
            "Name a new directory with --out.",
        )


def opened(directory: Path) -> Tokenizer:
    """The tokenizer in a directory or on the hub; where an adapter has none, that of its base.

    Raises:
        UserError: As ``Tokenizer.load`` and ``located`` do.
    """
    directory = located(directory)
    if (directory / FILES[0]).exists() or not (directory / "adapter_config.json").exists():
        return Tokenizer.load(directory)
    # By name, since what an adapter is the tokenizer does not know.
    return import_module("instar.adapters.opening").load_tokenizer(directory)


def train(
    files: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    vocab_size: int = 2048,
    max_length: int = 2048,
    kind: Kind = "bpe",
) -> None:
    """Learn a tokenizer from your own text.

    Starts from single bytes and joins the most frequent pair of neighbours, again and again,
    until the vocabulary is full. Hugging Face's library `tokenizers` does the same above 64 MB of
    text (about a minute of work), with the same outcome.

    With `--kind sentencepiece-bpe` characters are joined; with `sentencepiece-unigram` the pieces
    are kept that make the text most probable. Both need `make corpus`, and hold the whole text in
    memory. `instar tokenizer compare` tells which suits you.

    Choose text like what the model will read later, in the same proportions.

    A larger vocabulary makes text shorter, but every token costs a row of the embedding: 2048
    suits a model of a few million parameters, 32000 one of a billion.

    For example: instar tokenizer train corpus.jsonl --vocab-size 2048 --out tokenizer

    Args:
        files: Text to learn from: .txt, or .jsonl with a field "text".
        out: Directory to write; AutoTokenizer of transformers opens it, too.
        vocab_size: Tokens in all: 6 control tokens, 256 bytes, and the rest merges or pieces.
        max_length: The longest input of the model to come, in tokens; only noted down.
        kind: How it is learnt; see above.
    """
    if not files:
        raise UserError("no files were given", "Name at least one .txt or .jsonl file.")
    out = out.resolve()
    _check_place(out)
    console = Console()
    start = time.perf_counter()
    sources = [texts_from(path) for path in files]  # look at every file before the work begins
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("counting words", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, description="merging pairs", completed=done, total=total)

        def note(text: str) -> None:
            bar.console.print(text)
            bar.update(task, description="learning")

        with atomic_directory(out) as directory:
            texts = chain.from_iterable(sources)
            size = learn_tokenizer(directory, texts, kind, vocab_size, max_length, progress, note)
    took_s = time.perf_counter() - start
    console.print(f"{size} tokens in {took_s:.1f} s, written to {out}", soft_wrap=True)
    if size < vocab_size:
        console.print(f"The text has no more pairs or pieces; {vocab_size} tokens need more of it.")


def encode(
    directory: tyro.conf.Positional[Path],
    text: tyro.conf.Positional[str],
    special: bool = False,
) -> None:
    """Show how a text is cut: every token with its id.

    A piece that is only part of a character (a Chinese character has three bytes) is shown as
    its bytes, like <E4 BD>. Control tokens in the text are taken for plain text, as in a chat.

    For example: instar tokenizer encode runs/mini/tokenizer "<|im_start|>user" --special

    Args:
        directory: Of a tokenizer or a checkpoint, or a name on the hub.
        text: What to cut; quote it.
        special: Take control tokens in the text for what they are.
    """
    tokenizer = opened(directory)
    ids = tokenizer.encode(text, special)
    table = Table("id", "piece")
    for id in ids:
        table.add_row(str(id), Text(piece(tokenizer.token_bytes(id))))
    console = Console()
    console.print(table)
    console.print("ids: " + " ".join(map(str, ids)), highlight=False, soft_wrap=True)
    if ids:
        size = len(text.encode())
        console.print(f"{len(ids)} tokens, {size} bytes, {size / len(ids):.2f} bytes per token")


def show(directory: tyro.conf.Positional[Path], file: Path | None = None) -> None:
    """Look inside a tokenizer: its size, what it learned first, its longest tokens.

    The first merges are the commonest pairs of the text that it learned from; the longest tokens
    tell what that text repeated most (a boilerplate line among them is a reason to clean the
    text).

    Args:
        directory: Of a tokenizer or a checkpoint, or a name on the hub.
        file: Text to measure the compression on: bytes per token, more is better.
    """
    tokenizer = opened(directory)
    pieces = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    table = Table(show_header=False)
    table.add_row("vocabulary", f"{len(pieces)} tokens")
    first = [token for token in pieces if len(token) > 1][:20]
    table.add_row("first merges", Text("  ".join(map(piece, first))))
    longest = sorted(pieces, key=len, reverse=True)[:20]
    table.add_row("longest tokens", Text("  ".join(map(piece, longest))))
    if file is not None:
        size, count = compression(tokenizer, texts_from(file))
        table.add_row("compression", f"{size / count:.2f} bytes per token ({count} tokens)")
    Console().print(table)


def compare(
    directories: tyro.conf.Positional[tuple[Path, ...]],
    file: tuple[Path, ...],
    train_steps: Annotated[int, Ge(0)] = 200,
) -> None:
    """Set tokenizers side by side on your text, and train the same small model with each.

    Counts bytes per token by language (a record's `language`, or else the script), the share of
    the vocabulary that occurs, megabytes a second, and texts that do not come back whole. Then a
    small model learns with each tokenizer, from the same number of bytes (not tokens: who needs
    fewer would read more), and a tenth of the documents, held out, tells how many bits it needs
    a byte.

    For example: instar tokenizer compare runs/mine/tokenizer other --file corpus.jsonl

    Args:
        directories: Of tokenizers or checkpoints, or names on the hub.
        file: Text to measure on: .txt, or .jsonl with a field "text".
        train_steps: Steps of the small model, some hundredths of a second each; 0 trains none.
    """
    # By name, since it trains models, which the tokenizer knows nothing of.
    import_module("instar.evaluation.tokenizers").compare(directories, file, train_steps)


def piece(token: bytes) -> str:
    """A token for the eye: its text, or its bytes in hex where it is not whole characters."""
    if not token:
        return "<control>"
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return f"<{token.hex(' ').upper()}>"
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """UTF-8 bytes and tokens of the texts, as two sums."""
    size = count = 0
    for text in texts:
        size += len(text.encode())
        count += len(tokenizer.encode(text))
    return size, count


def main(argv: list[str]) -> int:
    """Run ``instar tokenizer`` with the arguments after it."""
    tyro.extras.subcommand_cli_from_dict(
        {"train": train, "encode": encode, "show": show, "compare": compare},
        prog="instar tokenizer",
        description="Train a tokenizer on your own text, watch it cut text, look inside, compare.",
        args=argv,
    )
    return 0
