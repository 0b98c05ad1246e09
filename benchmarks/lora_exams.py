"""What LoRA learns beside full fine-tuning: the mini life's SFT both ways, and the same exams.

instar grow mini --until sft
python benchmarks/lora_exams.py --run runs/mini                       # ReLoRA, two hours
python benchmarks/lora_exams.py --run runs/mini --recipe sft_lora     # one LoRA, 20 minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from instar.config import read_yaml
from instar.evaluation.examine import RESULT, ExamConfig, Examiner
from instar.files import read_json
from instar.lineage import LINEAGE
from instar.recipes import find
from instar.stages.registry import STAGES
from instar.training.display import Display


def main() -> None:
    """Train, ask, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--recipe", choices=["sft_relora", "sft_lora"], default="sft_relora")
    arguments = parser.parse_args()
    directories = {}
    with Display() as display:
        for name in ("sft", arguments.recipe):
            values = read_yaml(find("mini") / f"{name}.yaml") | {"run": str(arguments.run)}
            config = STAGES["sft"].config.parse(values, name)
            directories[name] = STAGES["sft"].run(config, display)
            exams = Examiner(ExamConfig(max_new_tokens=72), arguments.run, display)
            exams.examine(directories[name], None, None)
    report(directories["sft"], directories[arguments.recipe])


def report(full: Path, adapted: Path) -> None:
    """Every exam of both, and what was trained."""
    whole, few = (read_json(directory / RESULT)["exams"] for directory in (full, adapted))
    table = Table("exam", "all weights", adapted.name, "points")
    for name, exam in whole.items():
        if not name.startswith("bits"):
            before, after = 100 * exam["score"], 100 * few[name]["score"]
            table.add_row(name, f"{before:.1f}%", f"{after:.1f}%", f"{after - before:+.1f}")
    console = Console()
    console.print(table)
    lineage = read_json(adapted / LINEAGE)
    learnt, everything = lineage["trained_parameters"], lineage["parameters"]
    seconds = [read_json(directory / LINEAGE)["cost"]["wall_s"] for directory in (full, adapted)]
    console.print(
        f"learnt at a time: {learnt} of {everything} parameters, {learnt / everything:.2%}"
    )
    console.print(f"seconds: all weights {seconds[0]:.0f}, {adapted.name} {seconds[1]:.0f}")


if __name__ == "__main__":
    main()
