"""Instruction, preference and task files as others write them, in the words of our own schema.

A format is recognised by its columns, and says what its records are good for: a conversation to
fine-tune on, a pair to prefer by, a task to check. What several stages can use (a question with
its answer is a conversation and a task), each stage takes as it needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from instar.data.schema import Message, Role
from instar.errors import UserError

Values = Mapping[str, Any]
Kind = Literal["document", "conversation", "pair", "task", "label"]
"""What a record is good for; a label says of one reply whether it is good (KTO)."""

KEYS: dict[Kind, tuple[str, ...]] = {
    "document": ("text",),
    "conversation": ("messages",),
    "pair": ("messages", "chosen", "rejected"),
    "task": ("messages", "verifier", "answer"),
    "label": ("messages", "reply", "label"),
}
"""What our schema calls the parts of each kind."""

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
"""What others call the three roles."""

CALLS, RESULTS = ("function_call",), ("tool", "function", "observation", "ipython")
"""What others call the assistant's call of a tool, and what the tool returned."""

TOOLS = """# Tools

You may call one or more functions to help with the user's request.

The functions, as JSON, within <tools></tools>:
<tools>
{tools}
</tools>

For each call, return a JSON object with the function's name and its arguments within \
<tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""
"""How a system message offers tools: the tags of the Hermes models, which Qwen's took over."""

NUMBER = re.compile(r"-?\d[\d,]*")
ANSWER_MARK = "####"
"""What GSM8K puts before the answer, at the end of the working."""


@dataclass(frozen=True)
class Format:
    """How somebody else writes records.

    Attributes:
        name: What the field calls it.
        columns: What a record must have to be one of it.
        makes: For each kind that it is good for, how to make one of ours.
    """

    name: str
    columns: tuple[str, ...]
    makes: Mapping[Kind, Callable[[Values], dict[str, Any]]] = field(repr=False)


def recognise(record: Values) -> Format | None:
    """The first format whose columns a record has."""
    return next((form for form in FORMATS if record.keys() >= set(form.columns)), None)


def convert(record: Values, kind: Kind) -> dict[str, Any] | None:
    """A record as one of ours of some kind; nothing where no known format fits that.

    What the record holds besides is kept (a group, tags).

    Raises:
        UserError: It has the columns of a format, and not what belongs in them.
    """
    form = recognise(record)
    if form is None or kind not in form.makes:
        return None
    try:
        return form.makes[kind](record)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"this looks like {form.name}, but {type(error).__name__}: {error}",
            f"{form.name} has: {', '.join(form.columns)}.",
        ) from None


def messages_of(turns: Any, tools: Any = None) -> list[Message]:
    """Turns in anybody's words as messages of ours.

    Speakers may be called ``from`` or ``role``, their words ``value`` or ``content``, or a list of
    parts of which the texts count. Calls of tools and what these returned become text, in the
    assistant's turn and the user's, as the Hermes and Qwen chat formats have them.

    Args:
        turns: The conversation.
        tools: Descriptions of the tools that the assistant may call, offered in a system message.

    Raises:
        UserError: Somebody unknown speaks, or there are no words.
    """
    if not isinstance(turns, list):
        raise UserError(f"the conversation is {turns!r:.60}", "Make it a list of turns.")
    found: list[Message] = []
    if tools:
        offered = json.loads(tools) if isinstance(tools, str) else tools
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in offered)
        found.append({"role": "system", "content": TOOLS.format(tools=lines)})
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UserError(f"turn {number} is {turn!r:.60}", "Make it an object.")
        role, content = _turn(turn, number)
        joins = found and found[-1]["role"] == role and (role == "system" or _is_result(turn))
        if joins:
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n{content}"}
        else:
            found.append({"role": role, "content": content})
    return found


