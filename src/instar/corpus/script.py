"""Which script a text is written in: what decides its language, and what its words are."""

from __future__ import annotations

import re

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff々〇"
"""Chinese characters, the rare ones included, as a range of a pattern."""
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fd-\u30ff\u31f0-\u31ff\uff66-\uff9f"
"""What only Japanese is written in."""
HANGUL = "\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e"
"""What only Korean is written in."""

UNSPACED = frozenset({"zh", "ja"})
"""Languages without spaces between words: of their texts, every character counts as a word.

Thai, Lao, Khmer and Burmese have none either, but no limits of their own yet: the preset for the
web drops them for the length of their words."""

NOT_HAN, NOT_KANA, NOT_HANGUL = (re.compile(f"[^{a}]+") for a in (HAN, KANA, HANGUL))
NOT_A_LETTER = re.compile(r"[\W\d_]+")

KANA_OF_JAPANESE = 0.05
"""So large a share of kana among Han and kana makes a text Japanese: Japanese prose has half, a
Chinese text that quotes a Japanese name far less."""


def language_of_script(text: str) -> str:
    """``zh``, ``ja`` or ``ko`` where the script alone decides it; otherwise empty.

    Latin names in a Chinese text are common and long, so a third of its letters being Han is
    enough: no other language mixes them in.
    """
    if text.isascii():
        return ""
    letters = len(NOT_A_LETTER.sub("", text))
    han = len(NOT_HAN.sub("", text))
    kana = len(NOT_KANA.sub("", text))
    if 3 * (han + kana) >= letters > 0:
        return "ja" if kana > KANA_OF_JAPANESE * (han + kana) else "zh"
    hangul = len(NOT_HANGUL.sub("", text))
    return "ko" if 3 * hangul >= letters > 0 else ""
