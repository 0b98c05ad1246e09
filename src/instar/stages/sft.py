"""Supervised fine-tuning: rendered conversations, loss on the assistant's words only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated

from annotated_types import Gt
from pydantic import model_validator

from instar.adapters.opening import load_tokenizer
from instar.data.batch import Batch
from instar.data.packing import Row, check_length, conversation_row, pad_rows, short_ones
from instar.data.sources import ExampleSource, in_order
from instar.distributed import default_device, world
from instar.planning.survey import NO_LIMIT, Survey
from instar.planning.workload import Extent, Workload, cut, example_steps
from instar.stages.base import Job, Stage
from instar.stages.config import TrainedStageConfig
from instar.stages.keeping import Amount, KeepConfig, drawn, hold, replayed
from instar.stages.running import trained
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
    """The same, held out; none where nothing is to be validated."""
    replay: list[Path] = []
    """Documents (`text` each) mixed in whole, against forgetting what pretraining taught."""
    replay_documents: Amount = 4000
    """The most documents to mix in, others in each epoch; below 1, their share of the conversations
    and documents."""
    replay_conversations: list[Path] = []
    """Earlier conversations mixed in among the new, against forgetting what fine-tuning taught."""
    replay_share: Amount = 0.5
    """How many of those, others in each epoch: a share of all conversations, or from 1 on a
    count."""
    keep: KeepConfig = KeepConfig()
    """What else holds the model to what it knew."""
    batch_size: Positive = 64
    """Conversations an optimizer step."""
    max_length: Positive | None = None
    """Conversations of more tokens are left out; by default all must fit the model's context."""
    micro_tokens: Positive = 4096
    """The most tokens a micro-batch, padding included: the less, the less memory."""

    @model_validator(mode="after")
    def _knows_what_was_earlier(self) -> SFTConfig:
        if self.keep.ewc and not (self.replay or self.replay_conversations):
            raise ValueError("keep.ewc needs earlier data: replay or replay_conversations")
        return self

    def files(self) -> list[Path]:
        """Training, held-out and earlier data."""
        return self.data + self.valid + self.replay + self.replay_conversations

    def parents(self) -> list[Path]:
        """The pretrained model."""
        return [self.init]


def build(config: SFTConfig) -> Job:
    """Source and objective of fine-tuning."""
    tokenizer = load_tokenizer(config.origin())
    model = config.policy()
    context, notes = model.context, list[str]()

    def rows(paths: list[Path]) -> list[Row]:
        records = config.records(paths, ("messages",))
        made = [conversation_row(r["messages"], tokenizer, r.place) for r in records]
        if config.max_length is None:
            check_length(made, context, [record.place for record in records])
            return made
        return short_ones(made, len, min(config.max_length, context), notes)

    def collate(some: Sequence[Row]) -> Batch:
        return pad_rows(some, tokenizer.pad_id)

    new, valid = rows(config.data), rows(config.valid) if config.valid else []
    pools = _earlier(config, tokenizer, len(new), context, rows)
    rehearsed = [] if config.keep.ewc_only else pools
    source = ExampleSource(
        new, collate, config.batch_size, config.micro_tokens, config.seed, *world(), rehearsed
    )

    def sample() -> list[Batch]:
        mixed = [row for pool, count in pools for row in drawn(pool, count, config.seed)]
        some = drawn(mixed, config.keep.ewc_examples, config.seed)
        return [collate([row]) for row in some]

    held = hold(
        model,
        config.keep,
        config.training,
        source,
        sample,
        source.mean_length,
        adapter=bool(config.adapter),
    )

    def validate() -> dict[str, float]:
        batches = map(collate, in_order(valid, config.batch_size, config.micro_tokens))
        return held_out(held.measured, (batch.to(default_device()) for batch in batches))

    def flops(tokens: int) -> int:
        return held.flops * tokens

    validating = validate if valid else None
    return Job(held.objective, held.source, model, tokenizer, flops, validating, held.finish, notes)


def _earlier(
    config: SFTConfig,
    tokenizer: Tokenizer,
    new: int,
    context: int,
    rows: Callable[[list[Path]], list[Row]],
) -> list[tuple[list[Row], int]]:
    """What was learnt before, conversations and documents, and how many of each an epoch has."""
    pools: list[tuple[list[Row], int]] = []
    if config.replay_conversations:
        everything = rows(config.replay_conversations)
        pools.append((everything, min(replayed(config.replay_share, new), len(everything))))
    if config.replay:
        texts = [d["text"] for d in config.records(config.replay, ("text",))]
        present = new + sum(count for _, count in pools)
        count = replayed(config.replay_documents, present)
        batches = max(1, (present + count) // config.batch_size)
        epochs = ceil(config.training.steps / batches)
        encoded = tokenizer.encode_batch(drawn(texts, count * epochs, config.seed))
        cut = [[*tokenizer.before, *ids][:context] for ids in encoded]
        # What has no second token teaches nothing.
        pools.append(([Row(ids, [True] * len(ids)) for ids in cut if len(ids) > 1], count))
    return pools


def needs(config: SFTConfig, survey: Survey) -> Workload:
    """What fine-tuning asks of a machine."""
    model = survey.model(config.init)
    most = config.max_length or NO_LIMIT
    examples = survey.conversations(config.data, most)
    valid = survey.whole().conversations(config.valid, most) if config.valid else []
    # A survey may look at a part of the data; counts are for all of it.
    seen = survey.repeat / (survey.every * survey.scale)
    if config.replay_conversations and not config.keep.ewc_only:
        count = seen * replayed(config.replay_share, round(len(examples) / seen))
        earlier = survey.conversations(config.replay_conversations, most)
        examples += drawn(earlier, round(count), config.seed)
    if config.replay and not config.keep.ewc_only:
        longest = model.max_position_embeddings
        count = replayed(config.replay_documents, round(len(examples) / seen))
        documents = survey.documents(config.replay, count)
        examples += [Extent(1, min(d.width, longest), min(d.learnt, longest)) for d in documents]
    work = Workload(
        model,
        config.training,
        example_steps(
            examples, config.batch_size, config.micro_tokens, config.seed, config.training.steps
        ),
        validation=cut(valid, config.batch_size, config.micro_tokens),
        text_bytes=survey.text_bytes(*config.data, *config.replay, *config.replay_conversations),
    )
    return config.keep.needs(work, survey.on_cpu)


STAGE = Stage("sft", "teach a pretrained model to answer", SFTConfig, trained(build), build, needs)
