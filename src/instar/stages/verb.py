"""Every stage is a verb: `instar pretrain recipes/mini/pretrain.yaml --training.steps 500`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

from instar.adapters.methods import Method
from instar.config import override, read_yaml
from instar.distributed import launched
from instar.errors import UserError
from instar.recipes import find
from instar.stages.config import StageConfig, TrainedStageConfig
from instar.stages.registry import STAGES
from instar.training.display import Display
from instar.training.loop import TrainingConfig

ADAPTERS = [method.model_fields["method"].default for method in get_args(get_args(Method)[0])]
"""What `--adapter` may be besides `none`."""


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
    config = read(name, Path(argv[0]), argv[1:], f"instar {name} FILE.yaml")
    with launched(), Display() as display:
        out = stage.run(config, display)
        display.note(f"{name}: wrote {out}")
    return 0


def read(name: str, path: Path, options: list[str], prog: str) -> StageConfig:
    """A stage's config from its file, and what the command line changes of it.

    Args:
        name: The stage.
        path: Its YAML file.
        options: Such as ``--optimizer.lr 3e-4``; ``--help`` explains all of them.
        prog: What to call the command in that help.

    Raises:
        UserError: As ``read_yaml`` and ``override`` do.
    """
    cls = STAGES[name].config
    # As `grow` does: a recipe's stages live in a directory of that recipe's name.
    values = {"run": f"runs/{path.resolve().parent.name}"} | read_yaml(path)
    description = f"{inspect.getdoc(cls)}\n\nDefaults below are those of {path}."
    if issubclass(cls, TrainedStageConfig):
        description += (
            " `--training.` may be left out: --optimizer.lr 3e-4. `--adapter METHOD` "
            f"({', '.join(ADAPTERS)}, none) adds an adapter; with it, --help lists its settings."
        )
    options = [_whole(option, cls) for option in options]
    values |= _methods(options)
    return override(cls.parse(values, str(path)), options, prog, description)


def _methods(options: list[str]) -> dict[str, Any]:
    """Settings that `--adapter lora` stands for; taken out of the options, or its own would fail.

    A method begins with its defaults, whatever the file holds; `--adapter none` is no adapter.
    """
    for place, option in enumerate(options):
        name, _, value = option.partition("=")
        if name == "--adapter" and (value or options[place + 1 :]):
            value = value or options.pop(place + 1)
            del options[place]
            return {"adapter": None if value.lower() == "none" else {"method": value}}
    return {}


def _whole(option: str, config: type[StageConfig]) -> str:
    """An option's whole name: `--optimizer.lr` stands for `--training.optimizer.lr`."""
    name = re.split(r"[.=]", option.removeprefix("--"))[0].replace("-", "_")
    of_training = name in TrainingConfig.model_fields and name not in config.model_fields
    return f"--training.{option[2:]}" if option.startswith("--") and of_training else option
