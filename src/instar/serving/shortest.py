"""How long the shortest text is that a JSON Schema accepts, about.

A reply that must be JSON should be closed before its tokens run out. For that it must be known
how much a single step can add to what is still to be written: ``jump``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNSURE = 4
"""Characters of a value about which a schema says nothing, such as ``null``."""

MOST = 1 << 20
"""No value is taken for longer."""

PARTS = ("properties", "$defs", "definitions", "patternProperties")
"""Keywords whose values are schemas by names."""

LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "unevaluatedProperties")

CHOICES = ("anyOf", "oneOf", "enum", "const", "$ref")
"""Keywords beside which `properties` and `items` are not all that decides what must be written."""


def jump(schema: Any) -> int:
    """The most characters that one optional part of a schema obliges to write."""
    lengths = _Lengths(schema)
    return max((lengths.of(part) for part in _optional(schema)), default=UNSURE)


def _optional(schema: Any) -> Iterator[Any]:
    """All schemas within one, and itself, but the objects and lists that must come in any case."""
    waiting = [(schema, True)]
    while waiting:
        part, certain = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        certain = certain and part.get("type") in ("object", "array")
        certain = certain and not any(key in part for key in CHOICES)
        if not certain:
            yield part
        named = part.get("required")
        required = named if certain and isinstance(named, list) else []
        for key in PARTS:
            inner = part.get(key)
            for name, value in inner.items() if isinstance(inner, Mapping) else ():
                waiting.append((value, key == "properties" and name in required))
        for key in LISTS:
            inner = part.get(key)
            waiting += [(each, False) for each in inner] if isinstance(inner, list) else []
        waiting += [(part[key], False) for key in SINGLE if key in part]


class _Lengths:
    """Characters of a short value of each part of a schema: about the shortest.

    Args:
        whole: What ``$ref`` refers into.
    """

    def __init__(self, whole: Any) -> None:
        self._whole = whole
        self._known = dict[int, int]()

    def of(self, schema: Any) -> int:
        """The length for one part; each is computed once, however often others refer to it."""
        if not isinstance(schema, Mapping):
            return UNSURE
        if id(schema) not in self._known:
            self._known[id(schema)] = UNSURE  # for parts that refer to this one
            self._known[id(schema)] = min(MOST, self._reckoned(schema))
        return self._known[id(schema)]

    def _reckoned(self, schema: Mapping[str, Any]) -> int:
        if "$ref" in schema:
            return self.of(_referred(schema["$ref"], self._whole))
        if "const" in schema:
            return len(str(schema["const"])) + 2
        if isinstance(schema.get("enum"), list):
            # The first characters decide which, and that may be the longest.
            return max((len(str(value)) + 2 for value in schema["enum"]), default=UNSURE)
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(key), list):
                return max(map(self.of, schema[key]), default=UNSURE)
        length = max(UNSURE, 2 + _number(schema, "minLength"))
        items = _number(schema, "minItems")
        if items:
            length = max(length, 2 + items * (2 + self.of(schema.get("items"))))
        required, properties = schema.get("required"), schema.get("properties")
        if isinstance(required, list) and isinstance(properties, Mapping):
            inner = [len(str(name)) + 6 + self.of(properties.get(name)) for name in required]
            length = max(length, 2 + sum(inner))
        return length


def _number(schema: Mapping[str, Any], key: str) -> int:
    value = schema.get(key, 0)
    return value if isinstance(value, int) else 0


def _referred(reference: Any, whole: Any) -> Any:
    """What ``#/$defs/name`` refers to."""
    found = whole
    for name in str(reference).split("/")[1:]:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
