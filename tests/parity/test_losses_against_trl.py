"""Our losses and gradients equal those that trl's own trainers compute.

trl's loss methods run unchanged, on a transformers model with our weights; what they need of a
trainer (metrics, one process, settings) is a plain record. Prompts differ in length and are
padded on the side that each trainer expects.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

from instar.data.batch import IGNORE, Batch
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize
from instar.objectives.base import Loss, Objective
from instar.objectives.clipped import ClippedPolicy
from instar.objectives.language import NextToken, batch_logprobs
from instar.objectives.preference import DPO, IPO, ORPO, Pairwise, Replies, SimPO
from instar.objectives.reward import BradleyTerry
from instar.rollout.advantages import token_weights

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE: dict[str, Any] = dict(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    initializer_range=0.4,
    tie_word_embeddings=True,
)
PROMPTS, REPLIES = (4, 2, 6, 3), (5, 7, 1, 4)
MAX_REPLY = max(REPLIES)


class OneProcess:
    """What trl asks of an accelerator when there is a single process on a CPU."""

    device = torch.device("cpu")
    num_processes = 1
    is_main_process = True

    def autocast(self) -> Any:
        return warnings.catch_warnings()

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    gather_for_metrics = gather


def trainer(model: nn.Module, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=model,
        accelerator=OneProcess(),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def policies(seed: int) -> tuple[CausalLM, Qwen3ForCausalLM]:
    """The same random weights in our model and in transformers'."""
    config = ModelConfig(**SHAPE)
    ours = CausalLM(config)
    initialize(ours, config, torch.Generator().manual_seed(seed))
    theirs = Qwen3ForCausalLM(Qwen3Config(**SHAPE, pad_token_id=0))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return ours, theirs.train()


@dataclass
class Rows:
    """Four prompts with replies, padded on the right: the batch, and what trl calls its parts."""

    batch: Batch
    attention: Tensor
    reply: Tensor

    @property
    def ids(self) -> Tensor:
        return self.batch.input_ids


@pytest.fixture
def rows() -> Rows:
    g = torch.Generator().manual_seed(5)
    lengths = [p + r for p, r in zip(PROMPTS, REPLIES, strict=True)]
    ids = torch.zeros(4, max(lengths), dtype=torch.long)
    attention, reply = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        ids[i, :length] = torch.randint(1, 29, (length,), generator=g)
        attention[i, :length] = 1
        reply[i, prompt:length] = 1
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = torch.where(reply[:, 1:] == 1, ids[:, 1:], IGNORE)
    return Rows(Batch(input_ids=ids, targets=targets), attention, reply)


def assert_same(objective: Objective, batch: Batch, ours: nn.Module, loss: Any, theirs: Any):
    """Loss and every gradient agree; returns our metrics, divided."""
    mine: Loss = objective(batch)
    mean = mine.total / objective.count(batch)
    torch.testing.assert_close(mean, loss, atol=1e-5, rtol=1e-5)
    ours.zero_grad()
    theirs.zero_grad()
    mean.backward()
    loss.backward()
    reference = dict(theirs.named_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in ours.parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, reference[name].grad, atol=1e-5, rtol=1e-4)
    return {name: (value / count).item() for name, (value, count) in mine.metrics.items()}


