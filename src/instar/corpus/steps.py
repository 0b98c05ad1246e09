"""What is done with every document, in which order; each step can be left out."""

from __future__ import annotations

from pathlib import Path

from instar.config import Config
from instar.corpus.contamination import Contamination, ContaminationConfig
from instar.corpus.document import Document, Step
from instar.corpus.language import Languages, LanguagesConfig
from instar.corpus.own import load_rule
from instar.corpus.personal import Personal, PersonalConfig
from instar.corpus.quality import Quality, QualityConfig
from instar.corpus.repair import Repair, RepairConfig


class StepsConfig(Config):
    """The steps from raw text to text worth learning; null leaves one out."""

    repair: RepairConfig | None = RepairConfig()
    """Wrong encodings, odd characters, line ends."""
    language: LanguagesConfig | None = LanguagesConfig()
    """Which language it is, and which are wanted."""
    personal: PersonalConfig | None = PersonalConfig()
    """E-mail addresses, telephone numbers and the like, masked."""
    quality: QualityConfig | None = QualityConfig()
    """Rules that tell text from menus, lists and noise."""
    rules: list[str] = []
    """Rules of one's own, ``module:Class`` or ``path/to/file.py:Class``: subclasses of
    ``instar.corpus.document.Step`` that are made without arguments."""
    contamination: ContaminationConfig | None = ContaminationConfig()
    """Exams that must not be learnt from."""


def files_of(config: StepsConfig) -> list[Path]:
    """The files that say what the steps do, besides the recipe: rules, and evaluations."""
    rules = [Path(name.rpartition(":")[0]) for name in config.rules]
    against = config.contamination.against if config.contamination else []
    return [path for path in (*rules, *against) if path.is_file()]


def make_steps(config: StepsConfig) -> list[Step]:
    """The steps in their order: every one sees the text as the one before it has left it.

    Repair comes first, for the others read what it has mended; contamination last, for it looks
    for the exams in what will be learnt.

    Raises:
        UserError: A library is missing, a file or a rule cannot be loaded.
    """
    steps: list[Step] = []
    if config.repair is not None:
        steps.append(Repair(config.repair))
    if config.language is not None:
        steps.append(Languages(config.language))
    if config.personal is not None:
        steps.append(Personal(config.personal))
    if config.quality is not None:
        steps.append(Quality(config.quality))
    steps += [load_rule(name) for name in config.rules]
    if config.contamination is not None:
        steps.append(Contamination(config.contamination))
    return steps


def first_objection(steps: list[Step], document: Document) -> tuple[str, str] | None:
    """Take ``document`` through ``steps`` until one drops it.

    Returns:
        The step's name and its rule; None if all keep it.
    """
    for step in steps:
        rule = step(document)
        if rule is not None:
            return step.name, rule
    return None
