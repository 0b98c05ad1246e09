"""The tables are true as far as an independent source says, and questions are well formed."""

import pytest

from instar.errors import UserError
from instar.primer.facts import (
    HELD_OUT_KINDS,
    KINDS,
    LANGUAGES,
    Fact,
    entities,
    held_out,
    known_values,
    phrasings,
    question,
    state,
    statements,
    values,
    with_article,
    wrong_values,
)
from instar.primer.tables import fraction, table
from instar.primer.translation import words

PERIODIC_TABLE = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn "
    "Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn "
    "Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re "
    "Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U "
)

FACTS = [
    Fact(entity, attribute, language)
    for kind in KINDS
    for entity in entities(kind)
    for attribute in entity.attributes
    for language in LANGUAGES
]


def test_atomic_numbers_follow_the_periodic_table():
    for element in entities("element"):
        symbol, number = (element.attributes[a]["en"] for a in ("symbol", "number"))
        assert PERIODIC_TABLE.split()[int(number) - 1] == symbol


def test_values_translate_one_to_one():
    for kind in KINDS:
        for attribute in entities(kind)[0].attributes:
            pairs = {tuple(e.attributes[attribute][x] for x in LANGUAGES) for e in entities(kind)}
            assert len(pairs) == len(values(kind, attribute, "en"))
            assert len(pairs) == len(values(kind, attribute, "zh"))


def test_every_country_has_its_own_capital_and_every_name_is_used_once():
    assert len(values("country", "capital", "en")) == len(entities("country"))
    for language in LANGUAGES:
        names = [e.name[language] for kind in KINDS for e in entities(kind)]
        names += [w[language] for w in words()]
        assert len(set(names)) == len(names)


def test_about_a_third_of_each_kind_is_held_out_and_always_the_same():
    for kind in HELD_OUT_KINDS:
        share = sum(map(held_out, entities(kind))) / len(entities(kind))
        assert 0.3 < share < 0.4
    by_name = {e.name["en"]: e for e in entities("country")}
    assert held_out(by_name["Peru"]) and not held_out(by_name["France"])  # whatever the machine
    assert not any(held_out(e) for kind in ("planet", "season") for e in entities(kind))


def test_fraction_is_uniform():
    shares = sorted(fraction(str(i)) for i in range(2000))
    gap = max(abs(x - i / 2000) for i, x in enumerate(shares))
    assert gap < 0.0431  # Kolmogorov-Smirnov, p = 0.001: 1.95 / sqrt(2000) = 0.0436


def test_facts_are_stated_in_a_dozen_ways_and_asked_in_several():
    for kind in HELD_OUT_KINDS:
        for attribute in entities(kind)[0].attributes:
            for language in LANGUAGES:
                assert len(set(statements(attribute, language))) >= 12
                train = set(phrasings(attribute, language, "train"))
                exam = set(phrasings(attribute, language, "exam"))
                assert len(train) >= 4 and len(exam) >= 2 and not train & exam


def test_every_statement_names_the_entity_and_the_value():
    for fact in FACTS:
        for template in statements(fact.attribute, fact.language):
            text = state(fact, template).lower()
            assert fact.name.lower() in text and fact.value.lower() in text
            assert "?" not in text and "？" not in text


def test_a_question_in_words():
    france = next(e for e in entities("country") if e.name["en"] == "France")
    asked = question(france, "capital", "zh", phrasings("capital", "zh")[0])
    assert asked.prompt == "法国的首都是哪里？"
    assert (asked.answer, asked.sentence) == ("巴黎", "法国的首都是巴黎。")
    tiger = next(e for e in entities("animal") if e.name["en"] == "tiger")
    asked = question(tiger, "class", "en", phrasings("class", "en")[0])
    assert asked.sentence == "The tiger is a mammal."
    assert asked.distractors == ("bird", "fish", "insect", "reptile", "amphibian")


def test_wrong_answers_are_wrong_and_do_not_hide_in_the_right_sentence():
    for fact in FACTS:
        sentence = state(fact, statements(fact.attribute, fact.language)[0])
        wrong = wrong_values(fact)
        assert wrong and fact.value not in wrong
        assert not [w for w in wrong if w in sentence]
    romania = next(e for e in entities("country") if e.name["en"] == "Romania")
    assert "罗马" not in wrong_values(Fact(romania, "capital", "zh"))


def test_distractors_of_training_questions_are_never_answers_of_the_exam_only():
    for fact in FACTS:
        phrasing = phrasings(fact.attribute, fact.language)[0]
        asked = question(fact.entity, fact.attribute, fact.language, phrasing)
        known = known_values(fact.entity.kind, fact.attribute, fact.language)
        assert set(asked.distractors) <= known


def test_articles():
    assert with_article("insect") == "an insect"
    assert with_article("umbrella") == "an umbrella"
    assert with_article("bird") == "a bird"


def test_an_unknown_table_is_a_user_error():
    with pytest.raises(UserError, match="mountains"):
        table("mountains")