def test_sft(rows: Rows):
    ours, theirs = policies(0)
    stub = trainer(
        theirs,
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
    )
    stub.accelerator.parallelism_config = None
    inputs = {
        "input_ids": rows.ids,
        "attention_mask": rows.attention,
        "labels": rows.ids.masked_fill(rows.reply == 0, IGNORE),
    }
    loss = SFTTrainer.compute_loss(stub, theirs, inputs)  # pyright: ignore
    assert_same(NextToken(ours), rows.batch, ours, loss, theirs)


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward(rows: Rows, center: float):
    config = ModelConfig(**SHAPE)
    ours = ScoreModel(config)
    initialize(ours, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = SHAPE | {"pad_token_id": 0, "num_labels": 1}
    theirs = Qwen3ForSequenceClassification(Qwen3Config(**settings))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    stub = trainer(theirs, args=SimpleNamespace(center_rewards_coefficient=center or None))
    inputs = {"input_ids": rows.ids, "attention_mask": rows.attention}
    loss = RewardTrainer.compute_loss(stub, theirs.train(), inputs)  # pyright: ignore
    metrics = assert_same(BradleyTerry(ours, center), rows.batch, ours, loss, theirs)
    for name in ("accuracy", "margin"):
        assert metrics[name] == pytest.approx(stub._metrics["train"][name][0], abs=1e-5)


@pytest.mark.parametrize(
    ("method", "loss_type"),
    [(DPO(beta=0.3), "sigmoid"), (IPO(beta=0.3), "ipo")],
)
def test_dpo_and_ipo(rows: Rows, method: DPO | IPO, loss_type: str):
    ours, theirs = policies(0)
    frozen, reference = policies(1)
    stub = trainer(
        theirs,
        ref_model=reference,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=method.beta,
        label_smoothing=0.0,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    inputs = {
        "input_ids": rows.ids,
        "attention_mask": rows.attention,
        "completion_mask": rows.reply,
    }
    loss = DPOTrainer._compute_loss(stub, theirs, inputs, False)  # pyright: ignore
    with torch.no_grad():
        batch = replace(rows.batch, reference_logprobs=batch_logprobs(frozen, rows.batch))
    metrics = assert_same(Pairwise(ours, method), batch, ours, loss, theirs)
    logged = {name: values[0] for name, values in stub._metrics["train"].items()}
    assert metrics["chosen_logprob"] == pytest.approx(logged["logps/chosen"], rel=1e-5)
    assert metrics["rejected_logprob"] == pytest.approx(logged["logps/rejected"], rel=1e-5)
    if loss_type == "sigmoid":  # trl logs DPO's reward for IPO as well
        assert metrics["margin"] == pytest.approx(logged["rewards/margins"], rel=1e-4)
        assert metrics["accuracy"] == logged["rewards/accuracies"]


MEANS = torch.tensor([-0.7, -1.9, -0.02]), torch.tensor([-1.1, -0.4, -3.0])


def as_replies(mean: Tensor) -> Replies:
    lengths = torch.tensor([3.0, 8.0, 1.0])
    return Replies(mean * lengths, lengths, torch.zeros(3))


def cpo_losses(**settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    stub = SimpleNamespace(accelerator=OneProcess(), alpha=0.0, **settings)
    return CPOTrainer.cpo_loss(stub, *MEANS)  # pyright: ignore


def test_simpo():
    losses, chosen, rejected = cpo_losses(
        loss_type="simpo", beta=2.0, simpo_gamma=0.6, label_smoothing=0.0
    )
    ours = SimPO(beta=2.0, gamma=0.6)
    pair = as_replies(MEANS[0]), as_replies(MEANS[1])
    torch.testing.assert_close(ours.loss(*pair), losses)
    torch.testing.assert_close(ours.reward(pair[0]), chosen)
    torch.testing.assert_close(ours.reward(pair[1]), rejected)


def test_label_smoothing():
    # trl's DPO has no plain smoothing; its CPO has, and is DPO with a uniform reference.
    losses, *_ = cpo_losses(loss_type="sigmoid", beta=0.5, label_smoothing=0.2)
    pair = (Replies(mean, torch.ones(3), torch.zeros(3)) for mean in MEANS)
    torch.testing.assert_close(DPO(0.5, 0.2).loss(*pair), losses)


def test_orpo():
    stub = SimpleNamespace(accelerator=OneProcess(), beta=0.3)
    gain, *_ = ORPOTrainer.odds_ratio_loss(stub, *MEANS)  # pyright: ignore
    # trl subtracts the gain from the chosen reply's negative log-likelihood.
    pair = as_replies(MEANS[0]), as_replies(MEANS[1])
    torch.testing.assert_close(ORPO(lambda_=0.3).loss(*pair), -MEANS[0] - gain)


def align(per_target: Tensor) -> Tensor:
    """Values of reply tokens ``(B, T)`` at our columns, moved to trl's reply columns."""
    out = torch.zeros(4, MAX_REPLY)
    for i, (prompt, length) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        out[i, :length] = per_target[i, prompt - 1 : prompt - 1 + length]
    return out


def grpo_inputs(rows: Rows, batch: Batch, advantages: Tensor) -> dict[str, Any]:
    """The same rows as trl wants them: prompts padded on the left, replies on the right."""
    width = max(PROMPTS)
    inputs: dict[str, Any] = {
        name: torch.zeros(4, n, dtype=torch.long)
        for name, n in (
            ("prompt_ids", width),
            ("prompt_mask", width),
            ("completion_ids", MAX_REPLY),
            ("completion_mask", MAX_REPLY),
        )
    }
    for i, (prompt, length) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        inputs["prompt_ids"][i, width - prompt :] = rows.ids[i, :prompt]
        inputs["prompt_mask"][i, width - prompt :] = 1
        inputs["completion_ids"][i, :length] = rows.ids[i, prompt : prompt + length]
        inputs["completion_mask"][i, :length] = 1
    inputs["advantages"] = advantages
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    if batch.old_logprobs is not None:
        inputs["old_per_token_logps"] = align(batch.old_logprobs)
    if batch.reference_logprobs is not None:
        inputs["ref_per_token_logps"] = align(batch.reference_logprobs)
    return inputs


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("on_policy", [False, True])
def test_grpo_family(rows: Rows, loss_type: Any, beta: float, on_policy: bool):
    ours, theirs = policies(0)
    frozen, _ = policies(1)
    advantages = torch.tensor([1.0, -0.8, -1.2, 0.5])
    noise = torch.randn(rows.ids.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        old = batch_logprobs(ours, rows.batch) + 0.3 * noise
        reference = batch_logprobs(frozen, rows.batch)
    # bnpo and dapo are both means over tokens; trl differs in whose tokens it counts.
    normalisation = "dapo" if loss_type == "bnpo" else loss_type
    batch = replace(
        rows.batch,
        advantage=advantages[:, None].expand(rows.ids.shape),
        old_logprobs=None if on_policy else old,
        reference_logprobs=reference if beta else None,
        weight=token_weights(rows.batch.mask, normalisation, max_length=12),
    )
    stub = trainer(
        theirs,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        max_completion_length=12,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )
    stub._get_per_token_logps_and_entropies = (
        GRPOTrainer._get_per_token_logps_and_entropies.__get__(stub)
    )
    inputs = grpo_inputs(rows, batch, advantages)
    loss = GRPOTrainer._compute_loss(stub, theirs, inputs)  # pyright: ignore
    objective = ClippedPolicy(ours, clip_low=0.2, clip_high=0.28, kl_weight=beta)
    metrics = assert_same(objective, batch, ours, loss, theirs)
    logged = {name: values[0] for name, values in stub._metrics["train"].items()}
    assert metrics["entropy"] == pytest.approx(logged["entropy"], rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(logged["clip_ratio/region_mean"])
    assert on_policy or metrics["clip_fraction"] > 0
    if beta:
        assert metrics["kl_to_reference"] == pytest.approx(logged["kl"], rel=1e-4)
