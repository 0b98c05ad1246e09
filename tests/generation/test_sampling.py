from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from instar.errors import UserError
from instar.generation.sampling import GREEDY, Sampling, draw, warp


def theirs(logits: torch.Tensor, sampling: Sampling, ids: torch.Tensor) -> torch.Tensor:
    """The same filters by transformers, in the order in which its `generate` builds them."""
    filters = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        filters.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    filters.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        filters.append(MinPLogitsWarper(sampling.min_p))
    return filters(ids, logits)


@settings(max_examples=60, deadline=None)
@given(
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 5, 500]),
        top_p=st.sampled_from([0.01, 0.5, 0.93, 1.0]),
        min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=st.sampled_from([0.8, 1.0, 1.5]),
    ),
    seed=st.integers(0, 1000),
)
def test_filters_equal_those_of_transformers(sampling: Sampling, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 50, generator=generator)
    ids = torch.randint(50, (3, 7), generator=generator)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = theirs(logits.clone(), sampling, ids)
    torch.testing.assert_close(warp(logits, sampling, seen), expected)


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.0, 0.2])
    n = 40_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1))
    drawn = draw(p.log().expand(n, -1), uniforms)
    frequencies = torch.bincount(drawn, minlength=4) / n
    assert frequencies[2] == 0
    # Five standard deviations of a frequency: 5 * sqrt(0.25 / 40,000) = 0.0125.
    torch.testing.assert_close(frequencies, p, atol=0.0125, rtol=0)


def test_draw_inverts_the_cumulative_distribution_by_hand():
    # Cumulative: 0.25, 0.25, 0.75, 1. A number on an edge belongs to the token right of it.
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(6, -1)
    largest_float_below_one = 1 - 2**-24
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, largest_float_below_one])
    assert draw(logits, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_forbidden_tokens_at_the_end_are_never_drawn():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 700:] = -math.inf
    assert draw(logits, torch.tensor([1 - 2**-24])).item() < 700


def test_greedy_needs_no_filter():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert GREEDY.greedy
    torch.testing.assert_close(warp(logits, GREEDY), logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_out_of_range_values_are_refused_by_name(wrong: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)  # pyright: ignore[reportArgumentType]
