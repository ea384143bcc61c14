"""Ladders of the finder: every rung keeps more than the one below, and the profile has what was found."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import fake_cliff
from tests.eval.demo_pope import write_pope
from vllm_flow.cliff_file import read_profile
from vllm_flow.eval.cliff.evidence import CliffError
from vllm_flow.eval.cliff.ladder import STEPS, Ladder, cliffs_after, keeps_before, ladder_of
from vllm_flow.eval.sweep.policy import BASELINE, TEXT_ONLY
from vllm_flow.policy_keys import parse_policy
from vllm_flow.ranks import RANKS

NONE = Namespace(stages=None, cliff=None, rank=None)


def kept(ladder: Ladder, rung: int, num_layers: int) -> list[int]:
    flow = ladder.policies[rung].flow()
    return [144 if flow is None else flow.kept(layer, 0, 144) for layer in range(num_layers)]


def check(ladder: Ladder, num_layers: int) -> None:
    """Rungs differ, go up in every layer, end at the baseline, and read back from the profile's keys."""
    assert len(set(ladder.policies)) == len(ladder.policies) == len(ladder.labels)
    assert ladder.policies[-1] == BASELINE and ladder.top == len(ladder.policies) - 1
    for rung in range(ladder.top):
        lower, higher = kept(ladder, rung, num_layers), kept(ladder, rung + 1, num_layers)
        assert all(a <= b for a, b in zip(lower, higher, strict=True)) and lower != higher
        read = parse_policy(ladder.keys(rung, num_layers), num_layers)
        assert read is not None
        assert [read.kept(n, 0, 144) for n in range(num_layers)] == lower
    assert parse_policy(ladder.keys(ladder.top, num_layers), num_layers) is None


@given(st.integers(3, 40))
def test_plain_cliffs_are_the_layers(num_layers: int) -> None:
    ladder = ladder_of(NONE, num_layers)
    check(ladder, num_layers)
    assert ladder.policies[0] == TEXT_ONLY and ladder.top == num_layers and not ladder.about()


@given(st.integers(5, 40), st.sampled_from(["0:50% uniform", "2:1/3 last_prompt", "pyramiddrop"]))
def test_cliffs_behind_stages(num_layers: int, text: str) -> None:
    ladder = cliffs_after(text, num_layers)
    check(ladder, num_layers)
    assert ladder.top == num_layers + 1
    # Without a cliff the stages are still there: more than any cliff behind them, less than the baseline.
    flow = ladder.policies[num_layers].flow()
    assert flow is not None and not flow.only_withdraws


@given(st.integers(5, 40), st.data(), st.sampled_from(sorted(RANKS)))
def test_shares_before_a_cliff(num_layers: int, data: st.DataObject, rank: str) -> None:
    cliff = data.draw(st.integers(4, num_layers))
    ladder = keeps_before(cliff, rank, num_layers)
    check(ladder, num_layers)
    assert ladder.top == STEPS + (cliff < num_layers)
    assert kept(ladder, STEPS // 2, num_layers)[cliff - 1] == 72


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": "fastv", "cliff": 4, "rank": "uniform"}, "one or the other"),
        ({"cliff": 4}, "--rank is missing"),
        ({"rank": "uniform"}, "--cliff is missing"),
        ({"stages": "cliff=4"}, "keeps a part of the image"),
        ({"stages": "0:50% random seed=0:2"}, "must be one policy"),
        ({"stages": "horizon-192"}, 'write --stages "0:71/144 diversity"'),
        ({"cliff": 33, "rank": "uniform"}, "it must be in 1 ... 32"),
        ({"cliff": 2, "rank": "last_prompt"}, "it must be in 3 ... 32"),
    ],
)
def test_what_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(CliffError) as refused:
        ladder_of(Namespace(**{**vars(NONE), **options}), 32)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [{"stages": "0:50% uniform"}, {"cliff": 4, "rank": "uniform"}],
    ids=["cliff", "keep"],
)
def test_the_profile_has_the_policy_that_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object]
) -> None:
    """The fake engine answers well from its third rung on; what is found is that rung's policy, or a weaker one's."""
    write_pope(tmp_path / "pope", 120)
    out = tmp_path / "cliff.json"
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    status = fake_cliff.run(
        tmp_path / "asked", 10**9,
        ["--model", "demo-small", "--data", str(tmp_path), "--out", str(out), "--tolerance", "13%", *more],
    )  # fmt: skip
    assert status == 0
    content = json.loads(out.read_text())
    entry, num_layers = content["tasks"]["pope"], content["num_layers"]
    ladder = ladder_of(Namespace(**{**vars(NONE), **options}), num_layers)
    rung = entry["evidence"]["rung"]
    assert fake_cliff.GOOD_FROM <= rung < ladder.top
    keys = {key: value for key, value in entry.items() if key != "evidence"}
    assert keys == ladder.policies[rung].request_keys() and "flow_stages" in keys
    assert entry["evidence"]["ladder"]["labels"] == list(ladder.labels)
    policy = read_profile(content, num_layers).of_task("pope")
    assert policy == parse_policy(keys, num_layers)
    said = capsys.readouterr().out
    assert keys["flow_stages"] in said and "given: " in said
