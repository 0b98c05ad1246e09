"""Bits per byte: how many bits a model needs, on average, for one byte of text it never saw.

Why not simply the loss? A loss is nats *per token*, and a token is whatever the tokenizer made
it. A vocabulary twice as large cuts the text into fewer, harder tokens: the loss goes up although
the model may be better. Dividing by the bytes of the text instead puts every model, tokenizer and
n-gram on one scale: the length of the file that the model could compress the text to, relative to
the file itself. Eight means that nothing was learnt; gzip needs about three for English prose.

Languages are kept apart, because UTF-8 spends three bytes on a Chinese character and one on a
Latin letter: a mean over both would mostly measure the mixture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instar.data.batch import IGNORE
from instar.data.schema import Document
from instar.evaluation.exams import ExamResult
from instar.objectives.functional import token_logprobs

if TYPE_CHECKING:
    from instar.model.transformer import CausalLM
    from instar.tokenizer.hf import Tokenizer

TOKENS_A_BATCH = 8192


def bits_per_byte(
    model: CausalLM, tokenizer: Tokenizer, documents: Sequence[Document]
) -> dict[str, ExamResult]:
    """Total nats / ln 2 / total bytes of UTF-8, by language.

    Every document is scored by itself, after ``<bos>``. One that is longer than the context is
    cut into windows, each again after ``<bos>``; so every token is scored exactly once, and what
    a window cannot see counts against the model.

    Args:
        model: The language model; its weights and mode are left alone.
        tokenizer: The tokenizer that it was trained with.
        documents: Text that training never saw. Documents without a language come under
            ``"unknown"``; empty ones are passed over.

    Returns:
        By language: bits per byte, its standard error over documents, number of documents.
    """
    documents = [document for document in documents if document["text"]]
    nats = [0.0] * len(documents)
    context = model.context
    windows: list[tuple[int, list[int]]] = []
    for which, ids in enumerate(tokenizer.encode_batch([d["text"] for d in documents])):
        windows += [(which, ids[at : at + context]) for at in range(0, len(ids), context)]
    windows.sort(key=lambda window: len(window[1]))
    while windows:
        # Longest first: a row costs the length of the longest one of its batch.
        rows = max(1, TOKENS_A_BATCH // len(windows[-1][1]))
        batch, windows = windows[-rows:], windows[:-rows]
        scores = _nats(model, tokenizer.start_id, [ids for _, ids in batch])
        for (which, _), score in zip(batch, scores, strict=True):
            nats[which] += score
    return by_language(documents, nats)


@torch.no_grad()
def _nats(model: CausalLM, bos_id: int, rows: list[list[int]]) -> list[float]:
    """Negative log-likelihood of each row after ``<bos>``."""
    device = model.lm_head.weight.device
    width = max(len(ids) for ids in rows)
    inputs = torch.tensor([[bos_id, *ids[:-1]] + [0] * (width - len(ids)) for ids in rows])
    targets = torch.tensor([ids + [IGNORE] * (width - len(ids)) for ids in rows])

    def score(hidden: Tensor) -> Tensor:
        return token_logprobs(hidden, model.lm_head.weight, targets.to(device))

    logprobs = model.read(score, inputs.to(device))
    return (-logprobs.double().sum(dim=1)).tolist()


def by_language(documents: Sequence[Document], nats: Sequence[float]) -> dict[str, ExamResult]:
    """Gather each document's nats into bits per byte, by language.

    Args:
        documents: The texts.
        nats: Negative log-likelihood of each whole document.
    """
    bits: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    for document, loss in zip(documents, nats, strict=True):
        language = document.get("language", "unknown")
        bits[language].append(loss / math.log(2))
        sizes[language].append(len(document["text"].encode()))
    return {language: ratio(bits[language], sizes[language]) for language in sorted(bits)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> ExamResult:
    """The ratio of two totals with its standard error over the units that make them up.

    Documents are the independent draws, and both totals vary with which documents were drawn.
    To first order (the delta method; Cochran 1977, *Sampling Techniques*, eq. 2.46)

        Var(R) = n / (n - 1) * sum_i (x_i - R y_i)^2 / (sum_i y_i)^2,    R = sum x / sum y.

    Args:
        numerators: ``x``, one a unit.
        denominators: ``y``, one a unit, positive.
    """
    n, total = len(numerators), sum(denominators)
    r = sum(numerators) / total
    if n == 1:
        return ExamResult(r, None, 1)
    squares = sum((x - r * y) ** 2 for x, y in zip(numerators, denominators, strict=True))
    return ExamResult(r, math.sqrt(n / (n - 1) * squares) / total, n)
