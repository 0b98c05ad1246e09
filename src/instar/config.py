"""How instar is told what to do: frozen records, from YAML, overridden by the command line."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from instar.errors import UserError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A record that is checked when it is built and cannot change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str) -> Self:
        """Build the record from plain values.

        Args:
            values: Field names to values, nested like the record.
            origin: Where the values come from, for error messages.

        Raises:
            UserError: A field is unknown, missing or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _readable(error, origin) from None


def _readable(error: ValidationError, origin: str) -> UserError:
    """The first mistake in one sentence, and how many more there are."""
    first, *more = error.errors()
    name = ".".join(str(part) for part in first["loc"]) or "the record"
    rest = f" ({len(more)} more mistakes after it)" if more else ""
    if first["type"] == "extra_forbidden":
        return UserError(f"{origin}: unknown key `{name}`{rest}", "Check its spelling; see --help.")
    if first["type"] == "missing":
        return UserError(f"{origin}: `{name}` is missing{rest}", "Add it; --help says what it is.")
    message = first["msg"].removeprefix("Value error, ")
    # Where parts of a record contradict each other, the message names them better than a dump.
    whole = isinstance(first["input"], (dict, BaseModel))
    value = "" if whole else f" is {first['input']!r}"
    return UserError(f"{origin}: `{name}`{value}{rest}: {message}", "Change the value.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: The file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", "Check the path; recipes/ holds ours.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory", "Name the YAML file inside it.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start})", "Save the file as UTF-8."
        ) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{path}{where} is not YAML: {problem}", "Mend that line.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold `key: value` lines", "See recipes/ for examples.")
    return values


def read_config(cls: type[C], path: Path) -> C:
    """A record of class ``cls`` from a YAML file; raises ``UserError`` as ``parse`` does."""
    return cls.parse(read_yaml(path), str(path))


def override(config: C, args: list[str], prog: str, description: str) -> C:
    """Let command-line options change single fields: ``--optimizer.lr 3e-4``.

    Raises:
        UserError: An option's value is out of range.
        SystemExit: ``--help``, or an option that does not exist (explained by tyro).
    """
    import tyro

    if not args:
        return config

    def parsed(quiet: bool) -> C:
        return tyro.cli(
            type(config),
            args=args,
            default=config,
            prog=prog,
            description=description,
            console_outputs=not quiet,
            # A part that may be null is overridden like any other where it is not.
            config=(tyro.conf.AvoidSubcommands,),
        )

    try:
        # tyro prints pydantic's error as a page of its own; ours is one line.
        with contextlib.redirect_stderr(io.StringIO()):
            changed = parsed(quiet=True)
    except SystemExit as end:
        cause = end.__context__
        while cause and not isinstance(cause, ValidationError):
            cause = cause.__context__
        if cause:
            raise _readable(cause, "command line") from None
        changed = parsed(quiet=False)  # shows the help, or the option that is not known
    # tyro builds nested records by field; validate the whole once more, cross-checks included.
    return type(config).parse(changed.model_dump(), "command line")


def stdout_is_terminal() -> bool:
    """Whether a person is looking: colours and live displays are for people only."""
    return sys.stdout.isatty()
