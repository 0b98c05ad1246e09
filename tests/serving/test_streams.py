"""When the parts of a streamed conversation come."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from instar.serving.asking import Bounds

BODY = {"messages": [{"role": "user", "content": "hi there"}], "max_tokens": 5, "stream": True}


def events(server: Any, **more: Any) -> list[dict[str, Any]]:
    """What a stream holds before its end."""
    answer = httpx.post(server.url + "/v1/chat/completions", json={**BODY, **more}, timeout=300)
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]


def test_a_reply_is_told_of_with_its_first_step(server: Any) -> None:
    (a,) = httpx.post(
        server.url + "/tokenize", json={"prompt": "a", "add_special_tokens": False}
    ).json()["tokens"]
    told = events(server, n=2, logit_bias={str(a): 100})
    for index in range(2):
        deltas = [c["delta"] for e in told for c in e["choices"] if c["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all("role" not in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == "aaaaa"


def test_of_a_reply_whose_turn_does_not_come_nothing_is_told(serving: Callable[..., Any]) -> None:
    with serving(bounds=Bounds(timeout_s=0.0)) as server:
        [told] = events(server)
        assert told["error"]["code"] == "timeout"
