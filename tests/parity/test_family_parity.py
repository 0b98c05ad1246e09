"""Every family equals transformers' own: logits, gradients, greedy text, and every stored bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from instar.checkpoint import (
    load_causal_lm,
    load_score_model,
    read_dtype,
    read_model_config,
    save_model,
)
from instar.generation import Engine, Sampling, Stopping
from instar.model import CausalLM, KVCache, ScoreModel
from instar.tokenizer.hf import Tokenizer, save_tokenizer

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "rope_theta": 20_000.0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": 262,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TIED = {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", TIED | {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-llama3": ("llama", TIED | {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", TIED | {"num_key_value_heads": 4, "head_dim": 8}),
    "qwen2-window": ("qwen2", WINDOW | {"max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", TIED | {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3-tied": ("qwen3", TIED),
    "qwen3-types": (
        "qwen3",
        WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3-yarn": ("qwen3", {"rope_scaling": YARN | {"attention_factor": 0.8, "truncate": False}}),
    "qwen3-mscale": ("qwen3", {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", TIED | {"sliding_window": 7}),
    "mistral-linear": (
        "mistral",
        {"sliding_window": 7, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
    "moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "moe-tied": ("qwen3_moe", EXPERTS | TIED | {"mlp_only_layers": [2], "attention_bias": True}),
    "moe-window": ("qwen3_moe", EXPERTS | WINDOW | {"decoder_sparse_step": 2}),
}
LENGTHS = (40, 23, 9)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 262, (3, 40), generator=torch.Generator().manual_seed(1))


def theirs(variant: str, head: Any = AutoModelForCausalLM, **more: Any) -> Any:
    family, changes = VARIANTS[variant]
    shape = GPT2 if family == "gpt2" else SHAPE
    values = {"num_labels": 1} if head is AutoModelForSequenceClassification else {}
    torch.manual_seed(0)
    model = head.from_config(AutoConfig.for_model(family, **shape | changes | values | more))
    _draw_vectors(model)
    return model.eval()


def _draw_vectors(model: torch.nn.Module) -> None:
    """Norms of one and biases of zero would hide that they are left out of their places."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.uniform_(-0.5, 0.5, generator=generator)
            elif weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)


