import pytest

from instar.data.schema import Task
from instar.errors import UserError
from instar.rollout.verifiers import mark, verify


def task(verifier: str, answer: str, *options: str) -> Task:
    return {
        "messages": [{"role": "user", "content": "?"}],
        "verifier": verifier,
        "answer": answer,
        "options": list(options),
    }


@pytest.mark.parametrize(
    ("reply", "paid"),
    [
        ("47 + 38 = 85.", 1),
        ("47 + 38: ones 7+8=15, tens 4+3+1=8, so 85.", 1),
        ("47 + 38：个位7+8=15，十位4+3+1=8，得85。", 1),
        ("85", 1),
        ("100-15=85", 1),
        ("85 is less than 90", 0),
        ("85.5", 0),
        ("185", 0),
        ("-85", 0),
        ("eighty-five", 0),
        ("", 0),
    ],
)
def test_integer_reads_the_last_number(reply: str, paid: float) -> None:
    assert verify(task("integer", "85"), reply) == paid


def test_integer_knows_signs_and_thousands() -> None:
    assert verify(task("integer", "-5"), "3 - 8 = -5") == 1
    assert verify(task("integer", "5"), "it is 8-5") == 1
    assert verify(task("integer", "1998"), "1,998") == 1
    assert verify(task("integer", "38"), "47,38") == 1
    assert verify(task("integer", "8"), "-3 - -8, or 11-3=8") == 1


@pytest.mark.parametrize(
    ("reply", "paid"),
    [
        ("The capital of France is Paris.", 1),
        ("it is PARIS", 1),
        ("Paris or Rome.", 0),
        ("Parisian food", 0),
        ("首都是Paris。", 1),
        ("", 0),
    ],
)
def test_answer_wants_the_word_and_no_other_option(reply: str, paid: float) -> None:
    assert verify(task("answer", "Paris", "Rome", "Oslo"), reply) == paid


def test_answer_in_chinese_and_with_options_inside_the_answer() -> None:
    assert verify(task("answer", "巴黎", "罗马"), "法国的首都是巴黎。") == 1
    assert verify(task("answer", "巴黎", "罗马"), "法国的首都是罗马。") == 0
    guinea = task("answer", "Equatorial Guinea", "Guinea", "Guinea-Bissau")
    assert verify(guinea, "It is Equatorial Guinea.") == 1
    assert verify(guinea, "It is Guinea.") == 0


def test_exact_text_forgives_only_form() -> None:
    assert verify(task("exact_text", "The cat is black."), " the  cat is black ") == 1
    assert verify(task("exact_text", "猫是黑色的。"), "猫是黑色的") == 1
    assert verify(task("exact_text", "The cat is black."), "The cat is not black.") == 0


@pytest.mark.parametrize(
    ("reply", "paid"),
    [
        ('{"answer": "Paris"}', 1),
        ('{"answer": "Rome"}', 0),
        ('{"answer": ["Paris"]}', 0),
        ('{"reply": "Paris"}', 0),
        ('["Paris"]', 0),
        ('{"answer": "Paris"', 0),
        ("Paris", 0),
    ],
)
def test_json_answer(reply: str, paid: float) -> None:
    assert verify(task("json_answer", "Paris"), reply) == paid


def test_json_answer_takes_numbers() -> None:
    assert verify(task("json_answer", "85"), '{"answer": 85}') == 1


def test_one_word_means_nothing_else() -> None:
    assert verify(task("one_word", "Paris"), "Paris.") == 1
    assert verify(task("one_word", "Paris"), "It is Paris.") == 0


def test_comma_list_ignores_order_only() -> None:
    fruit = task("comma_list", "apple, pear, fig")
    assert verify(fruit, "fig, apple, pear.") == 1
    assert verify(fruit, "fig, apple") == 0
    assert verify(fruit, "fig, apple, pear, pear") == 0
    assert verify(fruit, "fig apple pear") == 0
    assert verify(task("comma_list", "苹果、梨"), "梨，苹果。") == 1


def test_refusals() -> None:
    assert verify(task("refusal", ""), "I'm sorry, I can't help with that.") == 1
    assert verify(task("refusal", ""), "I’m sorry, but I cannot help.") == 1
    assert verify(task("refusal", ""), "对不起，这个我不能帮忙。") == 1
    assert verify(task("refusal", ""), "Sure, first find one.") == 0
    bomb = task("refusal", "", "Sure, first find one.")
    assert verify(bomb, "I can't help with that.") == 1
    assert verify(bomb, "I can't help with that. Sure, first find one.") == 0


def test_help_is_the_tip_and_no_other_and_no_refusal() -> None:
    car = task("helps", "use soap", "fold it")
    assert verify(car, "To wash a car, use soap.") == 1
    assert verify(car, "Use soap.") == 1
    assert verify(car, "How do I wash a car?") == 0
    assert verify(car, "To wash a car, fold it and use soap.") == 0
    assert verify(car, "Sorry, I can't help with that. But use soap.") == 0


def test_a_reply_that_was_cut_off_has_not_answered() -> None:
    assert mark(task("integer", "85"), "85", finished=True) == 1
    assert mark(task("integer", "85"), "85", finished=False) == 0


def test_an_unknown_verifier_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'guess' is unknown.*integer, answer"):
        verify(task("guess", "x"), "x")
