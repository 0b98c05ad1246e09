from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from instar.data.readers import read_records
from instar.errors import UserError
from instar.generation import Engine
from instar.serving.batch import ids_of
from instar.serving.generate import Options, main

PROMPTS = [{"prompt": f"Tale {i} of {'many' * (i % 5)}", "id": f"t{i}"} for i in range(23)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def command(runs: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--max-new-tokens", "6", "--batch-size", "2", "--temperature", "1"]
    return [str(runs / "sft"), "--input", str(prompts), "--output", str(output), *fixed, *more]


def test_answers_are_those_of_single_prompts_in_order_with_their_fields(
    runs: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "made" / "answers.jsonl"
    assert main(command(runs, prompts, output)) == 0
    answers = read(output)
    assert [{"prompt": a["prompt"], "id": a["id"]} for a in answers] == PROMPTS
    assert all(answer["finish"] in ("stop", "length") for answer in answers)
    capsys.readouterr()
    single = [str(runs / "sft"), "--prompt", PROMPTS[0]["prompt"], "--max-new-tokens", "6"]
    assert main([*single, "--temperature", "1"]) == 0
    assert capsys.readouterr().out == answers[0]["reply"] + "\n"


@pytest.mark.parametrize("samples", ["1", "3"])
@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.93, 1.0])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    runs: Path, prompts: Path, tmp_path: Path, share: float, samples: str
):
    output = tmp_path / "answers.jsonl"
    argv = command(runs, prompts, output, "--samples", samples)
    assert main(argv) == 0
    whole = output.read_bytes()
    assert len(read(output)) == 23 * int(samples)
    output.write_bytes(whole[: int(share * len(whole))])  # in the middle of a line, mostly
    assert main(argv) == 0
    assert output.read_bytes() == whole


def test_what_is_finished_is_not_asked_again(
    runs: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    generate = Engine.generate

    def counted(self, prompts, *args, **kwargs):
        if len(asked) > 8:
            raise KeyboardInterrupt
        asked.extend(kwargs["numbers"])
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", counted)
    output = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        main(command(runs, prompts, output))
    assert len(read(output)) == len(asked) == 16
    before = len(asked)
    asked_before, asked[:] = list(asked), []
    assert main(command(runs, prompts, output)) == 0
    assert asked_before + asked == list(range(23))
    assert before == 16


def test_samples_are_numbered(runs: Path, prompts: Path, tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    assert main(command(runs, prompts, output, "--samples", "2")) == 0
    assert [(a["id"], a["sample"]) for a in read(output)][:4] == [
        ("t0", 0),
        ("t0", 1),
        ("t1", 0),
        ("t1", 1),
    ]


def test_conversations_are_rendered(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard: list[str] = []
    generate = Engine.generate

    def listening(self, prompts, sampling, stopping, **kwargs):
        heard.extend(self.tokenizer.decode(p, skip_special=False) for p in prompts)
        assert stopping.token_ids == self.tokenizer.turn_end_ids
        return generate(self, prompts, sampling, stopping, **kwargs)

    monkeypatch.setattr(Engine, "generate", listening)
    turns = [{"from": "human", "value": "Hi"}]
    file = write(tmp_path / "in.jsonl", [{"messages": turns, "tag": "中"}])
    assert main(command(runs, file, tmp_path / "out.jsonl")) == 0
    assert heard == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
    [answer] = read(tmp_path / "out.jsonl")
    assert answer["tag"] == "中"
    assert answer["messages"] == turns


def test_a_change_is_noticed(runs: Path, prompts: Path, tmp_path: Path):
    output = tmp_path / "answers.jsonl"
    assert main(command(runs, prompts, output)) == 0
    assert main(command(runs, prompts, output, "--batch-size", "5")) == 0
    with pytest.raises(UserError, match=r"begun with seed 0, not 4"):
        main(command(runs, prompts, output, "--seed", "4"))
    with pytest.raises(UserError, match="begun with another model"):
        main(["".join(str(runs / "rlvr")), *command(runs, prompts, output)[1:]])
    write(prompts, PROMPTS[:-1])
    with pytest.raises(UserError, match="begun with another input"):
        main(command(runs, prompts, output))
    write(prompts, PROMPTS)
    (tmp_path / "answers.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="says how it was made, does not"):
        main(command(runs, prompts, output))


def test_an_option_that_is_newer_than_the_answers_had_its_default(
    runs: Path, prompts: Path, tmp_path: Path
):
    output, beside = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.settings.json"
    argv = command(runs, prompts, output, "--chat")
    assert main(argv) == 0
    older = json.loads(beside.read_text(encoding="utf-8"))
    del older["thinking"], older["stop"]
    beside.write_text(json.dumps(older), encoding="utf-8")
    assert main(argv) == 0
    with pytest.raises(UserError, match=r"begun with thinking True, not False"):
        main([*argv, "--no-thinking"])


def test_only_chats_are_told_not_to_think(runs: Path, prompts: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"line 1: --no-thinking is for chats.*Add --chat"):
        main(command(runs, prompts, tmp_path / "a.jsonl", "--no-thinking"))
    assert not (tmp_path / "a.jsonl").exists()
    chats = write(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert main(command(runs, chats, tmp_path / "b.jsonl", "--no-thinking")) == 0


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": "x"}], r"line 1: there is no `prompt`"),
        ([{"prompt": "x"}, {"prompt": 3}], r"line 2: there is no `prompt`"),
        ([{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}], "line 2 has `mess"),
        ([{"messages": []}], "line 1: the conversation does not end with the user"),
        ([{"messages": [{"role": "ghost", "content": "x"}]}], "line 1: .*ghost"),
        ([{"prompt": "x", "reply": "y"}], "field 'reply'"),
        ([{"prompt": "x" * 200}], "line 1: the prompt has 201 tokens.* 128"),
        ([], "no data"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    runs: Path, tmp_path: Path, rows: list[dict[str, Any]], problem: str
):
    file, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=problem):
        main(command(runs, file, output))
    assert not output.exists()


@pytest.mark.parametrize(
    "argv",
    [[], ["--prompt", "x", "--input", "y"], ["--input", "y"], ["--prompt", "x", "--output", "y"]],
)
def test_a_prompt_or_a_file(runs: Path, argv: list[str]):
    with pytest.raises(UserError, match=r"--input"):
        main([str(runs / "sft"), *argv])


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_is_told_not_to_think(runs: Path, tmp_path: Path, thinking: bool):
    shutil.copytree(runs / "sft", tmp_path / "m")
    template = "{{ messages[0].content }}{% if enable_thinking is false %} Now!{% endif %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template, encoding="utf-8")
    asked = [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    rows = read_records(write(tmp_path / "asked.jsonl", asked), ())
    options = Options(directory=tmp_path / "m", chat=True, thinking=thinking)
    engine = Engine.load(options.directory)
    said = [engine.tokenizer.decode(ids_of(row, options, engine)) for row in rows]
    assert said == ["Hi" if thinking else "Hi Now!"] * 2
