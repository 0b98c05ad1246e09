from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instar.data.readers import place_of, read_all, read_records, write_jsonl
from instar.errors import UserError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5))
def test_what_is_written_is_read(tmp_path: Path, records: list[dict[str, object]]) -> None:
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, records) == len(records)
    assert list(read_records(path)) == records


def test_text_stays_readable(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "春眠\n不觉晓"}])
    assert "春眠\\n不觉晓" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2 is not JSON.*Mend or remove"),
        ('{"text": "a"}\n{"text": "春"}'.encode("gb18030"), r"line 2 is not UTF-8.*iconv"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', r"a\.jsonl, line 3 has no `text`.*needs: text"),
        (b'{"text": "a"}\n["text"]\n', r"a\.jsonl, line 2 is not a JSON object"),
        (b'"text"\n', r"a\.jsonl, line 1 is not a JSON object"),
        (b'{"text": null}\n', r"a\.jsonl, line 1: `text` is None.*Make it a str"),
        (b'{"text": 5}\n', r"a\.jsonl, line 1: `text` is 5"),
        (b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"a\.jsonl, line 2 is not Unicode.*Mend"),
        (b'{"text": "a", "more": [{"\\uDE00": 1}]}\n', r"a\.jsonl, line 1 is not Unicode"),
        (b'{"text": ""}\n{"text": " "}\n', r"no text in .*a\.jsonl: every `text` is empty"),
    ],
)
def test_mistakes_are_named_by_file_and_line(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_all([path], ("text",))


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}')
    assert read_all([path], ("text",)) == [{"text": "\U0001f600"}]


def test_records_know_their_file_and_line(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"text": "a"}\n')
    two.write_text('\n{"text": "b"}\n')
    places = [place_of(record, "?") for record in read_all([one, two], ("text",))]
    assert places == [f"{one}, line 1", f"{two}, line 2"]
    assert place_of({"text": "a"}, "record 3") == "record 3"


def test_messages_must_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": "hello"}')
    with pytest.raises(UserError, match="line 1: `messages` is 'hello'"):
        read_all([path], ("messages",))


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*none\.jsonl.*Check the path"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="is a directory"):
        list(read_records(tmp_path))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_data_at_all(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"no data in .*a\.jsonl"):
        read_all([path], ("text",))
    with pytest.raises(UserError, match="no data"):
        read_all([], ("text",))


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [record["text"] for record in read_all([path], ("text",))] == ["a", "b"]
