import json
from pathlib import Path
from typing import Any

import pytest

from instar.corpus.document import Document
from instar.corpus.quality import Quality, QualityConfig
from instar.corpus.thresholds import BOOKS, WEB_CHARACTERS, WEB_WORDS, Limits, limits_of

SHARED = Path(__file__).parents[3] / "shared" / "data"

SENTENCES = (
    "The ship left the harbour at dawn with a cargo of salt and timber.",
    "Her captain had sailed these waters since he was a boy of twelve.",
    "Nobody on the pier expected to see the vessel again before winter.",
    "A cold wind blew from the hills, and gulls cried over the masts.",
    "By noon they could no longer make out the church tower behind them.",
    "The cook, who was new, asked twice whether it would be a long voyage.",
)
PROSE = "\n".join(SENTENCES)
CHINESE = (
    "清晨的港口还笼罩在薄雾里，渔船一艘接一艘地驶向大海。码头上的老人坐在木箱旁边，慢慢地修补旧网。"
    "他说自己十二岁就上了船，如今已经过去了整整五十年。\n"
    "孩子们放学以后常来听他讲故事，尤其喜欢那个关于灯塔的传说。"
    "每到冬天，海风吹得人睁不开眼睛，可是谁也不愿意早早回家去。"
)
QUATRAIN = "千山鳥飛絕，萬徑人蹤滅。\n孤舟蓑笠翁，獨釣寒江雪。"
PLAY = "FIRST GUARD:\nWho goes?\n\nSECOND GUARD:\nA friend.\n\nFIRST GUARD:\nStand still, friend.\n"


def judged(text: str, language: str = "en", **config: Any) -> str | None:
    return edited(text, language, **config)[0]


def edited(text: str, language: str = "en", **config: Any) -> tuple[str | None, str]:
    document = Document(text, "", "", language=language)
    rule = Quality(QualityConfig.parse(config, "test"))(document)
    return rule, document.text


def test_prose_passes() -> None:
    assert judged(PROSE) is None
    assert judged(CHINESE, "zh") is None
    assert judged(CHINESE, "") is None, "the script says that it is Chinese"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("too few words", "The ship left the harbour at dawn, and that was it."),
        ("too many words", PROSE * 2000),
        ("words too short", "I am a b c to be or d e f . " * 10),
        ("words too long", "the internationalisation of incomprehensibilities " * 20),
        ("too few stop words", "Ships leave harbours early carrying salt. " * 12),
        ("too few letters", "12:30 the 14:45 ship to 17:20 ??? 18:00 of 99 " * 8),
        ("too many symbols", PROSE.replace(" ", " #", 25)),
        ("too many digits", PROSE + " flight" + "00123456789" * 12),
        ("too many bullets", "\n".join(f"• {line}" for line in SENTENCES)),
        ("too many ellipses", PROSE.replace(".", "...")),
        ("duplicate lines", "\n".join([*SENTENCES, *["It was the end of the day."] * 4])),
        ("duplicate line characters", "\n".join([*SENTENCES, SENTENCES[0]])),
        (
            "top 2-gram",
            PROSE + "".join(f" northern lighthouses {c * 3}" for c in "bcdefghijklm"),
        ),
        ("repeated 8-grams", f"{PROSE} {SENTENCES[0][:-1]} indeed."),
        ("too few sentences", PROSE.replace(".", ";") + "."),
        ("curly bracket", PROSE + "\nfunction() { return }"),
        ("lorem ipsum", PROSE + "\nLorem ipsum dolor sit amet is all that we have to say."),
        ("unfinished lines", "Yes. No. Well. " + PROSE.replace(".", ",")),
        (
            "short lines",
            PROSE + "\n" + "\n".join(f"We go to isle {c}." for c in "abcdefghijklmnop"),
        ),
    ],
)
def test_each_rule_of_the_web(rule: str, text: str) -> None:
    assert judged(text) == rule


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("too few words", QUATRAIN),
        ("too few letters", CHINESE + "★☆♪♫" * 40),
        ("too many digits", CHINESE + "８00123456789" * 4),
        ("top 3-gram", CHINESE + "买一送" * 30),
        ("duplicate lines", CHINESE + "\n欢迎光临我们的小店铺。" * 8),
        (
            "short lines",
            CHINESE + "\n" + "\n".join(f"今天我去{c}州看。" for c in "广杭苏徐福泉温台"),
        ),
        ("too few sentences", CHINESE.replace("。", "，")),
    ],
)
def test_rules_for_chinese(rule: str, text: str) -> None:
    assert judged(text, "zh") == rule


