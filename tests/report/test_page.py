import json
import re
from html.parser import HTMLParser

import pytest

from instar.report import tables
from instar.report.page import amount, duration, main, render, verdict, write_report

VOID = {"meta", "br", "link", "img", "hr"}


class Checker(HTMLParser):
    """Follows the tags of a page: all closed, ids unique, links within the page."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for key, value in attrs if key in ("href", "src")]

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path) -> tuple[Checker, str, str]:
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker, html, re.sub(r"\s+", " ", " ".join(checker.text))


def test_the_page_stands_by_itself(report):
    as_json, as_html = report
    checker, html, text = read(as_html)
    assert json.loads(as_json.read_text(encoding="utf-8"))["total"]["tokens"] == 4_810_000
    assert len(checker.ids) == len(set(checker.ids))
    assert all(link.startswith("#") for link in checker.links)
    assert {link[1:] for link in checker.links if len(link) < 14} <= set(checker.ids)
    # No network: neither scripts, fonts nor images from elsewhere (namespaces are only names).
    remote = set(re.findall(r"https?://[^\"'\s>]+", html))
    assert remote <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in html and "@import" not in html and "url(http" not in html
    assert len(html) < 1_000_000
    assert "How to read this." in text and "遗忘了什么" in text


def test_what_was_taught_later_is_shown(report):
    run = report[0].parent
    rows = {
        name: {
            "kept": {"score": kept, "stderr": 0.01},
            "learnt": {"score": new, "stderr": 0.02},
            "of_best": new / 0.9,
            "worst": {"exam": "logic", "left": kept},
            "passed": name == "replay",
        }
        for name, kept, new in (("start", 1.0, 0.02), ("none", 0.3, 0.9), ("replay", 0.987, 0.88))
    }
    (run / "continual").mkdir()
    table = {"bar": [0.98, 0.95], "methods": rows}
    (run / "continual" / "table.json").write_text(json.dumps(table), encoding="utf-8")
    checker, html, text = read(write_report(run)[1])
    assert "taught" in checker.ids and "98.7 ± 1.0" in text
    assert "replay kept 99% and learnt 88%" in html
    (run / "continual" / "table.json").unlink()
    assert "taught" not in read(write_report(run)[1])[0].ids


def test_replies_are_shown_as_text(report):
    _, html, text = read(report[1])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>alert(1)</script>" in text


def test_numbers_are_on_the_page(report):
    _, html, text = read(report[1])
    assert "3.67 M parameters" in text and "went through 8 stages in 13 min 20 s" in text
    assert "arithmetic 82% (rlvr)" in text
    assert "PPO: the reward model likes it better (83%) than the truth does (66%)" in text
    assert "RLVR: the truth likes it better (62%)" in text
    assert "DPO: both judges agree" in text
    assert "digits = 2" in text and "1.310 bits per byte for Chinese" in text
    assert 'class="better">+51.0' in html and 'class="worse">+0.090' in html
    assert "name: 龄虫" in text


def test_different_units_are_not_drawn_together(report):
    _, html, _ = read(report[1])
    told = re.findall(r'aria-label="([^"]* over the steps of [^"]*)"', html)
    losses = {line.split(" of ")[1].split(":")[0]: line for line in told if line[:4] == "Loss"}
    assert "valid" in losses["sft"] and "valid" not in losses["pretrain"]
    assert sum("Bits per byte" in line for line in told) == 2


def test_refused_steps_are_left_out(run):
    log = run / "ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    rows = [row | {"raw_score": 0.5, "kl_to_reference": 0.1} for row in rows]
    rows[7] |= {"loss": None, "kl": None, "raw_score": None}
    rows = [row | {"entropy": None} for row in rows]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, html, _ = read(write_report(run)[1])
    told = re.findall(r'aria-label="([^"]*) over the steps of ppo', html)
    assert len(told) == len(set(told)) and "Entropy" not in told
    assert {
        "Loss",
        "Reward-model score, before penalties",
        "KL from reference, nats a reply (sampled)",
        "KL from reference, nats a token (k3)",
    } <= set(told)


@pytest.mark.parametrize("kept", [["data"], ["pretrain"], ["tokenizer", "reward"], ["sft", "x"]])
def test_any_part_of_a_life_has_a_page(run, kept):
    (run / "data").rename(run / "x") if "x" in kept else None
    for path in list(run.iterdir()):
        if path.name not in kept:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    _, _, text = read(write_report(run)[1])
    assert "The life of a language model" in text


def test_the_verb_prints_where_the_report_is(run, capsys):
    for name in ("pretrain", "sft", "reward", "dpo", "ppo", "rlvr"):
        (run / name / "metrics.jsonl").unlink()
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(run / "report.json"),
        str(run / "report.html"),
    ]
    with pytest.raises(SystemExit):
        main(["--help"])


def test_durations_and_amounts():
    assert [duration(s) for s in (0, 59.94, 59.96, 185, 7810)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [amount(n) for n in (0, 940, 3_412_000, 1.9e13)] == ["0", "940", "3.41 M", "19 T"]
    assert amount(2.5e16) == "2.50 × 10^16"


def test_a_small_gap_between_judges_is_no_verdict():
    close = {"gold_win_rate": 0.6, "reward_win_rate": 0.66, "gold_stderr": 0.03}
    assert "agree" in verdict("dpo_vs_sft", close | {"reward_stderr": 0.03})


def test_a_life_on_ones_own_text_says_so(run):
    stages = tables.read_run(run)
    record = tables.summarise("mine", stages)
    corpus = {
        "inputs": [{"name": "<poems>"}],
        "split": {"train": {"documents": 1234, "bytes": 5e6}},
    }
    page = render(record, stages, corpus)
    assert "your own text" in page and "&lt;poems&gt;" in page and "1,234" in page
    assert "your own text" not in render(record, stages)
