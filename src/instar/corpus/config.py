"""What a corpus recipe may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from instar.config import Config
from instar.corpus.inputs import InputConfig
from instar.corpus.steps import StepsConfig
from instar.tokenizer.bpe import FIRST_MERGE

HELD_OUT = Path("documents/valid-*.jsonl")
"""Pattern of the files of a finished corpus' held-out documents."""

Share = Annotated[float, Gt(0), Le(1)]


class LinesConfig(Config):
    """Lines that many documents share: menus, licences, "all rights reserved"."""

    documents: Annotated[int, Gt(0)] = 10
    """A line in more documents than this is kept where it came first and taken from the others."""
    shortest: Annotated[int, Gt(0)] = 8
    """Lines with fewer characters are left alone."""


class NearConfig(Config):
    """Documents that are nearly equal (Broder 1997, "On the resemblance of documents")."""

    threshold: Share = 0.8
    """The Jaccard similarity of two documents' n-grams from which the later one is a copy."""
    ngram: Annotated[int, Gt(0)] = 5
    """Words an n-gram; in text without spaces, characters."""
    hashes: Annotated[int, Gt(0)] = 112
    """MinHash values a document: more find similar pairs more surely, and take longer."""


class MixConfig(Config):
    """How much of each source is learnt."""

    temperature: Annotated[float, Gt(0)] = 1.0
    """Sources are drawn by their size to the power of 1/temperature, times their weight: 1 as they
    are, more gives small sources a larger share (Conneau et al. 2020, arXiv:1911.02116, eq. 1)."""
    most_epochs: Annotated[float, Ge(1)] = 4.0
    """No document is repeated more often: what is gained by repeating ends about there
    (Muennighoff et al. 2023, arXiv:2305.16264)."""


class VocabularyConfig(Config):
    """The tokenizer that turns the corpus into ids."""

    path: Path | None = None
    """The directory of one that exists; without it, one is trained on the cleaned text."""
    vocab_size: Annotated[int, Ge(FIRST_MERGE)] = 8192
    """Its size, if it is trained."""
    train_mb: Annotated[float, Gt(0)] = 20
    """How much of the cleaned text it is trained on."""


class CorpusConfig(Config):
    """Make a corpus from raw text: read, clean, deduplicate, decontaminate, mix, tokenize."""

    inputs: list[InputConfig] = []
    """What to read."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a file or record that cannot be read does: end the work, or be skipped and counted."""
    cut: Annotated[int, Ge(0)] = 20_000
    """Plain text files are cut into documents of about this many characters, at blank lines; 0
    leaves each as it is, up to ``largest_record_mb``."""
    largest_record_mb: Annotated[float, Gt(0)] = 64
    """A longer line, page or record is one that cannot be read."""
    partition_mb: Annotated[float, Gt(0)] = 16
    """Input that is worked on at once; also what is lost when the work is stopped."""
    steps: StepsConfig = StepsConfig()
    """What is done with each document by itself."""
    lines: LinesConfig | None = LinesConfig()
    """Repeated lines; null leaves them."""
    exact: bool = True
    """Whether equal documents (but for white space) are dropped, all but the first."""
    near: NearConfig | None = NearConfig()
    """Nearly equal documents; null keeps them."""
    valid_share: Annotated[float, Ge(0), Le(0.5)] = 0.005
    """Share of documents held out. Which ones depends on their text alone, so that none changes
    sides when more data arrives."""
    mix: MixConfig = MixConfig()
    """How much of each source is learnt."""
    order: Literal["as_read", "length", "score"] = "as_read"
    """Order of the documents in the shards: short ones first, or those with a low `score`."""
    score: str = ""
    """For `order: score`: a function of a text, as `module:function` or `file.py:function`."""
    tokenizer: VocabularyConfig | None = VocabularyConfig()
    """What cuts the text into tokens; null ends with text."""

    @model_validator(mode="after")
    def _score_is_there(self) -> CorpusConfig:
        if (self.order == "score") != bool(self.score):
            raise ValueError("`order: score` and `score: module:function` belong together")
        return self
