"""This machine's speed, measured: a few blocks, the head, the optimizer, writing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from instar.generation.engine import Engine, Precision
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import decoder_of
from instar.objectives.functional import token_logprobs
from instar.planning.speed import Line, Speed
from instar.rollout.source import RolloutConfig
from instar.tokenizer.hf import Tokenizer
from instar.training.loop import TrainingConfig
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.precision import autocast, resolve


class Trial:
    """Tries the parts of models on this machine: blocks, head, optimizer, decoding; each once.

    Args:
        tokenizer: The life's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._parts: dict[tuple[ModelConfig, torch.dtype], Speed] = {}
        self._writing: dict[tuple[ModelConfig, Precision], tuple[Line, Line]] = {}
        self._updates: dict[tuple[ModelConfig, OptimizerConfig], float] = {}

    def speed(
        self, model: ModelConfig, training: TrainingConfig, rollout: RolloutConfig | None
    ) -> Speed:
        """This machine's speed, after some seconds of trying what was not tried before.

        Args:
            model: The shape.
            training: Says in which format, and which rule moves the weights.
            rollout: How the stage samples; if it does not, decoding is not tried.
        """
        moved = (model, training.optimizer)
        with torch.random.fork_rng(devices=[]):
            dtype = resolve(training.precision, torch.device("cpu"))
            computed = (model, dtype)
            if computed not in self._parts:
                self._parts[computed] = _try_parts(model, self.tokenizer, dtype)
            if moved not in self._updates:
                self._updates[moved] = _try_update(model, training.optimizer)
            decode, rest = self._decoding(model, rollout, dtype) if rollout else (Line(), Line())
        update = self._updates[moved]
        return replace(self._parts[computed], update=update, decode=decode, decode_rest=rest)

    def _decoding(
        self, model: ModelConfig, rollout: RolloutConfig, dtype: torch.dtype
    ) -> tuple[Line, Line]:
        """Seconds of a new token: of one block, and of everything else."""
        written = (model, rollout.written_in(dtype))
        if written not in self._writing:
            self._writing[written] = _try_decoding(model, self.tokenizer, written[1])
        return self._writing[written]


