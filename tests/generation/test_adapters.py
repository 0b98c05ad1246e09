"""Adapters of all kinds over one base, asked side by side."""

from __future__ import annotations

import pytest
import torch

from instar.adapters.base import activate, add, using
from instar.adapters.bottleneck import BottleneckConfig
from instar.adapters.lora import LoRAConfig
from instar.adapters.prefix import PrefixConfig
from instar.adapters.prompt import PromptConfig
from instar.generation import GREEDY, Engine, Request, Stopping
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer

ADAPTERS = {
    "tokens": LoRAConfig(rank=4, trainable_token_indices=[7, 8, 20]),
    "others": LoRAConfig(rank=4, trainable_token_indices=[9, 20]),
    "prefix": PrefixConfig(num_virtual_tokens=3),
    "longer": PrefixConfig(num_virtual_tokens=5),
    "prompt": PromptConfig(num_virtual_tokens=5),
    "bottleneck": BottleneckConfig(placement="houlsby", width=4),
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"family": "gpt2", "num_key_value_heads": 4}],
    ids=["tied", "untied", "gpt2"],
)
def test_requests_of_all_kinds_of_adapters_are_answered_together(
    changes: dict, tokenizer: Tokenizer
):
    model = adapted(tokenizer, changes)
    names = [None, *ADAPTERS]
    asked = [([7, 8, 9, 20][i % 3 :], name) for i, name in enumerate([*names, *reversed(names)])]
    alone = [written(model, tokenizer, [one])[0] for one in asked]
    assert written(model, tokenizer, asked) == alone
    assert len({tuple(ids) for ids in alone}) > len(names)
    for (prompt, name), ids in zip(asked, alone, strict=True):
        with using(model, name), torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        assert logits[:, : tokenizer.vocab_size].argmax(dim=-1).tolist() == ids, name


def test_the_longest_prefix_takes_its_share_of_the_context(tokenizer: Tokenizer):
    model = adapted(tokenizer, {"family": "gpt2", "num_key_value_heads": 4})
    assert model.context == 64 - 5
    for name in (None, "longer"):
        [ids] = written(model, tokenizer, [([7] * 50, name)])
        assert len(ids) == 9, "fifty-nine in all"


def adapted(tokenizer: Tokenizer, changes: dict) -> CausalLM:
    """A random model with random adapters, none of which is active."""
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    config = ModelConfig(**(shape | changes))
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    for seed, (name, adapter) in enumerate(ADAPTERS.items()):
        add(model, adapter, seed, name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if f".deltas.{name}." in path:
                    weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.3)
    activate(model, None)
    return model


def written(
    model: CausalLM, tokenizer: Tokenizer, asked: list[tuple[list[int], str | None]]
) -> list[list[int]]:
    """What an engine writes that gets all requests at once."""
    engine = Engine(model, tokenizer)
    stopping = Stopping(frozenset(), max_new_tokens=10)
    replies = [
        engine.submit(Request(prompt, GREEDY, stopping, (0, 0, i), adapter=name))
        for i, (prompt, name) in enumerate(asked)
    ]
    while not engine.idle:
        engine.step()
    return [reply.ids for reply in replies]
