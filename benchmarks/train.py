"""Tokens a second while training: ours beside ``transformers.Trainer``, in alternating rounds.

Both train a Qwen3 of the same shape on the same rows with AdamW. A step is timed from the end of
the one before it to its own end, so that everything counts: data, forward, backward, optimizer,
hooks. Shared machines are noisy; so every round visits every contestant, and what is reported are
medians over all rounds and their ratios. Each has a process of its own, so that nobody inherits
another's memory allocator.

    python benchmarks/train.py --shapes S5 S30
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from instar.data.batch import Batch
from instar.data.sources import PackedSource
from instar.lineage import Stopwatch, environment
from instar.machine import product_flops
from instar.memory import keep_freed_memory
from instar.model import CausalLM, ModelConfig
from instar.model.hugging_face import HEADS, to_hugging_face
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.training.display import Display
from instar.training.hooks import SAVE_EVERY_S, Log, MetricsFile, Save
from instar.training.interrupt import Interruptible
from instar.training.loop import TrainingConfig, fit
from instar.training.meter import Meter
from instar.training.monitor import PERIOD_S, Monitor
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.parallel import Learner
from instar.training.state import Progress, Saver, WorkDirectory

RESULTS = Path(__file__).parent / "results"
LR = 1e-3


@dataclass(frozen=True)
class Shape:
    """What is trained.

    Attributes:
        model: The model's shape.
        context: Tokens a row.
        rows: Rows a step, and a micro-batch.
    """

    model: ModelConfig
    context: int
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.rows * self.context


def _shape(width: int, layers: int, vocabulary: int, ffn: int, context: int, rows: int) -> Shape:
    model = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=width // 8,
    )
    return Shape(model, context, rows)


SHAPES = {
    "S5": _shape(256, 6, 4096, 704, context=256, rows=16),
    "S30": _shape(512, 8, 6400, 1408, context=512, rows=8),
}


def learnable_tokens(vocabulary: int, count: int = 2**19) -> np.ndarray:
    """A text of 2,000 "words" of eight tokens each: random, but with something to learn in it."""
    rng = np.random.default_rng(0)
    words = rng.integers(vocabulary, size=(2000, 8), dtype=np.uint16)
    return words[rng.integers(len(words), size=count // 8)].reshape(-1)


@dataclass
class Timed:
    """Wraps something that is called and counts the seconds that it took."""

    inner: Any
    seconds: float = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """The wrapped call."""
        began = time.perf_counter()
        try:
            return self.inner(*arguments)
        finally:
            self.seconds += time.perf_counter() - began


class TimedSource(PackedSource):
    """Packed rows, and the seconds that drawing them took."""

    seconds = 0.0

    def __next__(self) -> list[Batch]:
        began = time.perf_counter()
        batches = super().__next__()
        self.seconds += time.perf_counter() - began
        return batches


class Ours:
    """The loop of every stage, with its source, optimizer, hooks, saver and monitor.

    Args:
        shape: What to train.
        stack: Ends what has begun.
        settings: Of ``TrainingConfig``.
    """

    def __init__(self, shape: Shape, stack: ExitStack, **settings: Any) -> None:
        # As long as a real run would be, so that what is chosen for long runs is chosen here.
        steps = 100_000
        self.config = TrainingConfig(steps=steps, optimizer=OptimizerConfig(lr=LR), **settings)
        model = CausalLM(shape.model)
        initialize(model, shape.model, torch.Generator().manual_seed(0))
        self.learner = Learner(NextToken(model))
        self.optimizers = Optimizers(self.learner.objective, self.config.optimizer)
        tokens = learnable_tokens(shape.model.vocab_size)
        self.source = TimedSource(tokens, shape.context, shape.rows, shape.rows, seed=0)
        self.meter, self.progress, self.ends = Meter(), Progress(), []
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        self.work = WorkDirectory(Path(directory) / "out", "benchmark")
        parts = (self.work, self.learner, self.optimizers, self.source, self.meter)
        self.saver = stack.enter_context(Saver(*parts))
        self.monitor = stack.enter_context(Monitor(self.work.resources))
        self.interrupt = stack.enter_context(Interruptible())
        display = Display(Console(file=io.StringIO()))
        log = Log(self.config, self.meter, MetricsFile(self.work), display, Stopwatch())
        self.hooks = [Timed(log), Timed(Save(self.config, self.saver))]
        self.adding = Timed(self.meter.add)
        self.meter.add = self.adding  # type: ignore[method-assign]

    def round(self, steps: int) -> list[float]:
        """Train so many steps; seconds of each but the first."""
        self.ends = []
        end = self.progress.step + steps + 1

        def stop(progress: Progress) -> None:
            self.ends.append(time.perf_counter())
            progress.finished = progress.step >= end

        self.progress.finished = False
        fit(
            self.learner,
            self.source,
            self.optimizers,
            self.config,
            self.progress,
            [*self.hooks, stop],
            self.meter,
            self.interrupt,
        )
        return list(np.diff(self.ends))

    def overheads(self, step_s: float) -> dict[str, float]:
        """What data and hooks cost, as shares of a step's time."""
        steps = self.progress.step
        shares = {
            "next(source)": self.source.seconds / steps / step_s,
            "metrics": self.adding.seconds / steps / step_s,
            "logging": self.hooks[0].seconds / steps / step_s,
        }
        began = time.perf_counter()
        for _ in range(20):
            self.monitor.sample()
        shares["monitor"] = (time.perf_counter() - began) / 20 / PERIOD_S
        began = time.perf_counter()
        self.saver.save(self.progress)
        self.saver.wait()  # as if nothing of the writing went on beside training
        shares["saving"] = (time.perf_counter() - began) / SAVE_EVERY_S
        return shares


