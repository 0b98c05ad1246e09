"""Adapters of GPT-2, whose matrices lie the other way round, equal PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from instar.adapters.adalora import AdaLoRAConfig
from instar.adapters.base import DEFAULT, AdapterConfig, add, learnt_parts, merge
from instar.adapters.combine import combine
from instar.adapters.dora import DoRAConfig
from instar.adapters.ia3 import IA3Config
from instar.adapters.io import load_adapter, save_adapter
from instar.adapters.lora import LoRAConfig
from instar.adapters.opening import merged
from instar.checkpoint import load_causal_lm, save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

LAYERS = ["c_attn", "c_fc", "mlp.c_proj"]
OURS: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(rank=4, alpha=8, targets=LAYERS),
    "all": LoRAConfig(rank=4, alpha=8, targets="all-linear"),
    "dora": DoRAConfig(rank=4, alpha=8, targets=LAYERS),
    "adalora": AdaLoRAConfig(rank=4, target_rank=2, alpha=8, targets=LAYERS),
    "whole paths": LoRAConfig(rank=4, targets=["model.h.0.attn.c_attn", "mlp.c_fc"]),
    "a pattern": LoRAConfig(rank=4, targets=r"model\.h\.1\..*c_proj"),
    "ranks": LoRAConfig(
        rank=4,
        targets=LAYERS,
        ranks={r"model\.h\.0.*": 2, "c_attn": 3},
        alphas={r"model\.h\.1\.mlp.*": 5},
    ),
    "pissa": LoRAConfig(
        rank=4, targets=["c_attn"], start="pissa", ranks={r"model\.h\.0.*": 2}, alphas={"c_attn": 5}
    ),
    "whole parts": LoRAConfig(rank=4, targets=LAYERS, modules_to_save=["model.ln_f", "ln_1"]),
    "ia3": IA3Config(
        targets=[*LAYERS, "model.h.1.attn.c_proj"], feedforward_targets=r"model\.h\.0\.mlp\..*"
    ),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    )
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 262, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("method", OURS)
def test_ours_opens_in_peft(method: str, base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    model = load_causal_lm(base)
    before = model(ids)
    add(model, OURS[method])
    torch.manual_seed(2)
    for part in learnt_parts(model, DEFAULT).values():
        for weight in part.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.eval()
    spoken = model(ids)
    assert (spoken - before).abs().max() > 1e-2
    save_adapter(model, DEFAULT, tmp_path / "adapter", base)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(ids).logits, spoken, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged(tmp_path / "adapter")(ids), spoken, rtol=0, atol=1e-5)
    merge(model)
    save_model(model, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    torch.testing.assert_close(whole(ids).logits, spoken, rtol=0, atol=1e-5)


THEIRS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["c_attn", "c_proj"]},
    "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    "whole paths": {"target_modules": ["transformer.h.0.attn.c_attn"]},
    "a pattern": {"target_modules": r"transformer\.h\.1\..*c_proj"},
    "ranks": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "rank_pattern": {r"transformer\.h\.0.*": 2, r"h\.1\.attn\.c_attn": 3},
        "alpha_pattern": {r"^transformer\.h\.1\.mlp\.c_proj": 5},
    },
    "whole parts": {"target_modules": ["c_attn"], "modules_to_save": ["transformer.ln_f"]},
}


@torch.no_grad()
@pytest.mark.parametrize("settings", THEIRS)
def test_theirs_opens_here(settings: str, base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        fan_in_fan_out=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **THEIRS[settings],
    )
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config
    ).eval()
    for name, weight in theirs.named_parameters():
        if "modules_to_save" in name:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_causal_lm(base).eval()
    load_adapter(model, tmp_path / "adapter", base=base)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_combination_opens_in_peft(base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """Of adapters at some layers of their own, so that its ranks differ."""
    model = load_causal_lm(base).eval()
    add(model, LoRAConfig(rank=2, targets=["c_attn", "c_fc"]), name="one")
    add(model, LoRAConfig(rank=3, targets=["c_attn", "mlp.c_proj"]), name="two")
    for name in ("one", "two"):
        for part in learnt_parts(model, name).values():
            torch.nn.init.normal_(part.lora_B.weight, std=0.1)  # type: ignore[union-attr]
    combine(model, {"one": 0.5, "two": 1.0}, "both")
    save_adapter(model, "both", tmp_path / "both", base)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "both").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)
