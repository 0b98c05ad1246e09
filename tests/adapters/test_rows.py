"""Several adapters over one base: shared, switched, and mixed within a batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instar.adapters import base
from instar.adapters.bitfit import BitFitConfig
from instar.adapters.bottleneck import BottleneckConfig
from instar.adapters.ia3 import IA3Config
from instar.adapters.io import save_adapter
from instar.adapters.lora import LoRAConfig
from instar.adapters.prefix import PrefixConfig
from instar.adapters.prompt import PromptConfig
from instar.adapters.rows import rows
from instar.checkpoint import save_model
from instar.errors import UserError
from instar.model import CausalLM, KVCache, ModelConfig

KINDS = {
    "factors": IA3Config(),
    "biases": BitFitConfig(),
    "small": BottleneckConfig(placement="pfeiffer", width=4),
}
VIRTUAL = {
    "prefix": PrefixConfig(num_virtual_tokens=4),
    "prompt": PromptConfig(num_virtual_tokens=4),
}


@pytest.fixture
def several(model: CausalLM, shake) -> CausalLM:
    for name, kind in (KINDS | VIRTUAL).items():
        base.add(model, kind, name=name)
        shake(model)
    return model


def test_two_adapters_share_one_base(make_model, shake):
    model = make_model()
    storage = {name: w.data_ptr() for name, w in model.named_parameters()}
    size = sum(w.numel() for w in model.parameters())
    for name in ("factors", "small"):
        base.add(model, KINDS[name], name=name)
    kept = {name.replace(".base.", "."): w for name, w in model.named_parameters()}
    assert {name: kept[name].data_ptr() for name in storage} == storage
    own = sum(w.numel() for name, w in kept.items() if ".deltas." in name)
    assert sum(w.numel() for w in model.parameters()) == size + own


@torch.no_grad()
def test_requests_switch_adapters(several: CausalLM, make_model, ids: Tensor):
    plain = make_model()(ids)
    answers = {}
    for name in (*KINDS, *VIRTUAL, None):
        with base.using(several, name):
            answers[name] = several(ids)
    assert torch.equal(answers.pop(None), plain)
    found = list(answers.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in [plain, *found[:i]])
    # The one that was added last speaks again.
    assert torch.equal(several(ids), answers["prompt"])


@pytest.mark.parametrize(
    "names",
    [
        ["factors", None, "biases", "factors", "small"],
        ["small", "factors", "small", "biases", "biases"],
        ["prefix", "prompt", "prefix", "prompt", "prompt"],
        [None] * 5,
    ],
)
def test_each_row_is_computed_with_its_own(names: list[str | None], several: CausalLM, ids: Tensor):
    ids = torch.cat([ids, ids.flip(1)])[:5]
    with rows(several, names):
        together = several(ids)
    for row, name in enumerate(names):
        with base.using(several, name):
            alone = several(ids[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_gradients_go_to_each_rows_adapter(several: CausalLM, ids: Tensor):
    several.requires_grad_(True)
    with rows(several, ["factors", "biases", None]):
        several(ids).sum().backward()
    parts = several.model.layers[0].self_attn.v_proj.deltas
    mixed = {name: next(parts[name].parameters()).grad.clone() for name in ("factors", "biases")}
    for row, name in enumerate(mixed):
        several.zero_grad()
        with base.using(several, name):
            several(ids[row : row + 1]).sum().backward()
        alone = next(parts[name].parameters()).grad
        assert alone.abs().max() > 0
        torch.testing.assert_close(mixed[name], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_with_a_cache(config: ModelConfig, several: CausalLM, ids: Tensor):
    for names in (["small", None, "biases"], ["prompt", "prefix", "prefix"]):
        cache = KVCache(config, torch.tensor([0, 0, 0]), 12, torch.float32)
        with rows(several, names):
            first, second = several(ids[:, :8], cache=cache), several(ids[:, 8:], cache=cache)
            whole = several(ids)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)


def test_rows_that_cannot_be_mixed(several: CausalLM, ids: Tensor):
    with rows(several, ["prefix", None, "prompt"]), pytest.raises(UserError, match="the base 0"):
        several(ids)
    with rows(several, ["factors"] * 2), pytest.raises(ValueError, match="2 rows"):
        several(ids)
    layer = several.model.layers[0].mlp.down_proj
    with rows(several, ["factors"] * 3), pytest.raises(ValueError, match="experts"):
        layer(torch.zeros(3, 48))
    with pytest.raises(UserError, match="no adapter 'other'"), rows(several, ["other"]):
        pass


def test_choices_nest(several: CausalLM, ids: Tensor):
    with torch.no_grad():
        outside = several(ids)
        with rows(several, ["factors", None, "small"]):
            mixed = several(ids)
            with base.using(several, "biases"):
                inside = several(ids)
            assert torch.equal(several(ids), mixed)
        with base.using(several, "biases"):
            assert torch.equal(several(ids), inside)
        assert torch.equal(several(ids), outside)


def test_the_example_of_the_docs_runs(
    make_model, shake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save_model(make_model(), Path("smollm2"))
    for name in ("law", "poems"):
        model = make_model()
        base.add(model, LoRAConfig(rank=2))
        shake(model)
        save_adapter(model, "default", Path("runs") / name, Path("smollm2"))
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    [example] = re.findall("```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"ids": torch.tensor([[6, 7]] * 3)}
    exec(example.replace("...", "model(ids)"), names)
    assert list(names["model"].adapters) == ["law", "poems", "both"]
