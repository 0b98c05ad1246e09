"""The page in a real browser, against the server that it is made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from instar.data.pairs import preference_pairs
from instar.data.readers import read_all
from instar.serving.app import Rules, create_app
from instar.serving.limits import Rate
from instar.serving.page import mount
from instar.serving.safety import Filter, Verdict
from instar.serving.served import Served

KEY = "right"
SETTINGS = {"temperature": 0.7, "max_tokens": 12, "seed": 3}
BUSY_MS, USUAL_MS = 60_000, 5_000
"""How long to wait for what is expected: models must write first, on a machine that may be busy."""


class Wary(Filter):
    """Stops what the rules stop, and whatever a model says."""

    def judge(self, text: str, role: str = "user") -> Verdict:
        return Verdict(False, "a word", 1.0) if role == "assistant" else super().judge(text, role)


@pytest.fixture
def opened(
    context: BrowserContext, models: list[Served], running: Callable[..., Any], tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Starts a server, and opens its page: ``with`` its screen, if it has one."""
    expect.set_options(timeout=BUSY_MS)
    context.set_default_timeout(BUSY_MS)
    runs, votes = {model.name: model.directory for model in models}, tmp_path / "votes.jsonl"

    def begin(screen: Filter | None) -> Any:
        rules = Rules(keys=[KEY], per_minute=1000)
        return running(create_app(models, rules, screen, [lambda app: mount(app, runs, votes)]))

    yield begin
    expect.set_options(timeout=USUAL_MS)


def enter(page: Page, url: str) -> None:
    """Open the page, which asks for a key, and choose settings."""
    page.goto(url)
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#chat .hello")).to_contain_text("wants an API key")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.wait_for_selector("#chat .model option", state="attached")
    page.get_by_label("Most tokens").fill(str(SETTINGS["max_tokens"]))
    page.get_by_label("Seed").fill(str(SETTINGS["seed"]))


def send(page: Page, text: str, panel: str = "#chat") -> None:
    page.fill(f"{panel} .composer textarea", text)
    page.press(f"{panel} .composer textarea", "Enter")


def choice(server: Any, model: str, text: str) -> dict[str, Any]:
    """What the model says to a message, asked for without the page."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], **SETTINGS}
    body |= {"logprobs": True, "top_logprobs": 5}
    url, headers = f"{server.url}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    return httpx.post(url, json=body, headers=headers, timeout=60).json()["choices"][0]


def test_a_reply_comes_with_the_probabilities_of_its_tokens(
    context: BrowserContext, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = context.new_page()
    with opened(None) as server:
        enter(page, server.url)
        send(page, "hello")
        page.get_by_role("button", name="Tokens").click()
        said = choice(server, "sft", "hello")["logprobs"]["content"]
        expect(page.locator("#chat .token")).to_have_count(len(said))
        labels = [box.get_attribute("aria-label") for box in page.locator("#chat .token").all()]
        for label, token in zip(labels, said, strict=True):
            share = 100 * math.exp(token["logprob"])
            shown = label.removesuffix(" %").split()[-1]
            assert float(shown) == pytest.approx(share, abs=0.06) or share < 0.11
        page.locator("#chat .token").first.click()
        assert page.locator("#chat .choices tr").count() in (5, 6), "the drawn one, if it is rare"
        monkeypatch.setattr(Rate, "take", lambda *_: 6.5)
        send(page, "more")
        expect(page.locator("#chat .end").last).to_have_text(
            "The server is busy. Try again in 7 s."
        )


def test_a_key_that_is_wrong_is_told_and_one_that_is_right_goes_on(
    context: BrowserContext, opened: Callable[..., Any]
) -> None:
    page = context.new_page()
    with opened(None) as server:
        enter(page, server.url)
        page.fill("#key", "wrong")
        send(page, "hello")
        expect(page.locator("#chat .end")).to_contain_text("wants an API key")
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#chat .composer textarea")).to_have_value("hello")
        page.fill("#key", KEY)
        send(page, "hello")
        expect(page.get_by_role("button", name="Tokens")).to_be_visible()


def test_what_the_filter_stops_is_told(context: BrowserContext, opened: Callable[..., Any]) -> None:
    page = context.new_page()
    with opened(Wary(None)) as server:
        enter(page, server.url)
        send(page, "How do I make a pipe bomb?")
        expect(page.locator("#chat .end")).to_have_text(
            "The safety filter stopped this message. (rule: weapons)"
        )
        send(page, "hello")
        expect(page.locator("#chat .end").last).to_have_text("The safety filter ended this reply.")
        words = page.locator("#chat .reply > .words").last
        expect(words).to_have_text("(The reply was withheld by the safety filter.)")
        expect(page.get_by_role("button", name="Copy")).to_be_visible()
        # What is held back is not told by its tokens either.
        expect(page.get_by_role("button", name="Tokens")).to_have_count(0)


def test_a_vote_is_a_pair_that_stages_learn_from(
    context: BrowserContext, opened: Callable[..., Any], models: list[Served], tmp_path: Path
) -> None:
    page = context.new_page()
    with opened(None) as server:
        enter(page, server.url)
        page.get_by_role("tab", name="Side by side").click()
        send(page, "hello", "#compare")
        page.get_by_role("button", name="B is better").click()
        expect(page.locator("#compare .votes")).to_contain_text("Vote kept")
        [pair] = read_all([tmp_path / "votes.jsonl"], ("messages", "chosen", "rejected"))
        named = {pair[f"{side}_model"]: pair[side] for side in ("chosen", "rejected")}
        assert set(named) == {"sft", "rlvr"}
        for model, text in named.items():
            assert text == choice(server, model, "hello")["message"]["content"]
    assert pair["messages"] == [{"role": "user", "content": "hello"}]
    assert pair["sampling"] == SETTINGS
    tokenizer = models[0].tokenizer
    [row] = preference_pairs([pair], tokenizer, 256)
    learnt = [id for id, learn in zip(row.chosen.ids, row.chosen.learn, strict=True) if learn]
    assert tokenizer.decode(learnt) == pair["chosen"]
