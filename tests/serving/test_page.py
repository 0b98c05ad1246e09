"""What the page is made of, and its two endpoints; how it behaves is in ``page/``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from starlette.testclient import TestClient

from instar.data.pairs import preference_pairs
from instar.data.readers import read_all
from instar.serving.errors import handle_errors
from instar.serving.page import SCRIPTS, mount, page_html, report_of
from instar.tokenizer.hf import Tokenizer

VOTE = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ],
    "chosen": "I am instar.",
    "rejected": "Nobody.",
    "chosen_model": "dpo",
    "rejected_model": "sft",
    "sampling": {"temperature": 0.7, "max_tokens": 256},
}


def client_of(runs: dict[str, Path], votes: Path | None) -> TestClient:
    app = FastAPI()
    handle_errors(app)
    mount(app, runs, votes)
    return TestClient(app)


def test_votes_are_pairs_that_stages_read(runs: Path, tmp_path: Path):
    votes = tmp_path / "deep" / "votes.jsonl"
    client = client_of({}, votes)
    assert client.post("/votes", json=VOTE).json() == {"votes": 1}
    other = {"messages": VOTE["messages"][3:], "chosen": "a", "rejected": "b"}
    assert client.post("/votes", json=other).json() == {"votes": 2}
    pairs = read_all([votes], ("messages", "chosen", "rejected"))
    assert [pair["chosen"] for pair in pairs] == ["I am instar.", "a"]
    assert pairs[0].items() >= {**VOTE, "group": "votes"}.items()
    tokenizer = Tokenizer.load(runs / "sft")
    rows = preference_pairs(pairs, tokenizer, 256)
    learnt = [i for i, learn in zip(rows[0].chosen.ids, rows[0].chosen.learn, strict=True) if learn]
    assert tokenizer.decode(learnt) == "I am instar."


def test_half_a_vote_that_a_kill_left_spoils_nothing(tmp_path: Path):
    votes = tmp_path / "votes.jsonl"
    client_of({}, votes).post("/votes", json=VOTE)
    votes.write_bytes(votes.read_bytes() + b'{"messages": [{"role"')
    assert client_of({}, votes).post("/votes", json=VOTE).json() == {"votes": 2}
    assert len(read_all([votes], ("messages", "chosen", "rejected"))) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": "same", "rejected": " same "},
        {"chosen": ""},
        {"chosen": "a" * 100_001},
        {"rejected": "a" * 100_001},
        {"messages": []},
        {"messages": VOTE["messages"][:3]},
        {"messages": [VOTE["messages"][3]] * 2},
        {"messages": [{"role": "ghost", "content": "x"}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"sampling": {"temperature": "hot"}},
    ],
)
def test_what_is_no_preference_is_refused(tmp_path: Path, change: dict[str, Any]):
    votes = tmp_path / "votes.jsonl"
    answer = client_of({}, votes).post("/votes", json=VOTE | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert not votes.exists()


def test_other_pages_cannot_vote_without_asking(tmp_path: Path):
    # What a form of another site can send, the browser sends without a preflight.
    answer = client_of({}, tmp_path / "votes.jsonl").post(
        "/votes", content=json.dumps(VOTE), headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400
    assert not (tmp_path / "votes.jsonl").exists()


def test_without_a_file_no_votes_are_taken():
    client = client_of({}, None)
    assert client.post("/votes", json=VOTE).status_code in (404, 405)
    assert '"votes": false' in client.get("/").text


def test_a_report_lies_beside_its_models(tmp_path: Path):
    for name in ("life/sft", "life/dpo", "lone"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "life" / "report.html").write_text("<h1>生命</h1>", encoding="utf-8")
    runs = {"sft": tmp_path / "life/sft", "dpo": tmp_path / "life/dpo", "lone": tmp_path / "lone"}
    assert report_of(runs["lone"]) is None
    client = client_of(runs, None)
    assert '"reports": ["sft", "dpo"]' in client.get("/").text
    answer = client.get("/report", params={"model": "dpo"})
    assert answer.text == "<h1>生命</h1>"
    assert answer.headers["content-security-policy"].startswith("sandbox")
    assert client.get("/report").text == "<h1>生命</h1>"
    missing = client.get("/report", params={"model": "lone"})
    assert missing.status_code == 404
    assert "'lone'" in missing.json()["error"]["message"]
    assert client_of({}, None).get("/report").status_code == 404


def test_the_page_is_one_file_that_names_no_other():
    html, policy = page_html({"votes": True, "reports": ["</script><b>"]})
    assert "{{" not in re.sub(r"<script>.*</script>", "", html, flags=re.S)
    outside = re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s'\"]*", html)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in html and "url(" not in html
    assert html.count("</script>") == 2
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert "connect-src 'self'" in policy


def test_every_word_is_said_in_both_languages():
    folder = Path(page_html.__code__.co_filename).parent / "page"
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert set(SCRIPTS) | {"index.html", "look.css"} == set(sources)
    entries = re.findall(r"^  (\w+): \[\"(.+?)\", \"(.+?)\"\],$", sources["words.js"], re.M)
    known = {name: (english, chinese) for name, english, chinese in entries}
    assert len(known) > 60
    for name, (english, chinese) in known.items():
        assert english.count("{}") == chinese.count("{}"), name
        assert not re.search(r"[\u4e00-\u9fff]", english), name
    whole = "\n".join(sources.values())
    used = set(re.findall(r'data-(?:say|label|title|placeholder)="(\w+)"', whole))
    used |= set(re.findall(r'\b(?:say|button)\("(\w+)"', whole))
    assert used <= set(known)


def test_sources_of_the_page_fit_on_a_few_screens():
    folder = Path(page_html.__code__.co_filename).parent / "page"
    assert all(len(p.read_text("utf-8").splitlines()) <= 400 for p in folder.iterdir())
