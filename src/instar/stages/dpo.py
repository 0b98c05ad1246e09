"""DPO and its kin: learn from pairs directly, without a reward model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Gt, Lt
from pydantic import Field

from instar.adapters.base import frozen_twin
from instar.adapters.opening import load_tokenizer
from instar.config import Config
from instar.data.batch import Batch
from instar.data.sources import AnnotatedSource
from instar.distributed import default_device
from instar.objectives.language import batch_logprobs
from instar.objectives.preference import DPO, IPO, ORPO, PairLoss, Pairwise, SimPO
from instar.planning.survey import Survey
from instar.planning.workload import Workload
from instar.stages.base import Job, Stage
from instar.stages.pairs import PairsConfig
from instar.stages.running import trained
from instar.stages.validation import held_out

Positive = Annotated[float, Gt(0)]


class DPOLoss(Config):
    """Direct preference optimisation: held near a frozen copy of the model that it began with."""

    method: Literal["dpo"] = "dpo"
    """The method; a YAML file may name another."""
    beta: Positive = 0.1
    """Strength of the tie to the reference: how much log-ratio one unit of reward is worth."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of labels believed to be wrong."""
    nll_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of fine-tuning on the better reply, which keeps it from becoming unlikely along
    with the worse one."""

    def make(self) -> PairLoss:
        """The loss."""
        return DPO(self.beta, self.label_smoothing, self.nll_weight)


class IPOLoss(Config):
    """Identity preference optimisation: a margin to aim at instead of a slope."""

    method: Literal["ipo"] = "ipo"
    """The method; a YAML file may name another."""
    beta: Positive = 0.1
    """Strength of the tie to the reference; the margin aimed at is `1 / (2 beta)`."""

    def make(self) -> PairLoss:
        """The loss."""
        return IPO(self.beta)


class SimPOLoss(Config):
    """Simple preference optimisation: likelihood a token, no reference."""

    method: Literal["simpo"] = "simpo"
    """The method; a YAML file may name another."""
    beta: Positive = 2.0
    """Scale of the reward."""
    gamma: Annotated[float, Ge(0)] = 1.0
    """Margin by which the better reply should win."""

    def make(self) -> PairLoss:
        """The loss."""
        return SimPO(self.beta, self.gamma)


class ORPOLoss(Config):
    """Odds-ratio preference optimisation: fine-tuning and preference at once, no reference."""

    method: Literal["orpo"] = "orpo"
    """The method; a YAML file may name another."""
    weight: Positive = 0.1
    """Weight of the push away from the worse reply, the paper's lambda."""

    def make(self) -> PairLoss:
        """The loss."""
        return ORPO(self.weight)


class DPOConfig(PairsConfig):
    """Make preferred replies likelier than rejected ones, without a reward model."""

    stage: str = "dpo"
    out: Path = Path("{run}/dpo")
    # On the command line the YAML file's method keeps its place, and its options are plain ones.
    loss: Annotated[
        DPOLoss | IPOLoss | SimPOLoss | ORPOLoss,
        Field(discriminator="method"),
        tyro.conf.AvoidSubcommands,
    ] = DPOLoss()
    """How to learn from a pair: a `method` (dpo, ipo, simpo or orpo) and its parameters."""


def build(config: DPOConfig) -> Job:
    """Source and objective of learning from pairs."""
    tokenizer = load_tokenizer(config.origin())
    policy = config.policy().to(default_device())
    loss = config.loss.make()
    reference = frozen_twin(policy, bool(config.adapter)) if loss.needs_reference else None
    context = policy.context
    notes = list[str]()
    pairs = config.read(config.data, tokenizer, context, notes)
    valid = config.read(config.valid, tokenizer, context, notes) if config.valid else []

    def annotate(batch: Batch) -> Batch:
        batch = batch.to(default_device())
        if reference is None:
            return batch
        return replace(batch, reference_logprobs=batch_logprobs(reference, batch))

    source = AnnotatedSource(config.source(pairs, tokenizer), annotate)
    objective = Pairwise(policy, loss)

    def validate() -> dict[str, float]:
        return held_out(objective, map(annotate, config.batches(valid, tokenizer)))

    mean_length = sum(map(len, pairs)) // (2 * len(pairs))
    # One forward and backward pass of the policy, one forward pass of the reference.
    flops = policy.config.flops_per_token(mean_length)
    if reference is not None:
        flops += policy.config.flops_per_token(mean_length, backward=False)
    validating = validate if valid else None
    return Job(
        objective,
        source,
        policy,
        tokenizer,
        lambda tokens: flops * tokens,
        validating,
        notes=notes,
    )


def needs(config: DPOConfig, survey: Survey) -> Workload:
    """What learning from pairs asks of a machine; a reference reads every pair as well."""
    reference = int(config.loss.make().needs_reference)
    return replace(config.needs(survey), frozen=reference, readings=reference)


STAGE = Stage(
    "dpo", "learn from preference pairs directly", DPOConfig, trained(build), build, needs
)
