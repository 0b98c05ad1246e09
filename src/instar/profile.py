"""Where the time of a stage's steps goes, and how far the machine is from its peak."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from instar.config import read_yaml
from instar.data.batch import Batch
from instar.data.sources import Source
from instar.distributed import default_device, is_main, launched
from instar.errors import UserError
from instar.machine import product_flops
from instar.model import layers
from instar.objectives import functional
from instar.stages.base import Job
from instar.stages.config import TrainedStageConfig
from instar.stages.preparing import learners, prepared
from instar.stages.registry import STAGES
from instar.stages.verb import read
from instar.training.arithmetic import compiles
from instar.training.interrupt import Interruptible
from instar.training.loop import TrainingConfig, fit
from instar.training.meter import Meter
from instar.training.optimizer import Optimizers
from instar.training.precision import resolve
from instar.training.state import Progress

MARK = "instar::"
REGIONS = ("sampling", "annotating", "optimizer", "attention", "cross-entropy", "data")
"""Parts that are marked while they run. Where they are nested, the first of these counts."""

FUNCTIONS = {
    layers.attend: "attention",
    functional.token_logprobs: "cross-entropy",
    functional.token_logprobs_and_entropy: "cross-entropy",
}
METHODS = {"collect": "sampling", "judge": "annotating", "annotate": "annotating"}
"""What a source may do besides handing out data, by the name of the attribute that does it."""

ATTENTION = ("causal_blocks", "scaled_dot_product", "flash_attention", "efficient_attention")
"""Operators that are attention wherever they run: a mark within compiled code would change it."""

FUSED = "## Call CompiledFxGraph"
"""Compiled code; what is neither product nor attention in there are fused element-wise kernels."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn_linear", "_scaled_mm")
BACKWARD = "autograd::engine::evaluate_function: "
KINDS = ("matrix products", *REGIONS[3:5], "element-wise", *REGIONS[:3], REGIONS[5])
CATEGORIES = (*KINDS, "communication", "other")


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        seconds: A step, by category; they add up to ``step_s``.
        step_s: Seconds of a step.
        flops: Floating-point operations a second that were reached.
        peak: The most that matrix products reach on this machine.
        compiled: Whether the blocks were compiled, as they are in the whole run.
    """

    seconds: dict[str, float]
    step_s: float
    flops: float
    peak: float
    compiled: bool = False


def main(argv: list[str]) -> int:
    """The verb ``profile``."""
    parser = argparse.ArgumentParser(
        prog="instar profile",
        description="Run a few steps of a stage and show where their time goes. Options of the "
        "stage itself are taken as well: --batch-size 8.",
        epilog="Nothing is saved: the stage's directory stays as it is.",
    )
    parser.add_argument("recipe", type=Path, help="a stage's YAML file")
    parser.add_argument("--measure", type=int, default=5, help="steps to measure (default 5)")
    parser.add_argument(
        "--warm",
        type=int,
        default=3,
        help="steps before them (default 3); one at least where code is compiled",
    )
    parser.add_argument("--trace", type=Path, help="write a trace for chrome://tracing here")
    mine, options = parser.parse_known_args(argv)
    if mine.measure < 1 or mine.warm < 0:
        raise UserError("--measure and --warm count steps", "Measure at least one.")
    config = read_stage(mine.recipe, options)
    build = STAGES[config.stage].build
    assert build is not None
    with launched():
        torch.manual_seed(config.seed)
        trace = mine.trace if is_main() else None
        console = Console(highlight=False, quiet=not is_main())
        job, steps = build(config), (mine.warm, mine.measure)
        found = measure(job, config.training, *steps, trace, console.print)
        show(config.stage, found, console)
    return 0


def read_stage(path: Path, options: list[str]) -> TrainedStageConfig:
    """The settings of a stage that trains something; raises ``UserError`` for other stages."""
    name = read_yaml(path).get("stage")
    if name not in STAGES or STAGES[name].build is None:
        able = ", ".join(n for n, stage in STAGES.items() if stage.build)
        raise UserError(f"{path}: the stage {name!r} has no steps", f"Those that have: {able}.")
    config = read(name, path, options, "instar profile FILE.yaml")
    assert isinstance(config, TrainedStageConfig)
    return config


class _Marked:
    """A source whose every item is marked as data.

    Args:
        source: Where they come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __next__(self) -> list[Batch]:
        with record_function(f"{MARK}data"):
            return next(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _marking(function: Callable[..., Any], region: str) -> Callable[..., Any]:
    """The same function, its time marked as a region's."""

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{MARK}{region}"):
            return function(*args, **kwargs)

    return marked


@contextmanager
def marked(job: Job, optimizers: Optimizers, compiled: bool) -> Iterator[Source]:
    """Mark the regions, from outside and for a while: unwatched, they cost nothing.

    Args:
        job: The stage.
        optimizers: What moves its weights.
        compiled: Whether its blocks are; attention, which is inside, is then left as it is.

    Yields:
        The source to draw from.
    """
    with ExitStack() as stack:

        def replace(owner: Any, name: str, region: str) -> None:
            old = getattr(owner, name)
            here = name in vars(owner)
            # Past frozen records' own guard: this is put back before anyone looks.
            object.__setattr__(owner, name, _marking(old, region))
            back = functools.partial(object.__setattr__, owner, name, old)
            stack.callback(back if here else functools.partial(object.__delattr__, owner, name))

        for module in [m for n, m in sys.modules.items() if n.startswith("instar.")]:
            for name, value in list(vars(module).items()):
                if callable(value) and not isinstance(value, type):
                    region = next((r for f, r in FUNCTIONS.items() if f is value), None)
                    inside = compiled and region == "attention"
                    if region and not inside and module.__name__ != __name__:
                        replace(module, name, region)
        for name, region in METHODS.items():
            if hasattr(job.source, name):
                replace(job.source, name, region)
        replace(optimizers, "step", "optimizer")
        yield _Marked(job.source)  # type: ignore[misc]


def measure(
    job: Job,
    training: TrainingConfig,
    warm: int,
    steps: int,
    trace: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Run the real loop for some steps and ask where the time went.

    Code is compiled where the whole run would be; some steps alone would never be worth it.

    Args:
        job: The stage; its models are trained a little.
        training: The stage's settings.
        warm: Steps that are not measured, while kernels are chosen and memory is found; at least
            one where code is compiled.
        steps: Steps that are.
        trace: File to write a trace to that chrome://tracing and Perfetto show.
        note: Told what takes long before the first step.
    """
    device = default_device()
    learner, optimizers = learners(prepared(job.objective.to(device), training), training)
    progress, meter = Progress(), Meter()
    compiled = compiles(training.compile, learner.objective, job.source, training.steps)
    if compiled:
        warm = max(warm, 1)
        note("The first step compiles, as in the whole run: that may take a minute.")

    def run(source: Source, until: int) -> None:
        how = {"steps": until, "compile": "on" if compiled else "off"}
        settings = training.model_copy(update=how)
        progress.finished = False
        with Interruptible() as interrupt:
            fit(learner, source, optimizers, settings, progress, [], meter, interrupt)
        if device.type == "cuda":
            torch.cuda.synchronize()

    if warm:
        run(job.source, warm)
    flops = job.flops(progress.tokens)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with marked(job, optimizers, compiled) as source, profile(activities=activities) as profiler:
        began = time.perf_counter()
        run(source, warm + steps)
        wall_s = time.perf_counter() - began
    if trace:
        profiler.export_chrome_trace(str(trace))
    spent = by_category(profiler.events() or [], device.type == "cuda")
    seconds = {name: spent[name] / steps for name in CATEGORIES}
    seconds["other"] += max(0.0, wall_s / steps - sum(seconds.values()))
    flops = job.flops(progress.tokens) - flops
    peak = product_flops(resolve(training.precision, device), device)
    return Profile(seconds, wall_s / steps, flops / wall_s, peak, compiled)


def by_category(events: Sequence[FunctionEvent], on_device: bool) -> dict[str, float]:
    """Seconds of the events themselves, without those that they call, by category.

    A backward operation belongs to the region in which its forward operation ran: autograd gives
    both the same sequence number.

    Args:
        events: What the profiler saw.
        on_device: Count time on the accelerator instead of the processor.
    """
    regions: dict[int, str] = {}
    for event in events:
        region = _region(event)
        if region and event.sequence_nr >= 0 and not _inside_backward(event):
            regions.setdefault(event.sequence_nr, region)
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name != "CPU":
            continue  # a kernel, whose time the operation that started it has as well
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        if microseconds > 0:
            spent[category(event, regions)] += microseconds / 1e6
    return spent


def category(event: FunctionEvent, regions: dict[int, str]) -> str:
    """What an event counts as.

    Args:
        event: Any of the profiler's.
        regions: Sequence number to the region of the forward operation.
    """
    region = _region(event)
    if region is None:
        for outer in _lineage(event):
            if outer.name.startswith(BACKWARD):
                region = regions.get(outer.sequence_nr)
                break
    if region:
        return region
    if event.name.startswith(("c10d::", "nccl", "gloo", "record_param_comms")):
        return "communication"
    kind, _, name = event.name.partition("::")
    if kind in ("aten", "mkldnn") and name in PRODUCTS:
        return "matrix products"
    known = kind in ("aten", "mkldnn") or event.name.endswith(("Backward", "Backward0"))
    known = known or any(outer.name.startswith(FUSED) for outer in _lineage(event))
    return "element-wise" if known else "other"


def _lineage(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The event, what called it, and so on."""
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent


def _region(event: FunctionEvent) -> str | None:
    """The region that an event happened in: one that is marked, or that its operator tells."""
    names = [outer.name for outer in _lineage(event)]
    marks = {name.removeprefix(MARK) for name in names if name.startswith(MARK)}
    if any(operator in name for name in names for operator in ATTENTION):
        marks.add("attention")
    return next((region for region in REGIONS if region in marks), None)


def _inside_backward(event: FunctionEvent) -> bool:
    return any(outer.name.startswith(BACKWARD) for outer in _lineage(event))


def show(stage: str, found: Profile, console: Console) -> None:
    """Print a table of the categories, largest first, and the distance to the peak."""
    table = Table(title=f"{stage}: {found.step_s * 1e3:,.1f} ms a step")
    table.add_column("what")
    table.add_column("ms a step", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        if seconds:
            table.add_row(name, f"{seconds * 1e3:,.2f}", f"{seconds / found.step_s:.1%}")
    console.print(table)
    console.print(
        f"{found.flops / 1e9:,.1f} GFLOP/s, {found.flops / found.peak:.0%} of the "
        f"{found.peak / 1e9:,.0f} that matrix products reach here. The blocks are "
        f"{'' if found.compiled else 'not '}compiled. Watching costs time itself: unwatched, a "
        "step is shorter."
    )
