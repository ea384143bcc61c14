"""From an address, or none, to engines' machines: a Ray cluster is joined, or Ray is started here.

Knows nothing of what is computed there.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_flow.eval.sweep import cluster, machines
from vllm_flow.eval.sweep.machines import Pool, SweepError, pool_of

LATE = "timed out during startup"
"""What Ray says where its own processes are not there after 30 seconds, which a busy machine may need."""
SILENT_SECONDS = 60
"""After so long a start of Ray, which takes ten on a busy machine, is likely to have hung: rarely its own processes
come up and answer nobody."""


def connect(address: str | None, engines: int | None, workers: int = 1) -> Pool:
    """Join the cluster at `address`, or start Ray on this machine; an engine per GPU, or per `workers` GPUs, else one.

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
        start(max(os.cpu_count() or 1, engines or 1))
    return pool_of(machines.alive(), engines, growing, workers)


def start(cpus: int) -> None:
    """Start Ray on this machine, a second time where its own processes took too long.

    Raises:
        SweepError: it cannot be started.
    """
    import ray

    for again in (False, True):
        try:
            with telling_silence():
                ray.init(
                    address="local",  # without it, Ray would also join what an earlier cluster left in /tmp
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            return
        # Of its own processes that did not come up, Ray says so with a bare Exception.
        except Exception as error:
            ray.shutdown()
            if again or LATE not in str(error):
                raise SweepError(f"Ray cannot start here: {shortened(str(error), 600)}") from error


@contextmanager
def telling_silence() -> Iterator[None]:
    """While Ray starts here: say once, after a minute, that it does not answer, and what helps."""
    # As Ray looks for a folder of its own.
    root = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    logs = os.path.join(root, "ray", "session_latest", "logs")

    def tell() -> None:
        print(
            f"Ray has not answered for {SILENT_SECONDS} s; its logs are in {logs}. If this goes on: Ctrl-C, `ray stop` "
            "(it ends every process of Ray that is yours on this machine), and the same command again.",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(SILENT_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def connected(address: str | None, engines: int | None, workers: int = 1) -> Iterator[Pool]:
    """`connect`, and disconnect on leaving, however that happens: engines and Ray's own processes end.

    A connection that was there before is left alone.
    """
    import ray

    before = ray.is_initialized()
    try:
        yield connect(address, engines, workers)
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
        raise cluster.ClusterError(address, shortened(str(error), 600)) from None
    except SystemExit:  # which Ray raises where it gives up
        raise cluster.ClusterError(address, "it does not let this machine join") from None


def hardware(pool: Pool) -> str:
    """What computes, for the record: the cluster's accelerators, or this machine's processor."""
    import ray

    if pool.num_gpus:
        kinds = sorted(
            name.partition(":")[2]
            for name in ray.cluster_resources()
            if name.startswith("accelerator_type:")
        )
        return f"{pool.engines * pool.num_gpus:g} x {' or '.join(kinds) or 'GPU'}"
    from vllm_flow.engine.process import device_name

    return device_name()


def shortened(text: str, limit: int = 200) -> str:
    """A text of at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
