from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from instar.errors import UserError
from instar.generation import Engine, Sampling, Stopping
from instar.generation.reply import Completion
from instar.serving.generate import main
from instar.tokenizer.bpe import SPECIAL_TOKENS
from instar.tokenizer.hf import save_tokenizer


def test_one_sample_is_the_text_itself(runs: Path, capsys: pytest.CaptureFixture[str]):
    argv = [str(runs / "sft"), "--prompt", "Once", "--max-new-tokens", "9", "--seed", "3"]
    assert main([*argv, "--temperature", "1"]) == 0
    engine = Engine.load(runs / "sft")
    stopping = Stopping(frozenset({SPECIAL_TOKENS.index("<eos>")}), max_new_tokens=9)
    prompt = [engine.tokenizer.bos_id, *engine.tokenizer.encode("Once")]
    [expected] = engine.generate([prompt], Sampling(), stopping, seed=3)
    assert capsys.readouterr().out == expected.text + "\n"


@pytest.fixture
def foreign(runs: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer is like GPT-2's: no beginning, one end, no chat template."""
    directory = tmp_path / "foreign"
    shutil.copytree(runs / "sft", directory)
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).unlink()
    path = directory / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for old, new in [("<eos>", "<|endoftext|>"), ("<|im_start|>", "<a>"), ("<|im_end|>", "<b>")]:
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("extra", "heard"),
    [
        (["--prompt", "Once"], "Once"),
        (["--prompt", ""], "<|endoftext|>"),
        (["--prompt", "Hi", "--chat"], "User:\nHi<|endoftext|>\nAssistant:\n"),
    ],
)
def test_a_tokenizer_without_a_beginning_or_a_chat_format(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], heard: str
):
    def stream(self, prompt, sampling, stopping, seed):
        yield self.tokenizer.decode(prompt, skip_special=False)
        assert stopping.token_ids == {self.tokenizer.eos_id}

    monkeypatch.setattr(Engine, "stream", stream)
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *a, **_: said.extend(a))
    assert main([str(foreign), *extra]) == 0
    assert said == [heard]


def test_several_samples_are_numbered(runs: Path, capsys: pytest.CaptureFixture[str]):
    argv = [str(runs / "sft"), "--prompt", "Once", "--max-new-tokens", "5", "--samples", "3"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"--- {n} of 3 (" in out for n in (1, 2, 3))


@pytest.mark.parametrize("samples", ["1", "2"])
@pytest.mark.parametrize("person", [True, False])
def test_a_person_sees_no_control_characters(
    runs: Path, monkeypatch, capsys, person: bool, samples: str
):
    wild = "a\x1b[2J\x9b1m\tb\n\x7f\r"
    told = [Completion([], [], "stop", wild)] * 2
    monkeypatch.setattr(Engine, "stream", lambda *_: iter([wild]))
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: told)
    monkeypatch.setattr("instar.serving.generate.stdout_is_terminal", lambda: person)
    assert main([str(runs / "sft"), "--prompt", "Once", "--samples", samples]) == 0
    out = capsys.readouterr().out
    assert ("a[2J1m\tb\n\n" in out) == person
    assert (wild in out) == (not person)


def test_chat_renders_the_prompt_as_a_message(runs: Path, monkeypatch, capsys):
    heard = []

    def stream(self, prompt, sampling, stopping, seed):
        heard.append((self.tokenizer.decode(prompt, skip_special=False), stopping))
        yield "Hi."

    monkeypatch.setattr(Engine, "stream", stream)
    argv = [str(runs / "sft"), "--prompt", "Hello", "--chat", "--stop", "\n", "--stop", "end"]
    assert main(argv) == 0
    assert capsys.readouterr().out == "Hi.\n"
    [(prompt, stopping)] = heard
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert stopping.strings == ("\n", "end")
    assert stopping.token_ids == {SPECIAL_TOKENS.index(s) for s in ("<eos>", "<|im_end|>")}


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--samples", "0"], "samples is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--stop", ""], "stop string is empty"),
        (["--prompt", "x" * 200], "prompt 0 has 201 tokens.* 128"),
    ],
)
def test_mistakes_are_explained(runs: Path, extra: list[str], problem: str):
    prompt = [] if "--prompt" in extra else ["--prompt", "x"]
    with pytest.raises(UserError, match=problem):
        main([str(runs / "sft"), *prompt, *extra])


def test_a_prompt_that_is_no_message_is_refused_before_a_model_is_opened(
    runs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Engine, "load", None)
    with pytest.raises(UserError, match=r"--no-thinking is for chats.*Add --chat"):
        main([str(runs / "sft"), "--prompt", "x", "--no-thinking"])


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(runs: Path, tmp_path: Path):
    directory = tmp_path / "mixed"
    shutil.copytree(runs / "sft", directory)
    save_tokenizer(directory, [(b"a", b"b")], 128)
    with pytest.raises(UserError, match=r"tokenizer has 263 tokens.* 262"):
        main([str(directory), "--prompt", "x"])


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "instar generate" in out and "For example" in out and "--repetition-penalty" in out
