"""Help as it reads: sentences flow, wherever a docstring has its line ends in the source.

tyro shows the docstrings of settings, and joins the lines of none that spans several; those of
verbs it joins, and leaves to the terminal, which breaks them anywhere.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

WIDEST = 100
"""Columns of a line of text, where the terminal has more."""

FLOWING = ConstructorRegistry()
"""While it is entered, tyro's help flows."""

SEEN = object()
"""Marks a type that is asked about again, for what tyro itself makes of it."""

LINE_END = re.compile(r"(?<=\S)[ ]*\n(?=\S)")
"""A single one; an empty line parts paragraphs, and a line that is set in stays by itself."""


def flowing(text: str) -> str:
    """A text with each paragraph on one line."""
    return LINE_END.sub(" ", text)


@contextlib.contextmanager
def laid_out(arguments: Sequence[str]) -> Iterator[None]:
    """While help is printed, lines are broken between words."""
    if {"-h", "--help"} & set(arguments):
        with contextlib.redirect_stdout(_Filled(sys.stdout)):  # type: ignore[type-var]
            yield
    else:
        yield


class _Filled:
    """A stream whose lines fit the terminal; what is set in, or in a box, is as it should be."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what is printed."""
        width = min(shutil.get_terminal_size().columns, WIDEST)
        fit = (
            textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
            if len(line) > width and line[0].isalnum()
            else line
            for line in text.split("\n")
        )
        return self._stream.write("\n".join(fit))


@FLOWING.struct_rule
def _flowing(info: StructTypeInfo) -> StructConstructorSpec | None:
    """What tyro makes of a record, with help that flows."""
    if SEEN in info.markers:
        return None
    asked = replace(info, markers=(*info.markers, SEEN))
    spec = ConstructorRegistry.get_struct_spec(asked)
    if not isinstance(spec, StructConstructorSpec):
        return None
    return replace(spec, fields=tuple(map(_explained, spec.fields)))


def _explained(field: StructFieldSpec) -> StructFieldSpec:
    text = field.helptext
    if text is None:
        return field
    # tyro looks for some texts only when they are to be shown.
    later = (lambda: flowing(text() or "")) if callable(text) else flowing(text)
    return replace(field, helptext=later)
