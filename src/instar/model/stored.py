"""Weights as files hold them: found, opened one after another, under the names they have here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from instar.errors import UserError
from instar.files import read_json

StoredDtype = Literal["float32", "bfloat16", "float16"]
"""Formats in which weights are stored; here they are read as float32."""

BUFFERS = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
"""What old files hold beside weights: GPT-2's causal masks, Llama's frequencies."""

INDEX = "model.safetensors.index.json"
"""Which of several files holds which weight."""

BODIES = {"gpt2": "transformer."}
"""How the names of a decoder's weights begin in files, where that is not ``model.``, as here."""


def file_name(name: str, family: str) -> str:
    """The name that one of our weights has in files of a family."""
    return _renamed(name, "model.", BODIES.get(family, "model."))


def _renamed(name: str, before: str, after: str) -> str:
    """A weight's name with another beginning, if it has that one."""
    return after + name.removeprefix(before) if name.startswith(before) else name


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; ``UserError`` where one is missing."""
    index = directory / INDEX
    names = ["model.safetensors"]
    if index.exists():
        found = read_json(index)
        places = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} names no files", "Write it again, or download it again.")
        names = sorted({str(name) for name in places.values()})
    for name in names:
        if not (directory / name).exists():
            pickles = sorted(path.name for path in directory.glob("*.bin"))
            if pickles and not index.exists():
                raise UserError(
                    f"{directory} holds its weights in {pickles[0]}: a pickle, which may run any "
                    "code when it is opened",
                    "Convert it to safetensors: transformers' `from_pretrained` opens it, its "
                    "`save_pretrained` writes model.safetensors.",
                )
            raise UserError(
                f"{directory} is not a checkpoint: it has no {name}",
                "Name a directory that a stage has written, or download what is missing.",
            )
    return [directory / name for name in names]


def damaged(path: Path, error: Exception) -> UserError:
    """What to say of a file that cannot be read."""
    return UserError(
        f"{path} is damaged ({error})",
        "Run the stage that made it again, or download it again.",
    )


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that it has here, in its stored format, one after another.

    Tensors lie in the file until they are copied.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if not BUFFERS.search(name)]  # noqa: SIM118
                for name in names:
                    yield _own_name(name), file.get_tensor(name)
        except SafetensorError as error:
            raise damaged(path, error) from None


def _own_name(name: str) -> str:
    """The name that a weight has here, whatever kind of file it is from."""
    name = _renamed(name, "transformer.", "model.")
    if name.startswith(("model.", "lm_head.", "score.", "prior_weight")):
        return name
    return f"model.{name}"  # the body alone was saved, as in the first GPT-2 files


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in float32; ``UserError`` where files are missing or damaged.

    Besides what is returned, one tensor at a time is in memory.
    """
    found = _tensors(directory)
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in found}


def read_dtype(directory: Path) -> StoredDtype:
    """The format in which ``save_model`` stores these weights without loss.

    Files are asked, not ``config.json``, which may be wrong about them.

    Raises:
        UserError: As ``load_weights`` does.
    """
    formats = {str(tensor.dtype).removeprefix("torch.") for _, tensor in _tensors(directory)}
    for only in ("bfloat16", "float16"):
        if formats == {only}:
            return only
    return "float32"
