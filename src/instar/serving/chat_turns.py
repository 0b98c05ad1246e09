"""A client's conversation as the turns that every chat template knows."""

from __future__ import annotations

from collections.abc import Sequence

from instar.data.schema import Message
from instar.serving import tools
from instar.serving.errors import ApiError
from instar.serving.openai_types import ChatMessage, ChatRequest, ChosenTool, Tool


def turns(messages: Sequence[ChatMessage], offered: Sequence[Tool] = ()) -> list[Message]:
    """System, user and assistant turns with text in them.

    Functions are described in the system message; calls and their answers are text between tags,
    the answers in a user's turn. So a template need not know a role ``tool``.

    Args:
        messages: The client's.
        offered: Functions that the model may ask to have called.

    Raises:
        ApiError: A message holds something that is not text.
    """
    found = list[Message]()
    joinable = False
    for i, message in enumerate(messages):
        content = text_of(message, i)
        if message.role == "tool":
            content = tools.answered(content)
            if joinable:
                found[-1]["content"] += "\n" + content
            else:
                found.append({"role": "user", "content": content})
        elif message.role == "assistant":
            asked = [
                tools.asked(call.function.name, call.function.arguments)
                for call in message.tool_calls or ()
            ]
            text = "\n".join([content, *asked] if content else asked)
            found.append({"role": "assistant", "content": text})
        else:
            role = "user" if message.role == "user" else "system"
            found.append({"role": role, "content": content})
        joinable = message.role == "tool"
    if offered:
        _introduce(found, offered)
    return found


def _introduce(messages: list[Message], offered: Sequence[Tool]) -> None:
    """Describe the functions in the system message, which is made where there is none."""
    text = tools.instructions([tool.model_dump(exclude_none=True) for tool in offered])
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += "\n\n" + text
    else:
        messages.insert(0, {"role": "system", "content": text})


def text_of(message: ChatMessage, number: int) -> str:
    """What a message says.

    Raises:
        ApiError: It holds a picture, a sound, or nothing where there must be something.
    """
    place = f"messages.{number}.content"
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise ApiError(400, f"{place} is missing", "invalid_value", place)
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise ApiError(
                400,
                f"{place} holds a part of type {part.type!r}. The models read text only.",
                "unsupported_content",
                place,
            )
    return "".join(part.text or "" for part in message.content)


def offered_tools(request: ChatRequest) -> list[Tool]:
    """The functions that the model is told of."""
    return [] if request.tool_choice == "none" else list(request.tools or ())


def must_call(request: ChatRequest) -> dict[str, object] | None:
    """The schema of the call that the reply must be, if it must be one.

    Raises:
        ApiError: The function that is to be called is not among the tools.
    """
    if request.tool_choice in (None, "none", "auto"):
        return None
    offered = offered_tools(request)
    if isinstance(request.tool_choice, ChosenTool):
        name = request.tool_choice.function.name
        offered = [tool for tool in offered if tool.function.name == name]
        if not offered:
            raise ApiError(
                400,
                f"tool_choice names {name!r}, which is not among the tools",
                param="tool_choice",
            )
    return tools.call_schema([tool.model_dump(exclude_none=True) for tool in offered])
