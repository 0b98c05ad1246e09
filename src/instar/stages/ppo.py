"""PPO: the policy answers, a reward model scores, a critic spreads the score over the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from instar.adapters.base import frozen_twin
from instar.adapters.opening import load_score_model, load_tokenizer, to_learn
from instar.distributed import default_device
from instar.generation.engine import Engine
from instar.objectives.clipped import ActorCritic
from instar.planning.survey import Survey
from instar.planning.workload import Workload, rollout_steps, rollouts
from instar.rollout.judges import Preferred
from instar.rollout.source import RolloutConfig, RolloutSource
from instar.stages.base import Job, Stage
from instar.stages.config import TrainedStageConfig
from instar.stages.running import trained
from instar.training.precision import resolve

Share = Annotated[float, Ge(0), Le(1)]


class PPOConfig(TrainedStageConfig):
    """Improve the policy by its own replies and a reward model's scores."""

    stage: str = "ppo"
    out: Path = Path("{run}/ppo")
    init: Path = Path("{run}/sft")
    """The policy to begin with, which is also the reference to stay near."""
    reward: Path = Path("{run}/reward")
    """The reward model; the critic begins with its weights, and learns what replies are worth from
    their middle."""
    prompts: list[Path] = [Path("{run}/data/prompts.jsonl")]
    """JSON lines with `messages` each, ending with a user turn."""
    rollout: RolloutConfig = RolloutConfig(prompts=64, samples=1, epochs=2, minibatches=2)
    """How much experience to gather, and how often to learn from it."""
    beta: Annotated[float, Ge(0)] = 0.05
    """Price of a nat of divergence from the reference, in units of reward."""
    gamma: Share = 1.0
    """Discount of later tokens."""
    lam: Share = 0.95
    """Lambda of the advantage estimate: 1 trusts what happened, 0 trusts the critic."""
    clip: Annotated[float, Gt(0)] = 0.2
    """How far a probability ratio may usefully move from 1."""
    value_weight: Annotated[float, Ge(0)] = 0.5
    """Weight of the critic's loss."""
    value_clip: Annotated[float, Gt(0)] = 0.5
    """How far a value may usefully move in one rollout."""
    entropy_weight: Annotated[float, Ge(0)] = 0.0
    """Reward for staying undecided."""
    unfinished_penalty: Annotated[float, Ge(0)] = 2.0
    """Taken off the score of replies that were cut off."""

    def files(self) -> list[Path]:
        """The prompts."""
        return self.prompts

    def parents(self) -> list[Path]:
        """The policy and the reward model."""
        return [self.init, self.reward]


def build(config: PPOConfig) -> Job:
    """Source and objective of PPO."""
    device = default_device()
    tokenizer = load_tokenizer(config.origin())
    policy = config.policy().to(device)
    critic = load_score_model(config.checkpoint(config.reward), config.quantize).to(device)
    # A reward model that is an adapter goes on learning as one.
    adapter = None if critic.adapters else config.adapter
    critic = to_learn(critic, adapter, config.quantize, config.seed)
    reward_model = frozen_twin(critic, bool(adapter))
    if critic.config.reward_form == "prior":
        critic.prior_weight.requires_grad_(False)  # of the reward, not of the values
    judge = Preferred(
        policy=policy,
        critic=critic,
        reward_model=reward_model,
        reference=frozen_twin(policy, bool(config.adapter)),
        beta=config.beta,
        gamma=config.gamma,
        lam=config.lam,
        unfinished_penalty=config.unfinished_penalty,
    )
    tasks = config.records(config.prompts, ("messages",))
    dtype = resolve(config.training.precision, default_device())
    engine = Engine(policy, tokenizer, precision=config.rollout.written_in(dtype))  # type: ignore[arg-type]
    source = RolloutSource(tasks, engine, judge, config.rollout, config.seed)  # type: ignore[arg-type]
    objective = ActorCritic(
        policy,
        critic,
        value_weight=config.value_weight,
        value_clip=config.value_clip,
        clip_low=config.clip,
        clip_high=config.clip,
        entropy_weight=config.entropy_weight,
    )
    # Two models learn; every reply costs five forward passes before it is learnt from.
    learn = 2 * policy.config.flops_per_token(config.rollout.max_new_tokens)
    watch = 5 * policy.config.flops_per_token(config.rollout.max_new_tokens, backward=False)
    return Job(
        objective,
        source,
        policy,
        tokenizer,
        lambda tokens: learn * tokens + watch * source.sampled,
    )


def needs(config: PPOConfig, survey: Survey) -> Workload:
    """What PPO asks of a machine: policy, reference, critic and reward model read each rollout."""
    prompts, replies = survey.prompts(config.prompts), survey.preferred_replies()
    steps = config.training.steps
    made = rollouts(prompts, replies, config.rollout, steps, readings=2, scorings=2)
    model = survey.model(config.init)
    return Workload(
        model,
        config.training,
        rollout_steps(made, config.rollout, 1.0, model, survey.on_cpu),
        learners=2,
        frozen=2,
        experience=made,
        rollout=config.rollout,
        text_bytes=survey.text_bytes(*config.prompts),
    )


STAGE = Stage(
    "ppo", "improve the policy with a reward model", PPOConfig, trained(build), build, needs
)
