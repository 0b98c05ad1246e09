"""Datasets of the Hugging Face hub, as the library ``datasets`` has them."""

from __future__ import annotations

from typing import Any

from instar.corpus.document import EXTRA
from instar.errors import UserError


def hub_rows(path: str) -> Any:
    """A dataset's training split, from the cache or the hub.

    Raises:
        UserError: It cannot be had.
    """
    name, _, subset = path.partition(":")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} is a hub dataset, which needs datasets", EXTRA) from None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset or None, split="train")
    except Exception as error:  # the library raises many kinds, for a missing network alone
        include = f" --include '{subset}/*'" if subset else ""
        raise UserError(
            f"{path} could not be had from the hub ({type(error).__name__}: {error})",
            f"Where there is a network: `hf download {name} --repo-type dataset{include} "
            f"--local-dir DIR`; then bring DIR here and give `--input DIR`.",
        ) from None
