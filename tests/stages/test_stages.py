from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instar import lineage
from instar.adapters.base import frozen_twin
from instar.checkpoint import load_causal_lm, load_score_model
from instar.config import override
from instar.data.readers import write_jsonl
from instar.errors import UserError
from instar.files import read_json
from instar.lineage import hash_file
from instar.stages.registry import STAGES
from instar.tokenizer.hf import Tokenizer
from instar.training.display import Display
from instar.training.interrupt import Interrupted

Values = dict[str, dict[str, Any]]


def run(values: dict[str, Any]) -> Path:
    stage = STAGES[values["stage"]]
    with Display() as display:
        return stage.run(stage.config.parse(values, "test"), display)


def made(directory: Path) -> int:
    """Changes whenever the directory is made again."""
    return (directory / "lineage.json").stat().st_ino


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_leaves_a_whole_checkpoint(life: Path, values: Values) -> None:
    for name, settings in values.items():
        out = run(settings)
        assert out == life / name
        load = load_score_model if name == "reward" else load_causal_lm
        model = load(out)
        assert all(weight.isfinite().all() for weight in model.parameters()), name
        assert Tokenizer.load(out).vocab_size == model.config.vocab_size == 262
        lineage = read_json(out / "lineage.json")
        assert lineage["stage"] == name and lineage["steps"] == 2
        assert lineage["parameters"] == sum(p.numel() for p in model.parameters())
        assert lineage["config"]["training"]["steps"] == 2 and lineage["config"]["seed"] == 0
        for path, digest in lineage["data"].items():
            assert digest == hash_file(Path(path.replace("{run}", str(life))))
        assert lineage["data"] and lineage["parents"]
        cost = lineage["cost"]
        assert cost["wall_s"] > 0 and cost["tokens"] > 0 and cost["flops"] > 0
        assert cost["peak_rss_bytes"] > 10**7
        steps = [row["step"] for row in lines(out / "metrics.jsonl") if row["split"] == "train"]
        assert steps == [1, 2]
    hidden = [path.name for path in life.iterdir() if path.name.startswith(".")]
    assert not hidden, "no working folders are left"


def test_a_gpus_memory_is_counted_from_the_stages_beginning(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = [2**33]
    gpu = SimpleNamespace(
        reset_peak_memory_stats=lambda: peaks.append(2**30),
        max_memory_allocated=lambda: peaks[-1],
        get_device_name=lambda: "H100",
    )
    monkeypatch.setattr(lineage, "_cuda", lambda: gpu)
    made = read_json(run(values["pretrain"]) / "lineage.json")
    assert made["cost"]["peak_gpu_bytes"] == 2**30
    assert made["environment"]["gpu"] == "H100"


def test_only_what_should_learn_has_learnt(life: Path, values: Values) -> None:
    for name in ("pretrain", "sft", "reward", "dpo", "ppo"):
        run(values[name])
    before = {path: hash_file(path) for path in life.glob("*/model.safetensors")}
    run(values["ppo"] | {"seed": 1})
    changed = [p.parent.name for p, digest in before.items() if hash_file(p) != digest]
    assert changed == ["ppo"]


def test_a_block_learns_from_its_step_on(life: Path, values: Values) -> None:
    small = values["pretrain"]["model"] | {"num_hidden_layers": 2}
    base = run(values["pretrain"] | {"model": small})
    before = dict(load_causal_lm(base).named_parameters())
    for steps, learnt in ((2, ("norm", "layers.1")), (3, ("norm", "layers.1", "layers.0"))):
        training = {"steps": steps, "layers": {"unfreeze_every": 2}}
        out = run(values["sft"] | {"training": training, "out": str(life / f"{steps} steps")})
        after = dict(load_causal_lm(out).named_parameters())
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        parts = tuple(f"model.{part}." for part in learnt)
        assert changed == {name for name in before if name.startswith(parts)}


def test_finished_stages_are_kept(life: Path, values: Values) -> None:
    out = run(values["pretrain"])
    before = made(out)
    assert run(values["pretrain"]) == out
    assert made(out) == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"training": {"steps": 3}}, {"context": 12}], ids=str
)
def test_another_config_runs_again(life: Path, values: Values, change: dict[str, Any]) -> None:
    before = made(run(values["pretrain"]))
    assert made(run(values["pretrain"] | change)) != before


def test_other_data_runs_again(life: Path, values: Values) -> None:
    before = made(run(values["pretrain"]))
    path = life / "data" / "readings.jsonl"
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    assert made(run(values["pretrain"])) != before


