"""Safetensors, one tensor at a time, so that a model need not fit into memory twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from instar.files import write_json
from instar.model.stored import INDEX, damaged, weight_files

SHARD_BYTES = 2 * 10**9
"""How large a file may grow; as much is held in memory."""


class StoredWeights:
    """The tensors of a checkpoint directory, read when they are asked for.

    Args:
        directory: Holds ``model.safetensors``, or several files and an index.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.files = weight_files(directory)
        self._file_of: dict[str, Any] = {}
        self._stack = ExitStack()
        for path in self.files:
            try:
                opened = self._stack.enter_context(safe_open(path, "pt"))
            except SafetensorError as error:
                raise damaged(path, error) from None
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write tensors as safetensors, in several files where one would grow too large.

    Args:
        directory: Where to.
        tensors: Names and tensors; each is let go of once it is written.

    Returns:
        How many numbers they hold.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = parameters = 0

    def flush() -> None:
        nonlocal held, size
        shards.append(list(held))
        part = directory / f"part-{len(shards)}.safetensors"
        save_file(held, part, metadata={"format": "pt"})
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        parameters += tensor.numel()
    flush()
    _rename(directory, shards, total)
    return parameters


def _rename(directory: Path, shards: list[list[str]], total: int) -> None:
    """Give the files the names that everybody looks for, now that their number is known."""
    if len(shards) == 1:
        (directory / "part-1.safetensors").rename(directory / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}.safetensors").rename(directory / final)
        where |= dict.fromkeys(names, final)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types that weights are stored in, by their names in ``config.json``."""
