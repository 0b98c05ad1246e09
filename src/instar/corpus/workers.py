"""The same function for many pieces of work, on this machine's cores or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from instar.errors import UserError, installing

W = TypeVar("W")

LOADED = ["instar.corpus.clean", "instar.corpus.duplicates", "instar.corpus.write"]
"""Modules that every worker needs."""

Progress = Callable[[int, int], None]


class Workers:
    """Who does the work; a context, at whose end processes go.

    What is done must be a function of a module, of one picklable argument, that leaves its result
    on the disk: then it does not matter who does it, in which order, or how often it was begun.

    Args:
        runner: "local", or "ray" for a cluster (the one that is running, or one on this machine),
            or a cluster's address: "ray://HOST:PORT".
        count: Processes on this machine; by default one a core.

    Raises:
        UserError: The runner is not known, or cannot be had.
    """

    def __init__(self, runner: str = "local", count: int | None = None) -> None:
        self.count = count or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None
        self._ray: Any = None
        if runner == "local":
            # Unasked, the column engine would look for a cluster, at the cost of loading Ray.
            os.environ["DAFT_RUNNER"] = "native"
        else:
            self._ray = _connected(runner, count)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._ray is not None:
            self._ray.shutdown()

    def run(self, function: Callable[[W], None], work: Sequence[W], progress: Progress) -> None:
        """Do all of it; stops at the first error, and raises it.

        Args:
            function: What to do.
            work: What to do it with, in an order that results do not depend on.
            progress: Told after each how many are done, and how many there are.
        """
        progress(0, len(work))
        if self._ray is not None:
            self._on_ray(function, work, progress)
        elif min(self.count, len(work)) > 1:
            self._in_processes(function, work, progress)
        else:
            for done, piece in enumerate(work, start=1):
                function(piece)
                progress(done, len(work))

    def _in_processes(
        self, function: Callable[[W], None], work: Sequence[W], progress: Progress
    ) -> None:
        if self._pool is None:
            # Not forked from this process: it has threads, of the column engine, that a fork would
            # lose. A server without threads, which loads once what all need, is forked instead.
            can_fork = "forkserver" in multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
            if can_fork:
                context.set_forkserver_preload(LOADED)
            self._pool = ProcessPoolExecutor(self.count, mp_context=context)
        waiting = {self._pool.submit(function, piece) for piece in work}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress(len(work) - len(waiting), len(work))
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory",
                "Run it again with fewer --workers; finished partitions are kept.",
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def _on_ray(self, function: Callable[[W], None], work: Sequence[W], progress: Progress) -> None:
        ray = self._ray
        # Within a task, columns are worked on where they are, not spread once more.
        here = {"env_vars": {"DAFT_RUNNER": "native"}}
        task = ray.remote(_at_home).options(runtime_env=here)
        waiting = [task.remote(os.getcwd(), function, piece) for piece in work]
        try:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                progress(len(work) - len(waiting), len(work))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            for left in waiting:
                ray.cancel(left, force=True)


def _at_home(directory: str, function: Callable[[W], None], piece: W) -> None:
    """Do a piece of work where relative paths mean what they mean to who asked for it."""
    os.chdir(directory)
    function(piece)


def _connected(runner: str, count: int | None) -> Any:
    """Ray, connected, and the column engine told to use it."""
    if runner != "ray" and not runner.startswith("ray://"):
        raise UserError(f"no runner {runner!r}", "Known: local, ray, ray://HOST:PORT.")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"--runner {runner} needs Ray", installing("corpus,ray")) from None
    import daft

    address = runner if runner.startswith("ray://") else os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address=address,
            num_cpus=None if address else count,
            ignore_reinit_error=True,
            log_to_driver=False,
            include_dashboard=False,
            configure_logging=False,
        )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error})", "Start one: `ray start --head`."
        ) from None
    daft.set_runner_ray(noop_if_initialized=True)
    os.environ["DAFT_RUNNER"] = "ray"
    return ray
