"""RLVR: groups of answers to tasks whose truth a program knows; no reward model, no critic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from instar.adapters.base import frozen_twin
from instar.adapters.opening import load_tokenizer
from instar.distributed import default_device
from instar.errors import UserError
from instar.generation.engine import Engine
from instar.objectives.clipped import ClippedPolicy
from instar.planning.survey import Survey
from instar.planning.workload import Workload, rollout_steps, rollouts
from instar.rollout.advantages import Normalisation
from instar.rollout.judges import Verified
from instar.rollout.source import RolloutConfig, RolloutSource
from instar.rollout.verifiers import VERIFIERS
from instar.stages.base import Job, Stage
from instar.stages.config import TrainedStageConfig
from instar.stages.running import trained
from instar.training.precision import resolve


class RLVRConfig(TrainedStageConfig):
    """Reinforce what a program verifies to be right."""

    stage: str = "rlvr"
    out: Path = Path("{run}/rlvr")
    init: Path = Path("{run}/dpo")
    """The policy to begin with, which is also the reference to stay near."""
    tasks: list[Path] = [Path("{run}/data/tasks.jsonl")]
    """JSON lines with `messages`, `verifier` and `answer` each."""
    rollout: RolloutConfig = RolloutConfig()
    """How many tasks, and how many answers to each."""
    skip_decided: bool = True
    """Whether tasks whose answers were all right or all wrong are left out of a step, unless all
    are: no answer to them is better than another. The loss is then a mean over the tasks that are
    left, and only they pay `kl_weight` (DAPO, arXiv:2503.14476, section 3.2, samples others in
    their place)."""
    scale: Literal["group", "none"] = "group"
    """`group` divides advantages by their spread (GRPO), `none` does not (Dr. GRPO)."""
    normalisation: Normalisation = "dapo"
    """How the tokens of an answer are weighted."""
    clip_low: Annotated[float, Gt(0)] = 0.2
    """How far a probability ratio may usefully fall below 1."""
    clip_high: Annotated[float, Gt(0)] = 0.28
    """How far it may usefully rise above 1 (DAPO lets rare tokens grow faster)."""
    kl_weight: Annotated[float, Ge(0)] = 0.0
    """Price of leaving the reference, a nat of the k3 estimate."""

    def files(self) -> list[Path]:
        """The tasks."""
        return self.tasks

    def parents(self) -> list[Path]:
        """The policy."""
        return [self.init]


def build(config: RLVRConfig) -> Job:
    """Source and objective of RLVR."""
    device = default_device()
    tokenizer = load_tokenizer(config.origin())
    policy = config.policy().to(device)
    reference = frozen_twin(policy, bool(config.adapter)) if config.kl_weight else None
    tasks = config.records(config.tasks, ("messages", "verifier", "answer"))
    for task in tasks:
        if task["verifier"] not in VERIFIERS:
            raise UserError(
                f"{task.place}: unknown verifier {task['verifier']!r}",
                f"Known are: {', '.join(VERIFIERS)}.",
            )
    rollout = config.rollout
    judge = Verified(
        policy=policy,
        reference=reference,
        on_policy=rollout.epochs * rollout.minibatches == 1,
        skip_decided=config.skip_decided,
        scale=config.scale,
        normalisation=config.normalisation,
        max_new_tokens=rollout.max_new_tokens,
    )
    dtype = resolve(config.training.precision, default_device())
    engine = Engine(policy, tokenizer, precision=rollout.written_in(dtype))  # type: ignore[arg-type]
    source = RolloutSource(tasks, engine, judge, rollout, config.seed)  # type: ignore[arg-type]
    objective = ClippedPolicy(policy, config.clip_low, config.clip_high, kl_weight=config.kl_weight)
    learn = policy.config.flops_per_token(rollout.max_new_tokens)
    watch = policy.config.flops_per_token(rollout.max_new_tokens, backward=False)
    watch *= 1 + (reference is not None)
    return Job(
        objective,
        source,
        policy,
        tokenizer,
        lambda tokens: learn * tokens + watch * source.sampled,
    )


def needs(config: RLVRConfig, survey: Survey) -> Workload:
    """What RLVR asks of a machine.

    How many tasks will be undecided nobody knows before. If their difficulties were spread evenly,
    n samples would agree by chance in 2 of n + 1 cases. Nor how long answers will be: those that
    are worked out win, so they are taken to be as long as the longer half of the taught ones.
    """
    rollout, steps = config.rollout, config.training.steps
    reference = int(config.kl_weight > 0)
    on_policy = rollout.epochs * rollout.minibatches == 1
    prompts, replies = survey.prompts(config.tasks), sorted(survey.taught_replies())
    readings = reference + (not on_policy)
    longer = replies[len(replies) // 2 :]
    made = rollouts(prompts, longer, rollout, steps, readings, scorings=0)
    kept = 1 - 2 / (rollout.samples + 1) if config.skip_decided and rollout.samples > 1 else 1.0
    model = survey.model(config.init)
    return Workload(
        model,
        config.training,
        rollout_steps(made, rollout, kept, model, survey.on_cpu),
        frozen=reference,
        experience=made,
        rollout=rollout,
        text_bytes=survey.text_bytes(*config.tasks),
    )


STAGE = Stage(
    "rlvr", "reinforce answers that a program verifies", RLVRConfig, trained(build), build, needs
)
