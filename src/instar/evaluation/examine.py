"""Everything that is asked of a finished checkpoint, written into its directory."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from instar.adapters.opening import load_score_model, load_tokenizer
from instar.config import Config
from instar.data.readers import read_all
from instar.distributed import default_device
from instar.evaluation.exams import ExamResult, summarise
from instar.files import matching, read_json, write_json
from instar.lineage import (
    LINEAGE,
    hash_file,
    hash_value,
    peak_gpu_bytes,
    peak_rss_bytes,
    reset_peak_gpu,
    reset_peak_rss,
)
from instar.tokenizer.hf import Tokenizer
from instar.training.display import Display

if TYPE_CHECKING:
    from instar.generation.engine import Engine

Positive = Annotated[int, Gt(0)]
RESULT = "exams.json"


class ExamConfig(Config):
    """What is asked, and from where. Paths may begin with `{run}`."""

    exams: Path = Path("{run}/data/exams.jsonl")
    """Questions with verifiers."""
    own: Path | None = None
    """Questions that a user's own text gave (`grow --corpus`)."""
    readings: Path = Path("{run}/data/readings_exam.jsonl")
    """Text for bits per byte that training neither learnt from nor was validated on."""
    train_readings: Path = Path("{run}/data/readings.jsonl")
    """The text that pretraining read, for the n-gram model that pretraining has to beat."""
    pairs: Path = Path("{run}/data/preferences_exam.jsonl")
    """Pairs with gold labels for the reward model, in groups."""
    comparison: Path = Path("{run}/data/comparison.jsonl")
    """Held-out prompts on which two models are compared."""
    samples: Path = Path("{run}/data/samples.jsonl")
    """Prompts that every stage answers, for people to read."""
    max_new_tokens: Positive = 96
    """Longest reply, in tokens."""


