from __future__ import annotations

from dataclasses import replace

import pytest

from instar.adapters.lora import LoRAConfig
from instar.model.config import ModelConfig
from instar.planning.hardware import ACCELERATORS, find
from instar.planning.prediction import (
    KERNEL_BYTES,
    SHARDINGS,
    SLACK,
    Sitting,
    communication_bytes,
    decoding,
    predict,
    products,
)
from instar.planning.reckoned import reckoned
from instar.planning.speed import Line, Speed
from instar.planning.thumb import rules
from instar.planning.workload import Experience, Extent, Workload
from instar.training.loop import TrainingConfig
from instar.training.optimizer import OptimizerConfig

NOTHING = Line()


@pytest.fixture
def work(shape: ModelConfig) -> Workload:
    return Workload(shape, TrainingConfig(steps=10), [[Extent(4, 32, 100), Extent(2, 16, 20)]])


def speed_of(**lines: Line) -> Speed:
    names = ("block", "reading", "ends", "head", "head_reading", "decode", "decode_rest")
    parts = {name: lines.get(name, NOTHING) for name in names}
    return Speed(
        **parts,
        update=0.0,
        saved=lines.get("saved", NOTHING),
        head_saved=lines.get("head_saved", NOTHING),
    )


def test_time_is_the_sum_of_the_parts(work: Workload) -> None:
    speed = speed_of(block=Line(1.0, 0.01), head=Line(0.0, 0.1))
    found = predict(work, speed, ACCELERATORS["H100"])
    # Two micro-batches of 128 and 32 tokens through three blocks, 120 targets, ten steps.
    assert found.seconds == {"learning": pytest.approx(10 * (3 * (2 + 1.6) + 12))}
    assert found.tokens == 10 * 160


def test_a_critic_learns_as_well_and_a_reference_reads(work: Workload) -> None:
    speed = speed_of(block=Line(0.0, 3.0), reading=Line(0.0, 1.0))
    one = predict(work, speed, ACCELERATORS["H100"]).seconds
    two = predict(replace(work, learners=2), speed, ACCELERATORS["H100"]).seconds
    read = predict(replace(work, frozen=1, readings=1), speed, ACCELERATORS["H100"]).seconds
    assert two["learning"] == 2 * one["learning"]
    assert read["annotating"] == pytest.approx(one["learning"] / 3)


def test_adamw_takes_sixteen_bytes_a_weight(work: Workload) -> None:
    memory = predict(work, speed_of(), ACCELERATORS["H100"]).memory
    parameters = work.model.parameters()
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert state == 16 * parameters
    assert (
        predict(replace(work, frozen=1), speed_of(), ACCELERATORS["H100"]).memory["weights"]
        == 8 * parameters
    )


def test_checkpointing_trades_memory_for_time(work: Workload) -> None:
    speed = speed_of(block=Line(0.0, 3.0), reading=Line(0.0, 1.0), saved=Line(0.0, 1000.0))
    training = work.training.model_copy(update={"activation_checkpointing": True})
    plain = predict(work, speed, ACCELERATORS["H100"])
    saving = predict(replace(work, training=training), speed, ACCELERATORS["H100"])
    assert saving.seconds["learning"] == pytest.approx(plain.seconds["learning"] * 4 / 3)
    # Three blocks' inputs and one whole block, and its gradients.
    kept = 3 * 4 * work.model.hidden_size * 128
    assert saving.memory["activations"] == kept + 1000 * 128
    assert plain.memory["activations"] == 4 * 1000 * 128


def test_sharding_divides_what_it_says(work: Workload) -> None:
    hardware = find("8xH100")
    found = {s: predict(work, speed_of(), hardware, s).memory for s in SHARDINGS}
    ddp, zero2, zero3 = (found[s] for s in SHARDINGS)
    for part in ("weights", "gradients", "optimizer"):
        assert zero2[part] == zero3[part] == ddp[part] / 8
    assert "gathered" not in ddp


def test_models_that_do_not_learn_are_whole_on_every_rank(work: Workload) -> None:
    held = replace(work, frozen=2)
    for sharding in SHARDINGS:
        alone, beside = (
            predict(w, speed_of(), find("8xH100"), sharding).memory["weights"] for w in (work, held)
        )
        assert beside - alone == 2 * 4 * work.model.parameters()


