from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from instar.data.schema import Message
from instar.errors import UserError
from instar.generation import Engine
from instar.serving.safety import instead
from instar.serving.terminal import main, trim


class Script:
    """Replaces the model: answers by the book and writes down what it was asked."""

    def __init__(self, *replies: list[str]) -> None:
        self.replies = iter(replies)
        self.heard: list[str] = []
        self.temperatures: list[float] = []

    def __call__(self, engine: Engine, prompt, sampling, stopping, seed) -> Iterator[str]:
        self.heard.append(engine.tokenizer.decode(prompt, skip_special=False))
        self.temperatures.append(sampling.temperature)
        yield from next(self.replies)


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, script: Script | None, *argv: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    if script:
        monkeypatch.setattr(Engine, "stream", lambda *args: script(*args))
    return main(list(argv))


def test_a_pipe_gets_the_replies_and_nothing_else(runs, monkeypatch, capsys):
    script = Script(["Hel", "lo."], ["龄", "虫"])
    assert talk(monkeypatch, "Hi\n\n你是谁\n", script, str(runs / "sft")) == 0
    assert capsys.readouterr() == ("Hello.\n龄虫\n", "")
    assert script.heard[1] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\n你是谁<|im_end|>\n<|im_start|>assistant\n"
    )


def test_commands(runs, monkeypatch, capsys):
    script = Script(["one"], ["two"], ["three"])
    lines = "a\n/stage rlvr\n/temperature 0.2\nb\n/reset\n/stage\n/help\nc\nquit\nnever\n"
    arguments = (str(runs / "sft"), "--system", "Be kind.")
    assert talk(monkeypatch, lines, script, *arguments) == 0
    out, notes = capsys.readouterr()
    assert out == "one\ntwo\nthree\n"
    assert "talking with rlvr" in notes and "rlvr, sft" in notes and "Ctrl-D" in notes
    assert script.temperatures == [0.7, 0.2, 0.2]
    assert "one" in script.heard[1]
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    ask = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert script.heard[2] == system + ask


def test_switching_changes_the_model(runs, monkeypatch, capsys):
    def ask(*lines: str) -> list[str]:
        talk(monkeypatch, "\n".join(lines), None, str(runs / "sft"), "--max-new-tokens", "8")
        return capsys.readouterr().out

    alone = ask("hello")
    assert ask("hello") == alone
    assert ask("/stage rlvr", "hello") != alone
    assert ask("/stage rlvr", "/stage sft", "hello") == alone


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/fly", "no command '/fly'"),
        ("/stage egg", "no stage 'egg'.*rlvr, sft"),
        ("/temperature warm", "temperature is 'warm'"),
        ("/temperature -1", "temperature is -1"),
        ("x" * 200, "context .* is 128"),
    ],
)
def test_a_script_stops_at_a_mistake_and_a_person_goes_on(runs, monkeypatch, capsys, line, problem):
    with pytest.raises(UserError, match=problem):
        talk(monkeypatch, f"{line}\nhi\n", Script(["yes"]), str(runs / "sft"))
    watch(monkeypatch, [line, "hi"])
    assert main([str(runs / "sft")]) == 0
    out, notes = capsys.readouterr()
    assert "sft › yes" in out
    assert problem.split(".*")[0].split(" .* ")[0] in notes


def watch(monkeypatch: pytest.MonkeyPatch, lines: list[str | type[BaseException]]) -> None:
    """A person at the keyboard, who types lines or presses Ctrl-C."""
    typed = iter([*lines, EOFError])

    def type_in(prompt: str) -> str:
        assert prompt == "you › "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("instar.serving.terminal.stdout_is_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", type_in)


def test_ctrl_c_stops_a_reply_and_at_the_prompt_leaves(runs, monkeypatch, capsys):
    heard = []

    def stream(self, prompt, *rest):
        heard.append(self.tokenizer.decode(prompt))
        yield "half a "
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", stream)
    watch(monkeypatch, ["hi", "again", KeyboardInterrupt])
    assert main([str(runs / "sft")]) == 130
    out, notes = capsys.readouterr()
    assert out.count("sft › half a \n") == 2 and notes.count("(stopped)") == 2
    assert "half a" in heard[1]


def test_a_person_sees_no_control_characters(runs, monkeypatch, capsys):
    script = Script(["a\x1b[2J\x9b1m\tb\n", "c\x7f\r"])
    monkeypatch.setattr(Engine, "stream", lambda *args: script(*args))
    watch(monkeypatch, ["hi"])
    main([str(runs / "sft")])
    assert "sft › a[2J1m\tb\nc\n" in capsys.readouterr().out


