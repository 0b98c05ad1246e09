"""``instar data prepare``: a corpus from raw text, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from instar.config import read_config
from instar.corpus.accounts import MANIFEST
from instar.corpus.config import CorpusConfig
from instar.corpus.inputs import InputConfig
from instar.files import read_json
from instar.recipes import find_corpus
from instar.training.display import Display


def prepare(
    recipe: tyro.conf.Positional[str],
    out: Path,
    input: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    runner: str = "local",
    workers: int | None = None,
    on_error: Annotated[str | None, tyro.conf.arg(metavar="{fail,skip}")] = None,
) -> None:
    """Make a corpus from raw text: clean, filter, deduplicate, decontaminate, mix, tokenize.

    Every document is accounted for in OUT/manifest.json; `instar data report OUT` draws it. The
    text is in OUT/documents, the tokens in OUT/shards, from which `instar pretrain --corpus OUT`
    learns.
    Stopped at any moment, the same command goes on where it was.

    Args:
        recipe: Name of a corpus recipe (web, books, plain), or a YAML file.
        out: Directory of the corpus.
        input: A file, folder, pattern or hub dataset (`NAME:SUBSET`), beside the recipe's own.
        runner: `local`, `ray`, or a cluster's address, `ray://HOST:PORT`.
        workers: Processes on this machine; by default one a core.
        on_error: What an unreadable file or record does, if not as the recipe says.
    """
    from instar.corpus.prepare import prepare as make
    from instar.corpus.workers import Workers

    config = read_config(CorpusConfig, find_corpus(recipe))
    values = config.model_dump() | ({"on_error": on_error} if on_error else {})
    values["inputs"] = [*config.inputs, *(InputConfig(path=path) for path in input)]
    config = CorpusConfig.parse(values, recipe)
    with Display(Console(highlight=False)) as display, Workers(runner, workers) as processes:
        made = make(config, out, processes, display)
        if not made:
            display.note(f"{out}: already made of these inputs by this recipe")
    show(out)


def show(out: Path) -> None:
    """The accounts as a table: what came into each step, what it dropped, what went on."""
    manifest = read_json(out / MANIFEST)
    table = Table("step", "in", "dropped", "out", "characters out", "most dropped by")
    for name, flow in manifest["flows"].items():
        dropped = flow["documents_in"] - flow["documents_out"]
        most = [f"{rule} {d['documents']:,}" for rule, d in list(flow["drops"].items())[:3]]
        table.add_row(
            name,
            f"{flow['documents_in']:,}",
            f"{dropped:,}" if dropped else "",
            f"{flow['documents_out']:,}",
            f"{flow['characters_out']:,}",
            ", ".join(most),
        )
    for column in table.columns[1:5]:
        column.justify = "right"
    console = Console(highlight=False)
    console.print(table)
    if manifest["faults"]["documents"]:
        first = manifest["faults"]["examples"][0]
        count = manifest["faults"]["documents"]
        console.print(f"{count:,} could not be read; first: {first['place']} {first['text']}")
    for part, counts in manifest["split"].items():
        tokens = sum(c["tokens"] for c in manifest["shards"][part].values())
        tokens_text = f", {tokens:,} tokens" if tokens else ""
        console.print(
            f"{part}: {counts.get('documents', 0):,} documents, "
            f"{counts.get('bytes', 0) / 1e6:.1f} MB{tokens_text}"
        )
    console.print(f"accounts: {out / MANIFEST}; drawn: instar data report {out}")
