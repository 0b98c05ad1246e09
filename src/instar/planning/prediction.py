"""Memory and time of a stage: sums over its parts."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Literal

import torch

from instar.model.config import ModelConfig
from instar.objectives.functional import CHUNK, GRAIN, KEPT_LOGITS
from instar.planning.hardware import Hardware
from instar.planning.speed import Speed
from instar.planning.weights import Weights
from instar.planning.workload import Experience, Extent, Workload
from instar.training.precision import resolve

Sharding = Literal["ddp", "zero2", "zero3"]
SHARDINGS: tuple[Sharding, ...] = ("ddp", "zero2", "zero3")
"""What several devices split (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1): nothing but
the batch; gradients and optimizer state as well; the weights too, as FSDP does."""

KERNEL_BYTES = 540 * 2**10
"""What oneDNN keeps of every shape of bfloat16 product that it has met, measured (torch 2.13).
Training's float32 products are not its own, nor are those of compiled writing."""
MOST_KERNELS = 1024
"""So many shapes it remembers (its ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
SLACK = 1.7
"""Heap over live memory on a CPU: freed blocks are kept (`instar.memory`), and where sizes change
from step to step not every one fits again. Measured on single stages: 1.6 to 2.1."""
EXAM_ROWS = 256
"""Replies that an exam writes side by side (``evaluation.exams``)."""
RECORD_BYTES = 5
"""Bytes of memory for a byte of text, once it is Python's objects and token ids; measured."""
LEFT_BYTES = 120 * 2**20
"""What earlier stages of a life leave in its process, those of data and tokenizer included: pieces
too small to give back; measured."""
CONTEXT_BYTES = 1.5e9
"""CUDA's context, libraries' workspaces and fragmentation on an accelerator; an assumption."""


