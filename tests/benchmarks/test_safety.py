from __future__ import annotations

import safety


def test_no_fold_is_asked_what_it_has_learnt() -> None:
    folds = safety.by_deeds(3)
    assert len({example.deed for _, asked in folds for example in asked}) > 100
    for learnt, asked in folds:
        assert {e.deed for e in learnt}.isdisjoint(e.deed for e in asked)
        assert {(e.role, e.text) for e in learnt}.isdisjoint((e.role, e.text) for e in asked)
