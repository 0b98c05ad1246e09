"""What all stages share: a job, and its run from directory to directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from instar.adapters.base import DEFAULT, lr_factors, penalties, store_frozen
from instar.adapters.io import save_adapter, tensors_of
from instar.adapters.opening import plain_directory
from instar.checkpoint import control_tokens, save_model, weights_of
from instar.data.sources import Source
from instar.distributed import default_device, is_main, on_main, world
from instar.errors import UserError
from instar.files import atomic_directory, write_json
from instar.generation.engine import Engine
from instar.lineage import (
    LINEAGE,
    Cost,
    Stopwatch,
    fingerprint_of,
    peak_rss_bytes,
    reset_peak_rss,
    write_lineage,
)
from instar.model import CausalLM, ScoreModel
from instar.model.transformer import Headed
from instar.objectives.base import Objective
from instar.objectives.keeping import AdapterPenalty, Kept
from instar.planning.survey import Survey
from instar.planning.workload import Workload
from instar.rollout.source import RolloutConfig
from instar.stages.config import StageConfig, TrainedStageConfig
from instar.tokenizer.hf import Tokenizer
from instar.training.arithmetic import arithmetic
from instar.training.display import Display
from instar.training.eight_bit import float8_products
from instar.training.hooks import Log, MetricsFile, Save, Validate
from instar.training.interrupt import Interrupted, Interruptible
from instar.training.layers import freeze, rate_factors
from instar.training.loop import REFUSALS, ROLLBACK_RATE, Divergence, TrainingConfig, fit
from instar.training.meter import Meter
from instar.training.monitor import Monitor
from instar.training.optimizer import Optimizers
from instar.training.parallel import Learner
from instar.training.precision import Precision, resolve
from instar.training.state import Progress, Saver, WorkDirectory, load_best, sweep
from instar.training.track import TrackedRun, Tracker, open_tracker


@dataclass
class Job:
    """A stage, ready to be trained.

    Attributes:
        objective: Owns what learns.
        source: What it learns from.
        product: The model to keep.
        tokenizer: Saved beside it.
        flops: Floating-point operations of a run that trained on so many tokens, annotating and
            sampling included.
        validate: Measures held-out data; at least `loss`.
        finish: What is done to the product when training is over.
    """

    objective: Objective
    source: Source
    product: CausalLM | ScoreModel
    tokenizer: Tokenizer
    flops: Callable[[int], int]
    validate: Callable[[], dict[str, float]] | None = None
    finish: Callable[[], None] = lambda: None


S = TypeVar("S", bound=StageConfig)
T = TypeVar("T", bound=TrainedStageConfig)


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A verb: its name, its config and what it does.

    Attributes:
        name: The verb.
        summary: One line for `--help`.
        config: Class of its config.
        run: Does it; returns the directory it wrote.
        build: Makes what is trained; none for stages that train nothing.
        needs: What it will ask of a machine, given its data; the same.
    """

    name: str
    summary: str
    config: type[S]
    run: Callable[[S, Display], Path]
    build: Callable[[S], Job] | None = None
    needs: Callable[[S, Survey], Workload] | None = None


def up_to_date(out: Path, provenance: dict[str, Any], display: Display) -> bool:
    """Whether the output exists and was made from the same.

    Raises:
        UserError: Something is there that no stage has written; it would be replaced.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / LINEAGE).exists():
        raise UserError(f"{out} exists, and no stage has made it", "Choose another `out`.")
    if fingerprint_of(out) != provenance["fingerprint"]:
        return False
    display.note(f"{out} is up to date; delete it to make it again")
    return True


def by_main(run: Callable[[S, Display], Path]) -> Callable[[S, Display], Path]:
    """The run of a stage that is no work for many: rank 0 does it, the others wait."""
    return lambda config, display: on_main(lambda: run(config, display))


def trained(build: Callable[[T], Job]) -> Callable[[T, Display], Path]:
    """A stage's run: build the job, fit it, write the checkpoint; or go on where it stopped."""

    def run(config: T, display: Display) -> Path:
        out, provenance = config.at(config.out), on_main(config.provenance)
        if on_main(lambda: up_to_date(out, provenance, display)):
            on_main(lambda: sweep(out, provenance["fingerprint"]))
            return out
        watch = Stopwatch()
        reset_peak_rss()
        work = on_main(lambda: WorkDirectory(out, provenance["fingerprint"], display.note))
        display.stage(config.stage, "getting ready")
        torch.manual_seed(config.seed)
        job = build(config)
        how = _arithmetic(job, config.training)
        display.note(f"{config.stage}: products in {how['products']}, {how['code']}")
        name, settings = f"{config.run.name}/{out.name}", config.model_dump(mode="json")
        record = TrackedRun(name, config.run, settings, work.path)
        with ExitStack() as stack:
            trackers = []
            for which in config.training.track if is_main() else ():
                trackers.append(open_tracker(which, record))
                stack.callback(trackers[-1].close)
            progress = _train(job, config.training, work, watch, display, trackers)
        weights = learnt_weights(job.product)
        made = provenance | {"processes": world()[1], "arithmetic": how}
        on_main(lambda: _write(config, job, weights, work, made, progress, watch))
        return out

    return run


