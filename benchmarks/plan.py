"""What ``instar plan`` foresees beside what a life then takes: time and memory of every stage.

The first plan is made before there is any data, as a user would ask for it. A shared machine is
faster at one time than at another, so a second plan is made afterwards, and the time foreseen is
the mean of both; the memory is the first one's. With ``--share 0.2`` every stage has a fifth of its
steps, in the plan and in the life alike: its batches, and so its memory, are those of the whole
recipe.

    python benchmarks/plan.py --share 0.2
    python benchmarks/plan.py --recipe smoke
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from instar.config import read_yaml
from instar.files import read_json
from instar.lineage import LINEAGE
from instar.recipes import find

INSTAR = [sys.executable, "-m", "instar"]


def main() -> None:
    """Plan, live, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of each stage")
    parser.add_argument("--out", type=Path, help="directory of the life; a new one by default")
    arguments = parser.parse_args()
    if arguments.out and arguments.out.exists():
        parser.error(f"{arguments.out} exists: a life that was begun costs less")
    with tempfile.TemporaryDirectory() as scratch:
        recipe, out = Path(scratch) / "recipe", arguments.out or Path(scratch) / "life"
        shorten(find(arguments.recipe), recipe, arguments.share)
        told = [str(recipe), "--out", str(out)]
        before = planned([str(recipe), "--out", str(Path(scratch) / "nothing")])
        subprocess.run([*INSTAR, "grow", *told], check=True)
        report(before, planned(told), out)


def planned(told: list[str]) -> dict[str, Any]:
    """The stages of a plan."""
    made = subprocess.run([*INSTAR, "plan", *told, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(made.stdout)["stages"]


def shorten(recipe: Path, to: Path, share: float) -> None:
    """Copy a recipe with fewer steps."""
    to.mkdir()
    for path in recipe.glob("*.yaml"):
        values = read_yaml(path)
        training = values.get("training", {})
        for name in ("steps", "validate_every"):
            if training.get(name):
                training[name] = max(1, round(share * training[name]))
        (to / path.name).write_text(yaml.safe_dump(values, allow_unicode=True))


def report(before: dict[str, Any], after: dict[str, Any], life: Path) -> None:
    """Foreseen and measured, stage by stage."""
    columns = ("time, foreseen", "measured", "error", "memory, foreseen", "measured", "error")
    table = Table("stage", *columns)
    for name, plan in before.items():
        cost = read_json(life / name / LINEAGE)["cost"]
        held = plan["in_life_memory_bytes"]
        seconds = fmean(each[name]["predictions"]["ddp"]["wall_s"] for each in (before, after))
        table.add_row(
            name,
            f"{seconds:.0f} s",
            f"{cost['wall_s']:.0f} s",
            f"{seconds / cost['wall_s'] - 1:+.0%}",
            f"{held / 2**30:.2f} GiB",
            f"{cost['peak_rss_bytes'] / 2**30:.2f} GiB",
            f"{held / cost['peak_rss_bytes'] - 1:+.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
