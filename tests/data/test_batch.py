from __future__ import annotations

import torch

from instar.data.batch import IGNORE, WIDTH_MULTIPLE, Batch


def _batch(width: int = 5) -> Batch:
    """Ids 10, 11, ...; a reply at columns 2-3, one in columns 1-4, and a reply of one token."""
    ids = torch.arange(10, 10 + width).repeat(3, 1)
    targets = torch.full_like(ids, IGNORE)
    targets[0, 1:3] = ids[0, 2:4]
    targets[1, 0:4] = ids[1, 1:5]
    targets[2, 0] = ids[2, 1]
    return Batch(input_ids=ids, targets=targets)


def test_a_rows_length_goes_to_its_last_target() -> None:
    batch = _batch()
    assert batch.row_lengths().tolist() == [4, 5, 2]
    for row, length in enumerate(batch.row_lengths().tolist()):
        targets = batch.targets[row]
        assert batch.input_ids[row, length - 1] == targets[targets != IGNORE][-1]


def test_trimming_drops_padding_and_no_target() -> None:
    batch = _batch(width=3 * WIDTH_MULTIPLE)
    trimmed = batch.trimmed()
    assert trimmed.input_ids.shape == trimmed.targets.shape == (3, WIDTH_MULTIPLE)
    torch.testing.assert_close(trimmed.targets, batch.targets[:, :WIDTH_MULTIPLE])
    assert trimmed.mask.sum() == batch.mask.sum()


def test_a_row_that_fills_its_width_is_not_trimmed() -> None:
    batch = _batch(width=5)
    assert batch.trimmed().input_ids.shape == (3, 5)
