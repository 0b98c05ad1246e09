from __future__ import annotations

import copy

import pytest
import torch

from instar.adapters.base import activate, add
from instar.adapters.lora import LoRAConfig
from instar.generation import Engine, scoring
from instar.generation.scoring import score
from instar.model import CausalLM


def by_hand(model: CausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)


def test_every_token_after_those_before_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 3)  # so that there are several
    ids = [7, 80, 9, 9, 200, 33, 8, 61]
    every = by_hand(engine.model, ids)
    engine.model.train()
    found = score(engine.model, ids, top=4)
    assert engine.model.training
    expected = every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.logprobs == pytest.approx(expected, abs=1e-5)
    for place, likeliest in enumerate(found.top_logprobs):
        assert [token for token, _ in likeliest] == every[place].topk(4).indices.tolist()
        values = [value for _, value in likeliest]
        assert values == pytest.approx(every[place].topk(4).values.tolist(), abs=1e-5)
    assert score(engine.model, ids).top_logprobs is None
    assert score(engine.model, [7]) == scoring.Scores([], None)


def test_the_adapter_that_is_asked_for_speaks(engine: Engine) -> None:
    model, ids = copy.deepcopy(engine.model), [7, 80, 9, 61]
    plain = score(model, ids)
    add(model, LoRAConfig(rank=4), 0, "poet")
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "poet" in path:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    activate(model, None)
    assert score(model, ids) == plain
    poet = score(model, ids, "poet")
    activate(model, "poet")
    assert poet == score(model, ids) != plain
