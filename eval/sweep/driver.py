"""Runs a sweep: batches of work stream through engines on Ray Data, answers stream into the run.

Placement, backpressure and retries are Ray's: engines are the stateful actors of one `map_batches`.
A batch is one row of one block, so that it is given out, retried and handed back by itself. Only this process
writes: what a killed driver loses is what the engines have not handed back, at most
`work.IN_FLIGHT` batches per engine. Knows nothing of models, prompts or scoring.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vllm_flow.counts import counted
from vllm_flow.eval.sweep import machines
from vllm_flow.eval.sweep.connection import shortened
from vllm_flow.eval.sweep.engine_actor import EngineActor
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.machines import Pool, SweepError, Watch
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
        f"{number} x {shortened(reason)}" for reason, number in progress.reasons.most_common(count)
    ]
    return "Most frequent: " + "; ".join(told) + "." if told else ""


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
        return ray.data.from_arrow([packed(batch) for batch in batches]).map_batches(
            Engine,
            fn_constructor_args=[actor, options],
            batch_size=1,  # of rows, each of which is a batch: beside GPUs Ray Data wants a number
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


class Engine:
    """What Ray Data runs: an engine that takes its batches out of their rows."""

    def __init__(self, actor: Callable[[EngineOptions], Any], options: EngineOptions) -> None:
        self.engine = actor(options)

    def __call__(self, row: pa.Table) -> pa.Table:
        """The answers of a batch."""
        return self.engine(unpacked(row))


def packed(batch: pa.Table) -> pa.Table:
    """A batch as a table of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)
    return pa.table({"batch": [sink.getvalue().to_pybytes()]})


def unpacked(row: pa.Table) -> pa.Table:
    """The batch in it."""
    (stored,) = row["batch"].to_pylist()
    return pa.ipc.open_stream(stored).read_all()


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
    sequences = options.engine_args.get("max_num_seqs")
    if sequences is None:
        sequences = SEQUENCES["gpu" if pool.num_gpus else "cpu"]
    return in_flight([requests_of(batch) for batch in batches], pool.engines, sequences)


def explain(error: BaseException) -> str:
    """What went wrong, in the engine's own words; Ray's frames around them help nobody."""
    text = "\n".join(line for line in str(error).splitlines() if line.strip())
    if type(error).__name__ in DEATHS:
        if "creation task" in text:
            return f"an engine could not start: {shortened(_last_words(text), 600)}"
        return (
            f"an engine died, and so did those that were given its batch after it, {RETRIES} "
            f"times: {shortened(text.splitlines()[0], 600)}"
        )
    cause = getattr(error, "cause", None) or error
    said = str(cause).partition("\nFailed to apply UDF")[0]  # what Ray Data adds to the message
    return f"an engine failed: {type(cause).__name__}: {shortened(said, 600)}"


def _last_words(traceback: str) -> str:
    """What an exception says at the end of its traceback; of a refused configuration, the sentence in pydantic's error.

    That ends in an address, and the line before it in what was given, which may be a whole configuration.
    """
    *before, last = (line.strip() for line in traceback.splitlines())
    if before and last.startswith("For further information visit"):
        last = before[-1].partition(" [type=")[0].removeprefix("Value error, ")
    return last


def hush() -> None:
    """Keep Ray Data's tracebacks to its log file: what they say is in the SweepError."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
