"""Several models made into one: numbers by hand, and what must hold for all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from instar import merging
from instar.adapters.base import DEFAULT, add, learnt_parts
from instar.adapters.bitfit import BitFitConfig
from instar.adapters.io import save_adapter
from instar.adapters.lora import LoRAConfig
from instar.adapters.opening import content_of
from instar.adapters.vectors import ties
from instar.checkpoint import (
    control_tokens,
    load_causal_lm,
    read_dtype,
    read_model_config,
    save_model,
)
from instar.errors import UserError
from instar.files import read_json, write_json
from instar.lineage import hash_file
from instar.merging import Arguments, average, merge, slerp
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.tokenizer.reading import GPT2_END

CONFIG = ModelConfig(
    vocab_size=262,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
)


def checkpoint(
    directory: Path,
    seed: int,
    config: ModelConfig = CONFIG,
    tokens: int = 64,
    kind: type = CausalLM,
) -> Path:
    save_tokenizer(directory, [], tokens)
    model = kind(config)
    initialize(model, config, torch.Generator().manual_seed(seed))
    save_model(model, directory, Tokenizer.load(directory))
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_causal_lm(directory).named_parameters()}


def test_an_average_by_hand() -> None:
    mixed = average([torch.tensor([1.0, 4.0]), torch.tensor([5.0, 0.0])], [0.25, 0.75])
    assert mixed.tolist() == [4.0, 1.0]


def test_slerp_by_hand() -> None:
    """A third of a right angle, between vectors of length 1."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = slerp(x, y, 1 / 3)
    expected = [math.cos(math.pi / 6), math.sin(math.pi / 6)]
    assert found.tolist() == pytest.approx(expected)
    # The straight mean of both is shorter; on the circle the length stays.
    assert slerp(x, y, 0.5).norm() == pytest.approx(1.0)
    assert average([x, y], [0.5, 0.5]).norm() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("other", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]], ids=str)
def test_slerp_takes_the_straight_line_where_there_is_no_circle(other: list[float]) -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(other)
    assert torch.allclose(slerp(a, b, 0.25), 0.75 * a + 0.25 * b)


def test_slerp_goes_from_one_to_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=generator) for _ in range(2))
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    assert torch.allclose(slerp(a, b, 0.3), slerp(b, a, 0.7), atol=1e-6)


def test_the_mean_of_two_checkpoints(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1)
    out = merge(Arguments([a, b], tmp_path / "out", weights=[3.0, 1.0]))
    first, second, mixed = weights(a), weights(b), weights(out)
    for name, weight in mixed.items():
        assert torch.allclose(weight, 0.75 * first[name] + 0.25 * second[name]), name
    lineage = read_json(out / "lineage.json")
    assert lineage["stage"] == "merge"
    assert list(lineage["parents"]) == [str(a), str(b)]
    assert lineage["parents"][str(a)] != lineage["parents"][str(b)]
    assert Tokenizer.load(out).vocab_size == 262


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_a_model_and_itself_is_itself(tmp_path: Path, method: str) -> None:
    a = checkpoint(tmp_path / "a", 0)
    out = merge(Arguments([a, a], tmp_path / "out", method=method))  # type: ignore[arg-type]
    found = weights(out)
    assert all(torch.allclose(weight, found[name]) for name, weight in weights(a).items())


