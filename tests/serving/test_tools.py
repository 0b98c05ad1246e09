from __future__ import annotations

import itertools
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.serving.chat_api import Speaker
from instar.serving.chat_turns import turns
from instar.serving.openai_types import ChatMessage, Tool
from instar.serving.reasoning import Thinking
from instar.serving.safety import Filter, Verdict
from instar.serving.screening import WITHHELD, ScreenedText
from instar.serving.tags import Between
from instar.serving.tools import CallParser, call_schema

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def parsed(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser()
    steps = [parser.push(piece) for piece in pieces] + [parser.flush()]
    text = "".join(step[0] for step in steps)
    return text, [(call.name, call.arguments) for step in steps for call in step[1]]


@given(st.text("<think>/ab", max_size=60), st.lists(st.integers(0, 200), max_size=8))
@settings(deadline=None)
def test_text_between_tags_does_not_depend_on_the_pieces(text: str, places: list[int]) -> None:
    def split(pieces: list[str]) -> tuple[str, str]:
        between = Between("<think>", "</think>")
        parts = [part for piece in pieces for part in between.push(piece)] + between.flush()
        return tuple("".join(t for i, t in parts if i is inside) for inside in (True, False))

    assert split(cut(text, places)) == split([text])


@given(st.lists(st.integers(0, 300), max_size=12))
@settings(deadline=None)
def test_calls_do_not_depend_on_the_pieces(places: list[int]) -> None:
    text = f"Let me see. {CALL} and {CALL}"
    said, calls = parsed(cut(text, places))
    assert said == "Let me see.  and "
    assert calls == [("f", '{"x": 1}')] * 2


@pytest.mark.parametrize(
    "block",
    ["<tool_call>not JSON</tool_call>", '<tool_call>{"arguments": {}}</tool_call>',
     '<tool_call>["f"]</tool_call>', '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
     "<tool_call>{", "<tool_cal", "<tool_call>" + "[" * 100_000],
)  # fmt: skip
def test_what_is_no_call_stays_text(block: str) -> None:
    assert parsed(["a ", block]) == ("a " + block, [])


def test_a_call_that_was_not_closed_counts_if_it_is_whole() -> None:
    assert parsed([CALL.removesuffix("</tool_call>")])[1] == [("f", '{"x": 1}')]


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("plain", False, "", "plain"),
        ("<think>\nhm\n</think>\n\nyes", False, "hm\n", "yes"),
        ("hm</think>yes", True, "hm", "yes"),
        ("<think>never closed", False, "never closed", ""),
        ("a <thin", False, "", "a <thin"),
        (" \n<thin", False, "", " \n<thin"),
        ("\n<think>hm</think>yes", False, "hm", "yes"),
        ("Use `<think>` so.", False, "", "Use `<think>` so."),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("a</think>b<think>c", True, "a", "b<think>c"),
    ],
)
def test_thinking(text: str, begun: bool, thought: str, answer: str) -> None:
    for size in (1, 3, 100):
        thinking = Thinking(begun)
        parts = [thinking.push(text[i : i + size]) for i in range(0, len(text), size)]
        parts.append(thinking.flush())
        assert tuple("".join(part) for part in zip(*parts, strict=True)) == (thought, answer)


def test_a_speaker_sorts_thoughts_words_and_calls() -> None:
    speaker = Speaker(False, CallParser(), ScreenedText(None))
    text = f"<think>which?</think>One moment. {CALL}"
    said = [speaker.push(letter, False) for letter in text] + [speaker.push("", True)]
    assert "".join(each.thought for each in said) == "which?"
    assert "".join(each.content for each in said) == "One moment. "
    assert [call.name for each in said for call in each.calls] == ["f"]
    assert speaker.finish("stop") == "tool_calls" and speaker.finish("timeout") == "length"


