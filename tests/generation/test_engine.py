from __future__ import annotations

import random

import pytest
import torch

from instar.errors import UserError
from instar.generation import GREEDY, Completion, Engine, Sampling, Stopping
from instar.model import CausalLM
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer

NEVER_STOP = Stopping(frozenset(), max_new_tokens=12)
CHANCE = Sampling(temperature=0.9, top_k=100, top_p=0.98, min_p=0.001, repetition_penalty=1.1)


def random_prompts(seed: int, n: int, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 262) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def logits_of(engine: Engine, ids: list[int]) -> torch.Tensor:
    """What the model says about every next token, without any cache."""
    with torch.no_grad():
        return engine.model(torch.tensor([ids]))[0]


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [c.ids for c in ours] == [c.ids for c in theirs]
    assert [(c.finish, c.text) for c in ours] == [(c.finish, c.text) for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_greedy_equals_a_loop_without_cache(engine: Engine):
    prompts = random_prompts(0, 5)
    for prompt, completion in zip(
        prompts, engine.generate(prompts, GREEDY, NEVER_STOP), strict=True
    ):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(logits_of(engine, ids)[-1].argmax()))
        assert completion.ids == ids[len(prompt) :]
        assert completion.finish == "length"


def test_logprobs_are_those_of_a_full_forward_without_filters(engine: Engine):
    prompts = random_prompts(1, 4)
    for prompt, completion in zip(
        prompts, engine.generate(prompts, CHANCE, NEVER_STOP), strict=True
    ):
        full = logits_of(engine, prompt + completion.ids).log_softmax(-1)
        before = full[len(prompt) - 1 : -1]
        expected = before.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), CHANCE])
def test_a_reply_does_not_depend_on_its_batch(engine: Engine, sampling: Sampling):
    prompts = random_prompts(2, 9)
    together = engine.generate(prompts, sampling, NEVER_STOP, samples=3, seed=5)
    assert len(together) == 27
    for batch_size in (1, 4):
        apart = engine.generate(
            prompts, sampling, NEVER_STOP, samples=3, seed=5, batch_size=batch_size
        )
        assert_same(together, apart)


def test_results_stand_in_the_order_of_the_prompts(engine: Engine):
    prompts = random_prompts(3, 6)
    together = engine.generate(prompts, GREEDY, NEVER_STOP, samples=2)
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], GREEDY, NEVER_STOP)
        assert_same(together[2 * i : 2 * i + 2], alone * 2)


def test_seed_and_sample_decide_the_draws(engine: Engine):
    prompts = random_prompts(4, 2)
    first = engine.generate(prompts, Sampling(), NEVER_STOP, samples=4, seed=1)
    assert_same(first, engine.generate(prompts, Sampling(), NEVER_STOP, samples=4, seed=1))
    other = engine.generate(prompts, Sampling(), NEVER_STOP, samples=4, seed=2)
    texts = {tuple(c.ids) for c in first + other}
    assert len(texts) == 16


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_models_distribution(engine: Engine, temperature: float):
    prompt = random_prompts(5, 1)[0]
    n = 3000
    once = Stopping(frozenset(), max_new_tokens=1)
    sampling = Sampling(temperature=temperature)
    drawn = engine.generate([prompt], sampling, once, samples=n, batch_size=n)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=262)
    expected = (logits_of(engine, prompt)[-1] / temperature).softmax(-1)
    # Five standard errors of each token's own frequency, and a draw more for the rare ones.
    errors = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 5 * errors + 1 / n).all()
    # Pearson's chi-square, whose variance is twice its degrees of freedom.
    usual = n * expected > 5
    freedom = int(usual.sum())
    assert freedom > 50
    found = ((counts - n * expected) ** 2 / (n * expected))[usual].sum()
    assert abs(found - freedom) < 5 * (2 * freedom) ** 0.5


def stop_ids(engine: Engine, prompts: list[list[int]]) -> frozenset[int]:
    """Tokens in the middle of the replies, so that stopping at them happens at various lengths."""
    free = engine.generate(prompts, Sampling(), NEVER_STOP)
    return frozenset(c.ids[i % 12] for i, c in enumerate(free))


def test_stop_tokens_end_a_reply_and_stay_in_its_ids(engine: Engine, tokenizer: Tokenizer):
    prompts = random_prompts(6, 10)
    stops = stop_ids(engine, prompts)
    free = engine.generate(prompts, Sampling(), NEVER_STOP)
    stopping = Stopping(stops, max_new_tokens=12)
    for longer, reply in zip(free, engine.generate(prompts, Sampling(), stopping), strict=True):
        end = next((i for i, token in enumerate(longer.ids) if token in stops), None)
        assert end is not None
        assert reply.ids == longer.ids[: end + 1]
        assert len(reply.logprobs) == end + 1
        assert reply.finish == "stop"
        assert reply.text == tokenizer.decode(longer.ids[:end])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 24])