def test_ties_and_dare_are_given_what_was_learnt_since_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins whose sums can be checked: their own numbers are tested where they are."""
    seen = []

    def ties(deltas: list, factors: list[float], density: float) -> torch.Tensor:
        seen.append((factors, density))
        return sum(f * d for f, d in zip(factors, deltas, strict=True))  # type: ignore[return-value]

    def dare(deltas: list, factors: list[float], density: float, generator: object) -> object:
        return ties(deltas, factors, density)

    monkeypatch.setattr("instar.merging.ties", ties)
    monkeypatch.setattr("instar.merging.dare", dare)
    base, a, b = (checkpoint(tmp_path / name, seed) for seed, name in enumerate("sab"))
    for method, factors in (("ties", [1.0, 1.0]), ("dare", [0.5, 0.5])):
        out = merge(
            Arguments([a, b], tmp_path / method, method=method, base=base, density=0.2)  # type: ignore[arg-type]
        )
        assert seen[-1] == (factors, 0.2)
        start, first, second, mixed = map(weights, (base, a, b, out))
        for name, weight in mixed.items():
            learnt = factors[0] * (first[name] - start[name] + second[name] - start[name])
            assert torch.allclose(weight, start[name] + learnt, atol=1e-6), name
        assert str(base) in read_json(out / "lineage.json")["parents"]


def test_two_checkpoints_meet_on_the_sphere(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1)
    out = merge(Arguments([a, b], tmp_path / "out", method="slerp", weights=[3.0, 1.0]))
    first, second, mixed = weights(a), weights(b), weights(out)
    matrices = [name for name, weight in mixed.items() if weight.dim() == 2]
    assert matrices
    for name in matrices:
        x, y = first[name].double(), second[name].double()
        omega = math.acos((x * y).sum() / (x.norm() * y.norm()))
        near, far = math.sin(0.75 * omega) * x, math.sin(0.25 * omega) * y
        expected = (near + far) / math.sin(omega)
        assert torch.allclose(mixed[name].double(), expected, rtol=1e-5, atol=1e-7), name
        # The straight line between such matrices leads deep through the sphere.
        assert mixed[name].norm() > 1.1 * (0.75 * x + 0.25 * y).norm(), name


def test_ties_of_checkpoints(tmp_path: Path) -> None:
    base, a, b = (checkpoint(tmp_path / name, seed) for seed, name in enumerate("sab"))
    out = merge(Arguments([a, b], tmp_path / "out", method="ties", base=base, density=0.3))
    start, first, second, mixed = map(weights, (base, a, b, out))
    name = "model.layers.0.mlp.up_proj.weight"
    learnt = [first[name] - start[name], second[name] - start[name]]
    expected = start[name] + ties(learnt, [1.0, 1.0], 0.3)
    assert torch.equal(mixed[name], expected)
    assert not torch.allclose(expected, start[name] + sum(learnt))


def test_chance_in_dare_is_the_seeds(tmp_path: Path) -> None:
    base, a, b = (checkpoint(tmp_path / name, seed) for seed, name in enumerate("sab"))
    hashes = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # torch's own generator has no part in it
        out = tmp_path / f"out {number}"
        merge(Arguments([a, b], out, method="dare", base=base, seed=seed))
        hashes.append(hash_file(out / "model.safetensors"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", 3)
    model = load_causal_lm(base)
    add(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for part in learnt_parts(model, DEFAULT).values():
            part.lora_B.weight.fill_(0.1)
    adapter = tmp_path / "adapter"
    save_adapter(model, DEFAULT, adapter, base)
    out = merge(Arguments([adapter], tmp_path / "merged"))
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        spoken, found = model.eval()(ids), load_causal_lm(out).eval()(ids)
    torch.testing.assert_close(found, spoken, rtol=0, atol=1e-5)
    assert not torch.allclose(found, load_causal_lm(base)(ids))
    assert Tokenizer.load(out).vocab_size == Tokenizer.load(base).vocab_size
    assert set(read_json(out / "lineage.json")["parents"]) == {str(adapter)}
    with pytest.raises(UserError, match="is an adapter"):
        merge(Arguments([base, adapter], tmp_path / "both"))
    moved = base.rename(tmp_path / "moved")
    again = merge(Arguments([adapter], tmp_path / "again", base=moved))
    parents = read_json(again / "lineage.json")["parents"]
    assert parents[str(adapter)] == read_json(out / "lineage.json")["parents"][str(adapter)]


def test_biases_that_a_family_has_no_place_for_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", 0)
    model = load_causal_lm(base)
    add(model, BitFitConfig())
    save_adapter(model, DEFAULT, tmp_path / "adapter", base)
    with pytest.raises(UserError, match=r"proj\.bias, which the family qwen3 has no place for"):
        merge(Arguments([tmp_path / "adapter"], tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1)
    wide = checkpoint(tmp_path / "wide", 0, CONFIG.model_copy(update={"intermediate_size": 32}))
    scorer = checkpoint(tmp_path / "scorer", 0, kind=ScoreModel)
    other = checkpoint(tmp_path / "other", 0)
    split = read_json(other / "tokenizer.json") | {"pre_tokenizer": None}
    (other / "tokenizer.json").write_text(json.dumps(split), encoding="utf-8")

    def refused(match: str, models: list[Path], **options: object) -> None:
        with pytest.raises(UserError, match=match):
            merge(Arguments(models, tmp_path / "out", **options))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    refused("is no adapter", [a])
    refused("intermediate_size is 24 in .* and 32 in", [a, wide])
    refused("different tokenizers", [a, other])
    (other / "tokenizer.json").write_text("{", encoding="utf-8")
    refused("broken tokenizer", [a, other])
    refused("a holds a language model, .*scorer a reward model", [a, scorer])
    refused("for 2 models", [a, b], weights=[1.0])
    refused("for 2 models", [a, b], weights=[1.0, -2.0])
    refused("--weights says how several models become one", [a], weights=[0.5])
    refused("--method says how several models become one", [a], method="ties")
    refused("slerp is for two models, not 3", [a, b, a], method="slerp")
    refused("needs a --base", [a, b], method="ties")
    refused("has no use for a --base", [a, b], base=a)
    refused("--density is 0", [a, b], method="ties", base=a, density=0.0)


def test_what_weights_do_not_depend_on_may_differ(tmp_path: Path) -> None:
    """Chat models often promise another context than their base; the first model's is taken."""
    longer = CONFIG.model_copy(update={"max_position_embeddings": 64, "initializer_range": 0.1})
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1, longer)
    assert read_model_config(merge(Arguments([a, b], tmp_path / "ab"))) == CONFIG
    assert read_model_config(merge(Arguments([b, a], tmp_path / "ba"))) == longer