def _try_parts(model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> Speed:
    """What does not depend on the stage."""
    with autocast(dtype, torch.device("cpu")):
        block, reading, saved = _try_block(model)
        ends = _try_ends(model)
        head, head_reading, head_saved = _try_head(model)
    return Speed(
        block=block,
        reading=reading,
        ends=ends,
        head=head,
        head_reading=head_reading,
        decode=Line(),
        decode_rest=Line(),
        update=0.0,
        saved=saved,
        head_saved=head_saved,
        read=_try_reading(tokenizer),
    )


def _timed(action: Callable[[], object], times: int = 5) -> float:
    """Median seconds of an action that has run before."""
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return median(spent)


DEPTH = 4
SHAPES = ((8, 32), (64, 32), (8, 256))
"""Rows and widths that a block is tried with."""


def _try_block(model: ModelConfig) -> tuple[Line, Line, Line]:
    """Seconds forward and backward, forward alone, bytes kept.

    Several blocks, as far as the model has them: what one keeps must leave the cache for the next.
    """
    layers = min(model.num_hidden_layers, DEPTH)
    decoder = decoder_of(model.model_copy(update={"num_hidden_layers": layers}))
    blocks = decoder.blocks
    points: list[list[tuple[float, float, float]]] = [[], [], []]
    for rows, width in SHAPES:
        x = torch.randn(rows, width, model.hidden_size, requires_grad=True)
        positions = torch.arange(width)[None]
        rotary = decoder.rotary(positions, torch.bfloat16)

        def forward(x: Tensor = x, rotary: tuple[Tensor, Tensor] | None = rotary) -> Tensor:
            for block in blocks:
                x = block(x, rotary, None, None)
            return x

        def both(forward: Callable[[], Tensor] = forward) -> None:
            out = forward()
            out.backward(torch.ones_like(out))

        both()
        again = _timed(both)
        with torch.no_grad():
            forward()
            alone = _timed(forward)
        kept = saved_bytes(forward, blocks)
        for line, value in zip(points, (again, alone, kept), strict=True):
            line.append((rows * width, width, value / len(blocks)))
    block_s, reading_s, saved = (Line.through(*line) for line in points)
    return block_s, reading_s, saved


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, weights apart."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def _try_ends(model: ModelConfig) -> Line:
    """Seconds of the embedding and the last normalisation, forward and backward."""
    tried = (256, 2048)
    ends = {"num_hidden_layers": 1, "max_position_embeddings": max(tried)}
    decoder = decoder_of(model.model_copy(update=ends))
    del decoder.blocks[:]
    points = []
    for tokens in tried:
        ids = torch.randint(model.vocab_size, (1, tokens))

        def both(ids: Tensor = ids) -> None:
            hidden = decoder(ids)
            hidden.backward(torch.ones_like(hidden))

        both()
        points.append((tokens, _timed(both)))
    return _flat(points)


def _try_head(model: ModelConfig) -> tuple[Line, Line, Line]:
    """Seconds forward and backward, forward alone, and bytes kept."""
    head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
    both_points, reading_points, saved_points = [], [], []
    for tokens in (64, 1024):
        hidden = torch.randn(1, tokens, model.hidden_size, requires_grad=True)
        targets = torch.randint(model.vocab_size, (1, tokens))

        def forward(hidden: Tensor = hidden, targets: Tensor = targets) -> Tensor:
            return token_logprobs(hidden, head.weight, targets)

        def both(forward: Callable[[], Tensor] = forward) -> None:
            forward().sum().backward()

        both()
        both_points.append((tokens, _timed(both)))
        with torch.no_grad():
            forward()
            reading_points.append((tokens, _timed(forward)))
        saved_points.append((tokens, float(saved_bytes(forward, head))))
    return _flat(both_points), _flat(reading_points), _flat(saved_points)


def _flat(points: list[tuple[int, float]]) -> Line:
    """The line through two points ``(tokens, value)``."""
    (n1, t1), (n2, t2) = points
    token = max(0.0, (t2 - t1) / (n2 - n1))
    return Line(max(0.0, t1 - token * n1), token)


def _shallow(model: ModelConfig, layers: int) -> CausalLM:
    return CausalLM(model.model_copy(update={"num_hidden_layers": layers}))


def _try_update(model: ModelConfig, config: OptimizerConfig) -> float:
    """Seconds of one optimizer step, clipping included: from one block to all of them."""
    spent = []
    for layers in (1, 2):
        shallow = _shallow(model, layers)
        optimizers = Optimizers(shallow, config)
        for p in shallow.parameters():
            p.grad = torch.randn_like(p)

        def step(shallow: CausalLM = shallow, optimizers: Optimizers = optimizers) -> None:
            nn.utils.clip_grad_norm_(shallow.parameters(), 1.0)
            optimizers.step(0.1)

        step()
        spent.append(_timed(step))
    return spent[0] + (model.num_hidden_layers - 1) * max(0.0, spent[1] - spent[0])


def _try_decoding(
    model: ModelConfig, tokenizer: Tokenizer, precision: Precision
) -> tuple[Line, Line]:
    """The same, for one way of writing."""
    shallow = [_shallow(model, layers) for layers in (1, 2)]
    engines = [Engine(part, tokenizer, precision=precision) for part in shallow]
    points: list[list[tuple[float, float, float]]] = [[], []]
    steps = min(12, model.max_position_embeddings // 4)
    longest = min(88, model.max_position_embeddings - steps - 1)
    for rows, width in ((8, longest // 4), (64, longest // 4), (64, longest)):
        prompts = [[tokenizer.start_id] * width] * rows
        spent = []
        for engine in engines:

            def write(new: int, engine: Engine = engine, prompts: list[list[int]] = prompts):
                stopping = Stopping(frozenset(), max_new_tokens=new)
                engine.generate(prompts, Sampling(), stopping)

            write(2)
            prefill = _timed(lambda write=write: write(1))
            spent.append((_timed(lambda write=write: write(1 + steps)) - prefill) / steps)
        layer = max(0.0, spent[1] - spent[0])
        points[0].append((rows, width + steps / 2, layer))
        points[1].append((rows, width + steps / 2, max(0.0, spent[0] - layer)))
    return Line.through(*points[0]), Line.through(*points[1])


def _try_reading(tokenizer: Tokenizer) -> float:
    """Seconds to tokenise a byte of text."""
    text = "One day in spring, 春天来了, the pond was full of 12 frogs. " * 20
    texts = [text] * 50
    tokenizer.encode_batch(texts[:1])
    return _timed(lambda: tokenizer.encode_batch(texts), 3) / (len(text.encode()) * len(texts))
