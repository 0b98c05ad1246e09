"""Stages that keep what was known: what they build, refuse, and end with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from instar.checkpoint import load_causal_lm
from instar.data.readers import write_jsonl
from instar.errors import UserError
from instar.files import read_json
from instar.objectives.keeping import Distilled, Kept
from instar.objectives.language import NextToken
from instar.stages import keeping, sft
from instar.stages.keeping import drawn, replayed
from instar.stages.registry import STAGES
from instar.stages.sft import SFTConfig
from instar.training.display import Display

Values = dict[str, dict[str, Any]]
CONVERSATIONS = 40
EARLIER = {"replay_conversations": ["{run}/data/earlier.jsonl"], "replay_share": 0.25}


def run(values: dict[str, Any], **changes: Any) -> Path:
    stage = STAGES[values["stage"]]
    with Display() as display:
        return stage.run(stage.config.parse(values | changes, "test"), display)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_causal_lm(directory).named_parameters()}


@pytest.fixture
def grown(life: Path, values: Values) -> Path:
    """A life with a start to be held to, and earlier conversations."""
    run(values["pretrain"])
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Earlier {i}?"},
                {"role": "assistant", "content": "indeed."},
            ]
        }
        for i in range(CONVERSATIONS)
    ]
    write_jsonl(life / "data" / "earlier.jsonl", talks)
    return life


def test_a_share_or_a_count() -> None:
    assert replayed(0.25, 300) == 100, "a quarter of 400"
    assert replayed(40, 300) == 40
    assert drawn("abcdef", 10, seed=0) == list("abcdef")
    some = drawn(range(1000), 100, seed=0)
    assert some == sorted(set(some)) and len(some) == 100
    assert some != drawn(range(1000), 100, seed=1)


def test_earlier_conversations_are_a_share_of_all(grown: Path, values: Values) -> None:
    def epochs(**changes: Any) -> list[int]:
        """How many examples there are, and how many an epoch has of them."""
        changes = {"batch_size": 1, **changes}
        source: Any = sft.build(SFTConfig.parse(values["sft"] | changes, "test")).source
        last = source.examples[-1]
        assert (last.learn == [True] * len(last)) == ("replay" in changes), "documents come last"
        return [len(source.examples), source.batches]

    assert epochs() == [12, 12]
    assert epochs(**EARLIER) == [12 + CONVERSATIONS, 16]
    documents = {"replay": ["{run}/data/readings.jsonl"], "replay_documents": 0.2}
    assert epochs(**EARLIER, **documents) == [12 + CONVERSATIONS + 4, 20]
    long = {"training": values["sft"]["training"] | {"steps": 41}}
    assert epochs(**EARLIER, **documents, **long) == [12 + CONVERSATIONS + 12, 20], (
        "more come round"
    )
    alone = epochs(**EARLIER, keep={"ewc": 1.0, "ewc_only": True})
    assert alone == [12, 12], "earlier data may be there for its importance alone"


def test_nothing_is_wrapped_without_need(grown: Path, values: Values) -> None:
    def objective(**keep: Any) -> Any:
        config = SFTConfig.parse(values["sft"] | EARLIER | {"keep": keep}, "test")
        return sft.build(config).objective

    assert type(objective()) is NextToken
    assert type(objective(interpolate=0.5)) is NextToken
    assert type(objective(kl=1.0)) is Distilled
    held = objective(kl=1.0, l2_sp=0.1, ewc=2.0)
    assert type(held) is Kept and type(held.inner) is Distilled
    assert list(held.ties) == ["l2_sp", "ewc"]


@pytest.mark.parametrize(
    "keep",
    [{"l2_sp": 10.0}, {"ewc": 1e4, "ewc_only": True}, {"interpolate": 0.25}],
    ids=lambda keep: next(iter(keep)),
)
def test_who_is_held_stays_nearer_to_the_start(
    grown: Path, values: Values, keep: dict[str, float]
) -> None:
    training = {"steps": 8, "log_every": 1, "optimizer": {"lr": 0.01}}
    settings = values["sft"] | EARLIER | {"training": training}
    start = weights(grown / "pretrain")

    def distance(**changes: Any) -> float:
        found = weights(run(settings, **changes))
        return sum((w - start[name]).square().sum().item() for name, w in found.items())

    free = distance(keep={"ewc_only": "ewc_only" in keep})
    assert 0 < distance(keep=keep) < 0.9 * free


def test_who_is_held_to_the_words_of_the_start_says_more_like_it(
    grown: Path, values: Values
) -> None:
    training = {"steps": 20, "log_every": 1, "optimizer": {"lr": 0.01}}
    settings = values["sft"] | {"training": training}
    source = sft.build(SFTConfig.parse(settings, "test")).source
    batch, start = next(source)[0], load_causal_lm(grown / "pretrain")

    @torch.no_grad()
    def divergence(directory: Path) -> float:
        p = start(batch.input_ids)[batch.mask].log_softmax(-1)
        q = load_causal_lm(directory)(batch.input_ids)[batch.mask].log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()

    free = divergence(run(settings))
    assert 0 < divergence(run(settings, keep={"kl": 5.0})) < 0.7 * free


def test_wise_ft_is_a_point_on_the_way(grown: Path, values: Values) -> None:
    start = weights(grown / "pretrain")
    learnt = weights(run(values["sft"]))
    found = weights(run(values["sft"], keep={"interpolate": 0.25}))
    for name, weight in found.items():
        assert torch.allclose(weight, 0.75 * start[name] + 0.25 * learnt[name], atol=1e-6), name


def test_frozen_blocks_stay(life: Path, values: Values) -> None:
    shape = {**values["pretrain"]["model"], "num_hidden_layers": 2}
    run(values["pretrain"] | {"model": shape})
    layers = {"layers": {"freeze": ["embed_tokens", "layers.0"]}}
    training = values["sft"]["training"]
    settings = values["sft"] | {"training": training | layers}
    start, found = weights(life / "pretrain"), weights(run(settings))
    moved = {name for name, weight in found.items() if not torch.equal(weight, start[name])}
    assert moved and not {n for n in moved if "layers.0." in n or "embed" in n}
    assert any("layers.1." in name for name in moved)
    settings["training"] = training | {"layers": {"freeze": ["layers.7"]}}
    with pytest.raises(UserError, match=r"freeze: 'layers.7' fits no parameter"):
        run(settings)


class Killed(BaseException):
    """Stands for a power cut."""


def test_a_killed_run_is_held_by_the_same(
    grown: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start, importance and the frozen start's words are made again, to the last bit."""
    keep = {"l2_sp": 0.1, "ewc": 5.0, "kl": 0.5, "interpolate": 0.7}
    training = {"steps": 7, "log_every": 1, "save_every": 2, "ema": 0.5, "optimizer": {"lr": 0.01}}
    settings = values["sft"] | EARLIER | {"keep": keep, "training": training}
    whole = run(settings)
    expected = [(whole / n).read_bytes() for n in ("model.safetensors", "metrics.jsonl")]
    shutil.rmtree(whole)
    annotate, calls = keeping.annotated, []

    def power_cut(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise Killed
        return annotate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(keeping, "annotated", power_cut)
        with pytest.raises(Killed):
            run(settings)
    assert not whole.exists() and (whole.parent / ".sft.work").exists()
    again = run(settings)
    found = [(again / n).read_bytes() for n in ("model.safetensors", "metrics.jsonl")]
    assert found == expected
    row = (again / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert '"ewc"' in row and '"l2_sp"' in row and '"kl_to_start"' in row


def test_pretraining_goes_on_from_a_checkpoint(grown: Path, values: Values) -> None:
    settings = values["pretrain"] | {"init": str(grown / "pretrain"), "out": str(grown / "more")}
    start = weights(grown / "pretrain")
    held = {"keep": {"l2_sp": 1.0, "ewc": 1.0, "kl": 0.1}, "replay": ["{run}/data/earlier.jsonl"]}
    write_jsonl(grown / "data" / "earlier.jsonl", [{"text": f"Earlier {i}."} for i in range(30)])
    # Its own shape and tokenizer count, whatever else is set.
    other = {"model": {**settings["model"], "hidden_size": 24}, "tokenizer": "/nowhere"}
    out = run(settings, **held, **other)
    found = weights(out)
    assert found.keys() == start.keys()
    assert {k: w.shape for k, w in found.items()} == {k: w.shape for k, w in start.items()}
    assert any(not torch.equal(found[name], start[name]) for name in start)
    parents = read_json(out / "lineage.json")["parents"]
    assert list(parents) == [str(grown / "pretrain")]
    with pytest.raises(UserError, match="context 100 is longer than the 96 positions"):
        run(settings, context=100)


@pytest.mark.parametrize(
    ("stage", "changes", "match"),
    [
        ("sft", {"keep": {"ewc": 1.0}}, "keep.ewc needs earlier data"),
        ("pretrain", {"keep": {"kl": 1.0}}, "a fresh one has none: set init"),
        ("pretrain", {"corpus": "c", "replay": ["r"]}, "mix earlier text into its recipe"),
        ("sft", {"keep": {"interpolate": 0.0}}, "interpolate"),
        ("sft", {"replay_share": 1.5}, "replay_share"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    values: Values, stage: str, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        STAGES[stage].config.parse(values[stage] | changes, "test")


def test_the_checkpoint_to_go_on_from_comes_before_the_tokenizer_of_a_corpus(
    values: Values,
) -> None:
    changes = {"init": "{run}/pretrain", "corpus": "{run}/own"}
    config = STAGES["pretrain"].config.parse(values["pretrain"] | changes, "test")
    assert config.origin() == config.run / "pretrain"
    assert config.parents() == [Path("{run}/pretrain"), Path("{run}/own/tokenizer")]


def test_a_weight_that_is_spread_cannot_be_held(
    grown: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "world", lambda: (0, 2))
    config = SFTConfig.parse(
        values["sft"] | {"keep": {"l2_sp": 1.0}, "training": {"steps": 1, "parallel": "zero3"}}, "t"
    )
    with pytest.raises(UserError, match=r"Set training\.parallel to ddp"):
        sft.build(config)


def test_what_begins_anew_cannot_be_held(grown: Path, values: Values) -> None:
    adapter = {"method": "relora", "restart_every": 2}
    with pytest.raises(UserError, match="relora's begin anew"):
        run(values["sft"] | EARLIER | {"adapter": adapter, "keep": {"l2_sp": 1.0}})


def test_documents_with_nothing_to_learn_are_left_out(grown: Path, values: Values) -> None:
    texts = ["", "a", "Moths fly at night."]
    write_jsonl(grown / "data" / "short.jsonl", [{"text": text} for text in texts])
    changes = {"replay": ["{run}/data/short.jsonl"], "replay_documents": 3}
    source: Any = sft.build(SFTConfig.parse(values["sft"] | changes, "test")).source
    plain: Any = sft.build(SFTConfig.parse(values["sft"], "test")).source
    added = source.examples[len(plain.examples) :]
    assert len(added) == 2 and all(len(row) > 1 for row in added)
