"""Conversations on the page: with one stage, and with two side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from instar.data.readers import read_all


def test_a_reply_streams_in_and_the_conversation_goes_on(
    page: Page, server: Any, send: Any, words: Any
):
    send("hello")
    expect(words()).to_have_text("sft says hello.\nBye")
    assert page.input_value("#chat .composer textarea") == ""
    expect(page.locator("#chat .composer textarea")).to_be_focused()
    send("you")
    expect(words()).to_have_text("sft says you.\nBye")
    said = [message["content"] for message in server.asked[-1]["messages"]]
    assert said == ["hello", "sft says hello.\nBye", "you"]
    # Read out sentence by sentence.
    expect(page.locator("#spoken")).to_contain_text("sft says you.")
    page.select_option("#chat .model", "dpo")
    page.get_by_role("button", name="Again").click()
    expect(words()).to_have_text("dpo says you.\nBye")
    assert [m["content"] for m in server.asked[-1]["messages"]] == said
    page.click("#chat .fresh")
    expect(page.locator("#chat .reply")).to_have_count(0)
    send("new")
    expect(words()).to_contain_text("says new")
    assert len(server.asked[-1]["messages"]) == 1


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, server: Any, words: Any):
    box = page.locator("#chat .composer textarea")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    expect(box).to_have_value("one\ntwo")  # what is sent leaves the box
    box.press("Enter")
    expect(page.locator("#chat .asked .words")).to_have_text("one\ntwo")
    expect(words()).to_contain_text("Bye")
    # The Enter that ends a word of an input method does not send.
    box.fill("你")
    box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(box).to_have_value("你")
    box.press("Enter")
    expect(words()).to_contain_text("says 你")
    assert len(server.asked) == 2


def test_a_reply_can_be_stopped(page: Page, server: Any, send: Any, words: Any):
    before = server.left
    send("endless")
    expect(words()).to_contain_text("on and on on and on")
    assert page.locator("#chat .reply").get_attribute("aria-busy") == "true"
    expect(page.locator("#chat .send")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#chat .end")).to_have_text("Stopped.")
    expect(page.locator("#chat .send")).to_be_visible()
    for _ in range(100):
        if server.left > before:
            break
        time.sleep(0.05)
    assert server.left == before + 1, "the server goes on writing for nobody"
    send("next")
    expect(words()).to_contain_text("says next")
    assert server.asked[-1]["messages"][1]["content"].startswith("on and on")


def test_a_new_conversation_ends_the_reply_of_the_old_one(
    page: Page, server: Any, send: Any, words: Any
):
    send("endless")
    expect(words()).to_contain_text("on and on")
    page.click("#chat .fresh")
    send("fresh")
    expect(words()).to_contain_text("says fresh")
    assert len(server.asked[-1]["messages"]) == 1
    expect(page.locator("#chat .reply")).to_have_count(1)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("busy", "The server is busy. Try again in 7 s."),
        ("harm", "The safety filter stopped this message. (rule: theft)"),
        ("odd", "Something odd <b>happened</b>."),
        ("broken", "The connection broke before the reply was finished."),
        ("garbled", "The connection broke before the reply was finished."),
        ("cut", "Cut off: the reply is as long as it may be."),
    ],
)
def test_what_goes_wrong_is_said_in_words(page: Page, said: str, told: str, send: Any):
    send(said)
    expect(page.locator("#chat .end")).to_have_text(told)
    # A message that came to nothing is given back, to be mended.
    back = "" if said in ("broken", "cut") else said
    expect(page.locator("#chat .composer textarea")).to_have_value(back)
    expect(page.locator("#chat .send")).to_be_visible()


def test_a_server_that_is_gone_is_said_so(page: Page, send: Any):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send("hello")
    expect(page.locator("#chat .end")).to_contain_text("cannot be reached")


def test_a_key_is_asked_for_and_sent(page: Page, server: Any, send: Any, words: Any):
    send("locked")
    expect(page.locator("#chat .end")).to_contain_text("wants an API key")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "secret")
    send("hello")
    expect(words()).to_contain_text("says hello")
    assert server.keys[-1] == "Bearer secret"
    assert "secret" not in page.evaluate("() => JSON.stringify(localStorage)")


@pytest.fixture
def talk(page: Page, send: Any, words: Any) -> Callable[[list[str]], None]:
    """Says one thing after the other, each when the reply to the last is at its end."""

    def act(said: list[str]) -> None:
        for text in said:
            send(text)
            expect(words()).to_contain_text(f"says {text}")
            expect(page.locator("#chat .send")).to_be_visible()

    return act


def told(asked: dict[str, Any]) -> list[str]:
    return [m["content"] for m in asked["messages"] if m["role"] == "user"]


def test_room_for_a_reply_is_made_by_forgetting_and_said_so(page: Page, server: Any, talk: Any):
    talk(["m0"])
    assert server.counted == [], "there is nothing to forget yet"
    # 25 of 100 tokens are kept for the reply: of turns of 15 there fit five.
    talk(["m1", "m2"])
    assert told(server.asked[-1]) == ["m0", "m1", "m2"]
    expect(page.locator("#chat .note")).to_have_count(0)
    talk(["m3"])
    expect(page.locator("#chat .note")).to_contain_text("oldest exchange is forgotten")
    assert told(server.asked[-1]) == ["m1", "m2", "m3"]
    assert server.counted[-1]["messages"] == server.asked[-1]["messages"]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("10")  # a short reply leaves room for one turn more
    page.get_by_label("Instructions before the conversation").fill("Be brief.")
    talk(["m4"])
    assert told(server.asked[-1]) == ["m2", "m3", "m4"]
    assert server.asked[-1]["messages"][0]["role"] == "system"
    expect(page.locator("#chat .note")).to_have_count(2)


def test_of_two_models_the_one_with_less_context_decides(page: Page, server: Any, send: Any):
    page.get_by_role("tab", name="Side by side").click()
    for i in range(4):
        send(f"m{i}", "#compare")
        page.get_by_role("button", name="A is better").last.click()
        expect(page.locator("#compare .better")).to_have_count(i + 1)
    assert {asked["model"] for asked in server.asked[-2:]} == {"sft", "dpo"}
    assert [told(asked) for asked in server.asked[-2:]] == [["m1", "m2", "m3"]] * 2


def test_a_message_that_cannot_be_counted_is_sent_all_the_same(page: Page, server: Any, talk: Any):
    talk(["m0", "uncounted"])
    assert told(server.asked[-1]) == ["m0", "uncounted"]


def test_a_proxys_page_in_place_of_a_count_stops_nothing(page: Page, server: Any, talk: Any):
    page.route("**/tokenize", lambda route: route.fulfill(body="<html>502 Bad Gateway</html>"))
    talk(["m0", "m1"])
    assert told(server.asked[-1]) == ["m0", "m1"]


def test_sampling_settings_are_sent_kept_and_reset(page: Page, server: Any, send: Any, words: Any):
    send("a")
    expect(words()).to_contain_text("says a")
    plain = {"model", "messages", "temperature", "max_tokens", "stream", "logprobs", "top_logprobs"}
    assert server.asked[-1].keys() == plain
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Top k").fill("5")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Instructions before the conversation").fill("Be brief.")
    page.get_by_label("Record each token's probability").uncheck()
    page.reload()
    page.wait_for_selector("#chat .model option", state="attached")
    send("b")
    expect(words()).to_contain_text("says b")
    asked = server.asked[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {**asked, "top_k": 5, "seed": 3, "temperature": 0} == asked
    assert "logprobs" not in asked
    expect(page.get_by_role("button", name="Tokens")).to_have_count(0)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the beginning").click()
    send("c")
    expect(words()).to_contain_text("says c")
    assert server.asked[-1].keys() == plain


def test_a_value_between_two_steps_is_sent_and_a_wrong_one_is_marked(
    page: Page, server: Any, send: Any, words: Any
):
    page.get_by_role("button", name="Settings").click()
    for label, value in (("Temperature", "0.75"), ("Top p", "0.92"), ("Min p", "0.02")):
        page.get_by_label(label).fill(value)
        expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "false")
    send("a")
    expect(words()).to_contain_text("Bye")
    chosen = {"temperature": 0.75, "top_p": 0.92, "min_p": 0.02}
    assert server.asked[-1].items() >= chosen.items()
    for label, value in (("Temperature", "3"), ("Top k", "1.5"), ("Seed", "-1"), ("Min p", "-")):
        page.get_by_label(label).fill("")
        page.get_by_label(label).press_sequentially(value)
        expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    send("b")
    expect(words()).to_contain_text("says b")
    assert server.asked[-1]["temperature"] == 0.7
    assert not server.asked[-1].keys() & {"top_k", "seed", "min_p"}


def test_a_vote_is_kept_as_a_pair_and_the_better_reply_goes_on(
    page: Page, server: Any, votes: Path, send: Any
):
    votes.unlink(missing_ok=True)
    page.get_by_role("tab", name="Side by side").click()
    send("hello", "#compare")
    cards = page.locator("#compare .reply")
    expect(cards).to_have_count(2)
    expect(cards.nth(1)).to_contain_text("Bye")
    # Nobody is told who said what before the vote.
    assert [card.locator(".who").inner_text() for card in cards.all()] == ["A", "B"]
    page.get_by_role("button", name="B is better").click()
    expect(page.locator("#compare .votes")).to_contain_text("Vote kept")
    better = cards.nth(1).locator(".words").inner_text()
    worse = cards.nth(0).locator(".words").inner_text()
    [pair] = read_all([votes], ("messages", "chosen", "rejected"))
    assert pair["messages"] == [{"role": "user", "content": "hello"}]
    assert (pair["chosen"], pair["rejected"]) == (better, worse)
    assert better.startswith(pair["chosen_model"])
    assert cards.nth(1).locator(".who").inner_text() == f"B · {pair['chosen_model']}"
    send("more", "#compare")
    expect(cards).to_have_count(4)
    expect(cards.nth(3)).to_contain_text("Bye")
    for asked in server.asked[-2:]:
        assert [m["content"] for m in asked["messages"]] == ["hello", better, "more"]
    # No message without a vote; and a turn can be taken back.
    send("eager", "#compare")
    expect(page.locator("#compare .votes").last).to_contain_text("Vote first")
    page.fill("#compare .composer textarea", "")
    page.get_by_role("button", name="Neither").click()
    expect(cards).to_have_count(2)
    expect(page.locator("#compare .composer textarea")).to_have_value("more")
    assert len(read_all([votes], ("messages",))) == 1


def test_a_vote_says_how_the_replies_were_asked_for(page: Page, votes: Path, send: Any):
    votes.unlink(missing_ok=True)
    page.get_by_role("tab", name="Side by side").click()
    send("hello", "#compare")
    expect(page.get_by_role("button", name="A is better")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.1")
    page.get_by_label("Instructions before the conversation").fill("Be brief.")
    page.get_by_role("button", name="A is better").click()
    expect(page.locator("#compare .votes")).to_contain_text("Vote kept")
    [pair] = read_all([votes], ("messages", "chosen", "rejected"))
    assert pair["messages"] == [{"role": "user", "content": "hello"}]
    assert pair["sampling"]["temperature"] == 0.7


def test_equal_replies_are_no_vote(page: Page, votes: Path, send: Any):
    votes.unlink(missing_ok=True)
    page.get_by_role("tab", name="Side by side").click()
    send("same", "#compare")
    expect(page.locator("#compare .votes")).to_contain_text("Both say the same")
    page.get_by_role("button", name="Go on").click()
    assert not votes.exists()


def test_a_conversation_can_be_copied_and_downloaded(
    page: Page, context: BrowserContext, tmp_path, send: Any, words: Any
):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    send("hello")
    expect(words()).to_contain_text("Bye")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "sft says hello.\nBye"
    with page.expect_download() as download:
        page.click("#chat .download")
    download.value.save_as(tmp_path / "conversation.json")
    [record] = read_all([tmp_path / "conversation.json"], ("messages",))
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
