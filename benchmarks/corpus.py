"""How fast raw files become a deduplicated corpus, start-up and every file read and written.

    python benchmarks/corpus.py --data DIR

DIR holds `tang/*.json`, `wikitext-2/*.txt`, `tinyshakespeare.txt` and `c4_demo.jsonl`. Two things
are timed, as commands in a process of their own: near-duplicate removal alone on the Tang poems,
and all steps on all of it (recipe `books`, without the tokenizer). What a step
costs by itself is measured by `benchmarks/clean.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from instar.files import read_json
from instar.lineage import LINEAGE

PHASES = ("clean", "sign", "copies", "lines", "documents")

NEAR_ONLY = """\
steps: {repair: null, language: null, personal: null, quality: null, contamination: null}
lines: null
tokenizer: null
"""

ALL_STEPS = """\
steps: {quality: {preset: books}}
tokenizer: null
"""


def run(recipe: str, inputs: list[Path], out: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a whole command, and of each phase in it."""
    named = [argument for path in inputs for argument in ("--input", str(path))]
    command = [sys.executable, "-m", "instar", "data", "prepare", recipe, "--out", str(out), *named]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    spent = time.perf_counter() - began
    lineage = read_json(out / LINEAGE)
    return spent, {phase: lineage[phase] for phase in PHASES}


def main() -> None:
    """Time both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    data: Path = arguments.data
    poems = [data / "tang"]
    everything = [*poems, data / "wikitext-2", data / "tinyshakespeare.txt", data / "c4_demo.jsonl"]
    table = Table("what", "MB", "seconds, median", "from", "to", "MB/s", *PHASES)
    with tempfile.TemporaryDirectory() as place:
        recipes = []
        for name, text in (("near.yaml", NEAR_ONLY), ("all.yaml", ALL_STEPS)):
            (Path(place) / name).write_text(text, encoding="utf-8")
            recipes.append(str(Path(place) / name))
        cases = [
            ("near copies of poems", recipes[0], poems),
            ("all steps", recipes[1], everything),
        ]
        rounds = [
            [run(recipe, inputs, Path(place) / f"{turn} {name}") for name, recipe, inputs in cases]
            for turn in range(arguments.rounds)
        ]
        for case, (name, _, inputs) in enumerate(cases):
            spent = sorted(turn[case][0] for turn in rounds)
            files = [f for path in inputs for f in ([path] if path.is_file() else path.rglob("*"))]
            size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
            phases = [median(turn[case][1][phase] for turn in rounds) for phase in PHASES]
            figures = [median(spent), spent[0], spent[-1], size / median(spent), *phases]
            table.add_row(name, f"{size:.1f}", *(f"{figure:.2f}" for figure in figures))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
