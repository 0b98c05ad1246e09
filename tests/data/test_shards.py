from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instar.data.shards import Tokens, is_shards, write_shard
from instar.data.sources import PackedSource
from instar.errors import UserError

STREAM = np.arange(1003, dtype=np.uint16)


def written(directory: Path, lengths: list[int]) -> Tokens:
    """The stream in shards of these lengths, and what is left in one more."""
    for number, ids in enumerate(np.split(STREAM, np.cumsum(lengths))):
        write_shard(directory, f"train-{number:05d}-000", ids, np.array([len(ids)]))
    return Tokens.open(directory)


@pytest.mark.parametrize("lengths", [[], [1], [1002], [400, 3, 5, 1, 300], [7] * 140])
def test_shards_read_as_one_array_does(lengths: list[int], tmp_path: Path) -> None:
    tokens = written(tmp_path, lengths)
    assert is_shards(tmp_path)
    assert len(tokens) == len(STREAM)
    for start in (0, 1, 395, 399, 400, 407, 702, 1000, 1002):
        for length in (0, 1, 11, 500, 2000):
            found = tokens[start : start + length]
            assert found.tolist() == STREAM[start : start + length].tolist()
            assert found.dtype == STREAM.dtype or not length


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_source_draws_the_same_from_shards(world_size: int, tmp_path: Path) -> None:
    """Three epochs and more, so that every window is asked for, the last one too."""
    tokens = written(tmp_path, [400, 3, 5, 1, 300])
    for rank in range(world_size):
        settings: dict[str, Any] = {"context": 10, "batch_size": 8, "micro_batch": 4, "seed": 3}
        settings |= {"rank": rank, "world_size": world_size}
        one, other = PackedSource(STREAM, **settings), PackedSource(tokens, **settings)
        for _ in range(40):
            for mine, theirs in zip(next(one), next(other), strict=True):
                assert mine.input_ids.tolist() == theirs.input_ids.tolist()
                assert mine.targets.tolist() == theirs.targets.tolist()


def test_without_shuffling_windows_come_in_order(tmp_path: Path) -> None:
    tokens = written(tmp_path, [500])
    source = PackedSource(tokens, 10, 8, 8, seed=3, shuffle=False)
    begins = [
        row[0] for _ in range(12) for batch in next(source) for row in batch.input_ids.tolist()
    ]
    assert begins == list(range(begins[0], begins[0] + 960, 10))


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        tokens = written(tmp_path, [3] * 330)
        assert [int(tokens[at : at + 1][0]) for at in range(1003)] == STREAM.tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no train shards"):
        Tokens.open(tmp_path)
    (tmp_path / "train-00000-000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"train-00000-000\.npy is damaged"):
        Tokens.open(tmp_path)
