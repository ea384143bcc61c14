"""Runs a sweep: batches of work stream through engines on Ray Data, answers stream into the run.

Placement, backpressure and retries are Ray's: engines are the stateful actors of one `map_batches`.
A batch is one block, so that it is given out, retried and handed back by itself. Only this process
writes: what a killed driver loses is what the engines have not handed back, at most
`work.IN_FLIGHT` batches per engine. Knows nothing of models, prompts or scoring.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vllm_flow.counts import counted
from vllm_flow.eval.sweep import cluster, machines
from vllm_flow.eval.sweep.engine_actor import EngineActor
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.machines import Pool, SweepError, Watch, pool_of
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.sweep.work import SEQUENCES, in_flight, requests_of

RETRIES = 3
"""How often a batch is given out again after its engine or machine died. A batch that kills every
engine it meets then ends the run instead of going round for ever."""

DEATHS = ("ActorDiedError", "ActorUnavailableError", "RayActorError", "NodeDiedError")


class MachineLost(SweepError):
    """A machine is gone: what is left can be asked of the others."""


@dataclass
class Progress:
    """What a sweep has done so far."""

    answered: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """How often each reason came, the error rows of this sweep."""
    examples: dict[str, str] = field(default_factory=dict)
    """The whole first text of each reason."""

    @property
    def errors(self) -> int:
        return sum(self.reasons.values())

    def count(self, answers: pa.Table) -> None:
        """Add a batch."""
        self.answered += answers.num_rows
        for error in answers["error"].to_pylist():
            if error is not None:
                # What comes before the colon is common to such errors, what follows is the item's.
                reason = error.partition(":")[0]
                self.reasons[reason] += 1
                self.examples.setdefault(reason, error)


def collect(
    run: Run,
    batches: Iterable[pa.Table],
    max_errors: int | None,
    tell: Callable[[Progress, pa.Table], None] = lambda progress, batch: None,
    progress: Progress | None = None,
) -> Progress:
    """Write every batch of answers as it comes.

    Args:
        progress: of an earlier stream of the same sweep, which goes on.

    Raises:
        SweepError: more than `max_errors` rows are errors; they are written all the same.
    """
    progress = progress or Progress()
    for batch in batches:
        run.append(batch)
        progress.count(batch)
        tell(progress, batch)
        if max_errors is not None and progress.errors > max_errors:
            raise SweepError(
                f"{counted(progress.errors, 'request')} failed, more than --max-errors {max_errors}. "
                f"{most_frequent(progress)}"
            )
    return progress


def most_frequent(progress: Progress, count: int = 3) -> str:
    """The reasons that came most often, as a sentence."""
    told = [
        f"{number} x {_short(reason)}" for reason, number in progress.reasons.most_common(count)
    ]
    return "Most frequent: " + "; ".join(told) + "." if told else ""


def connect(address: str | None, engines: int | None) -> Pool:
    """Join the cluster at `address`, or start Ray on this machine; one engine per GPU, else one.

    A cluster that is joined may grow, so that engines may start later for which there is no room yet.

    Raises:
        cluster.ClusterError: nothing that is Ray answers at the address, in a few seconds' time.
        SweepError: it has no room for the engines.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Leave CUDA_VISIBLE_DEVICES alone for actors without a GPU (Ray's coming default).
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Where it cannot join a cluster; 20 by default, of 40 seconds each.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    import ray

    named = os.environ.get("RAY_ADDRESS")
    address = named if address in (None, "", "auto") and named else address
    growing = False
    if ray.is_initialized():
        pass
    elif address and address != "local":
        join(address)
        growing = True
    else:
        # Ray's own processes on this machine would print beside the progress bar; their files have it.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            ray.init(
                address="local",  # without it, Ray would also join what an earlier cluster left in /tmp
                num_cpus=max(os.cpu_count() or 1, engines or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        # Of Ray's own processes that did not come up, Ray says so with a bare Exception.
        except Exception as error:
            raise SweepError(f"Ray cannot start here: {_short(str(error), 600)}") from error
    return pool_of(machines.alive(), engines, growing)


@contextmanager
def connected(address: str | None, engines: int | None) -> Iterator[Pool]:
    """`connect`, and disconnect on leaving, however that happens: engines and Ray's own processes end.

    A connection that was there before is left alone.
    """
    import ray

    before = ray.is_initialized()
    try:
        yield connect(address, engines)
    finally:
        if not before:
            ray.shutdown()


def join(address: str) -> None:
    """Connect to the cluster at `address`.

    Raises:
        cluster.ClusterError: see :func:`connect`.
    """
    import ray

    cluster.check(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise cluster.ClusterError(address, _short(str(error), 600)) from None
    except SystemExit:  # which Ray raises where it gives up
        raise cluster.ClusterError(address, "it does not let this machine join") from None


def answers(
    batches: Sequence[pa.Table],
    options: EngineOptions,
    pool: Pool,
    actor: type[EngineActor] = EngineActor,
) -> Iterator[pa.Table]:
    """Answers of every batch, in the order in which they are done.

    Raises:
        MachineLost: a machine is gone, and Ray cannot go on without it.
        SweepError: an engine cannot start, failed, or died more often than `RETRIES`, or no machine has room.
    """
    import ray
    from ray.data import DataContext

    room(pool)
    context = DataContext.get_current()
    context.enable_progress_bars = False  # the command's own bar counts answers
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    with Watch(pool) as watch:
        dataset = answering(batches, options, pool, actor, watch)
        hush()
        # No prefetching: a batch that is done is written at once.
        stream = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            yield from stream
        except ray.exceptions.RayError as error:
            if isinstance(error, gone_with_a_machine()) and watch.lost_a_machine():
                raise MachineLost("a machine of the cluster is gone") from error
            raise SweepError(explain(error)) from error


def room(pool: Pool) -> int:
    """Engines of the pool that the cluster has machines for now; SweepError if there is none for any."""
    found = pool.room(machines.alive())
    if not found:
        raise SweepError(f"no machine of the cluster has room for an engine ({pool.size}) any more")
    return found


def answering(
    batches: Sequence[pa.Table],
    options: EngineOptions,
    pool: Pool,
    actor: type[EngineActor],
    watch: Watch,
) -> Any:
    """The Ray dataset of the batches' answers, which nothing has begun to compute."""
    import ray
    from ray.data import ActorPoolStrategy

    at_once = batches_at_once(batches, options, pool)
    placement: dict[str, Any] = {"num_gpus": pool.num_gpus} if pool.num_gpus else {}
    if pool.num_cpus is not None:
        placement["num_cpus"] = pool.num_cpus
    with warnings.catch_warnings():
        # Up to Ray 2.63 nothing else says how often a task is retried and what an actor is called;
        # pyproject.toml has the bound.
        warnings.filterwarnings("ignore", message="`ray_remote_args(_fn)?` is deprecated")
        return ray.data.from_arrow(list(batches)).map_batches(
            actor,
            fn_constructor_args=[options],
            batch_size=None,  # a block is a batch
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=pool.engines,
                max_tasks_in_flight_per_actor=at_once,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=True,
            ),
            # Dead actors are started again without end, Ray Data's default; batches are not.
            max_task_retries=RETRIES,
            ray_remote_args_fn=watch.naming(),
            **placement,
        )


def gone_with_a_machine() -> tuple[type[Exception], ...]:
    """Ray's errors for what a machine takes with it: engines, their work, and answers nobody had fetched."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,
    )


def batches_at_once(batches: Sequence[pa.Table], options: EngineOptions, pool: Pool) -> int:
    """Batches at an engine, see :func:`vllm_flow.eval.sweep.work.in_flight`."""
    sequences = options.engine_args.get(
        "max_num_seqs", SEQUENCES["gpu" if pool.num_gpus else "cpu"]
    )
    return in_flight([requests_of(batch) for batch in batches], pool.engines, sequences)


def explain(error: BaseException) -> str:
    """What went wrong, in the engine's own words; Ray's frames around them help nobody."""
    text = "\n".join(line for line in str(error).splitlines() if line.strip())
    if type(error).__name__ in DEATHS:
        if "creation task" in text:
            return f"an engine could not start: {_short(text.splitlines()[-1].strip(), 600)}"
        return (
            f"an engine died, and so did those that were given its batch after it, {RETRIES} "
            f"times: {_short(text.splitlines()[0], 600)}"
        )
    cause = getattr(error, "cause", None) or error
    said = str(cause).partition("\nFailed to apply UDF")[0]  # what Ray Data adds to the message
    return f"an engine failed: {type(cause).__name__}: {_short(said, 600)}"


def hush() -> None:
    """Keep Ray Data's tracebacks to its log file: what they say is in the SweepError."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


def hardware(pool: Pool) -> str:
    """What computes, for the record: the cluster's accelerators, or this machine's processor."""
    import ray

    if pool.num_gpus:
        kinds = sorted(
            name.partition(":")[2]
            for name in ray.cluster_resources()
            if name.startswith("accelerator_type:")
        )
        return f"{pool.engines} x {' or '.join(kinds) or 'GPU'}"
    from vllm_flow.engine.process import device_name

    return device_name()


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
