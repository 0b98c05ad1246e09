"""The corpus stage: a user's own text, cleaned, in place of the primer's readings."""

from __future__ import annotations

from pathlib import Path

from instar.config import read_config
from instar.corpus.accounts import MANIFEST
from instar.corpus.config import HELD_OUT, CorpusConfig
from instar.corpus.inputs import InputConfig
from instar.corpus.lessons import write_lessons
from instar.errors import UserError
from instar.files import read_json
from instar.recipes import find_corpus
from instar.stages.base import Stage, by_main
from instar.stages.config import StageConfig
from instar.stages.data import DataConfig
from instar.training.display import Display

INSTEAD = {
    "{run}/data/readings.jsonl": "{run}/corpus/documents/train-*.jsonl",
    "{run}/data/readings_valid.jsonl": f"{{run}}/corpus/{HELD_OUT}",
    "{run}/data/readings_exam.jsonl": f"{{run}}/corpus/{HELD_OUT}",
}
"""What the other stages read where the primer's readings stood."""


class OwnTextConfig(StageConfig):
    """Make a corpus of a user's own text, and lessons of its titles."""

    stage: str = "corpus"
    out: Path = Path("{run}/corpus")
    corpus: CorpusConfig = CorpusConfig()
    """What to read, and what to do with it."""


def own_text(path: str, recipe: str, run: Path, data: StageConfig | None = None) -> OwnTextConfig:
    """The stage that reads a user's text.

    Args:
        path: A file, folder, pattern or hub dataset.
        recipe: The corpus recipe that cleans it.
        run: Directory of the life.
        data: Its data stage, whose exams the text must not hold.

    Raises:
        UserError: There is no such recipe.
    """
    config = read_config(CorpusConfig, find_corpus(recipe))
    if isinstance(data, DataConfig) and config.steps.contamination:
        exams = {"exam_seed": data.seed, "exam_items": data.primer.exam_items}
        kept_out = config.steps.contamination.model_copy(update=exams)
        steps = config.steps.model_copy(update={"contamination": kept_out})
        config = config.model_copy(update={"steps": steps})
    # The life's tokenizer stage learns from conversations as well.
    inputs = [*config.inputs, InputConfig(path=path)]
    corpus = config.model_copy(update={"inputs": inputs, "tokenizer": None})
    return OwnTextConfig(run=run, corpus=corpus)


def run(config: OwnTextConfig, display: Display) -> Path:
    """Prepare the text, and what it can teach."""
    from instar.corpus.prepare import prepare
    from instar.corpus.workers import Workers

    out = config.at(config.out)
    with Workers() as workers:
        prepare(config.corpus, out, workers, display)
    if not read_json(out / MANIFEST)["split"]["valid"].get("documents"):
        raise UserError(
            "no document was held out, and nothing could be measured",
            "Give more text, or a --corpus-recipe with a larger `valid_share` or a smaller `cut`.",
        )
    write_lessons(out)
    return out


STAGE = Stage("corpus", "clean your own text", OwnTextConfig, by_main(run))
