"""The safety filter: rules first, then a small classifier; every decision has its reason.

It stands before the model and after it, and can be switched on where people are served whom one
does not know (``--safety``). A filter of this size knows the harm that it was taught, in Chinese
and English, said plainly: it is a fence, not a wall, and the model's own refusals stand behind it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from instar.data.schema import Message
from instar.errors import UserError
from instar.primer.style import is_refusal
from instar.serving.harm import (
    SENTENCE_END,
    Classifier,
    Growing,
    Role,
    normalised,
    remembered,
    sentences,
)

THRESHOLD = 0.5
"""Texts at least so likely to be harmful are stopped; the classes weighed the same in training."""

REACH = 256
"""Characters before a sentence in which a rule's words may begin that end in it: more than the
longest of them have, and few enough to be looked through once more for every sentence."""

STOPPED: dict[Role, tuple[str, str]] = {
    "user": (
        "I can't help with that. Please ask me something else.",
        "这个我不能帮忙，请换个话题。",
    ),
    "assistant": (
        "I stopped this reply, because it might do harm.",
        "这个回答可能有害，已被拦下。",
    ),
}
"""What is said instead, in English and Chinese, of a request and of a reply."""

_CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Verdict:
    """What the filter decides about a text.

    Attributes:
        allowed: Whether it may pass.
        reason: ``rule: NAME`` or ``classifier`` where it may not; ``nothing found`` where it may.
        score: Probability of harm; 1 where a rule stops it.
    """

    allowed: bool
    reason: str
    score: float

    @property
    def weight(self) -> tuple[bool, float]:
        """Greater for the worse of two: what stops before what passes, then by the score."""
        return not self.allowed, self.score


class Rule(NamedTuple):
    """A pattern that stops what it is found in; ``role`` is whose texts it reads, or ``both``."""

    reason: str
    role: str
    pattern: re.Pattern[str]


@cache
def rules() -> tuple[Rule, ...]:
    """The rules of ``safety_rules.tsv``, written for normalised text.

    Raises:
        UserError: A line has not three cells, or its pattern is no regular expression.
    """
    file = files("instar.serving") / "safety_rules.tsv"
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[1:], start=2):
        try:
            reason, role, pattern = line.split("\t")
            found.append(Rule(reason, role, re.compile(pattern)))
        except (ValueError, re.error) as error:
            raise UserError(
                f"safety_rules.tsv, line {number}: {error}",
                "Write reason, role and pattern, with single tabs between them.",
            ) from None
    return tuple(found)


class Filter:
    """Decides what may be asked and what may be answered.

    Args:
        classifier: Judges what no rule stops; None leaves it to the rules.
        log: File to which every decision is added as a line of JSON; None keeps no record.
        log_text: Write what was said into the log as well. People's words are their own: leave
            it out unless they know.
        threshold: Stop what is at least so likely to be harmful.

    Raises:
        UserError: The threshold is not a probability.
    """

    def __init__(
        self,
        classifier: Classifier | None,
        log: Path | None = None,
        log_text: bool = False,
        threshold: float = THRESHOLD,
    ) -> None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold is {threshold}", "Choose one above 0, at most 1.")
        self.classifier, self.threshold = classifier, threshold
        self.log, self.log_text, self._lock = log, log_text, Lock()

    @classmethod
    def load(cls, directory: Path | None = None, log: Path | None = None) -> Filter:
        """A filter with the classifier in a directory, or else with the one of this version.

        Without a directory it is trained at the first call (seconds), and kept in the cache.

        Raises:
            UserError: The directory holds no classifier.
        """
        return cls(Classifier.load(directory) if directory else remembered(), log)

    def check(self, text: str, role: str = "user") -> Verdict:
        """Judge a text, and log the decision.

        Args:
            text: A request, or a reply as far as it is written.
            role: Who says it: ``assistant``, or anybody else, who is read like a user.
        """
        verdict = self.judge(text, role)
        self.record(text, role, verdict)
        return verdict

    def check_turns(self, turns: Sequence[Message]) -> Verdict:
        """Judge every turn of a request, and log the decision about the worst.

        Args:
            turns: One at least. Clients write them all, those of the assistant too.
        """
        judged = [(self.judge(turn["content"], turn["role"]), turn) for turn in turns]
        worst, turn = max(judged, key=lambda pair: pair[0].weight)
        self.record(turn["content"], turn["role"], worst)
        return worst

    def judge(self, text: str, role: str = "user") -> Verdict:
        """Judge a text without a record."""
        speaker: Role = "assistant" if role == "assistant" else "user"
        if speaker == "assistant":
            # To name a deed while refusing it does no harm; what stands beside the refusal may.
            text = " ".join(part for part in sentences(text) if not is_refusal(part))
        read = normalised(text)
        score = self.classifier.score(text, speaker) if self.classifier and read else 0.0
        return self.verdict(read, speaker, score)

    def verdict(self, read: str, speaker: Role, score: float, start: int = 0) -> Verdict:
        """What rules and classifier come to.

        Args:
            read: Normalised text.
            speaker: Who says it.
            score: What the classifier makes of it.
            start: Where in the text the rules begin to look.
        """
        for rule in rules():
            if rule.role in (speaker, "both") and rule.pattern.search(read, start):
                return Verdict(False, f"rule: {rule.reason}", 1.0)
        if score >= self.threshold:
            return Verdict(False, "classifier", score)
        return Verdict(True, "nothing found", score)

    def record(self, text: str, role: str, verdict: Verdict) -> None:
        """Add a decision to the log, if there is one."""
        if self.log is None:
            return
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "role": role,
            "allowed": verdict.allowed,
            "reason": verdict.reason,
            "score": round(verdict.score, 4),
            "characters": len(text),
        }
        if self.log_text:
            line["text"] = text
        with self._lock:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


class Gate:
    """Lets a streamed reply through, sentence by sentence, each when all up to it was judged.

    Every sentence is judged by itself and as the end of all before it, and costs no more the more
    there is before it.

    Args:
        filter_: Judges; its log gets one line a reply.

    Attributes:
        verdict: The worst judgement. Where it does not allow the text, nothing more comes through.
    """

    def __init__(self, filter_: Filter) -> None:
        self.filter, self.verdict = filter_, Verdict(True, "nothing found", 0.0)
        self._text, self._shown, self._recorded = "", 0, False
        classifier = filter_.classifier
        self._growing = Growing(classifier.weights["assistant"]) if classifier else None
        self._before = ""

    def push(self, piece: str) -> str:
        """Take more of the reply in and return what may be shown by now."""
        self._text += piece
        *ended, begun = SENTENCE_END.split(piece)
        return self._pass(len(self._text) - len(begun)) if ended else ""

    def flush(self, piece: str = "") -> str:
        """The end of the reply: the rest of it, if it may be shown. Logs the decision, once."""
        self._text += piece
        rest = self._pass(len(self._text))
        self.close()
        return rest

    def close(self) -> None:
        """Log the decision, if it is not yet; what was not judged is not shown."""
        if not self._recorded:
            self._recorded = True
            self.filter.record(self._text, "assistant", self.verdict)

    def _pass(self, ready: int) -> str:
        for sentence in sentences(self._text[self._shown : ready]):
            if self.verdict.allowed:
                alone = self.filter.judge(sentence, "assistant")
                judged = (self.verdict, alone, self._with_all_before(sentence))
                self.verdict = max(judged, key=lambda verdict: verdict.weight)
        if not self.verdict.allowed:
            return ""
        passed, self._shown = self._text[self._shown : ready], ready
        return passed

    def _with_all_before(self, sentence: str) -> Verdict:
        """What is said by a sentence together with those before it, refusals left out."""
        read = "" if is_refusal(sentence) else normalised(sentence)
        if not read:
            return self.verdict
        score = self._growing.add(read) if self._growing else 0.0
        before = self._before
        # Where a rule begins to look, it may look back: there are letters left before that place.
        self._before = f"{before}{read} "[-2 * REACH :]
        return self.filter.verdict(before + read, "assistant", score, max(0, len(before) - REACH))


def filter_of(safety: bool, log: Path | None) -> Filter | None:
    """The filter that `--safety` asks for, if it does; its classifier as ``Filter.load`` has it.

    Args:
        safety: Whether there is to be one.
        log: Where it writes its decisions (`--safety-log`).

    Raises:
        UserError: There is a place for its decisions, and no filter.
    """
    if log and not safety:
        raise UserError(
            f"--safety-log is {log}, and without --safety nothing is decided",
            "Add --safety, or leave it out.",
        )
    return Filter.load(log=log) if safety else None


def instead(text: str, role: Role) -> str:
    """What to say in place of a stopped text, in the language in which that was written."""
    return STOPPED[role][1 if _CHINESE.search(text) else 0]
