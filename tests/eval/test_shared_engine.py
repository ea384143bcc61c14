"""Batches of several threads in one engine: nothing waits for another's slowest, nothing is lost or mixed up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.eval.sweep.shared_engine import SharedEngine, Turns


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
        self.left[str(self.number)] = prompts[0]
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


def shared(fake: FakeEngine) -> SharedEngine:
    return SharedEngine(fake, lambda: {f"{n}-abcd": f"blocks of {n}" for n in range(1, 400)})


def ask(engine: SharedEngine, lengths: list[int]) -> dict[str, tuple[Any, Any]]:
    added = engine.add([(length, None) for length in lengths], {}, (ValueError,))
    return engine.wait([one for one in added if isinstance(one, str)])


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
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda lengths: ask(engine, lengths), batches))
    assert [len(one) for one in found] == [len(lengths) for lengths in batches]
    ids = [inner for one in found for inner in one]
    assert len(set(ids)) == len(ids) == sum(map(len, batches))
    for one in found:
        for inner, (output, took) in one.items():
            assert inner == f"{output.request_id}-abcd"
            assert took == f"blocks of {output.request_id}"
    assert fake.prepared == fake.added, "pictures are seen in one order"
    assert not engine._done and not engine._inner and not fake.left
    time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name == "engine steps"], (
        "idle engines have no thread"
    )


def test_what_is_refused_hurts_nobody() -> None:
    engine = shared(FakeEngine())
    added = engine.add([(1, None), (-1, None), (2, None)], {}, (ValueError,))
    assert [isinstance(one, ValueError) for one in added] == [False, True, False]
    assert len(engine.wait([one for one in added if isinstance(one, str)])) == 2
    with pytest.raises(TypeError):
        engine.add([(None, None)], {}, (ValueError,))
    assert len(ask(engine, [1])) == 1


def test_an_engine_that_fails_tells_every_batch() -> None:
    fake = FakeEngine()

    def fail() -> None:
        if fake.steps >= 3:
            raise RuntimeError("out of memory")

    fake.at_step = fail
    engine = shared(fake)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask, engine, [50]) for _ in range(3)]
        for one in asked:
            with pytest.raises(RuntimeError, match="out of memory"):
                one.result(30)


def test_a_request_that_the_engine_loses_is_missing() -> None:
    fake = FakeEngine()
    fake.at_step = lambda: fake.left.pop("2", None)  # type: ignore[assignment, return-value]
    found = ask(shared(fake), [3, 9, 3])
    assert sorted(found) == ["1-abcd", "3-abcd"]


def test_embeddings_of_one_size_at_a_time() -> None:
    engine = shared(FakeEngine())
    inside: list[int] = []

    def run(side: int) -> None:
        with engine.grid(side):
            inside.append(side)
            assert set(inside) == {side}
            time.sleep(0.002)
            inside.remove(side)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(run, [1, 2, 1, 3, 2, 1] * 5))
    with engine.grid(None), engine.grid(7):
        pass


def test_turns_are_taken_in_order() -> None:
    turns, order = Turns(), []

    def run(name: int) -> None:
        with turns.turn():
            order.append(name)

    with turns.turn():
        threads = []
        for name in range(8):
            threads.append(threading.Thread(target=run, args=(name,)))
            threads[-1].start()
            while len(turns._waiting) <= name:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with pytest.raises(KeyError), turns.turn():
        raise KeyError
    with turns.turn():
        pass
