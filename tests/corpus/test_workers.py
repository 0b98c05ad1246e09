"""Who does the work must not matter: processes of this machine, or a Ray cluster's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from instar.corpus.workers import Workers
from instar.errors import UserError

SCRIPT = """
import sys
from pathlib import Path

from instar.corpus.config import CorpusConfig
from instar.corpus.prepare import prepare
from instar.corpus.workers import Workers
from instar.training.display import Display

if __name__ == "__main__":
    runner, text, out = sys.argv[1:]
    recipe = {
        "inputs": [{"path": text}],
        "partition_mb": 1,
        "steps": {"quality": None},
        "lines": {"documents": 2},
        "tokenizer": {"vocab_size": 300},
    }
    with Display() as display, Workers(runner, 2) as workers:
        prepare(CorpusConfig.parse(recipe, "test"), Path(out), workers, display)
"""


def failing(piece: int) -> None:
    if piece == 3:
        raise UserError("piece 3 is bad", "Mend it.")


def silent(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_comes_back_whole(count: int) -> None:
    with Workers("local", count) as workers, pytest.raises(UserError) as caught:
        workers.run(failing, list(range(5)), silent)
    assert (caught.value.problem, caught.value.remedy) == ("piece 3 is bad", "Mend it.")


def test_an_unknown_runner_is_named() -> None:
    with pytest.raises(UserError, match="no runner 'spark'"):
        Workers("spark")


@pytest.mark.slow
def test_ray_makes_the_same_corpus(tmp_path: Path) -> None:
    """In processes of their own: Ray and the column engine keep their state for good."""
    lines = [f"The {n}th traveller came to the {n % 97}th inn by night.\n" for n in range(24_000)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines + lines[:2000]), encoding="utf-8")
    script = tmp_path / "make.py"
    script.write_text(SCRIPT, encoding="utf-8")
    for runner in ("local", "ray"):
        command = [sys.executable, str(script), runner, str(text), str(tmp_path / runner)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    made = {
        path.relative_to(tmp_path / "local")
        for path in (tmp_path / "local").rglob("*")
        if path.is_file() and path.name != "lineage.json"
    }
    assert len([path for path in made if path.suffix == ".npy"]) >= 4
    for path in made:
        assert (tmp_path / "ray" / path).read_bytes() == (tmp_path / "local" / path).read_bytes()
