"""The card says what the lineage says: no more, and nothing of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from instar.adapters.base import DEFAULT, AdapterConfig, add, merge
from instar.adapters.methods import OWN, Method, described
from instar.adapters.opening import content_of
from instar.errors import UserError
from instar.exchange.ancestry import ancestry, is_hub_id
from instar.exchange.card import UNMERGED, card, front_matter, write_card
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
)
COST = {"wall_s": 90.0, "cpu_s": 1.0, "tokens": 2_000_000, "flops": 3 * 10**12}
COST |= {"peak_rss_bytes": 10**9, "exam_wall_s": 0.0}
MACHINE = {"processor": "Abacus", "threads": "2", "torch": "9.9"}


def stage(
    run: Path, name: str, lineage: dict[str, Any], exams: dict[str, Any] | None = None
) -> Path:
    """A stage's directory, as far as a card looks into it."""
    directory = run / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "by": name}))
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    record = {"stage": name, "config": {"stage": name, "out": f"{{run}}/{name}"}, "data": {}}
    record |= {"parents": {}, "cost": COST, "environment": MACHINE}
    (directory / "lineage.json").write_text(json.dumps(record | lineage))
    if exams is not None:
        (directory / "exams.json").write_text(json.dumps({"key": "", "exams": exams}))
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    stage(run, "data", {"primer": "ab12"})
    data = {"{run}/data/readings.jsonl": "0123456789abcdef" * 4}
    pretrain = stage(run, "pretrain", {"steps": 100, "data": data, "parameters": 2_000_000})
    parents = {"{run}/pretrain": content_of(pretrain)}
    exams = {
        "knowledge": {"score": 0.7458, "stderr": 0.0281, "n": 240},
        "bits_per_byte_en": {"score": 0.36087, "stderr": 0.0084, "n": 201},
    }
    stage(run, "sft", {"steps": 1200, "parents": parents, "parameters": 2_000_000}, exams)
    return run


def test_an_adapter_whose_base_is_gone_is_still_an_ancestor(run: Path) -> None:
    base = stage(run, "base", {})
    first = stage(run, "first", {"steps": 5})
    record = {"base_model_name_or_path": str(base)}
    (first / "adapter_config.json").write_text(json.dumps(record))
    stage(run, "second", {"parents": {"{run}/first": content_of(first)}})
    assert not ancestry(run / "second")[0].changed
    base.rename(run / "moved")
    assert [link.changed for link in ancestry(run / "second")] == [True, False]


def test_the_whole_chain(run: Path) -> None:
    assert [link.stage for link in ancestry(run / "sft")] == ["data", "pretrain", "sft"]
    text = card(run / "sft")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["instar", "qwen3", "conversational"],
    }
    assert "2 M parameters, qwen3; made with instar. Stages: pretrain → sft." in text
    assert "| sft | 1,200 | 2 M | 1 min 30 s | 3 T | 1 GB |" in text
    assert "In all 3 min 00 s and 6 T FLOPs (estimated), on Abacus, 2 threads, torch 9.9." in text
    assert "| pretrain | `readings.jsonl` | `0123456789abcdef` |" in text
    assert "| knowledge | 74.6 % ± 2.8 | 240 |" in text
    assert "| bits per byte en | 0.361 ± 0.008 | 201 |" in text
    assert "None has been stated." in text
    assert "out: '{run}/sft'" in text


def test_one_item_alone_has_no_error(run: Path) -> None:
    exams = {
        "logic": {"score": 1.0, "stderr": None, "n": 1},
        "bits_per_byte_zh": {"score": 1.25, "stderr": None, "n": 1},
    }
    stage(run, "sft", {"steps": 1}, exams)
    text = card(run / "sft")
    assert "| logic | 100.0 % | 1 |" in text and "| bits per byte zh | 1.250 | 1 |" in text


def test_a_parent_made_again_says_nothing(run: Path) -> None:
    (run / "pretrain" / "config.json").write_text('{"model_type": "llama"}')
    link = next(link for link in ancestry(run / "sft") if link.directory.name == "pretrain")
    assert link.changed and not link.lineage
    text = card(run / "sft")
    assert "`pretrain`, from which it was made, is gone or has been made again" in text
    assert "| pretrain | 100" not in text


def test_an_imported_base(tmp_path: Path) -> None:
    general = {"license": "apache-2.0", "languages": ["en"]}
    made = {"general": general, "config": {"stage": "import", "source": "owner/base"}}
    base = stage(tmp_path, "import", made)
    parents = {str(base): content_of(base)}
    text = card(stage(tmp_path, "dpo", {"steps": 3, "parents": parents}))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "owner/base"
    assert "It was made from owner/base." in text and "## Licence\n\napache-2.0\n" in text
    assert yaml.safe_load(card(base, "mit").split("---\n")[1])["license"] == "mit"