def ours_on_the_left(model: CausalLM, ids: torch.Tensor, start: list[int]) -> torch.Tensor:
    """As a reply is written: prompts end in one column, then come single tokens."""
    cache = KVCache(model.config, torch.tensor(start), ids.shape[1], torch.float32)
    parts = [model(part, cache=cache) for part in ids.split([33, 1, 1, 5], dim=1)]
    return torch.cat(parts, dim=1)


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch with rows of ``LENGTHS`` tokens, and where these are."""
    columns, lengths = torch.arange(ids.shape[1]), torch.tensor(LENGTHS)[:, None]
    real = columns < lengths if side == "right" else columns >= ids.shape[1] - lengths
    return ids.masked_fill(~real, 0), real


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_theirs_gives_the_same_logits_here(
    variant: str, side: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    found = load_causal_lm(tmp_path).eval()
    batch, real = padded(ids, side)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    expected = model(batch, attention_mask=real.long(), position_ids=positions).logits
    if side == "right":
        logits = found(batch)
    else:
        logits = ours_on_the_left(found, batch, [40 - n for n in LENGTHS])
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert expected[real].std() > 0.1, "logits that are all alike would show nothing"


@torch.no_grad()
def test_ours_opens_in_transformers(variant: str, ids: torch.Tensor, tmp_path: Path) -> None:
    theirs(variant).save_pretrained(tmp_path / "theirs")
    model = load_causal_lm(tmp_path / "theirs").eval()
    save_model(model, tmp_path / "ours")
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(found) is type(theirs(variant))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    torch.testing.assert_close(found.eval()(ids).logits, model(ids), rtol=0, atol=1e-5)
    assert read_model_config(tmp_path / "ours") == model.config
    assert sum(p.numel() for p in model.parameters()) == model.config.parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_stored_bit_survives(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs(variant).to(dtype).save_pretrained(tmp_path / "theirs")
    model = load_causal_lm(tmp_path / "theirs")
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    save_model(model, tmp_path / "ours", dtype=read_dtype(tmp_path / "theirs"))
    before, after = (
        load_file(tmp_path / place / "model.safetensors") for place in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == dtype and torch.equal(weight, after[name]), name
    assert AutoConfig.from_pretrained(tmp_path / "ours").dtype == dtype


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Theirs under our names: a body called `transformer`, experts that are one tensor."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        name = name.replace("transformer.", "model.")
        if "experts.gate_up_proj" in name or name.endswith("experts.down_proj"):
            for number, part in enumerate(weight.grad):
                body = name.rsplit(".", 1)[0] + f".{number}."
                if "gate_up" in name:
                    gate, up = part.chunk(2)
                    found |= {f"{body}gate_proj.weight": gate, f"{body}up_proj.weight": up}
                else:
                    found[f"{body}down_proj.weight"] = part
        else:
            found[name] = weight.grad
    return found


def test_one_step_has_the_same_gradients(variant: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    found = load_causal_lm(tmp_path)
    for logits in (model(ids).logits, found(ids)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected, gradients = _gradients(model), _gradients(found)
    assert expected.keys() == gradients.keys()
    # The bias of keys moves all scores of a query alike, so that its gradient is rounding alone.
    largest = max(g.norm() for g in expected.values())
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).norm()
        assert error <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


@pytest.mark.filterwarnings("ignore")
def test_the_same_greedy_text(variant: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = theirs(variant)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, [], 96)
    engine = Engine(load_causal_lm(tmp_path), Tokenizer.load(tmp_path))
    prompts = [row[:n].tolist() for row, n in zip(ids, (30, 12, 1), strict=True)]
    stopping = Stopping(frozenset(), max_new_tokens=24)
    replies = engine.generate(prompts, Sampling(temperature=0.0), stopping)
    for prompt, reply in zip(prompts, replies, strict=True):
        rows = torch.tensor([prompt])
        written = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=24
        )
        assert reply.ids == written[0, len(prompt) :].tolist()


SCORED = ["llama-tied", "qwen2-window", "qwen3", "mistral-window", "gpt2", "gpt2-untied", "moe"]


@torch.no_grad()
@pytest.mark.parametrize("variant", SCORED)
def test_score_models_travel_both_ways(variant: str, ids: torch.Tensor, tmp_path: Path) -> None:
    head = AutoModelForSequenceClassification
    model = theirs(variant, head)
    model.save_pretrained(tmp_path / "theirs")
    found = load_score_model(tmp_path / "theirs").eval()
    batch, _ = padded(ids, "right")
    last = torch.tensor(LENGTHS)[:, None] - 1
    scores = found(batch).gather(1, last)
    torch.testing.assert_close(scores, model(batch).logits, rtol=0, atol=1e-5)

    assert isinstance(found, ScoreModel)
    save_model(found, tmp_path / "ours")
    again, info = head.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.num_labels == 1
    torch.testing.assert_close(again.eval()(batch).logits, scores, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bare_gpt2_files_with_their_masks_are_read(ids: torch.Tensor, tmp_path: Path) -> None:
    """As the first GPT-2 files are: no `transformer.` before the names, causal masks among them."""
    from safetensors.torch import save_file

    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    body = {k.removeprefix("transformer."): v for k, v in model.transformer.state_dict().items()}
    for layer in range(3):
        body[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 96, 96).tril()
        body[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_causal_lm(tmp_path).eval()
    torch.testing.assert_close(found(ids), model(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_shards_and_stored_frequencies_are_read(ids: torch.Tensor, tmp_path: Path) -> None:
    model = theirs("llama-tied")
    weights = model.state_dict() | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)
    }
    del weights["lm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=weights, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = load_causal_lm(tmp_path).eval()
    torch.testing.assert_close(found(ids), model(ids).logits, rtol=0, atol=1e-5)
