"""The safety filter in the server: what it does to requests and to replies at work."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from instar.serving.safety import Filter, Verdict
from instar.tokenizer.bpe import BYTE_ORDER, FIRST_BYTE

HELLO = [{"role": "user", "content": "hi there"}]
ENDPOINTS = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hi there"},
}
LETTERS = 400
WRITTEN = {"type": "regex", "pattern": f"(make a bomb|say hello)[.] [a-z]{{{LETTERS}}}"}
"""The fixture's models read bytes, and are random: half of their replies begin so, half so."""
SHORT = {"type": "regex", "pattern": "(make a bomb|say hello)[.] [a-z]{20}"}
HARM = "How do I make a pipe bomb?"
PEACE = "How do I make a bath bomb?"


def streamed(server: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    body = {**ENDPOINTS[path], "stream": True, **body}
    lines = httpx.post(server.url + path, json=body, timeout=300).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_reply_that_is_stopped_ends_and_its_neighbours_go_on(
    serving: Callable[..., Any], waiting: Callable[..., None], path: str
) -> None:
    with serving(screen=Filter(None)) as server:
        chunks = streamed(
            server, path, model="wide", n=8, max_tokens=600, seed=1, response_format=WRITTEN,
            stream_options={"include_usage": True},
        )  # fmt: skip
        why, texts = dict[int, str](), dict[int, str]()
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            assert choice["index"] not in why, "nothing follows the end"
            texts[choice["index"]] = texts.get(choice["index"], "") + text
            if choice["finish_reason"]:
                why[choice["index"]] = choice["finish_reason"]
        stopped = [i for i in range(8) if why[i] == "content_filter"]
        assert 0 < len(stopped) < 8 and all("withheld" in texts[i] for i in stopped)
        whole = [text for i, text in texts.items() if i not in stopped]
        assert all(len(text) == len("say hello. ") + LETTERS for text in whole)
        written = chunks[-1]["usage"]["completion_tokens"] - len("".join(whole))
        assert written < 100 * len(stopped), "they were not written to their ends"
        worker = server.state.worker
        waiting(lambda: worker.open == 0 and all(engine.idle for engine in worker.engines))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"logprobs": 2}),
        ("/v1/completions", {"logprobs": 2, "echo": True}),
    ],
)
def test_no_token_comes_out_beside_the_filter(
    serving: Callable[..., Any], path: str, asked: dict[str, Any], stream: bool
) -> None:
    body = {"model": "wide", "n": 8, "max_tokens": 60, "seed": 1, "response_format": SHORT, **asked}
    with serving(screen=Filter(None)) as server:
        if stream:
            parts = streamed(server, path, **body)
        else:
            body = {**ENDPOINTS[path], **body}
            parts = [httpx.post(server.url + path, json=body, timeout=300).json()]
    choices = [choice for part in parts for choice in part["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(ends) == 8 and 0 < ends.count("content_filter") < 8
    assert all(choice["logprobs"] is None for choice in choices)
    texts = dict[int, str]()
    for choice in choices:
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        texts[choice["index"]] = texts.get(choice["index"], "") + (said.get("content") or "")
    assert not any("bomb" in text for text in texts.values())
    assert any("say hello." in text for text in texts.values())


@pytest.mark.parametrize(
    ("path", "asking"),
    [
        ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("/chat", lambda text: {"message": text}),
        ("/v1/completions", lambda text: {"prompt": text}),
        ("/v1/completions", lambda text: {"prompt": ["hi there", text]}),
        ("/v1/completions", lambda text: {"prompt": ids(text)}),
        ("/v1/completions", lambda text: {"prompt": [ids("hi there"), ids(text)]}),
    ],
    ids=["chat", "plain chat", "text", "texts", "ids", "lists of ids"],
)
def test_a_harmful_request_is_refused_however_it_is_sent(
    serving: Callable[..., Any], path: str, asking: Callable[[str], dict[str, Any]]
) -> None:
    def asked(server: Any, text: str) -> httpx.Response:
        body = {**asking(text), "max_tokens": 2, "max_length": 2}
        return httpx.post(server.url + path, json=body, timeout=300)

    with serving(screen=Filter(None)) as server:
        refused = asked(server, HARM)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "content_filter" and "rule: weapons" in error["message"]
        assert asked(server, PEACE).status_code == 200


def ids(text: str) -> list[int]:
    """The tokens of the fixture's models: a byte each."""
    return [FIRST_BYTE + BYTE_ORDER.index(byte) for byte in text.encode()]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_too_long_is_refused_before_it_is_judged(
    serving: Callable[..., Any], path: str
) -> None:
    class Slow(Filter):
        def judge(self, text: str, role: str = "user") -> Verdict:
            raise AssertionError("it takes for ever")

    key, text = ("messages", HELLO * 500) if "chat" in path else ("prompt", "hi there" * 500)
    with serving(screen=Slow(None)) as server:
        answer = httpx.post(server.url + path, json={key: text})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_replies_are_judged_beside_the_loop(
    serving: Callable[..., Any], path: str, stream: bool
) -> None:
    judging = set[str]()

    class Watched(Filter):
        def judge(self, text: str, role: str = "user") -> Verdict:
            if role == "assistant":
                judging.add(threading.current_thread().name)
            return super().judge(text, role)

    with serving(screen=Watched(None)) as server:
        body = {**ENDPOINTS[path], "max_tokens": 20, "stream": stream}
        form = {"type": "regex", "pattern": "One[.] Two[.]"}
        answer = httpx.post(server.url + path, json={**body, "response_format": form}, timeout=300)
        assert "Two." in answer.text
    assert judging and all("asyncio" in name for name in judging), "threads of asyncio.to_thread"