class Examiner:
    """Asks the checkpoints of one life.

    Args:
        config: What is asked.
        run: Directory of the life.
        display: Shows how far it is.
    """

    def __init__(self, config: ExamConfig, run: Path, display: Display) -> None:
        self.config, self.run, self.display = config, run, display

    def at(self, path: Path) -> Path:
        """A path of the config with `{run}` filled in."""
        return Path(str(path).replace("{run}", str(self.run)))

    def found(self, path: Path) -> list[Path]:
        """The files that a path of the config, or a pattern, stands for."""
        return matching(self.at(path))

    def own(self) -> list[Path]:
        """The file of a user's own exams, if there is one."""
        return self.found(self.config.own) if self.config.own else []

    def examine(self, directory: Path, against: Path | None, judge: Path | None) -> None:
        """Ask one checkpoint everything, unless that was done before.

        Args:
            directory: The checkpoint; results are written into it.
            against: Checkpoint to compare it with on preference; none skips the comparison.
            judge: Reward model of that comparison.
        """
        stage = read_json(directory / LINEAGE)["stage"]
        key = self._key(directory, against, judge)
        result = directory / RESULT
        if result.exists() and read_json(result).get("key") == key:
            return
        self.display.stage(stage, "exams")
        began = time.perf_counter()
        reset_peak_rss()  # and free memory for the exam, which wants other blocks than the stage
        reset_peak_gpu()
        if stage == "reward":
            exams = self._pairs(directory)
        else:
            exams = self._language_model(directory, stage, against, judge)
        lineage = read_json(directory / LINEAGE)
        cost = lineage["cost"]
        cost["exam_wall_s"] = time.perf_counter() - began
        cost["peak_rss_bytes"] = max(cost["peak_rss_bytes"], peak_rss_bytes())
        cost["peak_gpu_bytes"] = max(cost.get("peak_gpu_bytes", 0), peak_gpu_bytes())
        write_json(directory / LINEAGE, lineage)
        rows = {name: asdict(exam) for name, exam in exams.items()}
        write_json(result, {"key": key, "exams": rows})

    def _key(self, directory: Path, *others: Path | None) -> str:
        """Changes whenever a result could."""
        paths = [getattr(self.config, name) for name in _file_fields()]
        files = [*self.own(), *(file for path in paths for file in self.found(path))]
        made = [read_json(d / LINEAGE)["fingerprint"] for d in (directory, *others) if d]
        settings = self.config.model_dump(mode="json")
        return hash_value([settings, made, [hash_file(path) for path in files]])

    def _language_model(
        self, directory: Path, stage: str, against: Path | None, judge: Path | None
    ) -> dict[str, ExamResult]:
        from instar.evaluation.bits import bits_per_byte
        from instar.evaluation.exams import run_exams, sample_replies
        from instar.generation.engine import Engine

        engine = Engine.load(directory)
        asked = [*self.found(self.config.exams), *self.own()]
        items: list[Any] = read_all(asked, ("messages", "verifier", "exam"))
        limit = self.config.max_new_tokens
        exams = run_exams(engine, engine.tokenizer, items, limit, progress=self.display.step)
        readings: list[Any] = read_all(self.found(self.config.readings), ("text",))
        bits = bits_per_byte(engine.model, engine.tokenizer, readings)
        exams |= {f"bits_per_byte_{language}": result for language, result in bits.items()}
        prompts = [row["prompt"] for row in read_all([self.at(self.config.samples)], ("prompt",))]
        write_json(directory / "samples.json", sample_replies(engine, prompts, limit))
        if stage == "pretrain":
            self._ngram(directory, engine.tokenizer, readings)
        if against and judge:
            self._compare(directory, engine, against, judge)
        return exams

    def _compare(self, directory: Path, engine: Engine, against: Path, judge: Path) -> None:
        from instar.evaluation.comparison import compare
        from instar.generation.engine import Engine

        self.display.note(f"{directory.name}: comparing with {against.name}")
        rows = read_all([self.at(self.config.comparison)], ("question",))
        outcome = compare(
            engine,
            Engine.load(against),
            load_score_model(judge).to(default_device()),
            [row["question"] for row in rows],
            self.config.max_new_tokens,
        )
        write_json(directory / "comparison.json", {"against": against.name, **asdict(outcome)})

    def _ngram(self, directory: Path, tokenizer: Tokenizer, readings: list[Any]) -> None:
        """The baseline that pretraining has to beat: it counts, and understands nothing."""
        from instar.evaluation.ngram import NGram

        texts = [d["text"] for d in read_all(self.found(self.config.train_readings), ("text",))]
        counted = NGram.fit(tokenizer.encode_batch(texts), tokenizer.vocab_size, tokenizer.start_id)
        bits = counted.bits_per_byte(tokenizer, readings)
        write_json(directory / "ngram.json", {k: asdict(v) for k, v in bits.items()})

    def _pairs(self, directory: Path) -> dict[str, ExamResult]:
        """Share of held-out pairs that the reward model puts in the right order, by group."""
        import torch

        from instar.data.pairs import pad_pairs, preference_pairs
        from instar.objectives.reward import reply_scores

        model = load_score_model(directory).to(default_device())
        tokenizer = load_tokenizer(directory)
        rows = read_all([self.at(self.config.pairs)], ("messages", "chosen", "rejected", "group"))
        pairs = preference_pairs(rows, tokenizer, model.context)
        right: dict[str, list[float]] = defaultdict(list)
        for i in range(0, len(pairs), 32):
            batch = pad_pairs(pairs[i : i + 32], tokenizer.pad_id).to(default_device())
            with torch.no_grad():
                chosen, rejected = reply_scores(model, batch).chunk(2)
            for row, won in zip(rows[i : i + 32], (chosen > rejected).tolist(), strict=True):
                right[row["group"]].append(float(won))
        return {group: summarise(wins) for group, wins in right.items()}


def _file_fields() -> list[str]:
    return [name for name, field in ExamConfig.model_fields.items() if field.annotation is Path]
