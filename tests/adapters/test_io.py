"""Adapter directories: what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from instar.adapters.adalora import AdaLoRAConfig
from instar.adapters.base import DEFAULT, AdapterConfig, add, learnt_parts, lr_factors, using
from instar.adapters.dora import DoRAConfig
from instar.adapters.io import (
    BASE,
    CONFIG,
    WEIGHTS,
    base_of,
    check_base,
    is_adapter,
    load_adapter,
    save_adapter,
)
from instar.adapters.lora import LoRAConfig
from instar.adapters.methods import understood
from instar.adapters.opening import load_model, merged
from instar.adapters.slots import Slot
from instar.checkpoint import load_causal_lm, save_model
from instar.errors import UserError
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import Headed

TUNED = LoRAConfig(rank=4, targets=["q_proj", "up_proj"])


@pytest.fixture
def base(model: CausalLM, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = load_causal_lm(base)
    add(model, TUNED)
    with torch.no_grad():
        for part in learnt_parts(model, DEFAULT).values():
            part.lora_B.weight.fill_(0.05)
    save_adapter(model, DEFAULT, tmp_path / "adapter", base)
    return tmp_path / "adapter"


def change(adapter: Path, **values: Any) -> None:
    record = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(record | values))


def test_what_is_written_is_read_again(adapter: Path, base: Path, ids: torch.Tensor) -> None:
    assert is_adapter(adapter) and not is_adapter(base)
    assert base_of(adapter) == base
    one, two = load_model(adapter), load_causal_lm(base)
    assert (one(ids) - two(ids)).abs().max() > 0.1
    config = load_adapter(two, adapter, "again")
    assert config == one.adapters[DEFAULT]
    assert torch.equal(one(ids), two(ids))
    torch.testing.assert_close(merged(adapter)(ids), one(ids), rtol=0, atol=1e-5)
    values = json.loads((adapter / CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "up_proj"]
    assert values["task_type"] == "CAUSAL_LM" and values["base_model_name_or_path"] == str(base)


def test_a_base_is_found_from_the_adapters_place(adapter: Path, base: Path) -> None:
    change(adapter, base_model_name_or_path="../base")
    assert base_of(adapter).samefile(base)
    change(adapter, base_model_name_or_path="../elsewhere")
    with pytest.raises(UserError, match=r"\.\./elsewhere is not there.*--base"):
        load_model(adapter)
    assert load_model(adapter, base).adapters.keys() == {DEFAULT}


def test_another_revision_of_a_base_is_not_taken_for_the_first(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instar.hub._fetched", {"owner/model": base}.__getitem__)
    change(adapter, base_model_name_or_path="owner/model", revision="main")
    assert load_model(adapter).adapters
    change(adapter, revision="v2")
    with pytest.raises(UserError, match=r"owner/model in the revision v2.*--revision v2.*--base"):
        load_model(adapter)
    assert load_model(adapter, base).adapters


@pytest.mark.parametrize(
    "method",
    [
        LoRAConfig(rank=4, dropout=0.1, lr_ratio=16, targets=["q_proj"]),
        DoRAConfig(rank=4, dropout=0.1, lr_ratio=16, targets=["q_proj"]),
        AdaLoRAConfig(
            rank=6,
            target_rank=3,
            dropout=0.1,
            initial_steps=3,
            final_steps=4,
            every=5,
            beta1=0.5,
            beta2=0.6,
            orthogonality=0.1,
            targets=["q_proj"],
        ),
    ],
    ids=lambda method: method.method,
)
def test_how_an_adapter_learns_is_not_forgotten(
    method: AdapterConfig, model: CausalLM, base: Path, tmp_path: Path
) -> None:
    add(model, method)
    save_adapter(model, DEFAULT, tmp_path / "adapter", base)
    again = load_causal_lm(base)
    assert load_adapter(again, tmp_path / "adapter") == method
    assert sorted(lr_factors(again).values()) == sorted(lr_factors(model).values())


def test_patterns_are_written_as_the_layers_they_mean(base: Path, tmp_path: Path) -> None:
    model = load_causal_lm(base)
    add(model, LoRAConfig(rank=2, targets=r".*\.1\..*(q|v)_proj"))
    save_adapter(model, DEFAULT, tmp_path / "some", base)
    values = json.loads((tmp_path / "some" / CONFIG).read_text())
    places = [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    assert values["target_modules"] == places


def test_an_adapter_for_other_weights_is_refused(
    adapter: Path, base: Path, model: CausalLM, tmp_path: Path
) -> None:
    check_base(adapter, base)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    save_model(model, tmp_path / "other")
    with pytest.raises(UserError, match="learnt on other weights"):
        load_model(adapter, tmp_path / "other")
    (adapter / BASE).unlink()  # as PEFT leaves it
    load_model(adapter, tmp_path / "other")


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"hidden_size": 48}, r"lora_A.weight has the shape \(4, 32\), and its place \(4, 48\)"),
        ({"num_hidden_layers": 1}, r"layers\.1.* has no place here"),
        ({"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj\.lora_A.weight is missing"),
    ],
)
def test_an_adapter_for_another_shape_is_refused(
    shape: dict[str, int], problem: str, adapter: Path, model: CausalLM, ids: torch.Tensor
) -> None:
    other = CausalLM(model.config.model_copy(update=shape))
    before = other(ids)
    with pytest.raises(UserError, match=f"does not fit this base.*{problem}"):
        load_adapter(other, adapter)
    assert other.adapters == {} and learnt_parts(other, DEFAULT) == {}
    assert torch.equal(other(ids), before), "the base is as it was"


def test_layers_that_are_not_there(adapter: Path, base: Path) -> None:
    change(adapter, target_modules=["q_proj", "c_attn"])
    with pytest.raises(UserError, match="'c_attn' matches no layer"):
        load_model(adapter, base)


def test_a_reward_model_may_begin_with_the_adapter_of_a_language_model(
    adapter: Path, scorer: ScoreModel, ids: torch.Tensor
) -> None:
    torch.nn.init.normal_(scorer.score.weight)
    with torch.no_grad():
        plain, head = scorer(ids), scorer.score.weight.clone()
        load_adapter(scorer, adapter)
        assert torch.equal(scorer.score.weight, head)
        assert not torch.allclose(scorer(ids), plain)


def test_a_language_model_cannot_begin_with_that_of_a_reward_model(
    base: Path, scorer: ScoreModel, model: CausalLM, tmp_path: Path
) -> None:
    add(scorer, TUNED)
    save_adapter(scorer, DEFAULT, tmp_path / "judge", base)
    with pytest.raises(UserError, match="judge is the adapter of a reward model"):
        load_adapter(model, tmp_path / "judge")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alora_invocation_tokens", [3, 5]),
        ("lora_bias", True),
        ("bias", "all"),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("exclude_modules", ["q_proj"]),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "pissa_niter_4"),
        ("layers_pattern", "h"),
        ("some_later_field", "on"),
    ],
)
def test_what_we_do_not_have_is_named(name: str, value: Any, adapter: Path) -> None:
    change(adapter, **{name: value})
    with pytest.raises(UserError, match=f"`{name}` is {value!r}".replace("[", r"\[")):
        load_model(adapter)


def test_methods_we_do_not_have(adapter: Path) -> None:
    change(adapter, peft_type="OFT")
    with pytest.raises(UserError, match=r"peft_type is 'OFT'\. instar reads LORA, ADALORA"):
        load_model(adapter)
    with pytest.raises(UserError, match="instar_method"):
        understood({"instar_method": {"method": "telepathy"}})


def test_damaged_files(adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-9])
    with pytest.raises(UserError, match="is damaged"):
        load_model(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has no {WEIGHTS}"):
        load_model(adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_model(adapter)


def test_tensors_without_a_place(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(1)}, adapter / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.weight has no place here"):
        load_model(adapter)


def test_what_is_trained_whole_is_the_adapters_own(
    scorer: ScoreModel, ids: torch.Tensor, tmp_path: Path
) -> None:
    save_model(scorer, tmp_path / "base")
    for name, value in (("one", 1.0), ("two", 2.0)):
        add(scorer, TUNED, name=name)
        with torch.no_grad():
            scorer.score.weight.fill_(value)
        save_adapter(scorer, name, tmp_path / name, tmp_path / "base")
    scores = []
    for name in ("one", "two"):
        with using(scorer, name):
            scores.append(scorer(ids))
        torch.testing.assert_close(load_model(tmp_path / name)(ids), scores[-1])
    torch.testing.assert_close(2 * scores[0], scores[1])
    with using(scorer, None):
        assert scorer(ids).abs().max() == 0


def test_a_matrix_at_both_ends_is_not_copied(model: CausalLM) -> None:
    with pytest.raises(UserError, match="one matrix with the model's other end"):
        add(model, TUNED.model_copy(update={"modules_to_save": ["lm_head"]}))
    with pytest.raises(UserError, match="matches nothing"):
        add(model, TUNED.model_copy(update={"modules_to_save": ["soul"]}), name="other")
    gpt2 = CausalLM(ModelConfig(family="gpt2", vocab_size=61, hidden_size=32, num_hidden_layers=1,
                                intermediate_size=48, num_attention_heads=2,
                                num_key_value_heads=2, head_dim=16))  # fmt: skip
    with pytest.raises(UserError, match="wte is one matrix with the model's other end"):
        add(gpt2, LoRAConfig(targets=["c_attn"], modules_to_save=["wte"]))


@pytest.mark.parametrize("part", ["mlp", "layers.0", "self_attn"])
def test_only_single_parts_are_trained_whole(model: CausalLM, part: str) -> None:
    with pytest.raises(UserError, match=f"{part} consists of several parts"):
        add(model, TUNED.model_copy(update={"modules_to_save": [part]}))


def test_an_embedding_learns_whole_or_in_rows(config: ModelConfig) -> None:
    config = config.model_copy(update={"tie_word_embeddings": False})
    whole = TUNED.model_copy(update={"modules_to_save": ["embed_tokens"]})
    rows = TUNED.model_copy(update={"trainable_token_indices": [5]})
    for first, second, match in (
        (whole, rows, "another adapter trains model.embed_tokens whole"),
        (rows, whole, "single rows learn already"),
    ):
        model = CausalLM(config)
        add(model, first, name="first")
        with pytest.raises(UserError, match=match):
            add(model, second, name="second")


def test_another_base_would_not_help(adapter: Path, base: Path) -> None:
    change(adapter, trainable_token_indices=[10**6])
    with pytest.raises(UserError, match=r"does not fit this base.*shows the ids of tokens"):
        load_model(adapter, base)


def test_how_the_first_weights_were_found_is_of_no_matter(adapter: Path, base: Path) -> None:
    change(adapter, init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99})
    load_model(adapter, base)


def test_no_block_named_is_every_block(model: CausalLM) -> None:
    assert LoRAConfig(layers=[]).places(model) == LoRAConfig().places(model)


class Beside(Slot):
    """A slot that stands beside the model, as a prompt does."""


class Prompt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(torch.zeros(3, 2))


class PromptlyConfig(LoRAConfig):
    """LoRA and a prompt: the one has paths, the other has none."""

    def install(self, model: Headed, name: str, generator: torch.Generator) -> None:
        super().install(model, name, generator)
        model.beside = Beside()
        model.beside.deltas[name] = Prompt()


def test_parts_beside_the_model_have_no_path(
    model: CausalLM, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PromptlyConfig(rank=2, targets=["q_proj"], modules_to_save=["model.norm"])
    add(model, config)
    with torch.no_grad():
        for index, part in enumerate(learnt_parts(model, DEFAULT).values()):
            for weight in part.parameters():
                weight.fill_(index + 1.0)
    save_adapter(model, DEFAULT, tmp_path / "both", base)
    assert "prompt_embeddings" in load_file(tmp_path / "both" / WEIGHTS)
    monkeypatch.setattr("instar.adapters.io.understood", lambda values: config)
    again = load_causal_lm(base)
    load_adapter(again, tmp_path / "both")
    found = learnt_parts(again, DEFAULT)
    for path, part in learnt_parts(model, DEFAULT).items():
        for name, weight in part.named_parameters():
            assert torch.equal(found[path].get_parameter(name), weight), path
