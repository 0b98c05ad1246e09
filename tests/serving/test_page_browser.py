"""The page in a real browser, against a server that says what the book tells it to."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")
pytest.importorskip("fastapi")

import uvicorn
from fastapi import FastAPI, Request
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from starlette.responses import JSONResponse, StreamingResponse

from instar.data.readers import read_all
from instar.serving.limits import Door, Rate
from instar.serving.page import mount

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
CONTEXT = 100
"""The stand-in's context, in tokens."""

TURN_TOKENS = 15
"""What the stand-in takes every message for."""


class StandIn:
    """Speaks OpenAI's API, and remembers what it was asked."""

    def __init__(self, votes: Path, run: Path) -> None:
        self.asked: list[dict[str, Any]] = []
        self.counted: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.left = 0
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/tokenize")(self.tokenize)
        mount(self.app, {"sft": run / "sft", "dpo": run / "dpo", "lone": run.parent}, votes)
        # As in front of a server, so that the page's own requests are seen to pass.
        self.app.add_middleware(
            Door, keys=(), hosts=(), origins=(), rate=Rate(0), most_bytes=1 << 20
        )

    async def models(self, request: Request) -> Any:
        if request.headers.get("referer", "").endswith("locked"):
            return error(401, "invalid_api_key", "no key")
        return {"data": [{"id": name} for name in ("sft", "dpo", "lone")]}

    async def tokenize(self, request: Request) -> Any:
        self.counted.append(await request.json())
        if self.counted[-1]["messages"][-1]["content"] == "uncounted":
            return error(500, None, "no")
        length = CONTEXT * 2 if self.counted[-1]["model"] == "dpo" else CONTEXT
        count = TURN_TOKENS * len(self.counted[-1]["messages"])
        return {"tokens": [0] * count, "count": count, "max_model_len": length}

    async def chat(self, request: Request) -> Any:
        asked = await request.json()
        self.asked.append(asked)
        self.keys.append(request.headers.get("authorization"))
        text = asked["messages"][-1]["content"]
        match text.split():
            case ["busy"]:
                return error(429, "rate_limit_exceeded", "no", {"Retry-After": "7"})
            case ["locked"]:
                return error(401, "invalid_api_key", "no key")
            case ["harm"]:
                return error(400, "content_filter", "stopped by the safety filter: rule: theft")
            case ["odd"]:
                return error(500, None, "Something odd <b>happened</b>.")
        return StreamingResponse(self.words(asked, text), media_type="text/event-stream")

    async def words(self, asked: dict[str, Any], text: str) -> AsyncIterator[str]:
        yield chunk({"role": "assistant", "content": ""})
        try:
            if text == "endless":
                while True:
                    await asyncio.sleep(0.02)
                    yield chunk({"content": "on and on "})
            if text == "think":
                yield chunk({"reasoning_content": "Hm."})
            for token in tokens_of(asked["model"], text):
                recorded = [token] if asked.get("logprobs") else None
                yield chunk({"content": token["said"]}, recorded)
                await asyncio.sleep(0.005)
        finally:
            self.left += 1
        if text == "broken":
            return
        yield chunk({}, finish="length" if text == "cut" else "stop")
        yield "data: [DONE]\n\n"


def error(status: int, code: str | None, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers)


def chunk(delta: dict[str, str], tokens: Any = None, finish: str | None = None) -> str:
    logprobs = {"content": tokens} if tokens else None
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def token(content: bytes, share: float, said: str = "") -> dict[str, Any]:
    text = content.decode(errors="replace")
    return {"token": text, "bytes": list(content), "logprob": math.log(share), "said": said}


