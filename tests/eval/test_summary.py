"""A summary's numbers are what direct computation gives; verdicts and found cliffs mean what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tests.eval.synthetic_run import LAYERS, make_run
from tests.eval.test_comparing import OPTIONS, Guess, answers
from vllm_flow.eval.report.flips import choose_flips
from vllm_flow.eval.report.page import gaps
from vllm_flow.eval.report.results import Options, Summary
from vllm_flow.eval.report.summary import summarise
from vllm_flow.eval.statistics.intervals import accuracy, paired_difference
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item, Scored, sum_counts

POLICIES = "baseline,cliff=0:30:6,downsample=12"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(
        tmp_path_factory.mktemp("run"), policies=POLICIES, items=60, failures=0.01, unfinished=0.02
    )


def read(run: Run, options: Options = OPTIONS) -> Summary:
    names = run.meta["tasks"]
    return summarise(
        run.meta,
        {name: run.items(name) for name in names},
        run.answers().to_pylist(),
        {name: get_task(name) for name in names},
        options,
    )


@pytest.fixture(scope="module")
def summary(run: Run) -> Summary:
    return read(run)


def scored(run: Run, task: str) -> dict[str, dict[str, Scored]]:
    """Policy -> item -> score, straight from the answers."""
    items = {item.id: item for item in run.items(task)}
    found: dict[str, dict[str, Scored]] = {}
    for row in run.answers().to_pylist():
        if row["task"] == task and row["answer"] is not None:
            one = get_task(task).score(items[row["item_id"]], row["answer"])
            found.setdefault(row["policy"], {})[row["item_id"]] = one
    return found


@pytest.mark.parametrize("name", ["pope", "scienceqa", "textvqa", "chair"])
def test_values_and_differences_are_the_tasks_metrics(
    name: str, run: Run, summary: Summary
) -> None:
    task, direct = get_task(name), scored(run, name)
    result = next(t for t in summary.tasks if t.name == name)
    assert result.metrics[0] == result.headline == task.headline
    for policy in result.policies:
        mine = direct[policy.policy.name]
        values = task.metrics(sum_counts(mine.values()))
        assert {m: v.value for m, v in policy.values.items()} == pytest.approx(values)
        assert all(v.low <= v.value <= v.high for v in policy.values.values())
        if policy.policy.kind == "baseline":
            assert not policy.against
            continue
        shared = mine.keys() & direct["baseline"].keys()
        assert policy.paired == len(shared) <= len(run.items(name))
        before = task.metrics(sum_counts(direct["baseline"][i] for i in shared))
        after = task.metrics(sum_counts(mine[i] for i in shared))
        for metric, compared in policy.against.items():
            difference = compared.comparison.difference
            assert difference.value == pytest.approx(after[metric] - before[metric], abs=1e-12)
            assert difference.low <= difference.value <= difference.high
        changes = [mine[i].score - direct["baseline"][i].score for i in shared]
        assert (policy.gained, policy.lost) == (
            sum(c > 0 for c in changes),
            sum(c < 0 for c in changes),
        )


def test_binary_scores_get_the_exact_test_where_pictures_do_not_repeat(
    run: Run, summary: Summary
) -> None:
    direct = scored(run, "scienceqa")
    task = next(t for t in summary.tasks if t.name == "scienceqa")
    assert task.pictures == task.items and task.exact == {"accuracy", "img_accuracy"}
    p_values = []
    for policy in task.policies[1:]:
        shared = [i for i in direct["baseline"] if i in direct[policy.policy.name]]
        before = [direct["baseline"][i].score == 1 for i in shared]
        after = [direct[policy.policy.name][i].score == 1 for i in shared]
        comparison = policy.against["img_accuracy"].comparison
        table = [[0, sum(b and not a for b, a in zip(before, after, strict=True))],
                 [sum(a and not b for b, a in zip(before, after, strict=True)), 0]]  # fmt: skip
        expected = mcnemar(table, exact=True).pvalue if np.sum(table) else 1.0
        assert comparison.p_value == pytest.approx(expected) == policy.mcnemar_p
        assert comparison.difference == paired_difference(before, after).difference
        right = [one.score == 1 for one in direct[policy.policy.name].values()]
        assert policy.values["img_accuracy"] == accuracy(sum(right), len(right), OPTIONS.confidence)
        p_values.append(comparison.p_value)
    corrected = [p.against["img_accuracy"].p_corrected for p in task.policies[1:]]
    assert corrected == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_repeated_pictures_are_resampled_as_a_whole(summary: Summary) -> None:
    task = next(t for t in summary.tasks if t.name == "pope")
    assert task.pictures < task.items and not task.exact


def test_answers_errors_and_gaps_are_counted(run: Run, summary: Summary) -> None:
    rows = run.answers().to_pylist()
    failed = Counter((r["task"], r["policy"]) for r in rows if r["error"])
    assert {key: sum(c.values()) for key, c in summary.errors.items()} == failed and failed
    for task in summary.tasks:
        for policy in task.policies:
            assert policy.answered + policy.failed + policy.missing == task.items
            assert policy.failed == failed[task.name, policy.policy.name]
        assert any(policy.missing for policy in task.policies)


def test_the_known_curve_is_found(tmp_path: Path) -> None:
    """Made-up answers lose a lot below cliff 10 and nothing from 12 on."""
    run = make_run(tmp_path, ["scienceqa", "chair"], "baseline,cliff=4:28:4,text-only", items=150)
    for task in read(run).tasks:
        assert task.cliff is not None and task.cliff.asked == (0, 4, 8, 12, 16, 20, 24, 28)
        assert task.cliff.found in (8, 12)
        assert task.cliff.seen is None or task.cliff.seen >= task.cliff.found
        finding = task.result("cliff=4").against[task.headline].verdict.finding  # type: ignore[union-attr]
        assert finding == "worse"


def test_savings_are_ratios_of_sums(run: Run, summary: Summary) -> None:
    rows = [r for r in run.answers().to_pylist() if r["answer"] is not None]
    full = {
        (r["task"], r["item_id"]): r["prompt_tokens"] for r in rows if r["policy"] == "baseline"
    }
    saving = next(s for s in summary.savings if s.policy == "cliff=12")
    mine = [r for r in rows if r["policy"] == "cliff=12"]
    both = [r for r in mine if (r["task"], r["item_id"]) in full]
    saved = sum(r["prefill_rows_saved"] for r in both)
    whole = LAYERS * sum(full[r["task"], r["item_id"]] for r in both)
    assert saving.prefill_share == pytest.approx(1 - saved / whole)
    kv = sum(r["kv_blocks"] for r in mine) / sum(r["kv_blocks_baseline"] for r in mine)
    assert (saving.requests, saving.kv_share) == (len(mine), pytest.approx(kv))
    assert next(s for s in summary.savings if s.policy == "baseline").prefill_share == 1
    rows = run.answers().to_pylist()
    for task, found in summary.task_savings.items():
        for one in found:
            own = [
                r for r in rows if (r["task"], r["policy"]) == (task, one.policy) and not r["error"]
            ]
            assert one.requests == len(own), (task, one.policy)


def test_other_tasks_and_kinds_of_policies_need_nothing_new() -> None:
    items = Guess().read(Path())
    good = {item.id: str(item.truth["value"]) for item in items}
    bad = {item.id: "5" for item in items}
    meta = {
        "num_layers": 8,
        "policies": [
            {"name": "random=8", "kind": "random", "keep": 8},
            {"name": "baseline", "kind": "baseline"},
        ],
    }
    rows = answers({"baseline": good, "random=8": bad, "stray": good})
    result = summarise(meta, {"guess": items}, rows, {"guess": Guess()}, OPTIONS)
    task = result.tasks[0]
    assert [p.policy.kind for p in task.policies] == ["baseline", "random", "unlisted"]
    assert task.cliff is None
    assert task.reduced_loses == 0, "of reduced pictures, of which none was asked"
    random, stray = task.policies[1:]
    assert random.against["misses"].verdict.finding == "worse"
    assert random.against["misses"].comparison.difference.value == pytest.approx(4)
    assert stray.against["misses"].verdict.finding == "identical"
    assert not stray.against["misses"].verdict.within_tolerance, "30 items cannot show 1 point"


def test_without_a_baseline_there_are_scores_and_no_comparisons() -> None:
    items = Guess().read(Path())
    ten = {item.id: "1" for item in items[:10]}
    rows = answers({"cliff=4": ten, "cliff=6": {"0": None}, "cliff=8": {**ten, "0": "5"}})
    meta = {
        "num_layers": 8,
        "policies": [{"name": f"cliff={c}", "kind": "cliff", "cliff": c} for c in (4, 6, 8)],
    }
    task = summarise(meta, {"guess": items}, rows, {"guess": Guess()}, OPTIONS).tasks[0]
    assert task.baseline is None and task.cliff is None and choose_flips(task) is None
    four, six, eight = task.policies
    assert (four.answered, four.missing, bool(four.values), four.against) == (10, 20, True, {})
    assert (six.answered, six.failed, six.values) == (0, 1, {})
    assert (eight.answered, eight.paired, eight.against) == (10, 0, {}), (
        "with nothing to compare it with"
    )


def test_a_run_without_answers_is_a_summary_of_nothing() -> None:
    items = Guess().read(Path())
    meta = {"policies": [{"name": "baseline", "kind": "baseline"}]}
    task = summarise(meta, {"guess": items}, [], {"guess": Guess()}, OPTIONS).tasks[0]
    assert (task.policies[0].missing, task.metrics) == (30, ("misses",))


def test_flips_are_what_they_say(run: Run, summary: Summary) -> None:
    for task in summary.tasks:
        flips = choose_flips(task)
        assert flips is not None and flips == choose_flips(task)
        direct = scored(run, task.name)
        for ids, sign in ((flips.lost, -1), (flips.gained, 1)):
            assert len(ids) <= 4
            for item in ids:
                change = direct[flips.policy][item].score - direct["baseline"][item].score
                assert sign * change > 0
        result = task.result(flips.policy)
        assert result is not None and task.cliff is not None
        assert (flips.lost_in_all, flips.gained_in_all) == (result.lost, result.gained)
        if task.result(f"cliff={task.cliff.found}"):
            assert result.policy.cliff is not None and task.cliff.found is not None
            assert result.policy.cliff <= task.cliff.found


def test_a_part_that_nothing_was_asked_of_has_no_figure(run: Run) -> None:
    """As where POPE's random questions alone are there: 0/0 would read as if every other answer were wrong."""
    items = [item for item in run.items("pope") if item.group == "random"]
    (task,) = summarise(
        run.meta, {"pope": items}, run.answers().to_pylist(), {"pope": get_task("pope")}, OPTIONS
    ).tasks
    other = next(result for result in task.policies if result.against)
    assert "f1_random" in task.metrics and "f1_random" in other.values
    assert not [
        metric
        for metrics in (task.metrics, other.values, other.against)
        for metric in metrics
        if metric.endswith(("popular", "adversarial"))
    ]


@pytest.mark.parametrize(
    ("group", "of"),
    [("count", "1 of its 10 parts (count)"), ("code_reasoning", "0 of its 10 parts")],
)
def test_a_mean_over_some_of_its_parts_says_so(run: Run, group: str, of: str) -> None:
    """Points of 2000, whatever the mean is of; the headline is there even where it is of nothing."""
    truth = {"label": "yes", "image_id": f"{group}/1.png"}
    items = [Item(f"{group}/1.png#{number}", "Q", None, truth, group) for number in (1, 2)]
    given = next(row for row in run.answers().to_pylist() if row["policy"] == "baseline")
    rows = [given | {"task": "mme", "item_id": item.id, "answer": "Yes"} for item in items]
    found = gaps(summarise(run.meta, {"mme": items}, rows, {"mme": get_task("mme")}, OPTIONS), {})
    said = f"MME: perception is over {of}; nothing was answered of the others."
    assert [gap for gap in found if "perception" in gap] == [said]
