"""Seconds to learn a tokenizer, and megabytes a second to turn texts into arrays of ids.

    python benchmarks/tokenizer.py --data DIRECTORY

The text is half Chinese, half English, without repetition: Tang poems (``tang/*.json``, lists of
{title, paragraphs}) and everything English in the directory (``.txt``, and ``.jsonl`` with a
``text`` or a ``question``). Two comparisons, each in rounds that visit every contestant, so that a
noisy machine is noisy for all; what is reported are medians and their ratios:

- learning: our trainer, the Rust library's on the same words, SentencePiece's two models. Bar: ours
  within 6 times the Rust trainer's time, with the same merges.
- encoding: ``encode_documents``, which ends with arrays of ``<bos> text <eos>``, beside the Rust
  library's bare batch calls, whose outcome is thrown away. Bar: at least 90% of its speed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from instar.data.encoding import encode_documents
from instar.memory import keep_freed_memory
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.tokenizer.learning import train_with_rust
from instar.tokenizer.pieces import train_pieces

BATCH = 4096
"""Texts of a call, where the Rust library does not get them all at once."""


def poems(directory: Path) -> Iterator[str]:
    """One text a poem."""
    for path in sorted(directory.glob("tang/*.json")):
        for poem in json.loads(path.read_text(encoding="utf-8")):
            yield "\n".join([poem["title"], *poem["paragraphs"]]) + "\n"


def english(directory: Path) -> Iterator[str]:
    """Records of .jsonl files, and paragraphs of .txt files."""
    for path in sorted(directory.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield record["text"] if "text" in record else record["question"]
    for path in sorted(directory.rglob("*.txt")):
        parts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        yield from (part + "\n\n" for part in parts)


def some(texts: Iterator[str], size: int, draw: random.Random) -> list[str]:
    """About ``size`` bytes of the texts, in an order of chance, none twice."""
    shuffled, chosen = list(texts), list[str]()
    draw.shuffle(shuffled)
    for text in shuffled:
        if size <= 0:
            break
        chosen.append(text)
        size -= len(text.encode())
    return chosen


def mixture(directory: Path, megabytes: float) -> list[str]:
    """Half Chinese, half English."""
    draw = random.Random(0)
    half = int(megabytes * 5e5)
    texts = some(poems(directory), half, draw) + some(english(directory), half, draw)
    draw.shuffle(texts)
    return texts


def rounds(contestants: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """The median seconds of each, over rounds that visit every one."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(count):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def learning(texts: list[str], vocab_size: int, count: int) -> None:
    """Compare the trainers and print a table."""
    merges: dict[str, object] = {}

    def keep(name: str, found: object) -> None:
        merges[name] = found

    seconds = rounds(
        {
            "Rust": lambda: keep("Rust", train_with_rust(texts, vocab_size)),
            "ours": lambda: keep("ours", train_bpe(texts, vocab_size)),
            "sentencepiece, BPE": lambda: train_pieces(texts, vocab_size, "bpe"),
            "sentencepiece, unigram": lambda: train_pieces(texts, vocab_size, "unigram"),
        },
        count,
    )
    print("| trainer | s | times the Rust trainer |\n|---|---|---|")
    for name, median in seconds.items():
        print(f"| {name} | {median:.2f} | {median / seconds['Rust']:.2f} |")
    print("the same merges" if merges["Rust"] == merges["ours"] else "OTHER MERGES", "\n")


def encoding(texts: list[str], tokenizer: Tokenizer, path: Path, count: int) -> None:
    """Compare the ways to encode and print a table."""
    from tokenizers import Tokenizer as RustTokenizer

    rust = RustTokenizer.from_file(str(path / "tokenizer.json"))
    size = sum(len(text.encode()) for text in texts) / 1e6

    def bare(call: Callable[..., object], batch: int) -> None:
        for at in range(0, len(texts), batch):
            call(texts[at : at + batch], add_special_tokens=False)

    def ours() -> None:
        for _ in encode_documents(texts, tokenizer):
            pass

    seconds = rounds(
        {
            "encode_batch": lambda: bare(rust.encode_batch, len(texts)),
            "encode_batch_fast": lambda: bare(rust.encode_batch_fast, len(texts)),
            f"encode_batch_fast, {BATCH} texts a call": lambda: bare(rust.encode_batch_fast, BATCH),
            "encode_documents, to arrays": ours,
        },
        count,
    )
    print("| how | MB/s | of encode_batch |\n|---|---|---|")
    for name, median in seconds.items():
        print(f"| {name} | {size / median:.2f} | {seconds['encode_batch'] / median:.0%} |")


def main(argv: list[str] | None = None) -> None:
    """Learn, then encode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="[%(default)s]")
    parser.add_argument("--megabytes", type=float, default=10.0, help="[10]")
    parser.add_argument("--vocab-size", type=int, default=4096, help="[4096]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--only", choices=("learning", "encoding"), help="[both]")
    options = parser.parse_args(argv)
    keep_freed_memory()
    texts = mixture(options.data, options.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} texts, {size:.1f} MB, {options.vocab_size} tokens\n")
    if options.only != "encoding":
        learning(texts, options.vocab_size, options.rounds)
    if options.only != "learning":
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            save_tokenizer(path, train_with_rust(texts, options.vocab_size), max_length=2**20)
            encoding(texts, Tokenizer.load(path), path, 2 * options.rounds + 1)


if __name__ == "__main__":
    main()
