"""A corpus from raw text: all phases in order, each finished partition kept.

    inputs -> clean -> sign -> copies -> repeated lines -> documents -> tokenizer -> shards

A phase is either a function of one partition, which leaves a file, or a comparison of all numbers
that partitions left. So the work can be stopped at any moment, and its result does not depend on
who did what, or when.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from instar.corpus.accounts import MANIFEST, total
from instar.corpus.clean import clean, hash_of
from instar.corpus.config import CorpusConfig
from instar.corpus.duplicates import exact_copies, near_copies, sign
from instar.corpus.manifest import write_manifest
from instar.corpus.mixing import arrange, epochs_of
from instar.corpus.repeated import FILE as REPEATED
from instar.corpus.repeated import Repeated
from instar.corpus.run import WORK, Run, check_place, surveyed
from instar.corpus.workers import Workers
from instar.corpus.write import COPIES, Shard, save_copies, write_documents, write_tokens
from instar.data.readers import read_records
from instar.errors import UserError
from instar.files import atomic_directory, atomic_file, read_json, write_json
from instar.lineage import (
    Cost,
    Stopwatch,
    peak_rss_bytes,
    write_lineage,
)
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.learning import learn_tokenizer
from instar.training.display import Display

MAX_LENGTH = 4096
"""What a new tokenizer notes as the longest input; only other tools read it."""


def prepare(config: CorpusConfig, out: Path, workers: Workers, display: Display) -> bool:
    """Make a corpus: ``documents/``, ``shards/``, ``tokenizer/`` and ``manifest.json`` in ``out``.

    Args:
        config: The recipe.
        out: Created if absent; what an unfinished run of the same recipe left is used.
        workers: Who does the work.
        display: Shows how far it is.

    Returns:
        Whether there was something to do.

    Raises:
        UserError: Something cannot be read, nothing is left, or ``out`` holds something else.
    """
    watch = Stopwatch()
    check_place(config, out)
    run = surveyed(config, out, display)
    done = out / MANIFEST
    if done.exists() and read_json(done)["fingerprint"] == run.fingerprint:
        shutil.rmtree(out / WORK, ignore_errors=True)  # killed while it was tidying up
        return False
    _forget_others(run)
    phases: list[tuple[str, str, Callable[[], None]]] = [
        ("clean", "reading and cleaning", lambda: workers.run(clean, run.work, display.step)),
        ("sign", "signing documents", lambda: workers.run(sign, run.work, display.step)),
        ("copies", "comparing documents", lambda: _find_copies(run, display)),
        ("lines", "counting lines", lambda: _count_lines(run)),
        ("documents", "writing text", lambda: workers.run(write_documents, run.work, display.step)),
        ("checks", "checking that something is left", lambda: _check_not_empty(run)),
    ]
    if config.tokenizer:
        phases += [
            ("tokenizer", "learning tokens", lambda: _tokenizer(run, display)),
            ("shards", "cutting text into tokens", lambda: _shards(run, workers, display)),
        ]
    for name, what, phase in phases:
        began = time.perf_counter()
        display.stage(name, what)
        phase()
        run.seconds[name] = time.perf_counter() - began
    done.unlink(missing_ok=True)  # another recipe's; what it speaks of goes now
    _publish(run)
    cost = Cost(watch.wall_s, watch.cpu_s, peak_rss_bytes=peak_rss_bytes())
    write_lineage(out, {"stage": "corpus", "fingerprint": run.fingerprint, **run.seconds}, cost)
    write_manifest(run)  # last: it says that all is there
    shutil.rmtree(out / WORK)
    return True


def _forget_others(run: Run) -> None:
    """Remove what unfinished runs of other recipes or inputs left here, but for what still holds.

    So whoever mends one file of many, or has bad ones skipped, does not wait for the others again.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    for other in (run.out / WORK).glob("*"):
        if other != run.directory:
            for work in run.work:
                work.take_over(other)
            shutil.rmtree(other)


