"""Chat templates as others read them: Jinja without our tags, or Go's language for Ollama."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROBE = [("user", "one"), ("assistant", "two"), ("user", "three")]
"""A conversation to see from what a template does."""


def chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a checkpoint, from either place where one may lie.

    Args:
        directory: The checkpoint.
        config: Its ``tokenizer_config.json``.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    said = config.get("chat_template")
    if isinstance(said, list):
        said = next((each["template"] for each in said if each["name"] == "default"), None)
    return said


def plain_jinja(template: str) -> str:
    """The template without transformers' own tag ``generation``, which others do not know.

    A condition that always holds takes its place, so that white space is cut as before.
    """
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


@dataclass(frozen=True)
class ChatML:
    """That a template writes ChatML.

    Attributes:
        system: What it says as the system where the conversation does not; empty for nothing.
    """

    system: str = ""


def recognised(template: str, tokens: Mapping[str, str]) -> ChatML | None:
    """Whether a template writes ChatML, by what it makes of a conversation.

    Args:
        template: In Jinja.
        tokens: The names of control tokens that it may use, such as ``bos_token``.
    """
    with_system = [("system", "zero"), *PROBE]
    if _rendered(template, with_system, tokens) != _chatml(with_system):
        return None
    written = _rendered(template, PROBE, tokens) or ""
    if written == _chatml(PROBE):
        return ChatML()
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", written, flags=re.DOTALL)
    if found and written == _chatml([("system", found[1]), *PROBE]):
        return ChatML(found[1])
    return None


def _chatml(turns: Sequence[tuple[str, str]]) -> str:
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{written}<|im_start|>assistant\n"


def _rendered(
    template: str, turns: Sequence[tuple[str, str]], tokens: Mapping[str, str]
) -> str | None:
    """What a template writes; nothing where it refuses."""
    # As transformers does it. Templates come with models, so they run in a sandbox.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        made = environment.from_string(plain_jinja(template))
        return made.render(messages=messages, add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError, ValueError):
        return None