@dataclass(frozen=True)
class Prediction:
    """What a stage will take.

    Attributes:
        memory: Bytes of each part, of one device, at the peak.
        seconds: Of each part, of the whole stage.
        tokens: Positions that go through training.
        flops: Floating-point operations of training, all devices together.
    """

    memory: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    flops: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """The peak."""
        return sum(self.memory.values())

    @property
    def wall_s(self) -> float:
        """Seconds on the clock."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class StagePlan:
    """What is foreseen of one stage.

    Attributes:
        work: What it asks.
        alone: By sharding: what it takes as a process of its own.
        in_life: The most memory within `instar grow`, exams included; 0 where that is not known.
    """

    work: Workload
    alone: dict[str, Prediction]
    in_life: float = 0.0


def predict(
    work: Workload,
    speed: Speed,
    hardware: Hardware,
    sharding: Sharding = "ddp",
    base_bytes: float = CONTEXT_BYTES,
    met: Set[tuple[object, ...]] = frozenset(),
) -> Prediction:
    """Add a stage up.

    Args:
        work: What the stage asks.
        speed: What the parts of its model take.
        hardware: Where it runs.
        sharding: What several devices split.
        base_bytes: Memory of the process before it has a model.
        met: Shapes of products that this process has met, if there are more than this stage's.
    """
    whole, work = work, work.shared(hardware.world_size)
    size = item_bytes(work, hardware)
    memory = _state(work, hardware, sharding, size)
    # Compiled writing, on a processor, keeps keys and values as it multiplies; others in float32.
    kept = size if hardware.is_cpu else 4
    memory |= {"activations": _activations(work, speed), "kv cache": _cache(work, size, kept)}
    if hardware.is_cpu:
        memory["kernels"] = kernel_bytes(len(products(work) | met), size)
        memory["data"] = RECORD_BYTES * work.text_bytes
        memory["kept when freed"] = (SLACK - 1) * sum(memory.values())
    memory["framework"] = base_bytes
    model = work.model
    mean_width = _mean(extent.width for step in work.steps for extent in step)
    flops = work.learners * model.flops_per_token(round(mean_width)) * whole.tokens
    seconds = _seconds(work, speed, hardware, sharding)
    return Prediction({k: v for k, v in memory.items() if v}, seconds, whole.tokens, flops)


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def item_bytes(work: Workload, hardware: Hardware) -> int:
    """Bytes of a number that matrices are multiplied in."""
    device = torch.device("cpu" if hardware.is_cpu else "cuda")
    asked = work.training.precision
    return 2 if asked == "auto" and not hardware.is_cpu else resolve(asked, device).itemsize


def kernel_bytes(shapes: int, size: int) -> float:
    """What oneDNN remembers of so many shapes of products of numbers of ``size`` bytes."""
    return KERNEL_BYTES * min(MOST_KERNELS, shapes) if size == 2 else 0.0


def _state(work: Workload, hardware: Hardware, sharding: Sharding, size: int) -> dict[str, float]:
    """Weights, gradients and optimizer state of one device."""
    weights, learners = work.weights, work.learners
    spread = sharding != "ddp" and hardware.world_size > 1
    shards = hardware.world_size if spread else 1
    name = work.training.optimizer.name
    moments = (2 if name == "adamw8bit" else 8) * weights.learnt
    if name == "muon":
        moments -= 4 * weights.learnt_matrices  # one momentum instead of two moments
    average = 4 * weights.learnt if work.training.ema else 0
    state = {
        "weights": _weights(weights, learners, work.frozen, shards, size),
        "gradients": 4 * weights.learnt * learners / shards,
        "optimizer": moments * learners / shards,
        "average": average * learners / shards,
        "ties": 4 * weights.started * work.ties * learners,
        # Each model and twin has its own; the sums with the layers are kept for the backward pass.
        "beside": 4 * weights.beside * (2 * learners + work.frozen),
    }
    # Products read a copy in their own format.
    if spread:
        state["gathered"] = _gathered(work, sharding, size)
        state["casts"] = size * work.model.vocab_size * work.model.hidden_size if size < 4 else 0.0
    else:
        state["casts"] = size * (weights.numbers - weights.frozen_layers) if size < 4 else 0.0
    if hardware.is_cpu:
        # States are copied before they are written, to train on meanwhile.
        saved = 4 * (weights.learnt + weights.beside) + weights.packed_bytes + moments + average
        state["state being saved"] = saved * learners
    return state


def _weights(weights: Weights, learners: int, frozen: int, shards: int, size: int) -> float:
    """Bytes of all models between their uses; those that do not learn are whole on every device.

    Frozen twins share what does not learn with the models that do (``adapters.base.frozen_twin``),
    unless those are cut into shards.
    """
    kept = 4 * (weights.numbers - weights.frozen_layers) + size * weights.frozen_layers
    if shards > 1:
        kept = 4 * weights.numbers / shards
    shared = weights.adapted and shards == 1
    twin = 4 * (weights.learnt if shared else weights.numbers)
    return learners * (kept + weights.packed_bytes) + frozen * twin


def _gathered(work: Workload, sharding: Sharding, size: int) -> float:
    """Bytes that sharded models gather for their passes (``model.sharding.shard``).

    Blocks in the products' format: all of them until their gradients are there (zero2), or for as
    long as replies are written; otherwise one, and the next. What is outside of the blocks, and its
    gradients, in float32 from the forward pass to the end of the backward one.
    """
    weights = work.weights
    blocks = size * weights.blocks
    if sharding == "zero2":
        blocks *= work.learners
    elif not work.experience:
        blocks *= min(1.0, 2 / work.model.num_hidden_layers)
    return blocks + 4 * (weights.outside + weights.learnt_outside) * work.learners


def _activations(work: Workload, speed: Speed) -> float:
    """What the widest micro-batch keeps, and the gradients of what is differentiated first."""
    widest = work.widest
    block = speed.saved(widest.tokens, widest.width)
    wanted = widest.learnt
    if wanted * work.model.vocab_size > KEPT_LOGITS:
        wanted = min(wanted, CHUNK)
    head = speed.head_saved(wanted)
    kept = block
    if work.training.activation_checkpointing:
        # Only what enters a block, in float32; inside, one block at a time is computed anew.
        kept = 4 * work.model.hidden_size * widest.tokens
    backward = max(block, head)
    return work.learners * work.model.num_hidden_layers * kept + head + backward


def _cache(work: Workload, size: int, kept: int) -> float:
    """What the engine holds for the largest rollout: its own copy of the matrices, and a cache."""
    sizes = [len(one.replies) * (max(one.prompts) + max(one.replies)) for one in work.experience]
    if not sizes:
        return 0.0
    return engine_bytes(work.model, max(sizes), size, kept)


def engine_bytes(model: ModelConfig, columns: int, size: int, kept: int) -> float:
    """The engine's copy of the matrices, laid out for writing, and its keys and values.

    Args:
        model: The shape.
        columns: Tokens of all rows together.
        size: Bytes of a number of a matrix.
        kept: Bytes of a number of keys and values.
    """
    column = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return size * model.matrix_parameters() + kept * column * columns


@dataclass(frozen=True)
class Sitting:
    """The exams that follow a stage of a life, in the same process.

    Attributes:
        questions: Tokens of each.
        max_new_tokens: Longest reply.
    """

    questions: list[int]
    max_new_tokens: int

    def memory(self, model: ModelConfig, base_bytes: float, kernels: float) -> float:
        """Bytes of the process on a CPU while replies are written.

        Args:
            model: Shape of the model.
            base_bytes: Memory of the process before it has a model.
            kernels: Bytes that oneDNN remembers by then.
        """
        rows = min(EXAM_ROWS, len(self.questions))
        columns = rows * (max(self.questions, default=0) + self.max_new_tokens)
        held = 4 * model.parameters() + engine_bytes(model, columns, 4, 4)
        return base_bytes + SLACK * (held + kernels)


def products(work: Workload) -> set[tuple[object, ...]]:
    """Different shapes of products that a stage meets; oneDNN keeps a kernel for each.

    Those in training's format: held-out data is read in float32.
    """
    model = work.model
    d, f = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    linear = {(d, queries), (d, keys), (queries, d), (d, f), (f, d)}
    extents = {(e.rows, e.width) for step in work.steps for e in step}
    heads = {-(-e.learnt // GRAIN) for step in work.steps for e in step if e.learnt < CHUNK}
    # Forward, and backward to both factors; attention has two products.
    met: set[tuple[object, ...]] = {("head", n, part) for n in heads for part in range(3)}
    met |= {(shape, r * w, part) for r, w in extents for shape in linear for part in range(3)}
    met |= {("attention", extent, part) for extent in extents for part in range(6)}
    for batch in (one.batch for one in work.experience):  # frozen models read it
        met |= {(shape, batch.tokens, 0) for shape in linear}
        met |= {("attention", (batch.rows, batch.width), part) for part in range(2)}
    return met


def _seconds(
    work: Workload, speed: Speed, hardware: Hardware, sharding: Sharding
) -> dict[str, float]:
    """Seconds of each part of the whole stage, for one rank."""
    n, steps = hardware.world_size, work.training.steps
    # Muon needs whole matrices: every rank orthogonalises all of them.
    divided = sharding != "ddp" and work.training.optimizer.name != "muon"
    learn = _mean(sum(learning_s(work, speed, e) for e in step) for step in work.steps)
    read = work.readings * _mean(
        sum(reading_s(work, speed, e) for e in step) for step in work.steps
    )
    seconds = {
        "learning": steps * learn * speed.whole,
        "annotating": steps * read,
        "optimizer": steps * update_s(work, speed) * speed.whole / (n if divided else 1),
    }
    if work.experience:
        count = steps / work.experience[0].steps
        seconds["sampling"] = count * _mean(sampling_s(work, speed, o) for o in work.experience)
        seconds["annotating"] += count * _mean(judging_s(work, speed, o) for o in work.experience)
    validation = sum(reading_s(work, speed, e) for e in work.validation)
    seconds["validating"] = work.validations * (1 + work.readings) * validation
    if n > 1:
        spoken = communication_bytes(work, n, sharding, item_bytes(work, hardware))
        spoken *= steps / hardware.slowest_link
        seconds["communication"] = max(0.0, spoken - seconds["learning"] / 2)
    shapes = {(e.rows, e.width) for step in work.steps for e in step}
    seconds["getting ready"] = speed.read * work.text_bytes + speed.kernel * len(shapes)
    return {name: spent for name, spent in seconds.items() if spent}


def update_s(work: Workload, speed: Speed) -> float:
    """Seconds to move what learns."""
    return work.learners * speed.update * work.weights.share


def learning_s(work: Workload, speed: Speed, extent: Extent) -> float:
    """Seconds to learn from a micro-batch."""
    blocks = work.model.num_hidden_layers * speed.block(extent.tokens, extent.width)
    if work.training.activation_checkpointing:
        blocks += work.model.num_hidden_layers * speed.reading(extent.tokens, extent.width)
    rest = speed.ends(extent.tokens)
    return work.learners * (blocks + rest) + speed.head(extent.learnt)


def reading_s(work: Workload, speed: Speed, extent: Extent) -> float:
    """Seconds of a forward pass without gradients."""
    blocks = work.model.num_hidden_layers * speed.reading(extent.tokens, extent.width)
    return blocks + speed.head_reading(extent.learnt)


def judging_s(work: Workload, speed: Speed, one: Experience) -> float:
    """Seconds of the frozen models' and the critic's passes over a rollout."""
    blocks = work.model.num_hidden_layers * speed.reading(one.batch.tokens, one.batch.width)
    heads = one.readings * speed.head_reading(one.batch.learnt)
    return (one.readings + one.scorings) * blocks + heads


def sampling_s(work: Workload, speed: Speed, one: Experience) -> float:
    """Seconds to write a rollout's replies, side by side, dropping rows as the engine does."""
    longest, layers = max(one.prompts), work.model.num_hidden_layers
    seconds = layers * speed.reading(len(one.prompts) * longest, longest)
    for rows, columns in decoding(one):
        seconds += layers * speed.decode(rows, columns) + speed.decode_rest(rows)
    return seconds


