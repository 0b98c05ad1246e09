"""How long the parts of a model take: measured on this machine, or reckoned from a data sheet.

Either way a part is a straight line: something to begin with, something a token, and for
attention something a token and column. A stage is then a sum of such parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from instar.generation.engine import Engine
from instar.generation.sampling import Sampling
from instar.generation.stopping import Stopping
from instar.model import CausalLM, ModelConfig
from instar.model.layers import Block, rotary_tables
from instar.model.transformer import Decoder
from instar.objectives.functional import token_logprobs
from instar.planning.hardware import Hardware
from instar.tokenizer.hf import Tokenizer
from instar.training.optimizer import OptimizerConfig, Optimizers
from instar.training.precision import autocast, resolve

UTILISATION = 0.4
"""Share of an accelerator's peak that training reaches: between the 38% to 43% of Llama 3 405B on
H100 (Grattafiori et al. 2024, arXiv:2407.21783, table 4) and the 46% of PaLM (Chowdhery et al.
2022, arXiv:2204.02311, table 3). Narrow models reach less."""

STREAMING = 0.6
"""Share of an accelerator's memory bandwidth that decoding reaches."""

LAUNCH_S = 5e-6
"""Seconds to launch a kernel from Python; a block is about forty, and as many again backward."""
BLOCK_KERNELS = 40


@dataclass(frozen=True)
class Line:
    """``start + token n + pair n w`` for n tokens that each see w columns."""

    start: float = 0.0
    token: float = 0.0
    pair: float = 0.0

    def __call__(self, tokens: float, width: float = 0.0) -> float:
        """The value."""
        return self.start + self.token * tokens + self.pair * tokens * width

    @staticmethod
    def through(*points: tuple[float, float, float]) -> Line:
        """The line through three points ``(tokens, width, value)``, the last two of equal tokens.

        No part of it is negative: where noise says so, it is nothing.
        """
        (n1, w1, t1), (n2, w2, t2), (_, w3, t3) = points
        pair = max(0.0, (t3 - t2) / (n2 * (w3 - w2)))
        token = max(0.0, (t2 - t1 - pair * (n2 * w2 - n1 * w1)) / (n2 - n1))
        return Line(max(0.0, t1 - token * n1 - pair * n1 * w1), token, pair)


@dataclass(frozen=True)
class Speed:
    """Seconds and bytes of a model's parts, for one shape of model on one device.

    Attributes:
        block: Seconds of one block, forward and backward.
        reading: The same forward only.
        ends: Seconds of the embedding and the last normalisation, forward and backward.
        head: Seconds of the head with its cross-entropy, forward and backward.
        head_reading: The same forward only.
        decode: Seconds of one block for one new token of every row; rows are its tokens.
        decode_rest: Seconds a new token of every row costs besides: head, draw, bookkeeping.
        update: Seconds of one optimizer step of one model.
        saved: Bytes that a block keeps for the backward pass.
        head_saved: Bytes that the head keeps, a token with a target.
        kernel: Seconds to choose the kernels of a new number of tokens.
        read: Seconds to read and tokenise a byte of text.
    """

    block: Line
    reading: Line
    ends: Line
    head: Line
    head_reading: Line
    decode: Line
    decode_rest: Line
    update: float
    saved: Line
    head_saved: Line
    kernel: float = 0.0
    read: float = 0.0


def reckoned(model: ModelConfig, optimizer: OptimizerConfig, hardware: Hardware) -> Speed:
    """An accelerator's speed from its data sheet and what is usually reached of it.

    Args:
        model: The shape.
        optimizer: The rule that moves the weights.
        hardware: One device of it counts; sharing the work is a matter of its own.
    """
    reached = UTILISATION * hardware.flops
    width = model.num_attention_heads * model.head_dim
    head = 2 * model.vocab_size * model.hidden_size / reached
    products = model.matrix_parameters() - model.vocab_size * model.hidden_size
    products = 2 * products / model.num_hidden_layers
    # Reads and writes weight, gradient and two moments, four bytes each.
    update = 28 * model.parameters() / (STREAMING * hardware.bandwidth)
    if optimizer.name == "muon":
        update += orthogonalization_flops(model) / reached
    # Half of a causal context is visible on average.
    reading = Line(BLOCK_KERNELS * LAUNCH_S, products / reached, 2 * width / reached)
    streaming = STREAMING * hardware.bandwidth
    columns = 2 * 2 * model.num_key_value_heads * model.head_dim
    return Speed(
        block=Line(2 * reading.start, 3 * reading.token, 3 * reading.pair),
        reading=reading,
        ends=Line(3 * LAUNCH_S),
        head=Line(0.0, 3 * head),
        head_reading=Line(0.0, head),
        # Every step reads the weights once, in two bytes, and each row its own keys and values.
        decode=Line(reading.start + products / streaming, reading.token, columns / streaming),
        decode_rest=Line(1e-3, head),
        update=update,
        saved=Line(0.0, fused_block_bytes(model)),
        head_saved=Line(0.0, 8.0 * model.vocab_size),
    )


