"""Keys and values within a limit: long and short requests all get their turn, and their replies."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from instar.errors import UserError
from instar.generation import GREEDY, Engine, Reply, Request, Sampling, Stopping
from instar.generation.body import is_compiled
from instar.generation.slots import Slots
from instar.model import CausalLM
from instar.model.transformer import initialize

CONTEXT = 512
COLUMN = 2 * 2 * 2 * 8 * 4
"""Bytes of a column: layers, keys and values, heads, their width, float32."""
BUDGET = 2 * CONTEXT * COLUMN
"""Two rows of the whole context, or sixteen of 64 columns."""


@pytest.fixture
def opened(engine: Engine, way: str) -> Callable[..., Engine]:
    """Engines of a model like the usual one, with a longer context, read in both ways."""
    config = engine.model.config.model_copy(update={"max_position_embeddings": CONTEXT})
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    assert is_compiled(model) is (way == "compiled")
    return lambda **options: Engine(model, engine.tokenizer, **options)


def asked(rng: random.Random, prompt: int, reply: int, number: int = 0) -> Request:
    ids = [rng.randrange(6, 262) for _ in range(prompt)]
    return Request(ids, Sampling(), Stopping(frozenset(), max_new_tokens=reply), (5, number, 0))


def stored(engine: Engine) -> int:
    """Bytes that keys and values take."""
    assert engine._desk is not None
    store = engine._desk.slots.store
    return store.numel() * store.element_size()


def answered(engine: Engine, requests: list[Request], every: int = 0) -> list[list[int]]:
    """Replies to requests of which ``every`` so many join at a step; all at once by default."""
    waiting, replies = list(requests), list[Reply]()
    while waiting or not engine.idle:
        for request in waiting[: every or len(waiting)]:
            replies.append(engine.submit(request))
        del waiting[: every or len(waiting)]
        engine.step()
        assert engine._desk is not None
        assert engine.cache_bytes is None or stored(engine) <= engine.cache_bytes
        late = list(engine._desk.waiting)
        assert late == replies[len(replies) - len(late) :], "nobody overtakes another"
    assert all(reply.finish == "length" for reply in replies)
    return [reply.ids for reply in replies]


def test_a_long_request_among_short_ones(opened: Callable[..., Engine]):
    rng = random.Random(1)
    requests = [asked(rng, rng.randint(1, 40), 20, i) for i in range(24)]
    requests[6:6] = [asked(rng, 440, 40, 100)]
    requests[20:20] = [asked(rng, 300, 200, 101)]
    engine, free = opened(slots=12, cache_bytes=BUDGET), opened(slots=12)
    for every in (0, 1, 3):
        assert answered(engine, requests, every) == answered(free, requests, every)
    assert stored(free) > BUDGET


def test_what_was_read_is_taken_over_as_far_as_it_is_kept(opened: Callable[..., Engine]):
    rng = random.Random(2)
    beginnings = [asked(rng, n, 1).prompt for n in (40, 90, 200, 330)]
    engine, free = opened(slots=8, cache_bytes=BUDGET), opened(slots=8)
    for number in range(4):
        requests = list[Request]()
        for i in range(20):
            tail = asked(rng, rng.randint(1, 60), rng.randint(1, 60), 20 * number + i)
            prompt = [*rng.choice(beginnings), *tail.prompt]
            requests += [Request(prompt, GREEDY, tail.stopping)] * rng.choice((1, 1, 3))
        replies = [engine.submit(request) for request in requests]
        expected = [free.submit(request) for request in requests]
        while not (engine.idle and free.idle):
            engine.step()
            free.step()
            assert stored(engine) <= BUDGET
        assert [reply.ids for reply in replies] == [reply.ids for reply in expected]


def test_memory_is_given_back_when_nobody_is_at_work(opened: Callable[..., Engine]):
    rng = random.Random(3)
    engine = opened(slots=8, cache_bytes=BUDGET)
    long = [asked(rng, 400, 50, i) for i in range(2)]
    expected = answered(engine, long)
    assert 0 < stored(engine) <= BUDGET // 2
    assert answered(engine, long) == expected


def test_who_ends_with_the_prompt_may_stand_before_others(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """Beside one who is written on, a column behind the prompt is computed in vain."""
    monkeypatch.setattr("instar.generation.engine.BUDGET", 32)
    rng = random.Random(5)
    short, long = asked(rng, 4, 3, 0), [asked(rng, 4, 40, i) for i in (1, 2)]
    requests = [short, *long, asked(rng, 128, 1, 3)]  # which takes the place of the first
    engine, free = opened(cache_bytes=4 * 128 * COLUMN), opened()
    assert answered(engine, requests) == answered(free, requests)


def test_one_long_request_does_not_end_the_memory_of_short_ones(opened: Callable[..., Engine]):
    rng = random.Random(6)
    engine = opened(slots=8, cache_bytes=3 * CONTEXT * COLUMN // 2)
    answered(engine, [asked(rng, 400, 100)])
    turn = asked(rng, 100, 4)
    [reply] = answered(engine, [turn])
    engine.step()  # nobody is at work
    assert engine._desk is not None
    assert [*turn.prompt, *reply[:-1]] in engine._desk.slots.tokens, "it may be gone on with"


def test_the_store_keeps_its_size_from_turn_to_turn(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """After much work somebody talks alone: what is given back is not taken again at once."""
    rng = random.Random(7)
    engine = opened(slots=8, cache_bytes=BUDGET)
    answered(engine, [asked(rng, 80, 20, i) for i in range(8)])
    assert engine._desk is not None
    resized, resize = [], Slots._resize
    monkeypatch.setattr(
        Slots, "_resize", lambda self, *shape: (resized.append(shape), resize(self, *shape))
    )
    prompt = asked(rng, 100, 1).prompt
    for _ in range(8):
        turn = Request(prompt, GREEDY, Stopping(frozenset(), max_new_tokens=8))
        [reply] = answered(engine, [turn])
        prompt = [*prompt, *reply, *asked(rng, 8, 1).prompt]
    assert len(prompt) > 128 and len(resized) <= 3
    assert stored(engine) <= BUDGET // 2


def test_what_may_never_fit_is_refused(opened: Callable[..., Engine]):
    rng = random.Random(4)
    engine = opened(cache_bytes=BUDGET // 4)
    with pytest.raises(UserError, match="may come to 300 tokens"):
        engine.submit(asked(rng, 200, 100))
    assert engine.idle
    assert len(answered(engine, [asked(rng, 200, 50)])[0]) == 50
    with pytest.raises(UserError, match="cache_bytes is 0"):
        opened(cache_bytes=0)
