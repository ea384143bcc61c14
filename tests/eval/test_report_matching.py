"""Which runs may be compared, and on which questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.synthetic_run import make_run
from vllm_flow.cli import main
from vllm_flow.eval.report.matching import digest, labels, settings_that_differ
from vllm_flow.eval.sweep.checked import RunError
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.sweep.schema import items_table
from vllm_flow.eval.tasks.base import Item

POLICIES = "baseline,cliff=6"

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("ours"), ["pope"], POLICIES, items=8)


def other(run: Run, path: Path, change: Callable[[Item], Item], **meta: object) -> Path:
    """A copy of a run whose first POPE question is another."""
    shutil.copytree(run.path, path)
    items = run.items("pope")
    changed = [change(items[0]), *items[1:]]
    pq.write_table(items_table("pope", changed), path / "items/pope.parquet")
    written = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(written | meta))
    return path


def flipped(truth: Mapping[str, object]) -> dict[str, object]:
    return {**truth, "label": "no" if truth["label"] == "yes" else "yes"}


@pytest.mark.parametrize(
    ("change", "meta", "said"),
    [
        (
            lambda item: replace(item, truth=flipped(item.truth)),
            {},
            "were asked different data: 1 of 24 common questions differ, first random/1: label is '",
        ),
        (
            lambda item: replace(item, group="popular"),
            {},
            "its group is 'random' there, 'popular' here",
        ),
        (lambda item: replace(item, image=None), {}, "whether it has a picture is true there, false here"),
        (
            lambda item: replace(item, text=item.text.replace("a single word", "one word")),
            {"prompts": "qwen2-vl"},
            "were asked in different words: 1 of 24 common questions, first random/1: --prompts llava there, qwen2",
        ),
        (
            lambda item: replace(item, text=item.text + " Now."),
            {},
            "Ask both with the same --prompts",
        ),
    ],
    ids=["truth", "group", "picture", "prompts", "words"],
)  # fmt: skip
def test_other_data_and_other_words_are_refused(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Item], Item],
    meta: dict[str, object],
    said: str,
) -> None:
    there = other(run, tmp_path / "there", change, **meta)
    assert main(["report", str(run.path), str(there)]) == 2
    told = capsys.readouterr().err
    assert said in told and "pope: run and there" in told
    assert not (run.path / "compare").exists(), "nothing is written"


def test_other_data_is_named_by_its_digest(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = other(run, tmp_path / "there", lambda item: replace(item, truth=flipped(item.truth)))
    assert main(["report", str(run.path), str(there)]) == 2
    told = capsys.readouterr().err
    for path in (run.path, there):
        assert digest(Run.open(path).items("pope"))[:12] in told
    assert "give the same --data to `vllm-flow eval` for both" in told


def test_other_pictures_are_refused_and_absent_ones_are_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data was copied; one picture was drawn anew there, then all are gone."""
    data = Path(run.meta["data"])
    shutil.copytree(data, tmp_path / "data")
    there = tmp_path / "there"
    shutil.copytree(run.path, there)
    moved = [
        replace(item, image=str(tmp_path / "data" / Path(str(item.image)).relative_to(data)))
        for item in run.items("pope")
    ]
    pq.write_table(items_table("pope", moved), there / "items/pope.parquet")
    call = ["report", str(run.path), str(there), "--out", str(tmp_path / "out")]
    assert main(call) == 0, "a copy is the same data"
    capsys.readouterr()
    picture = Path(str(moved[0].image))
    asked = sum(item.image == moved[0].image for item in moved)
    picture.write_bytes(picture.read_bytes() + b"x")
    assert main(call) == 2
    told = capsys.readouterr().err
    assert f"were asked about different pictures: the files of {asked} of 24" in told
    assert str(picture) in told
    shutil.rmtree(tmp_path / "data")
    assert main(call) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the picture files of 24 are not both here, so their bytes were not compared" in said


