"""Writing text: ours beside transformers' ``generate`` and llama.cpp, in turns, in one run.

Every contestant continues the same prompts greedily, by the same number of tokens; what is counted
is new tokens of all rows together over all seconds, the reading of the prompts included. In each
round each contestant has one turn; the table holds the medians of the rounds. The share of memory
bandwidth is the bytes of the matrices times tokens a second at batch 1, over what copying a large
block reaches on this machine.

    python benchmarks/generate.py --shapes S5 S30 --batches 1 8 64
    python benchmarks/generate.py --shapes SmolLM2 --smollm2 DIRECTORY --batches 1 8 32
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from instar.checkpoint import load_causal_lm, save_model
from instar.exchange.gguf_write import write_gguf
from instar.generation import GREEDY, Engine, Stopping
from instar.memory import keep_freed_memory
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.tokenizer.hf import Tokenizer, save_tokenizer

SHAPES = {
    "S5": ModelConfig(
        family="llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=512,
    ),
    "S30": ModelConfig(
        family="llama",
        vocab_size=6400,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=512,
    ),
}
PROMPT = 32

Write = Callable[[int, int], int]
"""Continue so many rows by so many tokens; how many were written in all."""


def ours(directory: Path, precision: Any) -> Write:
    """This project's engine."""
    engine = Engine(load_causal_lm(directory), Tokenizer.load(directory), precision=precision)

    def write(rows: int, new: int) -> int:
        stopping = Stopping(frozenset(), max_new_tokens=new)
        prompts = [row.tolist() for row in prompt_rows(rows)]
        done = engine.generate(prompts, GREEDY, stopping, batch_size=rows)
        return sum(len(completion.ids) for completion in done)

    return write


def theirs(directory: Path, dtype: torch.dtype) -> Write:
    """transformers, as it comes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)

    def write(rows: int, new: int) -> int:
        ids = torch.from_numpy(prompt_rows(rows))
        lengths = {"min_new_tokens": new, "max_new_tokens": new}
        told = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
        return model.generate(ids, **told, **lengths)[:, PROMPT:].numel()

    return write


class LlamaCpp:
    """llama.cpp through its own batches, with a greedy choice by numpy.

    Args:
        file: A GGUF file.
        most: The most rows.
        columns: Tokens of a row.
        threads: How many.
    """

    def __init__(self, file: Path, most: int, columns: int, threads: int) -> None:
        import llama_cpp

        self.c = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p())
        model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = most * columns, most
        settings.n_batch = settings.n_ubatch = max(512, most)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        assert self.context, "llama.cpp refuses the model"
        self.size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(max(512, most), 0, 1)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Read tokens, each with its place, its row, and whether logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, place, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        assert self.c.llama_decode(self.context, batch) == 0

    def likeliest(self, place: int) -> int:
        """The likeliest token after one of the batch."""
        logits = self.c.llama_get_logits_ith(self.context, place)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.size,))))

    def __call__(self, rows: int, new: int) -> int:
        """Continue so many rows."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        prompts, last = prompt_rows(rows), []
        together = 512 // PROMPT  # whole prompts in one batch
        for first in range(0, rows, together):
            own = range(first, min(first + together, rows))
            read = [(row, place) for row in own for place in range(PROMPT)]
            self.decode([(int(prompts[row][i]), i, row, i == PROMPT - 1) for row, i in read])
            last += [self.likeliest(PROMPT * (number + 1) - 1) for number in range(len(own))]
        for step in range(new - 1):
            self.decode([(token, PROMPT + step, row, True) for row, token in enumerate(last)])
            last = [self.likeliest(row) for row in range(rows)]
        return rows * new


def prompt_rows(rows: int) -> np.ndarray:
    """Random tokens that every tokenizer here has ``(rows, PROMPT)``."""
    return np.random.default_rng(0).integers(10, 250, (rows, PROMPT))


def bandwidth() -> float:
    """Bytes a second that are read while a large block is summed."""
    block, best = torch.ones(2**26), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum().item()
        best = min(best, time.perf_counter() - began)
    return 4 * block.numel() / best


def random_model(name: str, directory: Path) -> Path:
    """A model with random weights."""
    config = SHAPES[name]
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    one_merge = [(b"t", b"h")]  # llama.cpp does not open a tokenizer without any
    save_tokenizer(directory, one_merge, config.max_position_embeddings)
    save_model(model, directory)
    return directory


def contestants(directory: Path, arguments: argparse.Namespace) -> dict[str, Write]:
    """Who takes part."""
    found: dict[str, Write] = {
        f"instar {p}": ours(directory, p) for p in ("float32", "bfloat16", *arguments.also)
    }
    found["transformers float32"] = theirs(directory, torch.float32)
    found["transformers bfloat16"] = theirs(directory, torch.bfloat16)
    for kind in ("f32", "bf16"):
        file = directory / f"{kind}.gguf"
        if not file.exists():
            write_gguf(directory, file, kind, {})  # type: ignore[arg-type]
        most, columns = max(arguments.batches), PROMPT + max(arguments.new)
        name = {"f32": "float32", "bf16": "bfloat16"}[kind]
        found[f"llama.cpp {name}"] = LlamaCpp(file, most, columns, arguments.threads)
    return found


def measured(writers: dict[str, Write], rows: int, new: int, rounds: int) -> dict[str, float]:
    """Median tokens a second."""
    speeds: dict[str, list[float]] = {name: [] for name in writers}
    for number in range(rounds + 1):  # the first round warms up
        for name, write in writers.items():
            began = time.perf_counter()
            written = write(rows, new if number else 4)
            if number:
                speeds[name].append(written / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in speeds.items()}


def show(shape: str, directory: Path, arguments: argparse.Namespace) -> None:
    """One shape's table."""
    writers = contestants(directory, arguments)
    table = Table(title=f"{shape}: tokens/s, and in brackets ours (bfloat16) over theirs")
    table.add_column("")
    columns = []
    for rows, new in zip(arguments.batches, arguments.new, strict=True):
        columns.append(measured(writers, rows, new, arguments.rounds))
        table.add_column(f"batch {rows}", justify="right")
    for name in writers:
        cells = []
        for column in columns:
            ratio = column["instar bfloat16"] / column[name]
            cells.append(f"{column[name]:,.0f} ({ratio:.2f})")
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    if arguments.batches[0] == 1:
        weights = load_causal_lm(directory).config.matrix_parameters()
        whole = bandwidth()
        for name, size in (("instar float32", 4), ("instar bfloat16", 2)):
            share = weights * size * columns[0][name] / whole
            console.print(f"{name}, batch 1: {share:.0%} of {whole / 1e9:.1f} GB/s")


def main() -> None:
    """Measure and print."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["S5"])
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M, Hugging Face's files")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--new", nargs="+", type=int, default=[64], help="tokens, for each batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--also", nargs="*", default=[], help="other precisions of ours: int8")
    arguments = parser.parse_args()
    if len(arguments.new) == 1:
        arguments.new *= len(arguments.batches)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as every command of instar does
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            if shape == "SmolLM2":
                for file in arguments.smollm2.iterdir():
                    (directory / file.name).symlink_to(file.resolve())
            else:
                random_model(shape, directory)
            show(shape, directory, arguments)


if __name__ == "__main__":
    main()
