"""The one thread that owns the engines: requests go in through a queue, tokens come out as events.

All engines are stepped by the same thread, in turn: two threads would fight for the same cores.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from instar.generation import Engine
from instar.generation.choosing import NotNumbersError
from instar.generation.engine import Reply
from instar.generation.request import Request
from instar.serving.errors import ApiError, later

log = logging.getLogger(__name__)

T = TypeVar("T")

NEWS_PER_S = 1000
"""The most pieces of news a second, of all replies together. To send a token of a small model costs
more than to write it; so when many replies are written, each piece holds several tokens."""


@dataclass(frozen=True)
class Step:
    """What is new of a reply.

    Attributes:
        index: Which of the replies that were asked for together.
        text: Text that came.
        ids: Tokens that came.
        logprobs: Their log-probabilities.
        top_logprobs: The likeliest tokens at their places.
        finish: Why it ended, if it did.
        waited_s: Seconds until its first token, where that is among these.
    """

    index: int
    text: str
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish: str | None
    waited_s: float | None = None


@dataclass
class _Job:
    """A reply that the worker is to get written."""

    writing: Writing
    index: int
    engine: Engine
    request: Request
    reply: Reply | None = None
    told: int = 0
    shown: int = 0
    next_s: float = 0.0
    """When there may be news again."""
    waited_s: float | None = None
    """Until its first token."""


@dataclass
class Writing:
    """Replies that were asked for together; iterate to get their steps.

    Attributes:
        replies: How many.
        every_step: Whether steps are told as they come, or each reply at its end.
        open: How many are not finished.
    """

    loop: asyncio.AbstractEventLoop
    replies: int
    every_step: bool
    open: int
    started_s: float = field(default_factory=time.perf_counter)
    events: asyncio.Queue[Step | Exception | None] = field(default_factory=asyncio.Queue)

    async def steps(self) -> AsyncIterator[Step]:
        """The steps of all replies, as they come.

        Raises:
            ApiError: The time was over before one of them had begun, or the model failed.
            UserError: One of them cannot have the form that was asked for.
        """
        awaited, begun = self.replies, set[int]()
        while awaited:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                continue
            if event.ids:
                begun.add(event.index)
            elif event.finish == "timeout" and event.index not in begun:
                raise later("the reply's turn did not come in time", "timeout", 5, status=503)
            awaited -= bool(event.finish)
            yield event


def unwritten(replies: int) -> Writing:
    """Replies that end before their first token."""
    writing = Writing(asyncio.get_running_loop(), replies, every_step=False, open=0)
    for index in range(replies):
        writing.events.put_nowait(Step(index, "", [], [], [], "length"))
    return writing


class Worker:
    """Gets replies written.

    Args:
        engines: The engines; nobody else may use them from now on.
        most_open: The most replies that are being written or wait for it.
    """

    def __init__(self, engines: Sequence[Engine], most_open: int) -> None:
        self.engines = list(engines)
        self.most_open = most_open
        self.open = 0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._usual_s = 1.0
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is being written, and end the thread."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    async def write(self, engine: Engine, requests: Sequence[Request], every_step: bool) -> Writing:
        """Have replies written; returns once the engine has taken the requests in.

        Whoever calls this must call ``close`` in the end, come what may.

        Args:
            engine: One of the worker's.
            requests: The replies that are wanted.
            every_step: Tell steps as they come, several at once where ``NEWS_PER_S`` says so,
                rather than each reply at its end.

        Raises:
            ApiError: Too many replies are open, or more are asked for than ever may be.
            UserError: The engine refuses a request.
        """
        if len(requests) > self.most_open:
            message = f"{len(requests)} replies are asked for, and the server has room for"
            raise ApiError(400, f"{message} {self.most_open}. Ask for fewer.", "too_many")
        if self.open + len(requests) > self.most_open:
            wait_s = self._usual_s * max(1.0, self.open / self.most_open)
            raise later("the server is busy. Ask again later.", "queue_full", wait_s)
        count = len(requests)
        writing = Writing(asyncio.get_running_loop(), count, every_step, count)
        self.open += count
        jobs = [_Job(writing, i, engine, request) for i, request in enumerate(requests)]
        self._inbox.put(lambda: self._take_in(jobs))
        try:
            first = await writing.events.get()
            if isinstance(first, Exception):
                raise first
        except BaseException:
            self.close(writing)
            raise
        return writing

    def close(self, writing: Writing) -> None:
        """Replies that are not finished are cancelled; their slots are free at the next step."""
        if writing.open:
            self.open -= writing.open
            writing.open = 0
            self._inbox.put(lambda: self._drop(writing))

    def cancel(self, writing: Writing, index: int) -> None:
        """One reply is cancelled; its last step comes as its slot is freed, at the next step."""
        self._inbox.put(lambda: self._cancel(writing, index))

    async def between(self, work: Callable[[], T]) -> T:
        """Have something short done by the thread, between two steps; raises what it raises."""
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def arrive(result: T | None, error: Exception | None) -> None:
            if done.cancelled():
                return
            if error:
                done.set_exception(error)
            else:
                done.set_result(result)

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except Exception as error:
                failure = error
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(arrive, result, failure)

        self._inbox.put(run)
        return await done

    # What follows runs in the thread.

    def _run(self) -> None:
        while True:
            try:
                # What was cancelled leaves its slot at a step, so idle engines alone may rest.
                while not self._inbox.empty() or all(engine.idle for engine in self.engines):
                    action = self._inbox.get()
                    if action is None:
                        return
                    action()
                self._step()
            except Exception as error:  # a fault of ours must not silence the server
                log.exception("the engine failed")
                self._fail(self._jobs, error)

    def _take_in(self, jobs: list[_Job]) -> None:
        """Hand requests to their engine, all or none."""
        try:
            for job in jobs:
                job.reply = job.engine.submit(job.request)
        except Exception as error:
            self._fail(jobs, error)
            return
        self._jobs += jobs
        _tell([(jobs[0].writing, None)])

    def _drop(self, writing: Writing) -> None:
        gone = [job for job in self._jobs if job.writing is writing]
        self._jobs = [job for job in self._jobs if job.writing is not writing]
        for job in gone:
            if job.reply is not None and not job.reply.finish:
                job.engine.cancel(job.reply)

    def _cancel(self, writing: Writing, index: int) -> None:
        for job in self._jobs:
            if job.writing is writing and job.index == index and job.reply is not None:
                job.engine.cancel(job.reply)

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        """Tell those who wait that nothing comes."""
        for job in jobs:
            if job.reply is not None and not job.reply.finish:
                job.engine.cancel(job.reply)
        writings = {id(job.writing): job.writing for job in jobs}.values()
        self._jobs = [job for job in self._jobs if job not in jobs]
        _tell([(writing, error) for writing in writings])

    def _step(self) -> None:
        """One token for every reply, and the news of it."""
        for engine in self.engines:
            if engine.idle:
                continue
            try:
                engine.step()
            except Exception as error:  # a fault of ours must not silence the other models
                log.exception("an engine failed")
                self._fail([job for job in self._jobs if job.engine is engine], error)
        for job in [job for job in self._jobs if job.reply and job.reply.failure]:
            self._fail([job], _blamed(job))
        pause_s = len(self._jobs) / NEWS_PER_S
        news = [(job.writing, step) for job in self._jobs if (step := _news(job, pause_s))]
        if any(step.finish for _, step in news):
            self._jobs = [job for job in self._jobs if job.reply and not job.reply.finish]
        _tell(news, self)

    def _finished(self, writing: Writing) -> None:
        """Count a finished reply; runs in the loop's thread."""
        if writing.open:
            writing.open -= 1
            self.open -= 1
            took_s = time.perf_counter() - writing.started_s
            self._usual_s += (took_s - self._usual_s) / 10