def tokens_of(model: str, text: str) -> list[dict[str, Any]]:
    """What is said to a message: canned, with alternatives."""
    if text == "中":
        # A character in two pieces, as small vocabularies have them.
        first, last = token(b"\xe9\xbe", 0.5), token(b"\x84", 0.9, "龄")
        last["top_logprobs"] = [dict(last), token(b"\x85", 0.1)]
        return [first, last, token("。".encode(), 1.0, "。")]
    words = [EVIL] if text == "html" else [f"{model}", " says", f" {text}.", "\nBye"]
    if text == "same":
        words = ["Equal."]
    if text == "many":
        words = [f"line {i}\n" for i in range(80)]
    made = [token(word.encode(), 0.6, word) for word in words]
    for each in made:
        each["top_logprobs"] = [dict(each), token(b" other", 0.3), token(EVIL.encode(), 0.1)]
    return made


class Thread(uvicorn.Server):
    """A server in a thread, at a free port."""

    def __init__(self, app: FastAPI) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        super().__init__(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve([self.socket])))

    def __enter__(self) -> Thread:
        self.thread.start()
        while not self.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, votes: Path) -> Iterator[StandIn]:
    run = tmp_path_factory.mktemp("life") / "run"
    for stage in ("sft", "dpo"):
        (run / stage).mkdir(parents=True)
    html = '<p id="top"><a href="#end">down</a></p><script>parent.document.title="owned"</script>'
    html += '<p style="margin-top: 4000px" id="end">The end</p>'
    (run / "report.html").write_text(html, encoding="utf-8")
    made = StandIn(votes, run)
    with Thread(made.app) as thread:
        made.url = thread.url  # type: ignore[attr-defined]
        yield made


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(locale="en-GB", accept_downloads=True)
    made.set_default_timeout(10_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, server: StandIn) -> Iterator[Page]:
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    server.asked.clear()
    server.counted.clear()
    page.goto(server.url)  # type: ignore[attr-defined]
    page.wait_for_selector("#chat .model option", state="attached")
    yield page
    assert wrong == []
    home = (server.url, "blob:", "data:")  # type: ignore[attr-defined]
    assert [url for url in asked if not url.startswith(home)] == []


def send(page: Page, text: str, panel: str = "#chat") -> None:
    page.fill(f"{panel} .composer textarea", text)
    page.press(f"{panel} .composer textarea", "Enter")


def words(page: Page, panel: str = "#chat") -> Any:
    return page.locator(f"{panel} .reply > .words").last


def test_a_reply_streams_in_and_the_conversation_goes_on(page: Page, server: StandIn):
    send(page, "hello")
    expect(words(page)).to_have_text("sft says hello.\nBye")
    assert page.input_value("#chat .composer textarea") == ""
    expect(page.locator("#chat .composer textarea")).to_be_focused()
    send(page, "you")
    expect(words(page)).to_have_text("sft says you.\nBye")
    said = [message["content"] for message in server.asked[-1]["messages"]]
    assert said == ["hello", "sft says hello.\nBye", "you"]
    # Read out sentence by sentence.
    expect(page.locator("#spoken")).to_contain_text("sft says you.")
    page.select_option("#chat .model", "dpo")
    page.get_by_role("button", name="Again").click()
    expect(words(page)).to_have_text("dpo says you.\nBye")
    assert [m["content"] for m in server.asked[-1]["messages"]] == said
    page.click("#chat .fresh")
    expect(page.locator("#chat .reply")).to_have_count(0)
    send(page, "new")
    expect(words(page)).to_contain_text("says new")
    assert len(server.asked[-1]["messages"]) == 1


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, server: StandIn):
    box = page.locator("#chat .composer textarea")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert server.asked == []
    box.press("Enter")
    expect(page.locator("#chat .asked .words")).to_have_text("one\ntwo")
    expect(words(page)).to_contain_text("Bye")
    # The Enter that ends a word of an input method does not send.
    box.fill("你")
    box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert len(server.asked) == 1


@pytest.mark.parametrize("view", ["words", "tokens"])
def test_words_of_models_are_text_and_never_html(page: Page, view: str):
    send(page, "html")
    expect(words(page)).to_have_text(EVIL)
    if view == "tokens":
        page.get_by_role("button", name="Tokens").click()
        page.locator("#chat .token").first.click()
        expect(page.locator("#chat .choices")).to_contain_text("<script>")
    assert page.locator("#chat .reply img, #chat .reply script").count() == 0
    page.wait_for_timeout(100)
    assert page.title() == "instar"


