"""Time to quality: seconds of training until a text is predicted as well as nanoGPT predicts it.

    python benchmarks/speedrun.py --text tinyshakespeare.txt

trains nanoGPT's published CPU recipe (nanogpt.py) and instar's (speedrun.yaml, a recipe like any
other) in turn, once a seed, each run in a process of its own, and compares two numbers: the wall
time of the whole training, and bits per byte of the held-out text afterwards. The bar: at least
as good, in a third of the time, with every seed. docs/speedrun.md tells what was measured.

What counts. The clock starts before the model is built and stops after the last step; it includes
whatever is compiled or tuned on the way. Not in it, for either: importing Python packages, reading
and tokenising the text (shown beside), and evaluation (the clock stands still).

What is measured. The last tenth of the text is held out; tokenizers learn from the rest only. The
held-out text continues the training text: its first token is predicted from the last one of the
training text, and every token exactly once, in windows side by side as long as the model's
training context, each of which begins without memory. Nats / ln 2 / bytes of UTF-8. Beside it
stands the same with windows that overlap by half, where every token sees half a context or more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nanogpt
import numpy as np
import torch
import torch._dynamo  # torch.optim imports it when first used: a second that is not training
from torch import Tensor, nn
from torch.nn import functional as F

from instar.config import read_config
from instar.data.batch import IGNORE
from instar.data.sources import PackedSource
from instar.memory import keep_freed_memory
from instar.model import CausalLM
from instar.model.transformer import initialize
from instar.objectives.language import NextToken
from instar.stages.pretrain import PretrainConfig
from instar.tokenizer.bpe import train_bpe
from instar.tokenizer.hf import Tokenizer, save_tokenizer
from instar.training.interrupt import Interruptible
from instar.training.loop import fit
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner
from instar.training.state import Progress

HERE = Path(__file__).parent
HELD_OUT = 0.1
BASELINE = "nanogpt"
AfterStep = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class Tokens:
    """A text as ids, cut into what is learnt and what is held out.

    Attributes:
        train: Ids of the first nine tenths ``(N,)``.
        held_out: Ids of the rest ``(M,)``.
        held_out_bytes: Its length in UTF-8.
        vocab_size: How many ids there are.
    """

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int
    vocab_size: int


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        name: Which recipe.
        seed: Of weights and order.
        train_s: Seconds of training.
        bits_per_byte: Of the held-out text, afterwards.
        overlapping: The same with windows that overlap by half.
        tokenize_s: Seconds to learn the tokenizer and encode the text; not in ``train_s``.
        parameters: Weights of the model.
        steps: Optimizer steps.
        curve: ``[seconds, bits per byte]`` at some steps on the way.
    """

    name: str
    seed: int
    train_s: float
    bits_per_byte: float
    overlapping: float
    tokenize_s: float
    parameters: int
    steps: int
    curve: list[list[float]]


class Clock:
    """Counts seconds, except while it stands still."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        """Since it was made, without pauses."""
        return time.perf_counter() - self._began - self._paused

    def pause(self, work: Callable[[], float]) -> float:
        """The result of ``work``, whose time does not count."""
        before = self.seconds
        result = work()
        self._paused += self.seconds - before
        return result


def split(text: str) -> tuple[str, str]:
    """The text to learn from, and the last tenth of its characters."""
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def characters(text: str) -> Tokens:
    """One id a character, as nanoGPT does it: the alphabet is that of the whole text."""
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    train, held_out = split(text)
    arrays = [np.array([ids[c] for c in part], dtype=np.uint16) for part in (train, held_out)]
    return Tokens(*arrays, len(held_out.encode()), len(ids))


def pieces(text: str, vocab_size: int) -> Tokens:
    """Byte pairs, learnt from the training text by instar's tokenizer."""
    train, held_out = split(text)
    with tempfile.TemporaryDirectory() as directory:
        save_tokenizer(directory, train_bpe([train], vocab_size), max_length=2**20)
        tokenizer = Tokenizer.load(directory)
    arrays = [np.array(ids, dtype=np.uint16) for ids in tokenizer.encode_batch([train, held_out])]
    return Tokens(*arrays, len(held_out.encode()), tokenizer.vocab_size)


