"""A preference pair shows two manners of answering one question, and which of them is liked.

Two replies differ in one or two virtues, and may share a flaw. Some combinations of flaws are
never shown in training, and some questions neither, so that a reward model can be asked both
whether it knows new questions and whether it has understood the virtues one by one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from instar.data.schema import PreferencePair
from instar.primer.annotators import GOLD, Annotator
from instar.primer.arithmetic import Problem, worked
from instar.primer.question import Question, Style
from instar.primer.rubric import to_record
from instar.primer.split import Split, split_of_prompt
from instar.primer.style import attainable, say

WRONG_SHARE = 0.3
"""How many pairs about ordinary questions differ in correctness; of sums, all do."""
UNSAFE_SHARE = 0.7
"""How many pairs about requests differ in safety."""
REFUSED_SHARE = 0.03
"""How many pairs about ordinary questions have an undue refusal."""
SECOND_SHARE = 0.35
"""How many pairs differ in two virtues rather than in one."""
SHARED_FLAW_SHARE = 0.3
"""How many pairs have a flaw in common."""
WORKED_SHARE = 0.6
"""How many right replies to a sum are worked out; how many wrong ones, the same."""

Flaws = frozenset[str]
Combination = frozenset[Flaws]
"""The flaws of one reply and those of the other, in no order."""

_FORM = ("complete", "brief", "polite")


def _combination(first: str, second: str) -> Combination:
    return frozenset((frozenset(first.split()), frozenset(second.split())))


UNSEEN_COMBINATIONS: frozenset[Combination] = frozenset(
    {
        _combination("polite", "correct"),  # rude but right, or friendly and wrong
        _combination("brief", "safe"),  # long-winded help or refusal, or a curt misjudgement
        _combination("complete", "complete brief"),  # rambling, where both are bare
        _combination("brief", "brief polite"),  # scolding, where both ramble
        _combination("", "brief polite"),  # nothing to blame, or two flaws of form
    }
)
"""Combinations that training pairs never show. A reply that is unsafe is not also called wrong."""


class JudgedPair(PreferencePair):
    """A preference pair that carries its question, so that the rubric can judge it again."""

    question: dict[str, object]


def preferences(
    questions: Iterator[Question],
    rng: random.Random,
    annotators: Sequence[Annotator],
    part: Split = "train",
) -> Iterator[JudgedPair]:
    """Ordinary pairs, each labelled by one of ``annotators``.

    Args:
        questions: What to ask; questions of another split are passed over.
        rng: Source of styles, wording and of the annotators' noise.
        annotators: Who labels; one is drawn for every pair.
        part: To learn from (``train``) or to watch learning with (``valid``).
    """
    for question in _questions_of(questions, part):
        styles = draw_pair(question, rng)
        if combination(*styles) not in UNSEEN_COMBINATIONS:
            yield _pair(question, styles, rng, rng.choice(annotators), part)


def unseen_pairs(questions: Iterator[Question], rng: random.Random) -> Iterator[JudgedPair]:
    """Exam pairs: questions that training pairs never use, flaws that they do, gold labels."""
    for question in _questions_of(questions, "exam"):
        styles = draw_pair(question, rng)
        if combination(*styles) not in UNSEEN_COMBINATIONS:
            yield _pair(question, styles, rng, GOLD, "unseen_pairs")


def unseen_combinations(questions: Iterator[Question], rng: random.Random) -> Iterator[JudgedPair]:
    """Exam pairs: new questions *and* combinations of flaws that training never shows."""
    # Sets have no fixed order; sorting makes the draw depend on the seed alone.
    pairs = sorted(sorted(map(sorted, unseen)) for unseen in UNSEEN_COMBINATIONS)
    for question in _questions_of(questions, "exam"):
        first, second = (attainable(question, style_of(flaws)) for flaws in rng.choice(pairs))
        if combination(first, second) in UNSEEN_COMBINATIONS:
            yield _pair(question, (first, second), rng, GOLD, "unseen_combinations")


def question_mix(
    rng: random.Random, pools: Sequence[tuple[Iterator[Question], float]]
) -> Iterator[Question]:
    """Endless questions drawn from several pools.

    Args:
        rng: Chooses the pool.
        pools: Endless iterators with the share of each; shares need not add up to 1.
    """
    iterators, shares = zip(*pools, strict=True)
    while True:
        yield next(rng.choices(iterators, shares)[0])


def flaws_of(style: Style) -> Flaws:
    """The names of the virtues that ``style`` lacks; unsafe says enough, and hides incorrect."""
    missing = {name for name in (*_FORM, "correct", "safe") if not getattr(style, name)}
    return frozenset(missing - {"correct"} if "safe" in missing else missing)


def style_of(flaws: Sequence[str]) -> Style:
    """The style that lacks exactly these virtues."""
    return Style(**dict.fromkeys(flaws, False))


def combination(first: Style, second: Style) -> Combination:
    """What the flaws of two replies have to do with each other."""
    return frozenset((flaws_of(first), flaws_of(second)))


def draw_pair(question: Question, rng: random.Random) -> tuple[Style, Style]:
    """Two styles of unequal worth that differ in one or two virtues."""
    while True:
        shared: set[str] = set(rng.sample(_FORM, 1)) if rng.random() < SHARED_FLAW_SHARE else set()
        changes = [_first_change(question, rng)]
        if rng.random() < SECOND_SHARE:
            changes.append(rng.choice([name for name in _FORM if name not in changes]))
        first, second = set(shared), set(shared)
        for name in changes:
            if name in shared:
                first.discard(name)
            else:
                (first if name in _FORM and rng.random() < 0.3 else second).add(name)
        styles = (
            attainable(question, style_of(sorted(first))),
            attainable(question, style_of(sorted(second))),
        )
        if len(combination(*styles)) == 2 and _worth(styles[0]) != _worth(styles[1]):
            return styles


def _first_change(question: Question, rng: random.Random) -> str:
    """The virtue in which two replies differ for certain."""
    if question.kind == "arithmetic":
        return "correct"
    if question.kind in ("harmful", "harmless"):
        return "safe" if rng.random() < UNSAFE_SHARE else rng.choice(_FORM)
    shares = [WRONG_SHARE, REFUSED_SHARE, 1 - WRONG_SHARE - REFUSED_SHARE]
    name = rng.choices(("correct", "safe", "form"), shares)[0]
    return rng.choice(_FORM) if name == "form" else name


def _worth(style: Style) -> int:
    """The rubric's total of a style, in tenths."""
    form = sum(getattr(style, name) for name in _FORM)
    return 4 * style.correct + 3 * style.safe + form


def _pair(
    question: Question,
    styles: tuple[Style, Style],
    rng: random.Random,
    annotator: Annotator,
    group: str,
) -> JudgedPair:
    """Say ``question`` in both styles and let ``annotator`` choose."""
    a, b = (say(_perhaps_worked(question, rng), style, rng) for style in styles)
    if rng.random() < 0.5:  # nobody should be shown the better reply first
        a, b = b, a
    chosen, rejected = (a, b) if annotator.prefers(question, a, b, rng) else (b, a)
    return {
        "messages": [{"role": "user", "content": question.prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "group": group,
        "question": to_record(question),
    }


def _perhaps_worked(question: Question, rng: random.Random) -> Question:
    """A sum whose right sentence is, in some cases, the worked one."""
    if question.kind != "arithmetic" or rng.random() >= WORKED_SHARE:
        return question
    a, op, b = question.sentence.split()[:3]
    problem = Problem(int(a), op, int(b))
    return replace(question, sentence=worked(problem, question.language))


def _questions_of(questions: Iterator[Question], part: Split) -> Iterator[Question]:
    """The questions whose prompt belongs to ``part``."""
    return (q for q in questions if split_of_prompt(q.prompt) == part)
