"""How many engines the machines of a cluster have room for, and a watch over machines that go in mid-run.

Ray starts an engine again on another machine that has room. Where none has, what the engine was given waits for
ever, and where Ray does not know yet that the machine is gone, it gives a batch out again at once and soon gives
it up: either way, what is left has to be asked of the others. Knows Ray's nodes and actors; nothing of answers.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.exits import CommandError

INTERVAL = 2.0
"""Seconds between two looks."""

PATIENCE = 60.0
"""Seconds for another machine to come before the engines that are left take the work of one that is gone."""

NOTICE = 75.0
"""Seconds after which Ray knows that a machine is gone: five health checks, 3 s apart, of 10 s at most."""


class SweepError(CommandError):
    """The sweep cannot go on; what was answered is kept. The message is for the user."""


@dataclass(frozen=True)
class Machine:
    """What a node of the cluster has in all, whoever uses it."""

    name: str
    gpus: int
    cpus: int


@dataclass(frozen=True)
class Pool:
    """The engines of a sweep and what each of them takes of the cluster."""

    engines: int
    num_gpus: float
    num_cpus: float | None
    """None where a GPU places the engine."""

    def room(self, machines: Sequence[Machine]) -> int:
        """Engines that there are machines for, at most all of the pool's."""
        if self.num_gpus:
            fit = sum(int(machine.gpus // self.num_gpus) for machine in machines)
        else:
            fit = sum(int(machine.cpus // (self.num_cpus or 1)) for machine in machines)
        return min(fit, self.engines)

    @property
    def size(self) -> str:
        """What an engine takes, in words."""
        count, kind = (self.num_gpus, "GPU") if self.num_gpus else (self.num_cpus or 1, "CPU")
        return f"{count:g} {kind}" + ("" if count == 1 else "s")


def pool_of(
    machines: Sequence[Machine], engines: int | None, growing: bool = False, workers: int = 1
) -> Pool:
    """How many engines of which size a cluster takes: as many as its GPUs do, else one; all processors are shared out.

    Args:
        engines: as many as these, None to count GPUs.
        growing: machines may join, so that one engine with room is enough to begin.
        workers: of an engine, each with a GPU of the engine's machine where there are GPUs.

    Raises:
        SweepError: fewer than `engines` fit.
    """
    gpus, cpus = (sum(getattr(m, kind) for m in machines) for kind in ("gpus", "cpus"))
    if gpus:
        fit = sum(m.gpus // workers for m in machines)
        if not fit:
            most = max(m.gpus for m in machines)
            raise SweepError(
                f"tensor_parallel_size times pipeline_parallel_size is {workers}: an engine takes {workers} GPUs of "
                f"one machine, and none here has more than {most}; take at most {most}."
            )
        count = engines if engines is not None else fit
        if count > fit and not growing:
            each = "one per engine" if workers == 1 else f"room for {fit} of {workers} each"
            raise SweepError(f"--engines {count}: the cluster has {gpus} GPUs, {each}.")
        return Pool(count, num_gpus=workers, num_cpus=None)
    count = engines if engines is not None else 1
    if not cpus or (count > cpus and not growing):
        raise SweepError(
            f"--engines {count}: the cluster has {cpus} CPUs, at least one per engine."
        )
    # An engine is on one machine: two of three processors each have room for two engines of three.
    sizes = range(max(machine.cpus for machine in machines), 1, -1)
    fitting = (size for size in sizes if sum(m.cpus // size for m in machines) >= count)
    return Pool(count, num_gpus=0, num_cpus=next(fitting, 1))


def alive() -> list[Machine]:
    """The machines that Ray takes for alive."""
    import ray

    return [
        Machine(node["NodeID"], *(int(node["Resources"].get(kind, 0)) for kind in ("GPU", "CPU")))
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass
class Shortage:
    """For how long there has been less room than there was once."""

    room: int = 0
    since: float | None = None

    def seconds(self, room: int, now: float) -> float:
        """As of `now`, when there is room for so many engines; 0 where no engine lacks a machine that it had."""
        if room >= self.room:
            self.room, self.since = room, None
            return 0.0
        if self.since is None:
            self.since = now
        return now - self.since


class Watch:
    """Looks after the machines of one stream of answers, as a context manager.

    Where engines that had a machine have had none for `PATIENCE`, it ends all engines of the stream, which then
    ends with Ray's error for engines that died.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.names: list[str] = []
        """Of the stream's engines."""
        self.without_room = False
        """Whether it has ended the engines."""
        self._seen: set[str] = set()
        self._shortage = Shortage()
        self._over = threading.Event()
        self._look()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._watch, name="machines", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def naming(self) -> Any:
        """A function for `map_batches`: further arguments of the actor that starts next."""
        names = self.names  # Ray may copy the function; a watch cannot be copied

        def name_next() -> dict[str, str]:
            names.append(f"vllm-flow-engine-{uuid.uuid4().hex}")
            return {"name": names[-1]}

        return name_next

    def lost_a_machine(self) -> bool:
        """Whether a machine is gone that was there; where there are several, waits until Ray must know it."""
        end = time.monotonic() + NOTICE
        while not self.without_room:
            with contextlib.suppress(Exception):  # the head is gone: Ray's own error says more
                if self._seen - {machine.name for machine in alive()}:
                    return True
            if len(self._seen) < 2 or time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            with contextlib.suppress(Exception):  # of a connection that ends meanwhile
                if self._look() >= PATIENCE:
                    self.without_room = True
                    self._end_engines()

    def _look(self) -> float:
        machines = alive()
        self._seen |= {machine.name for machine in machines}
        return self._shortage.seconds(self.pool.room(machines), time.monotonic())

    def _end_engines(self) -> None:
        import ray

        for name in tuple(self.names):
            with contextlib.suppress(ValueError):  # it has ended
                ray.kill(ray.get_actor(name))
