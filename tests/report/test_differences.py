"""What differs between copies is marked, and nothing is lost by marking."""

from hypothesis import given
from hypothesis import strategies as st

from instar.report.differences import compare


def test_words_and_characters_are_marked():
    kept, copies = compare(
        "a red house, 白云千载", ["a blue house, 白雲千载", "a red house, 白云千载"]
    )
    assert [text for text, differs in kept if differs] == ["red", "云"]
    assert [text for text, differs in copies[0] if differs] == ["blue", "雲"]
    assert copies[1] == [("a red house, 白云千载", False)]


@given(st.text(max_size=60), st.lists(st.text(max_size=60), max_size=3))
def test_the_pieces_are_the_texts(kept, others):
    marked, copies = compare(kept, others)
    for text, pieces in zip([kept, *others], [marked, *copies], strict=True):
        assert "".join(piece for piece, _ in pieces) == text
    for text, pieces in zip(others, copies, strict=True):
        assert any(differs for _, differs in pieces) <= (text != kept)