def _turn(turn: Values, number: int) -> tuple[Role, str]:
    """Who speaks, and what."""
    speaker = turn.get("role", turn.get("from"))
    words = turn.get("content", turn.get("value"))
    text = _text(words)
    if _is_result(turn):
        return "user", f"<tool_response>\n{text}\n</tool_response>"
    if speaker in CALLS:
        return "assistant", f"<tool_call>\n{text}\n</tool_call>"
    if speaker not in SPEAKERS:
        known = ", ".join([*SPEAKERS, *CALLS, *RESULTS])
        raise UserError(f"turn {number} is by {speaker!r}", f"Known speakers: {known}.")
    calls = [_call(call) for call in turn.get("tool_calls") or []]
    if text is None and not calls:
        raise UserError(f"turn {number} says {words!r:.60}", "Give it text.")
    return SPEAKERS[speaker], "\n".join([*([text] if text else []), *calls])


def _is_result(turn: Values) -> bool:
    return turn.get("role", turn.get("from")) in RESULTS


def _text(words: Any) -> str | None:
    """Plain text, or the texts among its parts; none where there is something else."""
    if isinstance(words, list):
        parts = [part.get("text") for part in words if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return words if isinstance(words, str) else None


def _call(call: Values) -> str:
    """OpenAI's call of a function, whose arguments are JSON within JSON."""
    function = call.get("function", call)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    told = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{told}\n</tool_call>"


def _prompt(prompt: Any) -> list[Message]:
    """A prompt that is a text or a conversation."""
    return [_said("user", prompt)] if isinstance(prompt, str) else messages_of(prompt)


def _reply(reply: Any) -> str:
    """A reply that is a text, a turn, or the one turn of a conversation."""
    if isinstance(reply, str):
        return reply
    turns = messages_of(reply if isinstance(reply, list) else [reply])
    return turns[-1]["content"]


def _said(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def _kept(record: Values, *used: str, **made: Any) -> dict[str, Any]:
    """What was made, and what the record holds besides."""
    return {key: value for key, value in record.items() if key not in used} | made


def _instruction(record: Values) -> list[Message]:
    """Alpaca's prompt: an instruction and its input, after what was said before."""
    asked = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    before = [
        _said(role, text)
        for pair in record.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    system = [_said("system", record["system"])] if record.get("system") else []
    return [*system, *before, _said("user", asked)]


ALPACA = ("instruction", "input", "output", "history", "system")


def _alpaca(record: Values) -> dict[str, Any]:
    messages = [*_instruction(record), _said("assistant", record["output"])]
    return _kept(record, *ALPACA, messages=messages)


def _alpaca_pair(record: Values) -> dict[str, Any]:
    chosen, rejected = _reply(record["chosen"]), _reply(record["rejected"])
    messages = _instruction(record)
    return _kept(record, *ALPACA, messages=messages, chosen=chosen, rejected=rejected)


def _sharegpt(record: Values) -> dict[str, Any]:
    messages = messages_of(record["conversations"], record.get("tools"))
    if record.get("system"):
        messages.insert(0, _said("system", record["system"]))
    return _kept(record, "conversations", "tools", "system", messages=messages)


def _sharegpt_pair(record: Values) -> dict[str, Any]:
    chosen, rejected = _reply(record["chosen"]), _reply(record["rejected"])
    return _sharegpt(record) | {"chosen": chosen, "rejected": rejected}


def _openai(record: Values) -> dict[str, Any]:
    messages = messages_of(record["messages"], record.get("tools"))
    return _kept(record, "tools", messages=messages)


def _openai_pair(record: Values) -> dict[str, Any]:
    return _openai(record) | {key: _reply(record[key]) for key in ("chosen", "rejected")}


def _prompt_pair(record: Values) -> dict[str, Any]:
    chosen, rejected = _reply(record["chosen"]), _reply(record["rejected"])
    made = {"messages": _prompt(record["prompt"]), "chosen": chosen, "rejected": rejected}
    return _kept(record, "prompt", **made)


def _two_dialogues(record: Values) -> dict[str, Any]:
    """Both conversations whole; the prompt is what they have in common."""
    chosen, rejected = messages_of(record["chosen"]), messages_of(record["rejected"])
    if not chosen or chosen[:-1] != rejected[:-1]:
        raise UserError(
            "`chosen` and `rejected` differ before their last turn",
            "Give two replies to one prompt.",
        )
    replies = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return _kept(record, messages=chosen[:-1], **replies)


def _completion(record: Values) -> dict[str, Any]:
    reply = _said("assistant", _reply(record["completion"]))
    messages = [*_prompt(record["prompt"]), reply]
    return _kept(record, "prompt", "completion", messages=messages)


def _label(record: Values) -> dict[str, Any]:
    made = {"messages": _prompt(record["prompt"]), "reply": _reply(record["completion"])}
    return _kept(record, "prompt", "completion", **made, label=bool(record["label"]))


def _asked(column: str) -> Callable[[Values], dict[str, Any]]:
    """A task of a question and its answer, perhaps at the end of the working."""

    def task(record: Values) -> dict[str, Any]:
        answer = str(record["answer"]).rpartition(ANSWER_MARK)[2].strip()
        return _checked(_kept(record, column), [_said("user", record[column])], answer)

    return task


def _answered(column: str) -> Callable[[Values], dict[str, Any]]:
    """The same as a conversation: the answer with its working."""

    def conversation(record: Values) -> dict[str, Any]:
        turns = [_said("user", record[column]), _said("assistant", str(record["answer"]))]
        return _kept(record, column, "answer", messages=turns)

    return conversation


def _ground_truth(record: Values) -> dict[str, Any]:
    """DAPO's and verl's tasks."""
    answer = str(record["reward_model"]["ground_truth"])
    return _checked(_kept(record, "prompt", "reward_model"), _prompt(record["prompt"]), answer)


def _checked(kept: dict[str, Any], messages: list[Message], answer: str) -> dict[str, Any]:
    """A task whose answer is a number, compared as such, or a text."""
    number = NUMBER.fullmatch(answer)
    truth = answer.replace(",", "") if number else answer
    verifier = "integer" if number else "answer"
    return kept | {"messages": messages, "verifier": verifier, "answer": truth}


def _as_it_is(record: Values) -> dict[str, Any]:
    return dict(record)


FORMATS = (
    Format("instar's tasks", ("messages", "verifier", "answer"), {"task": _as_it_is}),
    Format("OpenAI pairs", ("messages", "chosen", "rejected"), {"pair": _openai_pair}),
    Format("OpenAI messages", ("messages",), {"conversation": _openai}),
    Format("Alpaca pairs", ("instruction", "chosen", "rejected"), {"pair": _alpaca_pair}),
    Format("Alpaca", ("instruction", "output"), {"conversation": _alpaca}),
    Format("ShareGPT pairs", ("conversations", "chosen", "rejected"), {"pair": _sharegpt_pair}),
    Format("ShareGPT", ("conversations",), {"conversation": _sharegpt}),
    Format("prompt, chosen, rejected", ("prompt", "chosen", "rejected"), {"pair": _prompt_pair}),
    Format("chosen and rejected dialogues", ("chosen", "rejected"), {"pair": _two_dialogues}),
    Format("DAPO", ("prompt", "reward_model"), {"task": _ground_truth}),
    # No conversation to imitate: its reply may be the bad one.
    Format("KTO", ("prompt", "completion", "label"), {"label": _label}),
    Format("prompt and completion", ("prompt", "completion"), {"conversation": _completion}),
    *(
        Format(
            name,
            (column, "answer"),
            {"task": _asked(column), "conversation": _answered(column)},
        )
        for name, column in (("GSM8K", "question"), ("problems", "problem"))
    ),
    Format("documents", ("text",), {"document": _as_it_is}),
)
"""In the order in which they are tried: what has more columns comes first."""
