"""The page to talk to: one file of HTML that asks the server it came from, and nobody else.

Its parts lie in ``page/``, to be read; they are put together when the server starts. Nothing is
fetched from elsewhere, and the page's own policy (a header) forbids it to: even words of a model
that found their way into the page as HTML could not run, nor call home.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse

from instar.data.schema import Message
from instar.errors import UserError
from instar.files import whole_lines
from instar.serving.asking import ERRORS
from instar.serving.errors import ApiError
from instar.serving.openai_types import Wanted
from instar.tokenizer.chat import check_messages

SCRIPTS = ("words.js", "server.js", "tokens.js", "markdown.js", "talk.js", "page.js")
"""The page's scripts, in the order in which they are read."""

GROUP = "votes"
"""What the pairs of people's votes say they belong to."""


LONGEST = 100_000
"""The most characters of a reply that is voted on."""


class Turn(Wanted):
    """One turn of the conversation that both replies answer."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


class Vote(Wanted):
    """Two replies to one conversation, and which is better."""

    messages: list[Turn] = Field(min_length=1, max_length=4096)
    """The conversation; it ends with the user."""
    chosen: str = Field(min_length=1, max_length=LONGEST)
    """The better reply."""
    rejected: str = Field(min_length=1, max_length=LONGEST)
    """The other one."""
    chosen_model: str | None = Field(None, max_length=256)
    """Who wrote the better one."""
    rejected_model: str | None = Field(None, max_length=256)
    """Who wrote the other."""
    sampling: dict[str, int | float] | None = Field(None, max_length=32)
    """How tokens were chosen."""


class Kept(BaseModel):
    """The answer of ``/votes``: how many there are by now."""

    votes: int


class VoteBox:
    """A file of preference pairs, in the words of ``instar.data.schema``, that votes add to.

    ``instar reward`` and ``instar dpo`` read it as it is.

    Args:
        path: The file; half a line at its end, left by a kill, is cut off.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._lock, self.count = path, Lock(), whole_lines(path)

    def add(self, vote: Vote) -> int:
        """Write a vote down; returns how many there are then.

        Raises:
            ApiError: It prefers nothing, or is about a conversation that cannot be.
        """
        messages = [Message(role=turn.role, content=turn.content) for turn in vote.messages]
        try:
            check_messages(messages)
        except UserError as error:
            raise ApiError(400, str(error), "wrong_conversation", "messages") from None
        if messages[-1]["role"] != "user":
            raise ApiError(400, "the conversation must end with the user", None, "messages")
        if vote.chosen.strip() == vote.rejected.strip():
            raise ApiError(400, "both replies are the same", "no_preference", "rejected")
        pair: dict[str, Any] = {
            "messages": messages,
            "chosen": vote.chosen,
            "rejected": vote.rejected,
            "group": GROUP,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        said = vote.model_dump(include={"chosen_model", "rejected_model", "sampling"})
        pair |= {name: value for name, value in said.items() if value is not None}
        with self._lock, self.path.open("a", encoding="utf-8", errors="replace") as stream:
            stream.write(json.dumps(pair, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            self.count += 1
            return self.count


def report_of(directory: Path) -> Path | None:
    """The report of the life that a checkpoint belongs to, if there is one."""
    places = (directory / "report.html", directory.resolve().parent / "report.html")
    return next((place for place in places if place.is_file()), None)


def page_html(facts: Mapping[str, Any]) -> tuple[str, str]:
    """The whole page, and the policy that it is served with.

    Args:
        facts: What the page is told of its server: whether ``votes`` are kept, and which models
            have ``reports``.
    """
    folder = files("instar.serving") / "page"
    html = (folder / "index.html").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    told = json.dumps(facts).replace("<", "\\u003c")  # no name of a model ends the element
    for place, content in (
        ("look.css", (folder / "look.css").read_text(encoding="utf-8")),
        ("facts", told),
        ("script", script),
    ):
        html = html.replace("{{" + place + "}}", content)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; frame-src blob:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def mount(app: FastAPI, runs: Mapping[str, Path], votes: Path | None) -> None:
    """Put the page at ``/``, votes at ``POST /votes`` and reports at ``GET /report``.

    Args:
        app: Serves OpenAI's API besides, which the page talks to.
        runs: The directory of each model, by its name.
        votes: Where votes are kept; with None they are not.

    Raises:
        OSError: The votes' file cannot be written.
    """
    reports = {name: found for name, place in runs.items() if (found := report_of(place))}
    html, policy = page_html({"votes": votes is not None, "reports": list(reports)})
    box = VoteBox(votes) if votes else None

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(html, headers=headers)

    @app.get("/report", include_in_schema=False)
    def report(model: str | None = None) -> HTMLResponse:
        name = model if model is not None else next(iter(reports), "")
        if name not in reports:
            raise ApiError(404, f"no report lies beside the model {name!r}", "no_report", "model")
        # A file of the run's, not ours: should somebody open it by itself, it may run nothing.
        headers = {"Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; "}
        headers["Content-Security-Policy"] += "style-src 'unsafe-inline'"
        return HTMLResponse(reports[name].read_text(encoding="utf-8"), headers=headers)

    if box:

        @app.post("/votes", responses=ERRORS)
        def vote(vote: Vote) -> Kept:
            """Keep a vote on two replies as a preference pair."""
            return Kept(votes=box.add(vote))
