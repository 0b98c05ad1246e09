"""The web app: endpoints, and around them what guards and counts them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp, Receive, Scope, Send

from instar import __version__
from instar.serving import chat_api, completions_api, small_api
from instar.serving.asking import Bounds, Server
from instar.serving.errors import handle_errors
from instar.serving.limits import Door, Rate
from instar.serving.metrics import Counted
from instar.serving.safety import Filter
from instar.serving.served import Served
from instar.serving.worker import Worker

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names by which a machine calls itself."""


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how much.

    Attributes:
        keys: Keys that are accepted; with none, no key is asked for.
        origins: Web pages of these origins may ask from a browser; ``*`` is any.
        hosts: Names of this server that are answered to; with none, any.
        per_minute: Requests a minute for each key or address; 0 for any number.
        most_bytes: The largest body.
        most_open: The most replies that are being written or wait.
        bounds: How much one request may ask for.
    """

    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ()
    per_minute: int = 0
    most_bytes: int = 4 << 20
    most_open: int = 256
    bounds: Bounds = field(default_factory=Bounds)


class Heads:
    """Answers HEAD, which those who watch a server ask, like GET.

    The body is left out by the server that sends the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI asks."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


def create_app(
    models: Sequence[Served],
    rules: Rules,
    screen: Filter | None = None,
    parts: Sequence[Callable[[FastAPI], None]] = (),
) -> FastAPI:
    """The app that serves models.

    Args:
        models: At least one; the first is meant where a request names none.
        rules: Who may ask, and how much.
        screen: Reads what is asked and answered, if there is one.
        parts: Put more into the app, such as a page to talk to.
    """
    engines = list({id(model.engine): model.engine for model in models}.values())
    worker = Worker(engines, rules.most_open)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    # The pages that FastAPI would write on its own fetch scripts from elsewhere.
    app = FastAPI(
        title="instar", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.server = Server(models, worker, rules.bounds, screen)
    for api in (chat_api, completions_api, small_api):
        app.include_router(api.router)
    handle_errors(app)
    for part in parts:
        part(app)
    app.openapi = lambda: _description(app)
    # The last one added is the first to see a request.
    rate = Rate(rules.per_minute)
    app.add_middleware(
        Door,
        keys=rules.keys,
        hosts=rules.hosts,
        origins=rules.origins,
        rate=rate,
        most_bytes=rules.most_bytes,
    )
    if rules.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(Counted, metrics=app.state.server.metrics)
    app.add_middleware(Heads)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: as FastAPI writes it, without the 422 that we never answer."""
    if not app.openapi_schema:
        written = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in written["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            written["components"]["schemas"].pop(name, None)
        app.openapi_schema = written
    return app.openapi_schema
