"""The tokenizer stage: learn a vocabulary from the text that pretraining will read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from instar.data.packing import check_place
from instar.files import atomic_directory
from instar.lineage import Cost, Stopwatch, peak_rss_bytes, write_lineage
from instar.stages.base import Stage, by_main, up_to_date
from instar.stages.config import StageConfig
from instar.tokenizer.bpe import FIRST_MERGE
from instar.tokenizer.learning import Kind, learn_tokenizer
from instar.training.display import Display


class TokenizerConfig(StageConfig):
    """Learn a vocabulary; above 64 MB of text the Rust library does it, with the same outcome."""

    stage: str = "tokenizer"
    out: Path = Path("{run}/tokenizer")
    data: list[Path] = [Path("{run}/data/readings.jsonl")]
    """JSON lines with a `text` each."""
    conversations: list[Path] = [Path("{run}/data/conversations.jsonl")]
    """JSON lines with `messages` each."""
    vocab_size: Annotated[int, Ge(FIRST_MERGE)] = 2048
    """Tokens in all: 6 for control, 256 bytes, and the merges or pieces."""
    kind: Kind = "bpe"
    """How it is learned: `bpe` joins bytes; `sentencepiece-bpe` and `sentencepiece-unigram` are
    that library's models of characters (they need the extra `corpus`)."""
    max_length: int = 512
    """The longest input that the model will take, in tokens; a note for other tools."""

    def files(self) -> list[Path]:
        """The text to learn from."""
        return self.data + self.conversations


def run(config: TokenizerConfig, display: Display) -> Path:
    """Train and save."""
    out, provenance = config.at(config.out), config.provenance()
    if up_to_date(out, provenance, display):
        return out
    watch = Stopwatch()
    display.stage("tokenizer", "counting words")
    texts = [d["text"] for d in config.records(config.data, ("text",))]
    if config.conversations:
        talks = config.records(config.conversations, ("messages",))
        for talk in talks:
            check_place(talk["messages"], talk.place)
            texts += [message["content"] for message in talk["messages"]]
    with atomic_directory(out) as directory:
        sizes = config.vocab_size, config.max_length
        size = learn_tokenizer(directory, texts, config.kind, *sizes, display.step, display.note)
        cost = Cost(watch.wall_s, watch.cpu_s, peak_rss_bytes=peak_rss_bytes())
        made = {"stage": "tokenizer", "tokens": size}
        write_lineage(directory, provenance | made, cost)
    return out


STAGE = Stage("tokenizer", "learn a byte-pair vocabulary", TokenizerConfig, by_main(run))
