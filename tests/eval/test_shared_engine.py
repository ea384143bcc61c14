"""Batches of several threads in one engine: nothing waits for another's slowest, nothing is lost or mixed up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.eval.sweep.shared_engine import AHEAD, Batch, SharedEngine


class FakeEngine:
    """Answers a request of length n after n steps, as vLLM's `LLM` and its engine do."""

    def __init__(self, pause: float = 0.001) -> None:
        self.left: dict[str, int] = {}
        self.pause = pause
        self.inside = 0
        self.steps = 0
        self.prepared: list[int] = []
        self.added: list[int] = []
        self.number = 0
        self.at_step: Callable[[], None] = lambda: None
        self.most = 0
        self.llm_engine = self

    def touch(self) -> None:
        self.inside += 1
        assert self.inside == 1, "two threads in the engine"
        time.sleep(self.pause / 10)
        self.inside -= 1

    def _preprocess_cmpl_one(self, prompt: int, kwargs: dict) -> int:
        if prompt < 0:
            raise ValueError("too long")
        self.prepared.append(prompt)
        return prompt

    def _render_and_add_requests(self, prompts: list[int], params: list[Any]) -> list[str]:
        self.touch()
        self.number += 1
        self.added.append(prompts[0])
        if prompts[0] == 13:
            raise ValueError("unlucky")
        self.left[str(self.number)] = prompts[0]
        self.most = max(self.most, len(self.left))
        return [f"{self.number}-abcd"]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        self.touch()
        self.at_step()
        time.sleep(self.pause)
        self.steps += 1
        self.left = {name: n - 1 for name, n in self.left.items()}
        finished = [name for name, n in self.left.items() if n <= 0]
        for name in finished:
            del self.left[name]
        return [SimpleNamespace(request_id=name, finished=True) for name in finished]


def shared(fake: FakeEngine, room: int = 256) -> SharedEngine:
    return SharedEngine(fake, lambda inner: f"blocks of {inner.partition('-')[0]}", room)


def ask(engine: SharedEngine, lengths: list[int]) -> Batch:
    return engine.wait(engine.add([(length, None) for length in lengths], {}, (ValueError,)))


def test_a_short_batch_does_not_wait_for_a_long_one() -> None:
    fake = FakeEngine()
    engine = shared(fake)
    ended: list[str] = []

    def run(name: str, lengths: list[int]) -> None:
        ask(engine, lengths)
        ended.append(f"{name} at {fake.steps}")

    with ThreadPoolExecutor(2) as threads:
        long = threads.submit(run, "long", [200])
        while not fake.left:
            time.sleep(0.001)
        for _ in range(5):
            threads.submit(run, "short", [2, 3]).result(30)
        long.result(30)
    assert [one.split()[0] for one in ended] == ["short"] * 5 + ["long"]
    assert int(ended[-1].split()[-1]) < 230, "the steps were shared"


def test_every_batch_gets_its_own_and_nothing_stays_behind() -> None:
    fake = FakeEngine(0.0002)
    engine = shared(fake)
    batches = [[1 + (7 * i + j) % 9 for j in range(1 + i % 5)] for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda lengths: ask(engine, lengths), batches))
    for batch, lengths in zip(found, batches, strict=True):
        assert list(batch.ids) == list(range(len(lengths))) and not batch.refused
        assert batch.done.keys() == set(batch.ids.values())
        for inner, (output, took) in batch.done.items():
            assert inner == f"{output.request_id}-abcd"
            assert took == f"blocks of {output.request_id}"
    ids = [inner for batch in found for inner in batch.done]
    assert len(set(ids)) == len(ids) == sum(map(len, batches))
    assert fake.prepared == fake.added, "pictures are seen in one order"
    assert not engine._inside and not engine._open and not fake.left and not engine._under_way
    time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name == "engine steps"], (
        "idle engines have no thread"
    )


