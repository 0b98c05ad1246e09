"""``instar data report``: the accounts of a prepared corpus as one self-contained page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from instar.corpus.accounts import EXAMPLES, MANIFEST, SHOWN
from instar.errors import UserError
from instar.files import read_json, write_text
from instar.lineage import LINEAGE
from instar.report.differences import compare
from instar.report.drawn import Step, histogram, percent, shorten, waterfall
from instar.report.fertility import LONGEST, SHORTEST_BYTES, measure
from instar.report.templates import as_yaml, size, template
from instar.tokenizer.hf import Tokenizer

PAGE = "report.html"

Record = dict[str, Any]

FILES = 200
"""So many files of an input are named; the manifest names them all."""

LANGUAGES = 7
"""So many languages have a colour of their own."""

PHASES = {
    "clean": "reading and cleaning",
    "sign": "signing documents",
    "copies": "comparing documents",
    "lines": "counting lines",
    "documents": "writing text",
    "tokenizer": "learning tokens",
    "shards": "cutting into tokens",
}
"""What the phases of ``instar data prepare`` do; the lineage has their seconds."""

ESTIMATES = ("tokens in, about", "tokens out, about")
"""What the accounts count beside each step, and the table of steps shows."""


def report(directory: Annotated[Path, tyro.conf.Positional]) -> None:
    """Draw the accounts of a corpus: what came in, what was dropped and why, what was kept.

    Writes DIRECTORY/report.html, which needs nothing but itself.

    Args:
        directory: What `instar data prepare` wrote.
    """
    print(write_page(directory))


def write_page(directory: Path) -> Path:
    """Write ``report.html`` into a corpus' directory.

    Args:
        directory: Holds ``manifest.json``; where ``lineage.json``, ``documents/`` or
            ``tokenizer/`` is missing, so is what the page says of it.

    Returns:
        Path of the page.

    Raises:
        UserError: There is no manifest, or it is not one of a corpus.
    """
    path, remedy = directory / MANIFEST, "Give the directory that `instar data prepare` wrote."
    if not path.exists():
        raise UserError(f"{directory} holds no finished corpus (no {MANIFEST})", remedy)
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not manifest.get("flows"):
        raise UserError(f"{path} has no accounts of a corpus", remedy)
    lineage = read_json(directory / LINEAGE) if (directory / LINEAGE).exists() else {}
    tokenizer = directory / "tokenizer"
    fertility = (
        measure(directory / "documents", Tokenizer.load(tokenizer)) if tokenizer.exists() else None
    )
    page = directory / PAGE
    write_text(page, render(directory.resolve().name, manifest, lineage, fertility))
    return page


def render(name: str, manifest: Record, lineage: Record, fertility: Any = None) -> str:
    """The page.

    Args:
        name: What the corpus is called.
        manifest: Its accounts.
        lineage: Its cost, and seconds by phase; may be empty.
        fertility: What ``fertility.measure`` found, or None.
    """
    flows: dict[str, Record] = manifest["flows"]
    split, shards = manifest.get("split", {}), manifest.get("shards", {})
    phases = {phase: time for phase, time in lineage.items() if isinstance(time, float)}
    return template("corpus.html.jinja").render(
        name=name,
        manifest=manifest,
        summary=summary(manifest),
        parts={part: _part(part, split, shards) for part in split},
        survival=_survival(flows),
        phases=phases,
        cost=lineage.get("cost", {}),
        environment=lineage.get("environment", {}),
        drawings=_drawings(flows),
        has_tokens=any(ESTIMATES[0] in flow["counts"] for flow in flows.values()),
        counted=counted(flows),
        lengths=_histograms(manifest.get("lengths", {})),
        languages=_languages(manifest.get("languages", {})),
        sources=sources(manifest),
        clusters=[_cluster(cluster) for cluster in manifest.get("clusters", [])],
        fertility=fertility,
        recipe=as_yaml(manifest.get("recipe", {})),
        limits={"examples": EXAMPLES, "shown": SHOWN, "files": FILES},
        sample={"shortest": SHORTEST_BYTES, "longest": LONGEST},
        estimates=ESTIMATES,
        phase_names=PHASES,
        shorten=shorten,
        percent=percent,
    )


def summary(manifest: Record) -> str:
    """The corpus in a few sentences of numbers."""
    survival = _survival(manifest["flows"])
    files = sum(len(source["files"]) for source in manifest.get("inputs", []))
    read = sum(file["bytes"] for source in manifest.get("inputs", []) for file in source["files"])
    sentences = [
        f"{_counted(survival['documents_in'], 'document')} came from {_counted(files, 'file')} "
        f"({size(read)}), and {survival['documents_out']:,} of them "
        f"({percent(survival['documents_out'], survival['documents_in'])}) were kept, with "
        f"{percent(survival['characters_out'], survival['characters_in'])} of the characters."
    ]
    drops = Counter[str]()
    for flow in manifest["flows"].values():
        drops.update({rule: drop["documents"] for rule, drop in flow["drops"].items()})
    if drops:
        most = ", ".join(f"{rule} {count:,}" for rule, count in drops.most_common(3))
        sentences.append(f"The rules that dropped most: {most}.")
    faults = manifest.get("faults", {}).get("documents", 0)
    if faults:
        sentences.append(f"{_counted(faults, 'file or record')} could not be read.")
    return " ".join(sentences)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _survival(flows: Mapping[str, Record]) -> dict[str, int]:
    """What came into the first step, and what went out of the last."""
    first, *_, last = [*flows.values()] * 2  # twice, for there may be one step only
    units = ("documents", "characters")
    return {f"{unit}_in": first[f"{unit}_in"] for unit in units} | {
        f"{unit}_out": last[f"{unit}_out"] for unit in units
    }


def _part(part: str, split: Record, shards: Record) -> Record:
    """What train or valid holds: as text, and cut into tokens after mixing."""
    counts = shards.get(part, {}).values()
    return {
        **{key: split[part].get(key, 0) for key in ("documents", "characters", "bytes")},
        "tokens": sum(of_source["tokens"] for of_source in counts),
        "repeats": sum(of_source["repeats"] for of_source in counts),
    }


def _drawings(flows: Mapping[str, Record]) -> dict[str, Any]:
    """The flow of documents, and that of characters, where edits take some as well."""
    documents = [
        Step(
            name,
            flow["documents_in"],
            flow["documents_out"],
            {rule: drop["documents"] for rule, drop in flow["drops"].items()},
        )
        for name, flow in flows.items()
    ]
    characters = []
    for name, flow in flows.items():
        lost = {rule: drop["characters"] for rule, drop in flow["drops"].items()}
        lost |= {"edits": flow["edited"]} if flow["edited"] > 0 else {}
        ranked = dict(sorted(lost.items(), key=lambda item: -item[1]))
        went = flow["characters_out"]
        characters.append(
            Step(name, flow["characters_in"], went, {k: v for k, v in ranked.items() if v})
        )
    return {
        "documents": waterfall(documents, "documents"),
        "characters": waterfall(characters, "characters"),
    }


def counted(flows: Mapping[str, Record]) -> dict[str, dict[str, int]]:
    """What steps counted beside documents and characters, such as what they masked."""
    found = {
        name: {kind: count for kind, count in flow["counts"].items() if kind not in ESTIMATES}
        for name, flow in flows.items()
    }
    return {name: counts for name, counts in found.items() if counts}


def _histograms(lengths: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Lengths by source, all on one axis."""
    bits = [int(length) for counts in lengths.values() for length in counts]
    if not bits:
        return {}
    span = range(min(bits), max(bits) + 1)
    return {
        source: histogram(
            {int(length): count for length, count in counts.items()},
            span,
            f"lengths of the {sum(counts.values()):,} documents of {source}",
        )
        for source, counts in lengths.items()
    }


