"""`vllm-flow report A B ...`: pairs, their statistics, the reference, what is left out, the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from tests.eval.pages import rows, words
from tests.eval.synthetic_run import make_run
from vllm_flow.cli import main
from vllm_flow.eval.report import text
from vllm_flow.eval.report.command import write_report
from vllm_flow.eval.report.compare_command import comparison
from vllm_flow.eval.report.results import Options
from vllm_flow.eval.statistics.intervals import holm, minimum_detectable
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.sweep.schema import answers_table

POLICIES = "baseline,cliff=6,cliff=18"
TASKS = ("pope", "scienceqa")
FAST = Options(resamples=100, swaps=199)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("ours"), TASKS, POLICIES, items=16)


def headlines(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    found = [row for row in rows(path / "comparison.csv") if row["headline"] == "True"]
    return {(row["task"], row["run"], row["policy"]): row for row in found}


TURNED = {"Yes": "No", "No": "Yes"}


def variant(
    run: Run,
    path: Path,
    change: dict[str, str] | None = None,
    drop: str = "",
    renamed: dict[str, str] | None = None,
    **meta: object,
) -> Path:
    """A copy of a run whose POPE answers under cliff 6 are others, and whose policies have other names."""
    shutil.copytree(run.path, path)
    opened, renamed = Run.open(path), renamed or {}
    rows = [r for r in opened.answers().to_pylist() if r["item_id"] != drop]
    for row in rows:
        if (row["task"], row["policy"]) == ("pope", "cliff=6"):
            row["answer"] = (change or {}).get(row["answer"], row["answer"])
        row["policy"] = renamed.get(row["policy"], row["policy"])
    shutil.rmtree(path / "answers")
    (path / "answers").mkdir()
    written = json.loads((path / "run.json").read_text()) | meta
    for policy in written["policies"]:
        policy["name"] = renamed.get(policy["name"], policy["name"])
    (path / "run.json").write_text(json.dumps(written))
    Run.open(path).append(answers_table(rows))
    return path


def test_two_runs_on_their_common_questions(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    """Every answer of the other run under cliff 6 is turned round; one answer is missing there."""
    gone = run.items("pope")[0].id
    turned = variant(run, tmp_path / "turned", TURNED, gone, model="another")
    assert main(["report", str(run.path), str(turned), "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "model: synthetic in run, another in turned" in printed and "created" not in printed
    found = headlines(tmp_path / "out")
    # In the run's order, the baseline first.
    assert [key[::2] for key in found] == [(t, p) for t in TASKS for p in POLICIES.split(",")]
    changed, same = found["pope", "turned", "cliff=6"], found["pope", "turned", "cliff=18"]
    assert int(changed["questions"]) == len(run.items("pope"))
    assert int(changed["paired"]) == len(run.items("pope")) - 1
    assert float(changed["agreement"]) == 0.0 and float(same["agreement"]) == 1.0
    assert float(changed["difference"]) < -0.3 and changed["verdict"] != "identical"
    assert same["verdict"] == "identical" and float(same["difference"]) == 0.0
    assert "POPE: 3 pairs of answers not there" in printed


@pytest.mark.parametrize("name", ["turned", "whole path"])
def test_the_reference_is_the_one_that_was_named(
    run: Run, tmp_path: Path, no_figures: None, name: str
) -> None:
    turned = variant(run, tmp_path / "turned", TURNED)
    both = [str(run.path), str(turned)]
    assert main(["report", *both, "--out", str(tmp_path / "there")]) == 0
    there = headlines(tmp_path / "there")["pope", "turned", "cliff=6"]
    wanted = "turned" if name == "turned" else str(turned)
    assert main(["report", *both, "--pair", wanted]) == 0
    back = headlines(turned / "compare")["pope", "run", "cliff=6"]
    assert float(back["difference"]) == pytest.approx(-float(there["difference"]))
    assert (back["reference"], back["reference_value"]) == ("turned", there["value"])
    assert (back["gained"], back["lost"]) == (there["lost"], there["gained"])


def test_a_reference_that_is_no_run_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = variant(run, tmp_path / "turned")
    assert main(["report", str(run.path), str(turned), "--pair", "other"]) == 2
    assert "--pair other is none of the runs; name one of them: run, turned" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("option", [["--pair", "run"], ["--against", "baseline"]])
def test_one_run_has_no_reference(
    run: Run, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert main(["report", str(run.path), *option]) == 2
    assert f"{option[0]} has no effect on one run" in capsys.readouterr().err


def test_a_pair_has_the_statistics_of_one_run(tmp_path: Path, no_figures: None) -> None:
    """The same answers as two policies of one run, and as one policy of two, give the same numbers."""
    one = make_run(tmp_path / "one", ["pope", "chair"], "baseline,cliff=6", items=20)
    summary, _ = write_report(one.path, tmp_path / "report", FAST)
    rows = one.answers()
    sides = []
    for name, policy in (("a", "baseline"), ("b", "cliff=6")):
        own = [r | {"policy": "same"} for r in rows.to_pylist() if r["policy"] == policy]
        shutil.copytree(one.path, tmp_path / name, ignore=shutil.ignore_patterns("answers"))
        (tmp_path / name / "answers").mkdir()
        meta = json.loads((one.path / "run.json").read_text())
        meta["policies"] = [{"name": "same", "kind": "cliff", "cliff": 6}]
        (tmp_path / name / "run.json").write_text(json.dumps(meta))
        Run.open(tmp_path / name).append(answers_table(own))
        sides.append(tmp_path / name)
    pairs = comparison(sides, 0, None, FAST).pairs
    assert [pair.task for pair in pairs] == ["pope", "chair"]
    for pair, task in zip(pairs, summary.tasks, strict=True):
        single = task.policies[1]
        assert pair.result.against == single.against
        assert pair.result.agreement == single.agreement
        assert (pair.result.gained, pair.result.lost) == (single.gained, single.lost)
        assert pair.result.mcnemar_p == single.mcnemar_p


def test_holms_correction_goes_over_all_pairs_of_a_task(
    run: Run, tmp_path: Path, no_figures: None
) -> None:
    others = [
        variant(run, tmp_path / "b", TURNED),
        make_run(tmp_path / "third", TASKS, POLICIES, items=12).path,
    ]
    found = comparison([run.path, *others], 0, None, FAST)
    for task in TASKS:
        pairs = found.of(task)
        assert [(pair.policy, pair.run) for pair in pairs] == [
            (policy, side.label) for policy in POLICIES.split(",") for side in found.others
        ]
        for metric in pairs[0].read.metrics:
            against = [pair.result.against[metric] for pair in pairs]
            wanted = holm([one.comparison.p_value for one in against])
            assert [one.p_corrected for one in against] == wanted
            for one in against:
                if error := one.comparison.standard_error:
                    assert one.detectable == minimum_detectable(error, len(pairs))


def test_any_policy_against_one_of_the_reference(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    """A peer's policies have other names: none is paired by name, each with the one that is named."""
    peer = variant(run, tmp_path / "peer", renamed={"cliff=6": "fastv", "cliff=18": "vtw"})
    call = ["report", str(run.path), str(peer), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 policies only in run, and left out: cliff=6, cliff=18" in printed
    assert "2 policies only in peer, and left out: fastv, vtw" in printed
    assert {key[2] for key in headlines(tmp_path / "out")} == {"baseline"}
    assert main([*call, "--against", "cliff=18"]) == 0
    found = headlines(tmp_path / "out")
    assert {row["reference_policy"] for row in found.values()} == {"cliff=18"}
    assert [key[2] for key in found if key[0] == "pope"] == ["baseline", "fastv", "vtw"]
    assert found["pope", "peer", "vtw"]["verdict"] == "identical"
    assert found["pope", "peer", "fastv"]["verdict"] != "identical"
    page = words(tmp_path / "out" / "comparison.html")
    assert "Every policy of the other runs is paired with “cliff 18” of the reference" in page
    assert main([*call, "--against", "cliff=7"]) == 2
    told = capsys.readouterr().err
    assert "no such policy (it has: baseline, cliff=6, cliff=18)" in told


def test_questions_of_one_run_are_named_counted_and_left_out(
    run: Run, tmp_path: Path, no_figures: None
) -> None:
    fewer = make_run(tmp_path / "fewer", ["pope", "chair"], POLICIES, items=14)
    out = tmp_path / "out"
    assert main(["report", str(run.path), str(fewer.path), "--out", str(out)]) == 0
    ours, theirs = ({i.id for i in one.items("pope")} for one in (run, fewer))
    alone = sorted(ours - theirs)
    assert len(alone) == 6 and not theirs - ours
    only = rows(out / "unpaired.csv")
    assert sorted(row["item"] for row in only) == alone
    assert {row["only_in"] for row in only} == {only[0]["only_in"]}
    page = words(out / "comparison.html")
    label = only[0]["only_in"]
    named = ", ".join(item.id for item in run.items("pope") if item.id in alone)
    assert f"6 only in {label} and left out: {named}" in page
    assert f"Only in {label}, and left out: ScienceQA" in page and "left out: CHAIR" in page
    (pair,) = {row["questions"] for row in headlines(out).values()}
    assert int(pair) == len(theirs)
    items = rows(out / "items.csv")
    assert {row["item"] for row in items} == theirs and len(items) == 3 * len(theirs)


def test_the_page_and_its_figures(run: Run, tmp_path: Path) -> None:
    turned = variant(
        run, tmp_path / "turned", TURNED, model="another", conversation="chat-template"
    )
    out = tmp_path / "out"
    assert main(["report", str(run.path), str(turned), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "comparison.html", "comparison.csv", "items.csv", "unpaired.csv", "scores.png", "scores.svg", "differences.png",
        "differences.svg",
    }  # fmt: skip
    source, shown = (out / "comparison.html").read_text(), words(out / "comparison.html")
    assert "<script" not in source and "@import" not in source
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>]+)""", source)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    for pair in comparison([run.path, turned], 0, None, Options()).pairs:
        compared = pair.headline.comparison
        assert text.number(compared.baseline.value) in shown
        assert text.number(compared.treatment.value) in shown
        assert text.limits(compared.difference, sign=True) in shown
        assert text.p_text(pair.headline.p_corrected) in shown
    assert "model synthetic another" in shown and "conversation – chat-template" in shown
    # Answers that flipped, with their pictures: of the first pair in which some did.
    section = source[source.index("Answers that flipped") :]
    assert "turned · cliff=6" in section and "run · cliff=6" in section
    assert section.count("data:image/jpeg") == section.count('<article class="card">') > 3


def test_errors_and_gaps_are_told(run: Run, tmp_path: Path, no_figures: None) -> None:
    failed = make_run(tmp_path / "failed", TASKS, POLICIES, items=16, failures=0.1)
    out = tmp_path / "out"
    assert main(["report", str(run.path), str(failed.path), "--out", str(out)]) == 0
    page = words(out / "comparison.html")
    errors = failed.answers().filter(pc.field("error").is_valid())
    assert f"{errors.num_rows} requests ended in an error" in page
    assert "EngineDeadError: the engine stopped" in page
    pope = errors.filter(pc.field("task") == "pope").num_rows
    assert f"POPE: {pope} pairs of answers not there" in page


def test_nothing_differs_is_said(run: Run, tmp_path: Path, no_figures: None) -> None:
    again = variant(run, tmp_path / "again")
    out = tmp_path / "out"
    assert main(["report", str(run.path), str(again), "--out", str(out)]) == 0
    page = words(out / "comparison.html")
    assert "Nothing that was recorded" in page and "Answers that flipped" not in page
    assert "3 pairs: 3 with every answer scored the same" in page