def learnt_weights(product: CausalLM | ScoreModel) -> dict[str, Tensor]:
    """The tensors to store: a model's, or an adapter's; all ranks must ask, rank 0 is told."""
    return tensors_of(product, DEFAULT) if product.adapters else weights_of(product)


def _arithmetic(job: Job, training: TrainingConfig) -> dict[str, str]:
    """How the job will be computed."""
    objective, source = job.objective.to(default_device()), job.source
    return arithmetic(objective, source, training.precision, training.compile, training.steps)


def _write(
    config: TrainedStageConfig,
    job: Job,
    weights: dict[str, Tensor],
    work: WorkDirectory,
    record: dict[str, Any],
    progress: Progress,
    watch: Stopwatch,
) -> None:
    """The stage's directory: what was learnt, how it went, what it cost."""
    with atomic_directory(config.at(config.out)) as directory:
        if job.product.adapters:
            base = plain_directory(config.origin())
            save_adapter(job.product, DEFAULT, directory, base, weights)
            job.tokenizer.save(directory)
            if isinstance(job.product, CausalLM):
                write_json(directory / "generation_config.json", control_tokens(job.tokenizer))
        else:
            save_model(job.product, directory, job.tokenizer, weights)
        for kept in (work.metrics, work.speed, work.resources):
            if kept.exists():  # the shortest runs end before the first sample
                shutil.copy(kept, directory)
        tokens, flops = progress.tokens, job.flops(progress.tokens)
        cost = Cost(watch.wall_s, watch.cpu_s, tokens, flops, peak_rss_bytes())
        learnt = [p for p in job.product.parameters() if p.requires_grad]
        made = {
            "stage": record["config"]["stage"],
            "steps": progress.step,
            "skipped": progress.skipped,
            "rollbacks": progress.rollbacks,
            "parameters": sum(p.numel() for p in job.product.parameters()),
            "trained_parameters": sum(p.numel() for p in learnt),
        }
        write_lineage(directory, record | made, cost)
    work.remove()


def _train(
    job: Job,
    training: TrainingConfig,
    work: WorkDirectory,
    watch: Stopwatch,
    display: Display,
    trackers: Sequence[Tracker] = (),
) -> Progress:
    """Fit, from the beginning or from the last saved state."""
    if job.validate is None and (training.keep_best or training.patience):
        raise UserError(
            "training.keep_best and training.patience need validation, and this stage validates "
            "nothing",
            "Leave them out.",
        )
    objective = prepared(job.objective.to(default_device()), training)
    learner, optimizers = learners(objective, training)
    meter, file = Meter(), MetricsFile(work, trackers)
    saver = Saver(work, learner, optimizers, job.source, meter)
    progress = saver.load(display.note)
    if progress is None:
        if is_main():
            work.metrics.unlink(missing_ok=True)
        progress = Progress()
        saver.save(progress)  # so that there is always a state to go back to
    elif progress.step:
        display.note(f"going on from step {progress.step}")
    watch.add(progress.wall_s, progress.cpu_s)
    hooks = [Log(training, meter, file, display, watch), Save(training, saver)]
    if job.validate:
        # First, because it may end the run, and the log and the last save must know.
        hooks.insert(0, Validate(training, job.validate, learner, work, file, display, optimizers))
    monitor = Monitor(work.resources) if is_main() else nullcontext()
    with saver, monitor, Interruptible() as interrupt:
        while not progress.finished:
            try:
                interrupt.check()
                fit(learner, job.source, optimizers, training, progress, hooks, meter, interrupt)
            except Interrupted:
                if not progress.refused:  # else the last state is better, and replayed exactly
                    saver.save(progress)
                saver.wait()
                told = f"stopped at step {progress.step}; the same command goes on from there"
                display.note(told)
                raise
            except Divergence:
                progress = _roll_back(saver, progress, training, display)
        saver.wait()
    if training.keep_best and on_main(work.best.exists):
        learner.load_state_dict(load_best(work))
    elif optimizers.average:
        optimizers.average.exchange()
    job.finish()
    return progress


