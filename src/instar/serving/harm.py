"""A small classifier of harm: logistic regression on hashed character n-grams.

It is learnt from the primer's *training* pairs of harmful requests and harmless look-alikes, in
seconds, and never sees what is kept for exams. Requests and replies have weights of their own: a
refusal names no deed, and an offer to help with one begins like any other help.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from instar.data.schema import Language
from instar.errors import UserError
from instar.files import atomic_directory, is_free
from instar.lineage import Cost, Stopwatch, hash_value, write_lineage
from instar.primer import arithmetic, conversations, logic, safety
from instar.primer.mixture import LANGUAGES
from instar.primer.split import split_of_prompt
from instar.primer.style import REFUSALS
from instar.primer.tables import table

Role = Literal["user", "assistant"]
"""Who speaks: what is asked is judged apart from what is answered."""
ROLES: tuple[Role, Role] = ("user", "assistant")

BUCKETS = 2**16
"""Length of the hashed feature vector; a few thousand n-grams matter, so few of them collide."""
LONGEST = 5
"""Characters of the longest n-gram: an English stem, or a Chinese phrase."""
ORDINARY = 6000
"""Everyday turns, and sentences of them, beside the pairs, so that small talk is allowed."""
ERRANDS: dict[Language, tuple[str, ...]] = {
    "en": ("draw {}", "find {}", "describe {}", "learn about {}", "choose {}", "make {}", "fix {}"),
    "zh": ("画{}", "找{}", "描述{}", "认识{}", "选{}", "做{}", "修{}"),
}
"""Ordinary deeds, done to the words of the dictionary: neither "How do I ...?" nor "To ..., do this
and that." is a sign of harm."""
STEPS, DECAY = 600, 1e-6
"""Steps of gradient descent, and the weight of half the squared norm in the loss."""
FILE = "filter.safetensors"

_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
SENTENCE_END = re.compile(r"(?<=[.!?。！？；;\n])")
"""Where a text may be cut into sentences, Chinese and English."""


@dataclass(frozen=True)
class Example:
    """Something said, whether it does harm, and the deed it is about (empty for small talk)."""

    text: str
    harmful: bool
    role: Role
    deed: str = ""


def normalised(text: str) -> str:
    """Text as the filter reads it: small letters of one form, single spaces, nothing invisible.

    Full-width letters, capitals and zero-width characters between letters change nothing.
    """
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """The sentences of a text, Chinese and English."""
    return [part for part in map(str.strip, SENTENCE_END.split(text)) if part]


def features(text: str) -> np.ndarray:
    """Buckets of the distinct n-grams of normalised text ``(F,)``, in order."""
    return _buckets(f" {normalised(text)} ")


def _buckets(framed: str) -> np.ndarray:
    grams = {framed[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(framed) - n + 1)}
    return np.unique(np.fromiter((zlib.crc32(g.encode()) % BUCKETS for g in grams), np.int64))


class Classifier:
    """How likely a text is to be harmful.

    Args:
        weights: For each role, one number a bucket ``(BUCKETS,)``, then the bias ``(1,)``.
    """

    def __init__(self, weights: dict[Role, np.ndarray]) -> None:
        self.weights = weights

    def score(self, text: str, role: Role) -> float:
        """Probability of harm: the highest of the whole text and of its sentences.

        The rows of the training data have length 1, so what is long would drown what it hides.
        """
        parts = dict.fromkeys([text, *sentences(text)])
        return max(Growing(self.weights[role]).add(normalised(part)) for part in parts)

    def save(self, directory: Path, lineage: dict[str, object], cost: Cost) -> None:
        """Write the weights and where they came from, whole or not at all."""
        with atomic_directory(directory) as beside:
            save_file({role: self.weights[role] for role in ROLES}, beside / FILE)
            write_lineage(beside, lineage, cost)

    @classmethod
    def load(cls, directory: Path) -> Classifier:
        """The classifier in a directory.

        Raises:
            UserError: There is none.
        """
        try:
            stored = load_file(directory / FILE)
            return cls({role: stored[role] for role in ROLES})
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{directory} holds no safety classifier ({error})",
                "Make one: instar safety train --output DIR.",
            ) from None


class Growing:
    """The probability of harm of a text that grows, each time at the cost of what is new.

    Args:
        weights: Those of one role ``(BUCKETS + 1,)``.
    """

    def __init__(self, weights: np.ndarray) -> None:
        self._weights, self._found = weights, np.zeros(BUCKETS, dtype=bool)
        self._sum, self._number = 0.0, 0
        self._end = " "

    def add(self, read: str) -> float:
        """Take normalised text in, behind a space, and return the probability of all so far."""
        framed = f"{self._end}{read} "
        buckets = _buckets(framed)
        new = buckets[~self._found[buckets]]
        self._found[new] = True
        self._sum += float(self._weights[new].sum())
        self._number += len(new)
        self._end = framed[1 - LONGEST :]
        value = self._sum / math.sqrt(max(self._number, 1)) + self._weights[-1]
        return float(1 / (1 + np.exp(-value)))


@cache
def examples(seed: int = 0) -> tuple[Example, ...]:
    """What the classifier learns from: requests in their training phrasings, replies, small talk.

    Args:
        seed: Decides the small talk, and how requests are addressed.
    """
    rng = random.Random(f"safety filter {seed}")
    found: dict[Example, None] = {}
    for language in LANGUAGES:
        for request in (*safety.requests(language, True), *safety.requests(language, False)):
            for phrasing in range(len(safety.PHRASINGS[language])):
                if request.split(phrasing) == "train":
                    found |= dict.fromkeys(_of_request(request, phrasing, rng))
    found |= dict.fromkeys(_errands(rng))
    found |= dict.fromkeys(islice(_small_talk(rng), ORDINARY))
    return tuple(found)


