"""Supervised fine-tuning: rendered conversations, loss on the assistant's words only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from instar.checkpoint import load_causal_lm
from instar.data.packing import Row, check_length, conversation_row, pad_rows
from instar.data.readers import read_all
from instar.data.sources import ExampleSource
from instar.distributed import default_device, world
from instar.objectives.language import NextToken
from instar.planning.survey import Survey
from instar.planning.workload import Extent, Workload, cut, example_steps
from instar.stages.base import Job, Stage, TrainedStageConfig, trained
from instar.stages.validation import held_out
from instar.tokenizer.hf import Tokenizer

Positive = Annotated[int, Gt(0)]


class SFTConfig(TrainedStageConfig):
    """Teach a pretrained model to answer in a conversation."""

    stage: str = "sft"
    out: Path = Path("{run}/sft")
    init: Path = Path("{run}/pretrain")
    """Checkpoint to begin with."""
    data: list[Path] = [Path("{run}/data/conversations.jsonl")]
    """JSON lines with `messages` each."""
    valid: list[Path] = [Path("{run}/data/conversations_valid.jsonl")]
    """The same, held out."""
    replay: list[Path] = []
    """Documents (`text` each) mixed in whole, against forgetting what pretraining taught."""
    replay_documents: Positive = 4000
    """The most documents to mix in."""
    batch_size: Positive = 64
    """Conversations an optimizer step."""
    micro_tokens: Positive = 4096
    """The most tokens a micro-batch, padding included: the less, the less memory."""

    def files(self) -> list[Path]:
        """Training and held-out conversations."""
        return self.data + self.valid + self.replay

    def parents(self) -> list[Path]:
        """The pretrained model."""
        return [self.init]


def build(config: SFTConfig) -> Job:
    """Source and objective of fine-tuning."""
    tokenizer = Tokenizer.load(config.at(config.init))
    model = load_causal_lm(config.at(config.init))
    context = model.config.max_position_embeddings

    def rows(paths: list[Path]) -> list[Row]:
        records = read_all(config.found(paths), ("messages",))
        made = [conversation_row(r["messages"], tokenizer, r.place) for r in records]
        check_length(made, context, [record.place for record in records])
        return made

    examples = rows(config.data)
    if config.replay:
        texts = [d["text"] for d in read_all(config.found(config.replay), ("text",))]
        for ids in tokenizer.encode_batch(texts[: config.replay_documents]):
            ids = [tokenizer.bos_id, *ids][:context]
            examples.append(Row(ids, [True] * len(ids)))
    valid = rows(config.valid)

    def collate(some: list[Row]):
        return pad_rows(some, tokenizer.pad_id)

    source = ExampleSource(
        examples, collate, config.batch_size, config.micro_tokens, config.seed, *world()
    )
    objective = NextToken(model)

    def validate() -> dict[str, float]:
        cuts = range(0, len(valid), config.batch_size)
        batches = (collate(valid[i : i + config.batch_size]) for i in cuts)
        return held_out(objective, (batch.to(default_device()) for batch in batches))

    mean_length = sum(map(len, examples)) // len(examples)
    flops = model.config.flops_per_token(mean_length)
    return Job(objective, source, model, tokenizer, lambda tokens: flops * tokens, validate)


def needs(config: SFTConfig, survey: Survey) -> Workload:
    """What fine-tuning asks of a machine."""
    model = survey.model(config.init)
    examples = survey.conversations(config.data)
    if config.replay:
        longest = model.max_position_embeddings
        documents = survey.documents(config.replay, config.replay_documents)
        examples += [Extent(1, min(d.width, longest), min(d.learnt, longest)) for d in documents]
    return Workload(
        model,
        config.training,
        example_steps(
            examples, config.batch_size, config.micro_tokens, config.seed, config.training.steps
        ),
        validation=cut(survey.whole().conversations(config.valid), config.batch_size),
        text_bytes=survey.text_bytes(*config.data, *config.replay),
        batched_bytes=survey.text_bytes(*config.replay, most=config.replay_documents),
    )


STAGE = Stage("sft", "teach a pretrained model to answer", SFTConfig, trained(build), build, needs)
