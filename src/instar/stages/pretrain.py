"""Pretraining: packed documents, next token; of a fresh model, or on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Gt
from pydantic import model_validator

from instar.adapters.opening import load_tokenizer
from instar.corpus.accounts import MANIFEST
from instar.corpus.config import HELD_OUT
from instar.data.batch import Batch
from instar.data.encoding import pack_documents
from instar.data.packing import Row, pad_rows
from instar.data.readers import Record
from instar.data.shards import Tokens
from instar.data.sources import PackedSource
from instar.distributed import world
from instar.errors import UserError
from instar.evaluation.bits import TOKENS_A_BATCH, bits_per_byte
from instar.files import read_json
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.planning.survey import Survey
from instar.planning.workload import Extent, Workload, cut
from instar.stages.base import Job, Stage
from instar.stages.config import TrainedStageConfig
from instar.stages.keeping import Amount, KeepConfig, drawn, hold, replayed
from instar.stages.running import trained
from instar.tokenizer.hf import Tokenizer

Positive = Annotated[int, Gt(0)]
VOCABULARY = "tokenizer.json"


class PretrainConfig(TrainedStageConfig):
    """Teach a model, a fresh one unless `init` is set, to predict the next token of raw text."""

    stage: str = "pretrain"
    out: Path = Path("{run}/pretrain")
    init: Path | None = None
    """Checkpoint to go on from (continued pretraining): its shape and tokenizer are used, and
    `model` and `tokenizer` are not looked at."""
    replay: list[Path] = []
    """Earlier documents (`text` each) read among the new ones, against forgetting."""
    replay_documents: Amount = 0.25
    """How many of those: a share of all documents, or from 1 on a count."""
    keep: KeepConfig = KeepConfig()
    """What else holds the model to what it knew."""
    tokenizer: Path = Path("{run}/tokenizer")
    """Directory of the tokenizer."""
    corpus: Path | None = None
    """Directory that `instar data prepare` made: its shards are learnt, its tokenizer and held-out
    documents are used, and `tokenizer`, `data` and `valid` are not looked at."""
    shuffle: bool = True
    """Whether rows come in a new order each epoch; without, in that of a corpus' own `order`."""
    data: list[Path] = [Path("{run}/data/readings.jsonl")]
    """JSON lines with a `text` each."""
    valid: list[Path] = [Path("{run}/data/readings_valid.jsonl")]
    """The same, held out; none where nothing is to be validated."""
    valid_documents: Positive = 200
    """Held-out documents measured at each validation."""
    model: ModelConfig = ModelConfig()
    """Shape of the model; the tokenizer sets `vocab_size`."""
    context: Positive = 256
    """Tokens a row."""
    batch_size: Positive = 16
    """Rows an optimizer step."""
    micro_batch: Positive = 16
    """Rows a micro-batch."""

    @model_validator(mode="after")
    def _rows_fit(self) -> PretrainConfig:
        if self.init is None and self.context > self.model.max_position_embeddings:
            raise ValueError(
                f"context {self.context} is longer than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        return self

    @model_validator(mode="after")
    def _goes_on_from_something(self) -> PretrainConfig:
        if self.init is None and self.keep != KeepConfig():
            raise ValueError("keep holds a model to its start, and a fresh one has none: set init")
        if self.corpus and self.replay:
            raise ValueError("a corpus is a stream of its own: mix earlier text into its recipe")
        if self.keep.ewc and not self.replay:
            raise ValueError("keep.ewc needs earlier data: replay")
        return self

    def files(self) -> list[Path]:
        """Training and held-out text, or the accounts of a corpus, which hold its hashes."""
        return [self.corpus / MANIFEST] if self.corpus else self.data + self.valid + self.replay

    def parents(self) -> list[Path]:
        """The checkpoint to go on from, and the tokenizer where that is not its own."""
        tokenizer = [self.corpus / "tokenizer"] if self.corpus else [self.tokenizer]
        if self.init is None:
            return tokenizer
        return [self.init, *(tokenizer if self.corpus else [])]

    def beginning(self) -> Path | None:
        """The checkpoint to go on from."""
        return self.init

    def held_out(self) -> list[Path]:
        """Held-out text; a small corpus may hold none out."""
        if not self.corpus:
            return self.valid
        some = self.found([self.corpus / HELD_OUT])
        return some if any(file.stat().st_size for file in some) else []


def build(config: PretrainConfig) -> Job:
    """Source and objective of pretraining."""
    tokenizer, model = _beginning(config)
    held_out = _documents(config)
    earlier: list[str] = []
    if config.corpus:
        tokens = Tokens.open(config.at(config.corpus) / "shards")
    else:
        texts = [d["text"] for d in config.records(config.data, ("text",))]
        if config.replay:
            known = [d["text"] for d in config.records(config.replay, ("text",))]
            count = replayed(config.replay_documents, len(texts))
            earlier = drawn(known, count, config.seed)
        tokens = pack_documents(texts + ([] if config.keep.ewc_only else earlier), tokenizer)
    source = PackedSource(
        tokens,
        config.context,
        config.batch_size,
        config.micro_batch,
        config.seed,
        *world(),
        shuffle=config.shuffle,
    )

    def sample() -> list[Batch]:
        some = drawn(earlier, config.keep.ewc_examples, config.seed)
        rows = [[*tokenizer.before, *ids][: config.context] for ids in tokenizer.encode_batch(some)]
        return [pad_rows([Row(ids, [True] * len(ids))], tokenizer.pad_id) for ids in rows]

    fresh = config.init is None
    held = hold(
        model,
        config.keep,
        config.training,
        source,
        sample,
        config.context,
        fresh,
        bool(config.adapter),
    )

    def validate() -> dict[str, float]:
        bits = bits_per_byte(model, tokenizer, held_out)  # type: ignore[arg-type]
        scores = {f"bits_per_byte_{language}": r.score for language, r in bits.items()}
        return {"loss": sum(scores.values()) / len(scores), **scores}

    def flops(tokens: int) -> int:
        return held.flops * tokens

    validating = validate if held_out else None
    return Job(held.objective, held.source, model, tokenizer, flops, validating, held.finish)


def _documents(config: PretrainConfig) -> list[Record]:
    """What is validated on; nothing where nothing is held out."""
    paths = config.held_out()
    return config.records(paths, ("text",))[: config.valid_documents] if paths else []


def _beginning(config: PretrainConfig) -> tuple[Tokenizer, CausalLM]:
    """The tokenizer, and a fresh model or that of the checkpoint to go on from.

    Raises:
        UserError: The checkpoint does not fit the corpus, or the rows.
    """
    if config.init is None:
        if config.adapter or config.quantize:
            raise UserError(
                "pretrain: an adapter needs a model that knows something, and this one is fresh",
                "Set `init`, or leave out `adapter` and `quantize`.",
            )
        tokenizer = Tokenizer.load(config.at(*config.parents()))
        shape = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        model = CausalLM(shape)
        initialize(model, shape, torch.Generator().manual_seed(config.seed))
        return tokenizer, model
    init = config.checkpoint(config.init)
    tokenizer, model = load_tokenizer(init), config.policy()
    if config.corpus:
        own = config.at(config.corpus) / "tokenizer" / VOCABULARY
        if read_json(own) != read_json(init / VOCABULARY):
            raise UserError(
                f"{config.corpus} was encoded with another tokenizer than that of {config.init}",
                "Prepare the corpus with the checkpoint's tokenizer.",
            )
    if config.context > model.context:
        raise UserError(
            f"context {config.context} is longer than the {model.context} "
            f"positions of {config.init}",
            "Lower `context`.",
        )
    return tokenizer, model


def needs(config: PretrainConfig, survey: Survey) -> Workload:
    """What pretraining asks of a machine."""
    rows = [
        min(config.micro_batch, config.batch_size - at)
        for at in range(0, config.batch_size, config.micro_batch)
    ]
    paths = config.held_out()
    valid = survey.whole().documents(paths, config.valid_documents) if paths else []
    longest = max(map(len, valid), default=1)
    in_memory = [] if config.corpus else config.data + config.replay
    fresh = config.model.model_copy(update={"vocab_size": survey.vocab_size})
    work = Workload(
        survey.model(config.init) if config.init else fresh,
        config.training,
        [[Extent(n, config.context, n * config.context) for n in rows]],
        validation=cut(sorted(valid, key=len), TOKENS_A_BATCH // longest),
        text_bytes=survey.text_bytes(*in_memory),
    )
    return config.keep.needs(work, survey.on_cpu)


STAGE = Stage(
    "pretrain", "teach a fresh model to continue text", PretrainConfig, trained(build), build, needs
)
