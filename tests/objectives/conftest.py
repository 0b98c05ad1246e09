from collections.abc import Callable

import pytest
import torch

from instar.data.batch import IGNORE, Batch
from instar.model import CausalLM, ModelConfig, ScoreModel
from instar.model.transformer import initialize


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.5,
    )


@pytest.fixture
def policy(config: ModelConfig) -> CausalLM:
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def scorer(config: ModelConfig) -> ScoreModel:
    model = ScoreModel(config)
    generator = torch.Generator().manual_seed(1)
    initialize(model, config, generator)
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Rows of all lengths with every annotation; replies begin at column 2."""

    def make(rows: int, columns: int = 9, seed: int = 0) -> Batch:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 23, (rows, columns), generator=g)
        ends = torch.randint(4, columns + 1, (rows, 1), generator=g)
        place = torch.arange(columns - 1)
        reply = (place >= 2) & (place < ends - 1)
        targets = torch.full_like(ids, IGNORE)
        targets[:, :-1] = torch.where(reply, ids[:, 1:], IGNORE)

        def noise() -> torch.Tensor:
            return torch.randn(rows, columns, generator=g)

        logprobs = noise().abs().neg()
        return Batch(
            input_ids=ids,
            targets=targets,
            reference_logprobs=logprobs + 0.3 * noise(),
            old_logprobs=logprobs,
            old_values=noise(),
            advantage=noise(),
            returns=noise(),
        )

    return make
