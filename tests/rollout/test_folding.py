from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from instar.data.batch import IGNORE, Batch
from instar.data.packing import pad_rows, reply_row
from instar.model.config import ModelConfig
from instar.model.stack import SHARED
from instar.rollout.folding import fold, partition, row_tokens

WIDE = ModelConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=2)


def answered(prompts: list[list[int]], lengths: list[int], seed: int = 0) -> Batch:
    """Every prompt with one reply of each length, and numbers for every field."""
    rng = np.random.default_rng(seed)
    rows = [reply_row(p, rng.integers(6, 50, n).tolist()) for p in prompts for n in lengths]
    batch = pad_rows(rows, 0)
    draw = torch.from_numpy(rng.standard_normal(batch.input_ids.shape)).float()
    return replace(batch, advantage=draw * batch.mask)


PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18]]


def test_what_is_shared_stands_once_and_every_target_is_kept() -> None:
    batch = answered(PROMPTS, [3, 1, 5])
    made, held = fold(batch, WIDE, 8)
    assert held == 3 and len(made.input_ids) == 2
    assert made.segment_ids is not None and made.positions is not None
    for row, prompt in enumerate(PROMPTS):
        shared = made.segment_ids[row] == SHARED
        assert made.input_ids[row][shared].tolist() == prompt[:-1]
        assert not made.mask[row][shared].any()
        for document in range(3):
            own = (made.segment_ids[row] == document) & made.mask[row]
            old = batch.rows(slice(3 * row + document, 3 * row + document + 1))
            assert made.targets[row][own].tolist() == old.targets[old.mask].tolist()
            assert made.input_ids[row][own].tolist() == old.input_ids[old.mask].tolist()
            assert made.input_ids[row][own][0] == prompt[-1]
            assert made.positions[row][own].tolist() == old.mask.nonzero()[:, 1].tolist()
            assert made.advantage is not None and old.advantage is not None
            assert torch.equal(made.advantage[row][own], old.advantage[old.mask])
    assert int(made.documents) == int(batch.documents) == 6


def test_only_neighbours_that_begin_alike_share() -> None:
    rows = [reply_row(PROMPTS[i], [20 + i, 30, 31]) for i in (0, 1, 0, 0)]
    made, held = fold(pad_rows(rows, 0), WIDE, 8)
    assert held == 2 and len(made.input_ids) == 3


def test_rows_that_share_nothing_stay_as_they_are() -> None:
    batch = answered(PROMPTS, [4])
    assert fold(batch, WIDE, 8) == (batch, 1)
    nothing = batch.rows(slice(0, 0))
    assert fold(nothing, WIDE, 8) == (nothing, 1)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_row_holds_more_documents_than_it_may(most: int) -> None:
    made, held = fold(answered(PROMPTS, [3, 1, 5]), WIDE, most)
    assert held == most and len(made.input_ids) == 2 * -(-3 // most)


def test_a_row_without_a_target_is_no_obstacle() -> None:
    batch = answered(PROMPTS[:1], [4, 4, 4])
    targets = batch.targets.clone()
    targets[0] = IGNORE
    made, held = fold(replace(batch, targets=targets), WIDE, 8)
    assert held == 2 and int(made.mask.sum()) == 8 and int(made.documents) == 3


def test_long_replies_to_short_prompts_are_not_put_side_by_side() -> None:
    groups, own = [range(8)], np.full(8, 500)
    small = ModelConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    assert partition(groups, np.full(8, 10), own, small, 8)[1] == 1
    parts, held = partition(groups, np.full(8, 2000), np.full(8, 10), small, 8)
    assert held == 8 and row_tokens(parts[0], np.full(8, 2000), np.full(8, 10)) == 2080
