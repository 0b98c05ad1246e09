"""What should not be asked: the right status each, in OpenAI's shape, and nothing is left over."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from instar.serving.grammar import DEEPEST, Vocabulary

HELLO = [{"role": "user", "content": "hi there"}]


def of_schema(form: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": form}}}


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "a valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"functions": [{"name": "f"}]}, "functions", "Give the functions as tools"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 64"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": 1 << 70}, "seed", "less than or equal to"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "a valid list"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid literal"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "ids are from 0 to 261"),
        ({"stop": ""}, "stop.constrained-str", "at least 1 character"),
        ({"top_logprobs": 2}, None, "top_logprobs needs logprobs: true"),
        ({"tool_choice": "required"}, None, "there are no tools"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "is not UTF-8"),
        ({"messages": [{"role": "queen", "content": "hello"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages.0.content", "a part of type 'image_url'"),
        (of_schema({"type": "fish"}), None, 'Unsupported type "fish"'),
        (of_schema({"not": {}}), None, "uses `not`"),
        (of_schema({"$ref": "#"}), None, "nothing can satisfy"),
        ({"response_format": {"type": "regex", "pattern": "("}}, None, "parenthesis"),
    ],
)  # fmt: skip
def test_values_out_of_range(
    server: Any, body: dict[str, Any], param: str | None, why: str
) -> None:
    # Not through httpx's json, which refuses half a surrogate pair itself.
    content = json.dumps({"messages": HELLO, "max_tokens": 4, **body})
    answer = server.post(content=content, headers={"Content-Type": "application/json"})
    error = server.error_of(answer, 400)
    assert error["param"] == param
    assert why in error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b'{"messages": "\xff\xfe"}', b"\xff" * 100,
     b"[" * 100_000, b'{"seed": ' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_no_json(server: Any, content: bytes) -> None:
    answer = server.post(content=content, headers={"Content-Type": "application/json"})
    server.error_of(answer, 400)


def test_a_deep_schema_is_refused(server: Any) -> None:
    schema: dict[str, Any] = {}
    for _ in range(300):
        schema = {"type": "array", "items": schema, "minItems": 1}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert "nested" in server.error_of(server.ask(response_format=form), 400)["message"]


def test_a_deep_tool_is_refused_where_it_must_be_called(server: Any) -> None:
    def tools(alternatives: int) -> list[dict[str, Any]]:
        schema: dict[str, Any] = {}
        for _ in range(alternatives):
            schema = {"anyOf": [schema]}
        function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
        return [{"type": "function", "function": function}]

    # An alternative is two deep, and the first one lies four deep in the schema of the call.
    deepest = (DEEPEST - 4) // 2
    body: dict[str, Any] = {"model": "wide", "tool_choice": "required"}
    assert server.ask(tools=tools(deepest), **body).status_code == 200
    error = server.error_of(server.ask(tools=tools(deepest + 1), **body), 400)
    assert "is nested" in error["message"] and error["code"] == "invalid_value"
    body["tool_choice"] = "auto"
    assert server.ask(tools=tools(deepest + 1), **body).status_code == 200


def test_a_tool_without_bottom_is_a_mistake_of_the_clients(server: Any) -> None:
    schema: dict[str, Any] = {}
    for _ in range(450):
        schema = {"anyOf": [schema]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for choice in ("auto", "required"):
        server.error_of(server.ask(model="wide", tools=tools, tool_choice=choice), 400)
    assert server.ask().status_code == 200


def test_pages_that_do_not_exist(server: Any) -> None:
    server.error_of(server.post("/v1/nothing", json={}), 404)
    server.error_of(httpx.get(server.url + "/v1/chat/completions"), 405)
    assert server.error_of(server.ask(model="nobody"), 404)["code"] == "model_not_found"


def test_a_prompt_that_is_too_long(server: Any) -> None:
    for path, field, content in (
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "a" * 500}]),
        ("/v1/completions", "prompt", "a" * 500),
        ("/chat", "message", "a" * 500),
    ):
        error = server.error_of(server.post(path, json={field: content}), 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == field


@pytest.mark.parametrize(
    ("body", "param"), [({"suffix": "the end"}, "suffix"), ({"n": 2, "best_of": 3}, "best_of")]
)
def test_what_would_change_the_answer_is_not_passed_over(
    server: Any, body: dict[str, Any], param: str
) -> None:
    asked = {"prompt": "hi", "max_tokens": 2}
    answer = server.post("/v1/completions", json={**asked, **body})
    assert server.error_of(answer, 400)["param"] == param
    same = {"suffix": None, "n": 2, "best_of": 2}  # which changes nothing
    assert server.post("/v1/completions", json={**asked, **same}).status_code == 200


def test_a_full_queue(serving: Callable[..., Any], waiting: Callable[..., None]) -> None:
    with serving(most_open=3) as server:
        with connection(server, n=2, **ENDLESS):
            waiting(lambda: server.state.worker.open == 2)
            answer = server.ask(n=2)
            assert server.error_of(answer, 429)["code"] == "queue_full"
            assert int(answer.headers["Retry-After"]) >= 1
        waiting(lambda: server.state.worker.open == 0)
        assert server.ask(n=3).status_code == 200, "what was refused counts no more"


def test_more_replies_than_ever_have_room(serving: Callable[..., Any]) -> None:
    with serving(most_open=3) as server:
        error = server.error_of(server.ask(n=4), 400)
        assert error["code"] == "too_many" and "4 replies" in error["message"]


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/v1/models/sft", "/metrics", "/openapi.json"]
)
def test_head_is_answered_like_get_without_the_body(server: Any, path: str) -> None:
    whole, head = httpx.get(server.url + path), httpx.head(server.url + path)
    assert head.status_code == whole.status_code == 200
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert whole.content and not head.content
    assert httpx.head(server.url + "/chat").status_code == 405


def test_time_is_bounded(serving: Callable[..., Any]) -> None:
    from instar.serving.asking import Bounds

    with serving(bounds=Bounds(timeout_s=0.0)) as server:
        answer = server.ask()
        assert server.error_of(answer, 503)["code"] == "timeout" and "Retry-After" in answer.headers
        for path, body in (
            ("/v1/chat/completions", {"messages": HELLO}),
            ("/v1/completions", {"prompt": "hi"}),
        ):  # a stream has begun with 200 by then
            last = server.post(path, json={**body, "stream": True}).text.split("\n\n")[-3]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    with serving(bounds=Bounds(timeout_s=0.1, usual_tokens=4000)) as server:
        body = {"messages": HELLO, "model": "wide", "logit_bias": {"3": -100, "5": -100}}
        answer = server.post(json=body)
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert 0 < answer.json()["usage"]["completion_tokens"] < 1900


def test_a_grammar_that_takes_too_long_is_given_up(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instar.serving.grammar.MOST_S", 0.0)
    pattern = {"type": "regex", "pattern": "(([a-z]{0,100}){0,100}){0,100}"}
    with serving() as server:
        error = server.error_of(server.ask(response_format=pattern), 400)
        assert "too long" in error["message"] and "Simplify" in error["message"]
        last = server.ask(response_format=pattern, stream=True).text.split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_value"
        assert server.ask().status_code == 200


def test_the_engines_do_not_wait_while_somebody_looks_for_the_end_of_a_form(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list[str]()
    mask = Vocabulary.mask

    def noted(self: Vocabulary, matcher: object) -> Any:
        names.append(threading.current_thread().name)
        return mask(self, matcher)

    monkeypatch.setattr(Vocabulary, "mask", noted)
    schema = {"type": "array", "minItems": 50, "items": {"type": "integer"}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"model": "wide", "response_format": form, "n": 4, "max_tokens": 1}
    assert server.ask(**body).status_code == 200
    assert names.count("engines") == 4, "one token of each reply"


def test_a_fault_of_ours_is_told_and_counted(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        engine = server.state.models[0].engine

        def fail() -> None:
            raise RuntimeError("a fault")

        monkeypatch.setattr(engine, "step", fail)
        assert server.error_of(server.ask(), 500)["code"] == "internal"
        last = server.ask(stream=True).text.split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal"
        assert server.ask(model="rlvr").status_code == 200, "the other models go on"
        monkeypatch.undo()
        assert server.ask().status_code == 200
        counted = httpx.get(server.url + "/metrics").text
        assert 'instar_requests_total{path="/v1/chat/completions",status="500"} 1.0' in counted
        assert 'status="499"' not in counted


def test_first_tokens_are_counted_however_they_are_asked_for(serving: Callable[..., Any]) -> None:
    with serving() as server:
        server.ask(n=2)
        server.ask(stream=True)
        server.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2, "stream": True})
        counted = httpx.get(server.url + "/metrics").text
        assert 'instar_first_token_seconds_count{model="sft"} 4.0' in counted


def test_tokens_are_bounded(serving: Callable[..., Any]) -> None:
    from instar.serving.asking import Bounds

    with serving(bounds=Bounds(usual_tokens=3, most_tokens=5)) as server:
        for wanted, written in ((None, 3), (4, 4), (9, 5)):
            body = {"messages": HELLO, "max_tokens": wanted, "logit_bias": {"3": -100, "5": -100}}
            assert server.post(json=body).json()["usage"]["completion_tokens"] == written


def connection(server: Any, **body: Any) -> socket.socket:
    """A chat request that was sent, and whose answer nobody has read."""
    content = json.dumps({"messages": HELLO, "model": "wide", **body}).encode()
    sender = socket.create_connection(("127.0.0.1", server.socket.getsockname()[1]), timeout=20)
    sender.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    return sender


ENDLESS = {"max_tokens": 1900, "logit_bias": {"3": -100, "5": -100}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots(
    server: Any, waiting: Callable[..., None], stream: bool, n: int
) -> None:
    worker = server.state.worker
    with connection(server, stream=stream, n=n, **ENDLESS):
        waiting(lambda: worker.open == n)
    waiting(lambda: worker.open == 0)
    waiting(lambda: not worker._jobs and all(engine.idle for engine in worker.engines))
    assert server.ask().status_code == 200


def test_clients_that_come_and_go_leave_nothing(server: Any, waiting: Callable[..., None]) -> None:
    worker = server.state.worker

    def threads() -> set[str]:
        # asyncio keeps a few of its own for work beside the loop, and starts them as it likes.
        every = {thread.name for thread in threading.enumerate()}
        return {name for name in every if not name.startswith("asyncio_")}

    def come_and_go(times: int) -> None:
        for _ in range(times):
            with connection(server, stream=True, **ENDLESS) as sender:
                assert sender.recv(12) == b"HTTP/1.1 200"
            with socket.create_connection(sender_address(server)) as sender:
                sender.sendall(b"POST /chat HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
            with socket.create_connection(sender_address(server)) as sender:
                sender.sendall(b"\x00\xff nonsense\r\n\r\n")
                assert sender.recv(12) == b"HTTP/1.1 400"
        waiting(lambda: worker.open == 0 and all(engine.idle for engine in worker.engines))
        waiting(lambda: not server.server_state.connections and not server.server_state.tasks)

    come_and_go(2)
    before = threads()
    assert "engines" in before
    come_and_go(8)
    assert threads() == before
    assert server.ask().status_code == 200


def sender_address(server: Any) -> tuple[str, int]:
    return server.socket.getsockname()[:2]


def test_an_engine_that_fails_says_so_and_goes_on(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.state.models[0].engine
    step = engine.step

    def failing() -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(engine, "step", failing)
    assert server.error_of(server.ask(), 500)["type"] == "server_error"
    monkeypatch.setattr(engine, "step", step)
    assert server.ask().status_code == 200
    assert server.state.worker.open == 0


def test_what_runs_is_finished_at_the_end(serving: Callable[..., Any]) -> None:
    async def both(server: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"messages": HELLO, "model": "wide", **ENDLESS, "max_tokens": 300}
            asked = asyncio.create_task(client.post(server.url + "/v1/chat/completions", json=body))
            while not server.state.worker.open:
                await asyncio.sleep(0.01)
            server.should_exit = True
            return await asked

    with serving() as server:
        answer = asyncio.run(both(server))
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 300
    assert not server.state.worker.alive
