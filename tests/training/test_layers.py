"""Which layers learn, how fast, and from when on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import pytest
from torch import nn

from instar.adapters.base import add
from instar.adapters.prefix import PrefixConfig
from instar.model import CausalLM, ModelConfig
from instar.objectives.language import NextToken
from instar.training.layers import Thawing, rate_factors

T = TypeVar("T")

BLOCKS = {"block 2": 0.5, "block 1": 0.25, "block 0": 0.125}
FACTORS: dict[str, dict[str, float]] = {
    "llama": {"lm_head": 1, "norm": 1, **BLOCKS, "embed_tokens": 0.0625},
    "qwen3": {"norm": 1, **BLOCKS, "embed_tokens": 0.0625},  # which is its head as well
    "gpt2": {"ln_f": 1, **BLOCKS, "wte": 0.0625, "wpe": 0.0625},
}
"""What the learning rate of each part is multiplied by, halved from block to block."""


@pytest.fixture(params=FACTORS)
def model(request: pytest.FixtureRequest) -> CausalLM:
    """Three blocks of a family."""
    config = ModelConfig(
        family=request.param,
        tie_word_embeddings=request.param != "llama",
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
    )
    return CausalLM(config)


def by_part(model: CausalLM, of: Callable[[nn.Parameter], T]) -> dict[str, T]:
    """What all parameters of a block, or of something outside the blocks, have in common."""
    found: dict[str, set[T]] = {}
    for name, p in model.named_parameters():
        block = re.search(r"\.(?:layers|h)\.(\d)\.", name)
        found.setdefault(f"block {block[1]}" if block else name.split(".")[-2], set()).add(of(p))
    assert all(len(values) == 1 for values in found.values()), found
    return {part: values.pop() for part, values in found.items()}


def learning(model: CausalLM) -> set[str]:
    return {part for part, learns in by_part(model, lambda p: p.requires_grad).items() if learns}


def test_each_block_learns_more_slowly_than_the_one_above(model: CausalLM) -> None:
    factors = rate_factors(NextToken(model), 0.5)
    assert by_part(model, factors.__getitem__) == FACTORS[model.config.family]
    assert rate_factors(NextToken(model), 1.0) == {}


def test_virtual_tokens_stand_below_all_blocks(model: CausalLM) -> None:
    add(model, PrefixConfig(num_virtual_tokens=2))
    factors = rate_factors(NextToken(model), 0.5)
    assert [factors[p] for p in model.parameters() if p.requires_grad] == [0.0625]


def test_blocks_learn_from_the_top_down(model: CausalLM) -> None:
    thawing = Thawing(NextToken(model), 2)
    parts = set(FACTORS[model.config.family])
    top = {part for part in parts if part in ("lm_head", "norm", "ln_f")} | {"block 2"}
    expected: list[tuple[int, set[str]]] = [
        (0, top),
        (1, top),
        (2, top | {"block 1"}),
        (3, top | {"block 1"}),
        (4, top | {"block 1", "block 0"}),
        (6, parts),
    ]
    for step, parts_by_then in expected:
        thawing.at(step)
        assert learning(model) == parts_by_then, step
    thawing.at(0)  # a run that goes back to an earlier step
    assert learning(model) == top


def test_what_is_frozen_never_thaws(model: CausalLM) -> None:
    model.model.blocks[1].requires_grad_(False)
    thawing = Thawing(NextToken(model), 1)
    thawing.at(100)
    assert learning(model) == set(FACTORS[model.config.family]) - {"block 1"}


def test_all_learn_at_once_by_default(model: CausalLM) -> None:
    Thawing(NextToken(model), 0).at(0)
    assert learning(model) == set(FACTORS[model.config.family])
