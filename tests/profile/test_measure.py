"""The measurements on two tiny engines: what is counted must equal what the shapes say.

Times on a shared machine prove nothing, so none is compared; rows, blocks, requests and copies are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_flow.profile import (
    engines,
    ideal,
    load,
    speed_figure,
    speed_tables,
    turns,
    under_load,
    watching,
)
from vllm_flow.profile import rounds as measure
from vllm_flow.profile.engines import System
from vllm_flow.profile.findings import Results
from vllm_flow.profile.rounds import Bench

CLIFF = System("cliff=2", extension=True, cliff=2)


def test_work_is_counted_as_the_engine_sees_it(bench: Bench) -> None:
    assert (bench.work.text_tokens, bench.work.image_tokens) == (20, 64)
    assert measure.workload_of(bench.stock, 9, 5, bench.subject, 128).text_tokens == 9


@pytest.mark.parametrize(
    ("placeholder", "index", "mark"),
    [
        (
            "<image>",
            2,
            "<own>",
        ),  # a checkpoint of LLaVA's layout that calls it otherwise, as the demo model does
        ("<own>", 2, "<own>"),
        ("<begin>", 2, "<begin>"),  # what a processor replaces is another token
        ("<begin><own>", 2, "<begin><own>"),
        ("<image>", None, "<image>"),  # a processor that looks for text
        (None, 2, None),
    ],
)
def test_a_picture_is_marked_by_a_token_that_the_tokenizer_knows(
    placeholder: str | None, index: int | None, mark: str | None
) -> None:
    tokens = ["<begin>", "x", "<own>"]
    known = re.compile("|".join([*tokens, "."]))
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: [
            tokens.index(piece) if piece in tokens else 1 for piece in known.findall(text)
        ],
        convert_ids_to_tokens=tokens.__getitem__,
    )
    config = SimpleNamespace() if index is None else SimpleNamespace(image_token_index=index)
    assert load.own_mark(placeholder, config, tokenizer) == mark


def test_rows_through_each_layer_are_the_ideals(bench: Bench) -> None:
    """The guard of the speed-up that no noisy machine can disturb."""
    rows: dict[int, int] = defaultdict(int)
    layers = watching.runner_of(bench.flow).model.language_model.model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _module, args, index=index: rows.__setitem__(index, rows[index] + len(args[0]))
        )
        for index, layer in enumerate(layers)
    ]
    try:
        for system in bench.systems[1:]:
            rows.clear()
            _, prompts = bench.requests(3)
            bench.flow.generate(bench.unseen(prompts), load.params_of(system, 1), use_tqdm=False)
            expected = ideal.layer_rows(bench.shape, bench.work, bench.seen(system))
            assert tuple(rows[i] for i in range(4)) == tuple(3 * r for r in expected), system
    finally:
        for hook in hooks:
            hook.remove()


def test_the_step_plan_neither_waits_for_the_device_nor_copies_per_layer(bench: Bench) -> None:
    """What costs time on a GPU: reading a tensor back, and many small copies."""
    counted: dict[str, int] = defaultdict(int)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            counted[str(func)] += 1
            return func(*args, **(kwargs or {}))

    state = watching.runner_of(bench.flow).flow_state
    plan, steps = state.plan, 0

    def spy(*args: object) -> object:
        nonlocal steps
        steps += 1
        with Count():
            return plan(*args)

    state.plan = spy
    try:
        _, prompts = bench.requests(2)
        bench.flow.generate(bench.unseen(prompts), load.params_of(CLIFF, 4), use_tqdm=False)
    finally:
        del state.plan
    waits = [
        name for name in counted if any(w in name for w in ("local_scalar", "nonzero", "item"))
    ]
    assert steps == 4 and not waits, waits
    # Two packed groups of one variant: blocks are looked up once per group and step. The prefill's
    # last keys are a variant more: blocks of their rows, and the tables of the runs around them.
    assert counted["aten.index_select.default"] == 2 * steps + 2, dict(counted)
    # Places inside blocks come from the host; slots are made of them for all groups at once.
    assert counted["aten.floor_divide.default"] == 0, dict(counted)
    assert counted["aten.mul.Tensor"] == steps + 1, dict(counted)


def test_load_serves_everything_and_predicts_every_block(bench: Bench) -> None:
    rows = under_load.under_load(bench, concurrency=3, count=5, rounds=1)
    assert [row.system for row in rows] == ["stock", "baseline", "cliff=2", "cliff=1"]
    for row in rows:
        assert row.blocks_exact, row
        assert row.good_share.median == 1.0
        assert row.requests_per_s.median > 0 and row.ttft_ms.median > 0 and row.tpot_ms.median > 0
        assert row.peak_blocks <= 3 * sum(row.blocks_predicted)
        assert row.ideal_kv_mib <= row.peak_kv_mib
        assert 0 < row.host_share.median < 1
    stock, baseline, two, one = rows
    assert len(stock.blocks_each) == 1 and len(baseline.blocks_each) == 4
    assert baseline.peak_kv_mib == stock.peak_kv_mib
    assert two.peak_kv_mib < baseline.peak_kv_mib and one.peak_kv_mib < two.peak_kv_mib
    assert stock.plan_ms.median == 0 < two.plan_ms.median
    assert stock.ideal_ratio == baseline.ideal_ratio == 1 < two.ideal_ratio < one.ideal_ratio


def test_blocks_at_the_very_border_of_a_block(bench: Bench) -> None:
    """84 prompt tokens and 13 out fill three blocks to the last slot: the last token is not stored."""
    border = bench.with_work(replace(bench.work, output_tokens=13))
    assert border.work.computed_tokens == 96
    rows = under_load.under_load(border, concurrency=1, count=1, rounds=1)
    assert all(row.blocks_exact for row in rows) and rows[0].blocks_each == (3,)


def test_limits_that_nothing_meets_make_no_good_request(bench: Bench) -> None:
    strict = replace(bench, limits=load.Limits(ttft_ms=1e-6))
    rows = under_load.under_load(strict, concurrency=2, count=2, rounds=1)
    assert {row.good_share.median for row in rows} == {0.0}


def test_capacity_is_what_the_pool_holds(bench: Bench) -> None:
    rows = measure.capacity(bench)
    for row in rows:
        assert row.running == row.ideal, row
    ratios = {row.system: row.ratio for row in rows}
    assert ratios["baseline"] == 1 < ratios["cliff=2"] < ratios["cliff=1"]


def test_prefill_and_decode_cover_every_system(bench: Bench) -> None:
    prefill = measure.prefill(bench, batch=2, rounds=1)
    decode = turns.decode(bench.with_work(replace(bench.work, images=2, image_tokens=128)), 1, 1)
    names = [system.name for system in bench.systems]
    assert [row.system for row in prefill] == [row.system for row in decode] == names
    assert prefill[0].speedup.median == decode[0].speedup.median == 1
    assert prefill[2].ideal_whole == pytest.approx(4 * 84 / (4 * 84 - 2 * 64))
    spared = 3 - bench.shape.key_share
    assert prefill[2].ideal_rows == pytest.approx(4 * 84 / (4 * 84 - spared * 64))
    assert {row.image_tokens for row in decode} == {128}


def test_decode_steps_of_two_engines_alternate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is twice as slow from turn to turn says nothing about the systems."""
    work, taken = replace(bench.work, output_tokens=40), []
    real = turns._turn

    def drifting(llm: object, batch: int) -> list[float]:
        steps = real(llm, batch)  # type: ignore[arg-type]
        assert len(steps) < turns.TURN
        speed = 0.8 if llm is bench.stock else 1.0
        taken.append((llm is bench.flow, len(steps)))
        return [speed * 2.0 ** ((len(taken) - 1) // 2)] * len(steps)

    monkeypatch.setattr(turns, "_turn", drifting)
    shuffler = SimpleNamespace(shuffle=lambda order: order.sort())
    systems = (bench.systems[0], CLIFF)
    _, prompts = bench.requests(2)
    pairs = turns.in_turns(bench.with_work(work), systems, prompts, shuffler)  # type: ignore[arg-type]
    assert [flow for flow, _ in taken] == [False, True] * (len(taken) // 2)
    assert [count for _, count in taken[:6]] == [turns.TURN - 1] * 6
    assert 4 <= len(pairs) <= 40 // turns.TURN
    assert [stock / flow for stock, flow in pairs] == [0.8] * len(pairs)


def test_too_few_tokens_for_a_turn_are_refused(bench: Bench) -> None:
    short = bench.with_work(replace(bench.work, output_tokens=2))
    with pytest.raises(ValueError, match="of 2 output tokens .* larger --output-tokens"):
        turns.decode(short, 1, 1)


def test_what_is_ranked_says_how_long_ranking_took(bench: Bench) -> None:
    """Every call that ranks is timed, by look or by attention, and what is chosen by place has none."""
    policies = "0:16 uniform,0:16 diversity,1:16 last_prompt"
    systems = engines.parse_systems(policies, bench.shape.layers)
    rows = measure.prefill(replace(bench, systems=systems), batch=2, rounds=1)
    shares = {row.system: row.ranking for row in rows}
    assert shares.pop("0:16 uniform") is None and shares.pop(engines.STOCK) is None
    assert all(share is not None and 0 < share.median < 1 for share in shares.values()), shares

    ranker = watching.runner_of(bench.flow).flow_state.ranker
    before, calls = dict(vars(ranker)), defaultdict(int)

    def counted(name: str):  # type: ignore[no-untyped-def]
        method = getattr(ranker, name)

        def call(*args: object) -> object:
            calls[name] += 1
            return method(*args)

        return call

    for system in systems[2:]:
        calls.clear()
        for ranking in watching.RANKING:
            setattr(ranker, ranking.__name__, counted(ranking.__name__))
        try:
            with watching.ranking_clock(bench.flow) as clock:
                _, prompts = bench.requests(1)
                bench.flow.generate(
                    bench.unseen(prompts), load.params_of(system, 1), use_tqdm=False
                )
        finally:
            for ranking in watching.RANKING:
                delattr(ranker, ranking.__name__)
        assert calls["choose"] == 1 and clock.seconds() > 0
        assert calls["attended"] == (1 if "last_prompt" in system.name else 0)
    assert vars(ranker).keys() == before.keys()


def test_watching_leaves_nothing_behind(bench: Bench) -> None:
    core, runner = watching.core_of(bench.flow), watching.runner_of(bench.flow)
    owners = (("c", core), ("s", core.scheduler), ("r", runner), ("w", runner.flow_state))
    before = {name: dict(vars(owner)) for name, owner in owners}
    with pytest.raises(RuntimeError), watching.watch(bench.flow):
        raise RuntimeError
    for name, owner in owners:
        assert vars(owner).keys() == before[name].keys()
    assert core.step_fn == before["c"]["step_fn"]


def test_a_report_is_drawn_and_written(bench: Bench, tmp_path) -> None:  # type: ignore[no-untyped-def]
    results = Results(
        command="c", created="now", model="m", shape={}, workload={}, engine={}, limits={},
        prefill=measure.prefill(bench, 1, 1),
        load=under_load.under_load(bench, 2, 2, 1),
    )  # fmt: skip
    assert [len(t.rows) for t in speed_tables.tables(results, "prefill")] == [4]
    assert [len(t.rows) for t in speed_tables.tables(results, "load")] == [4, 4, 4]
    assert results.write(tmp_path).exists()
    assert all(path.stat().st_size > 1000 for path in speed_figure.draw(results, tmp_path))


@pytest.mark.parametrize(
    "text, cliffs",
    [("baseline", [None]), ("cliff=0,cliff=L,cliff=L/2", [0, 4, 2]), ("cliff=1,cliff=L/4", [1])],
)
def test_policies(text: str, cliffs: list[int | None]) -> None:
    systems = engines.parse_systems(text, 4)
    assert systems[0].name == engines.STOCK and not systems[0].extension
    assert [system.cliff for system in systems[1:]] == cliffs


def test_policies_of_the_whole_grammar() -> None:
    """A preset under its name; places need no ranking."""
    systems = engines.parse_systems("fastv,0:64 uniform,0:1/2 diversity;2:0,cliff=2", 32)[1:]
    assert [s.name for s in systems] == ["fastv", "0:64 uniform", "0:50% diversity;2:0", "cliff=2"]
    assert systems[0].extra_args == {
        "flow_cliff": 2,
        "flow_keep": "50%",
        "flow_rank": "last_prompt",
    }
    assert [system.ranks for system in systems] == [True, False, True, False]
    with pytest.raises(ValueError, match="pictures as they are"):
        engines.parse_systems("downsample=2", 4)


@pytest.mark.parametrize("text", ["cliff", "cliff=", "cliff=x", "cliff=5", "cliff=L/0", "top=3"])
def test_policies_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="policy"):
        engines.parse_systems(text, 4)
