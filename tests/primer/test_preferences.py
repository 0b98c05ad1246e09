import itertools
import random
from collections import Counter

import pytest

from instar.errors import UserError
from instar.primer import arithmetic, logic, safety
from instar.primer.annotators import GOLD, Annotator, agreement, cohen_kappa, fleiss_kappa
from instar.primer.preferences import (
    UNSEEN_COMBINATIONS,
    JudgedPair,
    combination,
    flaws_of,
    preferences,
    question_mix,
    style_of,
    unseen_combinations,
    unseen_pairs,
)
from instar.primer.question import Question, Style
from instar.primer.rubric import Score, from_record, score

N = 1500


def questions(seed: int):
    rng = random.Random(seed)
    pools = [
        (pool.questions(rng, language), 1.0)
        for pool in (arithmetic, logic, safety)
        for language in ("en", "zh")
    ]
    return question_mix(rng, pools)


def take(stream, n: int = N) -> list[JudgedPair]:
    return list(itertools.islice(stream, n))


def scores(pair: JudgedPair) -> tuple[Score, Score]:
    question = from_record(pair["question"])
    return score(question, pair["chosen"]), score(question, pair["rejected"])


def style(found: Score) -> Style:
    names = ("correctness", "completeness", "brevity", "manners", "safety")
    return Style(*(bool(getattr(found, name)) for name in names))


@pytest.fixture(scope="module")
def train() -> list[JudgedPair]:
    return take(preferences(questions(0), random.Random(0), [Annotator(noise=0.05)]))


@pytest.fixture(scope="module")
def new_pairs() -> list[JudgedPair]:
    return take(unseen_pairs(questions(1), random.Random(1)), 500)


@pytest.fixture(scope="module")
def new_combinations() -> list[JudgedPair]:
    return take(unseen_combinations(questions(2), random.Random(2)), 500)


def test_labels_are_gold_but_for_the_annotators_noise(train: list[JudgedPair]) -> None:
    wrong = sum(a.total < b.total for a, b in map(scores, train))
    assert 0.03 < wrong / N < 0.07
    assert not any(a.total == b.total for a, b in map(scores, train))


def test_test_pairs_have_gold_labels(
    new_pairs: list[JudgedPair], new_combinations: list[JudgedPair]
) -> None:
    assert all(a.total > b.total for a, b in map(scores, new_pairs + new_combinations))
    assert {pair.get("group") for pair in new_pairs} == {"unseen_pairs"}
    assert {pair.get("group") for pair in new_combinations} == {"unseen_combinations"}


def test_training_never_shows_what_the_tests_ask(
    train: list[JudgedPair], new_pairs: list[JudgedPair], new_combinations: list[JudgedPair]
) -> None:
    def shown(pairs: list[JudgedPair]) -> Counter:
        return Counter(combination(*map(style, scores(pair))) for pair in pairs)

    assert not shown(train).keys() & UNSEEN_COMBINATIONS
    assert not shown(new_pairs).keys() & UNSEEN_COMBINATIONS
    assert shown(new_combinations).keys() == UNSEEN_COMBINATIONS
    prompts = {pair["messages"][0]["content"] for pair in train}
    tested = {pair["messages"][0]["content"] for pair in new_pairs + new_combinations}
    assert not prompts & tested


def test_every_single_virtue_is_taught(train: list[JudgedPair]) -> None:
    alone = Counter()
    for a, b in map(scores, train):
        differing = flaws_of(style(a)) ^ flaws_of(style(b))
        assert 1 <= len(differing) <= 3
        if len(differing) == 1:
            alone.update(differing)
    assert alone.keys() == {"correct", "complete", "brief", "polite", "safe"}
    assert min(alone.values()) > 40


def test_ordinary_pairs_differ_in_correctness_about_a_third_of_the_time() -> None:
    pool = logic.questions(random.Random(5), "en")
    pairs = take(preferences(pool, random.Random(5), [GOLD]), 1000)
    differ = sum(
        a.correctness != b.correctness and a.safety == b.safety for a, b in map(scores, pairs)
    )
    # First change 0.3 of the time; else the second may be it: 0.3 + 0.67 * 0.35 / 3 or so.
    assert 0.31 < differ / len(pairs) < 0.43


def test_sums_are_chosen_for_being_right_direct_or_worked() -> None:
    pool = arithmetic.questions(random.Random(5), "en")
    pairs = take(preferences(pool, random.Random(5), [GOLD]), 600)
    assert all(a.correctness > b.correctness for a, b in map(scores, pairs))
    worked = sum(":" in pair["chosen"] for pair in pairs) / len(pairs)
    direct = sum(" = " in pair["chosen"] for pair in pairs) / len(pairs)
    assert worked > 0.35
    assert direct > 0.2


def test_length_tells_little_on_its_own(train: list[JudgedPair]) -> None:
    extra = [len(pair["chosen"]) - len(pair["rejected"]) for pair in train]
    longer = sum(n > 0 for n in extra) / sum(n != 0 for n in extra)
    assert 0.35 < longer < 0.65


def test_styles_and_flaws_are_inverse() -> None:
    assert flaws_of(style_of(["brief", "polite"])) == {"brief", "polite"}
    assert flaws_of(Style(correct=False, safe=False)) == {"safe"}


QUESTION = Question("Where is Rome?", "Italy", "Rome is in Italy.", ("Spain",), "en", "knowledge")


def test_biases_move_the_choice() -> None:
    rng = random.Random(0)
    good, rude = "Rome is in Italy.", "Rome is in Italy. Everyone knows that."
    assert GOLD.prefers(QUESTION, good, rude, rng)
    assert not GOLD.prefers(QUESTION, rude, good, rng)
    # 21 more characters at 0.1 a ten are worth 0.21, more than the 0.1 that rudeness costs.
    assert not Annotator(noise=0, length_bias=0.1).prefers(QUESTION, good, rude, rng)
    assert Annotator(noise=0, position_bias=0.2).prefers(QUESTION, rude, good, rng)
    assert not Annotator(noise=1).prefers(QUESTION, good, rude, rng)


def test_kappas_by_hand() -> None:
    # Cohen's first textbook table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no.
    # p_o = 35/50 = 0.7; p_e = 0.5*0.6 + 0.5*0.4 = 0.5; kappa = 0.4.
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    # Three raters, two items: (3, 0) and (1, 2). P = (1 + 1/3) / 2 = 2/3;
    # shares 4/6 and 2/6, P_e = 20/36; kappa = (2/3 - 5/9) / (4/9) = 1/4.
    assert fleiss_kappa([(3, 0), (1, 2)]) == pytest.approx(0.25)
    assert cohen_kappa([True, True], [True, True]) == 1


def test_noise_lowers_agreement_as_probability_says() -> None:
    rng = random.Random(0)
    # Balanced: each comparison is asked both ways round.
    pairs = [(QUESTION, "Rome is in Italy.", "Spain"), (QUESTION, "Spain", "Rome is in Italy.")]
    pairs *= 3000
    # Two raters who flip a share e agree with p = 1 - 2e(1-e); kappa = 2p - 1 = (1 - 2e)^2.
    for raters in (2, 3):
        found = agreement([Annotator(noise=0.1)] * raters, pairs, rng)
        assert found == pytest.approx(0.64, abs=0.04)
    with pytest.raises(UserError, match="at least two"):
        agreement([GOLD], pairs, rng)
    with pytest.raises(UserError, match="noise"):
        Annotator(noise=2)
