"""Reward model: a score head on a language model's body learns which reply people prefer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from instar.adapters.io import is_adapter
from instar.adapters.opening import load_tokenizer, score_model_from, to_learn
from instar.distributed import default_device
from instar.errors import UserError
from instar.model.config import RewardForm
from instar.objectives.reward import BradleyTerry
from instar.planning.survey import Survey
from instar.planning.workload import Workload, headless
from instar.stages.base import Job, Stage
from instar.stages.pairs import PairsConfig
from instar.stages.running import trained
from instar.stages.validation import held_out


class RewardConfig(PairsConfig):
    """Learn a score that puts the better of two replies first."""

    stage: str = "reward"
    out: Path = Path("{run}/reward")
    center: Annotated[float, Ge(0)] = 0.01
    """Weight of the term that keeps scores around zero."""
    form: RewardForm = "last"
    """A reply's reward: the score of its `last` token, the `mean` score of its tokens (better for
    shallow models), or the mean and the language model's own opinion as a `prior`."""


def build(config: RewardConfig) -> Job:
    """Source and objective of a reward model."""
    if config.form == "prior" and (config.adapter or is_adapter(config.origin())):
        raise UserError(
            "reward: form is prior, whose weight is no part of an adapter",
            "Choose `last` or `mean`, or train without an adapter.",
        )
    tokenizer = load_tokenizer(config.origin())
    model = score_model_from(config.origin(), config.form, config.quantize)
    model = to_learn(model, config.adapter, config.quantize, config.seed)
    context = model.context
    notes = list[str]()
    pairs = config.read(config.data, tokenizer, context, notes)
    valid = config.read(config.valid, tokenizer, context, notes) if config.valid else []
    objective = BradleyTerry(model, config.center)

    def validate() -> dict[str, float]:
        batches = config.batches(valid, tokenizer)
        return held_out(objective, (batch.to(default_device()) for batch in batches))

    mean_length = sum(map(len, pairs)) // (2 * len(pairs))
    flops = model.config.flops_per_token(mean_length)
    source = config.source(pairs, tokenizer)
    validating = validate if valid else None
    return Job(
        objective,
        source,
        model,
        tokenizer,
        lambda tokens: flops * tokens,
        validating,
        notes=notes,
    )


def needs(config: RewardConfig, survey: Survey) -> Workload:
    """What a reward model asks of a machine; only the form `prior` has a head over all tokens."""
    work = replace(config.needs(survey), speaks=False)
    return work if config.form == "prior" else headless(work)


STAGE = Stage(
    "reward", "learn which of two replies is better", RewardConfig, trained(build), build, needs
)
