"""DPO: learn from pairs directly, held near a frozen copy of the model that it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from instar.checkpoint import load_causal_lm
from instar.data.batch import Batch
from instar.data.sources import Annotated as AnnotatedSource
from instar.distributed import default_device
from instar.objectives.language import batch_logprobs
from instar.objectives.preference import DPO, Pairwise
from instar.stages.base import Job, Stage, trained
from instar.stages.reward import PairsConfig
from instar.tokenizer.hf import Tokenizer


class DPOConfig(PairsConfig):
    """Make preferred replies likelier than rejected ones, without a reward model."""

    stage: str = "dpo"
    out: Path = Path("{run}/dpo")
    beta: Annotated[float, Gt(0)] = 0.1
    """Strength of the tie to the reference: how much log-ratio one unit of reward is worth."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of labels believed to be wrong."""


def build(config: DPOConfig) -> Job:
    """Source and objective of DPO."""
    tokenizer = Tokenizer.load(config.at(config.init))
    policy = load_causal_lm(config.at(config.init))
    reference = load_causal_lm(config.at(config.init)).requires_grad_(False).to(default_device())
    context = policy.config.max_position_embeddings
    pairs = config.read(config.data, tokenizer, context)
    held_out = config.read(config.valid, tokenizer, context)

    def annotate(batch: Batch) -> Batch:
        batch = batch.to(default_device())
        return replace(batch, reference_logprobs=batch_logprobs(reference, batch))

    source = AnnotatedSource(config.source(pairs, tokenizer), annotate)
    objective = Pairwise(policy, DPO(config.beta, config.label_smoothing))
    mean_length = sum(map(len, pairs)) // len(pairs)
    # One forward and backward pass of the policy, one forward pass of the reference.
    flops = policy.config.flops_per_token(mean_length)
    flops += policy.config.flops_per_token(mean_length, backward=False)
    validate = config.validator(held_out, tokenizer, objective, annotate)
    return Job(objective, source, policy, tokenizer, flops, validate)


STAGE = Stage("dpo", "learn from preference pairs directly", DPOConfig, trained(build))
