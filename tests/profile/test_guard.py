"""The guard against gross regressions: what it lets pass, and what it names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_flow.profile.findings import Capacity, Decode, Load, Prefill, Results, Spread
from vllm_flow.profile.guard import regressions


def spread(value: float) -> Spread:
    return Spread(value, value, value, 1)


def results() -> Results:
    """A run in which everything reaches its ideal."""
    one = spread(1.0)
    return Results(
        command="c", created="now", model="m", shape={}, workload={}, engine={}, limits={},
        prefill=(Prefill("cliff=2", 4, one, spread(5.0), 5.0, 4.0, 5.1),),
        load=(
            Load(
                "cliff=2", 8, 8, one, spread(4.0), 4.0, one, one, one, one, 40, 1.0, 1.0, (5, 1),
                (5, 1), True, one, one, one,
            ),
        ),
        capacity=(Capacity("cliff=2", 100.0, 60, 60, 5.0, 5.2),),
        decode=(Decode("cliff=2", 2880, 1, one, spread(1.5), 1.6),),
    )  # fmt: skip


def test_ideal_figures_pass() -> None:
    assert regressions(results()) == []


@pytest.mark.parametrize("share, passes", [(0.51, True), (0.49, False)])
def test_ratios_have_a_margin(share: float, passes: bool) -> None:
    good = results()
    changed = {
        "prefill": replace(good.prefill[0], speedup=spread(5.0 * share)),
        "load": replace(good.load[0], ratio=spread(4.0 * share)),
        "decode": replace(good.decode[0], speedup=spread(share)),
    }
    for part, row in changed.items():
        said = regressions(replace(good, **{part: (row,)}))
        assert bool(said) != passes
        assert all(part in sentence and "cliff=2" in sentence for sentence in said)


def test_counts_have_none() -> None:
    good = results()
    load = replace(good.load[0], blocks_each=(5, 2), blocks_exact=False)
    capacity = replace(good.capacity[0], running=59)
    assert regressions(replace(good, load=(load,), capacity=(capacity,))) == [
        "load, 8 at once, cliff=2: KV blocks (5, 2), predicted (5, 1)",
        "capacity, cliff=2: 59 requests at once, predicted 60",
    ]