def test_positions_that_are_weights_must_be_as_many(tmp_path: Path) -> None:
    own = {"family": "gpt2", "num_key_value_heads": 2}
    config = ModelConfig(**(CONFIG.model_dump() | own))
    longer = config.model_copy(update={"max_position_embeddings": 64})
    a, b = checkpoint(tmp_path / "a", 0, config), checkpoint(tmp_path / "b", 1, longer)
    with pytest.raises(UserError, match=r"max_position_embeddings is 32 in .* and 64 in"):
        merge(Arguments([a, b], tmp_path / "out"))


def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked for before anything is said of them, and stand in the lineage."""
    places = {name: checkpoint(tmp_path / name, seed) for seed, name in enumerate("sab")}
    model = load_causal_lm(places["s"])
    add(model, LoRAConfig(rank=2))
    save_adapter(model, DEFAULT, tmp_path / "adapter", places["s"])
    hub = {f"owner/{name}": tmp_path / name for name in ("s", "a", "b", "adapter")}
    monkeypatch.setattr("instar.hub._fetched", hub.__getitem__)
    a, b, start = Path("owner/a"), Path("owner/b"), Path("owner/s")
    out = merge(Arguments([a, b], tmp_path / "ties", method="ties", base=start))
    parents = read_json(out / "lineage.json")["parents"]
    assert parents == {str(path): content_of(hub[str(path)]) for path in (a, b, start)}
    assert load_causal_lm(merge(Arguments([Path("owner/adapter")], tmp_path / "merged")))


def test_tokenizers_are_compared_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of old directories of GPT-2, too, which hold a vocabulary and merges."""
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1)
    tokens = [*read_json(a / "tokenizer.json")["model"]["vocab"]][6:]
    for directory in (a, b):
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
        vocabulary = [*tokens, "tt", GPT2_END]
        vocab = {token: id for id, token in enumerate(vocabulary)}
        (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (directory / "merges.txt").write_text("")
    assert merge(Arguments([a, b], tmp_path / "out")).exists()
    (b / "merges.txt").write_text("t t\n")
    monkeypatch.setattr(merging, "load_model", None)
    with pytest.raises(UserError, match="different tokenizers"):
        merge(Arguments([a, b], tmp_path / "again"))


@pytest.mark.parametrize(
    ("asked", "expected"), [("keep", "bfloat16"), ("float32", "float32"), ("float16", "float16")]
)
def test_weights_are_stored_as_the_first_models_are(
    tmp_path: Path, asked: Any, expected: str
) -> None:
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1)
    save_model(load_causal_lm(a), a, Tokenizer.load(a), dtype="bfloat16")
    out = merge(Arguments([a, b], tmp_path / "out", dtype=asked))
    assert read_dtype(out) == expected == read_json(out / "config.json")["dtype"]
    model = load_causal_lm(a)
    add(model, LoRAConfig(rank=2))
    save_adapter(model, DEFAULT, tmp_path / "adapter", a)
    assert read_dtype(merge(Arguments([tmp_path / "adapter"], tmp_path / "own", dtype=asked))) == (
        expected
    )


def test_what_is_said_of_sampling_stays(tmp_path: Path) -> None:
    """The base's, but for what its adapter says; ids of control tokens are the tokenizer's."""
    a, b, adapter = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1), tmp_path / "own"
    ids = control_tokens(Tokenizer.load(a))
    name = "generation_config.json"
    write_json(a / name, {"temperature": 0.6, "top_k": 20, "pad_token_id": 61})
    model = load_causal_lm(a)
    add(model, LoRAConfig(rank=2))
    save_adapter(model, DEFAULT, adapter, a)

    def said(out: str, *models: Path) -> dict[str, Any]:
        return read_json(merge(Arguments([*models], tmp_path / out)) / name)

    assert said("mean", a, b) == {"temperature": 0.6, "top_k": 20} | ids
    assert said("merged", adapter) == {"temperature": 0.6, "top_k": 20} | ids
    save_tokenizer(adapter, [], 64)
    write_json(adapter / name, {"temperature": 0.9})
    assert said("again", adapter) == {"temperature": 0.9, "top_k": 20} | ids
    assert "temperature" not in read_json(tmp_path / "mean" / "config.json")


def test_the_verb(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 1)
    arguments = [str(a), str(b), "--method", "slerp", "--out", str(tmp_path / "out")]
    assert merging.main(arguments) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(UserError, match="out exists"):
        merging.main(arguments)