def test_the_policy_runs_no_script_but_the_pages_own(page: Page):
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
        }"""
    )
    page.wait_for_timeout(100)
    assert page.title() == "instar"
    assert any("Content Security Policy" in text for text in blocked)


def test_a_reply_can_be_stopped(page: Page, server: StandIn):
    before = server.left
    send(page, "endless")
    expect(words(page)).to_contain_text("on and on on and on")
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
    send(page, "next")
    expect(words(page)).to_contain_text("says next")
    assert server.asked[-1]["messages"][1]["content"].startswith("on and on")


def test_a_new_conversation_ends_the_reply_of_the_old_one(page: Page, server: StandIn):
    send(page, "endless")
    expect(words(page)).to_contain_text("on and on")
    page.click("#chat .fresh")
    send(page, "fresh")
    expect(words(page)).to_contain_text("says fresh")
    assert len(server.asked[-1]["messages"]) == 1
    expect(page.locator("#chat .reply")).to_have_count(1)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("busy", "The server is busy. Try again in 7 s."),
        ("harm", "The safety filter stopped this message. (rule: theft)"),
        ("odd", "Something odd <b>happened</b>."),
        ("broken", "The connection broke before the reply was finished."),
        ("cut", "Cut off: the reply is as long as it may be."),
    ],
)
def test_what_goes_wrong_is_said_in_words(page: Page, said: str, told: str):
    send(page, said)
    expect(page.locator("#chat .end")).to_have_text(told)
    # A message that came to nothing is given back, to be mended.
    back = "" if said in ("broken", "cut") else said
    expect(page.locator("#chat .composer textarea")).to_have_value(back)


def test_a_server_that_is_gone_is_said_so(page: Page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "hello")
    expect(page.locator("#chat .end")).to_contain_text("cannot be reached")


def test_a_key_is_asked_for_and_sent(page: Page, server: StandIn):
    send(page, "locked")
    expect(page.locator("#chat .end")).to_contain_text("wants an API key")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "secret")
    send(page, "hello")
    expect(words(page)).to_contain_text("says hello")
    assert server.keys[-1] == "Bearer secret"
    assert "secret" not in page.evaluate("() => JSON.stringify(localStorage)")


def talk(page: Page, said: list[str]) -> None:
    for text in said:
        send(page, text)
        expect(words(page)).to_contain_text(f"says {text}")
        expect(page.locator("#chat .send")).to_be_visible()  # the reply is at its end


def told(asked: dict[str, Any]) -> list[str]:
    return [m["content"] for m in asked["messages"] if m["role"] == "user"]


def test_room_for_a_reply_is_made_by_forgetting_and_said_so(page: Page, server: StandIn):
    talk(page, ["m0"])
    assert server.counted == [], "there is nothing to forget yet"
    # 25 of 100 tokens are kept for the reply: of turns of 15 there fit five.
    talk(page, ["m1", "m2"])
    assert told(server.asked[-1]) == ["m0", "m1", "m2"]
    expect(page.locator("#chat .note")).to_have_count(0)
    talk(page, ["m3"])
    expect(page.locator("#chat .note")).to_contain_text("oldest exchange is forgotten")
    assert told(server.asked[-1]) == ["m1", "m2", "m3"]
    assert server.counted[-1]["messages"] == server.asked[-1]["messages"]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("10")  # a short reply leaves room for one turn more
    page.get_by_label("Instructions before the conversation").fill("Be brief.")
    talk(page, ["m4"])
    assert told(server.asked[-1]) == ["m2", "m3", "m4"]
    assert server.asked[-1]["messages"][0]["role"] == "system"
    expect(page.locator("#chat .note")).to_have_count(2)


def test_of_two_models_the_one_with_less_context_decides(page: Page, server: StandIn):
    page.get_by_role("tab", name="Side by side").click()
    for i in range(4):
        send(page, f"m{i}", "#compare")
        page.get_by_role("button", name="A is better").last.click()
        expect(page.locator("#compare .better")).to_have_count(i + 1)
    assert {asked["model"] for asked in server.asked[-2:]} == {"sft", "dpo"}
    assert [told(asked) for asked in server.asked[-2:]] == [["m1", "m2", "m3"]] * 2


def test_a_message_that_cannot_be_counted_is_sent_all_the_same(page: Page, server: StandIn):
    talk(page, ["m0", "uncounted"])
    assert told(server.asked[-1]) == ["m0", "uncounted"]


def test_sampling_settings_are_sent_kept_and_reset(page: Page, server: StandIn):
    send(page, "a")
    expect(words(page)).to_contain_text("says a")
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
    send(page, "b")
    expect(words(page)).to_contain_text("says b")
    asked = server.asked[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {**asked, "top_k": 5, "seed": 3, "temperature": 0} == asked
    assert "logprobs" not in asked
    expect(page.get_by_role("button", name="Tokens")).to_have_count(0)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the beginning").click()
    send(page, "c")
    expect(words(page)).to_contain_text("says c")
    assert server.asked[-1].keys() == plain


def test_a_value_between_two_steps_is_sent_and_a_wrong_one_is_marked(page: Page, server: StandIn):
    page.get_by_role("button", name="Settings").click()
    for label, value in (("Temperature", "0.75"), ("Top p", "0.92"), ("Min p", "0.02")):
        page.get_by_label(label).fill(value)
        expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "false")
    send(page, "a")
    expect(words(page)).to_contain_text("Bye")
    chosen = {"temperature": 0.75, "top_p": 0.92, "min_p": 0.02}
    assert server.asked[-1].items() >= chosen.items()
    for label, value in (("Temperature", "3"), ("Top k", "1.5"), ("Seed", "-1"), ("Min p", "-")):
        page.get_by_label(label).fill("")
        page.get_by_label(label).press_sequentially(value)
        expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    send(page, "b")
    expect(words(page)).to_contain_text("says b")
    assert server.asked[-1]["temperature"] == 0.7
    assert not server.asked[-1].keys() & {"top_k", "seed", "min_p"}


def test_tokens_show_their_probability_and_alternatives_by_keyboard(page: Page):
    send(page, "hello")
    expect(words(page)).to_contain_text("Bye")
    button = page.get_by_role("button", name="Tokens")
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    tokens = page.locator("#chat .token")
    expect(tokens).to_have_count(4)
    assert tokens.nth(1).get_attribute("aria-label") == " says 60.0 %"
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    rows = page.locator("#chat .choices tr")
    assert rows.nth(0).inner_text().split() == ["␣says", "60.0", "%"]
    assert rows.nth(1).inner_text().split() == ["␣other", "30.0", "%"]
    assert rows.nth(0).get_attribute("class") == "drawn"
    page.keyboard.press("End")
    expect(tokens.nth(3)).to_be_focused()
    button.press("Enter")
    expect(words(page)).to_have_text("sft says hello.\nBye")


def test_a_character_in_pieces_is_shown_where_it_is_complete(page: Page):
    send(page, "中")
    expect(words(page)).to_have_text("龄。")
    page.get_by_role("button", name="Tokens").click()
    assert page.locator("#chat .token").all_inner_texts() == ["·", "龄", "。"]
    page.locator("#chat .token").nth(1).click()
    rows = [row.split() for row in page.locator("#chat .choices tr").all_inner_texts()]
    assert rows == [["龄", "90.0", "%"], ["龅", "10.0", "%"]]


def test_a_vote_is_kept_as_a_pair_and_the_better_reply_goes_on(
    page: Page, server: StandIn, votes: Path
):
    votes.unlink(missing_ok=True)
    page.get_by_role("tab", name="Side by side").click()
    send(page, "hello", "#compare")
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
    send(page, "more", "#compare")
    expect(cards).to_have_count(4)
    expect(cards.nth(3)).to_contain_text("Bye")
    for asked in server.asked[-2:]:
        assert [m["content"] for m in asked["messages"]] == ["hello", better, "more"]
    # No message without a vote; and a turn can be taken back.
    send(page, "eager", "#compare")
    expect(page.locator("#compare .votes").last).to_contain_text("Vote first")
    page.fill("#compare .composer textarea", "")
    page.get_by_role("button", name="Neither").click()
    expect(cards).to_have_count(2)
    expect(page.locator("#compare .composer textarea")).to_have_value("more")
    assert len(read_all([votes], ("messages",))) == 1


def test_equal_replies_are_no_vote(page: Page, votes: Path):
    votes.unlink(missing_ok=True)
    page.get_by_role("tab", name="Side by side").click()
    send(page, "same", "#compare")
    expect(page.locator("#compare .votes")).to_contain_text("Both say the same")
    page.get_by_role("button", name="Go on").click()
    assert not votes.exists()


def test_the_language_is_the_browsers_and_can_be_changed(browser: Browser, server: StandIn):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server.url)  # type: ignore[attr-defined]
    expect(page.get_by_role("button", name="发送")).to_be_visible()
    assert page.get_attribute("html", "lang") == "zh-CN"
    send(page, "hello")
    expect(page.get_by_role("button", name="词元")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("button", name="Tokens")).to_be_visible()
    page.reload()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    context.close()


def test_a_conversation_can_be_copied_and_downloaded(page: Page, context: BrowserContext, tmp_path):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    send(page, "hello")
    expect(words(page)).to_contain_text("Bye")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "sft says hello.\nBye"
    with page.expect_download() as download:
        page.click("#chat .download")
    download.value.save_as(tmp_path / "conversation.json")
    [record] = read_all([tmp_path / "conversation.json"], ("messages",))
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"]


def test_a_long_reply_keeps_its_end_in_view_unless_one_reads_above(page: Page):
    send(page, "many")
    expect(words(page)).to_contain_text("line 79")
    place = "() => { const l = document.querySelector('#chat .log');"
    assert page.evaluate(place + "return l.scrollHeight - l.scrollTop - l.clientHeight }") < 80
    page.evaluate(place + "l.scrollTop = 0 }")
    expect(page.get_by_role("button", name="Newest")).to_be_visible()
    page.get_by_role("button", name="Newest").click()
    expect(page.get_by_role("button", name="Newest")).to_be_hidden()
    assert page.evaluate("() => document.documentElement.scrollHeight <= innerHeight")


def test_the_report_is_shown_and_may_run_nothing(page: Page):
    page.get_by_role("tab", name="Report").click()
    frame = page.frame_locator("#report iframe")
    frame.get_by_text("down").click()
    expect(frame.get_by_text("The end")).to_be_in_viewport()
    assert page.title() == "instar"
    page.select_option("#report .model", "lone")
    expect(page.locator("#report .note")).to_contain_text("No report lies beside")


def test_thoughts_are_folded(page: Page):
    send(page, "think")
    expect(words(page)).to_contain_text("Bye")
    thought = page.locator("#chat .thought")
    expect(thought.locator(".words")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator(".words")).to_have_text("Hm.")


def test_tabs_are_reached_by_arrow_keys_and_every_field_has_a_name(page: Page):
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Side by side")).to_be_focused()
    expect(page.locator("#compare")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
            .filter((e) => !(e.labels?.length && e.labels[0].textContent.trim())
                && !e.ariaLabel && !e.textContent.trim()).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_is_wider_than_the_window(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 700})
    for panel, tab in (("#chat", "Chat"), ("#compare", "Side by side")):
        page.get_by_role("tab", name=tab).click()
        send(page, "w" * 300, panel)
        expect(words(page, panel)).to_contain_text("Bye")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        inside = "(log) => log.scrollWidth <= log.clientWidth"
        assert page.locator(f"{panel} .log").evaluate(inside)
