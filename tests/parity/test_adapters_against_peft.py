"""LoRA and its family equal PEFT's, and their directories travel both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from instar.adapters.adalora import AdaLoRA, AdaLoRAConfig
from instar.adapters.base import DEFAULT, AdapterConfig, add, learnt_parts, merge, using
from instar.adapters.dora import DoRAConfig
from instar.adapters.io import load_adapter, save_adapter
from instar.adapters.lora import LoRAConfig
from instar.adapters.opening import merged
from instar.checkpoint import load_causal_lm, score_model_from
from instar.model import CausalLM

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ".is_gradient_checkpointing. is deprecated:FutureWarning",  # called by PEFT itself
        "The following rank_pattern keys did not match:RuntimeWarning",  # its own AdaLoRA's, too
        "Adapter 'default'. . LoRA tensor.s. have invalid shape",  # a layer that lost all ranks
        "PiSSA changes the base weights of the model:UserWarning",
    )
]

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]

OURS: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(rank=4, alpha=8, targets=TARGETS),
    "rslora": LoRAConfig(rank=4, alpha=8, targets="all-linear", rank_stabilised=True),
    "some blocks": LoRAConfig(rank=4, alpha=8, targets=TARGETS, layers=[1]),
    "patterns": LoRAConfig(
        rank=4, alpha=8, targets=TARGETS, ranks={"q_proj": 2}, alphas={"0.mlp.down_proj": 5}
    ),
    "all norms": LoRAConfig(rank=4, alpha=8, targets=TARGETS, modules_to_save=["norm"]),
    "a norm": LoRAConfig(rank=4, alpha=8, targets=TARGETS, modules_to_save=["model.norm"]),
    "dora": DoRAConfig(rank=4, alpha=8, targets=TARGETS),
    "adalora": AdaLoRAConfig(rank=4, target_rank=2, alpha=8, targets=TARGETS),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
THEIRS: dict[str, dict[str, Any]] = {
    "lora": COMMON,
    "rslora": COMMON | {"target_modules": ALL, "use_rslora": True},
    "some blocks": COMMON | {"layers_to_transform": [1]},
    "patterns": COMMON | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.mlp.down_proj": 5}},
    "all norms": COMMON | {"modules_to_save": ["norm"]},
    "a norm": COMMON | {"modules_to_save": ["model.norm"]},
    "dora": COMMON | {"use_dora": True},
}


def their_config(method: str, task: str = "CAUSAL_LM") -> peft.PeftConfig:
    if method == "adalora":
        return peft.AdaLoraConfig(
            init_r=4,
            target_r=2,
            lora_alpha=8,
            target_modules=TARGETS,
            total_step=8,
            tinit=1,
            tfinal=2,
            task_type=task,
        )
    return peft.LoraConfig(task_type=task, **THEIRS[method])


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config_class, model_class = FAMILIES[request.param]
    torch.manual_seed(0)
    values = dict(SHAPE)
    if request.param == "llama":
        values |= {"tie_word_embeddings": False, "attention_bias": True}
    if request.param == "qwen2":
        values["hidden_size"] = 64  # its heads have no width of their own
    model = model_class(config_class(**values))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # they begin at zero, where nobody would miss them
                weight.uniform_(-0.5, 0.5)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 262, (2, 20), generator=torch.Generator().manual_seed(1))


def theirs_on(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def stir(weights: dict[str, torch.Tensor]) -> None:
    """The same new values for weights of the same names, in either package."""
    with torch.no_grad():
        for index, name in enumerate(sorted(weights)):
            noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(index))
            weights[name].add_(noise, alpha=0.1)


def of_theirs(model: Any) -> dict[str, torch.Tensor]:
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {n.replace(".default", "").replace(".modules_to_save", ""): n for n in learning}
    names = {
        short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): n
        for short, n in names.items()
    }
    return {short: learning[n] for short, n in names.items()}


def of_ours(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{path}.{name}": weight
        for path, part in learnt_parts(model, DEFAULT).items()
        for name, weight in part.named_parameters()
    }


def step(logits: torch.Tensor, ids: torch.Tensor, learning: dict[str, torch.Tensor]) -> None:
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.optim.SGD(list(learning.values()), lr=0.5).step()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", OURS)
def test_forward_gradient_and_step(method: str, base: Path, ids: torch.Tensor) -> None:
    ours = load_causal_lm(base)
    add(ours, OURS[method])
    theirs = peft.get_peft_model(theirs_on(base), their_config(method))
    mine, other = of_ours(ours), of_theirs(theirs)
    assert {n: w.shape for n, w in mine.items()} == {n: w.shape for n, w in other.items()}
    with torch.no_grad():
        for name, weight in mine.items():
            other[name].copy_(weight)
    stir(mine)
    stir(other)
    close(ours(ids), theirs(ids).logits)
    step(ours(ids), ids, mine)
    step(theirs(ids).logits, ids, other)
    for name, weight in mine.items():
        assert weight.grad is not None and other[name].grad is not None
        close(weight.grad, other[name].grad)
        close(weight, other[name])
    assert all(weight.grad.abs().max() > 1e-6 for weight in mine.values()), "nothing idle"
    close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("trained", [False, True])
def test_ours_opens_in_peft(
    method: str, trained: bool, base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    ours = load_causal_lm(base)
    add(ours, OURS[method], seed=3)
    if trained:
        stir(of_ours(ours))
        step(ours(ids), ids, of_ours(ours))
    save_adapter(ours, DEFAULT, tmp_path / "adapter", base)
    theirs = peft.PeftModel.from_pretrained(theirs_on(base), tmp_path / "adapter").eval()
    loaded = peft.get_peft_model_state_dict(theirs)
    assert loaded.keys() == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    close(theirs(ids).logits, ours(ids))
    close(theirs.merge_and_unload()(ids).logits, ours(ids))


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("trained", [False, True])
def test_theirs_opens_here(
    method: str, trained: bool, base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    theirs = peft.get_peft_model(theirs_on(base), their_config(method))
    if trained:
        stir(of_theirs(theirs))
        step(theirs(ids).logits, ids, of_theirs(theirs))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_causal_lm(base)
    load_adapter(ours, tmp_path / "adapter", base=base)
    close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("method", OURS)
def test_merged_equals_unmerged(method: str, base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    ours = load_causal_lm(base)
    plain = ours(ids)
    add(ours, OURS[method])
    stir(of_ours(ours))
    save_adapter(ours, DEFAULT, tmp_path / "adapter", base)
    spoken = ours(ids)
    assert (spoken - plain).abs().max() > 0.01
    close(merged(tmp_path / "adapter")(ids), spoken)
    with using(ours, None):
        assert torch.equal(ours(ids), plain), "the base is as it was"
    merge(ours)
    close(ours(ids), spoken)
    assert {n for n, _ in ours.named_parameters()} == {
        n for n, _ in load_causal_lm(base).named_parameters()
    }


def pissa_of_theirs(base: Path) -> Any:
    config = peft.LoraConfig(**COMMON, task_type="CAUSAL_LM", init_lora_weights="pissa")
    return peft.get_peft_model(theirs_on(base), config)


def test_pissa_learns_as_theirs_does(base: Path, ids: torch.Tensor) -> None:
    ours = load_causal_lm(base)
    add(ours, LoRAConfig(rank=4, alpha=8, targets=TARGETS, start="pissa"))
    theirs = pissa_of_theirs(base)
    mine, other = of_ours(ours), of_theirs(theirs)
    for name in other:
        if "lora_A" in name:  # the signs of singular vectors are anyone's choice
            twin = name.replace("lora_A", "lora_B")
            close(mine[twin] @ mine[name], other[twin] @ other[name])
            signs = (mine[name] * other[name]).sum(1).sign()
            with torch.no_grad():
                other[name].mul_(signs[:, None])
                other[twin].mul_(signs)
    for name, weight in mine.items():
        close(weight, other[name])
    close(ours(ids), theirs(ids).logits)
    step(ours(ids), ids, mine)
    step(theirs(ids).logits, ids, other)
    for name, weight in mine.items():
        close(weight, other[name])
    close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("stabilised", [False, True])
def test_pissa_is_stored_for_the_untouched_base(
    stabilised: bool, base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = LoRAConfig(
        rank=4,
        alpha=8,
        targets=TARGETS,
        start="pissa",
        rank_stabilised=stabilised,
        ranks={"v_proj": 2},
        alphas={"q_proj": 3},
    )
    ours = load_causal_lm(base)
    add(ours, config)
    stir(of_ours(ours))
    save_adapter(ours, DEFAULT, tmp_path / "adapter", base)
    theirs = peft.PeftModel.from_pretrained(theirs_on(base), tmp_path / "adapter")
    assert theirs.peft_config["default"].r == 8
    close(theirs(ids).logits, ours(ids))
    again = load_causal_lm(base)
    load_adapter(again, tmp_path / "adapter")
    close(again(ids), ours(ids))


@pytest.mark.parametrize("converted", [False, True])
def test_their_pissa_opens_here(
    converted: bool, base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = pissa_of_theirs(base)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    stir(of_theirs(theirs))
    expected = theirs(ids).logits
    how = {"path_initial_model_for_weight_conversion": str(tmp_path / "first")}
    theirs.save_pretrained(tmp_path / "adapter", **(how if converted else {}))
    ours = load_causal_lm(base)
    config = load_adapter(ours, tmp_path / "adapter")
    assert isinstance(config, LoRAConfig) and config.start == ("kaiming" if converted else "pissa")
    close(ours(ids), expected)


def importance(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{key}": getattr(part, f"{name}_{key}")
        for path, part in learnt_parts(model, DEFAULT).items()
        if isinstance(part, AdaLoRA)
        for key in ("lora_A", "lora_B", "lora_E")
    }


@pytest.mark.parametrize("saved_after", [4, 8])
def test_adalora_allots_as_theirs_does(
    saved_after: int, base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = AdaLoRAConfig(
        rank=4, target_rank=2, alpha=8, targets=TARGETS, initial_steps=1, final_steps=2
    )
    ours = load_causal_lm(base)
    add(ours, config)
    theirs = peft.get_peft_model(theirs_on(base), their_config("adalora"))
    mine, other = of_ours(ours), of_theirs(theirs)
    with torch.no_grad():
        for name, weight in mine.items():
            other[name].copy_(weight)
    stir(mine)
    stir(other)
    optimizers = [torch.optim.SGD(list(w.values()), lr=0.5) for w in (mine, other)]
    for done in range(1, saved_after + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        penalty = config.penalty(ours, DEFAULT)
        (loss + penalty).backward()
        theirs(ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        config.stepped(ours, DEFAULT, done, 8)
        theirs.base_model.update_and_allocate(done)
        for name, weight in mine.items():
            close(weight, other[name])
        allocator = theirs.base_model.rankallocator
        if done < 6:
            for name, expected in allocator.exp_avg_ipt.items():
                short = name.replace(".default", "")
                close(importance(ours, "sensitivity")[short], expected)
    kept = sum(int(part.kept.sum()) for part in learnt_parts(ours, DEFAULT).values())
    assert kept == (16 if saved_after == 8 else config.budget(4, 8, 8)) < 32

    save_adapter(ours, DEFAULT, tmp_path / "ours", base)
    theirs.save_pretrained(tmp_path / "theirs")
    close(ours(ids), theirs(ids).logits)
    found = peft.PeftModel.from_pretrained(theirs_on(base), tmp_path / "ours").eval()
    close(found(ids).logits, ours(ids))
    for directory in ("ours", "theirs"):
        again = load_causal_lm(base)
        load_adapter(again, tmp_path / directory)
        close(again(ids), ours(ids))


@pytest.mark.parametrize("method", OURS)
def test_score_models(method: str, base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    def fresh() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32
        )

    ours = score_model_from(base)
    add(ours, OURS[method])
    stir(of_ours(ours))
    assert any(name.endswith("score.weight") for name in of_ours(ours))
    (ours(ids)[:, -1] - 3).square().sum().backward()
    torch.optim.SGD(list(of_ours(ours).values()), lr=0.01).step()
    save_adapter(ours, DEFAULT, tmp_path / "ours", base)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours").eval()
    close(theirs(ids).logits[:, 0], ours(ids)[:, -1])
    assert (merged(tmp_path / "ours")(ids) - ours(ids)).abs().max() < 1e-5

    theirs = peft.get_peft_model(fresh(), their_config(method, "SEQ_CLS")).eval()
    stir(of_theirs(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    found = score_model_from(base)
    load_adapter(found, tmp_path / "theirs")
    close(found(ids)[:, -1], theirs(ids).logits[:, 0])


def test_a_model_of_ours_knows_nothing_of_adapters(base: Path) -> None:
    assert isinstance(load_causal_lm(base), CausalLM)
    assert load_causal_lm(base).adapters == {}


@pytest.mark.parametrize("tokens", [[4, 9], [9, 4, 7]], ids=str)
def test_rows_of_tokens_that_learn(
    tokens: list[int], base: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """The same rows, in and out, in a tied head too; one step of both is the same."""
    config = their_config("lora")
    config.trainable_token_indices = tokens  # type: ignore[attr-defined]
    theirs = peft.get_peft_model(theirs_on(base), config)
    model = load_causal_lm(base)
    add(model, LoRAConfig(rank=4, alpha=8, targets=TARGETS, trainable_token_indices=tokens))
    assert model.lm_head.weight.shape == (262, model.config.hidden_size)
    ids[:, ::3] = 4
    rows = {n: p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n}
    [theirs_rows] = rows.values()
    own = learnt_parts(model, DEFAULT)["model.embed_tokens"].rows
    for logits in (theirs(ids).logits, model(ids)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(own.grad, theirs_rows.grad, rtol=0, atol=1e-5)
    with torch.no_grad():
        for weight in (own, theirs_rows):
            assert weight.grad is not None and weight.grad.abs().max() > 1e-4
            weight -= 0.1 * weight.grad
    model.eval(), theirs.eval()
    with torch.no_grad():
        spoken = model(ids)
        torch.testing.assert_close(spoken, theirs(ids).logits, rtol=0, atol=1e-5)
        save_adapter(model, DEFAULT, tmp_path / "ours", base)
        theirs.save_pretrained(tmp_path / "theirs")
        found = peft.PeftModel.from_pretrained(theirs_on(base), tmp_path / "ours").eval()
        torch.testing.assert_close(found(ids).logits, spoken, rtol=0, atol=1e-5)
        other = load_causal_lm(base).eval()
        load_adapter(other, tmp_path / "theirs", base=base)
        torch.testing.assert_close(other(ids), spoken, rtol=0, atol=1e-5)
        with using(other, None):
            torch.testing.assert_close(other(ids), load_causal_lm(base)(ids), rtol=0, atol=1e-5)
        whole = merged(tmp_path / "ours")
        torch.testing.assert_close(whole(ids), spoken, rtol=0, atol=1e-5)
        tied = whole.config.tie_word_embeddings
        assert (whole.lm_head.weight is whole.model.embeddings.weight) == tied  # type: ignore[union-attr]
