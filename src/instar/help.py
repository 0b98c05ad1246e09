"""Help as it reads: sentences flow, wherever a docstring has its line ends in the source.

tyro shows the docstrings of settings, and joins the lines of none that spans several.
"""

from __future__ import annotations

import re
from dataclasses import replace

from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

FLOWING = ConstructorRegistry()
"""While it is entered, tyro's help flows."""

SEEN = object()
"""Marks a type that is asked about again, for what tyro itself makes of it."""

LINE_END = re.compile(r"(?<=\S)[ ]*\n(?=\S)")
"""A single one; an empty line parts paragraphs, and a line that is set in stays by itself."""


def flowing(text: str) -> str:
    """A text with each paragraph on one line."""
    return LINE_END.sub(" ", text)


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
