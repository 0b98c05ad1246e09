"""What an adapter costs beside its frozen base: ours and PEFT's, forward and backward.

    python benchmarks/adapters.py --methods lora dora --rounds 15

takes the linear layers of some blocks of SmolLM2-135M's shape (576 wide, 1536 in the middle), in
bfloat16 products, with the base in float32 or bfloat16. The base alone, our adapter and PEFT's
take turns; medians of all rounds are printed, in milliseconds, and the bytes that each keeps for
the backward pass beyond the weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instar.adapters.base import AdapterConfig, activate
from instar.adapters.dora import DoRAConfig
from instar.adapters.lora import LoRAConfig

WIDTH, INNER, KEYS = 576, 1536, 192
OURS: dict[str, AdapterConfig] = {"lora": LoRAConfig(rank=8), "dora": DoRAConfig(rank=8)}
THEIRS = {"lora": {}, "dora": {"use_dora": True}}


class Layers(nn.Module):
    """The linear layers of one block, in their order, with what stands between them left out."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "q_proj": (WIDTH, WIDTH),
            "k_proj": (WIDTH, KEYS),
            "v_proj": (WIDTH, KEYS),
            "o_proj": (WIDTH, WIDTH),
            "gate_proj": (WIDTH, INNER),
            "up_proj": (WIDTH, INNER),
            "down_proj": (INNER, WIDTH),
        }
        for name, (i, o) in shapes.items():
            self.add_module(name, nn.Linear(i, o, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Every layer once."""
        mixed = self.q_proj(x) * (self.k_proj(x) + self.v_proj(x)).repeat(1, 1, 3)
        x = x + self.o_proj(mixed)
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Stack(nn.Module):
    """Some blocks' linear layers, where adapters look for them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layers() for _ in range(blocks))
        self.adapters: dict[str, AdapterConfig] = {}

    def forward(self, x: Tensor) -> Tensor:
        """One block after the other."""
        for layers in self.model.layers:
            x = layers(x)
        return x


def ours(base: Stack, method: str) -> Stack:
    """Our adapter, alone in learning."""
    base.requires_grad_(False)
    config = OURS[method]
    config.install(base, "default", torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    base.adapters["default"] = config
    activate(base, "default")  # type: ignore[arg-type]
    return base


def theirs(base: Stack, method: str) -> nn.Module:
    """PEFT's, likewise."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, **THEIRS[method])
    return peft.get_peft_model(base, config)


def kept_bytes(run: Callable[[], Tensor], weights: set[int]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["lora", "dora"], choices=list(OURS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain = Stack(options.blocks)
    x = torch.randn(8, options.tokens // 8, WIDTH).bfloat16().requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        for method in options.methods:
            base = copy.deepcopy(plain).to(dtype).requires_grad_(False)
            models: dict[str, nn.Module] = {
                "base alone": base,
                "instar": ours(copy.deepcopy(base), method),
                "PEFT": theirs(copy.deepcopy(base), method),
            }
            _compare(f"{method}, base in {dtype}", models, x, options.rounds)


def _compare(title: str, models: dict[str, nn.Module], x: Tensor, rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():  # adapters learn in float32 in both
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    for turn in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            forward(model).sum().backward()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    print(title)
    for name, model in models.items():
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = kept_bytes(lambda m=model: forward(m), weights) / 2**20
        print(f"  {name:<11}{statistics.median(times[name]):8.1f} ms {kept:8.1f} MiB")


if __name__ == "__main__":
    main()
