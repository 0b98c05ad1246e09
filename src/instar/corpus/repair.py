"""Text as its author typed it: wrong decodings undone, one way to write each character and line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from instar.config import Config
from instar.corpus.document import EXTRA, Document, Step
from instar.errors import UserError

DIRECTIONS = {"simplified": "t2s", "traditional": "s2t"}
"""What OpenCC calls the two conversions."""


class RepairConfig(Config):
    """What is mended in every document."""

    encoding: bool = True
    """Undo wrong decodings ("cafÃ©"), HTML entities ("&amp;") and ligatures, with ftfy."""
    chinese: Literal["as_is", "simplified", "traditional"] = "as_is"
    """Which Chinese characters to write, converted with OpenCC."""


class Repair(Step):
    """Mends encoding, characters and line ends; drops nothing.

    Curly quotes and full-width characters stay as they are: they are meant, and a tokenizer that
    never saw 「，」 could not read Chinese.

    Args:
        config: What to mend.
        always_ftfy: Call ftfy on every document, even where it can have nothing to do; for tests.

    Raises:
        UserError: A library that the config needs is not installed.
    """

    name = "repair"

    def __init__(self, config: RepairConfig, always_ftfy: bool = False) -> None:
        super().__init__()
        self.always_ftfy = always_ftfy
        self.fix = _ftfy() if config.encoding else None
        self.signs = Signs() if config.encoding else None
        self.convert = _opencc(DIRECTIONS[config.chinese]) if config.chinese != "as_is" else None

    def __call__(self, document: Document) -> None:
        """Mend ``document``."""
        before = text = document.text
        if self.fix is not None and (self.always_ftfy or self._may_be_broken(text)):
            text = self.fix(text)
            self.counts["encoding repaired"] += text != before
        text = tidy(text)
        if self.convert is not None:
            converted = self.convert(text)
            self.counts["Chinese converted"] += converted != text
            text = converted
        self.counts["repaired"] += text != before
        document.text = text

    def _may_be_broken(self, text: str) -> bool:
        """Whether ftfy could change anything: far cheaper than asking ftfy itself."""
        if not text.isascii() and not unicodedata.is_normalized("NFC", text):
            return True
        assert self.signs is not None
        return self.signs.found(text)


ALWAYS = (
    r"\x00-\x08\x0b\x0e-\x1f\x7f-\x9f"  # control characters
    r"\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff"  # marks nobody sees, broken halves
    "ĲĳŉǱǲǳǄ-ǌ\ufb00-\ufb06"  # ligatures
)
"""Characters that ftfy changes wherever they stand, as a range of a pattern."""
CERTAIN = re.compile(rf"[{ALWAYS}]|&#?[0-9A-Za-z]{{1,24}};")
"""The same, and HTML entities."""
NEAR = 10
"""No sign of a wrong decoding is longer than this, in characters."""
MOST_LOOKS = 200
"""After so many looks around single characters, one look at the whole text is cheaper."""


class Signs:
    """What a text that ftfy would change has for certain: characters, and their neighbours.

    ftfy's own pattern for wrong decodings is too slow to be tried everywhere. All that it matches
    holds one of the characters here; accented letters, which are many in French, only count beside
    another character that is not ASCII.
    """

    def __init__(self) -> None:
        from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES

        def characters(*kinds: str) -> str:
            return "".join(MOJIBAKE_CATEGORIES[kind] for kind in kinds)

        # The last are those with which ftfy's remaining signs begin, and Ã as in "voilÃ le".
        alone = characters("bad", "box", "currency", "numeric", "law") + "ØÙ‚ΒΓΞΟВГРСЂÂÃŒœ"
        accented = characters("lower_accented", "upper_accented")
        self.alone = re.compile(f"[&{ALWAYS}{alone}]")
        self.any = re.compile(f"[&{ALWAYS}{alone}{accented}]")
        # ftfy looks at single lines: its `^` is the beginning of any.
        self.bad = re.compile(BADNESS_RE.pattern, re.VERBOSE | re.MULTILINE)

    def found(self, text: str) -> bool:
        """Whether there is any sign in ``text``; sometimes yes where ftfy then finds nothing."""
        looks = 0
        for match in self.any.finditer(text):
            place = match.start()
            beside = text[max(place - 1, 0) : place] + text[place + 1 : place + 2]
            if beside.isascii() and not self.alone.match(text, place):
                continue
            if CERTAIN.match(text, place):
                return True
            if looks == MOST_LOOKS:
                rest = max(place - NEAR, 0)
                return bool(CERTAIN.search(text, rest) or self.bad.search(text[rest:]))
            looks += 1
            if self.bad.search(text[max(place - NEAR, 0) : place + NEAR]):
                return True
        return False


def _ftfy() -> Callable[[str], str]:
    """The repair of wrong decodings."""
    try:
        from ftfy import TextFixerConfig, fix_text
    except ImportError:
        raise UserError("repairing encodings needs ftfy", EXTRA) from None
    # Line ends are `tidy`'s: those of Windows are no wrong decoding, and far too many for ftfy.
    config = TextFixerConfig(
        uncurl_quotes=False, fix_character_width=False, fix_line_breaks=False, explain=False
    )
    return lambda text: fix_text(text, config)


def _opencc(direction: str) -> Callable[[str], str]:
    """The conversion between the two ways to write Chinese."""
    try:
        from opencc import OpenCC
    except ImportError:
        raise UserError("converting Chinese needs opencc-python-reimplemented", EXTRA) from None
    return OpenCC(direction).convert


ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
"""What one of the next two patterns finds."""
LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f\ufeff]")
EMPTY_LINES = re.compile(r"\n{4,}")


def tidy(text: str) -> str:
    """A text in Unicode's composed form, with plain line ends and no space after its lines.

    Control characters go, except for line feeds and tabs; so do the empty lines around the text,
    and three or more of them within it become one.
    """
    text = unicodedata.normalize("NFC", text)
    if ODD.search(text):
        text = CONTROLS.sub("", LINE_ENDS.sub("\n", text))
    # Line by line: a pattern for trailing spaces is quadratic in a long run of them.
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    return EMPTY_LINES.sub("\n\n", text).strip("\n")
