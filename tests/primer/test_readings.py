"""Readings state everything, evenly, and ask for nothing."""

import random
import re
from itertools import islice

import pytest

from instar.primer.facts import HELD_OUT_KINDS, LANGUAGES, Fact, entities
from instar.primer.language_exams import format_exam, knowledge_exam, translation_exam
from instar.primer.readings import corpus, readings
from instar.primer.stories import story
from instar.primer.translation import words

TRAIN = list(corpus(seed=0, n_bytes=1_500_000))
VALIDATION = list(corpus(seed=1, n_bytes=50_000, part="valid"))
EXAM = list(corpus(seed=1, n_bytes=50_000, part="exam"))
TEXT = "\n".join(d["text"] for d in TRAIN)


def test_same_seed_same_documents_and_the_size_that_was_asked_for():
    assert list(corpus(3, 20_000)) == list(corpus(3, 20_000))
    assert list(corpus(3, 20_000)) != list(corpus(4, 20_000))
    assert 1_500_000 <= len(TEXT.encode()) < 1_510_000
    assert {d.get("language") for d in TRAIN[:2]} == set(LANGUAGES)


def test_no_document_is_in_two_splits_even_under_one_seed():
    same_seed = list(corpus(seed=0, n_bytes=50_000, part="valid"))
    train, exam = ({d["text"] for d in part} for part in (TRAIN, EXAM))
    valid = {d["text"] for d in VALIDATION + same_seed}
    assert not train & valid and not train & exam and not valid & exam


def test_every_fact_is_stated_in_several_documents():
    for language in LANGUAGES:
        texts = [d["text"].lower() for d in TRAIN if d.get("language") == language]
        for kind in HELD_OUT_KINDS:
            for entity in entities(kind):
                name = entity.name[language].lower()
                about = [t for t in texts if name in t]
                for attribute in entity.attributes:
                    value = Fact(entity, attribute, language).value.lower()
                    assert sum(value in t for t in about) >= 5, (name, attribute)


def test_entities_are_met_equally_often():
    text = " ".join(d["text"] for d in TRAIN if d.get("language") == "en").lower()
    elsewhere = {"Mexico", "gold"}  # in Mexico City, and in the stories; so are some animals
    for kind in ("country", "element"):
        names = [e.name["en"] for e in entities(kind) if e.name["en"] not in elsewhere]
        counts = [len(re.findall(rf"\b{re.escape(name.lower())}\b", text)) for name in names]
        mean = sum(counts) / len(counts)
        assert min(counts) > 0.6 * mean and max(counts) < 1.5 * mean


def test_no_exam_prompt_and_no_examined_sentence_is_ever_read():
    for exam in (knowledge_exam(0), translation_exam(0), format_exam(0)):
        for item in exam:
            assert item["messages"][0]["content"] not in TEXT
            if item["verifier"] == "exact_text":
                assert item["answer"] not in TEXT
    assert "?" not in TEXT and "？" not in TEXT


def test_all_words_are_read():
    for word in words():
        assert word["zh"] in TEXT and re.search(rf"\b{word['en']}\b", TEXT, re.IGNORECASE)


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_sources_make_up_two_fifths(language):
    stream = readings(random.Random(0), language, extra=[lambda rng, x: f"extra {x}"])
    share = sum(d["text"] == f"extra {language}" for d in islice(stream, 2000)) / 2000
    assert 0.36 < share < 0.42  # three standard deviations are 0.03


def test_documents_are_short():
    english = [len(d["text"].split()) for d in TRAIN if d.get("language") == "en"]
    assert 40 < sum(english) / len(english) < 100
    assert max(english) <= 200


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_story_fills_all_its_slots(language):
    for seed in range(200):
        assert "{" not in story(random.Random(seed), language)
