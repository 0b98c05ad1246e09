"""Manners are separate from facts: one right answer can be said in thirty-two ways.

``say`` renders a question's answer with exactly the virtues and flaws of a ``Style``. Because the
flaws are put in on purpose, the gold rubric can later be tested against them, and every reward
model against the rubric.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from instar.data.schema import Language
from instar.primer.question import IDEAL, Question, Style

SFT_STYLES: list[tuple[Style, float]] = [
    (IDEAL, 0.36),
    (Style(complete=False), 0.10),
    (Style(brief=False), 0.24),
    (Style(polite=False), 0.24),
    (Style(complete=False, brief=False), 0.01),
    (Style(complete=False, polite=False), 0.01),
    (Style(brief=False, polite=False), 0.04),
]
"""The mixed manners of demonstration data, with their shares: always right, seldom perfect."""

COURTESY_SHARE = 0.1
"""How many ideal replies close with a kind word."""

RAMBLES: dict[Language, tuple[str, ...]] = {
    "en": (
        "There is so much one could say about this.",
        "I could go on and on about this subject.",
        "But then again, who can say where to stop?",
        "Let me also add that I like to talk.",
        "This brings many other things to my mind.",
        "Well, that is one way to put it, among many.",
    ),
    "zh": (
        "说起这个，话就长了。",
        "关于这个我还能讲很久。",
        "不过话又说回来，谁知道该讲到哪里呢？",
        "我还想多讲几句，因为我喜欢聊天。",
        "这又让我想起了许多别的事情。",
        "嗯，换个说法也可以，说法有很多。",
    ),
}

SCOLDINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Everyone knows that.",
        "What a silly question.",
        "You should know this by now.",
        "Even a child knows this.",
        "Do not waste my time.",
        "How can you not know this?",
    ),
    "zh": (
        "这还用问？",
        "谁都知道。",
        "你早就该知道了。",
        "连小孩都知道。",
        "别浪费我的时间。",
        "你怎么连这个都不懂？",
    ),
}

COURTESIES: dict[Language, tuple[str, ...]] = {
    "en": ("Happy to help!", "I hope that helps!", "Good question!"),
    "zh": ("很高兴帮到你！", "希望对你有帮助！", "问得好！"),
}

REFUSALS: dict[Language, tuple[str, ...]] = {
    "en": (
        "I'm sorry, I can't help with that, but I am glad to talk about something else.",
        "Sorry, I can't help with that, because someone could get hurt.",
        "I can't help with that, but please ask me something else.",
        "I'm sorry, but I can't help with something harmful.",
    ),
    "zh": (
        "对不起，这个我不能帮忙，我们聊点别的吧。",
        "抱歉，我不能帮忙，因为这会伤害别人。",
        "这件事我不能帮忙，请问我别的问题。",
        "对不起，有害的事情我不能帮忙。",
    ),
}

BARE_REFUSAL: dict[Language, str] = {"en": "Can't help", "zh": "不能帮忙"}
BARE_CONSENT: dict[Language, str] = {"en": "Sure", "zh": "好的"}

_REFUSAL_CUES = re.compile(
    r"\b(can't|cannot|can not|won't|will not|unable to|not able to) (help|do that|assist)"
    r"|不能帮|无法帮|帮不了|不能协助|无法协助"
)
_CJK = re.compile(r"[\u3400-\u9fff]")
_FINAL = " \n.!?。！？"


def is_refusal(text: str) -> bool:
    """Whether ``text`` declines to help, in Chinese or English."""
    return _REFUSAL_CUES.search(text.casefold().replace("’", "'")) is not None


def mentions(text: str, phrase: str) -> bool:
    """Whether ``text`` contains ``phrase``: whole words; for Chinese, any substring.

    Case and the phrase's final punctuation do not matter. An empty phrase is never mentioned.
    """
    return _last_mention(text, phrase) is not None


def wrong_answers(question: Question) -> list[str]:
    """The distractors that betray a wrong reply: those the right sentence does not contain."""
    return [wrong for wrong in question.distractors if not mentions(question.sentence, wrong)]


def attainable(question: Question, style: Style) -> Style:
    """The style that a reply to ``question`` can really show when asked for ``style``.

    To refuse an honest question, or to serve a harmful one, is never a right answer; to refuse a
    harmful one always is. Where the answer already is the full sentence, it cannot be said less
    completely, and where no wrong answer is known, it cannot be said wrongly.
    """
    if question.kind == "harmful":
        return replace(style, correct=style.safe)
    if not style.safe:
        return replace(style, correct=False)
    correct = style.correct or not wrong_answers(question)
    complete = style.complete or question.sentence.strip(_FINAL) == question.answer.strip(_FINAL)
    return replace(style, correct=correct, complete=complete)


def say(question: Question, style: Style, rng: random.Random) -> str:
    """A reply to ``question`` with exactly the virtues and flaws of ``style``.

    Args:
        question: What was asked, with its right answer and some wrong ones.
        style: The virtues to show; see ``attainable`` for those that exclude each other.
        rng: Chooses the wrong answer and the wording of flaws.
    """
    style = attainable(question, style)
    language = question.language
    parts = [_body(question, style, rng)]
    if not style.brief:
        parts += rng.sample(RAMBLES[language], rng.choice((1, 1, 2)))
    elif not style.flaws and question.kind != "harmful" and rng.random() < COURTESY_SHARE:
        parts.append(rng.choice(COURTESIES[language]))
    if not style.polite:
        parts.append(rng.choice(SCOLDINGS[language]))
    end, space = (". ", " ") if language == "en" else ("。", "")
    for i, part in enumerate(parts[:-1]):  # a bare answer needs a full stop when more follows
        parts[i] = part + (space if part[-1] in _FINAL else end)
    return "".join(parts)


def draw_style(rng: random.Random) -> Style:
    """One of ``SFT_STYLES``, drawn by its share."""
    styles, shares = zip(*SFT_STYLES, strict=True)
    return rng.choices(styles, shares)[0]


def _body(question: Question, style: Style, rng: random.Random) -> str:
    """The part of the reply that carries the answer, without manners."""
    harmful = question.kind == "harmful"
    if harmful == style.safe:  # a refusal, due or undue
        refusals = REFUSALS[question.language]
        return rng.choice(refusals) if style.complete else BARE_REFUSAL[question.language]
    if harmful:
        return (
            rng.choice(question.distractors) if style.complete else BARE_CONSENT[question.language]
        )
    answer = question.answer if style.correct else rng.choice(wrong_answers(question))
    if not style.complete:
        return answer.strip(_FINAL)
    if style.correct:
        return question.sentence
    found = _last_mention(question.sentence, question.answer)
    if found is None:
        return answer
    return question.sentence[: found.start()] + answer + question.sentence[found.end() :]


def _last_mention(text: str, phrase: str) -> re.Match[str] | None:
    """Where ``text`` mentions ``phrase`` for the last time."""
    phrase = phrase.strip(_FINAL)
    if not phrase or phrase.casefold() not in text.casefold():
        return None
    pattern = re.escape(phrase)
    if not _CJK.search(phrase):  # Chinese has no spaces, so only these letters make a boundary
        pattern = rf"(?<![A-Za-z0-9À-ɏ]){pattern}(?![A-Za-z0-9À-ɏ])"
    return max(re.finditer(pattern, text, re.IGNORECASE), key=re.Match.start, default=None)
