"""What the tests of the whole pipeline have in common."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from instar.primer import readings

Build = Callable[..., tuple[Path, dict[str, Any]]]


def _texts(seed: str) -> Iterator[str]:
    """Endless ordinary documents of 30 to 300 words in both languages, no line of them common."""
    rng = random.Random(seed)
    made = {x: readings.readings(random.Random(seed + x), x) for x in ("en", "zh")}
    while True:
        for language in ("en", "zh"):
            wanted = rng.randint(2, 6)
            found = (d["text"] for d in made[language])
            yield "\n\n".join(islice((t for t in found if "\n" not in t), wanted))


@pytest.fixture(scope="session")
def texts() -> Callable[[str, int], list[str]]:
    """A seed and a number to so many documents."""
    return lambda seed, count: list(islice(_texts(seed), count))


@pytest.fixture(scope="session")
def build() -> Build:
    """Makes a corpus quietly: ``build(out, inputs, workers=1, **recipe)`` gives what it returned,
    where it is, and its manifest."""
    pytest.importorskip("daft")
    from rich.console import Console

    from instar.corpus.config import CorpusConfig
    from instar.corpus.prepare import prepare
    from instar.corpus.workers import Workers
    from instar.files import read_json
    from instar.training.display import Display

    def build(
        out: Path, inputs: Sequence[Any], workers: Any = None, **recipe: Any
    ) -> tuple[bool, dict[str, Any]]:
        named = [value if isinstance(value, dict) else {"path": str(value)} for value in inputs]
        values = {"tokenizer": None, "inputs": named} | recipe
        config = CorpusConfig.parse(values, "test")
        with workers or Workers("local", 1) as hands:
            made = prepare(config, out, hands, Display(Console(quiet=True)))
        return made, read_json(out / "manifest.json")

    return build


PLAIN = {
    "repair": None,
    "language": None,
    "personal": None,
    "quality": None,
    "contamination": None,
}


@pytest.fixture(scope="session")
def plain() -> dict[str, Any]:
    """A recipe that changes and drops nothing."""
    return {"steps": PLAIN, "lines": None, "exact": False, "near": None}


@pytest.fixture(scope="session")
def records() -> Callable[..., list[dict[str, Any]]]:
    """The documents of a corpus, in order; of one part (``train``, ``valid``) or of both."""

    def read(out: Path, part: str = "*") -> list[dict[str, Any]]:
        paths = sorted((out / "documents").glob(f"{part}-*.jsonl"))
        lines = (line for path in paths for line in path.read_text("utf-8").split("\n") if line)
        return [json.loads(line) for line in lines]

    return read