def test_books_hold_verse_and_plays() -> None:
    assert judged(QUATRAIN, "zh", preset="books") is None
    assert judged(PLAY, preset="books") is None
    refrain = "Blow, wind, blow,\nover the snow.\n"
    assert judged(refrain * 2 + PLAY + refrain, preset="books") is None


def test_books_do_not_hold_everything() -> None:
    assert judged("No.", preset="books") == "too few words"
    assert judged("spam and eggs " * 100, preset="books") == "top 2-gram"
    assert judged("===== *** 1234 ---- | " * 30, preset="books") == "too few letters"


def test_none_holds_everything() -> None:
    for text in ("", "{", "spam " * 100):
        assert edited(text, preset="none") == (None, text)


def test_lines_about_the_page_are_removed() -> None:
    notices = ("Please enable JavaScript to see the pictures of the ship.", "Read more")
    step = Quality(QualityConfig())
    document = Document("\n".join((*SENTENCES[:3], *notices, *SENTENCES[3:])), "", "")
    assert step(document) is None
    assert document.text == PROSE
    assert step.counts["lines removed"] == 2
    chinese = edited(CHINESE + "\n版权所有，未经许可不得转载本页内容", "zh")
    assert chinese == (None, CHINESE)


def test_chinese_lines_of_an_english_page_stay() -> None:
    text = f"{PROSE}\n渔船一艘接一艘地驶向大海。\n首页"
    rule, kept = edited(text)
    assert rule is None
    assert kept == text.removesuffix("\n首页")


def test_unfinished_lines_are_removed_where_asked() -> None:
    heading = "A short history of a ship and her captain"
    assert edited(f"{heading}\n{PROSE}") == (None, f"{heading}\n{PROSE}")
    words = {"unfinished_lines": False}
    assert edited(f"{heading}\n{PROSE}", words=words) == (None, PROSE)


def test_single_limits_can_be_set() -> None:
    assert judged(
        "We sailed to the isle of salt and to the cape. " * 2, words={"min_words": 5}
    ) in ("too few sentences",)
    assert judged(QUATRAIN, "zh", characters={"min_words": 20, "min_sentences": 2}) is None
    assert judged(PROSE, words={"max_words": 20}) == "too many words"
    assert judged(PROSE, characters={"max_words": 20}) is None
    changed = limits_of(WEB_WORDS, Limits(max_top_runs={2: 0.5}))
    assert changed.max_top_runs == {2: 0.5}
    assert changed.min_words == WEB_WORDS.min_words


def test_no_limit_of_a_preset_is_left_open() -> None:
    for preset in (WEB_WORDS, WEB_CHARACTERS, BOOKS):
        assert None not in preset.model_dump().values()


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
def test_real_texts_are_kept() -> None:
    def kept(texts: list[str], preset: str, language: str) -> float:
        step = Quality(QualityConfig.parse({"preset": preset}, "test"))
        rules = [step(Document(text, "", "", language=language)) for text in texts]
        return rules.count(None) / len(texts)

    pages = (SHARED / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    assert kept([json.loads(line)["text"] for line in pages], "web", "en") >= 0.8
    poems = json.loads((SHARED / "tang" / "poet.tang.0.json").read_text(encoding="utf-8"))
    texts = ["\n".join(poem["paragraphs"]) for poem in poems if poem["paragraphs"]]
    assert kept(texts, "books", "zh") >= 0.999
    plays = (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert kept([plays], "books", "en") == 1
    lines = plays.splitlines()
    parts = ["\n".join(lines[i : i + 200]) for i in range(0, len(lines), 200)]
    assert kept(parts, "books", "en") == 1
