from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import save_tokenizer

TEXTS = [
    "A ferry crossed the wide river; the ferryman's dog didn't bark. They're home again.\n\n" * 3,
    "渡船过河，河水宽宽。船夫的狗不叫，天黑以前他们回到了家。\n" * 3,
    "7 + 15 = 22\nuser assistant system\n  def f():\n\treturn 0",
]
MIXED = (
    "abcdefghijklm nopqrstuvwxyz ABCXYZ .,!?-_'",
    "0123456789 .,+-*/=%",
    "渡船过河水宽船夫的狗不叫天黑以前他们回到了家，。？！ ",
    "😀👩‍🚀🇩🇪👍🏽é̀ñßøαβγжअआקش½²Ⅷ٣",
    " \n\t\r",
)
WHOLE = ("<|im_start|>", "<|im_end|>", "<eos>", "<pad>", "<|endoftext|>", "<0x0A>", "don't", "I'LL")


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """1,000 strings of words, digits, Chinese, emoji, white space and look-alikes of control."""
    chance = random.Random(7)
    made = []
    for _ in range(1000):
        parts = []
        for _ in range(chance.randint(1, 6)):
            alphabet = chance.choice((*MIXED, WHOLE))
            count = 1 if alphabet is WHOLE else chance.randint(1, 12)
            parts += [chance.choice(alphabet) for _ in range(count)]
        made.append("".join(parts))
    return made


@pytest.fixture(scope="session")
def merges() -> list[tuple[bytes, bytes]]:
    return train_bpe(TEXTS, 400)


SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama stretched": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3 yarn": {"model_type": "qwen3", "rope_parameters": YARN},
    "qwen3 experts": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gpt2": {"model_type": "gpt2"},
}
GPT2_SIZES = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, merges: list[tuple[bytes, bytes]]
) -> Callable[[str], Path]:
    """Makes a tiny directory of a family as transformers writes it, with our tokenizer.

    Its weights are random and large, so that every next token is clear and they vary: equal
    continuations are then no accident.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in made:
            return made[name]
        family = dict(FAMILIES[name])
        sizes = GPT2_SIZES if family["model_type"] == "gpt2" else SIZES
        config = AutoConfig.for_model(**family, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            for part, weight in model.named_parameters():
                if weight.dim() == 1 and part.endswith("weight"):
                    weight.uniform_(0.5, 1.5, generator=generator)
                else:
                    weight.normal_(0.0, 0.3, generator=generator)
        directory = tmp_path_factory.mktemp("checkpoint") / name.replace(" ", "-")
        model.save_pretrained(directory)
        save_tokenizer(directory, merges, 256)
        made[name] = directory
        return directory

    return make


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family, and its variants."""
    return request.param
