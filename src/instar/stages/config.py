"""What every stage is told, and what its outcome depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator

import instar
from instar.adapters.methods import Method
from instar.adapters.opening import Bits, content_of, load_causal_lm, plain_directory, to_learn
from instar.config import Config
from instar.data.readers import Record, read_all
from instar.errors import UserError
from instar.files import matching
from instar.hub import located
from instar.lineage import hash_file, hash_value
from instar.model import CausalLM
from instar.training.loop import TrainingConfig


class StageConfig(Config):
    """What every stage is told. Paths may begin with `{run}`, the directory of the whole life."""

    stage: str
    """Which stage this is."""
    run: Path = Path("runs/mini")
    """Directory of the whole life; `{run}` in the other paths stands for it."""
    out: Path
    """Directory to write."""
    seed: int = 0
    """Decides initial weights, order of the data and samples."""

    @field_validator("stage")
    @classmethod
    def _is_this_stage(cls, value: str) -> str:
        expected = cls.model_fields["stage"].default
        if value != expected:
            raise ValueError(f"these settings are for the stage {expected!r}")
        return value

    def at(self, path: Path) -> Path:
        """A path of this config with `{run}` filled in."""
        return Path(str(path).replace("{run}", str(self.run)))

    def checkpoint(self, path: Path) -> Path:
        """The directory of a model that a path, or a name on the hub, stands for."""
        here = self.at(path)
        # `{run}/sft` is no name on the hub; `{run}/m.gguf` is no directory.
        return located(here) if here == path or here.suffix == ".gguf" else here

    def found(self, paths: Sequence[Path]) -> list[Path]:
        """The files that paths of this config stand for; a path may be a pattern, as `*.jsonl`.

        Raises:
            UserError: A pattern fits no file.
        """
        files: list[Path] = []
        for path in map(self.at, paths):
            some = matching(path)
            if not some:
                raise UserError(f"{self.stage}: no file fits {path}", "Check the path.")
            files += some
        return files

    def records(self, paths: Sequence[Path], required: tuple[str, ...]) -> list[Record]:
        """The objects in the files that paths of this config stand for.

        Raises:
            UserError: As ``found`` and ``read_all`` do.
        """
        return read_all(self.found(paths), required)

    def files(self) -> list[Path]:
        """The files that the stage reads, or patterns of them."""
        return []

    def parents(self) -> list[Path]:
        """The directories of other stages that it builds on."""
        return []

    def provenance(self) -> dict[str, Any]:
        """Everything the outcome depends on: settings, data, parents, version, and their hash.

        How often a run logs or saves, and how it is spread over processes, is left out: it changes
        what is written, not what is learnt (but for rounding, and for a run that diverges: it goes
        back to what was saved last).

        Raises:
            UserError: Something that the stage reads is not there, or it would write in its place.
        """
        files: dict[str, Path] = {}
        for path in self.files():
            for file in self.found([path]):
                if not file.is_file():
                    raise UserError(f"{self.stage}: no such file: {file}", "Check the path.")
                files[str(path) if file == self.at(path) else f"{path}: {file.name}"] = file
        self._spare([*map(self.at, self.parents()), *files.values()])
        means = {"log_every", "save_every", "track", "parallel", "activation_checkpointing"}
        record = {
            "config": self.model_dump(mode="json", exclude={"run": True, "training": means}),
            "data": {name: hash_file(file) for name, file in files.items()},
            "parents": {str(path): _content(self.checkpoint(path)) for path in self.parents()},
            "version": instar.__version__,
        }
        self._spare(plain_directory(self.checkpoint(path)) for path in self.parents())
        return {**record, "fingerprint": hash_value(record)}

    def _spare(self, paths: Iterable[Path]) -> None:
        """See that none of what is read will be replaced, nor anything around it."""
        out = self.at(self.out).resolve()
        for path in paths:
            if out == path.resolve() or out in path.resolve().parents:
                raise UserError(
                    f"{self.stage}: out is {self.out}, and {path}, which it reads, would be lost",
                    "Choose another directory (--out).",
                )


def _content(directory: Path) -> str:
    """Hash of what a stage takes over from a parent."""
    content = content_of(directory)
    if content is None:
        raise UserError(
            f"{directory} is not a checkpoint",
            "Run the stage that makes it first, or mend `init`.",
        )
    return content


class TrainedStageConfig(StageConfig):
    """A stage that trains something."""

    training: TrainingConfig
    """How long, and how carefully."""
    adapter: Method | None = None
    """A few new weights that learn in place of the model: a `method` (lora, dora, relora, adalora,
    ia3, bitfit, bottleneck, prefix or prompt) and its settings. What is written is then an adapter
    (PEFT's kind of directory) beside its base. Where `init` is an adapter, that one goes on
    learning."""
    quantize: Bits | None = None
    """Keep the frozen weights under an adapter in four bits (QLoRA) while it learns: less memory,
    slower."""

    def beginning(self) -> Path | None:
        """The path or name of the model that it begins with; none where that is fresh."""
        return self.parents()[0]

    def origin(self) -> Path:
        """The directory whose model learns."""
        return self.checkpoint(self.parents()[0])

    def named_origin(self) -> Path:
        """The same as it is written: a name on the hub stays one."""
        return self.at(self.parents()[0])

    def policy(self) -> CausalLM:
        """The language model that learns."""
        model = load_causal_lm(self.origin(), self.quantize)
        return to_learn(model, self.adapter, self.quantize, self.seed)
