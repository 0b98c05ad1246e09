"""The models equal transformers' own, and directories travel both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from instar.checkpoint import load_causal_lm, load_score_model, save_model, score_model_from
from instar.generation import Engine
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer

THEIRS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
VARIANTS = [
    (family, tied, key_heads)
    for family in THEIRS
    for tied, key_heads in [(True, 4), (True, 2), (False, 2), (False, 1)]
]


def shape(family: str, tied: bool, key_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 262,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": key_heads,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }


def ours(family: Any, tied: bool, key_heads: int, theta: float = 500_000.0) -> CausalLM:
    config = ModelConfig(family=family, rope_theta=theta, **shape(family, tied, key_heads))
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    return _unequal_norms(model).eval()


def theirs(family: str, tied: bool, key_heads: int) -> Any:
    config_class, model_class = THEIRS[family]
    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    torch.manual_seed(0)
    model = model_class(config_class(rope_parameters=rope, **shape(family, tied, key_heads)))
    return _unequal_norms(model).eval()


def _unequal_norms(model: Any) -> Any:
    """Weights of one would hide a norm that is left out of its place."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 262, (2, 100), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("family", "tied", "key_heads"), VARIANTS)
def test_ours_opens_in_transformers(
    family: str, tied: bool, key_heads: int, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = ours(family, tied, key_heads)
    save_model(model, tmp_path)
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(found, THEIRS[family][1])
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    torch.testing.assert_close(found.eval()(ids).logits, model(ids), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("family", "tied", "key_heads"), VARIANTS)
def test_theirs_opens_here(
    family: str, tied: bool, key_heads: int, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = theirs(family, tied, key_heads)
    model.save_pretrained(tmp_path)
    found = load_causal_lm(tmp_path).eval()
    assert found.config.rope_theta == 20_000.0
    torch.testing.assert_close(found(ids), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spelling", ["before", "after"])
def test_the_rotary_base_is_read_in_both_spellings(spelling: str, tmp_path: Path) -> None:
    save_model(ours("qwen3", True, 2), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters" if spelling == "before" else "rope_theta"]
    path.write_text(json.dumps(values))
    assert load_causal_lm(tmp_path).config.rope_theta == 500_000.0


def test_half_precision_checkpoints_are_read(ids: torch.Tensor, tmp_path: Path) -> None:
    model = theirs("qwen3", True, 2).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = load_causal_lm(tmp_path)
    assert {w.dtype for w in found.parameters()} == {torch.float32}
    expected = model.model.embed_tokens.weight.float()
    assert torch.equal(found.model.embed_tokens.weight, expected)


def test_the_same_greedy_text(tmp_path: Path) -> None:
    save_model(ours("qwen3", True, 2), tmp_path)
    save_tokenizer(tmp_path, [], 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = tokenizer("Once, 春天", return_tensors="pt", add_special_tokens=False)
    written = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    new = written[0, prompt["input_ids"].shape[1] :]

    engine = Engine(load_causal_lm(tmp_path), Tokenizer.load(tmp_path))
    ids = engine.tokenizer.encode("Once, 春天")
    assert ids == prompt["input_ids"][0].tolist()
    stop = Stopping(frozenset({engine.tokenizer.im_end_id}), max_new_tokens=24)
    [reply] = engine.generate([ids], Sampling(temperature=0.0), stop)
    assert reply.ids == new.tolist()
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True)


def scorer(tied: bool) -> ScoreModel:
    config = ModelConfig(**shape("qwen3", tied, 2))
    model = ScoreModel(config)
    generator = torch.Generator().manual_seed(2)
    initialize(model, config, generator)
    torch.nn.init.normal_(model.score.weight, generator=generator)
    return _unequal_norms(model).eval()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_score_models_open_in_transformers(tied: bool, ids: torch.Tensor, tmp_path: Path) -> None:
    model = scorer(tied)
    save_model(model, tmp_path)
    found, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(found, Qwen3ForSequenceClassification)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert found.config.num_labels == 1
    ids[1, 60:] = 0  # padding: transformers reads the score at the last token before it
    scores = model(ids)
    expected = torch.stack([scores[0, 99], scores[1, 59]])
    torch.testing.assert_close(found.eval()(ids).logits[:, 0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_their_score_models_open_here(ids: torch.Tensor, tmp_path: Path) -> None:
    values = shape("qwen3", False, 2)
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(
        Qwen3Config(**values, num_labels=1, pad_token_id=0)
    ).eval()
    model.save_pretrained(tmp_path)
    found = load_score_model(tmp_path).eval()
    expected = model(ids).logits[:, 0]
    torch.testing.assert_close(found(ids)[:, -1], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_score_model_begins_on_a_language_models_body(
    tied: bool, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = ours("qwen3", tied, 2)
    save_model(model, tmp_path)
    found = score_model_from(tmp_path)
    assert found(ids).abs().max() == 0
    assert torch.equal(found.model(ids), model.model(ids))
