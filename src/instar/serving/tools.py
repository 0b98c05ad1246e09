r"""Functions that a model may ask to have called, in the format of Hermes and Qwen.

The system message lists them between ``<tools>`` tags as JSON Schema; the model asks with
``<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>``; the answers come back in a user
turn, between ``<tool_response>`` tags. All of it is text in turns that every chat template knows.
(The format is that of NousResearch's Hermes 2 Pro, 2024, and of Qwen2.5, arXiv:2412.15115.)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instar.serving.shortest import PARTS
from instar.serving.tags import Between

OPENING, CLOSING = "<tool_call>", "</tool_call>"

LITERAL = ("enum", "const", "default", "examples")
"""Keywords of JSON Schema whose values are no schemas."""


@dataclass(frozen=True)
class Call:
    """A call that a model asks for.

    Attributes:
        name: The function.
        arguments: A JSON object, as text.
        id: What the answer is to refer to.
    """

    name: str
    arguments: str
    id: str

    def written(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system message says of the functions.

    Args:
        tools: As in OpenAI's API: ``{"type": "function", "function": {...}}``.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    shape = '{"name": <the function\'s name>, "arguments": <an object with its arguments>}'
    return (
        "# Tools\n\nFunctions can be called on your behalf. These are their signatures:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        f"To have one called, write a JSON object within {OPENING}{CLOSING} tags, once for each "
        f"call:\n{OPENING}\n{shape}\n{CLOSING}"
    )


def asked(name: str, arguments: str) -> str:
    """How an earlier call stands in the conversation."""
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = arguments
    call = json.dumps({"name": name, "arguments": values}, ensure_ascii=False)
    return f"{OPENING}\n{call}\n{CLOSING}"


def answered(content: str) -> str:
    """How the answer to a call stands in the conversation."""
    return f"<tool_response>\n{content}\n</tool_response>"


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON Schema of a call of one of the functions.

    Each function's own schema is a definition by its number, so that equal names in two of them
    stay apart.
    """
    shapes, definitions = [], dict[str, Any]()
    for number, tool in enumerate(tools):
        function = tool["function"]
        place = f"#/$defs/{number}"
        definitions[str(number)] = _moved(function.get("parameters") or {"type": "object"}, place)
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": place}}
        shapes.append(
            {"type": "object", "properties": properties, "required": ["name", "arguments"]}
        )
    schema: dict[str, Any] = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return {**schema, "$defs": definitions}


def _moved(schema: Any, place: str, are_names: bool = False) -> Any:
    """A schema that stands at a place of another one, and still refers to its own parts.

    Args:
        schema: A schema, or what stands in one.
        place: Where it is put, as ``$ref`` writes it.
        are_names: Whether its keys are names that somebody chose, and no keywords.
    """
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = dict[str, Any]()
    for key, inner in schema.items():
        if not are_names and key == "$ref" and str(inner).startswith("#"):
            moved[key] = place + inner[1:]
        elif not are_names and key in LITERAL:
            moved[key] = inner
        else:
            moved[key] = _moved(inner, place, not are_names and key in PARTS)
    return moved


class CallParser:
    """Finds calls in a reply that is being written; what is none stays text.

    Args:
        only_one: Whether the reply ends with its first call; what comes after it is left out.

    Attributes:
        done: Whether it has ended so.
    """

    def __init__(self, only_one: bool = False) -> None:
        self.done = False
        self._only_one = only_one
        self._between = Between(OPENING, CLOSING)
        self._block: str | None = None

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """The text and the calls that the next piece completes."""
        return self._sorted(self._between.push(piece))

    def flush(self) -> tuple[str, list[Call]]:
        """The rest: a call that was never closed counts if it is whole."""
        text, calls = self._sorted(self._between.flush())
        if self._block is not None:
            call = parse(self._block)
            if call:
                calls.append(call)
            else:
                text += OPENING + self._block
            self._block = None
        return text, calls

    def _sorted(self, parts: list[tuple[bool, str]]) -> tuple[str, list[Call]]:
        text, calls = "", list[Call]()
        for inside, piece in parts:
            if self.done:
                break
            if inside:
                self._block = (self._block or "") + piece
                continue
            if self._block is not None:
                call = parse(self._block)
                if call:
                    calls.append(call)
                    self.done = self._only_one
                else:
                    text += OPENING + self._block + CLOSING
                self._block = None
            text += piece
        return text, calls


def parse(block: str) -> Call | None:
    """The call that stands between two tags, if it is one."""
    try:
        values = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        return None
    arguments = values.get("arguments", {})
    if isinstance(arguments, str):  # some models write the object as text
        return Call(values["name"], arguments, new_id())
    if not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    return Call(values["name"], written, new_id())


def new_id() -> str:
    """An id for a call."""
    return f"call_{secrets.token_hex(12)}"