def test_blocks_are_gathered_in_half_precision_and_what_is_outside_in_float32(
    work: Workload,
) -> None:
    gathered = {
        s: predict(work, speed_of(), find("8xH100"), s).memory["gathered"]
        for s in ("zero2", "zero3")
    }
    # The embedding, which is the head as well, and the last normalisation; and their gradients.
    outside = 8 * (300 * 32 + 32)
    blocks = work.model.parameters() - 300 * 32 - 32
    assert gathered["zero2"] == 2 * blocks + outside
    assert gathered["zero3"] == 2 * blocks * 2 / 3 + outside, "a block of the three, and the next"


def test_one_rank_has_nothing_to_share(work: Workload) -> None:
    one, same = (predict(work, speed_of(), find("H100"), s) for s in ("ddp", "zero3"))
    assert one == same


def test_copies_of_what_learns_are_counted(work: Workload) -> None:
    training = work.training.model_copy(update={"ema": 0.9})
    held = replace(work, training=training, ties=3)
    memory = predict(held, speed_of(), find("8xH100"), "zero2").memory
    assert memory["average"] == 4 * work.model.parameters() / 8
    assert memory["ties"] == 3 * 4 * work.model.parameters()
    assert not {"average", "ties"} & predict(work, speed_of(), find("H100")).memory.keys()


def test_the_average_is_saved_as_well(work: Workload) -> None:
    cpu = replace(ACCELERATORS["H100"], name="cpu")
    averaged = work.training.model_copy(update={"ema": 0.9})
    saved = {
        training.ema: predict(replace(work, training=training), speed_of(), cpu).memory
        for training in (work.training, averaged)
    }
    more = saved[0.9]["state being saved"] - saved[0.0]["state being saved"]
    assert more == 4 * work.model.parameters()


def test_only_an_adapter_has_gradients_and_moments(work: Workload) -> None:
    lora = replace(work, adapter=LoRAConfig(rank=2, targets=["q_proj"]))
    learnt = 3 * 2 * (32 + 32)
    speed = replace(speed_of(), update=1.0)
    found = predict(lora, speed, find("8xH100"))
    assert found.memory["gradients"] == 4 * learnt
    assert found.memory["optimizer"] == 8 * learnt
    every = work.model.parameters() + learnt
    assert found.seconds["optimizer"] == pytest.approx(10 * learnt / every)
    assert communication_bytes(lora, 2, "ddp", 2) == 8 * learnt / 2
    # Blocks are gathered with what is frozen in them; two micro-batches, half of it elsewhere.
    outside = 300 * 32 + 32
    gathered = 2 * 2 * (every - outside) + 4 * outside
    assert communication_bytes(lora, 2, "zero3", 2) == 2 * (gathered + 4 * learnt) / 2


def test_a_reference_shares_the_base_unless_that_is_sharded(work: Workload) -> None:
    lora = replace(work, adapter=LoRAConfig(rank=2, targets=["q_proj"]))
    learnt = 3 * 2 * (32 + 32)
    more = {}
    for sharding in SHARDINGS:
        alone, beside = (
            predict(w, speed_of(), find("8xH100"), sharding).memory["weights"]
            for w in (lora, replace(lora, frozen=1))
        )
        more[sharding] = beside - alone
    assert more["ddp"] == 4 * learnt
    assert more["zero3"] == more["zero2"] == 4 * (work.model.parameters() + learnt)


def test_four_bits_are_fewer(work: Workload) -> None:
    lora = replace(work, adapter=LoRAConfig(rank=2))
    weights = [
        predict(w, speed_of(), find("H100")).memory["weights"]
        for w in (work, lora, replace(lora, quantize="nf4"))
    ]
    assert weights == sorted(weights, reverse=True)
    packed = replace(lora, quantize="nf4").weights
    assert packed.packed_bytes > 0
    assert packed.share == pytest.approx(lora.weights.share), "fewer bits are no fewer weights"


def test_every_rank_measures_all_held_out_data(work: Workload) -> None:
    speed = speed_of(reading=Line(0.0, 1.0))
    held_out = replace(work, validation=[Extent(8, 32, 100)] * 4)
    one, eight = (
        predict(held_out, speed, find(name)).seconds["validating"] for name in ("H100", "8xH100")
    )
    assert one == eight == 3 * 4 * 8 * 32


