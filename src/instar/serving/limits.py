"""Who may ask, how often, and how much: checked before a request is read.

This is plain ASGI and stands before the app, so that it holds for every page of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instar.serving.errors import ApiError, later

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
"""What needs no key: the page asks for one itself, and those who watch the server have none."""

READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that send nothing."""

BODY_TIMEOUT_S = 60.0
"""A body that takes longer to arrive is not waited for."""

PORT = re.compile(r":\d+$")
"""The end of a ``Host`` that names a port."""

DRAINED = 16
"""A body up to so many times the limit is read and dropped before it is refused, since many
clients read no answer before they have sent everything."""


@dataclass
class Rate:
    """Requests a minute for each sender: a bucket that fills steadily and holds a minute's worth.

    Attributes:
        per_minute: How many; 0 for any number.
    """

    per_minute: int
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, sender: str, now_s: float) -> float:
        """Count a request; 0, or in how many seconds the next one is welcome."""
        if not self.per_minute:
            return 0.0
        filled, at = self._buckets.get(sender, (float(self.per_minute), now_s))
        filled = min(self.per_minute, filled + (now_s - at) * self.per_minute / 60)
        enough = filled >= 1
        self._buckets[sender] = (filled - enough, now_s)
        self._forget(now_s)
        return 0.0 if enough else (1 - filled) * 60 / self.per_minute

    def _forget(self, now_s: float) -> None:
        """Buckets that are full again by now say nothing."""
        if len(self._buckets) > 10_000:
            recent = {k: v for k, v in self._buckets.items() if now_s - v[1] < 60}
            self._buckets = recent


class Door:
    """Lets requests through that have a key, are not too many and not too large.

    Args:
        app: What stands behind it.
        keys: Keys that are accepted; with none, everybody is.
        hosts: Names of the server that are answered to; with none, any. A web page could
            otherwise give its own name our address, and ask what only this machine may.
        origins: Whose web pages may send something, besides the server's own; ``*`` is any.
        rate: How often.
        most_bytes: The largest body.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: Sequence[str],
        origins: Sequence[str],
        rate: Rate,
        most_bytes: int,
    ) -> None:
        self.app, self.hosts, self.origins = app, hosts, origins
        self.rate, self.most_bytes = rate, most_bytes
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI asks."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._called_right(scope)
            self._of_a_page_that_may(scope)
            if scope["path"] not in OPEN_PATHS:
                self._welcome(scope)
            receive = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _called_right(self, scope: Scope) -> None:
        """Check by which name the server was called."""
        said = Headers(scope=scope).get("host", "")
        name = said.rpartition(":")[0] if PORT.search(said) else said
        if self.hosts and name.lower() not in self.hosts:
            raise ApiError(
                400,
                f"this server is not called {name!r}. If it is, start it with `--name {name}`.",
                "wrong_host",
            )

    def _of_a_page_that_may(self, scope: Scope) -> None:
        """Check whose page's script sends something, if any's; what only reads, CORS sees to."""
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        known = (None, f"http://{host}", f"https://{host}", *self.origins)
        # Behind a proxy that changes the host, the browser's own word is what we have.
        own = headers.get("sec-fetch-site") == "same-origin"
        if scope["method"] in READING or own or origin in known or "*" in self.origins:
            return
        raise ApiError(
            403,
            f"web pages of {origin} may not ask this server. If they are to, start it with "
            f"`--cors {origin}`.",
            "wrong_origin",
        )

    def _welcome(self, scope: Scope) -> None:
        """Check key and rate; a wrong key counts for its sender's address, whoever else has one."""
        said = Headers(scope=scope).get("authorization", "")
        key = said[len("Bearer ") :].strip() if said.lower().startswith("bearer ") else ""
        digest, client = _digest(key), scope.get("client")
        # Every key is compared, in constant time: how long it takes says nothing.
        known = any([hmac.compare_digest(digest, right) for right in self._keys])
        sender = f"key {key}" if known else f"address {client[0] if client else ''}"
        wait_s = self.rate.take(sender, time.monotonic())
        if wait_s:
            raise later("too many requests. Ask again later.", "rate_limit_exceeded", wait_s)
        if self._keys and not known:
            raise ApiError(
                401,
                "the API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body; what is returned hands it out once, and then waits for the end."""
        if scope["method"] in READING:
            return receive
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body = message.get("body", b"")
                    size += len(body)
                    if size <= self.most_bytes:
                        parts.append(body)
                    elif size > DRAINED * self.most_bytes:
                        break
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", "body_timeout") from None
        if size > self.most_bytes:
            raise ApiError(
                413, f"the body is larger than {self.most_bytes} bytes", "body_too_large"
            )
        whole: Message | None = {"type": "http.request", "body": b"".join(parts)}

        async def again() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        return again


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
