"""Every stage trains a whole model or a few weights beside one, and each begins with either."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from instar.adapters.base import DEFAULT, frozen_twin, learnt_parts, using
from instar.adapters.io import weights_hash
from instar.adapters.nf4 import NF4Linear
from instar.adapters.opening import load_causal_lm, load_score_model
from instar.adapters.slots import Adapted
from instar.data.readers import write_jsonl
from instar.errors import UserError
from instar.exchange.card import card
from instar.files import read_json, write_json
from instar.generation import Engine
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.lineage import hash_file
from instar.objectives.language import batch_logprobs
from instar.planning.survey import Survey
from instar.stages import dpo, preparing, running, sft
from instar.stages.registry import STAGES
from instar.tokenizer.hf import Tokenizer
from instar.training.display import Display
from instar.training.interrupt import Interrupted
from instar.training.parallel import Learner

Values = dict[str, dict[str, Any]]

LORA = {"method": "lora", "rank": 2}
METHODS = ["lora", "dora", "relora", "adalora", "ia3", "bitfit", "bottleneck", "prefix", "prompt"]
AFTER = ["sft", "reward", "dpo", "ppo", "rlvr"]


def run(values: dict[str, Any]) -> Path:
    stage = STAGES[values["stage"]]
    with Display() as display:
        return stage.run(stage.config.parse(values, "test"), display)


def rewarded(life: Path) -> dict[str, Any]:
    """Settings of rlvr in which some replies of every group are better than others.

    What ends by itself is right. A model that has hardly learnt ends a tenth of so many replies.
    """
    ends = {"verifier": "line_lengths", "answer": "", "options": [str(n) for n in range(99)]}
    questions = [{"role": "user", "content": f"Is {i} even?"} for i in range(4)]
    path = life / "data" / "ends.jsonl"
    write_jsonl(path, [{"messages": [question], **ends} for question in questions])
    rollout = {"prompts": 2, "samples": 64, "max_new_tokens": 32}
    return {"tasks": [str(path)], "rollout": rollout}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def base(life: Path, values: Values) -> str:
    return str(run(values["pretrain"]))


@pytest.mark.parametrize("stage", AFTER)
def test_an_adapter_of_every_stage_is_written_beside_its_base(
    life: Path, values: Values, base: str, stage: str
) -> None:
    settings = values[stage] | {"adapter": LORA, "init": base}
    settings |= rewarded(life) if stage == "rlvr" else {}
    if stage == "ppo":
        run(values["reward"] | {"init": base})
    before = hash_file(Path(base) / "model.safetensors")
    out = run(settings)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files(out)
    assert not {"model.safetensors", "config.json"} & files(out)
    load = load_score_model if stage == "reward" else load_causal_lm
    model = load(out)
    assert list(model.adapters) == [DEFAULT]
    lineage = read_json(out / "lineage.json")
    learnt = sum(
        p.numel() for part in learnt_parts(model, DEFAULT).values() for p in part.parameters()
    )
    assert lineage["trained_parameters"] == learnt < lineage["parameters"] / 2
    assert hash_file(Path(base) / "model.safetensors") == before
    assert Tokenizer.load(out).vocab_size == 262
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        spoken = model(ids)
        with using(model, None):
            assert not torch.equal(spoken, model(ids)), "it learnt something"
    assert settings["training"]["steps"] == lineage["steps"]


@pytest.mark.parametrize("stage", AFTER)
def test_every_stage_goes_on_with_an_adapter(
    life: Path, values: Values, base: str, stage: str
) -> None:
    first = run(values["sft"] | {"adapter": LORA, "init": base, "out": str(life / "first")})
    before = hash_file(Path(base) / "model.safetensors")
    settings = values[stage] | (rewarded(life) if stage == "rlvr" else {})
    if stage == "ppo":
        run(values["reward"] | {"init": str(first)})
        assert "adapter_config.json" in files(life / "reward")
    out = run(settings | {"init": str(first), "out": str(life / "second")})
    one = load_causal_lm(first)
    two = (load_score_model if stage == "reward" else load_causal_lm)(out)
    parts = learnt_parts(one, DEFAULT)
    changed = [
        not torch.equal(p, learnt_parts(two, DEFAULT)[path].get_parameter(name))
        for path, part in parts.items()
        for name, p in part.named_parameters()
    ]
    assert any(changed), "the same adapter has learnt more"
    assert hash_file(Path(base) / "model.safetensors") == before


def test_a_base_on_the_hub_keeps_its_name(
    life: Path, values: Values, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is given the adapter finds its base; where it was cached here, nobody else does."""
    cache = Path(base).rename(tmp_path / "cache")
    monkeypatch.setattr("instar.hub._fetched", {"owner/model": cache}.__getitem__)
    first = run(values["sft"] | {"adapter": LORA, "init": "owner/model"})
    second = run(values["dpo"] | {"init": str(first)})
    for adapter in (first, second):
        record = read_json(adapter / "adapter_config.json")
        assert record["base_model_name_or_path"] == "owner/model"
        assert read_json(adapter / "base.json")["weights"] == weights_hash(cache)
        assert load_causal_lm(adapter).adapters
        assert "base_model: owner/model" in card(adapter) and str(cache) not in card(adapter)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "adapter"])
