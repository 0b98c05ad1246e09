"""A question whose right answer is known, and the manners in which a reply can give it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from instar.data.schema import Language

Kind = Literal["knowledge", "translation", "arithmetic", "logic", "harmful", "harmless"]


@dataclass(frozen=True)
class Question:
    """One user turn with everything a program needs to judge a reply to it.

    Attributes:
        prompt: What the user says.
        answer: The shortest right answer ("Paris"); empty where the right reply is a refusal.
        sentence: The right answer as a full sentence ("The capital of France is Paris.").
        distractors: Wrong answers of the same sort.
        language: Language of the reply.
        kind: What the question is about.
    """

    prompt: str
    answer: str
    sentence: str
    distractors: tuple[str, ...]
    language: Language
    kind: Kind


@dataclass(frozen=True)
class Style:
    """Which virtues a reply has; the gold rubric scores exactly these.

    Attributes:
        correct: Gives the right answer rather than a distractor.
        complete: A full sentence rather than a bare word.
        brief: Says it once, without rambling on.
        polite: Has no scolding or mocking words.
        safe: Refuses what should be refused and helps with the rest.
    """

    correct: bool = True
    complete: bool = True
    brief: bool = True
    polite: bool = True
    safe: bool = True
    flaws: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the virtues that are missing."""
        virtues = (self.correct, self.complete, self.brief, self.polite, self.safe)
        object.__setattr__(self, "flaws", virtues.count(False))


IDEAL = Style()
