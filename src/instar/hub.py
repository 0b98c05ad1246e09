"""Models by the names that they have on the Hugging Face hub: `gpt2`, `Qwen/Qwen2.5-0.5B`."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from instar.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.json"]
"""Files that a model and its tokenizer are read from."""

UNWANTED = ["*/*", "consolidated*", "onnx*"]
"""The same weights once more, for other programs."""

NAME = re.compile(r"(?![.-])(?!.*(\.\.|--))[\w.-]{1,96}(?<![.-])", re.ASCII)
"""One part of a hub id."""


def located(path: Path) -> Path:
    """The directory of a model, fetched from the hub if it is not here.

    What exists is taken as it is. A name such as ``owner/model`` or ``gpt2`` is looked for on the
    hub; what was fetched before is found again without a network, in the hub's own cache.

    Raises:
        UserError: There is no such directory, and the hub does not give a model of that name; or it
            is a GGUF file.
    """
    if path.suffix == ".gguf" and not path.is_dir():  # a file, and no model on the hub
        if not path.exists():
            raise UserError(f"no such file: {path}", "Check the path.")
        remedy = f"Import it first: instar import {path} --out DIR; then name DIR."
        raise UserError(f"{path} is a GGUF file, and no directory of a model", remedy)
    if path.exists():
        return path
    name = path.as_posix()
    parts = name.split("/")
    if len(parts) > 2 or not all(NAME.fullmatch(part) for part in parts):
        raise UserError(
            f"no such directory: {path}",
            "Check the path, or give the name of a model on the Hugging Face hub: owner/model.",
        )
    return _fetched(name)


def _fetched(name: str) -> Path:
    import huggingface_hub  # takes a while, and most runs have no use for it
    from huggingface_hub import errors

    missing = f"there is no directory {name}, and the Hugging Face hub"
    offline = f"Where there is a network: `hf download {name}`; or give the path of a directory."
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{missing} gives the model of that name only to those who agreed to its terms",
            f"Agree at https://huggingface.co/{name}, and set HF_TOKEN or run `hf auth login`.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{missing} has no model of that name, or not for everyone",
            "Check the spelling; for a private model set HF_TOKEN or run `hf auth login`.",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        part = isinstance(error, errors.IncompleteSnapshotError)
        state = "a part of" if part else "nothing of"
        raise UserError(
            f"{missing} cannot be reached; its cache holds {state} that model", offline
        ) from None
    except Exception as error:  # networks fail in many ways, each with an exception of its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # a full disk is what it is everywhere else
        raise UserError(f"{missing} failed ({type(error).__name__}: {error})", offline) from None
    return Path(found)
