"""What a model loses where its matrices are kept in fewer bits: the same text in every precision.

instar import HuggingFaceTB/SmolLM2-135M-Instruct --out runs/smollm2
python benchmarks/precision.py runs/smollm2 text.txt
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from instar.checkpoint import load_causal_lm
from instar.generation import lean
from instar.generation.body import Forward, fast_forward, laid_out
from instar.generation.products import Plain, in_eight_bits
from instar.model import CausalLM
from instar.tokenizer.hf import Tokenizer

ROWS, LENGTH = 8, 200


def main() -> None:
    """Read the text in every way, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help=f"its first {ROWS * LENGTH} tokens are read")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = load_causal_lm(arguments.model)
    tokenizer = Tokenizer.load(arguments.model)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: ROWS * LENGTH]
    if len(ids) < ROWS * LENGTH:
        parser.error(f"the text has {len(ids)} tokens, of {ROWS * LENGTH}")
    rows = torch.tensor(ids).view(ROWS, LENGTH)
    ways = {
        "float32": (fast_forward(model, "float32"), torch.float32),
        "weights as in int8": (
            partial(lean.forward, laid_out(model, rounded)),
            torch.float32,
        ),
        "bfloat16": (fast_forward(model, "bfloat16"), torch.bfloat16),
        "int8": (fast_forward(model, "int8"), torch.bfloat16),
    }
    table = Table("precision", "loss", "divergence from float32", "same first choice")
    exact = None
    for name, (forward, cache) in ways.items():
        found = read(model, forward, cache, rows)
        exact = found if exact is None else exact
        loss = -found[:, :-1].gather(2, rows[:, 1:, None]).mean()
        divergence = (exact.exp() * (exact - found)).sum(dim=-1).mean()
        same = (found.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean()
        table.add_row(name, f"{loss:.4f}", f"{divergence:.2g}", f"{same:.1%}")
    Console().print(table)


def rounded(weight: Tensor, bias: Tensor | None) -> Plain:
    """A matrix that differs from ``weight`` as that of int8 does."""
    whole, scale = in_eight_bits(weight)
    return Plain(whole * scale[:, None], bias)


@torch.no_grad()
def read(model: CausalLM, forward: Forward, cache: torch.dtype, rows: Tensor) -> Tensor:
    """Log-probabilities of what follows every token ``(B, T, V)``, token by token."""
    c = model.config
    shape = (c.num_hidden_layers, 2, len(rows), c.num_key_value_heads, LENGTH, c.head_dim)
    store, numbers, found = torch.zeros(shape, dtype=cache), torch.arange(len(rows)), []
    for column in range(LENGTH):
        place = lean.Place(store, numbers, numbers, torch.full_like(numbers, column), column + 1)
        found.append(forward(rows[:, column : column + 1], place, None).log_softmax(dim=-1))
    return torch.stack(found, dim=1)


if __name__ == "__main__":
    main()
