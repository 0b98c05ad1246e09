"""The run of a stage that trains, from directory to directory: fit its job, save, go on, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from instar.adapters.base import DEFAULT
from instar.adapters.io import save_adapter, tensors_of
from instar.adapters.opening import generation_settings, plain_directory, plain_name
from instar.checkpoint import control_tokens, save_model, weights_of
from instar.distributed import default_device, is_main, on_main, world
from instar.errors import UserError
from instar.files import atomic_directory, write_json
from instar.lineage import (
    Cost,
    Stopwatch,
    peak_gpu_bytes,
    peak_rss_bytes,
    reset_peak_gpu,
    reset_peak_rss,
    write_lineage,
)
from instar.model import CausalLM, ScoreModel
from instar.stages.base import Job, up_to_date
from instar.stages.config import TrainedStageConfig
from instar.stages.preparing import learners, prepared
from instar.training.arithmetic import arithmetic
from instar.training.display import Display
from instar.training.hooks import Log, MetricsFile, Save, Validate
from instar.training.interrupt import Interrupted, Interruptible
from instar.training.loop import REFUSALS, ROLLBACK_RATE, Divergence, TrainingConfig, fit
from instar.training.meter import Meter
from instar.training.monitor import Monitor
from instar.training.state import Progress, Saver, WorkDirectory, load_best, sweep
from instar.training.track import TrackedRun, Tracker, open_tracker

T = TypeVar("T", bound=TrainedStageConfig)


def trained(build: Callable[[T], Job]) -> Callable[[T, Display], Path]:
    """A stage's run: build the job, fit it, write the checkpoint; or go on where it stopped."""

    def run(config: T, display: Display) -> Path:
        out, provenance = config.at(config.out), on_main(config.provenance)
        if on_main(lambda: up_to_date(out, provenance, display)):
            on_main(lambda: sweep(out, provenance["fingerprint"]))
            return out
        watch = Stopwatch()
        reset_peak_rss()
        reset_peak_gpu()
        work = on_main(lambda: WorkDirectory(out, provenance["fingerprint"], display.note))
        display.stage(config.stage, "getting ready")
        torch.manual_seed(config.seed)
        job = build(config)
        for note in job.notes:
            display.note(f"{config.stage}: {note}")
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
    begun = config.beginning()
    generation = generation_settings(config.checkpoint(begun)) if begun else {}
    with atomic_directory(config.at(config.out)) as directory:
        if job.product.adapters:
            base, called = plain_directory(config.origin()), plain_name(config.named_origin())
            save_adapter(job.product, DEFAULT, directory, base, weights, called)
            job.tokenizer.save(directory)
            if isinstance(job.product, CausalLM):
                said = generation | control_tokens(job.tokenizer)
                write_json(directory / "generation_config.json", said)
        else:
            save_model(job.product, directory, job.tokenizer, weights, generation=generation)
        for kept in (work.metrics, work.speed, work.resources):
            if kept.exists():  # the shortest runs end before the first sample
                shutil.copy(kept, directory)
        tokens, flops = progress.tokens, job.flops(progress.tokens)
        peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": peak_gpu_bytes()}
        cost = Cost(watch.wall_s, watch.cpu_s, tokens, flops, **peaks)
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
