"""The official client, unmodified, against a server at a port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from instar.generation import Request

HELLO = [{"role": "user", "content": "hi there"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(stream: Any, index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in stream
        for choice in chunk.choices
        if choice.index == index
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sft", "rlvr", "wide"]
    assert client.models.retrieve("rlvr").id == "rlvr"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_is_a_function_of_its_seed(client: openai.OpenAI) -> None:
    def ask(seed: int, model: str = "sft") -> str | None:
        reply = client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=12, seed=seed
        )
        assert reply.usage is not None and reply.usage.completion_tokens <= 12
        assert reply.choices[0].finish_reason in ("stop", "length")
        return reply.choices[0].message.content

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert ask(1) != ask(1, "rlvr")


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"model": "sft", "messages": HELLO, "max_tokens": 20, "seed": 4}
    whole = client.chat.completions.create(**wanted, n=2)
    chunks = list(
        client.chat.completions.create(
            **wanted, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for index, choice in enumerate(whole.choices):
        assert text_of(chunks, index) == choice.message.content
        reasons = [c.finish_reason for k in chunks for c in k.choices if c.index == index]
        assert [r for r in reasons if r] == [choice.finish_reason]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len(chunks) > 6, "it came in pieces"


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="sft", messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        # At temperature 0 the likeliest was taken.
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs))
    written = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert written.decode(errors="replace") == reply.choices[0].message.content


def test_streamed_logprobs_are_the_same(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {
        "model": "sft", "messages": HELLO, "max_tokens": 8, "seed": 3, "logprobs": True,
        "top_logprobs": 3,
    }  # fmt: skip
    whole = client.chat.completions.create(**wanted).choices[0].logprobs
    stream = client.chat.completions.create(**wanted, stream=True)
    pieces = [c.choices[0].logprobs for c in stream if c.choices and c.choices[0].logprobs]
    streamed = [token for piece in pieces for token in piece.content or []]
    assert whole is not None and whole.content and len(pieces) > 1
    for token, same in zip(streamed, whole.content, strict=True):
        found, expected = [token, *token.top_logprobs], [same, *same.top_logprobs]
        assert len(found) == 4
        assert [(t.token, t.bytes) for t in found] == [(t.token, t.bytes) for t in expected]
        values = [t.logprob for t in expected]
        assert [t.logprob for t in found] == pytest.approx(values, abs=1e-4)


def test_json_schema(client: openai.OpenAI) -> None:
    for seed in range(4):
        reply = client.chat.completions.create(
            model="sft",
            messages=HELLO,
            max_tokens=60,
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON, "strict": True},
            },
        )
        jsonschema.validate(json.loads(reply.choices[0].message.content or ""), PERSON)
        assert reply.choices[0].finish_reason == "stop"


def test_any_json_and_regular_expressions(client: openai.OpenAI) -> None:
    def ask(form: Any) -> str:
        reply = client.chat.completions.create(
            model="sft", messages=HELLO, max_tokens=60, response_format=form
        )
        return reply.choices[0].message.content or ""

    assert isinstance(json.loads(ask({"type": "json_object"})), dict)
    answer = ask({"type": "regex", "pattern": "(yes|no), [0-9]{2}"})
    assert answer[:-2] in ("yes, ", "no, ") and answer[-2:].isdigit()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_function_that_must_be_called(client: openai.OpenAI, stream: bool, choice: Any) -> None:
    # The fixture's models read bytes: the description of a tool alone has hundreds of tokens.
    wanted: dict[str, Any] = {"model": "wide", "messages": HELLO, "tools": [WEATHER]}
    answer = client.chat.completions.create(
        **wanted, tool_choice=choice, max_tokens=200, stream=stream
    )
    if stream:
        chunks = list(answer)
        calls = [call for c in chunks for x in c.choices for call in x.delta.tool_calls or []]
        reasons = [x.finish_reason for c in chunks for x in c.choices if x.finish_reason]
        assert text_of(chunks) == ""
    else:
        message = answer.choices[0].message
        calls, reasons = message.tool_calls, [answer.choices[0].finish_reason]
        assert message.content is None
    assert reasons == ["tool_calls"] and len(calls) == 1
    assert calls[0].function.name == "weather" and calls[0].id
    assert list(json.loads(calls[0].function.arguments)) == ["city"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_one_call_or_several(client: openai.OpenAI, parallel: bool, stream: bool) -> None:
    call = r'<tool_call>\{"name": "weather", "arguments": \{\}\}</tool_call>'
    answer = client.chat.completions.create(
        model="wide", messages=HELLO, tools=[WEATHER], parallel_tool_calls=parallel,
        extra_body={"response_format": {"type": "regex", "pattern": call * 2}}, max_tokens=200,
        stream=stream,
    )  # fmt: skip
    if stream:
        chunks = list(answer)
        calls = [call for c in chunks for x in c.choices for call in x.delta.tool_calls or []]
        reasons = [x.finish_reason for c in chunks for x in c.choices if x.finish_reason]
    else:
        [choice] = answer.choices
        calls, reasons = choice.message.tool_calls or [], [choice.finish_reason]
    assert len(calls) == 1 + parallel and reasons == ["tool_calls"]


def test_functions_with_equally_named_definitions(client: openai.OpenAI) -> None:
    def function(name: str, part: Any, word: str) -> Any:
        parameters = {"type": "object", "properties": {"x": {"$ref": f"#/{word}/part"}},
                      "required": ["x"], word: {"part": part}}  # fmt: skip
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [function("f", {"enum": ["red"]}, "$defs"), function("g", {"enum": [7]}, "definitions")]
    for tool, value in zip(tools, ("red", 7), strict=True):
        answer = client.chat.completions.create(
            model="wide", messages=HELLO, tools=tools, tool_choice=tool, max_tokens=100
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"x": value}
    answer = client.chat.completions.create(
        model="wide", messages=HELLO, tools=tools, tool_choice="required", max_tokens=100
    )
    (call,) = answer.choices[0].message.tool_calls or []
    wanted = {"f": {"x": "red"}, "g": {"x": 7}}
    assert json.loads(call.function.arguments) == wanted[call.function.name]


def test_the_answer_of_a_function_goes_back(
    client: openai.OpenAI, server: Any, wishes: list[Request]
) -> None:
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}  # fmt: skip
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    reply = client.chat.completions.create(
        model="wide", messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=5
    )
    assert reply.choices[0].finish_reason in ("stop", "length")
    [wish] = wishes
    read = server.state.models[2].tokenizer.decode(wish.prompt, skip_special=False)
    asked = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    answered = "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>"
    assert f"<|im_start|>assistant\n{asked}<|im_end|>\n{answered}" in read


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="sft", prompt=["one", "two"], n=2, max_tokens=6, echo=True, seed=1
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in reply.choices] == ["one", "one", "two", "two"]
    bare = client.completions.create(model="sft", prompt="one", max_tokens=6, logprobs=2, seed=1)
    assert "one" + bare.choices[0].text == reply.choices[0].text
    logprobs = bare.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens or []) == len(logprobs.top_logprobs or [])
    stream = client.completions.create(
        model="sft", prompt="one", max_tokens=6, echo=True, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text


def test_logprobs_of_completions_name_every_byte(client: openai.OpenAI) -> None:
    # The fixture's models read bytes: a Chinese character is three tokens.
    url = f"{client.base_url}".replace("/v1/", "/tokenize")
    ids = httpx.post(url, json={"prompt": "春", "add_special_tokens": False}).json()["tokens"]
    wanted: dict[str, Any] = {
        "model": "sft",
        "prompt": "one",
        "max_tokens": 12,
        "logprobs": 5,
        "echo": True,
        "extra_body": {"response_format": {"type": "regex", "pattern": "a春b春"}},
    }
    reply = client.completions.create(**wanted).choices[0]
    assert reply.text == "onea春b春" and reply.logprobs is not None and len(ids) == 3
    parts = ["bytes:\\xe6", "bytes:\\x98", "bytes:\\xa5"]
    tokens, offsets = reply.logprobs.tokens or [], reply.logprobs.text_offset or []
    written = [pair for pair in zip(tokens, offsets, strict=True) if pair[1] >= 3]
    assert written.pop()[1] == 7  # whichever token ends it
    assert written == [
        *zip(["a", *parts, "b", *parts], [3, 4, 4, 4, 5, 6, 6, 6], strict=True),
    ]
    assert all(len(others) == 5 for others in reply.logprobs.top_logprobs or [] if others)
    streamed = list[tuple[str, int]]()
    for chunk in client.completions.create(**wanted, stream=True):
        part = chunk.choices[0].logprobs
        if part:
            streamed += zip(part.tokens or [], part.text_offset or [], strict=True)
    assert [pair for pair in streamed if 3 <= pair[1] < 7] == written


def test_a_prompts_own_logprobs_come_with_its_echo(client: openai.OpenAI) -> None:
    # As lm-evaluation-harness asks, which counts the tokens of a choice from the end.
    ask: dict[str, Any] = {"model": "sft", "max_tokens": 1, "echo": True, "logprobs": 1, "seed": 1}
    prompts = [[80, 81, 200, 33], [90, 7]]
    reply = client.completions.create(prompt=prompts, **ask)
    for choice, prompt in zip(reply.choices, prompts, strict=True):
        told = choice.logprobs
        assert told is not None and told.token_logprobs and told.top_logprobs
        assert len(told.tokens or []) == len(told.token_logprobs) == len(prompt) + 1
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        for logprob, best in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
            assert logprob <= max(best.values()) + 1e-6 <= 1e-6
    [bare] = client.completions.create(prompt="", **ask).choices
    assert bare.logprobs and bare.logprobs.top_logprobs
    assert len(bare.logprobs.top_logprobs) == 2 and bare.logprobs.top_logprobs[0] is None
    [few] = client.completions.create(prompt="a", **ask | {"logprobs": 0}).choices
    assert few.logprobs and few.logprobs.top_logprobs is None
    assert len(few.logprobs.token_logprobs or []) == 3
    [plain] = client.completions.create(prompt=prompts[0][:2], **ask | {"echo": False}).choices
    best = plain.logprobs.top_logprobs[0]  # type: ignore[union-attr, index]
    again = reply.choices[0].logprobs.top_logprobs[2]  # type: ignore[union-attr, index]
    assert list(again) == list(best) and again == pytest.approx(best, abs=1e-4)
    whole = reply.choices[0].logprobs
    stream = [
        c.choices[0] for c in client.completions.create(prompt=prompts[0], stream=True, **ask)
    ]
    assert whole and stream[0].logprobs
    assert stream[0].logprobs.token_logprobs == (whole.token_logprobs or [])[:4]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_a_reply(client: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "sft", "echo": True, "logprobs": 1, "seed": 1}
    prompt = [80, 81, 200, 33]
    [one] = client.completions.create(prompt=prompt, max_tokens=1, **ask).choices
    none = client.completions.create(prompt=prompt, max_tokens=0, stream=stream, **ask)
    chunks = list(none) if stream else [none]
    told = chunks[0].choices[0]
    assert one.logprobs and told.logprobs and told.logprobs.token_logprobs
    assert told.logprobs.token_logprobs == (one.logprobs.token_logprobs or [])[:4]
    assert told.text and one.text.startswith(told.text)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.choices[0].text == "" for chunk in chunks[1:])


def test_nothing_is_written_where_nothing_is_asked_for(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="sft", prompt=["a", "b"], n=2, max_tokens=0)
    assert [choice.text for choice in reply.choices] == [""] * 4
    assert reply.usage and reply.usage.completion_tokens == 0
    full = [7] * 128  # the model's context
    [choice] = client.completions.create(
        model="sft", prompt=full, max_tokens=0, echo=True, logprobs=0
    ).choices
    assert choice.logprobs and len(choice.logprobs.token_logprobs or []) == 128
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="sft", prompt=full, max_tokens=1)


def test_stop_bias_and_penalties_arrive(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="sft", messages=HELLO, max_tokens=12, temperature=0, **options
        ).choices[0]

    plain = ask()
    text = plain.message.content
    assert len(text) > 4
    stopped = ask(stop=text[3])
    assert stopped.message.content == text[: text.index(text[3])]
    assert stopped.finish_reason == "stop"
    ids = httpx.post(
        f"{client.base_url}".replace("/v1/", "/tokenize"),
        json={"prompt": "a", "add_special_tokens": False},
    )
    (a,) = ids.json()["tokens"]
    assert ask(logit_bias={str(a): 100}).message.content == "a" * 12
    gentle = {"logit_bias": {str(a): 8}}
    favoured = ask(**gentle).message.content.count("a")
    assert favoured > ask(**gentle, frequency_penalty=2).message.content.count("a")