def test_rows_that_come_and_go_change_nothing(engine: Engine, batch_size: int):
    prompts = random_prompts(7, 12)
    stopping = Stopping(stop_ids(engine, prompts), max_new_tokens=12)
    usual = engine.generate(prompts, CHANCE, stopping, samples=2)
    assert len({len(completion.ids) for completion in usual}) > 3
    apart = engine.generate(prompts, CHANCE, stopping, samples=2, batch_size=batch_size)
    assert_same(apart, usual)


def test_stop_strings_are_never_shown(engine: Engine):
    prompt = random_prompts(8, 1)[0]
    letters = Sampling(temperature=3.0)
    free = engine.generate([prompt], letters, NEVER_STOP, seed=3)[0]
    stop = free.text[5:7]
    start = free.text.index(stop)
    stopping = Stopping(frozenset(), (stop,), max_new_tokens=12)
    cut = engine.generate([prompt], letters, stopping, seed=3)[0]
    assert cut.text == free.text[:start]
    assert cut.finish == "stop"
    assert cut.ids == free.ids[: len(cut.ids)]
    assert "".join(engine.stream(prompt, letters, stopping, seed=3)) == cut.text


def test_streamed_pieces_are_the_text(engine: Engine):
    for prompt in random_prompts(9, 4):
        whole = engine.generate([prompt], CHANCE, NEVER_STOP, seed=7)[0]
        pieces = list(engine.stream(prompt, CHANCE, NEVER_STOP, seed=7))
        assert "".join(pieces) == whole.text
        assert all(pieces)


def test_split_characters_are_shown_whole(engine: Engine, tokenizer: Tokenizer):
    class Scripted(Engine):
        """Says what it was told to, byte by byte."""

        script = tokenizer.encode("龄虫, ok")

        def submit(self, request):
            self.reply = super().submit(request)
            return self.reply

        def step(self):
            self.reply.add(self.script.pop(0), 0.0)
            if not self.script:
                self.reply.end("stop")

    scripted = Scripted(engine.model, tokenizer)
    pieces = list(scripted.stream([6], GREEDY, Stopping(frozenset(), max_new_tokens=40)))
    assert pieces == ["龄", "虫", ",", " ", "o", "k"]


def test_replies_end_where_the_context_ends(engine: Engine):
    context = engine.model.config.max_position_embeddings
    [prompt] = random_prompts(10, 1)
    long = (prompt * 48)[: context - 3]
    full = (prompt * 48)[:context]
    almost, none, free = engine.generate([long, full, prompt], GREEDY, NEVER_STOP)
    assert (len(almost.ids), almost.finish) == (3, "length")
    assert (none.ids, none.finish, none.text) == ([], "length", "")
    assert len(free.ids) == 12
    assert list(engine.stream(full, GREEDY, NEVER_STOP)) == []


def test_prompts_that_cannot_be_answered_are_refused(engine: Engine):
    assert engine.generate([], GREEDY, NEVER_STOP) == []
    with pytest.raises(UserError, match=r"prompt 1 has 49 tokens.* 48"):
        engine.generate([[7], [7] * 49], GREEDY, NEVER_STOP)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        engine.stream([], GREEDY, NEVER_STOP)


def test_training_mode_and_gradients_survive(engine: Engine):
    model = engine.model
    model.train()
    model.model.norm.eval()
    engine.generate([[7, 8]], GREEDY, NEVER_STOP)
    assert model.training and model.lm_head.training and not model.model.norm.training
    for _ in engine.stream([7, 8], GREEDY, NEVER_STOP):
        assert torch.is_grad_enabled() and model.training
    model.train()


def test_broken_weights_are_reported(tokenizer: Tokenizer, engine: Engine):
    import copy

    broken = Engine(copy.deepcopy(engine.model), tokenizer)
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(float("nan"))
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(UserError, match="not numbers"):
            broken.generate([[7]], sampling, NEVER_STOP)


@pytest.mark.parametrize("sampling", [GREEDY, CHANCE])
def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn(
    engine: Engine, tokenizer: Tokenizer, sampling: Sampling
):
    # Many models round their vocabulary up; here the rows beyond it are the likeliest of all.
    rows = tokenizer.vocab_size + 58
    config = engine.model.config.model_copy(
        update={"vocab_size": rows, "tie_word_embeddings": False}
    )
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(1))
    longer = Engine(model, tokenizer)
    prompts = random_prompts(9, 4)
    with torch.no_grad():
        # Whatever the model thinks, an unknown row now says the same and a little more.
        model.lm_head.weight[tokenizer.vocab_size :] = model.lm_head.weight[10:68] * 1.01
    for prompt, completion in zip(
        prompts, longer.generate(prompts, sampling, NEVER_STOP), strict=True
    ):
        assert max(completion.ids) < tokenizer.vocab_size
        # Training needs the probability under the whole model.
        logits = logits_of(longer, [*prompt, *completion.ids])[len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        assert completion.logprobs == pytest.approx(
            [float(row[id]) for row, id in zip(logprobs, completion.ids, strict=True)], abs=1e-4
        )
    first = logits_of(longer, prompts[0])[-1]
    known = int(first[: tokenizer.vocab_size].argmax())
    [reply] = longer.generate(prompts[:1], GREEDY, NEVER_STOP)
    assert reply.ids[0] == known
