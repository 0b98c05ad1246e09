"""A rule or score of one's own, in a module or a file, named in the config."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from instar.corpus.document import Step
from instar.errors import UserError


def load_rule(name: str) -> Step:
    """A step of a user's own, made without arguments.

    Args:
        name: ``module:Class`` or ``path/to/file.py:Class``.

    Raises:
        UserError: There is no such module, file or class, or it is no step.
    """
    found = _named(name, "rules")
    if not (isinstance(found, type) and issubclass(found, Step)):
        raise UserError(
            f"rules: {name} is not a Step",
            "Write `class MyRule(Step)` with Step from instar.corpus.document.",
        )
    if not isinstance(getattr(found, "name", None), str):
        raise UserError(f"rules: {name} has no name", 'Give the class `name = "my rule"`.')
    try:
        return found()
    except TypeError as error:
        raise UserError(
            f"rules: {name} cannot be made ({error})",
            "Give it a `__call__`, and an `__init__` without arguments.",
        ) from None


def load_score(name: str) -> Callable[[str], float]:
    """A function of a text by which a user wants the corpus to be in order.

    Args:
        name: ``module:function`` or ``path/to/file.py:function``.

    Raises:
        UserError: There is no such module, file or function.
    """
    found = _named(name, "score")
    if not callable(found):
        raise UserError(f"score: {name} is not a function", "Give one of a text, with a number.")
    return cast(Callable[[str], float], found)


def _named(name: str, key: str) -> Any:
    """What stands under a name in a module or file, for a key of the config."""
    place, colon, inside = name.rpartition(":")
    if not colon or not place or not inside:
        raise UserError(
            f"{key}: {name!r} names nothing", "Write module:Name or path/to/file.py:Name."
        )
    module = _from_file(Path(place), name) if place.endswith(".py") else _imported(place, name)
    found = getattr(module, inside, None)
    if found is None:
        raise UserError(f"{key}: {place} has no {inside}", "Check its spelling.")
    return found


def _imported(module: str, name: str) -> ModuleType:
    """A module that Python finds by itself."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error})",
            "Install the module, or name its file: path/to/file.py:Class.",
        ) from None


def _from_file(path: Path, name: str) -> ModuleType:
    """A file as a module, known by its path so that two files may have one name."""
    if not path.is_file():
        raise UserError(f"no such file: {path}", "Check the path in the config.")
    known_as = f"instar: {path.resolve()}"
    if known_as in sys.modules:
        return sys.modules[known_as]
    spec = importlib.util.spec_from_file_location(known_as, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known_as] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[known_as]
        raise UserError(
            f"{name} cannot be run ({type(error).__name__}: {error})", "Mend the file."
        ) from error
    return module