def test_another_parent_runs_again(life: Path, values: Values) -> None:
    run(values["pretrain"])
    before = made(run(values["sft"]))
    run(values["pretrain"])
    assert made(run(values["sft"])) == before, "a parent that was kept changes nothing"
    run(values["pretrain"] | {"seed": 5})
    assert made(run(values["sft"])) != before


def test_a_parent_without_lineage_counts_by_its_weights(life: Path, values: Values) -> None:
    """Checkpoints from elsewhere have no lineage of ours."""
    run(values["pretrain"])
    (life / "pretrain" / "lineage.json").unlink()
    before = made(run(values["sft"]))
    assert made(run(values["sft"])) == before
    weights = life / "pretrain" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert made(run(values["sft"])) != before


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json"])
def test_what_ends_a_text_counts_too(life: Path, values: Values, name: str) -> None:
    """A tokenizer takes its control tokens from these files, so a mended one trains anew."""
    run(values["pretrain"])
    (life / "pretrain" / name).write_text("{}")
    before = made(run(values["sft"]))
    assert made(run(values["sft"])) == before
    (life / "pretrain" / name).write_text('{"eos_token_id": 3, "eos_token": "<eos>"}')
    assert made(run(values["sft"])) != before


def test_a_life_can_be_moved(life: Path, values: Values) -> None:
    before = made(run(values["pretrain"]))
    moved = life.rename(life.with_name("moved"))
    assert made(run(values["pretrain"] | {"run": str(moved)})) == before


