"""The models that a server answers with, each by its name; adapters share their base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from instar.adapters.base import activate
from instar.adapters.io import is_adapter, load_adapter
from instar.adapters.opening import load_causal_lm, plain_directory, tokenizer_directory
from instar.distributed import default_device
from instar.errors import UserError
from instar.generation import Engine
from instar.generation.engine import Precision
from instar.hub import located
from instar.model import CausalLM
from instar.serving.grammar import Vocabulary
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.reading import read_files


@dataclass
class Served:
    """A model that can be asked for.

    Attributes:
        name: What requests call it.
        directory: Where it was read from.
        engine: Writes for it, and for its base's other adapters.
        tokenizer: Its own: adapters of one base may differ in how conversations look, and in what
            ends a turn.
        adapter: Its adapter within the engine.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    directory: Path
    engine: Engine
    tokenizer: Tokenizer
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

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


def load(models: dict[str, Path], precision: Precision = "float32") -> list[Served]:
    """Open every model; adapters of the same base and vocabulary become one engine.

    Args:
        models: Names to directories or names on the hub.
        precision: What the engines compute in.

    Raises:
        UserError: A directory holds no language model, or an adapter does not fit its base.
    """
    homes = {name: tokenizer_directory(directory) for name, directory in models.items()}
    tokenizers = {home: Tokenizer.load(home) for home in dict.fromkeys(homes.values())}
    groups = dict[tuple[Path, bytes], list[str]]()
    for name, directory in models.items():
        words = read_files(homes[name])["tokenizer.json"]
        groups.setdefault((plain_directory(directory).resolve(), words), []).append(name)
    served = dict[str, Served]()
    for (base, _), names in groups.items():
        model, adapters = _opened(base, {name: located(models[name]) for name in names})
        first = tokenizers[homes[names[0]]]
        _check_vocabulary(base, model, first)
        engine = Engine(model.to(default_device()), first, precision=precision)
        for name in names:
            own = tokenizers[homes[name]]
            served[name] = Served(name, located(models[name]), engine, own, adapters.get(name))
    return [served[name] for name in models]


def share_cache(models: Sequence[Served], cache_bytes: int) -> None:
    """Limit the memory for keys and values of all engines together: each gets an equal part."""
    engines = {id(model.engine): model.engine for model in models}.values()
    for engine in engines:
        engine.cache_bytes = max(1, cache_bytes // len(engines))


def _opened(base: Path, models: dict[str, Path]) -> tuple[CausalLM, dict[str, str]]:
    """A base with its adapters, and what they are called within."""
    model = load_causal_lm(base)
    adapters = dict[str, str]()
    for name, directory in models.items():
        if is_adapter(directory):
            adapters[name] = f"adapter{len(adapters)}"  # a name of torch's may hold no dot
            load_adapter(model, directory, adapters[name], base)
    if adapters:
        activate(model, None)
    return model, adapters


def _check_vocabulary(base: Path, model: CausalLM, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is"
            f" {model.config.vocab_size}",
            "Put the tokenizer that the model was trained with there.",
        )
