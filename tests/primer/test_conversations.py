"""Nothing that an exam asks is ever asked in training."""

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from instar.data.schema import Task
from instar.errors import UserError
from instar.primer.conversations import conversations, qa_pool
from instar.primer.facts import HELD_OUT_KINDS, LANGUAGES, entities, held_out, phrasings
from instar.primer.formats import requests
from instar.primer.language_exams import format_exam, knowledge_exam, translation_exam
from instar.primer.style import mentions
from instar.primer.translation import Parallel, sentences, words
from instar.rollout.verifiers import verify

EXAMS = (knowledge_exam, translation_exam, format_exam)
CONVERSATIONS = list(islice(conversations(random.Random(0)), 8000))
QUESTIONS = list(islice(qa_pool(random.Random(0)), 4000))
PROMPTS = {m["content"] for c in CONVERSATIONS for m in c["messages"] if m["role"] == "user"}
PROMPTS |= {q.prompt for q in QUESTIONS}
EVERYTHING = "\n".join(
    [m["content"] for c in CONVERSATIONS for m in c["messages"]]
    + [" | ".join((q.prompt, q.sentence, *q.distractors)) for q in QUESTIONS]
)


def test_no_exam_prompt_is_ever_asked():
    for exam in EXAMS:
        asked = {item["messages"][0]["content"] for seed in range(3) for item in exam(seed)}
        assert not asked & PROMPTS


def test_no_held_out_entity_is_ever_named():
    hidden = [e for kind in HELD_OUT_KINDS for e in entities(kind) if held_out(e)]
    assert hidden
    for entity in hidden:
        assert entity.name["zh"] not in EVERYTHING
        assert not re.search(rf"\b{entity.name['en']}\b", EVERYTHING, re.IGNORECASE), entity.name


def test_no_held_out_word_is_ever_asked_for():
    for word in words("exam"):
        for target, source in (("zh", "en"), ("en", "zh")):
            for language in LANGUAGES:
                for phrasing in phrasings(f"word_{target}", language):
                    assert phrasing.format(name=word[source]) not in PROMPTS


def test_no_examined_sentence_is_ever_translated():
    for sentence in islice(sentences(random.Random(1), "exam"), 500):
        assert sentence.en not in EVERYTHING and sentence.zh not in EVERYTHING


def test_a_chinese_sentence_has_one_translation():
    drawn: dict[str, Parallel] = {}
    for sentence in islice(sentences(random.Random(2), "train", every_word=True), 20_000):
        assert drawn.setdefault(sentence.zh, sentence) == sentence


@pytest.mark.parametrize("exam", EXAMS)
def test_an_exam_is_balanced_repeatable_and_free_of_repeats(exam):
    items = exam(0)
    assert items == exam(0) != exam(1)
    assert len({i["messages"][0]["content"] for i in items}) == len(items) == 400
    count = Counter(i["tags"]["language"] for i in items)
    assert abs(count["en"] - count["zh"]) <= 2


def test_an_exam_that_is_asked_for_too_much_says_so():
    with pytest.raises(UserError, match="knowledge"):
        knowledge_exam(0, 1_000_000)


def test_right_sentences_pass_the_knowledge_exam_and_wrong_ones_fail():
    for item in knowledge_exam(0):
        assert verify(item, f"It is {item['answer']}.") == 1.0
        assert not any(verify(item, f"It is {option}.") for option in item.get("options", []))


def test_training_replies_to_formats_would_pass_the_exam():
    verifiers = {"one_word": "one_word", "json": "json_answer", "list": "comma_list"}
    for language in LANGUAGES:
        for request in islice(requests(random.Random(0), language, "train"), 500):
            if request.form == "sentence":
                assert mentions(request.reply, request.answer)
            else:
                task: Task = {
                    "messages": [],
                    "verifier": verifiers[request.form],
                    "answer": request.answer,
                }
                assert verify(task, request.reply) == 1.0
            if request.form == "json":
                assert json.loads(request.reply) == {"answer": request.answer}


def test_conversations_alternate_and_end_with_the_assistant():
    for conversation in CONVERSATIONS:
        roles = [m["role"] for m in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m["content"] and "{value}" not in m["content"] for m in conversation["messages"])


def test_what_the_user_said_is_remembered():
    remembered = 0
    for conversation in CONVERSATIONS:
        turns = [m["content"] for m in conversation["messages"]]
        said = re.fullmatch(r"(?:My name is|我叫)\s?(\S+)[.。]", turns[0])
        if said:
            assert said[1] in turns[-1]
            remembered += 1
    assert remembered > 20


def test_same_seed_same_conversations():
    again = list(islice(conversations(random.Random(0)), 500))
    assert again == CONVERSATIONS[:500]


def test_questions_carry_their_answer():
    for asked in QUESTIONS:
        assert mentions(asked.sentence, asked.answer)
        assert asked.distractors and asked.answer not in asked.distractors
    assert {q.language for q in QUESTIONS} == set(LANGUAGES)
