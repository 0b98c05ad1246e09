"""Prompts whose own log-probabilities are told: what they may cost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from instar.generation.scoring import Scores, score
from instar.serving.asking import Bounds

SCORED = {"echo": True, "logprobs": 1, "model": "sft"}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that were scored, each time that they were."""
    found = list[list[int]]()

    def noting(model: Any, prompt: list[int], *rest: Any) -> Scores:
        found.append(prompt)
        return score(model, prompt, *rest)

    monkeypatch.setattr("instar.serving.completions_api.score", noting)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_once_for_all_its_replies(
    server: Any, scored: list[list[int]], stream: bool
) -> None:
    body = {**SCORED, "prompt": [[80, 81, 82], [90, 91]], "n": 4, "max_tokens": 0}
    answer = httpx.post(server.url + "/v1/completions", json={**body, "stream": stream})
    assert answer.status_code == 200
    assert scored == [[80, 81, 82], [90, 91]]
    if not stream:
        logprobs = [choice["logprobs"] for choice in answer.json()["choices"]]
        assert [len(told["tokens"]) for told in logprobs] == [3] * 4 + [2] * 4
        assert logprobs[0] == logprobs[3]


@pytest.mark.parametrize("most", [0, 1])
def test_the_time_of_prompts_is_bounded(
    serving: Callable[..., Any], waiting: Callable[..., None], most: int
) -> None:
    with serving(bounds=Bounds(timeout_s=0.0)) as server:
        body = {**SCORED, "prompt": "hi there", "max_tokens": most}
        answer = httpx.post(server.url + "/v1/completions", json=body)
        assert answer.status_code == 503 and "Retry-After" in answer.headers
        assert answer.json()["error"]["code"] == "timeout"
        waiting(lambda: server.state.worker.open == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_scored_for_a_client_that_has_left(
    server: Any, scored: list[list[int]], waiting: Callable[..., None], stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    left, url = threading.Event(), server.url + "/v1/completions"
    plain = {"prompt": "hi", "max_tokens": 1}
    assert httpx.post(url, json=plain, timeout=300).status_code == 200, "code is compiled by now"

    def slow(model: Any, prompt: list[int], *rest: Any) -> Scores:
        scored.append(prompt)
        left.wait(30)
        return score(model, prompt, *rest)

    monkeypatch.setattr("instar.serving.completions_api.score", slow)
    body = {**SCORED, "prompt": [[80, 81]] * 16, "max_tokens": 1, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=httpx.Timeout(30, read=0.5))
    waiting(lambda: server.state.worker.open == 0)
    left.set()
    assert httpx.get(server.url + "/health").json()["open_replies"] == 0
    assert httpx.post(url, json=plain).status_code == 200
    assert len(scored) <= 2
