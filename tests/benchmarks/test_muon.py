from __future__ import annotations

import muon

from instar.model import ModelConfig


def test_every_setting_is_timed() -> None:
    shape = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    *_, costs = muon.measure(shape, muon.SETTINGS, tokens=2 * muon.CONTEXT, rounds=2)
    assert list(costs) == list(muon.SETTINGS)
    assert all(0 < cost.optimizer_s < cost.step_s for cost in costs.values())


def test_shares_are_of_adamws_step() -> None:
    costs = {"AdamW": muon.Cost(step_s=1.0, optimizer_s=0.1), "Muon": muon.Cost(1.3, 0.25)}
    rows = muon.table(costs, 4096).splitlines()
    assert "+0.0%" in rows[2] and "+15.0%" in rows[3]
