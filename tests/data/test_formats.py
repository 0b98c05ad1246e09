from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from instar import data_verbs
from instar.data.formats import KEYS, Kind, convert, recognise
from instar.data.packing import check_place
from instar.data.readers import read_all, read_records
from instar.errors import UserError
from instar.tokenizer.hf import save_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from lines such as ``user: hello``."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


ASKED, TALK = said("user: Q"), said("user: Q", "assistant: A")
PAIR = {"messages": ASKED, "chosen": "A", "rejected": "B"}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}

CASES: dict[str, tuple[str, Kind, dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        "Alpaca",
        "conversation",
        {"instruction": "Q", "input": "", "output": "A"},
        {"messages": TALK},
    ),
    "alpaca with everything": (
        "Alpaca",
        "conversation",
        {
            "instruction": "Add.",
            "input": "1, 2",
            "output": "3",
            "system": "S",
            "history": [["a", "b"]],
        },
        {
            "messages": said(
                "system: S", "user: a", "assistant: b", "user: Add.\n1, 2", "assistant: 3"
            )
        },
    ),
    "alpaca pair": (
        "Alpaca pairs",
        "pair",
        {"instruction": "Q", "output": "A", "chosen": "A", "rejected": "B", "group": "g"},
        PAIR | {"group": "g"},
    ),
    "sharegpt": ("ShareGPT", "conversation", {"conversations": [HUMAN, GPT]}, {"messages": TALK}),
    "sharegpt with a system": (
        "ShareGPT",
        "conversation",
        {"conversations": [HUMAN, GPT], "system": "S"},
        {"messages": [*said("system: S"), *TALK]},
    ),
    "sharegpt pair": (
        "ShareGPT pairs",
        "pair",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
        PAIR,
    ),
    "parts": (
        "OpenAI messages",
        "conversation",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TALK[1]]},
        {"messages": TALK},
    ),
    "strings": (
        "prompt, chosen, rejected",
        "pair",
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        PAIR,
    ),
    "conversational": (
        "prompt, chosen, rejected",
        "pair",
        {"prompt": ASKED, "chosen": said("assistant: A"), "rejected": said("assistant: B")},
        PAIR,
    ),
    "implicit prompt": (
        "chosen and rejected dialogues",
        "pair",
        {"chosen": TALK, "rejected": said("user: Q", "assistant: B")},
        PAIR,
    ),
    "kto": (
        "KTO",
        "label",
        {"prompt": "Q", "completion": "A", "label": 1},
        {"messages": ASKED, "reply": "A", "label": True},
    ),
    "completion": (
        "prompt and completion",
        "conversation",
        {"prompt": "Q", "completion": "A"},
        {"messages": TALK},
    ),
    "gsm8k as a task": (
        "GSM8K",
        "task",
        {"question": "Q", "answer": "1 + 1 = 2\n#### 1,200"},
        {"messages": ASKED, "verifier": "integer", "answer": "1200"},
    ),
    "gsm8k as a conversation": (
        "GSM8K",
        "conversation",
        {"question": "Q", "answer": "1 + 1 = 2\n#### 2"},
        {"messages": said("user: Q", "assistant: 1 + 1 = 2\n#### 2")},
    ),
    "an answer in words": (
        "problems",
        "task",
        {"problem": "Q", "answer": "Paris"},
        {"messages": ASKED, "verifier": "answer", "answer": "Paris"},
    ),
    "dapo": (
        "DAPO",
        "task",
        {
            "prompt": ASKED,
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "ability": "MATH",
        },
        {"ability": "MATH", "messages": ASKED, "verifier": "integer", "answer": "34"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_formats_become_ours(case: str) -> None:
    name, kind, record, expected = CASES[case]
    found = recognise(record)
    assert found is not None and found.name == name
    assert convert(record, kind) == expected
    assert expected.keys() >= set(KEYS[kind])


def test_a_bad_reply_is_nothing_to_imitate() -> None:
    assert convert({"prompt": "Q", "completion": "A", "label": False}, "conversation") is None


def test_tools_become_text() -> None:
    weather = {"type": "function", "function": {"name": "weather"}}
    call = {"function": {"name": "weather", "arguments": '{"city": "杭州"}'}}
    record = {
        "tools": [weather],
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "12 mm"},
            {"role": "tool", "content": "8 °C"},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    made = convert(record, "conversation")
    assert made is not None
    messages = made["messages"]
    check_place(messages, "here", needs_reply=True)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert json.dumps(weather) in messages[0]["content"]
    assert messages[0]["content"].endswith("Be kind.")
    called = messages[2]["content"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(called) == {"name": "weather", "arguments": {"city": "杭州"}}
    results = messages[3]["content"]
    assert results.count("<tool_response>") == 2 and "12 mm" in results and "8 °C" in results


@pytest.mark.parametrize(
    ("record", "kind", "told"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "conversation",
            "'narrator'.*gpt",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "conversation", "turn 0 says None"),
        ({"conversations": "hello"}, "conversation", "'hello'.*list of turns"),
        ({"prompt": "Q", "reward_model": {}}, "task", "DAPO.*ground_truth"),
        (
            {"chosen": TALK, "rejected": said("user: R", "assistant: B")},
            "pair",
            "before their last",
        ),
    ],
)
def test_what_does_not_fit_is_named(record: dict[str, Any], kind: Kind, told: str) -> None:
    with pytest.raises(UserError, match=told):
        convert(record, kind)


def write(path: Path, text: str) -> Path:
    packed = gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    path.write_bytes(packed)
    return path


def test_a_list_is_read_as_lines_are(tmp_path: Path) -> None:
    records = [CASES["alpaca"][2], CASES["alpaca with everything"][2]]
    lines = "\n".join(json.dumps(record) for record in records)
    files = [
        write(tmp_path / "a.json", json.dumps(records, indent=2)),
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.json.gz", json.dumps(records)),
        write(tmp_path / "a.jsonl.gz", lines),
    ]
    for file in files:
        found = read_all([file], ("messages",))
        assert [record["messages"] for record in found] == [
            CASES["alpaca"][3]["messages"],
            CASES["alpaca with everything"][3]["messages"],
        ]
    assert [r.place for r in read_records(files[0])] == [
        f"{files[0]}, line 2",
        f"{files[0]}, line 7",
    ]
    assert list(read_records(write(tmp_path / "empty.json", "[]"))) == []


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '[\n{"text": "a"},\n{"text": }]', r"a\.json, line 3 is not JSON.*line 3"),
        ("a.json", '[\n{"text": "a"},\n', r"a\.json ends before its list does"),
        ("a.json", '{"text": "a"}', r"a\.json is not a JSON list.*\.jsonl"),
        ("a.json", '[{"text": "a"},\n\n 5]', r"a\.json, line 3 is not a JSON object"),
        ("a.jsonl", '{"question": "Q", "answer": "A"}', r"line 1 has no `text`.*looks like GSM8K"),
    ],
)
def test_the_first_mistake_is_named_by_its_line(
    name: str, content: str, told: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=told):
        list(read_records(path, ("text",)))


