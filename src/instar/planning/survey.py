"""How long the rows of a life's data are: measured on its files, or on a sample of the primer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from instar.adapters.base import AdapterConfig
from instar.adapters.io import is_adapter, read_method
from instar.adapters.opening import plain_directory
from instar.checkpoint import read_model_config
from instar.data.packing import Row, conversation_row
from instar.data.pairs import Pair, preference_pairs
from instar.data.readers import Record, read_all
from instar.errors import UserError
from instar.files import matching
from instar.hub import located
from instar.model.config import ModelConfig
from instar.planning.workload import Extent
from instar.tokenizer.chat import prompt_ids
from instar.tokenizer.hf import Tokenizer

NO_LIMIT = 2**31
CONVERSATIONS = Path("{run}/data/conversations.jsonl")
PREFERENCES = Path("{run}/data/preferences.jsonl")


class Survey:
    """Answers a stage's questions about its data and its parents.

    Args:
        run: Directory of a life with data and a tokenizer.
        every: Only each so manyth record is looked at; counts are for all of them.
        scale: How many times larger the whole data is than what lies in ``run``.
        vocab_size: Tokens of the tokenizer that the life will have; that of ``run`` by default.
        on_cpu: Whether stages will run on a processor.
    """

    def __init__(
        self,
        run: Path,
        every: int = 1,
        scale: float = 1.0,
        vocab_size: int | None = None,
        on_cpu: bool = True,
    ) -> None:
        self.run, self.every, self.scale = run, every, scale
        self.tokenizer = Tokenizer.load(run / "tokenizer")
        self.vocab_size = vocab_size or self.tokenizer.vocab_size
        self.on_cpu = on_cpu
        self.repeat = 1
        self.models: dict[Path, ModelConfig] = {}
        self.adapters: dict[Path, AdapterConfig | None] = {}

    def at(self, path: Path) -> Path:
        """A path with `{run}` filled in."""
        return Path(str(path).replace("{run}", str(self.run)))

    def found(self, paths: Sequence[Path]) -> list[Path]:
        """The files that paths, or patterns, stand for."""
        return [file for path in paths for file in matching(self.at(path))]

    def whole(self) -> Survey:
        """The same, for held-out data: small enough to look at every record."""
        every = copy(self)
        every.every, every.repeat = 1, round(self.scale)
        return every

    def records(self, paths: Sequence[Path], required: tuple[str, ...]) -> list[Record]:
        """A sample of what stands in some files."""
        return read_all(self.found(paths), required)[:: self.every] * self.repeat

    def documents(self, paths: Sequence[Path], most: int = NO_LIMIT) -> list[Extent]:
        """Texts, each with its ``<bos>``.

        Args:
            paths: JSON lines with a `text` each.
            most: The most documents of the whole data that count.
        """
        records = self.records(paths, ("text",))
        share = max(1, round(most * self.repeat / (self.every * self.scale)))
        lengths = map(len, self.tokenizer.encode_batch([r["text"] for r in records[:share]]))
        return [Extent(1, length + 1, length) for length in lengths]

    def conversations(self, paths: Sequence[Path], most: int = NO_LIMIT) -> list[Extent]:
        """Rendered conversations of at most so many tokens; the assistant's words are learnt."""
        rows = [_extent(row) for row in self._rows(paths)]
        return [row for row in rows if row.width <= most]

    def replies(self, paths: Sequence[Path]) -> list[int]:
        """Tokens of each conversation's replies: a model that learnt them writes such ones."""
        return [sum(row.learn) for row in self._rows(paths)]

    def taught_replies(self) -> list[int]:
        """Tokens of the replies that the life's conversations teach; none known, any length."""
        try:
            return self.replies([CONVERSATIONS])
        except UserError:
            return [NO_LIMIT]

    def preferred_replies(self) -> list[int]:
        """Tokens of the replies that its preferences choose; as ``taught_replies`` without any."""
        try:
            return [sum(pair.chosen.learn) for pair in self._pairs([PREFERENCES])]
        except UserError:
            return self.taught_replies()

    def _rows(self, paths: Sequence[Path]) -> list[Row]:
        records = self.records(paths, ("messages",))
        return [conversation_row(r["messages"], self.tokenizer, r.place) for r in records]

    def pairs(self, paths: Sequence[Path], most: int = NO_LIMIT) -> list[Extent]:
        """Preference pairs of at most so many tokens a row, two rows each."""
        both = [(_extent(pair.chosen), _extent(pair.rejected)) for pair in self._pairs(paths)]
        pairs = [Extent(2, max(c.width, r.width), c.learnt + r.learnt) for c, r in both]
        return [pair for pair in pairs if pair.width <= most]

    def _pairs(self, paths: Sequence[Path]) -> list[Pair]:
        records = self.records(paths, ("messages", "chosen", "rejected"))
        return preference_pairs(records, self.tokenizer, None)

    def prompts(self, paths: Sequence[Path]) -> list[int]:
        """Tokens of prompts, rendered for a reply."""
        records = self.records(paths, ("messages",))
        return [len(prompt_ids(self.tokenizer, record["messages"])) for record in records]

    def text_bytes(self, *paths: Path) -> int:
        """Size of some files."""
        return round(self.scale * sum(path.stat().st_size for path in self.found(paths)))

    def model(self, directory: Path) -> ModelConfig:
        """Shape of the model that a stage begins with.

        Raises:
            UserError: No earlier stage makes that directory, and it is not a checkpoint.
        """
        if directory in self.models:
            return self.models[directory]
        place = self.at(directory)
        if place.exists() or place == directory:  # `{run}/sft` is no name on the hub
            place = plain_directory(place)
        return read_model_config(place)

    def adapter(self, directory: Path) -> AdapterConfig | None:
        """The adapter that a stage begins with, and that goes on learning; often none."""
        if directory in self.adapters:
            return self.adapters[directory]
        place = self.at(directory)
        if place == directory:
            place = located(place)
        return read_method(place) if is_adapter(place) else None


def _extent(row: Row) -> Extent:
    return Extent(1, len(row), sum(row.learn))


def sampled_primer(values: Mapping[str, Any], scale: float, least: int = 8) -> dict[str, Any]:
    """Settings of a primer ``scale`` times smaller."""
    return {name: max(least, round(value / scale)) for name, value in values.items()}
