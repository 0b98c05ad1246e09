"""What the server counts, for Prometheus to read at ``/metrics``."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper ends of the classes that durations are counted in."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "instar_requests", "HTTP requests", ["path", "status"], registry=self.registry
        )
        self.duration_s = Histogram(
            "instar_request_seconds",
            "From a request to the end of its answer",
            ["path"],
            buckets=WAITS_S,
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "instar_first_token_seconds",
            "From a request to its first token",
            ["model"],
            buckets=WAITS_S,
            registry=self.registry,
        )
        self.tokens = Counter(
            "instar_tokens", "Tokens read and written", ["model", "kind"], registry=self.registry
        )
        self.replies = Counter(
            "instar_replies", "Finished replies", ["model", "finish"], registry=self.registry
        )
        self.open = Gauge(
            "instar_open_replies", "Replies being written or waiting", registry=self.registry
        )

    def page(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)


class Counted:
    """Counts the requests that an app answers.

    Args:
        app: The app.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI asks."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun_s = 499, time.perf_counter()  # 499: the client left before the answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:  # which is answered outside of this
            status = 500
            raise
        finally:
            # The route's pattern, not the path: whoever tries paths makes no new counters.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.duration_s.labels(path).observe(time.perf_counter() - begun_s)