def _count_lines(run: Run) -> None:
    if run.config.lines and not (run.directory / REPEATED).exists():
        files = [work.path("lines") for work in run.work]
        with np.load(run.directory / COPIES) as copies:
            gone = copies["document"]
        repeated = Repeated.count(files, run.config.lines, gone)
        with atomic_file(run.directory / REPEATED) as beside, beside.open("wb") as stream:
            np.save(stream, repeated)


def _find_copies(run: Run, display: Display) -> None:
    if (run.directory / COPIES).exists():
        return
    config, count = run.config, len(run.work)
    exact = exact_copies(run.directory, count) if config.exact else {}
    near = (
        near_copies(run.directory, count, config.near, exact, display.step) if config.near else {}
    )
    save_copies(run.directory, exact, near)


def _check_not_empty(run: Run) -> None:
    """Raise ``UserError`` if no document is left, and say what took them."""
    totals = [record["totals"] for record in run.records("documents")]
    if any(part.get("documents") for parts in totals for part in parts.values()):
        return
    drops: Counter[str] = Counter()
    for phase in ("clean", "documents"):
        for flow in total(run.records(phase)).flows.values():
            drops.update({rule: drop.documents for rule, drop in flow.drops.items()})
    most = ", ".join(f"{rule!r} {count:,}" for rule, count in drops.most_common(3))
    raise UserError(
        "no document is left" + (f"; dropped most by: {most}" if most else ""),
        "Loosen that rule in the recipe, or look at what the inputs hold.",
    )


def _tokenizer(run: Run, display: Display) -> None:
    """Take the tokenizer that is named, or train one on a share of every source."""
    directory, config = run.directory / "tokenizer", run.config.tokenizer
    assert config is not None
    if directory.exists():
        return
    if config.path:
        with atomic_directory(directory) as beside:
            Tokenizer.load(config.path).save(beside)
        return
    size = sum(record["totals"]["train"].get("bytes", 0) for record in run.records("documents"))
    if not size:
        raise UserError("no document is left to learn tokens from", "Lower `valid_share`.")
    share = config.train_mb * 1e6 / size

    def texts() -> Iterator[str]:
        for work in run.work:
            for record in read_records(work.path("documents", ".train.jsonl")):
                if hash_of(record["text"] + "\0tokenizer") < share * 2**64:
                    yield record["text"]

    with atomic_directory(directory) as beside:
        learn_tokenizer(
            beside, texts(), "bpe", config.vocab_size, MAX_LENGTH, display.step, display.note
        )


def _shards(run: Run, workers: Workers, display: Display) -> None:
    sizes: Counter[str] = Counter()
    for work, record in zip(run.work, run.records("documents"), strict=True):
        source = run.config.inputs[work.partition.source].called()
        sizes[source] += record["totals"]["train"].get("bytes", 0)
    epochs = epochs_of(sizes, run.config.inputs, run.config.mix)
    write_json(run.directory / "epochs.json", epochs)
    is_sorted = run.config.order != "as_read"
    if is_sorted:
        arrange(run.directory, len(run.work))
    shards = [Shard(work, run.directory / "tokenizer", epochs, is_sorted) for work in run.work]
    workers.run(write_tokens, shards, display.step)


def _publish(run: Run) -> None:
    """Put what was made in its place, under names that sort in order; nothing older stays."""
    names = {
        "documents": lambda path: f"{path.suffixes[0][1:]}-{path.name.split('.')[0]}.jsonl",
        "shards": lambda path: f"{path.name[:5]}-{path.parent.name}-{path.name[6:]}",
        "tokenizer": lambda path: path.name,
    }
    patterns = {"documents": "*.jsonl", "shards": "*/*.npy", "tokenizer": "*"}
    for name, called in names.items():
        made = sorted((run.directory / name).glob(patterns[name]))
        if made:
            with atomic_directory(run.out / name) as directory:
                for path in made:
                    _put(path, directory / called(path))
        else:
            shutil.rmtree(run.out / name, ignore_errors=True)


def _put(path: Path, target: Path) -> None:
    """The file under another name as well, without a copy where the disk can do that."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
