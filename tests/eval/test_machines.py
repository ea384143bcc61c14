"""How many engines a cluster's machines have room for, and for how long some have had none; without Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.eval.sweep.machines import Machine, Pool, Shortage, SweepError, pool_of


def machines(*cpus: int, gpus: int = 0) -> list[Machine]:
    return [Machine(str(number), gpus, count) for number, count in enumerate(cpus)]


def test_engines_fit_the_cluster() -> None:
    assert pool_of(machines(32, 32, gpus=4), None) == Pool(8, 1, None)
    assert pool_of(machines(64, gpus=8), 2) == Pool(2, 1, None)
    assert pool_of(machines(4), None) == Pool(1, 0, 4)
    assert pool_of(machines(5), 2) == Pool(2, 0, 2)
    with pytest.raises(SweepError, match="--engines 9: the cluster has 8 GPUs"):
        pool_of(machines(4, 4, gpus=4), 9)
    with pytest.raises(SweepError, match="--engines 6: the cluster has 5 CPUs"):
        pool_of(machines(2, 3), 6)
    with pytest.raises(SweepError, match="has 0 CPUs"):
        pool_of(machines(0), 1, growing=True)


def test_a_cluster_that_may_grow_begins_with_what_has_room() -> None:
    for there, pool in ((machines(2), Pool(3, 0, 1)), (machines(8, gpus=1), Pool(3, 1, None))):
        assert pool_of(there, 3, growing=True) == pool
        assert 0 < pool.room(there) < 3
    assert Pool(1, 1, None).size == "1 GPU" and Pool(1, 0, 3).size == "3 CPUs"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_an_engine_is_on_one_machine(cpus: list[int], engines: int) -> None:
    """Every engine has a machine of its own size, and none could have a processor more."""
    there = machines(*cpus)
    if engines > sum(cpus):
        with pytest.raises(SweepError):
            pool_of(there, engines)
        return
    pool = pool_of(there, engines)
    assert pool.num_cpus is not None and pool.engines == engines
    assert sum(count // pool.num_cpus for count in cpus) >= engines == pool.room(there)
    assert sum(count // (pool.num_cpus + 1) for count in cpus) < engines


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 9),
    st.none() | st.integers(1, 12),
)
def test_an_engine_has_its_gpus_on_one_machine(
    gpus: list[int], workers: int, engines: int | None
) -> None:
    """As many engines as machines have room for, none across two, and none with fewer GPUs than workers."""
    there = [Machine(str(number), count, 8) for number, count in enumerate(gpus)]
    fit = sum(count // workers for count in gpus)
    if not any(gpus):
        assert pool_of(there, engines, True, workers).num_gpus == 0
    elif not fit:
        for growing in (False, True):
            with pytest.raises(
                SweepError, match=f"pipeline_parallel_size is {workers}: .* more than {max(gpus)};"
            ):
                pool_of(there, engines, growing, workers)
    elif engines is not None and engines > fit:
        with pytest.raises(
            SweepError, match=f"--engines {engines}: the cluster has {sum(gpus)} GPUs"
        ):
            pool_of(there, engines, False, workers)
        assert pool_of(there, engines, True, workers).room(there) == fit
    else:
        pool = pool_of(there, engines, False, workers)
        assert pool == Pool(engines or fit, workers, None)
        assert pool.room(there) == pool.engines


def test_ray_gives_an_engine_the_gpus_of_its_workers() -> None:
    """Of four GPUs, which are none, two engines see two each."""
    command = [sys.executable, "-m", "tests.eval.fake_gpus"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    assert lines[:1] == ["pool 2 2"], done.stderr
    seen = {line for line in lines if line.startswith("sees ")}
    devices = [line.removeprefix("sees ").split(",") for line in seen]
    assert len(lines) == 9 and sorted(sum(devices, [])) == ["0", "1", "2", "3"]
    assert [len(one) for one in devices] == [2, 2]


def test_an_engine_without_a_machine_is_met_by_time() -> None:
    shortage = Shortage()
    looks = [(2, 0.0), (1, 5.0), (1, 9.0), (2, 10.0), (3, 11.0), (2, 12.0), (0, 20.0), (3, 21.0)]
    waited = [shortage.seconds(room, now) for room, now in looks]
    assert waited == [0, 0, 4, 0, 0, 0, 8, 0]
