"""Timing of a run's policies: who has turns, what is on the clock, and what is not measured twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vllm_flow.eval.sweep import timing
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.machines import Machine, Pool
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.work import Geometry, TaskWork
from vllm_flow.eval.tasks.base import Item

POLICIES = parse_policies("baseline,0:50% uniform,downsample=2x2", 4, 4)
OPTIONS = EngineOptions("m", "float32", 1, 32, "chat-template", POLICIES, full_grid=4)


class Engine:
    """Finishes at once; the second request of a batch is scheduled, and has its token, a second later."""

    def __init__(self) -> None:
        self.options, self.geometry = OPTIONS, Geometry(4, (0,), 32, 1)
        self.asked: list[tuple[str, Any]] = []
        self.embedded: list[int] = []
        self.waiting = 0
        self.llm = SimpleNamespace(wait_for_completion=self.done)
        self.downsampler = SimpleNamespace(embed=self.embed)

    def embed(self, pictures: list[Any], side: int) -> list[str]:
        self.embedded.append(side)
        return [f"embedding {side}"] * len(pictures)

    def enqueue(self, ask: Any, keys: Any, embedding: Any, max_tokens: int) -> None:
        assert max_tokens == 1 and keys == ask.policy.request_keys()
        self.asked.append((ask.policy.name, embedding))
        self.waiting += 1

    def done(self, use_tqdm: bool) -> list[Any]:
        count, self.waiting = self.waiting, 0
        times = [
            SimpleNamespace(scheduled_ts=5.0 + n, first_token_ts=7.0 + n) for n in range(count)
        ]
        return [SimpleNamespace(metrics=one) for one in times]


@pytest.fixture
def work(tmp_path: Path) -> TaskWork:
    """Six questions on three pictures, and one without."""
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    items = [Item(str(n), "?", str(tmp_path / f"{n % 3}.png"), {}) for n in range(6)]
    return TaskWork("pope", [Item("text", "?", None, {}), *items], 8, "plain")


def test_every_policy_has_its_turn_in_every_round(work: TaskWork) -> None:
    stopwatch = object.__new__(timing.Stopwatch)
    engine = stopwatch.actor = Engine()  # type: ignore[assignment]
    found = stopwatch.measure(timing.items_of([work], OPTIONS), 2, 0)
    # Three pictures, one round to warm up: its time does not count.
    assert found == {policy.name: [4.0, 4.0] for policy in POLICIES}
    assert Counter(name for name, _ in engine.asked) == {policy.name: 9 for policy in POLICIES}
    assert engine.embedded == [2], "a reduced picture is made once, before the clock"
    assert {one for name, one in engine.asked if name.startswith("downsample")} == {"embedding 2"}


def test_requests_have_pictures_of_their_own(work: TaskWork) -> None:
    rows = timing.items_of([TaskWork("empty", [Item("a", "?", None, {})], 8, "pad"), work], OPTIONS)
    assert [row["item_id"] for row in rows] == ["0", "1", "2"]
    assert timing.items_of([TaskWork("empty", [Item("a", "?", None, {})], 8, "pad")], OPTIONS) == []


def test_what_is_known_is_not_timed_again(
    tmp_path: Path, work: TaskWork, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started: there is no Ray in this test."""
    seconds = {policy.name: [1.0] for policy in POLICIES}
    (tmp_path / timing.FILE).write_text(json.dumps({"seconds": seconds}))
    timing.time_policies(tmp_path, [work], OPTIONS, Pool(1, 0, 1), 2, "a machine")
    assert f"{tmp_path / timing.FILE} has the times of all these" in capsys.readouterr().out
    for spoilt in ("", "[]", '{"seconds": 3}'):
        (tmp_path / timing.FILE).write_text(spoilt)
        assert timing.known(tmp_path) == {}


def test_an_engine_that_is_timed_fits_on_one_machine() -> None:
    """Engines of a core each on two machines: no machine has two cores."""
    small, large = Machine("small", 0, 1), Machine("large", 1, 4)
    assert timing.placement(Pool(2, 0, 1), [small, small]) == {"num_cpus": 1}
    assert timing.placement(Pool(2, 0, 2), [small, large]) == {"num_cpus": 4}
    assert timing.placement(Pool(2, 0, 1), [large]) == {"num_cpus": 2}
    assert timing.placement(Pool(3, 1, None), [large]) == {"num_gpus": 1}