def test_a_packed_file_that_was_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", '{"text": "a"}\n' * 2000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged"):
        list(read_records(path, ("text",)))


def test_inspect_shows_what_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path / "tokenizer", [], 96)
    path = write(tmp_path / "a.json", json.dumps([CASES["alpaca"][2]] * 3))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert data_verbs.main(["inspect", str(path), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    told = capsys.readouterr().out
    assert "Alpaca" in told and "user 3, assistant 3" in told
    # "A" and <|im_end|> are learnt; the opening is not.
    green = "\x1b[1;30;42m", "\x1b[30;42m"
    assert sum(told.count(style) for style in green) == 2 * 2
    monkeypatch.setattr("instar.hub._fetched", {"owner/model": tmp_path / "tokenizer"}.__getitem__)
    assert data_verbs.main(["inspect", str(path), "--tokenizer", "owner/model"]) == 0
    assert capsys.readouterr().out == told, "a name on the hub will do"
    path = write(tmp_path / "b.jsonl", '{"nobody": "knows"}\n')
    with pytest.raises(UserError, match=r"columns nobody, which no known format"):
        data_verbs.main(["inspect", str(path)])


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("chat/alpaca_zh_demo.json", "conversation", 1000),
        ("chat/identity.json", "conversation", 91),
        ("chat/instruction_en.json", "conversation", 1100),
        ("chat/preference_en.json", "pair", 1100),
        ("chat/dpo_zh_demo.json", "pair", 300),
        ("gsm8k/train.jsonl", "task", 7473),
        ("c4_demo.jsonl", "document", 300),
    ],
)
def test_real_files(name: str, kind: Kind, count: int) -> None:
    records = read_all([SHARED / name], KEYS[kind])
    assert len(records) == count
    for record in records:
        if kind != "document":
            check_place(record["messages"], record.place, needs_reply=kind == "conversation")