def windows(stream: np.ndarray, context: int, overlap: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets that ask for every id but the first exactly once.

    Args:
        stream: Ids ``(M + 1,)``.
        context: Most inputs a window.
        overlap: Inputs at a window's beginning that were targets of the one before.

    Returns:
        Two tensors ``(windows, context)``; targets are ``IGNORE`` where nothing is asked.
    """
    asked = range(0, len(stream) - 1, context - overlap)
    inputs = np.zeros((len(asked), context), dtype=np.int64)
    targets = np.full((len(asked), context), IGNORE, dtype=np.int64)
    for row, at in enumerate(asked):
        begin, end = max(0, at - overlap), min(len(stream) - 1, at + context - overlap)
        inputs[row, : end - begin] = stream[begin:end]
        targets[row, at - begin : end - begin] = stream[at + 1 : end + 1]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokens: Tokens, context: int, overlap: int = 0) -> float:
    """Bits that ``model`` needs for one byte of the held-out text, in float32."""
    stream = np.concatenate((tokens.train[-1:], tokens.held_out))
    nats = 0.0
    for x, y in zip(*(part.split(64) for part in windows(stream, context, overlap)), strict=True):
        logits = model(x).float().flatten(0, 1)
        nats += F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="sum").item()
    return nats / math.log(2) / tokens.held_out_bytes


def train_instar(
    config: PretrainConfig, tokens: Tokens, seed: int, after_step: AfterStep
) -> CausalLM:
    """The package's own parts, put together as its pretraining stage does."""
    keep_freed_memory()
    shape = config.model.model_copy(update={"vocab_size": tokens.vocab_size})
    model = CausalLM(shape)
    initialize(model, shape, torch.Generator().manual_seed(seed))
    objective = NextToken(model)
    rows = config.batch_size, config.micro_batch
    source = PackedSource(tokens.train, config.context, *rows, seed)
    optimizers = Optimizers(objective, config.training.optimizer)
    hooks = [lambda progress: after_step(progress.step, model)]
    with Interruptible() as interrupt:
        fit(
            *(Learner(objective), source, optimizers, config.training),
            *(Progress(), hooks, Meter(), interrupt),
        )
    return model


def run(name: str, text: str, seed: int, curve: int) -> Result:
    """One run of the baseline, or of the recipe in the YAML file ``name``."""
    baseline = nanogpt.Recipe()
    config = None if name == BASELINE else read_config(PretrainConfig, Path(name))
    context = config.context if config else baseline.context
    steps = config.training.steps if config else baseline.steps
    tokenizing = Clock()
    tokens = pieces(text, config.model.vocab_size) if config else characters(text)
    tokenize_s = tokenizing.seconds
    measured: list[list[float]] = []
    clock = Clock()

    def after_step(step: int, model: nn.Module) -> None:
        if curve and step < steps and step % max(1, steps // curve) == 0:
            seconds = clock.seconds
            measured.append([seconds, clock.pause(lambda: bits_per_byte(model, tokens, context))])

    if config:
        model = train_instar(config, tokens, seed, after_step)
    else:
        model = nanogpt.train(tokens.train, tokens.vocab_size, seed, after_step)
    train_s = clock.seconds
    measured.append([train_s, bits_per_byte(model, tokens, context)])
    return Result(
        name=Path(name).stem,
        seed=seed,
        train_s=train_s,
        bits_per_byte=measured[-1][1],
        overlapping=bits_per_byte(model, tokens, context, context // 2),
        tokenize_s=tokenize_s,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=steps,
        curve=measured,
    )


def in_a_process(name: str, seed: int, options: argparse.Namespace) -> Result:
    """``run`` in a fresh Python, so that nothing is warm that would be cold for a user."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [
            *shlex.split(options.prefix),
            sys.executable,
            __file__,
            "--text",
            str(options.text),
            "--one",
            name,
        ]
        command += ["--seed", str(seed), "--threads", str(options.threads), "--out", str(out)]
        command += ["--curve", str(options.curve)]
        subprocess.run(command, check=True)
        return Result(**json.loads(out.read_text()))


def table(results: list[Result]) -> str:
    """Markdown: seed by seed, the baseline beside the others, and whether the bar is met."""
    lines = [
        "| recipe | seed | training, s | bits per byte | overlapping | time | bar | tokens, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baseline = {r.seed: r for r in results if r.name == BASELINE}
    for r in results:
        share, verdict = "", ""
        if r.name != BASELINE and r.seed in baseline:
            other = baseline[r.seed]
            share = f"1/{other.train_s / r.train_s:.1f}"
            good, fast = r.bits_per_byte <= other.bits_per_byte, r.train_s <= other.train_s / 3
            verdict = "met" if good and fast else "missed"
        lines.append(
            f"| {r.name} | {r.seed} | {r.train_s:.1f} | {r.bits_per_byte:.3f} "
            f"| {r.overlapping:.3f} | {share} | {verdict} | {r.tokenize_s:.1f} |"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes", nargs="*", help="YAML files of the pretrain stage [benchmarks/speedrun.yaml]"
    )
    shakespeare = Path("../shared/data/tinyshakespeare.txt")
    parser.add_argument("--text", type=Path, default=shakespeare, help="UTF-8 [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe [3]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="[all cores]")
    parser.add_argument(
        "--curve", type=int, default=0, metavar="N", help="also measure N times on the way"
    )
    parser.add_argument(
        "--prefix", default="", help="put before each run's command, such as 'taskset -c 0,1'"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--one", metavar="RECIPE", help="a single run in this process")
    parser.add_argument("--seed", type=int, default=0, help="of the single run [0]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare, or make a single run."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    if options.one:
        text = options.text.read_text(encoding="utf-8")
        result = run(options.one, text, options.seed, options.curve)
        print(f"{result.name} {result.seed}: {result.train_s:.1f} s, {result.bits_per_byte:.3f}")
        found: Any = asdict(result)
    else:
        names = [BASELINE, *(options.recipes or [str(HERE / "speedrun.yaml")])]
        results = [
            in_a_process(name, seed, options) for seed in range(options.seeds) for name in names
        ]
        print(table(results))
        found = [asdict(result) for result in results]
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
