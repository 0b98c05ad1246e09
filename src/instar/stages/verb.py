"""Every stage is a verb: `instar pretrain recipes/mini/pretrain.yaml --training.steps 500`."""

from __future__ import annotations

from pathlib import Path

from instar.config import override, read_config
from instar.errors import UserError
from instar.recipes import CHECKOUT, PACKAGED
from instar.stages.registry import STAGES
from instar.training.display import Display


def main(name: str, argv: list[str]) -> int:
    """Run one stage.

    Args:
        name: Which.
        argv: A YAML file and options, or ``--help``.
    """
    stage = STAGES[name]
    default = (CHECKOUT if CHECKOUT.is_dir() else PACKAGED) / "mini" / f"{name}.yaml"
    asks_help = bool({"-h", "--help"} & set(argv))
    if not argv or argv[0].startswith("-"):
        if not asks_help:
            raise UserError(f"`instar {name}` needs a YAML file first", f"For example: {default}")
        argv = [str(default), *argv]
    config = read_config(stage.config, Path(argv[0]))
    description = f"{stage.config.__doc__}\n\nDefaults below are those of {argv[0]}."
    config = override(config, argv[1:], f"instar {name} FILE.yaml", description)
    with Display() as display:
        out = stage.run(config, display)
        display.note(f"{name}: wrote {out}")
    return 0
