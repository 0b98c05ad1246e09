"""A text that stands in a corpus many times, with small changes: one of them should be left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("daft")


@pytest.mark.parametrize("copies", [5, 30])
def test_near_copies_leave_one(
    copies: int, tmp_path: Path, build: Any, plain: Any, records: Any, texts: Any
) -> None:
    paragraphs = "\n\n".join(texts("cluster", 4)).split("\n\n")
    some = []
    for number in range(copies):
        place = number % len(paragraphs)
        changed = f"{paragraphs[place]} So says number {number}."
        some.append("\n\n".join([*paragraphs[:place], changed, *paragraphs[place + 1 :]]))
    lines = (json.dumps({"text": text}) for text in some)
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    recipe = plain | {"lines": {}, "exact": True, "near": {}, "valid_share": 0}
    build(tmp_path / "out", [tmp_path / "a.jsonl"], **recipe)
    assert [record["text"] for record in records(tmp_path / "out")] == some[:1]
