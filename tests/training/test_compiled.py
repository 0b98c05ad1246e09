"""Compiled training, in processes of its own: the shape checks of the others are not compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import numpy as np, torch
from instar.compilation import compiled
from instar.data.sources import PackedSource
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.training.interrupt import Interruptible
from instar.training.loop import TrainingConfig, accumulate, fit
from instar.training.meter import Meter
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner
from instar.training.state import Progress

torch.set_num_threads(1)
shape = ModelConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16)
tokens = np.random.default_rng(0).integers(300, size=4096).astype(np.uint16)
dtype = getattr(torch, sys.argv[1])
at, keys = sys.argv[2], set(CausalLM(shape).state_dict())

def parts():
    model = CausalLM(shape)
    initialize(model, shape, torch.Generator().manual_seed(0))
    source = PackedSource(tokens, 256, batch_size=4, micro_batch=2, seed=0)
    return NextToken(model), source

def gradients(on):
    objective, source = parts()
    with compiled(on):
        accumulate(Learner(objective), next(source), Meter(), 1e9, dtype)
    return [p.grad for p in objective.parameters()]

for one, other in zip(gradients(True), gradients(False), strict=True):
    error = (one - other).norm() / other.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2), error

def train(first, last):
    '''From the saved state, if it is not the beginning, to the last step.'''
    objective, source = parts()
    optimizers = Optimizers(objective, OptimizerConfig())
    progress, meter = Progress(), Meter()
    if first:
        state = torch.load(at)
        objective.load_state_dict(state["objective"])
        optimizers.load_state_dict(state["optimizers"])
        source.load_state_dict(state["source"])
        progress.step = first
    config = TrainingConfig(steps=6, precision=sys.argv[1], compile="on")

    def stop(progress):
        progress.finished = progress.step >= last

    with Interruptible() as interrupt:
        fit(Learner(objective), source, optimizers, config, progress, [stop], meter, interrupt)
    state = {"objective": objective.state_dict(), "optimizers": optimizers.state_dict()}
    torch.save(state | {"source": source.state_dict()}, at)
    return objective.policy.state_dict()

if sys.argv[3] == "begin":
    whole = train(0, 6)
    torch.save(whole, at + ".whole")
    train(0, 3)
else:
    resumed, whole = train(3, 6), torch.load(at + ".whole")
    assert set(resumed) == keys
    assert all(torch.equal(resumed[name], whole[name]) for name in keys)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_training_is_the_same_training(precision: str, tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")}
    for part in ("begin", "go on"):  # in another process, as after an interruption
        command = [sys.executable, "-c", SCRIPT, precision, str(tmp_path / "state"), part]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