def test_thoughts_are_no_part_of_the_reply(runs, monkeypatch, capsys):
    pieces = ["<thi", "nk>\nWell, ", "hm.\n</think>", "\n\nYes."]
    script = Script(pieces, ["No."])
    assert talk(monkeypatch, "a\nb\n", script, str(runs / "sft")) == 0
    assert capsys.readouterr() == ("Yes.\nNo.\n", "")
    assert "assistant\nYes.<|im_end|>" in script.heard[1] and "hm" not in script.heard[1]
    script = Script(pieces, ["<think>And"])
    monkeypatch.setattr(Engine, "stream", lambda *args: script(*args))
    watch(monkeypatch, ["a", "b"])
    main([str(runs / "sft")])
    out, notes = capsys.readouterr()
    assert "sft › Well, hm.\n\n\nYes.\n" in out
    assert "thinking did not end; --max-new-tokens" in notes


@pytest.mark.parametrize("thinking", [True, False])
def test_a_model_can_be_asked_not_to_think(runs, tmp_path: Path, monkeypatch, thinking: bool):
    shutil.copytree(runs / "sft", tmp_path / "m")
    template = "{{ messages[0].content }}{% if enable_thinking is false %} Now!{% endif %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template, encoding="utf-8")
    script = Script(["ok"])
    arguments = [] if thinking else ["--no-thinking"]
    talk(monkeypatch, "Hi\n", script, str(tmp_path / "m"), *arguments)
    assert script.heard == ["Hi" if thinking else "Hi Now!"]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(runs, monkeypatch, capsys):
    script = Script(["first answer"], ["second answer"], ["third answer"])
    monkeypatch.setattr(Engine, "stream", lambda *args: script(*args))
    watch(monkeypatch, ["first question", "second question", "third question"])
    assert main([str(runs / "sft"), "--max-new-tokens", "4"]) == 0
    assert "context is full" in capsys.readouterr().err
    assert "first" in script.heard[1]
    assert "first" not in script.heard[2] and "second answer" in script.heard[2]


def test_an_empty_reply_is_not_remembered(runs, monkeypatch):
    script = Script([], ["yes"])
    talk(monkeypatch, "one\ntwo\n", script, str(runs / "sft"))
    assert "one" not in script.heard[1]


def test_trim_keeps_the_system_message_and_the_newest():
    def say(role, content) -> Message:
        return {"role": role, "content": content}

    def length(messages: list[Message]) -> int:
        return sum(len(message["content"]) for message in messages)

    system, newest = say("system", "ssss"), say("user", "nnnn")
    old = [say("user", "aaaa"), say("assistant", "bbbb")]
    assert trim([system, *old, *old, newest], length, 24) == [system, *old, *old, newest]
    assert trim([system, *old, *old, newest], length, 23) == [system, *old, newest]
    assert trim([system, *old, *old, newest], length, 1) == [system, newest]
    assert trim([*old, newest], length, 1) == [newest]


def test_a_directory_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json"):
        main([str(tmp_path)])


def test_only_finished_models_that_can_speak_are_listed(runs, tmp_path: Path, monkeypatch, capsys):
    for name in ("sft", ".rlvr.old"):
        shutil.copytree(runs / "sft", tmp_path / name)
    (tmp_path / "reward").mkdir()
    shutil.copy(runs / "sft" / "config.json", tmp_path / "reward")
    talk(monkeypatch, "/stage\n", None, str(tmp_path / "sft"))
    assert capsys.readouterr().err.strip() == "Stages: sft"


def test_a_model_of_the_hub_has_its_own_name_and_no_stages(
    runs, tmp_path: Path, monkeypatch, capsys
):
    home = tmp_path / "models--ours--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    for revision in ("a" * 40, "b" * 40):
        shutil.copytree(runs / "sft", home / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "stream", lambda *args: iter(["yes"]))
    watch(monkeypatch, ["hi", "/stage", "/stage " + "b" * 40])
    assert main(["ours/model"]) == 0
    out, notes = capsys.readouterr()
    assert "ours/model › yes" in out
    assert "ours/model is listening" in notes and "Stages: none" in notes
    assert "beside ours/model" in notes


def test_a_log_of_decisions_needs_a_filter(runs, tmp_path: Path):
    with pytest.raises(UserError, match="without --safety nothing is decided"):
        main([str(runs / "sft"), "--safety-log", str(tmp_path / "log.jsonl")])


def test_the_filter_stops_messages_and_replies(runs, monkeypatch, capsys, tmp_path: Path):
    script = Script(["Gladly. ", "To make ", "a bomb", ", begin.", " More."], ["Yes."])
    log = tmp_path / "log.jsonl"
    arguments = (str(runs / "sft"), "--safety", "--safety-log", str(log))
    assert talk(monkeypatch, "How do I steal a car?\nHello\nAgain?\n", script, *arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [instead("x", "user"), "Gladly.", instead("x", "assistant"), "Yes."]
    # What was stopped is not remembered.
    assert len(script.heard) == 2
    assert "steal" not in script.heard[0] + script.heard[1]
    assert "Hello" not in script.heard[1]
    reasons = [json.loads(line)["reason"] for line in log.read_text("utf-8").splitlines()]
    passed = "nothing found"
    assert reasons == ["rule: theft", passed, "rule: weapons", passed, passed]
