"""Requests that come and go: what ``submit``, ``step`` and ``cancel`` promise."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instar.adapters.base import add
from instar.adapters.lora import LoRAConfig
from instar.errors import UserError
from instar.generation import GREEDY, Engine, Reply, Request, Sampling, Stopping, choosing
from instar.generation.choosing import choose
from instar.generation.reading import LeanReader, ModelReader
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer

STOPPING = Stopping(frozenset(), max_new_tokens=12)


def prompts(seed: int, n: int, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 262) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def finish(engine: Engine, steps: int = 500) -> None:
    for _ in range(steps):
        if engine.idle:
            return
        engine.step()
    pytest.fail("the engine does not come to an end")


def alone(engine: Engine, request: Request) -> Reply:
    single = Engine(engine.model, engine.tokenizer, slots=1)
    reply = single.submit(request)
    finish(single)
    return reply


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.2, top_k=50)])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_reply_is_the_same_alone_and_while_others_join_and_leave(
    engine: Engine, sampling: Sampling, slots: int
):
    crowd = Engine(engine.model, engine.tokenizer, slots=slots)
    rng = random.Random(slots)
    requests = [
        Request(p, sampling, Stopping(frozenset(), max_new_tokens=rng.randint(1, 15)), (3, i, 0))
        for i, p in enumerate(prompts(slots, 14))
    ]
    replies = []
    for request in requests:
        replies.append(crowd.submit(request))
        for _ in range(rng.randint(0, 4)):
            crowd.step()
    crowd.cancel(replies.pop(5))
    finish(crowd)
    for reply in replies:
        expected = alone(engine, reply.request)
        assert (reply.ids, reply.finish, reply.text) == (expected.ids, "length", expected.text)
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_cancelling_frees_the_slot(engine: Engine):
    single = Engine(engine.model, engine.tokenizer, slots=1)
    first, second = (single.submit(Request([7, 8], GREEDY, STOPPING)) for _ in range(2))
    for _ in range(3):
        single.step()
    assert len(first.ids) == 3 and second.ids == []
    single.cancel(first)
    assert first.finish == "cancelled"
    single.step()
    assert len(first.ids) == 3 and len(second.ids) == 1
    single.cancel(second)
    single.step()
    assert single.idle and second.finish == "cancelled"
    single.cancel(first)  # once more: nothing happens
    assert first.finish == "cancelled"


def test_what_waits_can_be_cancelled(engine: Engine):
    single = Engine(engine.model, engine.tokenizer, slots=1)
    first, second = (single.submit(Request([7, 8], GREEDY, STOPPING)) for _ in range(2))
    single.cancel(second)
    finish(single)
    assert (len(first.ids), second.ids) == (12, [])


def test_time_is_up_at_the_deadline(engine: Engine):
    late = time.perf_counter()
    at_work = engine.submit(Request([7], GREEDY, STOPPING, deadline_s=late + 3600))
    gone = engine.submit(Request([7], GREEDY, STOPPING, deadline_s=late))
    finish(engine)
    assert (gone.finish, gone.ids) == ("timeout", [])
    assert (at_work.finish, len(at_work.ids)) == ("length", 12)


def test_only_the_key_decides_the_draws(engine: Engine):
    def ids(key: tuple[int, int, int]) -> list[int]:
        return alone(engine, Request([7, 8], Sampling(), STOPPING, key)).ids

    assert ids((1, 2, 3)) == ids((1, 2, 3))
    assert len({tuple(ids(key)) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4


def test_top_logprobs_are_the_likeliest_tokens_of_a_full_forward(engine: Engine):
    asked = Request([9, 10, 11], Sampling(), STOPPING, top_logprobs=3)
    reply, plain = engine.submit(asked), engine.submit(Request([9], Sampling(), STOPPING))
    finish(engine)
    with torch.no_grad():
        full = engine.model(torch.tensor([[*asked.prompt, *reply.ids]]))[0].log_softmax(-1)
    best = full[2:-1].topk(3)
    assert plain.top_logprobs == [] and len(reply.top_logprobs) == 12
    for found, values, tokens in zip(reply.top_logprobs, best.values, best.indices, strict=True):
        assert [token for token, _ in found] == tokens.tolist()
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-4)


def test_bias_and_penalties_by_hand(engine: Engine):
    free = alone(engine, Request([9, 10], GREEDY, STOPPING, top_logprobs=262))
    favourite = free.ids[0]

    def first(sampling: Sampling) -> int:
        return alone(engine, Request([9, 10], sampling, STOPPING)).ids[0]

    assert first(Sampling(temperature=0, logit_bias={favourite: -100.0})) != favourite
    assert first(Sampling(temperature=0, logit_bias={77: 100.0})) == 77
    # Tokens of the prompt are not the reply's: nothing is lowered at its first place.
    assert first(Sampling(temperature=0, presence_penalty=2.0)) == favourite
    never_twice = Sampling(temperature=0, presence_penalty=1000.0)
    assert len(set(alone(engine, Request([9, 10], never_twice, STOPPING)).ids)) == 12
    # A favourite that leads by 10 each time is said three times, then its lead is used up.
    led = Sampling(temperature=0, logit_bias={77: 1000.0}, frequency_penalty=300.0)
    ids = alone(engine, Request([9, 10], led, STOPPING)).ids
    assert ids[:4] == [77] * 4 and ids.count(77) == 4


class Alternating:
    """A grammar: a and b in turn, four of them."""

    def __init__(self, vocab_size: int, a: int, b: int) -> None:
        self.size, self.turn, self.said = vocab_size, (a, b), []

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[self.turn[len(self.said) % 2]] = True
        return mask

    def accept(self, token: int) -> None:
        self.said.append(token)

    @property
    def finished(self) -> bool:
        return len(self.said) == 4


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_a_grammar_is_kept_and_neighbours_are_free(
    engine: Engine, tokenizer: Tokenizer, sampling: Sampling
):
    grammar = Alternating(tokenizer.vocab_size, 70, 80)
    bound = engine.submit(Request([7], sampling, STOPPING, constraint=grammar))
    free = engine.submit(Request([7], sampling, STOPPING))
    finish(engine)
    assert (bound.ids, bound.finish) == ([70, 80, 70, 80], "stop")
    assert free.ids == alone(engine, free.request).ids


def test_a_token_of_every_reply_while_a_long_prompt_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    import instar.generation.engine as engine_module

    monkeypatch.setattr(engine_module, "BUDGET", 5)
    [long] = prompts(1, 1)
    long = (long * 40)[:33]
    crowd = Engine(engine.model, engine.tokenizer, slots=4)
    first = crowd.submit(Request([7, 8], GREEDY, STOPPING))
    crowd.step()
    late = crowd.submit(Request(long, GREEDY, STOPPING))
    for step in range(1, 7):
        crowd.step()
        assert len(first.ids) == 1 + step and late.ids == []
    crowd.step()
    assert len(late.ids) == 1  # 33 tokens are 7 times 5 at most
    finish(crowd)
    for reply in (first, late):
        assert reply.ids == alone(engine, reply.request).ids


class Counting:
    """Notes the shape of everything that is read."""

    def __init__(self, reader) -> None:
        self.reader, self.dtype, self.read_tokens = reader, reader.dtype, []

    def refresh(self):
        return self.reader.refresh()

    def read(self, ids, view, last, adapters):
        self.read_tokens.append(ids.shape)
        return self.reader.read(ids, view, last, adapters)


def counted(engine: Engine, slots: int) -> tuple[Engine, list[torch.Size]]:
    crowd = Engine(engine.model, engine.tokenizer, slots=slots)
    crowd.cancel(crowd.submit(Request([7], GREEDY, STOPPING)))
    crowd._desk.reader = crowd._reader = counter = Counting(crowd._reader)
    crowd._look = lambda: None
    return crowd, counter.read_tokens


def test_a_common_beginning_is_read_once(engine: Engine):
    rng = random.Random(0)
    system = [rng.randrange(6, 262) for _ in range(34)]
    crowd, read = counted(engine, 4)
    tails = [[7, 8], [9], [7, 9, 10]]
    replies = [crowd.submit(Request(system + tail, GREEDY, STOPPING)) for tail in tails]
    crowd.step()  # the first is read; the others wait for it
    crowd.step()
    assert read[0] == (1, 36) and (2, 2) in read
    finish(crowd)
    # The same again, when nobody is at work: what was read is still there.
    del read[:]
    again = crowd.submit(Request([*system, 11, 12], GREEDY, STOPPING))
    crowd.step()
    assert read == [(1, 2)]
    finish(crowd)
    for reply in [*replies, again]:
        assert reply.ids == alone(engine, reply.request).ids


def test_the_prompt_of_a_group_is_read_once(engine: Engine):
    crowd, read = counted(engine, 8)
    replies = [crowd.submit(Request([7, 8, 9], Sampling(), STOPPING, (0, 0, j))) for j in range(6)]
    crowd.step()
    assert read == [(1, 3)]
    finish(crowd)
    for reply in replies:
        assert reply.ids == alone(engine, reply.request).ids


KINDS = {
    "plain": {},
    "gpt2": {"family": "gpt2", "num_key_value_heads": 4},
    "window": {"family": "mistral", "sliding_window": 9},
    "adapter": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_weights_forget_what_was_read(
    engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch
):
    config = ModelConfig(**(engine.model.config.model_dump() | KINDS[kind]))
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    changing = Engine(model, engine.tokenizer)
    if kind == "adapter":
        add(model, LoRAConfig(rank=4))
    changing.prepare()
    reader, read = changing._reader, list[torch.Size]()
    assert isinstance(reader, LeanReader if kind == "plain" else ModelReader)
    take_in = reader.read

    def counted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(ids.shape)
        return take_in(ids, *rest)

    monkeypatch.setattr(reader, "read", counted)
    request = Request(prompts(2, 1, 1)[0] * 40, GREEDY, STOPPING)

    def answered() -> tuple[Reply, torch.Size]:
        """The reply, and what was read before its first token."""
        read.clear()
        reply = changing.submit(request)
        finish(changing)
        return reply, read[0]

    (before, whole), (again, rest) = answered(), answered()
    assert (whole, rest) == ((1, 40), (1, 1)), "what was read is kept while weights stay"
    assert again.ids == before.ids
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if kind != "adapter":
                weight.mul_(-0.7)
            elif "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    after, whole = answered()
    assert whole == (1, 40)
    assert after.logprobs != before.logprobs
    fresh = alone(Engine(model, engine.tokenizer), request)
    assert after.ids == fresh.ids and after.logprobs == pytest.approx(fresh.logprobs, abs=1e-6)


def test_logits_that_are_no_numbers_end_their_own_reply_alone(engine: Engine):
    sound, broken = (Reply(Request([7], GREEDY, STOPPING), 4, engine.tokenizer) for _ in range(2))
    logits = torch.randn(2, 262)
    logits[1, 5] = torch.nan
    choose(logits, [sound, broken], 262)
    assert (len(sound.ids), sound.finish) == (1, None)
    assert (broken.ids, broken.finish) == ([], "failed")
    with pytest.raises(UserError, match="not numbers"):
        broken.completed()


class Helpless:
    """A grammar that cannot say what may follow."""

    finished = False

    def allowed(self) -> torch.Tensor:
        raise UserError("no idea", "Ask somebody else.")

    def accept(self, token: int) -> None:
        pass


def test_a_grammar_that_fails_ends_its_own_reply_alone(engine: Engine):
    crowd = Engine(engine.model, engine.tokenizer)
    plain = crowd.submit(Request([7, 8], GREEDY, STOPPING))
    bound = crowd.submit(Request([7, 9], GREEDY, STOPPING, constraint=Helpless()))
    finish(crowd)
    assert bound.finish == "failed" and "no idea" in str(bound.failure) and not bound.ids
    assert plain.ids == alone(engine, plain.request).ids


def test_whether_a_grammar_allows_anything_is_not_asked_of_the_device():
    class One(Helpless):
        def allowed(self) -> torch.Tensor:
            return torch.tensor([True, False, False])

    reply: Any = SimpleNamespace(request=SimpleNamespace(constraint=One()))
    # What lies on this device has no values, so that asking for one fails.
    assert choosing._allowed(reply, torch.empty(1, 5, device="meta")).device.type == "meta"


def test_next_to_no_temperature_is_none(engine: Engine):
    cold = alone(engine, Request([7, 8], Sampling(temperature=1e-40), STOPPING))
    assert cold.ids == alone(engine, Request([7, 8], GREEDY, STOPPING)).ids


def test_wrong_requests_are_refused(engine: Engine):
    with pytest.raises(UserError, match="adapter 'poet'"):
        engine.submit(Request([7], GREEDY, STOPPING, adapter="poet"))
    with pytest.raises(UserError, match="top_logprobs is -1"):
        engine.submit(Request([7], GREEDY, STOPPING, top_logprobs=-1))
    with pytest.raises(UserError, match="slots is 0"):
        Engine(engine.model, engine.tokenizer, slots=0)
    with pytest.raises(UserError, match="logit_bias of token 3"):
        Sampling(logit_bias={3: float("nan")})
    assert engine.idle
