"""How often the documents of each source are learnt, and in which order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from instar.corpus.config import InputConfig, MixConfig


def epochs_of(sizes: dict[str, int], inputs: list[InputConfig], mix: MixConfig) -> dict[str, float]:
    """How often each source is learnt.

    Shares are ``p_i ~ w_i n_i^(1/T)`` of sizes n, weights w and temperature T (Conneau et al.
    2020, arXiv:1911.02116, eq. 1), so that a source is learnt ``w_i (n_i / n_max)^(1/T - 1)``
    times: the largest as often as its weight says, smaller ones more often the higher T is.

    Args:
        sizes: Source to its bytes.
        inputs: The sources' weights.
        mix: Temperature, and the cap on epochs.
    """
    weights = {source.called(): source.weight for source in inputs}
    largest = max(sizes.values(), default=0)
    return {
        name: min(weights[name] * (size / largest) ** (1 / mix.temperature - 1), mix.most_epochs)
        for name, size in sizes.items()
        if size
    }


def arrange(directory: Path, shards: int) -> None:
    """Give every shard its documents in ascending order of their keys: ``order/N.npy``."""
    files = sorted((directory / "documents").glob("*.keys.npy"))
    keys = np.concatenate([np.load(file) for file in files])
    order = np.argsort(keys, kind="stable")
    (directory / "order").mkdir(exist_ok=True)
    for index, mine in enumerate(np.array_split(order, shards)):
        np.save(directory / "order" / f"{index:05d}.npy", mine)
