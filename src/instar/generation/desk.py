"""Who is answered when: requests wait, get a row, are read, are answered, and make room.

A step admits what it can, reads some of the prompts, and gives everyone who is ready one token.
Rows at work are always the first ones: when a reply ends, the last row moves into its place.

In the field's words this is a scheduler with continuous batching (Orca, Yu et al. 2022, OSDI),
chunked prefill (Sarathi, Agrawal et al. 2023, arXiv:2308.16369) and prefix caching (as vLLM and
SGLang have it, arXiv:2309.06180 and 2312.07104). It is not paged: a row is one stretch of memory.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from instar.errors import UserError
from instar.generation.choosing import choose
from instar.generation.reading import Reader
from instar.generation.reply import Reply
from instar.generation.slots import WORTHWHILE, Slots, View, rounded, shared_length


class Job:
    """A reply at work, in one row.

    Args:
        reply: Not finished.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.prompt = list(reply.request.prompt)
        self.adapter = reply.request.adapter
        self.siblings: list[Job] = []
        """Jobs with the same prompt, who take over what this one has read."""
        self.follows = False
        """Whether it waits for a sibling to do so."""


class Desk:
    """A queue, the rows, and the work at them.

    Args:
        reader: The model.
        known: Tokens that may be drawn.
        rows: The most replies at work at once.
        budget: The most tokens of prompts that a step reads, so that replies at work do not wait
            for long prompts; all of them where it is none.
        retains: Whether finished rows are kept while their place is free, for requests that begin
            like them.
        patience: Places that are gathered before waiting requests are admitted: few long reads
            are faster than many short ones.
        cache_bytes: The most memory for keys and values, if there is a limit. A request is then
            admitted once there is room for all that it and everyone at work may come to need.
    """

    def __init__(
        self,
        reader: Reader,
        known: int,
        *,
        rows: int,
        budget: int | None = None,
        retains: bool = False,
        patience: int = 1,
        cache_bytes: int | None = None,
    ) -> None:
        model = reader.model
        self.reader, self.context, self.known = reader, model.context, known
        self.device = next(model.parameters()).device
        self.rows, self.budget, self.retains, self.patience = rows, budget, retains, patience
        self.bounded = cache_bytes is not None
        self.slots = Slots(model.config, rows, reader.dtype, self.device, reader.masks, cache_bytes)
        self.waiting: deque[Reply] = deque()
        self.jobs: list[Job] = []
        self.columns = 0
        """Columns that are sure to be needed, if that is known in advance."""

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing is at work."""
        return not self.waiting and not self.jobs

    def take(self, reply: Reply) -> None:
        """Let a reply wait; raises ``UserError`` where it may need more memory than there is."""
        if not self.slots.fits(1, reply.columns):
            most = len(reply.request.prompt) + reply.limit
            raise UserError(
                f"prompt and reply may come to {most} tokens, for whose keys and values there is no"
                " memory",
                "Shorten the prompt, or allow fewer tokens; a server is given more memory with"
                " --cache-gib.",
            )
        self.waiting.append(reply)

    def step(self) -> None:
        """Admit, read, and one token for everyone who is ready."""
        self._clear()
        if not self.jobs:
            self.slots.rest()
        self._admit()
        ready = [not job.follows and self._unread(row) == 0 for row, job in enumerate(self.jobs)]
        self._read_prompts()
        if any(ready):
            self._write(ready)

    def _unread(self, row: int) -> int:
        """Tokens of its prompt that a row has not read."""
        return max(0, len(self.jobs[row].prompt) - len(self.slots.tokens[row]))

    def _clear(self) -> None:
        """End what is out of time, and free the rows of all that has ended."""
        now = time.perf_counter()
        for reply in [*self.waiting, *(job.reply for job in self.jobs)]:
            deadline = reply.request.deadline_s
            if deadline is not None and now >= deadline:
                reply.end("timeout")
        if any(reply.finish for reply in self.waiting):
            self.waiting = deque(reply for reply in self.waiting if not reply.finish)
        for row in reversed(range(len(self.jobs))):
            if self.jobs[row].reply.finish:
                self._free(row)

    def _free(self, row: int) -> None:
        job, last = self.jobs[row], len(self.jobs) - 1
        heirs = [sibling for sibling in job.siblings if not sibling.reply.finish]
        if heirs:  # it ended before it had read what they wait for
            heirs[0].follows, heirs[0].siblings = False, heirs[1:]
        if self.retains:
            self.slots.swap(row, last)
        else:
            self.slots.copy(last, row, len(self.slots.tokens[last]))
            self.slots.tokens[last] = []
        self.jobs[row] = self.jobs[last]
        self.jobs.pop()

    def _admit(self) -> None:
        """Give waiting requests the free rows, in their order: nobody overtakes a long one."""
        free = self.rows - len(self.jobs)
        if not self.waiting or (self.jobs and free < min(self.patience, len(self.waiting))):
            return
        if self.reader.refresh():
            self.slots.forget(len(self.jobs))
        later: list[Reply] = []
        leaders = {
            (job.adapter, tuple(job.prompt)): job
            for row, job in enumerate(self.jobs)
            if not job.follows and self._unread(row)
        }
        while self.waiting and len(later) < self.rows and self._has_room(self.waiting[0]):
            job = Job(self.waiting.popleft())
            leader = leaders.setdefault((job.adapter, tuple(job.prompt)), job)
            if leader is not job:
                self._seat(job, -1, 0)
                leader.siblings.append(job)
                job.follows = True
                continue
            row, shared = self.slots.nearest(job.prompt, job.adapter)
            if self._soon(job) > shared:
                del leaders[job.adapter, tuple(job.prompt)]
                later.append(job.reply)
            else:
                self._seat(job, row, shared)
        self.waiting.extendleft(reversed(later))

    def _has_room(self, reply: Reply) -> bool:
        """Whether one more may come to work."""
        rows = len(self.jobs) + 1
        return rows <= self.rows and self.slots.fits(rows, self._needed(reply))

    def _needed(self, reply: Reply) -> int:
        """Columns that a newcomer and everyone at work may come to need."""
        return max([reply.columns, *(job.reply.columns for job in self.jobs)])

    def _soon(self, job: Job) -> int:
        """Tokens that a request can take over if it waits for what others are reading now."""
        lengths = [
            shared_length(other.prompt, job.prompt)
            for row, other in enumerate(self.jobs)
            if other.prompt[:WORTHWHILE] == job.prompt[:WORTHWHILE]
            and other.adapter == job.adapter
            and self._unread(row)
        ]
        length = max(lengths, default=0)
        return length if length >= WORTHWHILE else 0

    def _seat(self, job: Job, source: int, shared: int) -> None:
        """Give a request the first free row, which begins with what another row has in common."""
        slots, row = self.slots, len(self.jobs)
        if source >= row:  # nobody works there: take it as it is
            slots.swap(source, row)
        # Without a limit, nobody knows yet whether a reply will be as long as it may.
        columns = self._needed(job.reply) if self.bounded else len(job.prompt)
        hoped = min(self.rows, row + 1 + len(self.waiting))
        slots.reserve(row + 1, max(self.columns, columns), hoped)
        if source < row and self.retains and slots.tokens[row]:
            empty = (r for r in range(row + 1, slots.rows) if not slots.tokens[r])
            slots.swap(row, next(empty, row))
        if 0 <= source < row:
            slots.copy(source, row, shared)
        slots.tokens[row] = slots.tokens[row][:shared]
        slots.owners[row] = job.adapter
        self.jobs.append(job)

    def _read_prompts(self) -> None:
        """Read on in the prompts, as far as the budget goes; who has read all gets a token."""
        rows = [r for r, job in enumerate(self.jobs) if not job.follows and self._unread(r)]
        if not rows:
            return
        if self.budget is None:
            width = max(self._unread(row) for row in rows)
        else:
            fair = max(self._unread(rows[0]), self.budget // len(rows))
            width = min(max(self._unread(row) for row in rows), fair, self.budget)
            rows = rows[: max(1, self.budget // width)]
        # Padding, too, has a position, and behind the context there are none; nor may it need
        # memory that nobody has reckoned with.
        edge = min(self.context, self.slots.columns) if self.bounded else self.context
        width = min(width, edge - max(len(self.slots.tokens[row]) for row in rows))
        parts = []
        for row in rows:
            done = len(self.slots.tokens[row])
            parts.append(self.jobs[row].prompt[done : done + width])
        logits = self._read(rows, parts, width)
        finished = [i for i, row in enumerate(rows) if not self._unread(row)]
        sources, jobs = [], []
        for i in finished:
            own = [rows[i], *self._share(rows[i])]
            jobs += [self.jobs[row] for row in own]
            sources += [i] * len(own)
        if jobs:
            everyone = sources == list(range(len(rows)))
            chosen = logits if everyone else logits[torch.tensor(sources, device=self.device)]
            choose(chosen, [job.reply for job in jobs], self.known)

    def _share(self, row: int) -> list[int]:
        """Copy what a row has read to its siblings; their rows."""
        siblings = {id(job) for job in self.jobs[row].siblings if not job.reply.finish}
        rows = [r for r, job in enumerate(self.jobs) if id(job) in siblings]
        for sibling in rows:
            self.slots.copy(row, sibling, len(self.slots.tokens[row]))
            self.jobs[sibling].follows = False
        self.jobs[row].siblings = []
        return rows

    def _write(self, ready: list[bool]) -> None:
        """Read everyone's last token and draw the next.

        Rows that are still reading their prompts are computed as well, in vain: what is written
        into them is overwritten, and the first rows need no gathering.
        """
        rows = list(range(len(ready)))
        while not ready[rows[-1]]:
            rows.pop()
        parts = [self.jobs[row].reply.ids[-1:] if ready[row] else [] for row in rows]
        logits = self._read(rows, parts, 1)
        if not all(ready[: len(rows)]):
            rows = [row for row in rows if ready[row]]
            logits = logits[torch.tensor(rows, device=self.device)]
        choose(logits, [self.jobs[row].reply for row in rows], self.known)

    def _read(self, rows: list[int], parts: list[list[int]], width: int) -> Tensor:
        """Logits after new tokens of some rows; rows without any are computed in vain."""
        slots, device = self.slots, self.device
        lengths = [len(slots.tokens[row]) for row in rows]
        slots.reserve(0, max(lengths) + width)
        stretch = rows[-1] - rows[0] + 1 == len(rows)
        some = slice(rows[0], rows[-1] + 1) if stretch else torch.tensor(rows, device=device)
        used = min(rounded(max(lengths) + width), slots.columns)
        view = View(slots, some, torch.tensor(lengths, device=device), used)
        ids = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device)
        last = torch.tensor([max(0, len(part) - 1) for part in parts], device=device)
        logits = self.reader.read(ids, view, last, [self.jobs[row].adapter for row in rows])
        for row, part in zip(rows, parts, strict=True):
            slots.tokens[row] += part
        return logits
