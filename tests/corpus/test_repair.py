import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("ftfy")

from instar.corpus import repair
from instar.corpus.document import Document
from instar.corpus.repair import Repair, RepairConfig, tidy

SHARED = Path(__file__).parents[3] / "shared" / "data"


def repaired(text: str, **config: object) -> str:
    document = Document(text, "here", "test")
    assert Repair(RepairConfig.parse(dict(config), "test"))(document) is None
    return document.text


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("The cafÃ© is open.", "The café is open."),
        ("sheâ€™s here", "she’s here"),
        ("ä¸­æ–‡å¾ˆå¥½", "中文很好"),
        ("salt &amp; pepper", "salt & pepper"),
        ("ﬁve oﬃces", "five offices"),
        ("cafe\u0301", "café"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("a\x00b\x1fc\td", "abc\td"),
        ("end  \t\nnext\u3000", "end\nnext"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("a\n\n\nb", "a\n\n\nb"),
        ("\ufeffbegin", "begin"),
    ],
)
def test_broken_text_is_mended(broken: str, whole: str) -> None:
    assert repaired(broken) == whole


@pytest.mark.parametrize(
    "text",
    [
        "“Curly,” she said; it’s meant.",
        "他说：“好，我们走！”（笑）",
        "全角ＡＢＣ１２３，。",
        "<b>salt &amp; pepper</b>",
        "Übergröße, naïve café, señor, œuvre",
        "床前明月光，\n疑是地上霜。",
        "  indented = True\n\n\treturn indented",
    ],
)
def test_meant_text_stays(text: str) -> None:
    assert repaired(text) == text


def test_chinese_is_converted_where_asked() -> None:
    pytest.importorskip("opencc")
    assert repaired("漢語的書", chinese="simplified") == "汉语的书"
    assert repaired("汉语的书", chinese="traditional") == "漢語的書"
    assert repaired("漢語的书") == "漢語的书"


def test_what_was_done_is_counted() -> None:
    step = Repair(RepairConfig())
    for text in ("cafÃ©", "plain", "end  \n"):
        step(Document(text, "here", "test"))
    assert step.counts["repaired"] == 2
    assert step.counts["encoding repaired"] == 1


def test_repairing_twice_changes_nothing_more() -> None:
    once = tidy("a \r\n\n\n\n\n\x0cb\u2028c  ")
    assert tidy(once) == once


def shared_texts() -> Iterator[str]:
    for line in (SHARED / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]
    yield from (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n\n")
    wiki = (SHARED / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    yield from islice(wiki.splitlines(), 1500)
    poems = json.loads((SHARED / "tang" / "poet.tang.0.json").read_text(encoding="utf-8"))
    yield from ("\n".join(poem["paragraphs"]) for poem in poems)
    for row in json.loads((SHARED / "chat" / "alpaca_zh_demo.json").read_text(encoding="utf-8")):
        yield row["output"]


def wrongly_decoded(text: str, encoding: str) -> str:
    return text.encode("utf-8").decode(encoding, "replace")


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
def test_the_shortcut_never_changes_the_outcome() -> None:
    quick, slow = Repair(RepairConfig()), Repair(RepairConfig(), always_ftfy=True)
    texts = list(shared_texts())
    texts += [
        "« Ça ne durera pas », dit-il à sa fille ; « où es-tu ? » — là-bas, près du cœur, l'été.",
        "Über die Brücke ging der Müller: „Öl für 5 €!“, rief er, „½ Liter, 20 °C, §3“.",
        "El niño preguntó: «¿Dónde está Ángel?» ¡Aquí! Él pagó 30 £.",
        "Вышел Старый мельник и сказал: «Готово». Рыба, Гусь и Сыр.",
        "Ο γέρος είπε: «Έλα εδώ». Γιατί; Βρέχει.",
    ]
    # Real text is seldom broken, so that some is broken on purpose, by each usual decoding.
    whole = list(texts)
    for encoding in ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1257", "mac_roman"):
        texts += [wrongly_decoded(text[:300], encoding) for text in whole[:3000:10] + whole[-5:]]
    differences = []
    for text in texts:
        one, other = Document(text, "", ""), Document(text, "", "")
        quick(one)
        slow(other)
        if one.text != other.text:
            differences.append(text)
    assert not differences
    assert quick.counts["encoding repaired"] > 100, "the broken texts were seen"


ODD = [
    *"\n\n  ab&;ÂÃàéœØÙ°ó½«»“”’€£‚ƒ„…†‡ˆ‰Š‹ŽžΒΓΞΟ‚ÄΑВГРСЂâ中，\x85\xa0\xad\ufb01\u0301",
    "&amp;",
    "â€™",
]


@pytest.mark.parametrize("most_looks", [0, 2, 200])
def test_the_shortcut_finds_every_sign_in_odd_text(
    most_looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "MOST_LOOKS", most_looks)
    rng = random.Random(most_looks)
    quick, slow = Repair(RepairConfig()), Repair(RepairConfig(), always_ftfy=True)
    for _ in range(4000):
        odd = rng.random()
        letters = [
            rng.choice(ODD) if rng.random() < odd else "a" for _ in range(rng.randint(1, 20))
        ]
        one, other = Document("".join(letters), "", ""), Document("".join(letters), "", "")
        quick(one)
        slow(other)
        assert one.text == other.text
    assert quick.counts["encoding repaired"] > 400
