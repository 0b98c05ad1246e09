"""The page in a real browser, against a server that says what the book tells it to."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright
from starlette.responses import JSONResponse, StreamingResponse

from instar.serving.limits import Door, Rate
from instar.serving.page import mount

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
CONTEXT = 100
"""The stand-in's context, in tokens."""

TURN_TOKENS = 15
"""What the stand-in takes every message for."""


class StandIn:
    """Speaks OpenAI's API, and remembers what it was asked."""

    evil = EVIL

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
        if text == "garbled":
            yield "data: <html>502 Bad Gateway</html>\n\n"
            return
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
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
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


@pytest.fixture
def send(page: Page) -> Callable[..., None]:
    """Writes a message, and sends it."""

    def act(text: str, panel: str = "#chat") -> None:
        page.fill(f"{panel} .composer textarea", text)
        page.press(f"{panel} .composer textarea", "Enter")

    return act


@pytest.fixture
def words(page: Page) -> Callable[..., Locator]:
    """Finds the newest reply's words."""
    return lambda panel="#chat": page.locator(f"{panel} .reply > .words").last
