"""The accounts of a finished corpus, in one file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import instar
from instar.corpus.accounts import MANIFEST, SHOWN, Accounts, total
from instar.corpus.columns import ROW_BITS, numbered
from instar.corpus.document import Document
from instar.corpus.inputs import named
from instar.corpus.write import COPIES, PARTS, TOTALS
from instar.files import read_json, write_json
from instar.lineage import hash_file

if TYPE_CHECKING:
    from instar.corpus.run import Run

CLUSTERS = 10
"""The largest groups of copies that are shown."""

MEMBERS = 5
"""Copies of a group that are shown."""


def write_manifest(run: Run) -> None:
    """Add everything up, check that it adds up, and write ``manifest.json``.

    Nothing in it depends on when, where or by how many workers the corpus was made.
    """
    accounts = Accounts()
    for fault in run.faults:
        accounts.faults.add(Document(fault.problem, fault.place, ""))
    for phase in ("clean", "documents"):
        accounts.merge(total(run.records(phase)))
    accounts.check()
    shards = _totals(run)
    _estimate_tokens(accounts, shards)
    clusters, places = _clusters(run, _noted(accounts))
    record = accounts.record()
    for flow in record["flows"].values():
        for drop in flow["drops"].values():
            for example in drop["examples"]:
                if example.get("note", "").isdigit():
                    example["note"] = f"of {places[int(example['note'])]['place']}"
    split: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    for partition in run.records("documents"):
        for part in PARTS:
            split[part].update(partition["totals"][part])
    write_json(
        run.out / MANIFEST,
        {
            "instar": instar.__version__,
            "fingerprint": run.fingerprint,
            "recipe": run.config.model_dump(mode="json"),
            "inputs": [
                {
                    "name": source.called(),
                    "path": source.path,
                    "files": [{"path": f.path, "sha256": f.sha256, "bytes": f.size} for f in files],
                }
                for source, files in zip(run.config.inputs, run.sources, strict=True)
            ],
            "ignored": [named(path) for path in run.ignored],
            **record,
            "split": split,
            "shards": shards,
            "epochs": _read(run.directory / "epochs.json"),
            "clusters": clusters,
            "files": {
                str(path.relative_to(run.out)): hash_file(path)
                for name in ("documents", "shards", "tokenizer")
                for path in sorted((run.out / name).glob("*"))
            },
        },
    )


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else {}


def _totals(run: Run) -> dict[str, dict[str, dict[str, int]]]:
    """Documents, repeats, characters and tokens of the shards, by part and source."""
    sums: dict[str, dict[str, Counter[str]]] = {part: {} for part in PARTS}
    for work in run.work:
        for part, sources in _read(work.path("shards", "") / TOTALS).items():
            for source, counts in sources.items():
                sums[part].setdefault(source, Counter()).update(counts)
    return {part: {name: dict(c) for name, c in sources.items()} for part, sources in sums.items()}


def _estimate_tokens(accounts: Accounts, shards: dict[str, dict[str, dict[str, int]]]) -> None:
    """Say of every step about how many tokens came and went, where a tokenizer is there.

    What is dropped is never cut into tokens; it is reckoned with as many a character as what was
    kept has.
    """
    kept = [counts for sources in shards.values() for counts in sources.values()]
    characters = sum(counts["characters"] for counts in kept)
    if characters:
        ratio = sum(counts["tokens"] for counts in kept) / characters
        for flow in accounts.flows.values():
            flow.counts["tokens in, about"] = round(flow.characters_in * ratio)
            flow.counts["tokens out, about"] = round(flow.characters_out * ratio)


def _noted(accounts: Accounts) -> set[int]:
    """Documents that examples of copies point to."""
    notes = (
        example.get("note", "")
        for flow in accounts.flows.values()
        for drop in flow.drops.values()
        for example in drop.examples
    )
    return {int(note) for note in notes if note.isdigit()}


def _clusters(run: Run, also: set[int]) -> tuple[list[dict[str, Any]], dict[int, dict[str, str]]]:
    """The largest groups of near copies; place and beginning of whatever must be named."""
    with np.load(run.directory / COPIES) as file:
        copies, of = file["document"][file["near"]], file["of"][file["near"]]
    kept, sizes = np.unique(of, return_counts=True)
    largest = kept[np.argsort(-sizes, kind="stable")][:CLUSTERS].tolist()
    members = {number: copies[of == number].tolist() for number in largest}
    shown = {copy for group in members.values() for copy in group[:MEMBERS]}
    places = _look_up(run, also | set(largest) | shown)
    clusters = [
        {
            "kept": places[number],
            "size": len(group) + 1,
            "copies": [places[copy] for copy in group[:MEMBERS]],
        }
        for number, group in members.items()
    ]
    return clusters, places


def _look_up(run: Run, numbers: set[int]) -> dict[int, dict[str, str]]:
    """Place and beginning of some documents."""
    found: dict[int, dict[str, str]] = {}
    for index in sorted({number >> ROW_BITS for number in numbers}):
        path = run.work[index].path("clean")
        for documents, table in numbered(path, index, ["place", "text"]):
            for place, number in enumerate(documents.tolist()):
                if number in numbers:
                    text = table["text"][place].as_py()[:SHOWN]
                    found[number] = {"place": table["place"][place].as_py(), "text": text}
    return found
