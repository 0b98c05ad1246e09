"""Ollama: a GGUF file and a Modelfile that says how to talk with it."""

from __future__ import annotations

from collections.abc import Sequence

from instar.exchange.chat_template import ChatML

TEMPLATE = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""ChatML in Go's template language, with what Ollama calls the parts of a conversation."""


def modelfile(gguf: str, chat: ChatML | None, stops: Sequence[str], context: int) -> str:
    """The text of a Modelfile.

    Args:
        gguf: Name of the GGUF file beside it.
        chat: The chat format; where it is none, Ollama looks into the GGUF file for itself.
        stops: Tokens that end a reply.
        context: The longest context, in tokens.
    """
    lines = [f"FROM ./{gguf}"]
    if chat is not None:
        lines.append(f'TEMPLATE """{TEMPLATE}"""')
        if chat.system:
            lines.append(f'SYSTEM """{chat.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
