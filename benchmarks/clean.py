"""What cleaning raw text costs and drops: each step of the corpus pipeline on real text, one core.

    python benchmarks/clean.py --data ../shared/data

takes web pages (C4), encyclopedia articles (WikiText-2), plays (tinyshakespeare), instructions
(Chinese Alpaca) and Tang poems through all steps, in their order, several times, and prints for
each the speed of every step in megabytes of UTF-8 a second (the median of the rounds), the speed of
all together, how many documents were kept, and how many each rule dropped. Seconds are the
processor's, so that other programs on the machine count for little. ``--show RULE`` prints what a
rule has dropped.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from instar.corpus.document import Document, Step
from instar.corpus.quality import QualityConfig
from instar.corpus.steps import StepsConfig, make_steps

MOST_CHARACTERS = 400
"""So much of a dropped document is shown."""
MOST_SHOWN = 10


def pages(data: Path) -> list[str]:
    """Web pages."""
    lines = (data / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def articles(data: Path) -> list[str]:
    """Articles of an encyclopedia; a title stands between single equals signs."""
    texts = [(data / f"wikitext-2/{part}.txt").read_text(encoding="utf-8") for part in PARTS]
    parts = re.split(r"\n (?== [^=])", "\n".join(texts))
    return [part for part in parts if part.strip()]


PARTS = ("valid", "test")


def plays(data: Path) -> list[str]:
    """Plays, in pieces of two hundred lines."""
    lines = (data / "tinyshakespeare.txt").read_text(encoding="utf-8").splitlines()
    return ["\n".join(lines[i : i + 200]) for i in range(0, len(lines), 200)]


def instructions(data: Path) -> list[str]:
    """Modern Chinese prose: what a model replied."""
    rows = json.loads((data / "chat" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    return [row["output"] for row in rows]


def poems(data: Path) -> list[str]:
    """Every sixth file of the Tang poems."""
    files = sorted((data / "tang").glob("*.json"))[::6]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return ["\n".join(row["paragraphs"]) for row in rows if row["paragraphs"]]


Preset = Literal["web", "books"]
TEXTS: dict[str, tuple[Callable[[Path], list[str]], Preset]] = {
    "web pages": (pages, "web"),
    "articles": (articles, "web"),
    "plays": (plays, "books"),
    "Chinese replies": (instructions, "web"),
    "Tang poems": (poems, "books"),
}
"""Where each kind of text comes from, and which rules it is judged by."""


@dataclass
class Account:
    """What one pass over the documents cost and dropped.

    Attributes:
        seconds: Of the processor, by step.
        size: Bytes that came to each step.
        dropped: Documents by step and rule.
        examples: What each rule dropped.
        counts: What each step did.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    size: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, Counter[str]] = field(default_factory=dict)


def clean(texts: Iterable[str], steps: list[Step]) -> Account:
    """Take all documents through the steps, each until one drops it.

    Step by step, so that the clock is read once a step and not once a document.
    """
    account = Account()
    documents = [Document(text, f"{number}", "") for number, text in enumerate(texts)]
    for step in steps:
        account.size[step.name] = sum(len(document.text.encode()) for document in documents)
        step.counts.clear()
        began = time.process_time()
        rules = [step(document) for document in documents]
        account.seconds[step.name] = time.process_time() - began
        account.counts[step.name] = step.counts.copy()
        for document, rule in zip(documents, rules, strict=True):
            if rule:
                account.dropped[step.name, rule] += 1
                account.examples[rule].append(document.text)
        documents = [d for d, rule in zip(documents, rules, strict=True) if not rule]
    return account


def table(name: str, accounts: list[Account], documents: int, size: int) -> str:
    """Markdown: a row for each step, and one for all."""
    last = accounts[-1]
    lines = [f"| {name} | MB/s | dropped |", "|---|---|---|"]
    for step, given in last.size.items():
        seconds = statistics.median(account.seconds[step] for account in accounts)
        rules = [(rule, n) for (of, rule), n in last.dropped.most_common() if of == step]
        dropped = ", ".join(f"{rule} {n:,}" for rule, n in rules)
        lines.append(f"| {step} | {given / seconds / 1e6:.1f} | {dropped} |")
    seconds = statistics.median(account.seconds.total() for account in accounts)
    kept = documents - last.dropped.total()
    share = f"{kept:,} of {documents:,} kept ({kept / documents:.1%})"
    return "\n".join([*lines, f"| all | {size / seconds / 1e6:.1f} | {share} |"])


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="passes over each text [3]")
    parser.add_argument("--only", choices=TEXTS, help="one kind of text")
    parser.add_argument("--show", metavar="RULE", help="print what this rule drops")
    options = parser.parse_args(argv)
    if not options.data.is_dir():
        raise SystemExit(f"no such directory: {options.data}; name it with --data")
    for name, (read, preset) in TEXTS.items():
        if options.only not in (None, name):
            continue
        texts = read(options.data)
        began = time.perf_counter()
        steps = make_steps(StepsConfig(quality=QualityConfig(preset=preset)))
        ready = time.perf_counter() - began
        accounts = [clean(texts, steps) for _ in range(options.rounds)]
        size = sum(len(text.encode()) for text in texts)
        print(table(f"{name} ({preset}), {size / 1e6:.1f} MB", accounts, len(texts), size))
        for step, counts in accounts[-1].counts.items():
            done = ", ".join(f"{kind} {n:,}" for kind, n in counts.most_common(8) if n)
            print(f"{step}: {done}" if done else f"{step}: nothing", file=sys.stderr)
        print(f"(steps ready in {ready:.2f} s)\n", flush=True)
        for text in accounts[-1].examples.get(options.show, [])[:MOST_SHOWN]:
            print(f"- {text[:MOST_CHARACTERS]!r}\n")


if __name__ == "__main__":
    main()
