"""How a request says that tokens are to be chosen, and what the engine makes of it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from instar.generation import Request, Sampling

ENDPOINTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi there"}]},
    "/v1/completions": {"prompt": "hi there"},
}
EVERY_KNOB = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.6,
}


def ask(server: Any, path: str, **body: Any) -> httpx.Response:
    body = {**ENDPOINTS[path], "max_tokens": 2, **body}
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_knob_reaches_the_engine_by_its_name(
    server: Any, wishes: list[Request], path: str
) -> None:
    ask(server, path, **EVERY_KNOB, logit_bias={"70": 2.5})
    assert [wish.sampling for wish in wishes] == [Sampling(**EVERY_KNOB, logit_bias={70: 2.5})]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "body",
    [{}, dict.fromkeys([*EVERY_KNOB, "logit_bias"]), {"top_k": -1}],
    ids=["nothing", "null", "all tokens"],
)
def test_what_is_not_asked_for_changes_nothing(
    server: Any, wishes: list[Request], path: str, body: dict[str, Any]
) -> None:
    ask(server, path, **body)
    assert [wish.sampling for wish in wishes] == [Sampling()]


def test_the_likeliest_token_is_what_is_left_of_a_narrow_choice(server: Any) -> None:
    def text(**options: Any) -> str:
        body = {"max_tokens": 20, **options}
        return ask(server, "/v1/completions", **body).json()["choices"][0]["text"]

    greedy, bold = text(temperature=0), {"temperature": 2, "seed": 1}
    assert text(**bold) != greedy
    assert text(**bold, top_k=1) == text(**bold, min_p=1) == greedy
    assert text(**bold, top_k=2) != greedy


def test_a_penalty_counts_tokens_or_asks_whether_there_are_any(server: Any) -> None:
    def written(**penalty: float) -> str:
        # The models read bytes, of which 70 is an a; no other's lead is as large as this bias.
        body = {"logit_bias": {"70": 20}, "temperature": 0, "max_tokens": 40, **penalty}
        form = {"type": "regex", "pattern": "[ab]{40}"}
        answer = ask(server, "/v1/completions", **body, response_format=form)
        return answer.json()["choices"][0]["text"]

    assert written() == written(presence_penalty=2) == "a" * 40
    assert "b" in written(frequency_penalty=2)
