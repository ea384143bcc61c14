"""Policies beside the baseline: what is compared exactly, what by pictures, and what more comparisons ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_flow.eval.report.results import Options
from vllm_flow.eval.report.summary import summarise
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, ratio

OPTIONS = Options(resamples=300, swaps=999)


@dataclass(frozen=True)
class Guess(Task):
    """A task of one's own, with a metric the report has never heard of."""

    name = "guess"
    max_tokens = 1
    headline = "misses"
    higher_is_better = False
    binary = False

    def read(self, data: Path) -> list[Item]:
        return [Item(str(i), "?", None, {"value": i % 3}) for i in range(30)]

    def score(self, item: Item, text: str) -> Scored:
        off = abs(float(text) - item.truth["value"])
        return Scored(item.id, text, 1 / (1 + off), {"off": off, "all": 1.0})

    def metrics(self, totals: Totals) -> Metrics:
        return {"misses": ratio(totals.get("off", 0.0), totals.get("all", 0.0))}


def answers(rows: Mapping[str, Mapping[str, str | None]]) -> list[dict[str, Any]]:
    return [
        {"task": "guess", "policy": policy, "item_id": item, "answer": said,
         "error": None if said is not None else "lost"}
        for policy, by_item in rows.items()
        for item, said in by_item.items()
    ]  # fmt: skip


def test_asking_the_same_three_times_is_no_more_evidence() -> None:
    """POPE asks its yes questions in all three categories: p and intervals must not shrink."""
    meta = {"policies": [{"name": n, "kind": k} for n, k in (("b", "baseline"), ("t", "other"))]}
    results = []
    for times in (1, 3):
        items = [
            Item(f"{i}/{copy}", "?", f"{i}.jpg", {"value": 1})
            for i in range(40)
            for copy in range(times)
        ]
        said = {item.id: "1" for item in items}
        rows = answers({"b": said, "t": {i: "2" if i.startswith("1") else "1" for i in said}})
        task = summarise(meta, {"guess": items}, rows, {"guess": Guess()}, OPTIONS).tasks[0]
        results.append(task.policies[1].against["misses"])
    once, thrice = (result.comparison for result in results)
    assert once.p_value == thrice.p_value < 0.05
    assert once.difference == thrice.difference
    # Nor is what so many pictures may have missed altogether, or could have shown.
    assert results[0].unseen == results[1].unseen > 0
    assert results[0].detectable == results[1].detectable


def test_a_metric_that_happens_to_equal_the_mean_score_is_resampled_itself() -> None:
    """Half of the answers are right and half are yes; McNemar's test of right answers says nothing of the yes."""
    items = [
        Item(f"random/{i}", "?", f"{i}.jpg", {"label": "yes" if i % 2 else "no"}, "random")
        for i in range(40)
    ]
    said = {
        "b": ["yes", "yes", "no", "no"] * 10,  # 10 yes rightly, 10 wrongly
        "t": ["no", "no", "yes", "yes"] * 10,
    }
    rows = [
        {"task": "pope", "policy": name, "item_id": item.id, "answer": one, "error": None}
        for name, texts in said.items()
        for item, one in zip(items, texts, strict=True)
    ]
    meta = {"policies": [{"name": n, "kind": k} for n, k in (("b", "baseline"), ("t", "other"))]}
    pope = {"pope": get_task("pope")}
    task = summarise(meta, {"pope": items}, rows, pope, OPTIONS).tasks[0]
    assert all(r.values[m].value == 0.5 for r in task.policies for m in ("accuracy", "yes_ratio"))
    assert task.exact == {"accuracy", "accuracy_random"}
    # Where all of one policy's answers are yes, its precision is its share of right ones; the other's is not.
    always = [{**row, "answer": "yes"} if row["policy"] == "t" else row for row in rows]
    task = summarise(meta, {"pope": items}, always, pope, OPTIONS).tasks[0]
    assert task.exact == {"accuracy", "accuracy_random"}
    # Nor is any exact where pictures are asked about twice.
    twice = [
        replace(item, truth={**item.truth, "image_id": n // 2}) for n, item in enumerate(items)
    ]
    assert not summarise(meta, {"pope": twice}, rows, pope, OPTIONS).tasks[0].exact


def test_what_could_have_been_shown_depends_on_how_many_are_compared() -> None:
    """Holm's correction asks more of each of three policies than of one alone."""
    items = Guess().read(Path())
    good = {item.id: str(item.truth["value"]) for item in items}
    near = {item: said if int(item) % 5 else "2" for item, said in good.items()}
    found = []
    for names in (["t"], ["t", "u", "v"]):
        kinds = {"baseline": "baseline", **dict.fromkeys(names, "other")}
        meta = {"policies": [{"name": name, "kind": kind} for name, kind in kinds.items()]}
        rows = answers({"baseline": good, **dict.fromkeys(names, near)})
        task = summarise(meta, {"guess": items}, rows, {"guess": Guess()}, OPTIONS).tasks[0]
        found.append(task.policies[1].against["misses"])
    alone, among = found
    assert alone.comparison.standard_error == among.comparison.standard_error > 0
    assert alone.detectable < among.detectable
    assert alone.p_corrected < among.p_corrected


def test_what_reduced_pictures_lose_is_no_other_policys_loss() -> None:
    items = Guess().read(Path())
    good = {item.id: str(item.truth["value"]) for item in items}
    kinds = {
        "baseline": "baseline",
        "cliff=1": "cliff",
        "small": "downsample",
        "tiny": "downsample",
    }
    meta = {"policies": [{"name": name, "kind": kind} for name, kind in kinds.items()]}
    said = {
        "baseline": {**good, "3": "9"},
        "cliff=1": dict.fromkeys(good, "7"),
        "small": {**good, "0": "9"},
        "tiny": {**good, "0": "9", "1": "9", "3": "0"},  # of which the last is better
    }
    task = summarise(meta, {"guess": items}, answers(said), {"guess": Guess()}, OPTIONS).tasks[0]
    assert task.reduced_loses == 2
