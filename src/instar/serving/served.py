"""The models that a server answers with, each by its name; adapters share their base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from instar.adapters.base import activate
from instar.adapters.io import is_adapter, load_adapter
from instar.adapters.opening import load_causal_lm, load_tokenizer, plain_directory
from instar.distributed import default_device
from instar.errors import UserError
from instar.generation import Engine
from instar.generation.engine import Precision
from instar.hub import located
from instar.serving.grammar import Vocabulary
from instar.tokenizer.hf import Tokenizer


@dataclass
class Served:
    """A model that can be asked for.

    Attributes:
        name: What requests call it.
        directory: Where it was read from.
        engine: Writes for it, and for its base's other adapters.
        adapter: Its adapter within the engine.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    directory: Path
    engine: Engine
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """The most tokens of prompt and reply together."""
        return self.engine.model.context

    @cached_property
    def stops(self) -> frozenset[int]:
        """What ends a turn."""
        return self.tokenizer.turn_end_ids

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What constraints are made with; built when the first one is asked for."""
        return Vocabulary(self.tokenizer, self.stops)


def named(words: Sequence[str]) -> dict[str, Path]:
    """The models of a command line: ``DIR``, called like the directory, or ``NAME=DIR``.

    A directory's own name may hold ``=``, as those of sweeps do.

    Raises:
        UserError: Two have the same name, or a name is empty.
    """
    found = dict[str, Path]()
    for word in words:
        name, given, place = word.partition("=")
        if not given or Path(word).is_dir():
            name, place = Path(word).resolve().name, word
        directory = Path(place)
        if not name:
            raise UserError(f"{word!r} names no model", "Write DIR or NAME=DIR.")
        if name in found:
            raise UserError(
                f"two models are called {name!r}: {found[name]} and {directory}",
                f"Give one another name: {name}2={directory}",
            )
        found[name] = directory
    return found


def load(
    models: dict[str, Path], precision: Precision = "float32", cache_bytes: int | None = None
) -> list[Served]:
    """Open every model; adapters of the same base become one engine.

    Args:
        models: Names to directories or names on the hub.
        precision: What the engines compute in.
        cache_bytes: The most memory for keys and values of all engines together, of which each
            gets an equal part; without a limit by default.

    Raises:
        UserError: A directory holds no language model, or an adapter does not fit its base.
    """
    groups = dict[tuple[Path, str | None], list[str]]()
    for name, directory in models.items():
        base = plain_directory(directory)
        groups.setdefault((base.resolve(), _own_tokenizer(directory, base)), []).append(name)
    part = None if cache_bytes is None else max(1, cache_bytes // len(groups))
    served = dict[str, Served]()
    for (base, _), names in groups.items():
        places = {name: located(models[name]) for name in names}
        served |= _opened(base, places, precision, part)
    return [served[name] for name in models]


def _opened(
    base: Path, models: dict[str, Path], precision: Precision, cache_bytes: int | None
) -> dict[str, Served]:
    """One engine for a base and its adapters."""
    model = load_causal_lm(base)
    adapters = dict[str, str]()
    for name, directory in models.items():
        if is_adapter(directory):
            adapters[name] = f"adapter{len(adapters)}"  # a name of torch's may hold no dot
            load_adapter(model, directory, adapters[name], base)
    if adapters:
        activate(model, None)
    tokenizer = load_tokenizer(next(iter(models.values())))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is"
            f" {model.config.vocab_size}",
            "Put the tokenizer that the model was trained with there.",
        )
    engine = Engine(
        model.to(default_device()), tokenizer, precision=precision, cache_bytes=cache_bytes
    )
    return {
        name: Served(name, directory, engine, adapters.get(name))
        for name, directory in models.items()
    }


def _own_tokenizer(directory: Path, base: Path) -> str | None:
    """The tokenizer of an adapter if it is another than that of its base."""
    own, usual = (place / "tokenizer.json" for place in (located(directory), base))
    if not own.exists() or own.samefile(usual) if usual.exists() else not own.exists():
        return None
    text = own.read_text(encoding="utf-8")
    return None if usual.exists() and text == usual.read_text(encoding="utf-8") else text
