"""The forward pass for writing beside the model's own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from instar.adapters.base import activate, merge
from instar.errors import UserError
from instar.generation import GREEDY, Completion, Engine, Request, Sampling, Stopping
from instar.generation.body import fits
from instar.generation.native import NativeForward
from instar.generation.reading import LeanReader, ModelReader
from instar.model import CausalLM, ModelConfig
from instar.model.config import RopeScaling
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer

pytestmark = pytest.mark.usefixtures("way")

STOPPING = Stopping(frozenset(), max_new_tokens=10)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
KINDS = {
    "qwen3": {},
    "llama": {"family": "llama", "tie_word_embeddings": False},
    "qwen2": {"family": "qwen2"},
    "biases": {"family": "llama", "attention_bias": True},
    "scaled": {"rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    "wide window": {"family": "mistral", "sliding_window": 256},
}
OTHERS = {
    "window": {"family": "mistral", "sliding_window": 9},
    "gpt2": {"family": "gpt2", "num_key_value_heads": 4},
    "experts": {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2},
    "wide biases": {"family": "llama", "mlp_bias": True},
}


def model_of(tokenizer: Tokenizer, changes: dict) -> CausalLM:
    config = ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, **changes})
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    initialize(model, config, generator)
    with torch.no_grad():  # norms and biases that are not 1 and 0 show whether they are used
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def prompts(n: int, longest: int = 30) -> list[list[int]]:
    rng = random.Random(n)
    return [[rng.randrange(6, 262) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def own_logprobs(model: CausalLM, prompt: list[int], completion: Completion) -> torch.Tensor:
    with torch.no_grad():
        full = model(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1 : -1]
    return full.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_it_computes_what_the_model_computes(tokenizer: Tokenizer, kind: str, way: str):
    model = model_of(tokenizer, KINDS.get(kind) or OTHERS.get(kind) or {})
    engine = Engine(model, tokenizer)
    asked = prompts(5)
    for prompt, completion in zip(asked, engine.generate(asked, GREEDY, STOPPING), strict=True):
        expected = own_logprobs(model, prompt, completion)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=2e-5)
    lean = kind in KINDS or kind == "wide biases"
    assert fits(model) is lean
    engine.submit(Request(asked[0], GREEDY, STOPPING))
    assert isinstance(engine._reader, LeanReader if lean else ModelReader)
    if isinstance(engine._reader, LeanReader):
        assert isinstance(engine._reader._forward, NativeForward) is (way == "compiled")


@pytest.mark.parametrize(("precision", "close"), [("bfloat16", 0.1), ("int8", 0.3)])
def test_fewer_bits_stay_close_to_the_model(tokenizer: Tokenizer, precision: str, close: float):
    model = model_of(tokenizer, {})
    asked = prompts(8)
    engine = Engine(model, tokenizer, precision=precision)  # type: ignore[arg-type]
    exact = Engine(model, tokenizer)
    differences = []
    for prompt, completion in zip(asked, engine.generate(asked, GREEDY, STOPPING), strict=True):
        expected = own_logprobs(model, prompt, completion)
        differences += (expected - torch.tensor(completion.logprobs)).abs().tolist()
    assert 0 < sum(differences) / len(differences) < close
    with pytest.raises(UserError, match="precision is 'int4'"):
        Engine(exact.model, tokenizer, precision="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_replies_are_the_same_in_any_company(tokenizer: Tokenizer, precision: str, way: str):
    model = model_of(tokenizer, {"hidden_size": 64, "intermediate_size": 160})
    engine = Engine(model, tokenizer, precision=precision)  # type: ignore[arg-type]
    asked = prompts(21, longest=90)
    together = engine.generate(asked, GREEDY, STOPPING)
    for batch_size in (1, 2, 5):
        apart = engine.generate(asked, GREEDY, STOPPING, batch_size=batch_size)
        assert [c.ids for c in apart] == [c.ids for c in together]
        logprobs = [[x for c in replies for x in c.logprobs] for replies in (apart, together)]
        # Torch's own products cut float32 sums by height and width on some processors.
        rounding = 5e-6 if way == "plain" and precision == "float32" else 0
        assert logprobs[0] == pytest.approx(logprobs[1], rel=0, abs=rounding)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_training_around_it_has_no_say_in_the_precision(tokenizer: Tokenizer, precision: str):
    engine = Engine(model_of(tokenizer, {}), tokenizer, precision=precision)  # type: ignore[arg-type]
    alone = engine.generate(prompts(5), GREEDY, STOPPING)
    engine.rest()
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.generate(prompts(5), GREEDY, STOPPING) == alone


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_weights_that_change_in_place_are_taken_over(tokenizer: Tokenizer, precision: str):
    model = model_of(tokenizer, {})
    engine = Engine(model, tokenizer, precision=precision)  # type: ignore[arg-type]
    before = engine.generate([[7, 8, 9]], GREEDY, STOPPING)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.8)
    [after] = engine.generate([[7, 8, 9]], GREEDY, STOPPING)
    fresh = Engine(model, tokenizer, precision=precision)  # type: ignore[arg-type]
    assert [after] == fresh.generate([[7, 8, 9]], GREEDY, STOPPING)
    assert after.logprobs != before[0].logprobs


def test_weights_whose_copying_was_broken_off_are_copied_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    def broken_off(*_: object) -> None:
        raise KeyboardInterrupt

    engine = Engine(model_of(tokenizer, {}), tokenizer)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("instar.generation.reading.fast_forward", broken_off)
        engine.prepare()
    assert len(engine.generate([[7, 8, 9]], GREEDY, STOPPING)[0].ids) == 10


def test_each_request_may_have_an_adapter_of_its_own(
    tokenizer: Tokenizer, add_speakers: Callable[[CausalLM], None]
):
    model = model_of(tokenizer, {})
    plain = Engine(model, tokenizer).generate([[7, 8, 9]], GREEDY, STOPPING)
    add_speakers(model)
    engine = Engine(model, tokenizer)
    names = [None, "poet", "clerk", "poet", None]
    replies = [
        engine.submit(Request([7, 8, 9], GREEDY, STOPPING, (0, 0, i), adapter=name))
        for i, name in enumerate(names)
    ]
    while not engine.idle:
        engine.step()
    expected = {None: plain[0].ids}
    for name in ("poet", "clerk"):
        activate(model, name)
        expected[name] = Engine(model, tokenizer).generate([[7, 8, 9]], GREEDY, STOPPING)[0].ids
    assert len({tuple(ids) for ids in expected.values()}) == 3
    assert [reply.ids for reply in replies] == [expected[name] for name in names]
    # Once merged in, it is a plain model again, and the same engine takes the fast way.
    activate(model, "poet")
    merge(model, "poet")
    [merged] = engine.generate([[7, 8, 9]], GREEDY, STOPPING)
    assert isinstance(engine._reader, LeanReader) and merged.ids == expected["poet"]


def test_sampling_draws_the_same_in_any_company(tokenizer: Tokenizer):
    engine = Engine(model_of(tokenizer, {}), tokenizer, precision="bfloat16")
    asked = prompts(7)
    together = engine.generate(asked, Sampling(), STOPPING, samples=3, seed=4)
    apart = engine.generate(asked, Sampling(), STOPPING, samples=3, seed=4, batch_size=2)
    assert [c.ids for c in apart] == [c.ids for c in together]


@pytest.mark.parametrize("changes", [KINDS["qwen3"], OTHERS["gpt2"], OTHERS["window"]])
def test_a_fresh_prompt_is_read_beside_a_row_that_is_nearly_full(
    changes: dict, tokenizer: Tokenizer
):
    model, rng = model_of(tokenizer, changes), random.Random(1)
    long = [rng.randrange(6, 262) for _ in range(250)]

    def replies(engine: Engine, *prompts: list[int]) -> list[list[int]]:
        submitted = [engine.submit(Request(prompt, GREEDY, STOPPING)) for prompt in prompts]
        while not engine.idle:
            engine.step()
        return [reply.ids for reply in submitted]

    engine, other = Engine(model, tokenizer), Engine(model, tokenizer)
    expected = replies(engine, long) + replies(other, long[100:220])
    both = replies(engine, long, long[100:220])  # of the first, 249 tokens are known from before
    assert both == expected
