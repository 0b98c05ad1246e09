"""Greedy replies equal those of transformers' `generate` on the same weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from instar.generation import Engine, Sampling, Stopping
from instar.model import CausalLM, ModelConfig
from instar.tokenizer.hf import Tokenizer, save_tokenizer

SHAPE = dict(
    vocab_size=262,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    initializer_range=0.2,
    tie_word_embeddings=True,
)
REFERENCES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_greedy_text_equals_transformers(family: str, penalty: float, tmp_path: Path):
    torch.manual_seed(0)
    config_class, model_class = REFERENCES[family]
    reference = model_class(config_class(**SHAPE)).eval()
    model = CausalLM(ModelConfig(family=family, **SHAPE))  # pyright: ignore
    model.load_state_dict(reference.state_dict(), strict=True)
    save_tokenizer(tmp_path, [], 64)
    tokenizer = Tokenizer.load(tmp_path)
    rng = random.Random(0)
    prompts = [[rng.randrange(6, 262) for _ in range(n)] for n in (3, 17, 9, 1)]
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    engine = Engine(model, tokenizer)
    free = engine.generate(prompts, sampling, Stopping(frozenset(), max_new_tokens=30))
    stop = free[0].ids[10]
    stopping = Stopping(frozenset({stop}), max_new_tokens=30)
    completions = engine.generate(prompts, sampling, stopping)
    assert {completion.finish for completion in completions} >= {"stop"}
    for prompt, completion in zip(prompts, completions, strict=True):
        output = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=30,
            repetition_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=0,
        )
        expected = output[0, len(prompt) :].tolist()
        assert completion.ids == expected
        without_stop = [id for id in expected if id != stop]
        assert completion.text == tokenizer.decode(without_stop)