def orthogonalization_flops(model: ModelConfig) -> int:
    """Operations of Muon's five Newton-Schulz iterations on the matrices of all blocks.

    An iteration on m rows and n columns, m the fewer: the Gram matrix 2 m^2 n, its square 2 m^3,
    and their polynomial times the matrix 2 m^2 n (``training.optimizer.orthogonalize``).
    """
    d, f = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    block = [(d, queries)] * 2 + [(d, keys)] * 2 + [(d, f)] * 3
    iteration = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in block)
    return 5 * model.num_hidden_layers * iteration


def fused_block_bytes(model: ModelConfig) -> float:
    """Bytes a token that a block keeps with fused attention, products in bfloat16.

    Counted as Korthikanti et al. do (2022, arXiv:2205.05198, section 4.1), for this block: two
    normalisations keep their input in float32 and give a product's factor; queries and keys are
    kept before and after normalisation, values once, the result of attention twice; gate and up,
    and the gate's activation and its product with up.
    """
    d, f = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    norms = 2 * (4 + 2) * d
    attention = (4 + 2) * (queries + keys) + 2 * keys + 2 * 2 * queries
    return norms + attention + 4 * 2 * f


def measured(
    model: ModelConfig, optimizer: OptimizerConfig, tokenizer: Tokenizer, sampled: bool
) -> Speed:
    """This machine's speed: one block, the head and the optimizer, tried for some seconds.

    Args:
        model: The shape.
        optimizer: The rule that moves the weights.
        tokenizer: The life's.
        sampled: Whether the stage samples; if not, decoding is not tried.
    """
    device = torch.device("cpu")
    generator = torch.get_rng_state()
    dtype = resolve("auto", device)
    with autocast(dtype, device):
        block, reading, saved, kernel = _try_block(model)
        ends = _try_ends(model)
        head, head_reading, head_saved = _try_head(model)
    decode, rest = _try_decoding(model, tokenizer, dtype) if sampled else (Line(), Line())
    torch.set_rng_state(generator)
    return Speed(
        block,
        reading,
        ends,
        head,
        head_reading,
        decode,
        rest,
        _try_update(model, optimizer),
        saved,
        head_saved,
        kernel,
        _try_reading(tokenizer),
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


def _try_block(model: ModelConfig) -> tuple[Line, Line, Line, float]:
    """Seconds forward and backward, forward alone, bytes kept, seconds to choose kernels.

    Several blocks, as far as the model has them: what one keeps must leave the cache for the next.
    """
    blocks = nn.ModuleList(Block(model, 0) for _ in range(min(model.num_hidden_layers, DEPTH)))
    points: list[list[tuple[float, float, float]]] = [[], [], []]
    chosen = []
    for rows, width in SHAPES:
        x = torch.randn(rows, width, model.hidden_size, requires_grad=True)
        positions = torch.arange(width)[None]
        rotary = rotary_tables(positions, model.head_dim, model.rope_theta, torch.bfloat16)

        def forward(x: Tensor = x, rotary: tuple[Tensor, Tensor] = rotary) -> Tensor:
            for block in blocks:
                x = block(x, rotary, None, None)
            return x

        def both(forward: Callable[[], Tensor] = forward) -> None:
            out = forward()
            out.backward(torch.ones_like(out))

        first = _timed(both, times=1)
        again = _timed(both)
        chosen.append(first - again)
        with torch.no_grad():
            forward()
            alone = _timed(forward)
        kept = saved_bytes(forward, blocks)
        for line, value in zip(points, (again, alone, kept), strict=True):
            line.append((rows * width, width, value / len(blocks)))
    block_s, reading_s, saved = (Line.through(*line) for line in points)
    # The first shape also loads the library's code.
    return block_s, reading_s, saved, max(0.0, median(chosen))


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
    decoder = Decoder(model.model_copy(update={"num_hidden_layers": 1}))
    decoder.layers = nn.ModuleList()
    points = []
    for tokens in (256, 2048):
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
    model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype
) -> tuple[Line, Line]:
    """Seconds of a new token: of one block, and of everything else.

    Every new column is a shape that the library has not seen, as it is in training.
    """
    engines = [Engine(_shallow(model, layers), tokenizer) for layers in (1, 2)]
    points: list[list[tuple[float, float, float]]] = [[], []]
    steps = 12
    for rows, width in ((8, 24), (64, 24), (64, 88)):
        prompts = [[tokenizer.bos_id] * width] * rows
        spent = []
        for engine in engines:

            def write(new: int, engine: Engine = engine, prompts: list[list[int]] = prompts):
                stopping = Stopping(frozenset(), max_new_tokens=new)
                with autocast(dtype, torch.device("cpu")):
                    engine.generate(prompts, Sampling(), stopping)

            write(2)
            began = time.perf_counter()
            write(1)
            prefill = time.perf_counter() - began
            spent.append((_timed(lambda write=write: write(1 + steps), 1) - prefill) / steps)
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