def test_what_a_base_says_of_sampling_is_carried_along(
    values: Values, base: str, adapter: dict[str, Any] | None
) -> None:
    name = "generation_config.json"
    ids, sampling = read_json(Path(base) / name), {"temperature": 0.6, "top_k": 20}
    write_json(Path(base) / name, ids | sampling | {"pad_token_id": 61})
    out = run(values["sft"] | {"adapter": adapter, "init": base})
    assert read_json(out / name) == sampling | ids, "control tokens are the tokenizer's"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_speaks(life: Path, values: Values, base: str, method: str) -> None:
    adapter = {"method": method} | ({"restart_every": 1} if method == "relora" else {})
    settings = values["sft"] | {"adapter": adapter, "init": base}
    out = run(settings)
    model, fresh = load_causal_lm(out), sft.SFTConfig.parse(settings, "test").policy()
    ids = torch.arange(6, 30)[None]
    with torch.no_grad(), using(model, None):
        plain = model(ids)
    with torch.no_grad():
        assert not torch.equal(model(ids), plain)
        # A fresh prefix or prompt speaks otherwise than the base before it has learnt anything.
        assert not torch.equal(model(ids), fresh(ids)), "it learnt something"
    engine = Engine.load(out)
    stopping = Stopping(frozenset(), max_new_tokens=5)
    together = engine.generate([[6, 7, 8], [9]], Sampling(temperature=0.0), stopping)
    alone = engine.generate([[9]], Sampling(temperature=0.0), stopping)
    assert together[1].ids == alone[0].ids and len(alone[0].ids) == 5


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "adalora", "rank": 4, "target_rank": 2},
        {"method": "lora", "rank": 4, "dropout": 0.5},
        {"method": "relora", "rank": 2, "restart_every": 2},
    ],
    ids=["adalora", "dropout", "relora"],
)
def test_an_interrupted_adapter_goes_on_exactly(
    life: Path,
    values: Values,
    base: str,
    adapter: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = values["sft"] | {
        "adapter": adapter,
        "init": base,
        "training": {"steps": 6, "log_every": 2},
    }
    whole = load_causal_lm(run(settings | {"out": str(life / "whole")})).state_dict()
    from instar.data.sources import ExampleSource

    draw = ExampleSource.__next__

    def interrupted(self: ExampleSource[Any]) -> Any:
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(self)

    monkeypatch.setattr(ExampleSource, "__next__", interrupted)
    with pytest.raises(Interrupted):
        run(settings)
    monkeypatch.undo()
    [state, *_] = sorted((life / ".sft.work").glob("state-*.pt"))
    saved = torch.load(state, weights_only=False)["objective"]
    assert saved and not [name for name in saved if "embed_tokens" in name], "only what learns"
    found = load_causal_lm(run(settings)).state_dict()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_four_bits_under_an_adapter(
    life: Path, values: Values, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, packed = running.fit, list[bool]()

    def watched(learner: Learner, *rest: Any) -> None:
        slots = [module for module in learner.objective.modules() if isinstance(module, Adapted)]
        packed.append(bool(slots) and all(isinstance(slot.base, NF4Linear) for slot in slots))
        fit(learner, *rest)

    monkeypatch.setattr(running, "fit", watched)
    settings = values["sft"] | {"adapter": LORA, "init": base}
    out = run(settings | {"quantize": "nf4"})
    whole = run(settings | {"out": str(life / "whole")})
    assert packed == [True, False], "it learns over four bits where that is asked for"
    four, all_bits = (load_file(path / "adapter_model.safetensors") for path in (out, whole))
    assert four.keys() == all_bits.keys()
    assert any(not torch.equal(four[name], all_bits[name]) for name in four)
    assert load_causal_lm(out, "nf4").adapters
    with pytest.raises(UserError, match=r"quantize keeps .* four bits.*Choose an `adapter`"):
        run(values["sft"] | {"quantize": "nf4", "init": base})


def test_an_adapter_on_an_adapter_is_refused(life: Path, values: Values, base: str) -> None:
    first = run(values["sft"] | {"adapter": LORA, "init": base})
    with pytest.raises(UserError, match=r"`init` is an adapter already.*instar merge"):
        run(values["dpo"] | {"adapter": LORA, "init": str(first)})


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"method": "lora", "targets": ["c_attn"]}, r"'c_attn' matches no layer.*q_proj"),
        ({"method": "lora", "rank": 0}, r"adapter.*rank.*greater than 0"),
        ({"method": "lara"}, r"adapter"),
        ({"method": "adalora", "rank": 4}, r"adapter.*target_rank is 8, more than rank"),
        ({"method": "adalora", "initial_steps": 2}, r"initial_steps 2 .*nothing of 2 steps"),
    ],
)
def test_mistakes_are_named_before_training(
    life: Path,
    values: Values,
    base: str,
    adapter: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "fit", None)
    with pytest.raises(UserError, match=told):
        run(values["sft"] | {"adapter": adapter, "init": base})


