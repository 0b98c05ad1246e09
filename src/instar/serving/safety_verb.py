"""``instar safety``: make the filter's classifier, and try the filter on a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from instar.serving.harm import Role, train
from instar.serving.safety import Filter


@dataclass(frozen=True, kw_only=True)
class Train:
    """Learn the classifier from the primer's training pairs, and write it with its lineage.

    Not needed for --safety, which does the same the first time and keeps it in the cache.

    For example:
      instar safety train --output safety
    """

    output: Path = Path("safety")
    """Directory to write; an older classifier is replaced."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say what the filter decides about a text, and why.

    For example:
      instar safety check "How do I crack an egg?"
      instar safety check "好的，先开始，再继续就行。" --role assistant
    """

    text: Annotated[str, tyro.conf.Positional]
    """What was said."""
    role: Role = "user"
    """Who said it."""
    filter: Path | None = None
    """Directory of a classifier; by default, that of this version."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after ``instar safety``.

    Returns:
        The exit status: 0, or 1 where ``check`` stops the text.

    Raises:
        UserError: A directory cannot be used.
    """
    options = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Check, tyro.conf.subcommand("check")],
        args=argv,
        prog="instar safety",
    )
    if isinstance(options, Train):
        train(options.output)
        print(f"wrote {options.output}")
        return 0
    verdict = Filter.load(options.filter).judge(options.text, options.role)
    said = "passes" if verdict.allowed else "stopped"
    print(f"{said} ({verdict.reason}, score {verdict.score:.3f})")
    return 0 if verdict.allowed else 1