def test_no_folder_of_the_maker_is_told(tmp_path: Path) -> None:
    source = {"stage": "import", "source": "/home/somebody/secret/ferry.gguf"}
    text = card(stage(tmp_path, "import", {"config": source, "tensor_types": {"Q4_1": 2}}))
    assert "secret" not in text and "source: ferry.gguf" in text
    assert "It was made from ferry.gguf." in text and "dequantised (2 x Q4_1)" in text


def test_an_adapter_on_a_directory_of_the_makers(tmp_path: Path) -> None:
    """The directory's name is told, or what was imported there; never the folders before it."""
    base = stage(tmp_path / "secret", "base", {})
    directory = stage(tmp_path, "adapter", {"parents": {str(base): content_of(base)}})
    (directory / "config.json").unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    text = card(directory)
    assert "It was made from base." in text and "secret" not in text
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    source = {"stage": "import", "config": {"source": "owner/base"}}
    stage(tmp_path / "secret", "base", source)
    text = card(directory)
    assert "It was made from owner/base." in text
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/base"


def test_an_adapter(tmp_path: Path) -> None:
    directory = stage(tmp_path, "adapter", {"steps": 3})
    (directory / "config.json").unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    text = card(directory)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "owner/base" and front["library_name"] == "peft"
    assert "Needs `peft`" in text and "vllm serve" not in text
    assert "`instar merge adapter --out adapter-merged`" in text
    assert "That of its base, owner/base." in text


@pytest.mark.parametrize(
    ("settings", "of_peft", "merges"),
    [
        ({"peft_type": "IA3"}, True, True),
        ({"peft_type": "PREFIX_TUNING"}, True, False),
        ({"peft_type": "PROMPT_TUNING"}, True, False),
        ({"instar_method": {"method": "bitfit"}}, False, True),
        ({"instar_method": {"method": "bottleneck"}}, False, False),
    ],
)
def test_what_an_adapter_can_be_used_with(
    tmp_path: Path, settings: dict[str, Any], of_peft: bool, merges: bool
) -> None:
    directory = stage(tmp_path, "sft", {"steps": 3})
    (directory / "config.json").unlink()
    settings = settings | {"base_model_name_or_path": "owner/base"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    text = card(directory)
    library = yaml.safe_load(text.split("---\n")[1])["library_name"]
    assert library == ("peft" if of_peft else "instar")
    assert ("Needs `peft`" in text) == ("AutoModelForCausalLM" in text) == of_peft
    assert ("`instar chat sft`" in text) == (not of_peft)
    assert ("`instar merge sft --out sft-merged`" in text) == merges
    assert ("cannot be merged" in text) == (not merges)


@pytest.mark.parametrize("method", get_args(get_args(Method)[0]))
def test_a_card_knows_what_can_be_merged(method: type[AdapterConfig]) -> None:
    model = CausalLM(SMALL)
    initialize(model, SMALL, torch.Generator().manual_seed(0))
    add(model, method())  # type: ignore[call-arg]
    record = described(model.adapters[DEFAULT])
    if record.get("peft_type", record.get(OWN, {}).get("method")) in UNMERGED:
        with pytest.raises(UserError, match="cannot be merged"):
            merge(model)
    else:
        merge(model)


def test_nothing_is_known(tmp_path: Path) -> None:
    directory = tmp_path / "found"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    text = card(directory)
    assert "how it was made is not recorded" in text and "has taken no exam" in text
    with pytest.raises(UserError, match="is not a checkpoint"):
        card(tmp_path)


def test_somebodys_readme_stays(run: Path) -> None:
    path = run / "sft" / "README.md"
    write_card(run / "sft", path)
    write_card(run / "sft", path, "mit")
    assert "license: mit" in path.read_text(encoding="utf-8")
    path.write_text("# Mine\n")
    with pytest.raises(UserError, match="has not written it"):
        write_card(run / "sft", path)


def test_front_matter(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert front_matter(path) == {}
    for text in ("# Title\n", "---\nnot closed", "---\na: [\n---\n", "---\n- list\n---\n"):
        path.write_text(text)
        assert front_matter(path) == {}
    path.write_text("---\nlicense: mit\n---\n# Title\n\n---\n")
    assert front_matter(path) == {"license": "mit"}


def test_hub_ids(tmp_path: Path) -> None:
    assert is_hub_id("Qwen/Qwen3-0.6B")
    for other in ("model.gguf", "a/b.gguf", "/tmp/x", "./x", "../x", "a/b/c", str(tmp_path)):
        assert not is_hub_id(other)
