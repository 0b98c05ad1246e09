"""The compiled forward pass beside the one that is written with torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from instar.errors import UserError
from instar.generation import GREEDY, Engine, Stopping, lean, native
from instar.generation.body import fast_forward, is_compiled, laid_out
from instar.generation.lean import Place
from instar.generation.products import Plain, in_eight_bits
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer

pytestmark = pytest.mark.usefixtures("compiler")

SHAPES = {
    "narrow heads": {"head_dim": 6},
    "heads of 32": {"head_dim": 32},
    "heads of 64": {"head_dim": 64},
    "heads of 128": {"head_dim": 128, "num_key_value_heads": 1},
    "nothing is a multiple of anything": {"hidden_size": 34, "intermediate_size": 70},
    "biases and no norms of heads": {"family": "qwen2"},
}
COLUMNS = 300


def model_of(changes: dict) -> CausalLM:
    shape = {
        "vocab_size": 75,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": COLUMNS,
        "initializer_range": 0.2,
    }
    config = ModelConfig(**{**shape, **changes})
    model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    initialize(model, config, generator)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def empty(model: CausalLM, rows: int, dtype: torch.dtype) -> torch.Tensor:
    c = model.config
    shape = (c.num_hidden_layers, 2, rows, c.num_key_value_heads, COLUMNS, c.head_dim)
    return torch.zeros(shape, dtype=dtype)


def place(store: torch.Tensor, numbers: list[int], lengths: list[int], new: int) -> Place:
    rows, held = torch.tensor(numbers), torch.tensor(lengths)
    return Place(store, rows, rows, held, int(held.max()) + new)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache directory in which nothing has been built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "instar"
    native.library.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("format", "close"), [("float32", 2e-5), ("bfloat16", 0.1), ("int8", 0.2)])
def test_logits_and_cache_are_those_of_the_plain_pass(shape: str, format, close: float):
    model = model_of(SHAPES[shape])
    assert is_compiled(model)
    compiled = fast_forward(model, format)
    body = laid_out(model, Plain)
    theirs, own = (empty(model, 5, d) for d in (torch.float32, native.cache_dtype(format)))
    generator = torch.Generator().manual_seed(1)
    # Prompts of several lengths, more than are read at once; then a token each, rows apart.
    lengths = torch.tensor([290, 1, 130])
    ids = torch.randint(0, 75, (3, 290), generator=generator)
    more = torch.randint(0, 75, (2, 1), generator=generator)
    calls = [
        (ids, [4, 0, 2], [0, 0, 0], lengths - 1),
        (more, [2, 0], [130, 1], None),
        (ids[:2, :3], [0, 2], [2, 131], torch.tensor([2, 1])),
    ]
    with torch.no_grad():
        for new, rows, held, last in calls:
            expected = lean.forward(body, new, place(theirs, rows, held, new.shape[1]), last)
            found = compiled(new, place(own, rows, held, new.shape[1]), last)
            assert found.shape == expected.shape and found.dtype == torch.float32
            assert (found - expected).abs().max() < close * expected.abs().max().clamp(min=1)
    for row, length in ((4, 290), (0, 5), (2, 133)):
        difference = own[:, :, row, :, :length].float() - theirs[:, :, row, :, :length]
        assert difference.abs().max() < close * theirs.abs().max()
    assert not own[:, :, [1, 3]].any()  # nobody else's rows are touched


@pytest.mark.parametrize("flag", ["", " -mno-avx512vnni", " -mno-avx512f"])
def test_inputs_of_eight_bits_lose_no_more_than_weights_and_of_sixteen_less_than_bfloat16(
    cache: Path, monkeypatch: pytest.MonkeyPatch, flag: str
):
    def rounded(weight: torch.Tensor, bias: torch.Tensor | None) -> Plain:
        whole, scale = in_eight_bits(weight)
        return Plain(whole * scale[:, None], bias)

    monkeypatch.setenv("CXX", f"g++{flag}")
    built = native.library()
    assert built is not None
    model = model_of({"head_dim": 32, "hidden_size": 256, "intermediate_size": 700})
    ids = torch.randint(0, 75, (3, 20), generator=torch.Generator().manual_seed(2))
    last = torch.full((3,), 19)

    def read(forward, dtype: torch.dtype) -> torch.Tensor:
        return forward(ids, place(empty(model, 3, dtype), [0, 1, 2], [0, 0, 0], 20), last)

    with torch.no_grad():
        expected = read(partial(lean.forward, laid_out(model, rounded)), torch.float32)
        found = read(fast_forward(model, "int8"), torch.bfloat16)
        exact, rough = (
            read(fast_forward(model, format), native.cache_dtype(format))
            for format in ("float32", "bfloat16")
        )
    if flag:
        assert built.whole_in_word() == 2
    if built.whole_in_word() == 4:
        assert (found - expected).norm() < (expected - exact).norm()
    else:
        assert (found - expected).norm() < (rough - exact).norm()


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_a_row_is_the_same_bits_in_any_company_and_any_pieces(format):
    model = model_of({"head_dim": 32})
    forward = fast_forward(model, format)
    ids = torch.randint(0, 75, (30, 20), generator=torch.Generator().manual_seed(2))
    rows = list(range(30))
    with torch.no_grad():
        store = empty(model, 30, native.cache_dtype(format))
        last = torch.full((30,), 19)
        together = forward(ids, place(store, rows, [0] * 30, 20), last)
        for number in (0, 17):
            alone = empty(model, 1, native.cache_dtype(format))
            for column in range(20):
                token = ids[number : number + 1, column : column + 1]
                logits = forward(token, place(alone, [0], [column], 1), None)
            assert torch.equal(logits[0], together[number])
            assert torch.equal(alone[:, :, 0], store[:, :, number])


def test_without_a_compiler_torch_does_it(
    tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    model = model_of({"vocab_size": tokenizer.vocab_size})
    stopping = Stopping(frozenset(), max_new_tokens=8)
    [compiled] = Engine(model, tokenizer).generate([[7, 8, 9]], GREEDY, stopping)
    assert is_compiled(model)
    for compiler, said in (
        ("no-such-compiler", "there is no C++ compiler (no-such-compiler)"),
        ("false", "false cannot build forward.cpp"),
    ):
        monkeypatch.setenv("CXX", compiler)
        native.library.cache_clear()
        with caplog.at_level(logging.INFO):
            assert native.library() is None and not is_compiled(model)
            [plain] = Engine(model, tokenizer).generate([[7, 8, 9]], GREEDY, stopping)
        assert said in caplog.text
        assert plain.ids == compiled.ids
        assert plain.logprobs == pytest.approx(compiled.logprobs, abs=1e-5)


def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "env g++")  # a compiler may be a command with arguments
    assert native.library() is not None
    [built] = cache.iterdir()
    before = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [built] == list(cache.iterdir())
    assert built.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "where", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_what_is_not_a_number_is_not_hidden(tokenizer: Tokenizer, precision, where: str):
    model = model_of({"vocab_size": tokenizer.vocab_size})
    with torch.no_grad():
        model.get_parameter(where)[7:9] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        stopping = Stopping(frozenset(), max_new_tokens=8)
        Engine(model, tokenizer, precision=precision).generate([[7, 8, 9]], GREEDY, stopping)