def decoding(one: Experience) -> Iterator[tuple[int, int]]:
    """Rows and columns of each step that writes a token; finished rows take part no more."""
    longest = max(one.prompts)
    for step in range(1, max(one.replies)):
        alive = sum(length > step for length in one.replies)
        yield alive, longest + step


def communication_bytes(work: Workload, devices: int, sharding: Sharding, size: int) -> float:
    """Bytes that each device sends in a step.

    A ring sums P values with 2 P (n - 1) / n sent by each device; FSDP gathers the weights twice
    and scatters the gradients once (Rajbhandari et al. 2020, arXiv:1910.02054, section 7). Copies
    are brought together once a step, shards after every micro-batch (``Learner.synchronising``).

    Args:
        work: What each device does of the stage.
        devices: How many.
        sharding: What they split.
        size: Bytes of a number of the products' format, in which blocks are gathered.
    """
    weights = work.weights
    # Gradients travel in float32, as what is outside of the blocks, which stays gathered.
    if sharding == "ddp":
        sent = 2 * 4 * weights.learnt
    else:
        blocks = size * weights.blocks * (2 if sharding == "zero3" else 1)
        sent = 4 * weights.learnt + blocks + 4 * weights.outside
        sent *= _mean(len(step) for step in work.steps)
        if work.training.optimizer.name == "muon":
            sent += 2 * weights.learnt_matrices  # every rank orthogonalises whole ones, in bfloat16
    return work.learners * sent * (devices - 1) / devices
