"""Prefix and prompt tuning: virtual tokens before every text, in training and in generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from instar.adapters import base
from instar.adapters.ia3 import IA3Config
from instar.adapters.lora import LoRAConfig
from instar.adapters.prefix import PrefixConfig, flat, pairs
from instar.adapters.prompt import PromptConfig
from instar.errors import UserError
from instar.generation import Engine
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model import CausalLM, KVCache, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer

METHODS = [
    PrefixConfig(num_virtual_tokens=5),
    PrefixConfig(num_virtual_tokens=5, start="random"),
    PrefixConfig(num_virtual_tokens=5, projection=True),
    PromptConfig(num_virtual_tokens=5),
    PromptConfig(num_virtual_tokens=5, start="random"),
]


def loss(model: CausalLM, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def test_a_prompt_is_tokens_in_front(model: CausalLM, ids: Tensor):
    first = torch.randint(61, (5,), generator=torch.Generator().manual_seed(4))
    expected = model(torch.cat([first.expand(3, 5), ids], dim=1))[:, 5:]
    base.add(model, PromptConfig(num_virtual_tokens=5), seed=4)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prefix_of_words_begins_as_the_same_tokens(make_model, ids: Tensor):
    prompted, prefixed = make_model(), make_model()
    base.add(prompted, PromptConfig(num_virtual_tokens=5), seed=4)
    base.add(prefixed, PrefixConfig(num_virtual_tokens=5), seed=4)
    torch.testing.assert_close(prefixed(ids), prompted(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_virtual_tokens_learn(method, recompute: bool, model: CausalLM, ids: Tensor):
    base.add(model, method)
    model.model.recompute = recompute
    learning = {name: w for name, w in model.named_parameters() if w.requires_grad}
    before = loss(model, ids)
    before.backward()
    assert all(name.startswith("model.prefix.") for name in learning)
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in learning.values())
    assert not any(w.grad is not None for w in model.parameters() if not w.requires_grad)
    size = sum(w.grad.square().sum() for w in learning.values()).sqrt()  # type: ignore[union-attr]
    with torch.no_grad():
        for w in learning.values():
            w -= 1e-3 * w.grad / size  # type: ignore[operator]
    assert loss(model, ids) < before


def test_recomputed_blocks_give_the_same_gradient(make_model, ids: Tensor):
    grads = []
    for recompute in (False, True):
        model = make_model()
        base.add(model, PromptConfig(num_virtual_tokens=5))
        model.model.recompute = recompute
        loss(model, ids).backward()
        grads.append(model.model.prefix.deltas["default"].prompt_embeddings.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_packed_documents_each_see_the_prefix(method, model: CausalLM, ids: Tensor):
    base.add(model, method)
    lengths = [5, 7]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(3, -1)
    segments = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None].expand(3, -1)
    packed = model(ids, positions, segments)
    apart = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_step_by_step_with_a_cache_and_left_padding(method, config, model: CausalLM, ids: Tensor):
    base.add(model, method)
    padding = torch.tensor([0, 3, 7])
    cache = KVCache(config, padding, 12, torch.float32)
    padded = torch.zeros(3, 12, dtype=torch.long)
    for row, n in enumerate(padding.tolist()):
        padded[row, n:] = ids[row, : 12 - n]
    steps = [model(padded[:, :9], cache=cache)]
    steps += [model(padded[:, t : t + 1], cache=cache) for t in range(9, 12)]
    logits = torch.cat(steps, dim=1)
    for row, n in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, : 12 - n])[0]
        torch.testing.assert_close(logits[row, n:], alone, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, [], 64)
    return Tokenizer.load(directory)


@pytest.mark.parametrize("method", METHODS[:4], ids=str)
def test_generated_text_does_not_depend_on_the_batch(method, config: ModelConfig, tokenizer):
    config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    engine = Engine(model, tokenizer)
    prompts = [tokenizer.encode(text) for text in ("a snail", "moth", "the slow beetle")]
    stopping = Stopping(frozenset(), max_new_tokens=12)

    def written(prompts: list[list[int]]) -> list[list[int]]:
        return [r.ids for r in engine.generate(prompts, Sampling(temperature=0.0), stopping)]

    plain = written(prompts)
    base.add(model, method)
    together = written(prompts)
    assert together == [written([prompt])[0] for prompt in prompts]
    assert together != plain
    with base.using(model, None):
        assert written(prompts) == plain


@torch.no_grad()
def test_longer_texts_than_a_block_of_attention(config: ModelConfig):
    config = config.model_copy(update={"max_position_embeddings": 400})
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    ids = torch.randint(61, (1, 300), generator=torch.Generator().manual_seed(2))
    first = torch.randint(61, (5,), generator=torch.Generator().manual_seed(4))
    expected = model(torch.cat([first[None], ids], dim=1))[:, 5:]
    base.add(model, PromptConfig(num_virtual_tokens=5), seed=4)
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_begins_from_text(config: ModelConfig, tokenizer, tmp_path: Path):
    save_tokenizer(tmp_path, [], 64)
    config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    values = {"start": "text", "text": "moth", "tokenizer": tmp_path}
    base.add(model, PromptConfig(num_virtual_tokens=6, **values))
    base.add(model, PromptConfig(num_virtual_tokens=3, **values), name="short")
    table = model.model.embed_tokens.weight
    ids = tokenizer.encode("moth")
    parts = model.model.prefix.deltas
    assert torch.equal(parts["default"].prompt_embeddings, table[ids + ids[:2]])
    assert torch.equal(parts["short"].prompt_embeddings, table[ids[:3]])


def test_what_reads_the_text_may_be_on_the_hub(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_tokenizer(tmp_path, [], 64)
    monkeypatch.setattr("instar.hub._fetched", {"owner/model": tmp_path}.__getitem__)
    model = CausalLM(config.model_copy(update={"vocab_size": 262}))
    asked = PromptConfig(start="text", text="moth", tokenizer=Path("owner/model"))
    base.add(model, asked)
    assert model.model.prefix.deltas["default"].length == 20
    assert asked.to_peft()["tokenizer_name_or_path"] == "owner/model"


def test_mistakes_are_explained(model: CausalLM, tmp_path: Path):
    with pytest.raises(UserError, match="no `tokenizer`"):
        base.add(model, PromptConfig(start="text", text="moth"))
    save_tokenizer(tmp_path, [], 64)
    with pytest.raises(UserError, match="`text` is empty"):
        base.add(model, PromptConfig(start="text", tokenizer=tmp_path))
    with pytest.raises(UserError, match="num_transformer_submodules is 2"):
        PrefixConfig.from_peft({"num_virtual_tokens": 3, "num_transformer_submodules": 2})
    base.add(model, PrefixConfig())
    base.add(model, LoRAConfig(rank=2), name="low")
    with pytest.raises(UserError, match="no change of weights"):
        base.merge(model)
    with pytest.raises(UserError, match="no adapter 'high' is loaded"):
        base.merge(model, "high")
    base.merge(model, "low")
    assert model.model.prefix is None and not base.slots(model)


def test_a_projected_prefix_is_stored_as_a_plain_one(make_model, ids: Tensor):
    model, plain = make_model(), make_model()
    base.add(model, PrefixConfig(num_virtual_tokens=5, projection=True, projection_width=7))
    read = PrefixConfig.from_peft(model.adapters["default"].to_peft())
    base.add(plain, read)
    plain.model.prefix.deltas["default"].fill(model.model.prefix.deltas["default"].stored())
    torch.testing.assert_close(plain(ids), model(ids), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        plain.model.prefix.deltas["default"].fill({"prompt_embeddings": torch.zeros(4, 128)})


def test_adapters_of_other_kinds_live_beside_it(make_model, ids: Tensor, shake):
    model = make_model()
    before = model(ids)
    base.add(model, IA3Config(), name="factors")
    shake(model)
    scaled = model(ids)
    base.add(model, PromptConfig(num_virtual_tokens=5), name="prompt")
    prompted = model(ids)
    for name, expected in {"factors": scaled, "prompt": prompted, None: before}.items():
        with base.using(model, name):
            assert torch.equal(model(ids), expected)
    assert not torch.equal(scaled, before) and not torch.equal(prompted, scaled)


def test_order_of_the_numbers():
    numbers = torch.arange(3 * 2 * 2 * 2 * 4.0).view(3, -1)
    assert torch.equal(flat(pairs(numbers, (2, 2, 2, 4))), numbers)
    keys, values = pairs(numbers, (2, 2, 2, 4))[1]
    assert keys.shape == (1, 2, 3, 4)
    # Token 2 of block 1: its keys are the third stretch of KV E numbers, its values the fourth.
    assert torch.equal(keys[0, :, 2].flatten(), numbers[2, 16:24])
    assert torch.equal(values[0, :, 2].flatten(), numbers[2, 24:32])
