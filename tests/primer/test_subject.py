"""The new subject is new: nothing of it is in the primer, and its exam is in no conversation."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

from instar.primer.facts import KINDS, LANGUAGES, entities
from instar.primer.subject import (
    SubjectConfig,
    asked,
    conversations,
    exam,
    subjects,
    templates,
    write_subject,
)
from instar.primer.tables import table
from instar.rollout.verifiers import mark


def test_there_is_enough_to_learn() -> None:
    assert len(subjects()) == 72
    for language in LANGUAGES:
        names = [entity.name[language] for entity in subjects()]
        assert len(set(names)) == len(names)


def test_the_primer_knows_none_of_it() -> None:
    """No entity is one of the primer's, nor a word of its tables."""
    known = {e.name[x].casefold() for kind in KINDS for e in entities(kind) for x in LANGUAGES}
    for name in ("dictionary", "names", "ml_terms", "jobs"):
        known |= {row[x].casefold() for row in table(name) for x in LANGUAGES if x in row}
    assert not known & {e.name[x].casefold() for e in subjects() for x in LANGUAGES}


def test_the_exam_is_in_no_conversation() -> None:
    talks = islice(conversations(random.Random("0 train")), 20_000)
    prompts = " ".join(talk["messages"][0]["content"] for talk in talks)
    items = exam(0, 10_000)
    assert len(items) == 72 * 2 * 2 * 2, "entities, facts, languages, phrasings"
    assert not [i for i in items if i["messages"][0]["content"] in prompts]


def test_every_fact_that_is_asked_is_taught() -> None:
    taught = {t["messages"][1]["content"] for t in islice(conversations(random.Random(0)), 12_000)}
    for entity in subjects():
        for attribute in entity.attributes:
            for language in LANGUAGES:
                phrasing = templates(attribute, language, "exam")[0]
                assert asked(entity, attribute, language, phrasing).sentence in taught


def test_the_right_answers_pass_and_others_do_not() -> None:
    sentences = {
        asked(e, a, x, p).prompt: asked(e, a, x, p)
        for e in subjects()
        for a in e.attributes
        for x in LANGUAGES
        for p in templates(a, x, "exam")
    }
    for item in exam(0, 10_000):
        question = sentences[item["messages"][0]["content"]]
        assert mark(item, question.sentence, True) == 1.0, question.sentence
        wrong = question.sentence.replace(question.answer, question.distractors[0])
        assert mark(item, wrong, True) == 0.0, wrong


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    config = SubjectConfig(conversations=30, valid=5, exam_items=20)
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert write_subject(config, 3, tmp_path / name) == {
            "conversations": 30,
            "valid": 5,
            "exams": 20,
        }
        written.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
