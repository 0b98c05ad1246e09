"""Virtual tokens in front: those of real tokens are as good as the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instar.model import CausalLM, KVCache, Stack
from instar.model.cache import Past, Prefix
from instar.model.layers import attend


class Recorder:
    """Keeps what it is told, and has no past of its own."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert layer == len(self.pairs)
        self.pairs.append((keys, values))
        return keys, values


class Tokens(torch.nn.Module):
    """A prompt's embeddings, as prompt tuning learns them."""

    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self.embedded = torch.nn.Parameter(embedded.clone())

    @property
    def length(self) -> int:
        return self.embedded.shape[1]

    @property
    def longest(self) -> int:
        return self.length

    def keys_values(self, decoder: Stack) -> list[tuple[Tensor, Tensor]]:
        recorder = Recorder()
        decoder.run(self.embedded, torch.arange(self.length)[None], None, recorder)
        return recorder.pairs


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(6, 61, (1, 7), generator=torch.Generator().manual_seed(2))


def with_prompt(model: CausalLM, prompt: Tensor) -> Tokens:
    tokens = Tokens(model.model.embeddings(prompt).detach())
    model.model.prefix = tokens
    return tokens


def after(model: CausalLM, prompt: Tensor, ids: Tensor) -> Tensor:
    """Logits of the ids with the prompt as words before each row."""
    return model(torch.cat((prompt.expand(len(ids), -1), ids), dim=1))[:, prompt.shape[1] :]


def test_the_parts_have_the_protocols_shapes() -> None:
    assert isinstance(Recorder(), Past)
    assert isinstance(Tokens(torch.zeros(1, 2, 3)), Prefix)


@torch.no_grad()
def test_a_prefix_of_words_is_the_words(model: CausalLM, ids: Tensor, prompt: Tensor) -> None:
    expected = after(model, prompt, ids)
    with_prompt(model, prompt)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=3e-5)
    assert (expected - model(ids[:, :1].expand(-1, 12))).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[12], [5, 1, 6]])
def test_a_cache_goes_behind_it(
    model: CausalLM, ids: Tensor, prompt: Tensor, cuts: list[int]
) -> None:
    start = [0, 3, 7]
    expected = [after(model, prompt, ids[i : i + 1, begin:])[0] for i, begin in enumerate(start)]
    with_prompt(model, prompt)
    cache = KVCache(model.config, torch.tensor(start), 12, torch.float32)
    found = torch.cat([model(part, cache=cache) for part in ids.split(cuts, dim=1)], dim=1)
    assert found.isfinite().all() and cache.length == 12
    for i, begin in enumerate(start):
        torch.testing.assert_close(found[i, begin:], expected[i], rtol=0, atol=3e-5)


@torch.no_grad()
def test_every_packed_document_has_it(model: CausalLM, ids: Tensor, prompt: Tensor) -> None:
    lengths = [5, 1, 6]
    expected = [after(model, prompt, ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    packed = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with_prompt(model, prompt)
    together = model(packed, positions, segments)[0].split(lengths)
    for found, alone in zip(together, expected, strict=True):
        torch.testing.assert_close(found, alone, rtol=0, atol=3e-5)


def test_it_learns_whether_blocks_are_recomputed_or_not(
    model: CausalLM, ids: Tensor, prompt: Tensor
) -> None:
    gradients = []
    for recompute in (False, True):
        tokens = with_prompt(model, prompt)
        model.model.recompute = recompute
        model(ids).logsumexp(-1).sum().backward()
        assert tokens.embedded.grad is not None and tokens.embedded.grad.abs().max() > 0
        gradients.append(tokens.embedded.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_mask_the_last_query_sees_every_key(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 5), (2, 9), (2, 9)))
    q, k, v = q.to(device), k.to(device), v.to(device)
    visible = torch.ones(2, 5, 9, dtype=torch.bool, device=device).tril(4)
    torch.testing.assert_close(attend(q, k, v, None), attend(q, k, v, visible))
