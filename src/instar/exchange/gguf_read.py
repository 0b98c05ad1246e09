"""A GGUF file: keys, and tensors that are read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instar.errors import UserError, installing
from instar.exchange.gguf_names import ARCHITECTURES, ROPE_FACTORS, from_gguf, hugging_face_name

if TYPE_CHECKING:
    from gguf import GGUFReader

AGAIN = "It is cut short or damaged; download it again."


def library() -> Any:
    """The package ``gguf``; raises ``UserError`` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("gguf is not installed", installing("exchange")) from None
    return gguf


class GGUFFile:
    """What a GGUF file holds.

    Args:
        path: The file.

    Raises:
        UserError: It is none, a part of one, damaged, or of an architecture or type that is not
            known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _opened(path)
        try:
            self.metadata: dict[str, Any] = {
                name: entry.contents() for name, entry in reader.fields.items()
            }
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error})", AGAIN) from None
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            raise UserError(
                f"{path} is one of {parts} parts of a file",
                "Join the parts first: llama-gguf-split --merge FIRST-PART WHOLE-FILE.",
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.arch: str = self.metadata.get("general.architecture", "")
        if self.arch not in ARCHITECTURES:
            raise UserError(
                f"{path}: the architecture is {self.arch!r}",
                f"instar reads {', '.join(ARCHITECTURES)}.",
            )
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{path} has no tensor token_embd.weight", AGAIN)

    def types(self) -> dict[str, int]:
        """How many tensors there are of each type, such as ``Q4_1``."""
        counts: dict[str, int] = {}
        for tensor in self._tensors.values():
            name = tensor.tensor_type.name
            counts[name] = counts.get(name, 0) + 1
        return counts

    def matrix_type(self) -> str:
        """The type of most of the file's bytes."""
        total: dict[str, int] = {}
        for tensor in self._tensors.values():
            name = tensor.tensor_type.name
            total[name] = total.get(name, 0) + tensor.n_bytes
        return max(total, key=lambda name: total[name])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self._tensors["token_embd.weight"].shape[-1])

    @cached_property
    def small(self) -> dict[str, Any]:
        """Name to nothing, but for the rotary factors, which a shape is made from."""
        known: dict[str, Any] = dict.fromkeys(self._tensors)
        if ROPE_FACTORS in known:
            known[ROPE_FACTORS] = self._values(ROPE_FACTORS)
        return known

    def __len__(self) -> int:
        return len(self._tensors)

    def weights(self, heads: int, key_heads: int) -> Iterator[tuple[str, np.ndarray]]:
        """Hugging Face's names and tensors, one after the other, in float32.

        Args:
            heads: Query heads.
            key_heads: Key heads.

        Raises:
            UserError: A tensor has no place in this architecture, is of an unknown type, or
                contradicts the file's keys.
        """
        for name in self._tensors:
            if name == ROPE_FACTORS:
                continue
            theirs = hugging_face_name(self.arch, name)
            if theirs is None:
                raise UserError(
                    f"{self.path}: {self.arch} has no tensor {name}", "instar cannot use this file."
                )
            values = self._values(name)
            if "{}" in theirs:
                for number, expert in enumerate(values):
                    yield theirs.format(number), expert
                continue
            try:
                sorted_anew = from_gguf(self.arch, name, values, heads, key_heads)
            except ValueError:
                raise UserError(
                    f"{self.path}: {name} has the shape {values.shape}, which its {heads} heads "
                    f"({key_heads} of keys) do not divide",
                    AGAIN,
                ) from None
            yield theirs, sorted_anew

    def _values(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        quants = library().quants
        try:
            return quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {name} is of type {tensor.tensor_type.name}",
                f"instar reads {', '.join(_known_types())}.",
            ) from None


def _known_types() -> list[str]:
    """The types of tensors that the library can turn into numbers."""
    gguf = library()
    known = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError:
            continue
        known.append(kind.name)
    return known


def _opened(path: Path) -> GGUFReader:
    """The library's reader, its exceptions made into ours."""
    gguf = library()
    if not path.is_file():
        raise UserError(f"no such file: {path}", "Check the path.")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file", "It would begin with the letters GGUF.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        if "GGMLQuantizationType" in str(error):
            number = re.findall(r"\d+", str(error))[-1]
            raise UserError(
                f"{path}: a tensor is of type {number}, which is not known",
                f"instar reads {', '.join(_known_types())}.",
            ) from None
        raise UserError(f"{path} cannot be read ({error})", AGAIN) from None
