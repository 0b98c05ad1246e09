"""The page of a corpus: every number of the accounts is there, and every text stays text."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from instar.corpus.accounts import Accounts
from instar.corpus.document import Document
from instar.errors import UserError
from instar.files import write_json
from instar.report.corpus import counted, render, sources, summary, write_page
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import save_tokenizer

HOSTILE = '<script>alert("1")</script> & <b onmouseover="x">bold</b> \'"> </td></style>'
POEM = "月落乌啼霜满天，江枫渔火对愁眠。\n姑苏城外寒山寺，夜半钟声到客船。"
TALE = "the river runs past a quiet mill where two old friends talk of bread and weather"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Follows the tags of a page, and gathers its text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.parts: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)
        assert not self.open
        self.text = re.sub(r"\s+", " ", "".join(self.parts))

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {key for key, _ in attrs}
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src")]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.parts.append(data)


def story(rng: random.Random, length: int = 40) -> str:
    return " ".join(rng.choice(TALE.split()) for _ in range(length)) + "."


def accounts_of(documents: list[Document]) -> Accounts:
    """Documents through steps as a recipe might have them; every twelfth is too short, ..."""
    accounts = Accounts()
    for number, document in enumerate(documents):
        size = len(document.text)
        accounts.flow("read").passed(size, size)
        document.language = "zh" if "月" in document.text else "en"
        document.text = document.text.replace("@", "")
        accounts.flow("mask").passed(size, len(document.text))
        accounts.flow("mask").counts["email"] += size - len(document.text)
        size = len(document.text)
        flow = accounts.flow("quality")
        if number % 12 == 1:
            flow.dropped("太短", document, size)
        elif number % 12 == 7:
            flow.dropped("few stop words", document, size, "of nothing")
        elif number % 24 == 3:
            flow.dropped(HOSTILE[:40], document, size)
        else:
            flow.passed(size, size)
            accounts.finished(document)
    accounts.check()
    return accounts


def write_corpus(directory: Path, with_tokens: bool = True) -> dict:
    """A finished corpus of 480 documents, and its manifest."""
    rng = random.Random(4)
    documents = [
        Document(POEM if i % 3 else story(rng, 5 + i) + "@" * (i % 5), f"in/{i}.txt", "古诗与故事")
        for i in range(479)
    ] + [Document(HOSTILE, f"{HOSTILE}.txt", "web", HOSTILE)]
    accounts = accounts_of(documents)
    kept = [d for d in documents if d.place not in _dropped(documents)]
    accounts.faults.add(Document("is not JSON: " + HOSTILE, "in/bad.jsonl, line 2", "web"))
    (directory / "documents").mkdir(parents=True)
    for part, some in {"train": kept[5:], "valid": kept[:5]}.items():
        with (directory / "documents" / f"{part}-00000.jsonl").open("w", encoding="utf-8") as file:
            for d in some:
                record = {"text": d.text, "source": d.source, "place": d.place}
                file.write(json.dumps(record | {"language": d.language}, ensure_ascii=False) + "\n")
    manifest = {
        "instar": "0.0.test",
        "fingerprint": "f1n6e4",
        "recipe": {"inputs": [{"path": "in", "weight": 2.5}, {"path": "web"}], "名字": "诗"},
        "inputs": [
            {
                "name": "古诗与故事",
                "path": "in",
                "files": [{"path": "in/0.txt", "sha256": "ab" * 32, "bytes": 4321}],
            },
            {"name": "web", "path": "web", "files": []},
        ],
        "ignored": [f"in/{HOSTILE}.xyz"],
        **accounts.record(),
        "split": {
            "train": {"documents": len(kept) - 5, "characters": 70_000, "bytes": 123_456},
            "valid": {"documents": 5, "characters": 400, "bytes": 800},
        },
        "shards": {"train": {}, "valid": {}},
        "epochs": {},
        "clusters": [
            {
                "kept": {"place": "in/1.txt", "text": POEM},
                "size": 4,
                "copies": [{"place": "in/2.txt", "text": POEM.replace("霜", "雪")}],
            },
            {
                "kept": {"place": "in/3.txt", "text": HOSTILE},
                "size": 2,
                "copies": [{"place": "in/4.txt", "text": HOSTILE + " <i>more</i>"}],
            },
        ],
        "files": {},
    }
    if with_tokens:
        trained = {"documents": 400, "repeats": 37, "characters": 69_000, "tokens": 23_456}
        manifest["shards"]["train"] = {"古诗与故事": trained, "web": trained | {"tokens": 7_819}}
        manifest["epochs"] = {"古诗与故事": 2.5, "web": 1.0}
        merges = train_bpe([d.text for d in kept], 400)
        save_tokenizer(directory / "tokenizer", merges, 512)
    write_json(directory / "manifest.json", manifest)
    cost = {"wall_s": 83.0, "cpu_s": 90.0, "peak_rss_bytes": 2**30}
    write_json(directory / "lineage.json", {"stage": "corpus", "clean": 61.5, "cost": cost})
    return manifest


def _dropped(documents: list[Document]) -> set[str]:
    return {
        d.place for i, d in enumerate(documents) if i % 12 in (1, 7) or i % 24 == 3
    }  # as `accounts_of` does


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpora") / "my <corpus>"
    write_corpus(directory)
    return directory


def test_the_page_stands_by_itself(corpus):
    html = write_page(corpus).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.links and {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"https?://[^\"'\s>]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in html and "url(" not in html


def test_texts_stay_texts(corpus):
    html = write_page(corpus).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "onmouseover" not in page.attributes
    assert html.count("<style") == html.count("</style") == 1
    # The same words are there to be read: a fault, an ignored file, a rule, a copy, a line.
    for told in ("is not JSON: " + HOSTILE, f"in/{HOSTILE}.xyz", HOSTILE[:40], "my <corpus>"):
        assert re.sub(r"\s+", " ", told) in page.text


def test_every_number_of_the_accounts_is_there(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    page = Page(write_page(corpus).read_text(encoding="utf-8"))
    for flow in manifest["flows"].values():
        for key in ("documents_in", "documents_out", "characters_in", "characters_out"):
            assert f"{flow[key]:,}" in page.text
        for rule, drop in flow["drops"].items():
            assert f"{rule}: {drop['documents']:,} document" in page.text
            assert all(example["place"] in page.text for example in drop["examples"])
    assert f"{manifest['flows']['mask']['counts']['email']:,}" in page.text
    assert "31.3 k" in page.text  # tokens of both sources
    assert "75.0%" in page.text and "25.0%" in page.text  # 23,456 and 7,819 of them
    assert "2.5" in page.text and "2.50" in page.text  # weight, epochs
    assert "1 min 23 s" in page.text and "1 min 02 s" in page.text
    assert "ab" * 32 in page.text and "名字: 诗" in page.text and "of nothing" in page.text


def test_lengths_and_languages_are_told_by_source(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    html = write_page(corpus).read_text(encoding="utf-8")
    for source, shares in manifest["languages"].items():
        for unit in (0, 1):
            whole = sum(share[unit] for share in shares.values())
            for language, share in shares.items():
                assert f"</span>{language} {100 * share[unit] / whole:.1f}%" in html
        for bits, count in manifest["lengths"][source].items():
            begin, end = 2 ** (int(bits) - 1), 2 ** int(bits) - 1
            assert f"<title>{begin:,} to {end:,} characters: {count:,}</title>" in html


def test_copies_have_their_differences_marked(corpus):
    html = write_page(corpus).read_text(encoding="utf-8")
    assert "月落乌啼<mark>霜</mark>满天" in html and "月落乌啼<mark>雪</mark>满天" in html
    assert "And 2 more." in html


def test_the_best_and_the_worst_lines_are_shown(corpus):
    html = write_page(corpus).read_text(encoding="utf-8")
    assert "Cut best" in html and "Cut worst" in html
    tables = re.findall(r"<tbody>(.*?)</tbody>", html[html.index("Cut best") :], re.DOTALL)
    best, worst = (
        [float(ratio) for ratio in re.findall(r'<th scope="row">([\d.]+)<br>', table)]
        for table in tables[:2]
    )
    assert best == sorted(best, reverse=True) and worst == sorted(worst)
    assert min(best) >= max(worst) and len(best) == len(worst) > 1


def test_what_is_missing_is_left_out(tmp_path):
    write_corpus(tmp_path / "bare", with_tokens=False)
    (tmp_path / "bare" / "lineage.json").unlink()
    page = Page(write_page(tmp_path / "bare").read_text(encoding="utf-8"))
    assert "Cut best" not in page.text and "to prepare" not in page.text
    assert "123 kB" in page.text  # text instead of tokens


def test_a_corpus_of_which_nothing_was_kept_has_a_page_too():
    accounts = Accounts()
    accounts.flow("read").dropped("empty", Document("", "a.txt", "s"), 0)
    page = Page(render("none", accounts.record(), {}))
    assert "1 document came" in page.text and "0 of them" in page.text
    page = Page(render("least", {"flows": Accounts().record()["flows"] | {"read": EMPTY}}, {}))
    assert "No step dropped anything." in page.text


EMPTY = {
    "documents_in": 0,
    "documents_out": 0,
    "characters_in": 0,
    "characters_out": 0,
    "edited": 0,
    "drops": {},
    "counts": {},
}


def test_counts_are_those_of_the_steps_and_not_the_estimates():
    flows = {
        "a": EMPTY | {"counts": {"tokens in, about": 3, "tokens out, about": 2}},
        "b": EMPTY | {"counts": {"email": 4, "tokens in, about": 2, "tokens out, about": 2}},
    }
    assert counted(flows) == {"b": {"email": 4}}
    assert "Tokens in" in Page(render("x", {"flows": flows}, {})).text


def test_sources_and_summary(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    first, second = sources(manifest)
    assert (first["weight"], first["epochs"], first["bytes"]) == (2.5, 2.5, 4321)
    assert second["weight"] == 1.0 and first["share"] == pytest.approx(23_456 / 31_275)
    assert first["documents"] + second["documents"] == 380
    assert "480 documents came from 1 file" in summary(manifest) and "380 of" in summary(manifest)


@pytest.mark.parametrize("text", [None, "{}", "[1]", "{"])
def test_a_directory_without_accounts_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_page(tmp_path)