def _of_request(request: safety.Request, phrasing: int, rng: random.Random) -> list[Example]:
    """A request bare and with a greeting or a reason around it, and what may be replied."""
    question, harmful = request.question(phrasing), not request.tip
    asked = (question.prompt, conversations.addressed(question, rng).prompt)
    replies = question.distractors if harmful else (question.sentence,)
    return [
        *(Example(text, harmful, "user", request.action) for text in asked),
        # Some replies that comply answer a harmless look-alike instead: those do no harm.
        *(
            Example(text, harmful and request.action in text, "assistant", request.action)
            for text in replies
        ),
        *(Example(text, False, "assistant") for text in REFUSALS[request.language]),
    ]


def _errands(rng: random.Random) -> Iterator[Example]:
    """Every errand to every noun, in some phrasing, and replies that help with it.

    What exams may ask about is left out.
    """
    for language in LANGUAGES:
        tips = {request.action: request.tip for request in safety.requests(language, True)}
        for row in table("dictionary"):
            if row["part"] == "noun":
                word = row["plural_en"] or row["en"] if language == "en" else row["zh"]
                for errand in ERRANDS[language]:
                    deed = errand.format(word)
                    if deed in tips:
                        continue
                    phrasing = rng.choice(safety.PHRASINGS[language])
                    yield Example(phrasing.format(deed), False, "user")
                    consent = rng.choice(safety.CONSENTS[language]).format(deed)
                    for reply in (
                        consent,
                        safety.advice(deed, rng.choice([*tips.values()]), language),
                    ):
                        yield Example(reply, False, "assistant")


def _small_talk(rng: random.Random) -> Iterator[Example]:
    """Turns of everyday conversations that no exam asks for."""
    streams = [
        conversations.conversations(rng),
        *(
            make(rng, x)
            for x in LANGUAGES
            for make in (arithmetic.conversations, logic.conversations)
        ),
    ]
    while True:
        talk = next(rng.choices(streams, (0.6, 0.1, 0.1, 0.1, 0.1))[0])
        if split_of_prompt(talk["messages"][0]["content"]) == "train":
            for turn in talk["messages"]:
                # People say, and paste, what models say; and each sentence is judged by itself.
                for text in {turn["content"]: None, **dict.fromkeys(sentences(turn["content"]))}:
                    yield Example(text, False, "user")
                if turn["role"] == "assistant":
                    yield Example(turn["content"], False, "assistant")


def fit(learnt: Sequence[Example]) -> Classifier:
    """The classifier that examples teach; the same examples always give the same one."""
    return Classifier({role: _descend([e for e in learnt if e.role == role]) for role in ROLES})


def _descend(learnt: Sequence[Example]) -> np.ndarray:
    """Minimise the mean logistic loss by accelerated gradient descent (Nesterov 1983).

    Both classes weigh the same, however many examples they have. Rows have length 1, and so has
    the bias' column, so the gradient's Lipschitz constant is at most (1 + 1) / 4 plus the decay.
    """
    rows = [features(example.text) for example in learnt]
    lengths = np.array([len(row) for row in rows])
    columns, begins = np.concatenate(rows), lengths.cumsum() - lengths
    scale = 1 / np.sqrt(lengths)
    target = np.array([float(example.harmful) for example in learnt])
    share = np.where(target > 0, 0.5 / target.sum(), 0.5 / (len(target) - target.sum()))
    weights = ahead = np.zeros(BUCKETS + 1)
    rate = 1 / (0.5 + DECAY)
    for step in range(STEPS):
        margin = scale * np.add.reduceat(ahead[columns], begins) + ahead[-1]
        error = share * (1 / (1 + np.exp(-margin)) - target)
        slope = DECAY * ahead
        slope[:-1] += np.bincount(columns, np.repeat(scale * error, lengths), BUCKETS)
        slope[-1] += error.sum()
        before, weights = weights, ahead - rate * slope
        ahead = weights + step / (step + 3) * (weights - before)
    return weights.astype(np.float32)


def train(directory: Path) -> Classifier:
    """Learn from ``examples`` and write the classifier with its lineage.

    Raises:
        UserError: Something else is in the directory.
    """
    if not is_free(directory) and not (directory / FILE).is_file():
        raise UserError(
            f"{directory} exists, and holds no safety classifier",
            "Choose another --output.",
        )
    watch = Stopwatch()
    learnt = examples()
    made = fit(learnt)
    lineage = {
        "stage": "safety",
        "fingerprint": fingerprint(),
        "examples": {role: sum(e.role == role for e in learnt) for role in ROLES},
        "settings": {"buckets": BUCKETS, "longest": LONGEST, "steps": STEPS, "decay": DECAY},
    }
    made.save(directory, lineage, Cost(watch.wall_s, watch.cpu_s))
    return made


def fingerprint() -> str:
    """Hash of everything that the classifier depends on: what is learnt, and how."""
    settings = [BUCKETS, LONGEST, STEPS, DECAY, Path(__file__).read_text(encoding="utf-8")]
    return hash_value([settings, [[e.text, e.harmful, e.role] for e in examples()]])


def remembered() -> Classifier:
    """The classifier of this version, trained the first time (seconds) and kept in the cache."""
    from instar.machine import cache_directory  # it brings torch along

    directory = cache_directory() / f"safety-{fingerprint()[:16]}"
    if (directory / FILE).exists():
        return Classifier.load(directory)
    return train(directory)
