import copy
import math
import statistics

import pytest
import torch

from instar.evaluation.bits import bits_per_byte, ratio


def test_a_model_that_knows_nothing_pays_log2_of_the_vocabulary(model, tokenizer):
    blank = copy.deepcopy(model)
    with torch.no_grad():
        blank.lm_head.weight.zero_()
    texts = ["the thing", "又一个", "x" * 100]
    documents = [{"text": text, "language": "en"} for text in (texts[0], texts[2], "")]
    documents.append({"text": texts[1], "language": "zh"})
    result = bits_per_byte(blank, tokenizer, documents)
    bits = math.log2(tokenizer.vocab_size)
    tokens = len(tokenizer.encode(texts[0])) + 100
    assert result["en"].score == pytest.approx(bits * tokens / 109, rel=1e-5)
    assert result["zh"].score == pytest.approx(bits, rel=1e-5)  # a token a byte
    assert (result["en"].n, result["zh"].n, result["zh"].stderr) == (2, 1, None)


def test_equals_one_document_at_a_time_after_bos(model, tokenizer):
    texts = ["the other theme", "短", "a" * 70, "then 47 + 38 = 85"]  # one longer than the context
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        for at in range(0, len(ids), 32):
            window = ids[at : at + 32]
            logits = model(torch.tensor([[tokenizer.bos_id, *window]]))[0, :-1]
            nats += torch.nn.functional.cross_entropy(
                logits.double(), torch.tensor(window), reduction="sum"
            ).item()
        size += len(text.encode())
    result = bits_per_byte(model, tokenizer, [{"text": text} for text in texts])
    assert result["unknown"].score == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_ratio_of_equal_sizes_is_the_mean():
    values = [3.0, 5.0, 4.0, 9.0]
    result = ratio(values, [1.0] * 4)
    assert result.score == pytest.approx(statistics.mean(values))
    assert result.stderr == pytest.approx(statistics.stdev(values) / 2)


def test_ratio_error_bar_covers_the_truth():
    # Documents of very different sizes; 95% of the intervals should hold the true ratio.
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(400):
        sizes = torch.randint(20, 2000, (200,), generator=generator).double()
        noise = torch.randn(200, generator=generator, dtype=torch.float64)
        result = ratio((sizes * (1.5 + 0.4 * noise)).tolist(), sizes.tolist())
        assert result.stderr is not None
        covered += abs(result.score - 1.5) < 1.96 * result.stderr
    assert 0.91 < covered / 400 < 0.98