def test_requests_join_while_their_batch_is_still_prepared() -> None:
    """The engine computes the first while the others are on their way."""
    fake = FakeEngine()
    seen: list[int] = []

    def once_it_steps(prompt: int, kwargs: dict) -> int:
        end = time.monotonic() + 30
        while seen and fake.steps <= seen[-1] and time.monotonic() < end:
            time.sleep(0.001)
        seen.append(fake.steps)
        return prompt

    fake._preprocess_cmpl_one = once_it_steps  # type: ignore[method-assign]
    ask(shared(fake), [3, 3, 3, 3])
    assert seen == sorted(set(seen)), "the engine stepped before the next one was prepared"


def test_the_engine_is_given_what_it_has_room_for() -> None:
    fake = FakeEngine(0.0002)
    engine = shared(fake, room=5)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda lengths: ask(engine, lengths), [[3, 4, 2, 5]] * 12))
    assert len(fake.added) == 48 and fake.most == 5


def test_few_batches_hold_pictures_that_the_engine_has_not_got() -> None:
    engine = shared(FakeEngine())
    holding, most = [], []

    def run(name: int) -> None:
        with engine.ahead():
            holding.append(name)
            most.append(len(holding))
            time.sleep(0.002)
            holding.remove(name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(24)))
    assert max(most) == AHEAD


def test_what_is_refused_hurts_nobody() -> None:
    """Refused while it is prepared, and by the engine."""
    engine = shared(FakeEngine(), room=3)
    batch = ask(engine, [1, -1, 2, 13, 1])
    assert {number: str(why) for number, why in batch.refused.items()} == {
        1: "too long",
        3: "unlucky",
    }
    assert list(batch.ids) == [0, 2, 4] and len(batch.done) == 3
    assert ask(engine, [-1, 13]).done == {} and ask(engine, []).done == {}
    with pytest.raises(TypeError):
        engine.add([(None, None)], {}, (ValueError,))
    assert len(ask(engine, [1, 1, 1, 1]).done) == 4
    assert not engine._under_way


def test_between_two_steps_nobody_else_touches_the_engine() -> None:
    fake = FakeEngine()
    engine = shared(fake)

    def touch() -> int:
        fake.touch()
        return fake.steps

    with ThreadPoolExecutor(4) as threads:
        long = threads.submit(ask, engine, [50])
        seen = [threads.submit(engine.between_steps, touch).result(30) for _ in range(5)]
        assert len(long.result(30).done) == 1
    assert seen == sorted(seen)
    assert engine.between_steps(lambda: "also when nothing is asked") != ""
    with pytest.raises(KeyError):
        engine.between_steps({}.popitem)
    assert len(ask(engine, [1]).done) == 1


def test_an_engine_that_fails_tells_everybody() -> None:
    fake = FakeEngine()

    def fail() -> None:
        if fake.steps >= 3:
            raise RuntimeError("out of memory")

    fake.at_step = fail
    engine = shared(fake, room=2)  # so that one of the batches still waits to be added
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask, engine, [50, 50]) for _ in range(3)]
        for one in asked:
            with pytest.raises(RuntimeError, match="out of memory"):
                one.result(30)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.between_steps(fake.touch)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(engine, [1])


def test_what_waits_for_its_turn_hears_of_a_failure() -> None:
    fake = FakeEngine()
    engine = shared(fake)
    inside, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        inside.set()
        go_on.wait(30)
        raise RuntimeError("out of memory")

    fake.at_step = fail
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(ask, engine, [5])
        inside.wait(30)
        waiting = threads.submit(engine.between_steps, fake.touch)
        while not engine._jobs:
            time.sleep(0.001)
        go_on.set()
        for one in (asked, waiting):
            with pytest.raises(RuntimeError, match="out of memory"):
                one.result(30)


def test_a_request_that_the_engine_loses_is_missing() -> None:
    fake = FakeEngine()
    fake.at_step = lambda: fake.left.pop("2", None)  # type: ignore[assignment, return-value]
    batch = ask(shared(fake), [3, 9, 3])
    assert list(batch.ids) == [0, 1, 2] and sorted(batch.done) == ["1-abcd", "3-abcd"]
