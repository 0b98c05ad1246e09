"""The endpoints beside those of OpenAI's, streams as bytes, and models by their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from instar.adapters.base import add
from instar.adapters.io import save_adapter
from instar.adapters.lora import LoRAConfig
from instar.checkpoint import load_causal_lm
from instar.errors import UserError
from instar.generation.engine import Precision
from instar.serving.app import Rules, create_app
from instar.serving.limits import Rate
from instar.serving.safety import Filter, Verdict
from instar.serving.served import Served, load, named, share_cache

HELLO = [{"role": "user", "content": "hi there"}]


def test_the_plain_chat(server: Any) -> None:
    body = {"message": "hi there", "max_length": 5, "temperature": 0}
    answer = httpx.post(server.url + "/chat", json=body).json()
    assert list(answer) == ["response"]
    whole = httpx.post(
        server.url + "/v1/chat/completions",
        json={"messages": HELLO, "max_tokens": 5, "temperature": 0},
    ).json()
    assert answer["response"] == whole["choices"][0]["message"]["content"]


def test_the_plain_chat_leaves_thoughts_out(
    runs: Path, tmp_path: Path, running: Callable[..., Any]
) -> None:
    shutil.copytree(runs / "sft", tmp_path / "thinker")
    template = "{{ messages[0].content }}<eos>{% if add_generation_prompt %}<think>{% endif %}"
    (tmp_path / "thinker" / "chat_template.jinja").write_text(template, encoding="utf-8")
    with running(create_app(load({"m": tmp_path / "thinker"}), Rules())) as server:
        body = {"messages": HELLO, "max_tokens": 5, "temperature": 0}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["reasoning_content"], "it thinks all the time"
        body = {"message": "hi there", "max_length": 5, "temperature": 0}
        assert httpx.post(server.url + "/chat", json=body).json() == {"response": ""}


def test_thinking_can_be_turned_off(thinker: Path, running: Callable[..., Any]) -> None:
    template = (
        "{{ messages[0].content }}<eos>{% if add_generation_prompt %}<think>"
        "{% if enable_thinking is false %}</think>{% endif %}{% endif %}"
    )
    (thinker / "chat_template.jinja").write_text(template, encoding="utf-8")
    with running(create_app(load({"m": thinker}), Rules())) as server:
        body = {"messages": HELLO, "max_tokens": 5, "temperature": 0}

        def message(**settings: object) -> dict[str, Any]:
            sent = body | {"chat_template_kwargs": settings}
            answer = httpx.post(server.url + "/v1/chat/completions", json=sent)
            return answer.json()["choices"][0]["message"] if answer.is_success else answer.json()

        assert message(enable_thinking=True)["reasoning_content"]
        said = message(enable_thinking=False)
        assert said["content"] and "reasoning_content" not in said
        assert "enable_thinking" in message(enable_thinking="no")["error"]["message"]
        for name in ("tools", "add_generation_prompt", "bos_token", "namespace", "range"):
            assert repr(name) in message(**{name: True})["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_thinking_model_gives_its_answer_a_form(
    thinker: Path, running: Callable[..., Any], stream: bool
) -> None:
    template = "{{ messages[0].content }}<eos>{% if add_generation_prompt %}<think>{% endif %}"
    (thinker / "chat_template.jinja").write_text(template, encoding="utf-8")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    with running(create_app(load({"m": thinker}), Rules())) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        ask = partial(
            client.chat.completions.create,
            model="m", messages=HELLO, max_tokens=40, seed=1, response_format=form,
        )  # fmt: skip
        if stream:
            deltas = [chunk.choices[0].delta for chunk in ask(stream=True)]
            thought = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
            answer = "".join(delta.content or "" for delta in deltas)
        else:
            message = ask().choices[0].message
            thought, answer = message.reasoning_content, message.content
    assert len(thought) > 5
    assert json.loads(answer) in ("yes", "no")


def test_the_likeliest_token_alone(server: Any) -> None:
    def ask(**options: Any) -> str:
        body = {"prompt": "hi there", "max_tokens": 20, "temperature": 2, **options}
        return httpx.post(server.url + "/v1/completions", json=body).json()["choices"][0]["text"]

    assert ask(top_p=0, seed=1) == ask(top_p=0, seed=2) == ask(temperature=0)
    assert ask(seed=1) != ask(seed=2)


def test_tokens_there_and_back(server: Any) -> None:
    def post(path: str, **body: Any) -> dict[str, Any]:
        return httpx.post(server.url + path, json=body).json()

    found = post("/tokenize", prompt="春 day", add_special_tokens=False)
    assert found["count"] == len(found["tokens"]) == 7 and found["max_model_len"] == 128
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == "春 day"
    whole = post("/tokenize", prompt="春 day")
    assert whole["tokens"][-7:] == found["tokens"]
    read = post("/v1/completions", prompt="春 day", max_tokens=1)["usage"]["prompt_tokens"]
    assert whole["count"] == read == 8, "a document begins with a token of its own"
    framed = post("/tokenize", messages=HELLO, model="wide")
    text = post("/detokenize", tokens=framed["tokens"])["prompt"]
    assert text == "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_counted(server: Any) -> None:
    before = httpx.get(server.url + "/metrics").text
    body = {"messages": HELLO, "max_tokens": 5, "model": "wide", "logit_bias": {"5": -100}}
    usage = httpx.post(server.url + "/v1/chat/completions", json=body).json()["usage"]
    httpx.get(server.url + "/anything/at/all")
    after = httpx.get(server.url + "/metrics").text
    assert "instar_tokens_total{" not in before
    for line in (
        f'instar_tokens_total{{kind="prompt",model="wide"}} {usage["prompt_tokens"]:.1f}',
        f'instar_tokens_total{{kind="completion",model="wide"}} {usage["completion_tokens"]:.1f}',
        'instar_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'instar_requests_total{path="other",status="404"} 1.0',
        "instar_open_replies 0.0",
    ):
        assert line in after.splitlines()


def test_events_are_lines_of_ascii(server: Any) -> None:
    ids = httpx.post(
        server.url + "/tokenize", json={"prompt": "\u2028", "add_special_tokens": False}
    ).json()["tokens"]
    pattern = "\u2028{4}"
    assert len(ids) == 3
    body = {"messages": HELLO, "max_tokens": 20, "stream": True,
            "response_format": {"type": "regex", "pattern": pattern}}  # fmt: skip
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())  # which also cuts at U+2028
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "\u2028" * 4


def test_a_filter_sees_both_sides(serving: Callable[..., Any]) -> None:
    class Wary(Filter):
        def judge(self, text: str, role: str = "user") -> Verdict:
            return Verdict(role == "user" and "harm" not in text, "a word", 1.0)

    with serving(screen=Wary(None)) as server:
        url = server.url + "/v1/chat/completions"
        refused = httpx.post(url, json={"messages": [{"role": "user", "content": "harm"}]})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "content_filter"
        (a,) = httpx.post(
            server.url + "/tokenize", json={"prompt": "a", "add_special_tokens": False}
        ).json()["tokens"]
        body = {"messages": HELLO, "max_tokens": 5, "logit_bias": {str(a): 100}}
        choice = httpx.post(url, json=body).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert "withheld" in choice["message"]["content"]


def test_names(tmp_path: Path) -> None:
    assert named(["runs/a/sft", "b=runs/b/sft"]) == {
        "sft": Path("runs/a/sft"), "b": Path("runs/b/sft"),
    }  # fmt: skip
    swept = tmp_path / "lr=0.1" / "sft"
    swept.mkdir(parents=True)
    assert named([str(swept), f"b={swept}"]) == {"sft": swept, "b": swept}
    for words in (["runs/a/sft", "runs/b/sft"], ["=runs/a"], ["/"]):
        with pytest.raises(UserError):
            named(words)


@pytest.fixture
def adapted(runs: Path, tmp_path: Path) -> Path:
    """An adapter of the first stage that changes much."""
    model = load_causal_lm(runs / "sft")
    add(model, LoRAConfig(rank=2), name="default")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    directory = tmp_path / "my.adapter"
    save_adapter(model, "default", directory, runs / "sft")
    return directory


def answers(models: list[Served], running: Callable[..., Any], names: list[str]) -> list[str]:
    with running(create_app(models, Rules())) as server:
        body = {"prompt": "hi there", "max_tokens": 8, "temperature": 0}
        return [
            httpx.post(server.url + "/v1/completions", json={**body, "model": name}).json()[
                "choices"
            ][0]["text"]
            for name in names
        ]


def test_an_adapter_and_its_base_share_an_engine(
    runs: Path, adapted: Path, running: Callable[..., Any]
) -> None:
    models = load(named([str(adapted), str(runs / "sft"), str(runs / "rlvr")]))
    assert [model.name for model in models] == ["my.adapter", "sft", "rlvr"]
    assert models[0].engine is models[1].engine is not models[2].engine
    found = answers(models, running, ["my.adapter", "sft", "my.adapter"])
    assert found[0] == found[2] != found[1]
    alone = load({"alone": adapted}), load({"base": runs / "sft"})
    assert answers(alone[0], running, ["alone"]) == found[:1]
    assert answers(alone[1], running, ["base"]) == found[1:2]


def test_an_adapter_with_a_tokenizer_of_its_own_has_an_engine_of_its_own(
    runs: Path, adapted: Path
) -> None:
    shutil.copy(runs / "sft" / "tokenizer.json", adapted)
    models = load(named([str(adapted), str(runs / "sft")]))
    assert models[0].engine is models[1].engine, "the same tokenizer is no other one"
    text = (adapted / "tokenizer.json").read_text(encoding="utf-8")
    (adapted / "tokenizer.json").write_text(json.dumps(json.loads(text)), encoding="utf-8")
    (adapted / "tokenizer_config.json").write_bytes(
        (runs / "sft" / "tokenizer_config.json").read_bytes()
    )
    models = load(named([str(adapted), str(runs / "sft")]))
    assert models[0].engine is not models[1].engine


@pytest.mark.parametrize("order", [("adapter", "sft"), ("sft", "adapter")])
def test_an_adapter_has_its_own_template_and_ends(
    runs: Path, adapted: Path, order: tuple[str, str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(runs / "sft" / name, adapted)
    template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    (adapted / "chat_template.jinja").write_text(template, encoding="utf-8")
    (adapted / "generation_config.json").write_text('{"eos_token_id": [77]}', encoding="utf-8")
    places = {"sft": runs / "sft", "adapter": adapted}
    models = {model.name: model for model in load({name: places[name] for name in order})}
    assert models["sft"].engine is models["adapter"].engine
    assert models["adapter"].tokenizer.template == template
    assert 77 in models["adapter"].stops
    assert models["sft"].tokenizer.template != template
    assert 77 not in models["sft"].stops


def test_models_can_compute_in_less(runs: Path, running: Callable[..., Any]) -> None:
    def logprob(precision: Precision) -> float:
        body = {"prompt": "hi there", "max_tokens": 1, "temperature": 0, "logprobs": 0}
        with running(create_app(load({"sft": runs / "sft"}, precision), Rules())) as server:
            answer = httpx.post(server.url + "/v1/completions", json=body).json()
        return answer["choices"][0]["logprobs"]["token_logprobs"][0]

    exact, rounded = logprob("float32"), logprob("bfloat16")
    assert exact != rounded == pytest.approx(exact, abs=0.1)


def test_a_name_may_hold_a_slash(runs: Path, running: Callable[..., Any]) -> None:
    with running(create_app(load({"org/m": runs / "sft"}), Rules())) as server:
        answer = httpx.get(server.url + "/v1/models/org/m")
        assert answer.status_code == 200 and answer.json()["id"] == "org/m"
        assert httpx.get(server.url + "/v1/models/org").status_code == 404


def test_models_have_their_parts_of_the_memory(runs: Path, running: Callable[..., Any]) -> None:
    row = 64 * 2 * 8 * 4  # columns, keys and values of one layer with one head, its width, float32
    models = load({"sft": runs / "sft", "rlvr": runs / "rlvr"})
    share_cache(models, 2 * row)
    assert [model.engine.cache_bytes for model in models] == [row, row]
    with running(create_app(models, Rules())) as server:

        def ask(tokens: int) -> httpx.Response:
            body = {"prompt": "hi there", "max_tokens": tokens, "n": 2}
            return httpx.post(server.url + "/v1/completions", json=body)

        assert ask(20).status_code == 200
        refused = ask(100)
        assert refused.status_code == 400 and "109 tokens" in refused.json()["error"]["message"]
        assert ask(20).status_code == 200


def test_a_rate_is_counted_for_each_sender() -> None:
    rate = Rate(per_minute=2)
    assert [rate.take("a", 0.0), rate.take("a", 0.0), rate.take("b", 0.0)] == [0, 0, 0]
    assert rate.take("a", 0.0) == pytest.approx(30)
    assert rate.take("a", 20.0) == pytest.approx(10)
    assert rate.take("a", 31.0) == 0
    assert Rate(0).take("a", 0.0) == 0