def test_runs_without_a_task_question_or_policy_in_common_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(there: Run | Path, *more: str) -> str:
        path = there.path if isinstance(there, Run) else there
        assert main(["report", str(run.path), str(path), *more]) == 2
        return capsys.readouterr().err

    told = refused(make_run(tmp_path / "chair", ["chair"], POLICIES, items=4))
    assert "no task in common" in told and "Ask both with the same --tasks" in told
    told = refused(other(run, tmp_path / "gqa", lambda item: item, tasks=["pope-gqa"]))
    assert "pope-gqa" in told, "it has no items of that name"
    told = refused(make_run(tmp_path / "policy", ["pope"], "cliff=18", items=8))
    assert "no policy in common" in told and "--against POLICY" in told
    renamed = tmp_path / "renamed"
    shutil.copytree(run.path, renamed)
    items = [replace(item, id=f"x{item.id}") for item in run.items("pope")]
    pq.write_table(items_table("pope", items), renamed / "items/pope.parquet")
    told = refused(renamed)
    assert "no question in common" in told and "with the same --seed" in told
    unasked = make_run(tmp_path / "unasked", ["pope"], POLICIES, items=8, unfinished=1.0)
    told = refused(unasked)
    assert "no question that both answered" in told and "go on with unfinished runs" in told


def test_variants_of_a_task_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One benchmark asked with and without OCR tokens: other prompts, and no pairs."""
    runs = [
        make_run(tmp_path / name, [name], POLICIES, items=4)
        for name in ("textvqa", "textvqa-no-ocr")
    ]
    assert main(["report", *(str(run.path) for run in runs)]) == 2
    told = capsys.readouterr().err
    assert "variants of textvqa differ in their prompts or in how they are scored" in told


def test_a_run_is_no_other_than_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    again = run.path.parent / "." / run.path.name
    assert main(["report", str(run.path), f"{again}/"]) == 2
    assert "is given twice" in capsys.readouterr().err


NAMES = st.sampled_from("abc")


@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), min_size=1, max_size=5))
def test_labels_are_ends_of_paths_that_tell_them_apart(parts: list[list[str]]) -> None:
    paths = [Path("/no", *own) for own in parts]
    if len(set(paths)) < len(paths):
        with pytest.raises(RunError, match="given twice"):
            labels(paths)
        return
    found = labels(paths)
    assert len(set(found)) == len(paths)
    for path, label in zip(paths, found, strict=True):
        assert f"{path}".endswith(label)
    depth = max(label.count("/") for label in found)
    if depth:
        assert len({"/".join(path.parts[-depth:]) for path in paths}) < len(paths), "the shortest"


def test_a_digest_is_of_what_was_asked_in_any_order() -> None:
    items = [Item("1", "a?", "p.jpg", {"label": "yes"}), Item("2", "b?", None, {"label": "no"})]
    known = digest(items)
    assert digest(reversed(items)) == known
    assert digest([replace(items[0], image="elsewhere/p.jpg"), items[1]]) == known
    for change in ({"text": "c?"}, {"truth": {"label": "no"}}, {"group": "g"}, {"image": None}):
        assert digest([replace(items[0], **change), items[1]]) != known  # type: ignore[arg-type]


def test_settings_that_differ() -> None:
    a = {
        "model": "x", "versions": {"vllm": "1", "torch": "2"}, "tasks": ["t", "u"], "seed": 0, "limit": 4,
        "image_preparation": {"t": "pad", "u": "pad"},
    }  # fmt: skip
    b = {
        "model": "y", "versions": {"vllm": "1", "torch": "3"}, "tasks": ["t"], "seed": 0, "new": 1,
        "image_preparation": {"t": "plain"},
    }  # fmt: skip
    assert settings_that_differ([a, b, a]) == {
        "model": ("x", "y", "x"),
        "pictures of t": ("pad", "plain", "pad"),
        "version of torch": ("2", "3", "2"),
        "new": (None, 1, None),
    }