class Theirs:
    """``transformers.Trainer`` on a Qwen3 of the same shape.

    Args:
        shape: What to train.
        stack: Ends what has begun.
        settings: Of ``TrainingArguments``, beside the defaults.
    """

    def __init__(self, shape: Shape, stack: ExitStack, **settings: Any) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        alike = to_hugging_face(shape.model, HEADS[CausalLM]) | {"use_cache": False}
        self.model = Qwen3ForCausalLM(Qwen3Config.from_dict(alike))
        tokens = torch.from_numpy(learnable_tokens(shape.model.vocab_size).astype(np.int64))
        rows = tokens[: len(tokens) // shape.context * shape.context].view(-1, shape.context)
        self.data = [{"input_ids": row, "labels": row} for row in rows]
        self.directory = stack.enter_context(tempfile.TemporaryDirectory())
        self.settings = {"per_device_train_batch_size": shape.rows, "learning_rate": LR} | settings

    def round(self, steps: int) -> list[float]:
        """Train so many steps; seconds of each but the first."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        arguments = TrainingArguments(
            self.directory,
            max_steps=steps + 1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **self.settings,
        )
        Trainer(self.model, arguments, train_dataset=self.data, callbacks=[Clock()]).train()
        return list(np.diff(ends))


CONTESTANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "ours": (Ours, {}),
    "ours, not compiled": (Ours, {"compile": "off"}),
    "Trainer, defaults": (Theirs, {}),
    "Trainer, bf16": (Theirs, {"bf16": True}),
    "Trainer, bf16, compiled": (Theirs, {"bf16": True, "torch_compile": True}),
}


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries warn of on a CPU is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _work(name: str, shape: Shape, pipe: Connection) -> None:
    """A contestant's process: does what it is told to, one thing at a time."""
    kind, settings = CONTESTANTS[name]
    if kind is Ours:
        keep_freed_memory()  # as the command line does; for others it would be a gift of ours
    with ExitStack() as stack, quiet():
        contestant = kind(shape, stack, **settings)
        while order := pipe.recv():
            pipe.send(getattr(contestant, order[0])(*order[1:]))


class Apart:
    """A contestant in a process of its own, which sleeps unless it is its turn."""

    def __init__(self, name: str, shape: Shape) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(name, shape, theirs), daemon=True)
        self.process.start()

    def ask(self, what: str, *arguments: Any) -> Any:
        """The outcome of one of the contestant's methods."""
        self.pipe.send((what, *arguments))
        return self.pipe.recv()

    def end(self) -> None:
        """Its work is done."""
        self.pipe.send(None)
        self.process.join()


