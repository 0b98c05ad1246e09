from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.errors import UserError
from instar.generation.stopping import Stopping, StopScanner


def scan(pieces: list[str], strings: tuple[str, ...]) -> tuple[list[str], bool]:
    scanner = StopScanner(strings)
    shown = [scanner.push(piece) for piece in pieces]
    return [*shown, scanner.flush()], scanner.found


def test_a_beginning_of_a_stop_string_is_held_back():
    shown, found = scan(["one\n", "two\n\nthree"], ("\n\n",))
    assert shown == ["one", "\ntwo", ""] and found


def test_what_was_held_back_for_nothing_is_shown_at_the_end():
    shown, found = scan(["a", "bc", "d"], ("cde",))
    assert shown == ["a", "b", "", "cd"] and not found


def test_the_string_complete_first_wins_and_the_longer_one_among_equals():
    assert scan(["xabcd"], ("abcd", "bc")) == (["xa", ""], True)
    assert scan(["xabc"], ("bc", "abc")) == (["x", ""], True)


letters = st.text(alphabet="ab", max_size=12)


@given(
    text=letters,
    strings=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_the_result_does_not_depend_on_how_the_text_was_cut(
    text: str, strings: tuple[str, ...], cuts: list[int]
):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, found = scan(pieces, strings)
    whole, found_whole = scan([text], strings)
    assert ("".join(shown), found) == ("".join(whole), found_whole)
    assert found == any(s in text for s in strings)
    assert not any(s in "".join(shown) for s in strings)
    assert found or "".join(shown) == text


def test_bad_values_are_refused():
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        Stopping(frozenset(), max_new_tokens=0)
    with pytest.raises(UserError, match="empty"):
        Stopping(frozenset(), ("",))
