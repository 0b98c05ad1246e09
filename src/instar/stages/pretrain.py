"""Pretraining: packed documents, next token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Gt
from pydantic import model_validator

from instar.corpus.accounts import MANIFEST
from instar.corpus.config import HELD_OUT
from instar.data.encoding import pack_documents
from instar.data.readers import read_all
from instar.data.shards import Tokens
from instar.data.sources import PackedSource
from instar.distributed import world
from instar.evaluation.bits import TOKENS_A_BATCH, bits_per_byte
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.planning.survey import Survey
from instar.planning.workload import Extent, Workload, cut
from instar.stages.base import Job, Stage, TrainedStageConfig, trained
from instar.tokenizer.hf import Tokenizer

Positive = Annotated[int, Gt(0)]


class PretrainConfig(TrainedStageConfig):
    """Teach a fresh model to predict the next token of raw text."""

    stage: str = "pretrain"
    out: Path = Path("{run}/pretrain")
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
    """The same, held out."""
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
        if self.context > self.model.max_position_embeddings:
            raise ValueError(
                f"context {self.context} is longer than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        return self

    def files(self) -> list[Path]:
        """Training and held-out text, or the accounts of a corpus, which hold its hashes."""
        return [self.corpus / MANIFEST] if self.corpus else self.data + self.valid

    def parents(self) -> list[Path]:
        """The tokenizer."""
        return [self.corpus / "tokenizer" if self.corpus else self.tokenizer]

    def held_out(self) -> list[Path]:
        """Held-out text."""
        return [self.corpus / HELD_OUT] if self.corpus else self.valid


def build(config: PretrainConfig) -> Job:
    """Source and objective of pretraining."""
    tokenizer = Tokenizer.load(config.at(*config.parents()))
    shape = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = CausalLM(shape)
    initialize(model, shape, torch.Generator().manual_seed(config.seed))
    held_out = read_all(config.found(config.held_out()), ("text",))[: config.valid_documents]
    if config.corpus:
        tokens = Tokens.open(config.at(config.corpus) / "shards")
    else:
        texts = [d["text"] for d in read_all(config.found(config.data), ("text",))]
        tokens = pack_documents(texts, tokenizer)
    source = PackedSource(
        tokens,
        config.context,
        config.batch_size,
        config.micro_batch,
        config.seed,
        *world(),
        shuffle=config.shuffle,
    )

    def validate() -> dict[str, float]:
        bits = bits_per_byte(model, tokenizer, held_out)  # type: ignore[arg-type]
        scores = {f"bits_per_byte_{language}": r.score for language, r in bits.items()}
        return {"loss": sum(scores.values()) / len(scores), **scores}

    flops = shape.flops_per_token(config.context)
    return Job(NextToken(model), source, model, tokenizer, lambda tokens: flops * tokens, validate)


def needs(config: PretrainConfig, survey: Survey) -> Workload:
    """What pretraining asks of a machine."""
    rows = [
        min(config.micro_batch, config.batch_size - at)
        for at in range(0, config.batch_size, config.micro_batch)
    ]
    valid = survey.whole().documents(config.held_out(), config.valid_documents)
    in_memory = [] if config.corpus else config.data
    return Workload(
        config.model.model_copy(update={"vocab_size": survey.vocab_size}),
        config.training,
        [[Extent(n, config.context, n * config.context) for n in rows]],
        validation=cut(sorted(valid, key=len), TOKENS_A_BATCH // max(map(len, valid))),
        text_bytes=survey.text_bytes(*in_memory),
        batched_bytes=survey.text_bytes(*in_memory),
    )


STAGE = Stage(
    "pretrain", "teach a fresh model to continue text", PretrainConfig, trained(build), build, needs
)
