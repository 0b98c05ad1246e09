"""IA3, prefix tuning, prompt tuning and combined adapters equal PEFT's, and travel both ways.

On tiny transformers models with our weights: logits of padded rows, one gradient, one step, and
the directories that PEFT writes and reads.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.utils import merge_utils
    from transformers import AutoModelForCausalLM

from instar.adapters import base, vectors
from instar.adapters.base import DEFAULT, AdapterConfig
from instar.adapters.combine import combine
from instar.adapters.ia3 import IA3Config
from instar.adapters.io import load_adapter, save_adapter
from instar.adapters.lora import LoRAConfig
from instar.adapters.prefix import PrefixConfig
from instar.adapters.prompt import PromptConfig
from instar.checkpoint import save_model
from instar.generation import Engine
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE: dict[str, Any] = dict(
    vocab_size=262,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    initializer_range=0.2,
    tie_word_embeddings=True,
)
# PEFT does not reach a mixture's experts: transformers keeps them all in one tensor.
FAMILIES = [f for f in get_args(ModelConfig.model_fields["family"].annotation) if "moe" not in f]
assert FAMILIES, "the config names its families"
OWN_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},  # the heads' joint width is not the model's
    "llama": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "gpt2": {"num_key_value_heads": 4},
}
LENGTHS = [14, 9, 5]
TOKENS = 6

VIRTUAL = {"num_virtual_tokens": TOKENS, "task_type": "CAUSAL_LM"}
IA3_LAYERS = {"gpt2": ["attn.c_attn", "mlp.c_proj"]}


def their_ia3(family: str) -> Any:
    layers = IA3_LAYERS.get(family, ["k_proj", "v_proj", "down_proj"])
    return peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=layers, feedforward_modules=layers[-1:]
    )


METHODS: dict[str, tuple[AdapterConfig, Any]] = {
    "ia3": (IA3Config(), their_ia3),
    "prefix": (
        PrefixConfig(num_virtual_tokens=TOKENS),
        lambda family: peft.PrefixTuningConfig(**VIRTUAL),
    ),
    "projection": (
        PrefixConfig(num_virtual_tokens=TOKENS, projection=True, projection_width=24),
        lambda family: peft.PrefixTuningConfig(
            **VIRTUAL, prefix_projection=True, encoder_hidden_size=24
        ),
    ),
    "prompt": (
        PromptConfig(num_virtual_tokens=TOKENS),
        lambda family: peft.PromptTuningConfig(**VIRTUAL),
    ),
}
CASES = [(family, name) for family in FAMILIES for name in METHODS]


def ours(family: Any) -> CausalLM:
    config = ModelConfig(family=family, **(SHAPE | OWN_SHAPES.get(family, {})))
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    initialize(model, config, generator)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms of one and biases of zero would hide mistakes
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def theirs(family: str) -> nn.Module:
    with tempfile.TemporaryDirectory() as directory:
        save_model(ours(family), Path(directory))
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def plain(name: str) -> str:
    """The name of a parameter of PEFT's model without the adapter's, as it is called here."""
    plain = name.replace(".default", "").removeprefix("base_model.model.")
    return plain.replace("transformer.", "model.", 1)


def parameters(model: CausalLM) -> dict[str, nn.Parameter]:
    """What learns of ours, by PEFT's names for it."""
    return {
        name.replace(".deltas.default", "").replace("model.prefix.", "prompt_encoder."): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def same_start(model: CausalLM, reference: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """Random weights in both; pairs of ours and theirs."""
    mine = parameters(model)
    other = {plain(n): w for n, w in reference.named_parameters() if w.requires_grad}
    if list(mine) == ["prompt_encoder.prompt_embeddings"]:
        mine = {"prompt_encoder.embedding.weight": next(iter(mine.values()))}
    assert mine.keys() == other.keys()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in mine.items():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
            other[name].copy_(weight)
    return {name: (weight, other[name]) for name, weight in mine.items()}


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Ids padded on the right, and where they are real."""
    ids = torch.randint(6, 262, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids * real, real


def next_token_loss(logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses[real[:, 1:].flatten()].mean()


def their_logits(reference: Any, ids: Tensor, real: Tensor) -> Tensor:
    logits = reference(input_ids=ids, attention_mask=real.long()).logits
    return logits[:, -ids.shape[1] :]  # a prompt's own logits come first


def equal(a: Tensor, b: Tensor, real: Tensor) -> None:
    torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_forward_gradient_and_one_step(family: str, name: str, rows: tuple[Tensor, Tensor]):
    ids, real = rows
    config, reference_config = METHODS[name]
    model, reference = ours(family), peft.get_peft_model(theirs(family), reference_config(family))
    before = model(ids)
    base.add(model, config)
    weights = same_start(model, reference)
    assert (model(ids) - before)[real].abs().max() > 0.1
    for _ in range(2):
        mine, other = model(ids), their_logits(reference, ids, real)
        equal(mine, other, real)
        model.zero_grad()
        reference.zero_grad()
        next_token_loss(mine, ids, real).backward()
        next_token_loss(other, ids, real).backward()
        for a, b in weights.values():
            assert a.grad is not None and a.grad.abs().max() > 0
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                a -= 0.1 * a.grad
                b -= 0.1 * b.grad


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_ours_opens_in_peft(family: str, name: str, rows: tuple[Tensor, Tensor], tmp_path: Path):
    ids, real = rows
    model = ours(family)
    base.add(model, METHODS[name][0])
    for weight in parameters(model).values():
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    save_model(ours(family), tmp_path / "base")
    save_adapter(model, DEFAULT, tmp_path / "adapter", tmp_path / "base")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    reference = peft.PeftModel.from_pretrained(opened, str(tmp_path / "adapter")).eval()
    equal(model(ids), their_logits(reference, ids, real), real)


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_theirs_opens_here(family: str, name: str, rows: tuple[Tensor, Tensor], tmp_path: Path):
    ids, real = rows
    method, reference_config = METHODS[name]
    reference = peft.get_peft_model(theirs(family), reference_config(family))
    for _, weight in sorted(reference.named_parameters()):
        if weight.requires_grad:
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    expected = their_logits(reference, ids, real)
    reference.save_pretrained(tmp_path / "adapter")
    model = ours(family)
    assert type(load_adapter(model, tmp_path / "adapter")) is type(method)
    equal(model(ids), expected, real)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_merges_as_theirs_does(family: str):
    model = ours(family)
    reference = peft.get_peft_model(theirs(family), their_ia3(family))
    base.add(model, IA3Config())
    same_start(model, reference)
    base.merge(model)
    merged = {plain(n): w for n, w in reference.merge_and_unload().named_parameters()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_text_begins_as_theirs(family: str, tmp_path: Path):
    save_tokenizer(tmp_path, [], 128)
    text = "the moth"
    model = ours(family)
    for n in (3, 20):
        settings = {"num_virtual_tokens": n, "tokenizer_name_or_path": str(tmp_path)}
        reference = peft.get_peft_model(
            theirs(family),
            peft.PromptTuningConfig(
                task_type="CAUSAL_LM",
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=text,
                **settings,
            ),
        )
        config = PromptConfig(num_virtual_tokens=n, start="text", text=text, tokenizer=tmp_path)
        base.add(model, config, name=f"first {n}")
        mine = model.model.prefix.deltas[f"first {n}"].prompt_embeddings
        assert torch.equal(mine, reference.prompt_encoder["default"].embedding.weight)
        values = config.to_peft()
        assert {key: values[key] for key in settings} == settings
        assert peft.PromptTuningConfig(**values).prompt_tuning_init_text == text


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_greedy_text(family: str, name: str, tmp_path: Path):
    """Theirs a row at a time; ours together, padded on the left."""
    method, reference_config = METHODS[name]
    save_tokenizer(tmp_path, [], 128)
    tokenizer = Tokenizer.load(tmp_path)
    model, reference = ours(family), peft.get_peft_model(theirs(family), reference_config(family))
    base.add(model, method)
    same_start(model, reference)
    prompts = [tokenizer.encode(text) for text in ("snail", "the long beetle", "moth")]
    stopping = Stopping(frozenset(), max_new_tokens=16)
    replies = Engine(model, tokenizer).generate(prompts, Sampling(temperature=0.0), stopping)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = list(prompt)
        for _ in range(16):  # without a cache, so that only the model itself is compared
            logits = reference(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))
            ).logits
            ids.append(int(logits[0, -1].argmax()))
        assert reply.ids == ids[len(prompt) :]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_arithmetic_with_deltas(density: float):
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(16, 24, generator=generator) for _ in range(3)]
    weights = [1.0, 0.5, -0.7]
    factors = torch.tensor(weights)
    pairs = {
        "linear": (vectors.linear(deltas, weights), merge_utils.task_arithmetic(deltas, factors)),
        "ties": (
            vectors.ties(deltas, weights, density),
            merge_utils.ties(deltas, factors, density),
        ),
    }
    torch.manual_seed(5)
    drawn = merge_utils.dare_linear(deltas, factors, density)
    own = torch.Generator().manual_seed(5)
    pairs["dare"] = (vectors.dare(deltas, weights, density, own), drawn)
    for mine, other in pairs.values():
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("how", "kind"),
    [("linear", "cat"), ("linear", "svd"), ("ties", "ties_svd"), ("dare", "dare_linear_svd")],
)
def test_combined_adapters(
    how: Any, kind: str, rows: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
):
    """PEFT's ways that work on whole changes: its `linear` and `ties` mix A and B apart."""
    ids, real = rows
    model, reference = ours("qwen3"), theirs("qwen3")
    # One layer: PEFT draws in its own order of layers.
    path = "model.layers.1.self_attn.q_proj"
    for number, (name, rank) in enumerate({"default": 2, "other": 3}.items()):
        settings = {"r": rank, "lora_alpha": 5, "target_modules": [path]}
        if number == 0:
            reference = peft.get_peft_model(reference, peft.LoraConfig(**settings))
        else:
            reference.add_adapter(name, peft.LoraConfig(**settings))
        base.add(model, LoRAConfig(rank=rank, alpha=5, targets=[path]), name=name)
        delta = model.get_submodule(path).deltas[name]
        generator = torch.Generator().manual_seed(number)
        for part in ("lora_A", "lora_B"):
            weight = getattr(delta, part).weight
            weight.normal_(0.0, 0.3, generator=generator)
            layer = reference.base_model.model.get_submodule(path)
            getattr(layer, part)[name].weight.copy_(weight)
    weights = {"default": 0.7, "other": -1.2}
    combine(model, weights, "both", how, rank=None if kind == "cat" else 4, density=0.5, seed=8)

    def seeded(*args: Any) -> Tensor:
        torch.manual_seed(8)  # PEFT has drawn other numbers before
        return merge_utils.dare_linear(*args)

    monkeypatch.setattr("peft.tuners.lora.model.dare_linear", seeded)
    settings = {} if kind == "cat" else {"svd_rank": 4}
    if how != "linear":
        settings["density"] = 0.5
    reference.add_weighted_adapter(
        list(weights), list(weights.values()), "both", combination_type=kind, **settings
    )
    reference.set_adapter("both")
    equal(model(ids), their_logits(reference.eval(), ids, real), real)
