"""Bodies that take too long: their senders are told so, and nobody else waits for them."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

import httpx
import pytest


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
