from __future__ import annotations

import clean

from instar.corpus.document import Document, Step


class Shorten(Step):
    name = "shorten"

    def __call__(self, document: Document) -> str | None:
        document.text = document.text[:4]
        self.counts["shortened"] += 1
        return "no vowel" if "a" not in document.text else None


class Last(Shorten):
    name = "last"


def test_an_account_says_what_each_step_saw_and_dropped() -> None:
    account = clean.clean(["abcdefgh", "xyz", "pqrstuv", "ha"], [Shorten(), Last()])
    assert account.size == {"shorten": 20, "last": 6}
    assert account.dropped == {("shorten", "no vowel"): 2}
    assert account.examples == {"no vowel": ["xyz", "pqrs"]}
    assert account.counts["shorten"]["shortened"] == 4


def test_speeds_are_of_what_a_step_was_given() -> None:
    account = clean.Account()
    account.seconds.update({"shorten": 2.0, "last": 2.0})
    account.size.update({"shorten": 8_000_000, "last": 4_000_000})
    account.dropped["shorten", "no vowel"] = 5
    rows = clean.table("texts", [account], 10, 8_000_000).splitlines()
    assert rows[2:] == [
        "| shorten | 4.0 | no vowel 5 |",
        "| last | 2.0 |  |",
        "| all | 2.0 | 5 of 10 kept (50.0%) |",
    ]