def test_what_begins_anew_has_no_average(life: Path, values: Values, base: str) -> None:
    settings = values["sft"] | {"adapter": {"method": "relora"}, "init": base}
    with pytest.raises(UserError, match=r"training.ema averages weights, and relora replaces them"):
        run(settings | {"training": {"steps": 2, "ema": 0.9}})


@pytest.mark.parametrize("method", ["adalora", "relora", "prompt", "lora"])
def test_what_needs_whole_weights_is_refused_where_they_are_spread(
    values: Values, base: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = values["sft"] | {"adapter": {"method": method}, "init": base}
    config = sft.SFTConfig.parse(settings | {"training": {"steps": 1, "parallel": "zero3"}}, "test")
    objective = sft.build(config).objective
    monkeypatch.setattr(preparing, "world", lambda: (0, 2))
    if method == "lora":
        preparing.prepared(objective, config.training)
        return
    with pytest.raises(UserError, match=rf"{method} needs whole ones.*parallel to ddp"):
        preparing.prepared(objective, config.training)


def test_another_base_is_refused(life: Path, values: Values, base: str) -> None:
    out = run(values["sft"] | {"adapter": LORA, "init": base})
    run(values["pretrain"] | {"seed": 3})
    with pytest.raises(UserError, match="base"):
        load_causal_lm(out)


def test_another_base_makes_a_stage_run_again(life: Path, values: Values, base: str) -> None:
    first = run(values["sft"] | {"adapter": LORA, "init": base, "out": str(life / "first")})
    config = STAGES["dpo"].config.parse(values["dpo"] | {"init": str(first)}, "test")
    before = config.provenance()["fingerprint"]
    path = Path(base) / "config.json"
    path.write_text(json.dumps(read_json(path) | {"note": "changed"}))
    assert config.provenance()["fingerprint"] != before


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_the_reference_of_a_fresh_adapter_is_the_base(
    life: Path, values: Values, base: str, method: str
) -> None:
    """A fresh prompt or prefix changes what is said, and the start had none."""
    settings = values["dpo"] | {"adapter": {"method": method}, "init": base}
    batch = next(dpo.build(dpo.DPOConfig.parse(settings, "test")).source)[0]
    with torch.no_grad():
        expected = batch_logprobs(load_causal_lm(Path(base)), batch)
    assert torch.equal(batch.reference_logprobs, expected)


def test_a_plan_sees_the_base_of_an_adapter(life: Path, values: Values, base: str) -> None:
    adapter = run(values["sft"] | {"adapter": LORA, "init": base})
    survey = Survey(life)
    assert survey.model(adapter) == load_causal_lm(Path(base)).config


def test_interpolated_factors_are_no_interpolated_weights(values: Values, base: str) -> None:
    with pytest.raises(UserError, match="goes straight from weights to weights"):
        run(values["sft"] | {"adapter": LORA, "init": base, "keep": {"interpolate": 0.5}})


def test_a_reference_shares_the_base(life: Path, values: Values, base: str) -> None:
    config = STAGES["dpo"].config.parse(values["dpo"] | {"adapter": LORA, "init": base}, "test")
    policy = config.policy()
    twin = frozen_twin(policy)
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in twin.parameters()}
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    assert len(shared) == len(frozen)
    assert not any(p.requires_grad for p in twin.parameters()) and not twin.training


def test_nothing_need_be_held_out(life: Path, values: Values, base: str) -> None:
    out = run(values["sft"] | {"adapter": LORA, "init": base, "valid": []})
    rows = (out / "metrics.jsonl").read_text().splitlines()
    splits = {json.loads(row)["split"] for row in rows}
    assert splits == {"train"}


def test_a_life_may_be_moved(life: Path, values: Values, base: str) -> None:
    run(values["sft"] | {"adapter": LORA, "init": base})
    moved = life.rename(life.with_name("moved"))
    assert load_causal_lm(moved / "sft").adapters


def test_the_weight_of_a_prior_is_no_part_of_an_adapter(
    life: Path, values: Values, base: str
) -> None:
    with pytest.raises(UserError, match=r"form is prior.*Choose `last`"):
        run(values["reward"] | {"adapter": LORA, "init": base, "form": "prior"})
