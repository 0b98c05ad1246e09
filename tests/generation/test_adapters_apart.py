"""Requests of several adapters that begin alike: none takes over what another one has read."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest

from instar.generation import GREEDY, Engine, Reply, Request, Stopping
from instar.generation.slots import WORTHWHILE
from instar.model import CausalLM

NAMES = (None, "poet", "clerk")
STOPPING = Stopping(frozenset(), max_new_tokens=7)
PROMPT = [random.Random(1).randrange(6, 262) for _ in range(WORTHWHILE + 8)]


@pytest.fixture
def base(engine: Engine, add_speakers: Callable[[CausalLM], None]) -> Engine:
    """An engine of the usual model with two adapters that change much."""
    model = copy.deepcopy(engine.model)
    add_speakers(model)
    return Engine(model, engine.tokenizer, slots=4)


def ask(engine: Engine, adapter: str | None, prompt: list[int] = PROMPT) -> Reply:
    return engine.submit(Request(prompt, GREEDY, STOPPING, adapter=adapter))


def finish(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def alone(base: Engine, adapter: str | None, prompt: list[int] = PROMPT) -> list[int]:
    fresh = Engine(base.model, base.tokenizer, slots=1)
    reply = ask(fresh, adapter, prompt)
    finish(fresh)
    return reply.ids


def unread(engine: Engine, reply: Reply) -> int:
    """Tokens of its prompt that a reply could not take over; it is admitted for that."""
    desk = engine._desk
    assert desk is not None
    desk._admit()
    [row] = [row for row, job in enumerate(desk.jobs) if job.reply is reply]
    return desk._unread(row)


def test_one_after_another_they_take_over_nothing(base: Engine):
    expected = {name: alone(base, name) for name in NAMES}
    assert len({tuple(ids) for ids in expected.values()}) == 3
    for name in (None, "poet", "clerk", None):
        reply = ask(base, name)
        assert unread(base, reply) == len(PROMPT)
        finish(base)
        assert reply.ids == expected[name]


def test_each_takes_over_what_it_has_read_itself(base: Engine):
    expected = {name: alone(base, name) for name in NAMES}
    together = {name: ask(base, name) for name in NAMES}
    finish(base)
    assert {name: reply.ids for name, reply in together.items()} == expected
    for name in ("clerk", None, "poet", "clerk"):
        reply = ask(base, name)
        assert unread(base, reply) == 1
        finish(base)
        assert reply.ids == expected[name]


@pytest.mark.parametrize("tail", [[], [9]], ids=["the same prompt", "a longer one"])
def test_none_waits_for_what_another_one_is_reading(
    base: Engine, monkeypatch: pytest.MonkeyPatch, tail: list[int]
):
    monkeypatch.setattr("instar.generation.engine.BUDGET", 5)
    plain = ask(base, None)
    base.step()
    poet, again = ask(base, "poet", PROMPT + tail), ask(base, None, [*PROMPT, 9])
    base.step()
    assert base._desk is not None and plain.ids == []
    jobs = {id(job.reply): job for job in base._desk.jobs}
    assert id(poet) in jobs and not jobs[id(poet)].follows
    assert id(again) not in jobs, "who speaks alike waits, for it has less to read then"
    finish(base)
    assert plain.ids == alone(base, None)
    assert poet.ids == alone(base, "poet", PROMPT + tail)
    assert again.ids == alone(base, None, [*PROMPT, 9])
