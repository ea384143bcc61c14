"""`vllm-flow report --pack RUN`."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.eval.synthetic_run import make_run
from vllm_flow.cli import main
from vllm_flow.eval.sweep.records import Run

POLICIES = "baseline,cliff=6,cliff=18"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("pack"), ["pope", "scienceqa"], POLICIES, items=16)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_pack_has_all_of_a_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    assert main(["report", "--pack", str(run.path), "--out", str(out)]) == 0
    assert f"files of the result pack: {out}" in capsys.readouterr().out
    settings = json.loads((out / "settings.json").read_text())
    assert settings["run"] == run.meta and settings["report"]["tolerance"] == 0.01
    asked = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    for task in ("pope", "scienceqa"):
        items = {item.id: item for item in run.items(task)}
        mine = [one for one in asked if one["task"] == task]
        assert {one["id"]: one["text"] for one in mine} == {i.id: i.text for i in items.values()}
        assert all(one["truth"] == items[one["id"]].truth for one in mine)
    answers = run.answers().to_pylist()
    told = {(r["task"], r["item"], r["policy"]): r["answer"] for r in rows_of(out / "items.csv")}
    assert told == {(r["task"], r["item_id"], r["policy"]): r["answer"] for r in answers}
    assert {path.name for path in out.iterdir()} == {
        "settings.json", "questions.jsonl", "items.csv", "scores.csv", "savings.csv", "errors.csv", "data.sha256",
        "README.md", "pack.sha256",
    }  # fmt: skip


def test_checksums_are_those_that_sha256sum_makes(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(run.meta["data"], data)
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    meta = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(meta | {"data": str(data)}))
    assert main(["report", "--pack", str(copy)]) == 0
    for name, base in (("data.sha256", data), ("pack.sha256", copy / "pack")):
        check = ["sha256sum", "--check", "--quiet", str(copy / "pack" / name)]
        assert subprocess.run(check, cwd=base).returncode == 0, name
    named = (copy / "pack/data.sha256").read_text()
    assert "pope/coco_pope_random.json" in named and ".jpg" in named
    label = data / "pope/coco_pope_random.json"
    label.write_text(label.read_text() + "\n")
    assert subprocess.run(
        check[:-1] + [str(copy / "pack/data.sha256")], cwd=data, capture_output=True
    ).returncode
    shutil.rmtree(data)
    assert main(["report", "--pack", str(copy)]) == 0, "data that is gone is named, and no failure"
    told = (copy / "pack/README.md").read_text()
    assert (
        "Not there any more when this was written, and so without a checksum: pope, scienceqa"
        in told
    )


def test_a_pack_names_every_command_as_a_shell_takes_it(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    meta = json.loads((copy / "run.json").read_text())
    first = ["vllm-flow", "eval", "--policies", "baseline,0:16 random seed=0:2", "--data", "d e"]
    sessions = [{"command": first}, {"command": [*first, "--engine-args", '{"a": 1}']}]
    written = meta | {"command": first, "sessions": sessions}
    (copy / "run.json").write_text(json.dumps(written))
    assert main(["report", "--pack", str(copy)]) == 0
    told = (copy / "pack/README.md").read_text().splitlines()
    named = [shlex.split(line) for line in told if line.startswith("    vllm-flow ")]
    assert named == [session["command"] for session in sessions]
    # What checks the data works as it is written, in the pack's folder.
    (check,) = (line for line in told if "data.sha256; (cd" in line)
    done = subprocess.run(check, shell=True, cwd=copy / "pack", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") > 2, done.stderr


def test_a_pack_is_of_one_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--pack", str(run.path), str(run.path)]) == 2
    assert "--pack takes one run" in capsys.readouterr().err
