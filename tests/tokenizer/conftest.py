import pytest

from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer, save_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's asleep.\n\n" * 3,
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少？\n春天来了，花开了，鸟叫了。" * 3,
    "12 + 34 = 46\nuser assistant system\n  indented\tcode() { return 0; }",
]


@pytest.fixture(scope="session")
def merges():
    return train_bpe(TEXTS, 400)


@pytest.fixture(scope="session")
def directory(merges, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path, merges, max_length=128)
    return path


@pytest.fixture(scope="session")
def tokenizer(directory):
    return Tokenizer.load(directory)