def test_the_same_seed_gives_the_same_weights(life: Path, values: Values) -> None:
    first = load_causal_lm(run(values["pretrain"])).state_dict()
    out = str(life / "again")
    again = load_causal_lm(run(values["pretrain"] | {"out": out})).state_dict()
    other = load_causal_lm(run(values["pretrain"] | {"out": out, "seed": 9})).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_interrupted_and_continued(
    life: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = values["pretrain"] | {"training": {"steps": 6, "log_every": 2}}
    whole = load_causal_lm(run(settings | {"out": str(life / "whole")})).state_dict()
    from instar.data.sources import PackedSource

    draw = PackedSource.__next__

    def interrupted(self: PackedSource) -> Any:
        import signal

        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(self)

    monkeypatch.setattr(PackedSource, "__next__", interrupted)
    with pytest.raises(Interrupted):
        run(settings)
    assert not (life / "pretrain").exists() and (life / ".pretrain.work").exists()
    monkeypatch.undo()
    found = load_causal_lm(run(settings)).state_dict()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert not (life / ".pretrain.work").exists()
    logged = [row["step"] for row in lines(life / "pretrain" / "metrics.jsonl")]
    assert logged == [row["step"] for row in lines(life / "whole" / "metrics.jsonl")]


def test_a_failed_stage_keeps_the_last_good_one(
    life: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(values["pretrain"])
    before = hash_file(out / "model.safetensors")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("instar.stages.running.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        run(values["pretrain"] | {"seed": 1})
    assert hash_file(out / "model.safetensors") == before
    assert read_json(out / "lineage.json")["config"]["seed"] == 0
    # Training is over and its state is saved: only the checkpoint has to be written again.
    monkeypatch.undo()
    assert read_json(run(values["pretrain"] | {"seed": 1}) / "lineage.json")["config"]["seed"] == 1


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("pretrain", {"data": ["{run}/data/none.jsonl"]}, r"no such file: .*none\.jsonl"),
        ("pretrain", {"tokenizer": "{run}/none"}, "none is not a checkpoint.*Run the stage"),
        ("sft", {"init": "{run}/data"}, "data is not a checkpoint"),
        ("sft", {"init": "{run}/none"}, "none is not a checkpoint"),
        ("pretrain", {"context": 97}, "context 97 is longer than .* 96"),
        (
            "pretrain",
            {"context": 90, "data": ["{run}/data/readings_valid.jsonl"]},
            "the corpus has",
        ),
    ],
)
def test_what_is_wrong_is_named(
    life: Path, values: Values, stage: str, change: dict[str, Any], told: str
) -> None:
    if stage != "pretrain":
        run(values["pretrain"])
    with pytest.raises(UserError, match=told):
        run(values[stage] | change)


@pytest.mark.parametrize(
    ("stage", "file", "record", "told"),
    [
        (
            "sft",
            "conversations",
            {"messages": [{"role": "user", "content": "q"}]},
            r"conversations\.jsonl, line 1: .*no assistant turn",
        ),
        (
            "sft",
            "conversations",
            {
                "messages": [
                    {"role": "user", "content": "q" * 99},
                    {"role": "assistant", "content": "a"},
                ]
            },
            r"conversations\.jsonl, line 1 has .* tokens, the context has 96",
        ),
        ("dpo", "preferences", {"messages": [], "chosen": "a"}, "line 1 has no `rejected`"),
        (
            "rlvr",
            "tasks",
            {
                "messages": [{"role": "user", "content": "q" * 96}],
                "verifier": "integer",
                "answer": "1",
            },
            r"tasks\.jsonl, line 1 has .* tokens, the context has 96",
        ),
        (
            "rlvr",
            "tasks",
            {"messages": [{"role": "user", "content": "q"}], "verifier": "oracle", "answer": "1"},
            r"tasks\.jsonl, line 1: unknown verifier 'oracle'.*Known are: integer",
        ),
    ],
)
def test_broken_data_is_named(
    life: Path, values: Values, stage: str, file: str, record: dict[str, Any], told: str
) -> None:
    run(values["pretrain"])
    write_jsonl(life / "data" / f"{file}.jsonl", [record])
    with pytest.raises(UserError, match=told):
        run(values[stage] | ({"init": str(life / "pretrain")}))


def test_an_empty_corpus(life: Path, values: Values) -> None:
    (life / "data" / "readings.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no data in .*readings\.jsonl"):
        run(values["pretrain"])
    write_jsonl(life / "data" / "readings.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"no text in .*readings\.jsonl"):
        run(values["pretrain"])


@pytest.mark.parametrize("method", ["dpo", "ipo", "simpo", "orpo"])
def test_every_pair_loss_can_be_chosen(
    life: Path, values: Values, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = run(values["pretrain"])
    twins = []

    def twin(policy: Any, silent: bool) -> Any:
        twins.append(frozen_twin(policy, silent))
        return twins[-1]

    monkeypatch.setattr("instar.stages.dpo.frozen_twin", twin)
    settings = values["dpo"] | {"init": str(init), "loss": {"method": method}}
    out = run(settings)
    assert len(twins) == (method in ("dpo", "ipo")), "a reference only where one is needed"
    assert read_json(out / "lineage.json")["config"]["loss"]["method"] == method
    rows = lines(out / "metrics.jsonl")
    assert {row["split"] for row in rows} == {"train", "valid"}
    before, after = (load_causal_lm(path).state_dict() for path in (init, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"method": "kto"}, "`loss`.*'kto'.*'dpo', 'ipo', 'simpo', 'orpo'"),
        ({"method": "dpo", "gamma": 1.0}, "unknown key `loss.dpo.gamma`"),
        ({"method": "simpo", "beta": 0.0}, "`loss.simpo.beta` is 0.0"),
    ],
)
def test_impossible_pair_losses(values: Values, loss: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        STAGES["dpo"].config.parse(values["dpo"] | {"loss": loss}, "test")


def test_options_change_the_pair_loss_of_the_file(values: Values) -> None:
    settings = values["dpo"] | {"loss": {"method": "simpo", "gamma": 0.5}}
    config = STAGES["dpo"].config.parse(settings, "test")
    changed = override(config, ["--loss.beta", "3", "--batch-size", "8"], "instar dpo", "")
    assert changed.loss.model_dump() == {"method": "simpo", "beta": 3.0, "gamma": 0.5}
    assert changed.batch_size == 8


def test_broken_conversations_are_named_before_merges_are_learnt(life: Path) -> None:
    write_jsonl(life / "data" / "conversations.jsonl", [{"messages": [{"role": "user"}]}])
    with pytest.raises(UserError, match=r"conversations\.jsonl, line 1: turn 0 says None"):
        run({"stage": "tokenizer", "run": str(life), "out": "{run}/other"})


def test_the_wrong_kind_of_parent(life: Path, values: Values) -> None:
    run(values["pretrain"])
    run(values["reward"] | {"init": str(life / "pretrain")})
    with pytest.raises(UserError, match="reward does not hold a CausalLM"):
        run(values["sft"] | {"init": str(life / "reward")})


def test_pretraining_goes_without_held_out_text(
    life: Path, values: dict[str, dict[str, Any]]
) -> None:
    out = run(values["pretrain"] | {"valid": []})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(row["split"] == "train" for row in rows)
    # Of a small corpus nothing may have been held out.
    documents = life / "corpus" / "documents"
    documents.mkdir(parents=True)
    held_out = documents / "valid-00000.jsonl"
    held_out.touch()
    config = STAGES["pretrain"].config.parse(values["pretrain"] | {"corpus": "{run}/corpus"}, "x")
    assert config.held_out() == []
    held_out.write_text('{"text": "a"}\n')
    assert config.held_out() == [held_out]
