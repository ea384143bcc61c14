"""The whole way: four tasks' official files, two engines, one report; every layer in make test-long."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.engine.fixtures import prepare_process
from tests.eval import files
from tests.plugins.installing import visible

prepare_process()
pytest.importorskip("ray")

from vllm_flow import cli  # noqa: E402
from vllm_flow.demo_model.datasets import __main__ as datasets  # noqa: E402
from vllm_flow.eval.sweep.records import Run  # noqa: E402

TASKS = ("pope", "scienceqa", "textvqa", "chair", "capitals")
LAYERS = 6
ITEMS = 2


def letters(data: Path, source: Path) -> None:
    """Data for the task of tests/plugins, with pictures of the other tasks."""
    pictures = sorted(path for path in source.rglob("*") if path.suffix in (".png", ".jpg"))
    assert len(pictures) >= ITEMS
    rows = [
        {"id": str(n), "image": str(picture), "letter": "A"}
        for n, picture in enumerate(pictures[:ITEMS])
    ]
    files.json_lines(data / "letters.jsonl", rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cliffs",
    [
        pytest.param((2,), id="a cliff"),
        pytest.param(range(1, LAYERS), id="every cliff", marks=pytest.mark.long),
    ],
)
def test_four_tasks_and_a_packages_to_a_report(
    cluster: str,
    packages: tuple[Path, Path],
    cliffs: Iterable[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also a task and a rank of installed packages."""
    data, run, report = tmp_path / "data", tmp_path / "run", tmp_path / "run" / "report"
    datasets.main(["--out", str(data), "--limit", "4"])
    letters(data / "capitals", data)
    policies = ["baseline", "text-only", *(f"cliff={cliff}" for cliff in cliffs), "downsample=3"]
    policies.append("0:50% center")
    asked = [
        *("eval", "--model", "demo-small", "--tasks", ",".join(TASKS), "--data", str(data)),
        *("--policies", ",".join(policies), "--limit", str(ITEMS), "--batch", "1"),
        *("--engines", "2", "--out", str(run)),
    ]  # fmt: skip
    with visible(*packages):
        assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert said.index("chair: 2 questions on 2 pictures can rule out") < said.index(
        "starting 2 engines"
    )
    rows = Run.open(run).answers().to_pylist()
    assert len({(r["task"], r["item_id"], r["policy"]) for r in rows}) == len(rows)
    assert len(rows) == len(TASKS) * ITEMS * len(policies)
    assert not [row["error"] for row in rows if row["error"] is not None]
    # A busy machine may start the second engine when the first has answered everything.
    assert len({row["engine"] for row in rows}) in (1, 2)
    for row in rows:
        evicted = (LAYERS - int(row["policy"][-1])) if "cliff" in row["policy"] else 0
        evicted = LAYERS if row["policy"] == "text-only" else evicted
        evicted = LAYERS / 2 if "center" in row["policy"] else evicted
        if "downsample" not in row["policy"]:
            assert row["prefill_rows_saved"] == evicted * row["image_tokens"]

    with visible(*packages):
        assert cli.main(["report", str(run)]) == 0
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", ""), "the page asks the network"
    with (report / "scores.csv").open(encoding="utf-8") as file:
        scored = {(row["task"], row["policy"]) for row in csv.DictReader(file)}
    assert scored == {(task, policy) for task in TASKS for policy in policies}
