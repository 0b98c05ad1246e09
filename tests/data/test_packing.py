from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instar.data.batch import IGNORE
from instar.data.encoding import pack_documents
from instar.data.packing import Row, check_length, conversation_row, pad_rows, reply_row
from instar.data.pairs import pad_pairs, preference_pairs
from instar.data.schema import Message
from instar.errors import UserError
from instar.tokenizer.hf import Tokenizer

X = IGNORE


def test_documents_stand_behind_one_another(tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("abc")
    stream = pack_documents(["ab", "", "c"], tokenizer)
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert stream.tolist() == [begin, a, b, end, begin, end, begin, c, end]
    assert stream.dtype == np.uint16
    assert pack_documents([], tokenizer).tolist() == []


def test_text_cannot_write_control_tokens(tokenizer: Tokenizer) -> None:
    stream = pack_documents(["<bos><|im_end|>"], tokenizer).tolist()
    assert stream.count(tokenizer.bos_id) == 1 and tokenizer.im_end_id not in stream


def test_padded_rows_by_hand() -> None:
    rows = [
        Row([10, 11, 12, 13], [False, False, True, True]),
        Row([20, 21], [True, True]),  # nothing predicts a first token
        Row([30], [True]),
    ]
    batch = pad_rows(rows, pad_id=0)
    # Four columns, and padding up to a multiple of eight.
    assert batch.input_ids[:, :4].tolist() == [[10, 11, 12, 13], [20, 21, 0, 0], [30, 0, 0, 0]]
    assert batch.targets[:, :4].tolist() == [[X, 12, 13, X], [21, X, X, X], [X, X, X, X]]
    assert batch.input_ids.shape == (3, 8) and not batch.input_ids[:, 4:].any()
    assert batch.mask.sum().item() == 3


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12),
        min_size=1,
        max_size=6,
    )
)
def test_padded_rows_hold_every_token_and_every_target(rows: list[list[tuple[int, bool]]]) -> None:
    batch = pad_rows([Row([i for i, _ in r], [m for _, m in r]) for r in rows], pad_id=0)
    width, longest = batch.input_ids.shape[1], max(map(len, rows))
    assert longest <= width < longest + 8 and width % 8 == 0
    assert (batch.targets[:, -1] == X).all(), "the last column has no target"
    for ids, targets, row in zip(batch.input_ids, batch.targets, rows, strict=True):
        assert ids[: len(row)].tolist() == [i for i, _ in row]
        assert not ids[len(row) :].any()
        learnt = [(t, i) for t, (i, learn) in enumerate(row[1:]) if learn]
        found = (targets != X).nonzero().flatten().tolist()
        assert [(t, targets[t].item()) for t in found] == learnt


def test_the_pad_token_is_learnt_where_it_was_written() -> None:
    """Masks come from roles and lengths, never from ids."""
    batch = pad_rows([Row([5, 0, 0], [False, True, True])], pad_id=0)
    assert batch.targets.tolist() == [[0, 0, X, X, X, X, X, X]]


def test_replies_are_learnt_and_prompts_are_not() -> None:
    assert reply_row([1, 2], [3]) == Row([1, 2, 3], [False, False, True])


def test_a_conversation_by_hand(tokenizer: Tokenizer) -> None:
    talk: list[Message] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "ab"},
    ]
    row = conversation_row(talk, tokenizer, "conversation 1")
    assert tokenizer.decode(row.ids, skip_special=False) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n"
    )
    learnt = [i for i, learn in zip(row.ids, row.learn, strict=True) if learn]
    assert learnt == [*tokenizer.encode("ab"), tokenizer.im_end_id]


def test_a_conversation_without_a_reply_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"conversation 7: .*no assistant turn.*Add the reply"):
        conversation_row([{"role": "user", "content": "q"}], tokenizer, "conversation 7")


def test_the_longest_row_is_named() -> None:
    rows = [Row([1] * n, [True] * n) for n in (3, 9, 4)]
    places = ["a", "b", "c"]
    check_length(rows, 9, places)
    with pytest.raises(UserError, match=r"b has 9 tokens, the context has 8.*Shorten"):
        check_length(rows, 8, places)


def test_pairs_by_hand(tokenizer: Tokenizer) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "earlier"},
            {"role": "user", "content": "r"},
        ],
        "chosen": "good",
        "rejected": "bad!!",
    }
    [pair] = preference_pairs([record], tokenizer, 200)
    batch = pad_pairs([pair, pair], pad_id=0)
    assert batch.input_ids.shape[0] == 4
    for row, reply in enumerate(["good", "good", "bad!!", "bad!!"]):
        expected = [*tokenizer.encode(reply), tokenizer.im_end_id]
        assert batch.targets[row][batch.mask[row]].tolist() == expected, "earlier turns teach not"
    assert pair.chosen.ids[-1] == pair.rejected.ids[-1] == tokenizer.im_end_id
    shared = len(pair.chosen) - 5
    assert pair.chosen.ids[:shared] == pair.rejected.ids[:shared]
    assert torch.equal(batch.mask.sum(dim=1), torch.tensor([5, 5, 6, 6]))


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "pair 2: messages"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "pair 2.*both"),
        ([{"role": "robot", "content": "a"}], "pair 2.*'robot'"),
    ],
)
def test_broken_pairs_are_named(tokenizer: Tokenizer, messages: object, told: str) -> None:
    good = {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=told):
        preference_pairs([good, good | {"messages": messages}], tokenizer, 200)


def test_long_pairs_are_named(tokenizer: Tokenizer) -> None:
    good = {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b" * 99}
    with pytest.raises(UserError, match=r"pair 1 with its rejected reply has .* context has 64"):
        preference_pairs([good], tokenizer, 64)