def learners(objective: Objective, training: TrainingConfig) -> tuple[Learner, Optimizers]:
    """A prepared objective spread over the processes, and what moves its weights."""
    dtype = resolve(training.precision, default_device())
    learner = Learner(objective, training.parallel, dtype, training.layers.unfreeze_every)
    factors = rate_factors(objective, training.layers.lr_decay)
    for p, factor in lr_factors(objective).items():
        factors[p] = factor * factors.get(p, 1.0)
    return learner, Optimizers(objective, training.optimizer, factors, training.ema)


def prepared(objective: Objective, training: TrainingConfig) -> Objective:
    """Its models told how to compute, before they are copied or spread.

    Raises:
        UserError: Some settings do not go together, or do not fit the device.
    """
    eight_bit = training.optimizer.name == "adamw8bit"
    if eight_bit and training.parallel != "ddp" and world()[1] > 1:
        raise UserError(
            "training.optimizer.name is adamw8bit, whose moments cannot be sharded",
            "Use adamw, or set training.parallel to ddp.",
        )
    torch.use_deterministic_algorithms(training.deterministic)
    freeze(objective, training.layers.freeze)
    dtype = resolve(training.precision, default_device())
    # Shards hold weights of one format.
    whole = training.parallel == "ddp" or world()[1] == 1
    for model in objective.modules():
        if isinstance(model, Headed):
            for adapter in () if whole else model.adapters.values():
                if adapter.needs_whole:
                    raise UserError(
                        f"training.parallel is {training.parallel}, which spreads each weight, and "
                        f"{adapter.method} needs whole ones",
                        "Set training.parallel to ddp, or choose another method.",
                    )
            if whole:
                store_frozen(model, dtype)
            model.model.recompute = training.activation_checkpointing
            if training.precision == "float8":
                float8_products(model)
    return Kept(objective, {"penalty": AdapterPenalty()}) if penalties(objective) else objective


def _roll_back(
    saver: Saver, progress: Progress, training: TrainingConfig, display: Display
) -> Progress:
    """Go back to the last saved state, with a lower learning rate.

    Raises:
        UserError: That was done often enough.
    """
    if progress.rollbacks == training.rollbacks:
        raise UserError(
            f"the gradient was not finite, or far too long, for {REFUSALS} steps in a row "
            f"(step {progress.step}), and going back {progress.rollbacks} times did not help",
            "Lower the learning rate, or set precision to float32.",
        )
    back = saver.load(display.note)
    assert back is not None  # the first one was saved before the first step
    back.rollbacks = progress.rollbacks + 1
    back.skipped = progress.skipped
    # What `best.pt` holds stays the best.
    back.best_loss = min(back.best_loss, progress.best_loss)
    saver.save(back)
    display.note(
        f"diverged at step {progress.step}: back to step {back.step}, "
        f"at {ROLLBACK_RATE**back.rollbacks:g} times the learning rate"
    )
    return back


def sampler(
    policy: CausalLM, tokenizer: Tokenizer, config: RolloutConfig, training: Precision
) -> Engine:
    """The engine that answers with a policy in training.

    Args:
        policy: Answers with the weights that it has at the time.
        tokenizer: Its own.
        config: Says in which format, unless that is `auto`.
        training: The format of training's products, which then decides.
    """
    precision = config.precision
    if precision == "auto":
        dtype = resolve(training, next(policy.parameters()).device)
        precision = "float32" if dtype == torch.float32 else "bfloat16"
    return Engine(policy, tokenizer, precision=precision)