@pytest.mark.parametrize("size", [1, 1000])
def test_only_one_call_is_the_first_behind_the_thinking(size: int) -> None:
    speaker = Speaker(False, CallParser(only_one=True), ScreenedText(None))
    text = f"<think>{CALL} or so?</think>Well. {CALL} And {CALL} too"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    said = []
    for piece in pieces:
        said.append(speaker.push(piece, False))
        assert speaker.done == any(each.calls for each in said)
    said.append(speaker.push("", True))
    assert "".join(each.thought for each in said) == f"{CALL} or so?"
    assert "".join(each.content for each in said) == "Well. "
    assert [call.name for each in said for call in each.calls] == ["f"]
    assert speaker.finish("length") == "tool_calls"


def test_a_reply_of_a_given_form_is_no_thought() -> None:
    said = Speaker(None, CallParser(), ScreenedText(None)).push(CALL, True)
    assert not said.thought and [call.name for call in said.calls] == ["f"]
    said = Speaker(None, None, ScreenedText(None)).push('"<think>"', True)
    assert (said.thought, said.content) == ("", '"<think>"')


def tool(name: str, **parameters: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def accepted(schema: dict[str, object], name: str, arguments: object) -> bool:
    call = {"name": name, "arguments": arguments}
    return jsonschema.Draft202012Validator(schema).is_valid(call)


@pytest.mark.parametrize("word", ["$defs", "definitions"])
def test_every_tool_keeps_its_own_definitions(word: str) -> None:
    def of(kind: str) -> dict[str, object]:
        part = {"$ref": f"#/{word}/part"}
        properties = {"x": part, "deeper": {"$ref": "#"}, "const": part}
        shape = {"type": "object", "properties": properties, "required": ["x"]}
        return {**shape, word: {"part": {"type": kind}}}

    schema = call_schema([tool("f", **of("integer")), tool("g", **of("string"))])
    for name, good, bad in (("f", 1, "one"), ("g", "one", 1)):
        assert accepted(schema, name, {"x": good, "deeper": {"x": good}, "const": good})
        for wrong in ({"x": bad}, {"x": good, "deeper": {"x": bad}}, {"x": good, "const": bad}):
            assert not accepted(schema, name, wrong)
    assert accepted(call_schema([tool("f", **of("integer"))]), "f", {"x": 1})


def test_what_only_looks_like_a_reference_stays_as_it_is() -> None:
    properties = {"$ref": {"const": {"$ref": "#/x"}}}
    schema = call_schema([tool("f", type="object", properties=properties, required=["$ref"])])
    assert accepted(schema, "f", {"$ref": {"$ref": "#/x"}})


def test_turns_that_every_template_knows() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given_messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "user", "content": "c"},
    ]
    tool = Tool.model_validate({"type": "function", "function": {"name": "f"}})
    found = turns([ChatMessage.model_validate(message) for message in given_messages], [tool])
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user", "user"]
    assert json.dumps({"type": "function", "function": {"name": "f"}}) in found[0]["content"]
    assert found[1]["content"] == "ab"
    assert found[2]["content"] == f"{CALL}\n{CALL}"
    assert found[3]["content"] == (
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )


class Strict(Filter):
    """Stops what says "bad"."""

    def judge(self, text: str, role: str = "user") -> Verdict:
        return Verdict("bad" not in text, "bad words", 1.0)


def test_a_reply_is_withheld_before_the_sentence_that_is_stopped(tmp_path: Path) -> None:
    screened = ScreenedText(Strict(None, tmp_path / "log.jsonl"))
    shown = [screened.push(piece, False) for piece in ("Good. ", "A b", "ad thing. ", "More. ")]
    assert ScreenedText(Strict(None)).push("Good. A bad thing", last=True) == WITHHELD
    assert "".join(shown) == "Good." + WITHHELD and screened.stopped
    screened.close()
    screened.close()
    (line,) = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reason"] == "bad words", "one line a reply"
    assert Speaker(False, None, screened).finish("stop") == "content_filter"
