from __future__ import annotations

import json
import math
import random
from pathlib import Path

import nanogpt
import numpy as np
import pytest
import speedrun
import torch
from torch import Tensor, nn

from instar.config import read_config
from instar.data.batch import IGNORE
from instar.stages.pretrain import PretrainConfig

RNG = random.Random(0)
TEXT = " ".join(RNG.choice(["to", "be", "or", "not", "naïve", "窗前"]) for _ in range(2000))


class Uniform(nn.Module):
    """Knows nothing: every id is as likely as any other."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.vocab_size)


class Counting(nn.Module):
    """Believes, with three nats more than anything else, that n + 1 follows n."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * nn.functional.one_hot((ids + 1) % 50, 50).float()


@pytest.mark.parametrize("overlap", [0, 7, 32])
@pytest.mark.parametrize("tokens", [speedrun.characters(TEXT), speedrun.pieces(TEXT, 300)])
def test_knowing_nothing_costs_log2_of_the_vocabulary(
    tokens: speedrun.Tokens, overlap: int
) -> None:
    held_out = speedrun.split(TEXT)[1].encode()
    expected = math.log2(tokens.vocab_size) * len(tokens.held_out) / len(held_out)
    found = speedrun.bits_per_byte(Uniform(tokens.vocab_size), tokens, 64, overlap)
    assert found == pytest.approx(expected, rel=1e-5)


def test_each_target_stands_beside_its_input() -> None:
    train, held_out = np.arange(20) % 50, np.arange(20, 333) % 50
    tokens = speedrun.Tokens(train, held_out, held_out_bytes=626, vocab_size=50)
    nats = math.log(math.exp(3) + 49) - 3  # a token, of two bytes
    found = speedrun.bits_per_byte(Counting(), tokens, 16, 5)
    assert found == pytest.approx(nats / math.log(2) / 2, rel=1e-5)


@pytest.mark.parametrize("overlap", [0, 3, 7])
@pytest.mark.parametrize("length", [2, 8, 9, 16, 17, 50])
def test_every_id_is_asked_for_once(length: int, overlap: int) -> None:
    inputs, targets = speedrun.windows(np.arange(length), 8, overlap)
    asked = targets[targets != IGNORE].tolist()
    assert asked == list(range(1, length))
    assert torch.equal(inputs[targets != IGNORE] + 1, targets[targets != IGNORE])
    for row in targets:  # what came before is seen, as far as there was anything
        first = int((row != IGNORE).nonzero()[0])
        assert first == min(overlap, int(row[first]) - 1)


def test_the_last_tenth_is_held_out_and_tokenizers_never_see_it() -> None:
    train, held_out = speedrun.split(TEXT)
    assert train + held_out == TEXT
    assert len(held_out) == pytest.approx(len(TEXT) / 10, abs=1)
    novel = train + "z" * len(held_out)
    unlike, like = speedrun.pieces(novel, 300), speedrun.pieces(TEXT, 300)
    assert np.array_equal(unlike.train, like.train)
    assert len(unlike.held_out) == len(held_out), "no merge was learnt from it"
    assert like.held_out_bytes == len(held_out.encode())


def test_the_baseline_has_its_published_size() -> None:
    model = nanogpt.NanoGPT(65, nanogpt.Recipe())
    # Blocks of 12 d^2 + 2 d, tables of 65 d and 64 d, the last normalisation.
    expected = 4 * (12 * 128**2 + 2 * 128) + (65 + 64) * 128 + 128
    assert sum(p.numel() for p in model.parameters()) == expected == 804_096


def test_the_baseline_looks_only_back() -> None:
    model = nanogpt.NanoGPT(65, nanogpt.Recipe())
    ids = torch.randint(65, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 40:] = 0
    torch.testing.assert_close(model(ids)[:, :40], model(changed)[:, :40])
    loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(65), rel=0.05), "at first it knows nothing"


def test_the_baselines_rate() -> None:
    recipe = nanogpt.Recipe()
    assert recipe.rate(0) == pytest.approx(1e-3 / 101)
    assert recipe.rate(100) == pytest.approx(1e-3)
    assert recipe.rate(1050) == pytest.approx((1e-3 + 1e-4) / 2)
    assert recipe.rate(2000) == pytest.approx(1e-4)


def test_both_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = nanogpt.Recipe(layers=1, width=16, context=16, steps=60, warmup=5, peak=1e-2)
    monkeypatch.setattr(nanogpt, "Recipe", lambda: small)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "stage: pretrain\n"
        "model: {vocab_size: 280, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,"
        " num_attention_heads: 1, num_key_value_heads: 1, head_dim: 16}\n"
        "context: 16\nbatch_size: 8\n"
        "training: {steps: 40, precision: float32, optimizer: {name: muon, lr: 0.03}}\n"
    )
    for name in (speedrun.BASELINE, str(recipe)):
        result = speedrun.run(name, TEXT, seed=0, curve=2)
        (_, before), (late, after) = result.curve
        assert after == result.bits_per_byte < before < 8
        assert late == result.train_s > 0


def test_the_recipe_is_one_that_a_stage_would_take() -> None:
    config = read_config(PretrainConfig, speedrun.HERE / "speedrun.yaml")
    assert config.model.family == "qwen3"


def test_the_table_says_who_met_the_bar() -> None:
    def result(name: str, train_s: float, bits: float) -> speedrun.Result:
        return speedrun.Result(name, 0, train_s, bits, bits, 0.0, 1, 1, [])

    results = [result("nanogpt", 30.0, 2.7), result("a", 10.0, 2.7), result("b", 11.0, 2.6)]
    rows = speedrun.table([*results, result("c", 1.0, 2.71)]).splitlines()
    assert ["met" in row for row in rows[3:]] == [True, False, False]
    assert ["missed" in row for row in rows[3:]] == [False, True, True]
    assert "1/3.0" in rows[3]


def test_a_single_run_from_the_command_line(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT, encoding="utf-8")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "stage: pretrain\n"
        "model: {vocab_size: 270, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1,"
        " num_attention_heads: 1, num_key_value_heads: 1, head_dim: 8}\n"
        "context: 8\nbatch_size: 2\ntraining: {steps: 2, precision: float32}\n"
    )
    common = ["--text", str(text), "--threads", "1", "--out", str(out)]
    speedrun.main([*common, "--one", str(recipe), "--seed", "3"])
    assert json.loads(out.read_text())["seed"] == 3
