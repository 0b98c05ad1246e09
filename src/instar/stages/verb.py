"""Every stage is a verb: `instar pretrain recipes/mini/pretrain.yaml --training.steps 500`."""

from __future__ import annotations

import re
from pathlib import Path

from instar.config import override, read_yaml
from instar.distributed import launched
from instar.errors import UserError
from instar.recipes import find
from instar.stages.base import StageConfig
from instar.stages.registry import STAGES
from instar.training.display import Display
from instar.training.loop import TrainingConfig


def main(name: str, argv: list[str]) -> int:
    """Run one stage.

    Args:
        name: Which.
        argv: A YAML file and options, or ``--help``.
    """
    stage = STAGES[name]
    asks_help = bool({"-h", "--help"} & set(argv))
    if not argv or argv[0].startswith("-"):
        default = find("mini") / f"{name}.yaml"
        if not asks_help:
            raise UserError(f"`instar {name}` needs a YAML file first", f"For example: {default}")
        argv = [str(default), *argv]
    path = Path(argv[0])
    # As `grow` does: a recipe's stages live in a directory of that recipe's name.
    values = {"run": f"runs/{path.resolve().parent.name}"} | read_yaml(path)
    config = stage.config.parse(values, str(path))
    description = (
        f"{stage.config.__doc__}\n\nDefaults below are those of {argv[0]}. `--training.` may be "
        "left out: --optimizer.lr 3e-4."
    )
    config = override(
        config,
        [_whole(option, stage.config) for option in argv[1:]],
        f"instar {name} FILE.yaml",
        description,
    )
    with launched(), Display() as display:
        out = stage.run(config, display)
        display.note(f"{name}: wrote {out}")
    return 0


def _whole(option: str, config: type[StageConfig]) -> str:
    """An option's whole name: `--optimizer.lr` stands for `--training.optimizer.lr`."""
    name = re.split(r"[.=]", option.removeprefix("--"))[0].replace("-", "_")
    of_training = name in TrainingConfig.model_fields and name not in config.model_fields
    return f"--training.{option[2:]}" if option.startswith("--") and of_training else option
