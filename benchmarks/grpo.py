"""Steps of RL on verifiable answers: ours beside trl's ``GRPOTrainer``, in turns.

All begin with the same random model (6 million parameters) and the same tasks, and make the same
step: so many prompts, so many replies to each of 32 tokens, one update with all of them. All draw
from the same 4,096 tokens, so that few replies end before. Whether a reply is right costs nothing
to find out. Each round of each contestant is a process of its own; the first steps, in which
kernels are chosen, do not count.

    python benchmarks/grpo.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import SHAPES
from rich.console import Console
from rich.table import Table

from instar.checkpoint import save_model
from instar.data.readers import read_all
from instar.memory import keep_freed_memory
from instar.model import CausalLM
from instar.model.transformer import initialize
from instar.stages.preparing import learners, prepared
from instar.stages.rlvr import RLVRConfig, build
from instar.tokenizer.bpe import SPECIAL_TOKENS
from instar.tokenizer.hf import save_tokenizer
from instar.training.interrupt import Interruptible
from instar.training.loop import fit
from instar.training.meter import Meter
from instar.training.state import Progress

LR, NEW, WARM_UP = 1e-5, 32, 2
CONTESTANTS = {
    "ours": {},
    "trl, as it comes (float32)": {"bf16": False},
    "trl, bf16": {"bf16": True},
    "trl, bf16, no checkpointing": {"bf16": True, "gradient_checkpointing": False},
}


def prepare(directory: Path) -> None:
    """The model and the tasks."""
    config = SHAPES["S5"]
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    save_model(model, directory)
    # As many tokens as the model knows, none of them in the prompts.
    high = [bytes([byte]) for byte in range(128, 256)]
    unused = list(itertools.product(high, high))[: config.vocab_size - len(SPECIAL_TOKENS) - 256]
    save_tokenizer(directory, unused, config.max_position_embeddings)
    texts = [f"What is {i} plus {i * 7 % 90}?" for i in range(10, 74)]
    tasks = [
        {"messages": [{"role": "user", "content": t}], "verifier": "integer", "answer": "1"}
        for t in texts
    ]
    lines = [json.dumps(task) + "\n" for task in tasks]
    (directory / "tasks.jsonl").write_text("".join(lines), encoding="utf-8")


def ours(directory: Path, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of every step of our stage, and the mean tokens of a reply."""
    keep_freed_memory()
    values: dict[str, Any] = {
        "out": "unused",
        "init": str(directory),
        "tasks": [str(directory / "tasks.jsonl")],
        "skip_decided": False,
        "rollout": {
            "prompts": arguments.prompts,
            "samples": arguments.samples,
            "max_new_tokens": NEW,
        },
        "training": {"steps": arguments.steps, "optimizer": {"name": "adamw", "lr": LR}},
    }
    config = RLVRConfig.parse(values, "benchmark")
    job = build(config)
    learner, optimizers = learners(prepared(job.objective, config.training), config.training)
    ends, lengths = [time.perf_counter()], list[float]()

    def watch(progress: Progress) -> None:
        ends.append(time.perf_counter())
        lengths.append(progress.means["length"])

    with Interruptible() as interrupt:
        parts = (learner, job.source, optimizers, config.training, Progress(), [watch], Meter())
        fit(*parts, interrupt)
    return list(np.diff(ends)), statistics.mean(lengths)


def theirs(
    directory: Path, arguments: argparse.Namespace, settings: dict[str, Any]
) -> tuple[list[float], float]:
    """The same of ``GRPOTrainer``."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(str(completion)) % 2) for completion in completions]

    tasks = read_all([directory / "tasks.jsonl"], ("messages",))
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.prompts * arguments.samples,
            num_generations=arguments.samples,
            max_completion_length=NEW,
            learning_rate=LR,
            save_strategy="no",
            logging_steps=arguments.steps,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
            reward,
            config,
            train_dataset=Dataset.from_list([{"prompt": task["messages"]} for task in tasks]),
            processing_class=AutoTokenizer.from_pretrained(directory),
            callbacks=[Clock()],
        )
        trainer.train()
    [length] = [r["completions/mean_length"] for r in trainer.state.log_history if "loss" in r]
    return list(np.diff(ends)), length


def main() -> None:
    """Alternate, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.only:
        warnings.simplefilter("ignore")
        settings, where = CONTESTANTS[arguments.only], arguments.directory
        print(
            json.dumps(theirs(where, arguments, settings) if settings else ours(where, arguments))
        )
        return
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    lengths: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        for number in range(arguments.rounds):
            for who in list(seconds)[:: -1 if number % 2 else 1]:
                command = [sys.executable, *sys.argv, "--only", who, "--directory", directory]
                run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                own, length = json.loads(run.stdout.splitlines()[-1])
                seconds[who] += own[WARM_UP:]
                lengths[who].append(length)
    table = Table("", "seconds a step", "theirs / ours", "tokens a reply")
    for who, own in seconds.items():
        step = statistics.median(own)
        ratio = step / statistics.median(seconds["ours"])
        length = statistics.mean(lengths[who])
        table.add_row(who, f"{step:.2f}", f"{ratio:.2f}", f"{length:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
