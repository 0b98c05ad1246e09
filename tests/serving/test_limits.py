"""Who may ask, how often, and how much: what the door lets through."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

HELLO = [{"role": "user", "content": "hi there"}]


def test_keys(serving: Callable[..., Any]) -> None:
    with serving(keys=["right", "other"]) as server:
        error = server.error_of(server.ask(), 401)
        assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
        for key, status in (("wrong", 401), ("right", 200), ("other", 200), ("", 401)):
            header = {"Authorization": f"Bearer {key}" if key else "Bearer"}
            body = {"messages": HELLO, "max_tokens": 2}
            assert server.post(json=body, headers=header).status_code == status
        for path in ("/metrics", "/v1/models", "/nothing"):
            assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200


def test_rate(serving: Callable[..., Any]) -> None:
    with serving(per_minute=3) as server:
        answers = [server.ask() for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        server.error_of(answers[-1], 429)
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 20


def test_wrong_keys_are_counted_and_take_nothing_from_right_ones(
    serving: Callable[..., Any],
) -> None:
    def status(server: Any, key: str) -> int:
        header = {"Authorization": f"Bearer {key}"}
        return httpx.get(server.url + "/v1/models", headers=header).status_code

    with serving(keys=["right"], per_minute=2) as server:
        assert [status(server, key) for key in "abc"] == [401, 401, 429]
        assert [status(server, "right") for _ in range(3)] == [200, 200, 429]


def test_cors_is_off_unless_asked_for(serving: Callable[..., Any]) -> None:
    origin = {"Origin": "https://example.org"}
    asked = {**origin, "Access-Control-Request-Method": "POST"}
    allowed = "access-control-allow-origin"
    with serving() as server:
        assert allowed not in httpx.get(server.url + "/health", headers=origin).headers
        assert allowed not in httpx.options(server.url + "/chat", headers=asked).headers
    with serving(origins=["https://example.org"], keys=["k"]) as server:
        answer = httpx.options(server.url + "/chat", headers=asked)
        assert answer.headers[allowed] == "https://example.org"
        other = {**asked, "Origin": "https://elsewhere.org"}
        assert allowed not in httpx.options(server.url + "/chat", headers=other).headers


def test_cors_is_enough_for_the_official_client(serving: Callable[..., Any]) -> None:
    headers = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
    asked = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": headers,
    }
    with serving(origins=["https://example.org"], per_minute=1) as server:
        answer = httpx.options(server.url + "/v1/chat/completions", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-headers"] == headers
        for status in (200, 429):
            answer = httpx.get(server.url + "/v1/models", headers={"Origin": asked["Origin"]})
            assert answer.status_code == status
        # How long to wait, a page's script may read as well.
        assert answer.headers["access-control-expose-headers"] == "Retry-After"


@pytest.mark.parametrize("kind", [None, "text/plain"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat", {"message": "hi"}),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [10]}),
    ],
)
def test_what_a_browser_sends_without_asking_is_not_read(
    server: Any, path: str, body: dict[str, Any], kind: str | None
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = server.post(path, content=json.dumps(body), headers=headers)
    assert server.error_of(answer, 400)["code"] == "invalid_json"
    assert server.post(path, json=body).status_code == 200


def test_pages_of_other_origins_may_not_send(serving: Callable[..., Any]) -> None:
    def status(server: Any, **headers: str) -> int:
        body = {"messages": HELLO, "max_tokens": 2}
        return server.post(json=body, headers=headers).status_code

    with serving() as server:
        assert status(server, Origin=server.url) == 200
        assert status(server, Origin="https://my.example", Host="my.example") == 200
        # A proxy may have changed the host; the browser knows better.
        proxied = {"Origin": "https://my.example", "Sec-Fetch-Site": "same-origin"}
        assert status(server, **proxied) == 200
        for origin in ("https://evil.example", "null", server.url + "0"):
            assert status(server, **{"Origin": origin, "Sec-Fetch-Site": "same-site"}) == 403
        answer = server.post(json={}, headers={"Origin": "https://evil.example"})
        error = server.error_of(answer, 403)
        assert error["code"] == "wrong_origin"
        assert "--cors https://evil.example" in error["message"]
        asked = httpx.get(server.url + "/health", headers={"Origin": "https://evil.example"})
        assert asked.status_code == 200, "which its script cannot read"
    with serving(origins=["https://example.org"]) as server:
        assert status(server, Origin="https://example.org") == 200
        assert status(server, Origin="https://evil.example") == 403
    with serving(origins=["*"]) as server:
        assert status(server, Origin="https://anyone.example") == 200


def test_a_server_that_is_called_by_another_name(serving: Callable[..., Any]) -> None:
    with serving(hosts=["localhost", "127.0.0.1", "[::1]"]) as server:
        for name, status in (
            ("localhost:80", 200), ("[::1]:80", 200), ("[::1]", 200), ("evil.example", 400),
        ):  # fmt: skip
            answer = httpx.get(server.url + "/health", headers={"Host": name})
            assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert "--name evil.example" in message, "it says what to do about it"


def test_ten_megabytes(server: Any) -> None:
    answer = server.ask(messages=[{"role": "user", "content": "a" * 10_000_000}])
    assert server.error_of(answer, 413)["code"] == "body_too_large"

    def pieces() -> Any:  # without a length in the header
        for _ in range(100):
            yield b"a" * 100_000

    server.error_of(server.post(content=pieces()), 413)
    assert server.ask().status_code == 200


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions", "/v1/completions"])
def test_a_body_that_never_arrives_is_not_waited_for(
    server: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("instar.serving.limits.BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(server.socket.getsockname()[:2], timeout=60) as sender:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sender.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = http.client.HTTPResponse(sender, method="POST")
        answer.begin()
        error = json.loads(answer.read())["error"]
    assert answer.status == 408
    assert error["code"] == "body_timeout" and "did not arrive in time" in error["message"]
    monkeypatch.undo()  # a busy machine may take longer than that to send a whole one
    body = {"message": "hi there", "max_length": 2}
    assert httpx.post(server.url + "/chat", json=body, timeout=60).status_code == 200
