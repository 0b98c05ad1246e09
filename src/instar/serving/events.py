"""Server-sent events: an answer that is sent while it is being written."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from instar.serving.asking import unless_gone
from instar.serving.errors import told

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Nobody on the way is to keep the events, nor to wait until there are more of them."""

MEDIA_TYPE = "text/event-stream"

BODY = "http.response.body"
DONE = {"type": BODY, "body": b"data: [DONE]\n\n", "more_body": True}


class EventStream(Response):
    """Sends JSON objects as events, and stops their making as soon as the client has left.

    Args:
        events: The objects. Closed in the end, whatever happens.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any]]) -> None:
        super().__init__(headers=HEADERS, media_type=MEDIA_TYPE)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI asks."""

        async def answer() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async with aclosing(self._events):
                try:
                    async for event in self._events:
                        await send(_part(event))
                except Exception as error:  # it is too late for another status
                    await send(_part(told(error, scope["path"]).body()))
            await send(DONE)
            await send({"type": BODY, "body": b""})

        try:
            await unless_gone(receive, answer())
        finally:
            await self._events.aclose()


def _part(event: dict[str, Any]) -> dict[str, Any]:
    # In ASCII: some clients take U+2028 and its like for the end of a line.
    return {"type": BODY, "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True}
