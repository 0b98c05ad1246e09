from __future__ import annotations

import pytest

from instar.tokenizer.hf import Tokenizer, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and control tokens, no merges: a letter is a token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, [], 64)
    return Tokenizer.load(directory)