def test_devices_share_the_work(work: Workload) -> None:
    speed = reckoned(work.model, work.training.optimizer, ACCELERATORS["H100"])
    one = predict(work, speed, find("H100")).seconds["learning"]
    eight = predict(work, speed, find("8xH100")).seconds["learning"]
    # What a kernel takes to launch is not shared.
    assert one / 8 < eight < one


def test_what_travels(work: Workload) -> None:
    every, outside = work.model.parameters(), 300 * 32 + 32
    blocks = every - outside
    # Half of everything lies on the other device.
    assert communication_bytes(work, 2, "ddp", 2) == 8 * every / 2
    # Blocks travel in two bytes, the rest in four, gradients in four: after each of two
    # micro-batches.
    assert (
        communication_bytes(work, 2, "zero2", 2) == 2 * (4 * every + 2 * blocks + 4 * outside) / 2
    )
    assert (
        communication_bytes(work, 2, "zero3", 2) == 2 * (4 * every + 4 * blocks + 4 * outside) / 2
    )


def test_copies_meet_once_a_step_and_shards_after_every_micro_batch(work: Workload) -> None:
    more = replace(work, steps=[step * 3 for step in work.steps])
    sent = {s: [communication_bytes(w, 8, s, 2) for w in (work, more)] for s in SHARDINGS}
    assert sent["ddp"][1] == sent["ddp"][0]
    assert sent["zero2"][1] == 3 * sent["zero2"][0]
    assert sent["zero3"][1] == 3 * sent["zero3"][0]


def test_muon_gathers_its_matrices_once_a_step(work: Workload) -> None:
    muon = work.training.model_copy(update={"optimizer": OptimizerConfig(name="muon")})
    moved = replace(work, training=muon)
    more = communication_bytes(moved, 2, "zero3", 2) - communication_bytes(work, 2, "zero3", 2)
    assert more == 2 * (work.model.matrix_parameters() - 300 * 32) / 2
    assert communication_bytes(moved, 2, "ddp", 2) == communication_bytes(work, 2, "ddp", 2)


def test_activations_are_those_of_the_widest_micro_batch(work: Workload) -> None:
    speed = speed_of(saved=Line(0.0, 10.0), head_saved=Line(0.0, 1.0))
    memory = predict(work, speed, ACCELERATORS["H100"]).memory
    # Three blocks keep theirs, the head its own, and one block's gradients come back.
    assert memory["activations"] == 3 * 1280 + 100 + 1280


def test_finished_rows_are_dropped_as_the_engine_drops_them() -> None:
    one = Experience([10, 12], [1, 2, 4, 4], steps=1, batch=Extent(4, 16, 11))
    # Rows leave at once: the shortest after its first token.
    assert list(decoding(one)) == [(3, 13), (2, 14), (2, 15)]


def test_products_count_shapes_once(work: Workload) -> None:
    again = replace(work, steps=work.steps * 5)
    assert products(again) == products(work)
    wider = replace(work, steps=[*work.steps, [Extent(4, 40, 100)]])
    assert products(wider) > products(work), "a superset"


def test_kernels_are_kept_for_half_precision_only(work: Workload) -> None:
    cpu = replace(ACCELERATORS["H100"], name="cpu")
    found = {}
    for precision in ("bfloat16", "float32"):
        training = work.training.model_copy(update={"precision": precision})
        found[precision] = predict(replace(work, training=training), speed_of(), cpu).memory
    assert found["bfloat16"]["kernels"] == KERNEL_BYTES * len(products(work))
    assert found["bfloat16"]["casts"] == 2 * work.model.parameters()
    assert not {"kernels", "casts"} & found["float32"].keys()


def test_an_exam_holds_its_cache_and_what_the_library_remembers(shape: ModelConfig) -> None:
    exam = Sitting([10] * 300, max_new_tokens=6)
    cache = 256 * 16 * (3 * 2 * 2 * 8 * 4)
    weights = 4 * (shape.parameters() + shape.matrix_parameters())
    expected = 1e8 + SLACK * (weights + cache + 1e6)
    assert exam.memory(shape, base_bytes=1e8, kernels=1e6) == pytest.approx(expected)


def test_rules_of_thumb_by_hand(shape: ModelConfig) -> None:
    thumb = rules(shape, tokens=1000)
    assert thumb.parameters == 3 * (4 * 32**2 + 32 * 300)
    assert thumb.memory_bytes == 28 * thumb.parameters
    assert thumb.flops == 6 * thumb.parameters * 1000
