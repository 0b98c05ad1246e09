"""What of other servers asks for something that nothing here does is refused by its name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from instar.serving.openai_types import ChatRequest, CompletionRequest, TokenizeRequest

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi there"}]}
TEXT: dict[str, Any] = {"prompt": "hi there"}
BOTH: list[tuple[str, Any, Any]] = [
    ("guided_json", {"type": "object"}, None),
    ("guided_regex", "a+", ""),
    ("guided_choice", ["a", "b"], []),
    ("guided_grammar", 'root ::= "a"', None),
    ("structured_outputs", {"choice": ["a"]}, {}),
    ("min_tokens", 5, 0),
    ("functions", [{"name": "f"}], []),
    ("function_call", {"name": "f"}, "none"),
    ("use_beam_search", True, False),
    ("length_penalty", 2, 1.0),
    ("typical_p", 0.5, 1.0),
    ("top_n_sigma", 1.0, -1),
    ("repeat_penalty", 1.1, 1.0),
    ("repeat_last_n", 64, -1),
    ("bad_words", ["a"], []),
    ("suffix", "the end", ""),
    ("best_of", 3, 1),
    ("skip_special_tokens", False, True),
    ("prompt_logprobs", 0, None),
    ("truncate_prompt_tokens", 5, None),
]
CHATS: list[tuple[str, Any, Any]] = [
    ("audio", {"voice": "alloy", "format": "wav"}, None),
    ("modalities", ["text", "audio"], ["text"]),
    ("web_search_options", {}, None),
    ("reasoning_effort", "high", "medium"),
    ("add_generation_prompt", False, True),
    ("add_special_tokens", True, False),
]
TOKENS: list[tuple[str, Any, Any]] = [
    ("add_generation_prompt", False, True),
    ("return_token_strs", True, False),
]
TEXTS: list[tuple[str, Any, Any]] = [
    ("add_special_tokens", False, True),
    ("max_completion_tokens", 5, None),
]


@pytest.mark.parametrize(
    ("kind", "body", "field", "wanted", "nothing"),
    [
        *[(ChatRequest, CHAT, *each) for each in BOTH + CHATS],
        *[(CompletionRequest, TEXT, *each) for each in BOTH + TEXTS],
        *[(TokenizeRequest, CHAT, *each) for each in TOKENS],
    ],
)
def test_what_asks_for_nothing_may_be_sent_and_nothing_else(
    kind: type[ChatRequest | CompletionRequest | TokenizeRequest],
    body: dict[str, Any],
    field: str,
    wanted: Any,
    nothing: Any,
) -> None:
    for value in (nothing, None):
        assert kind.model_validate({**body, field: value})
    with pytest.raises(ValidationError, match="not supported") as found:
        kind.model_validate({**body, field: wanted})
    assert found.value.errors()[0]["loc"] == (field,)


def test_what_says_nothing_about_the_answer_is_passed_over() -> None:
    noise = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    assert ChatRequest.model_validate({**CHAT, **noise})


def test_a_refusal_names_its_field(server: Any) -> None:
    body = {**CHAT, "guided_json": {"type": "object"}}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "guided_json" and "response_format" in error["message"]


def test_ends_of_ones_own(server: Any) -> None:
    def ask(path: str, body: dict[str, Any], **more: Any) -> Any:
        body = {**body, "max_tokens": 12, "logprobs": 1, "temperature": 0, **more}
        if "messages" in body:
            body["logprobs"] = True
        return httpx.post(server.url + path, json=body, timeout=300).json()

    (a,) = httpx.post(
        server.url + "/tokenize", json={"prompt": "a", "add_special_tokens": False}
    ).json()["tokens"]
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        ended = ask(path, body, logit_bias={str(a): 100}, stop_token_ids=[a])
        [choice] = ended["choices"]
        assert choice["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 1
        assert (choice["message"]["content"] if "messages" in body else choice["text"]) == ""
        assert not choice["logprobs"]["content" if "messages" in body else "tokens"]
        ends = {str(id): 100 for id in (3, 5)}  # of a document, and of a turn
        assert ask(path, body, logit_bias=ends)["usage"]["completion_tokens"] < 12
        on = ask(path, body, logit_bias=ends, ignore_eos=True)
        assert on["usage"]["completion_tokens"] == 12
        assert on["choices"][0]["finish_reason"] == "length"
