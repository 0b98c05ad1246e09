"""``instar export``: for llama.cpp, Ollama, transformers, and people."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instar.cli import main
from instar.exchange.chat_template import ChatML, plain_jinja, recognised
from instar.exchange.gguf_read import GGUFFile
from instar.exchange.importing import import_model
from instar.tokenizer.chat import CHAT_TEMPLATE
from instar.training.display import Display

Make = Callable[[str], Path]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["instar", "export", *map(str, arguments)])
        return main()

    return run


def test_gguf_beside_the_checkpoint(
    checkpoint: Make, tmp_path: Path, export: Callable[..., int]
) -> None:
    directory = tmp_path / "ferry"
    shutil.copytree(checkpoint("qwen3"), directory)
    assert export(directory, "--to", "gguf", "--license", "mit") == 0
    file = GGUFFile(tmp_path / "ferry-f16.gguf")
    assert file.metadata["general.name"] == "ferry"
    assert file.metadata["general.license"] == "mit"
    assert file.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    assert file.metadata["tokenizer.ggml.eos_token_id"] == 5
    assert file.metadata["tokenizer.ggml.token_type"][:7] == [3, 3, 3, 3, 3, 3, 1]
    assert export(directory, "--to", "gguf", "--type", "q8_0", "--out", tmp_path / "x.gguf") == 0
    assert file.matrix_type() == "F16" and GGUFFile(tmp_path / "x.gguf").matrix_type() == "Q8_0"


def test_what_the_base_said_is_passed_on(
    checkpoint: Make, tmp_path: Path, export: Callable[..., int]
) -> None:
    source = tmp_path / "theirs"
    shutil.copytree(checkpoint("qwen3"), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\n---\n")
    with Display() as display:
        import_model(str(source), tmp_path / "mine", "keep", display)
    assert export(tmp_path / "mine", "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.languages"] == ["en", "zh"]


def test_ollama(checkpoint: Make, tmp_path: Path, export: Callable[..., int]) -> None:
    out = tmp_path / "ollama"
    assert export(checkpoint("qwen3"), "--to", "ollama", "--out", out) == 0
    assert (out / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|im_start|>"\n'
        "PARAMETER num_ctx 256\n"
    )
    assert GGUFFile(out / "model.gguf").arch == "qwen3"
    assert export(checkpoint("llama"), "--to", "ollama", "--out", out) == 0
    assert GGUFFile(out / "model.gguf").arch == "llama", "its own is replaced"


def test_ollama_is_told_the_context_and_the_end(
    checkpoint: Make, tmp_path: Path, export: Callable[..., int]
) -> None:
    directory = tmp_path / "windowed"
    shutil.copytree(checkpoint("mistral"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    named = {"eos_token": {"content": "<eos>"}}
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    assert export(directory, "--to", "ollama", "--out", tmp_path / "out") == 0
    file = GGUFFile(tmp_path / "out" / "model.gguf")
    assert file.metadata["llama.context_length"] == 64
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert said.endswith('PARAMETER stop "<eos>"\nPARAMETER num_ctx 64\n')


@pytest.mark.parametrize("kind", [None, "bf16"])
@torch.no_grad()
def test_safetensors(
    kind: str | None, checkpoint: Make, tmp_path: Path, export: Callable[..., int]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path / "run"
    shutil.copytree(checkpoint("qwen3"), directory)
    (directory / "metrics.jsonl").write_text("{}\n")
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # its name before transformers 5
    (directory / "config.json").write_text(json.dumps(config))
    options = ("--type", kind) if kind else ()
    assert export(directory, "--to", "safetensors", "--out", tmp_path / "hf", *options) == 0
    dtype = torch.bfloat16 if kind else torch.float32
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == dtype
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [said[name] for name in ("dtype", "torch_dtype") if name in said] == [
        "bfloat16" if kind else "float32"
    ]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
    assert (tmp_path / "hf" / "README.md").is_file()
    assert not (tmp_path / "hf" / "metrics.jsonl").exists()


def test_mistakes(
    checkpoint: Make, tmp_path: Path, export: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("diary.txt", "README.md", "Modelfile"):
        (mine / name).write_text("My own.\n")
    carded = tmp_path / "carded"
    shutil.copytree(checkpoint("qwen3"), carded)
    assert export(carded, "--to", "card") == 0
    (carded / "Modelfile").write_text("FROM ./model.gguf\n")
    unmarked = "exists and has no export.json"
    for arguments, told in [
        ((adapter, "--to", "gguf"), f"instar merge {adapter} --out {adapter}-merged"),
        ((mine, "--to", "gguf"), "is not a checkpoint"),
        ((checkpoint("qwen3"), "--to", "ollama", "--out", mine), unmarked),
        ((checkpoint("qwen3"), "--to", "safetensors", "--out", mine), unmarked),
        ((checkpoint("llama"), "--to", "ollama", "--out", carded), unmarked),
        ((checkpoint("llama"), "--to", "safetensors", "--out", carded), unmarked),
        ((carded, "--to", "safetensors", "--out", carded), "is what is to be exported"),
        ((checkpoint("qwen3"), "--to", "safetensors", "--type", "q8_0"), "f32, f16 or bf16"),
    ]:
        assert export(*arguments) == 2
        assert told in capsys.readouterr().err
    assert {path.read_text() for path in mine.iterdir()} == {"My own.\n"}


@pytest.mark.parametrize("target", ["ollama", "safetensors"])
def test_what_was_exported_may_be_exported_again(
    target: str, checkpoint: Make, tmp_path: Path, export: Callable[..., int]
) -> None:
    (tmp_path / "out").mkdir()  # an empty one is as good as none
    for _ in range(2):
        assert export(checkpoint("qwen3"), "--to", target, "--out", tmp_path / "out") == 0


def test_a_checkpoint_may_be_called_by_dots(
    checkpoint: Make, tmp_path: Path, export: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint("qwen3"), tmp_path / "ferry")
    (tmp_path / "ferry" / "within").mkdir()
    made = {"gguf": "ferry-f16.gguf", "ollama": "ferry-ollama", "safetensors": "ferry-hf"}
    for dots, place in ((".", "ferry"), ("..", "ferry/within")):
        monkeypatch.chdir(tmp_path / place)
        for target, name in made.items():
            assert export(dots, "--to", target) == 0
            assert (tmp_path / name).exists()
        shutil.rmtree(tmp_path / "ferry-hf")
        shutil.rmtree(tmp_path / "ferry-ollama")
        (tmp_path / "ferry-f16.gguf").unlink()


def test_generation_marks_vanish() -> None:
    plain = plain_jinja(CHAT_TEMPLATE)
    assert "generation %}" not in plain and "generation -%}" not in plain
    assert recognised(CHAT_TEMPLATE, {}) == ChatML()


def test_templates_are_known_by_what_they_write() -> None:
    loop = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    default = (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    )
    assert recognised(loop, {}) == ChatML()
    assert recognised(default + loop, {}) == ChatML("Be kind.")
    assert recognised(loop.replace("im_start", "start"), {}) is None
    assert recognised("{{ bos_token }}" + loop, {"bos_token": "<bos>"}) is None
    assert recognised("{{ raise_exception('no system role') }}", {}) is None
    assert recognised("{% broken", {}) is None