def _languages(languages: Mapping[str, Mapping[str, list[int]]]) -> Record:
    """Shares of languages by source, those with most characters each with a colour."""
    totals = Counter[str]()
    for shares in languages.values():
        totals.update({language: characters for language, (_, characters) in shares.items()})
    known = [language for language, _ in totals.most_common(LANGUAGES)]
    rows: Record = {}
    for source, shares in languages.items():
        held = {name: shares[name] for name in known if name in shares}
        others = [share for name, share in shares.items() if name not in known]
        if others:
            held["others"] = [sum(column) for column in zip(*others, strict=True)]
        wholes = [sum(column) for column in zip(*held.values(), strict=True)]
        rows[source] = [
            [
                (name, known.index(name) if name in known else LANGUAGES, share[unit], whole)
                for name, share in held.items()
                if whole
            ]
            for unit, whole in enumerate(wholes)
        ]
    return {"rows": rows, "totals": totals, "identified": any(totals)}


def sources(manifest: Record) -> list[Record]:
    """Each input: what it had, what is left of it, and how much of it is learnt."""
    trained = manifest.get("shards", {}).get("train", {})
    tokens = sum(counts["tokens"] for counts in trained.values())
    configs = manifest.get("recipe", {}).get("inputs", [])
    weights = [config.get("weight", 1.0) for config in configs]
    rows = []
    for index, source in enumerate(manifest.get("inputs", [])):
        name = source["name"]
        kept = list(manifest.get("languages", {}).get(name, {}).values())
        mine = trained.get(name, {})
        rows.append(
            {
                **source,
                "bytes": sum(file["bytes"] for file in source["files"]),
                "documents": sum(documents for documents, _ in kept),
                "characters": sum(characters for _, characters in kept),
                "weight": weights[index] if index < len(weights) else 1.0,
                "epochs": manifest.get("epochs", {}).get(name),
                "tokens": mine.get("tokens", 0),
                "repeats": mine.get("repeats", 0),
                "share": mine.get("tokens", 0) / tokens if tokens else None,
            }
        )
    return rows


def _cluster(cluster: Record) -> Record:
    """A group of near copies, what differs marked."""
    copies = cluster["copies"]
    kept, marked = compare(cluster["kept"]["text"], [copy["text"] for copy in copies])
    alike = not any(flag for pieces in (kept, *marked) for _, flag in pieces)
    return {
        "size": cluster["size"],
        "left": cluster["size"] - 1 - len(copies),
        "begins": " ".join(cluster["kept"]["text"].split()),
        "alike": alike,
        "members": [
            {"place": member["place"], "pieces": pieces, "cut": len(member["text"]) >= SHOWN}
            for member, pieces in zip([cluster["kept"], *copies], [kept, *marked], strict=True)
        ],
    }