def measure(shape: Shape, names: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of every step of every contestant, and the peak, over alternating rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: list[float] = []
    first_s: dict[str, float] = {}
    contestants = {}
    for name in names:
        contestants[name] = Apart(name, shape)
        began = time.perf_counter()
        contestants[name].ask("round", 1)  # starts, compiles, warms up
        first_s[name] = time.perf_counter() - began
        print(f"  {name}: ready after {first_s[name]:.1f} s", flush=True)
    for _ in range(rounds):
        peaks.append(product_flops(torch.bfloat16, torch.device("cpu")))
        for name, contestant in contestants.items():
            seconds[name] += contestant.ask("round", steps)
    step_s = {name: statistics.median(values) for name, values in seconds.items()}
    overheads = contestants["ours"].ask("overheads", step_s["ours"])
    for contestant in contestants.values():
        contestant.end()
    return {
        "tokens": shape.tokens,
        "rounds": rounds,
        "steps": steps,
        "peak_flops": statistics.median(peaks),
        "step_s": step_s,
        "seconds": seconds,
        "first_s": first_s,
        "overheads": overheads,
    }


def tables(name: str, found: dict[str, Any]) -> Iterator[str]:
    """The report's lines about one shape."""
    shape = SHAPES[name]
    model, peak, step_s = shape.model, found["peak_flops"], found["step_s"]
    weights = model.matrix_parameters()
    attended = model.flops_per_token(shape.context)
    yield f"## {name}"
    yield ""
    yield (
        f"{model.num_hidden_layers} layers of {model.hidden_size}, vocabulary "
        f"{model.vocab_size:,}, {weights / 1e6:.1f}M weights in products, {shape.rows} rows of "
        f"{shape.context} tokens a step."
    )
    yield f"Peak of bfloat16 products, measured in the same run: {peak / 1e9:.0f} GFLOP/s."
    yield ""
    yield "| | tokens/s | ours is faster by | share of peak, 6N | with attention | first step |"
    yield "|---|---:|---:|---:|---:|---:|"
    for who, seconds in step_s.items():
        speed = found["tokens"] / seconds
        shares = f"{6 * weights * speed / peak:.1%} | {attended * speed / peak:.1%}"
        ratio = seconds / step_s["ours"]
        yield f"| {who} | {speed:,.0f} | {ratio:.2f} | {shares} | {found['first_s'][who]:.0f} s |"
    yield ""
    yield f"Medians of {found['rounds']} rounds of {found['steps']} steps each, in turn."
    yield ""
    costs = found["overheads"]
    each = ", ".join(f"{what} {share:.2%}" for what, share in costs.items())
    yield f"What data and hooks cost of our step: {each}; together **{sum(costs.values()):.2%}**."
    yield ""


def report() -> str:
    """``report.md``, from all results that there are."""
    results = {p.stem.removeprefix("train-"): p for p in sorted(RESULTS.glob("train-*.json"))}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in results.items()}
    lines = ["# Training, measured", ""]
    lines += ["Made by `make bench` (`python benchmarks/train.py`). 6N counts two operations for"]
    lines += ["each weight that takes part in a product, forward, and four backward; the head is"]
    lines += ["included. Attention over a causal context comes on top in the next column.", ""]
    for name in (name for name in SHAPES if name in found):
        lines += [*tables(name, found[name])]
    machine = next(iter(found.values()))["environment"]
    lines += ["## Machine", "", *(f"- {what}: {value}" for what, value in machine.items()), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, keep the figures, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each contestant a round")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.shapes:
        print(f"{name}: {options.rounds} rounds", flush=True)
        found = measure(SHAPES[name], options.contestants, options.rounds, options.steps)
        found["environment"] = environment()
        text = json.dumps(found, indent=1) + "\n"
        (RESULTS / f"train-{name}.json").write_text(text, encoding="utf-8")
        print("\n".join(tables(name, found)), flush=True)
    path = Path(__file__).parent / "report.md"
    path.write_text(report(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
