from pathlib import Path

import pytest

from instar.corpus.document import Document
from instar.corpus.own import load_rule
from instar.errors import UserError

RULE = """
from instar.corpus.document import Document, Step


class NoShouting(Step):
    name = "no shouting"

    def __call__(self, document):
        self.counts["seen"] += 1
        return "shouting" if document.text.isupper() else None


class Needy(NoShouting):
    def __init__(self, volume):
        super().__init__()


class Unfinished(Step):
    name = "unfinished"


class Nameless(Step):
    def __call__(self, document):
        return None


NUMBER = 3
"""


def test_a_rule_in_a_file_is_a_step(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RULE)
    rule = load_rule(f"{path}:NoShouting")
    assert rule(Document("quiet", "", "")) is None
    assert rule(Document("LOUD", "", "")) == "shouting"
    assert rule.counts["seen"] == 2
    assert load_rule(f"{path}:NoShouting").counts["seen"] == 0


def test_a_rule_in_a_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_rules.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_rule("module_of_rules:NoShouting").name == "no shouting"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mine.py", "names nothing"),
        ("{}/mine.py:", "names nothing"),
        ("{}/other.py:Rule", "no such file"),
        ("{}/mine.py:Missing", "no Missing"),
        ("{}/mine.py:NUMBER", "is not a Step"),
        ("{}/mine.py:Document", "is not a Step"),
        ("{}/mine.py:Needy", "cannot be made"),
        ("{}/mine.py:Unfinished", "cannot be made"),
        ("{}/mine.py:Nameless", "has no name"),
        ("{}/broken.py:Rule", "SyntaxError"),
        ("no_such_module:Rule", "cannot be imported"),
    ],
)
def test_what_is_no_rule_is_explained(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RULE)
    (tmp_path / "broken.py").write_text("class :")
    with pytest.raises(UserError, match=problem):
        load_rule(name.format(tmp_path))
