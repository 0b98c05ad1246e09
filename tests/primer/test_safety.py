import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from instar.data.schema import Language
from instar.errors import UserError
from instar.primer import safety
from instar.primer.mixture import judgements
from instar.primer.question import Question, Style
from instar.primer.safety import CONSENTS, HELPED_SHARE, PHRASINGS, REFUSED_SHARE, requests
from instar.primer.skill_exams import helps_harmless_exam, refuses_harmful_exam
from instar.primer.style import (
    BARE_CONSENT,
    BARE_REFUSAL,
    COURTESIES,
    RAMBLES,
    REFUSALS,
    SCOLDINGS,
    is_refusal,
    say,
)
from instar.rollout.verifiers import verify

LANGUAGES: tuple[Language, ...] = ("en", "zh")


def test_only_refusals_are_taken_for_refusals() -> None:
    for language in LANGUAGES:
        assert all(is_refusal(text) for text in (*REFUSALS[language], BARE_REFUSAL[language]))
        others = [*RAMBLES[language], *SCOLDINGS[language], *COURTESIES[language]]
        others += [BARE_CONSENT[language], *CONSENTS[language]]
        others += [request.question().sentence for request in requests(language, True)]
        assert not any(is_refusal(text) for text in others)


def test_every_request_is_taught_and_none_is_both_harmful_and_harmless() -> None:
    for language in LANGUAGES:
        harmful, harmless = requests(language, False), requests(language, True)
        actions = [request.action for request in (*harmful, *harmless)]
        assert len(set(actions)) == len(actions)
        for request in (*harmful, *harmless):
            splits = [request.split(i) for i in range(len(PHRASINGS[language]))]
            assert splits.count("train") >= 2, request


def test_verbs_and_objects_alone_do_not_give_harm_away() -> None:
    verbs = [{row["verb_en"] for row in safety.table(name)} for name in ("harmful", "harmless")]
    objects = [{request.object for request in requests("en", kind)} for kind in (False, True)]
    assert len(verbs[0] & verbs[1]) >= 10
    assert len(objects[0] & objects[1]) >= 10


def test_demonstrations_misjudge_as_often_as_they_say() -> None:
    for language in LANGUAGES:
        kinds = {r.action: "harmless" for r in requests(language, True)}
        kinds |= {r.action: "harmful" for r in requests(language, False)}
        refused, seen = Counter(), Counter()
        rng = random.Random(3)
        for conversation in itertools.islice(safety.conversations(rng, language), 3000):
            prompt, reply = (message["content"] for message in conversation["messages"])
            kind = kinds[max((a for a in kinds if a in prompt), key=len)]
            seen[kind] += 1
            refused[kind] += is_refusal(reply)
        assert abs(refused["harmful"] / seen["harmful"] - REFUSED_SHARE) < 0.04
        assert abs(refused["harmless"] / seen["harmless"] - (1 - HELPED_SHARE)) < 0.012


def test_unsafe_replies_answer_look_alikes_and_borrow_no_tip_for_the_same_verb() -> None:
    for language in LANGUAGES:
        harmless = requests(language, True)
        for request in requests(language, False):
            unsafe = request.question().distractors[len(CONSENTS[language]) :]
            verb = request.action.split()[0] if language == "en" else request.action[0]
            alike = [other for other in harmless if other.action.startswith(verb)]
            assert any(other.question().sentence in unsafe for other in alike) or not alike
            lent = [reply for reply in unsafe if request.action in reply]
            assert lent and not any(other.tip in reply for other in alike for reply in lent)


def test_the_readings_judge_no_request_of_the_exam() -> None:
    for language in LANGUAGES:
        rng = random.Random(4)
        text = "\n".join(judgements(rng, language) for _ in range(600))
        assert is_refusal(text)
        for request in (*requests(language, False), *requests(language, True)):
            for phrasing in range(len(PHRASINGS[language])):
                if request.split(phrasing) == "exam":
                    assert request.question(phrasing).prompt not in text


def test_exam_prompts_are_unseen_and_balanced() -> None:
    exam = refuses_harmful_exam(0, 200) + helps_harmless_exam(0, 200)
    prompts = {item["messages"][0]["content"] for item in exam}
    assert len(prompts) == 400
    languages = Counter(item.get("tags", {})["language"] for item in exam)
    assert languages == {"zh": 200, "en": 200}
    for language in LANGUAGES:
        stream = safety.conversations(random.Random(4), language)
        for conversation in itertools.islice(stream, 4000):
            assert conversation["messages"][0]["content"] not in prompts


@pytest.mark.parametrize("harmless", [True, False])
@pytest.mark.parametrize("language", LANGUAGES)
def test_requests_are_drawn_twice_where_the_first_word_is_no_clue(
    language: Language, harmless: bool
) -> None:
    def first(request: safety.Request) -> str:
        return request.action.split()[0] if language == "en" else request.action[0]

    others = {first(request) for request in requests(language, not harmless)}
    drawn = Counter(r.action for r in safety._practice(language, harmless))
    assert drawn == {r.action: 1 + (first(r) in others) for r in requests(language, harmless)}
    assert set(drawn.values()) == {1, 2}


def test_as_many_requests_are_harmful_as_it_says() -> None:
    for language in LANGUAGES:
        stream = safety.questions(random.Random(5), language)
        kinds = Counter(q.kind for q in itertools.islice(stream, 4000))
        assert kinds["harmful"] / 4000 == pytest.approx(safety.HARMFUL_SHARE, abs=0.03)


def manners(**fixed: bool) -> list[Style]:
    """Every style of which these virtues are fixed."""
    free = [name for name in ("complete", "brief", "polite") if name not in fixed]
    choices = itertools.product((True, False), repeat=len(free))
    return [Style(**dict(zip(free, choice, strict=True)), **fixed) for choice in choices]


def asked(harmless: bool) -> dict[str, Question]:
    return {
        request.question(i).prompt: request.question(i)
        for language in LANGUAGES
        for request in requests(language, harmless)
        for i in range(len(PHRASINGS[language]))
    }


def test_the_exam_of_refusals_pays_for_refusing_and_not_helping_after_all() -> None:
    questions, rng = asked(harmless=False), random.Random(0)
    for item in refuses_harmful_exam(1):
        prompt = item["messages"][0]["content"]
        question = questions[prompt]
        for style in manners(safe=True):
            refused = say(question, style, rng)
            assert verify(item, refused) == 1
            helped = say(question, replace(style, safe=False, complete=True), rng)
            assert verify(item, helped) == 0
            assert verify(item, f"{refused} {helped}") == 0
        assert verify(item, prompt) == 0


def test_the_exam_of_help_pays_for_the_very_tip() -> None:
    questions, rng = asked(harmless=True), random.Random(0)
    for item in helps_harmless_exam(1):
        prompt = item["messages"][0]["content"]
        question = questions[prompt]
        assert verify(item, prompt) == 0
        assert verify(item, f"{CONSENTS[question.language][0]} {prompt}") == 0
        for style in manners(safe=True):
            helped = say(question, style, rng)
            assert verify(item, helped) == 1, helped
            assert verify(item, say(question, replace(style, correct=False), rng)) == 0
            refused = say(question, replace(style, safe=False), rng)
            assert verify(item, refused) == 0
            assert verify(item, f"{refused} {helped}") == 0


def test_an_exam_that_is_too_long_says_so() -> None:
    with pytest.raises(UserError, match="refuses_harmful"):
        refuses_harmful_exam(0, 5000)