def _blamed(job: _Job) -> Exception:
    """Why a reply failed: through the model, or through what was asked of it."""
    assert job.reply is not None and job.reply.failure is not None
    failure = job.reply.failure
    if not isinstance(failure, NotNumbersError):
        return failure
    log.error("%s", failure)
    return ApiError(500, str(failure), "model_failed")


def _news(job: _Job, pause_s: float) -> Step | None:
    """What is to be told of a reply, if anything; then nothing for so many seconds."""
    reply = job.reply
    assert reply is not None
    now = time.perf_counter()
    if reply.ids and job.waited_s is None:
        job.waited_s = now - job.writing.started_s
    due = job.writing.every_step and len(reply.text) > job.shown and now >= job.next_s
    if not due and not reply.finish:
        return None
    job.next_s = now + pause_s
    told, end = job.told, len(reply.ids)
    waited_s = job.waited_s if end and not told else None
    text = reply.text[job.shown :]
    job.told, job.shown = end, len(reply.text)
    return Step(
        job.index,
        text,
        reply.ids[told:end],
        reply.logprobs[told:end],
        reply.top_logprobs[told:end],
        reply.finish,
        waited_s,
    )


def _tell(
    news: Sequence[tuple[Writing, Step | Exception | None]], worker: Worker | None = None
) -> None:
    """Put events where the loop's tasks wait for them: one call for each loop."""

    def arrive(part: list[tuple[Writing, Step | Exception | None]]) -> None:
        for writing, event in part:
            writing.events.put_nowait(event)
            if worker and isinstance(event, Step) and event.finish:
                worker._finished(writing)

    for loop in {writing.loop for writing, _ in news}:
        part = [(writing, event) for writing, event in news if writing.loop is loop]
        try:
            loop.call_soon_threadsafe(arrive, part)
        except RuntimeError:  # the loop has ended, and nobody waits any more
            log.debug("news for a loop that has ended")
