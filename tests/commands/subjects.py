"""Every command with valid inputs in a small folder, and what of it is left out in these tests.

Engines, clusters and figures of known data are left out: what is tried is how inputs are read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval import files

Prepare = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Subject:
    """A command, the files it reads, and how it is called on a copy of them."""

    name: str
    make: Callable[[Path], None]
    argv: Callable[[Path], list[str]]
    prepare: Prepare = lambda patch: None
    spoilt: tuple[str, ...] = ("**/*",)
    """Patterns of the files to spoil."""
    weight: int = 3
    """Trials in `make test`, in tens."""


def score_pope(folder: Path) -> None:
    labels = files.pope_labels(folder / "labels")
    rows = []
    for name in ("popular", "adversarial"):
        (labels / f"coco_pope_{name}.json").unlink()
    for line in (labels / "coco_pope_random.json").read_text().splitlines():
        row = json.loads(line)
        rows.append({"question_id": row["question_id"], "prompt": row["text"], "text": "Yes"})
    files.json_lines(folder / "answers.jsonl", rows)


def score_scienceqa(folder: Path) -> None:
    from tests.eval.test_scienceqa import official

    official(folder)
    rows = [{"question_id": i, "prompt": "<image>\nQ", "text": "A"} for i in ("4", "5", "11")]
    files.json_lines(folder / "answers.jsonl", rows)


def score_chair(folder: Path) -> None:
    things = {1: (["dog"], ["a dog"]), 2: (["car"], ["a car"])}
    files.coco(folder / "coco", {"val": things, "train": {3: (["cat"], ["a cat"])}})
    files.json_lines(
        folder / "captions.jsonl",
        [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."}],
    )


def run_folder(folder: Path) -> None:
    from tests.eval.synthetic_run import make_run

    make_run(folder, ("pope",), "baseline,cliff=2:8:2", items=6)


def figure_folder(folder: Path) -> None:
    """One of each file that `figures` looks for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vllm_flow.analysis.cam_file import CamRecord

    spans = ("system", "image", "user", "output")
    keys = {"request_id": ["a"] * 4, "layer": [0, 0, 1, 1], "token": [0, 1, 0, 1]}
    pq.write_table(
        pa.table({**keys, **{name: [0.25] * 4 for name in spans}}), folder / "attention.parquet"
    )
    flow = [(layer, s, t, 0.25) for layer in (0, 1) for s in spans for t in spans]
    columns = dict(zip(("layer", "source", "target", "mass"), zip(*flow, strict=True), strict=True))
    pq.write_table(
        pa.table({"request_id": ["a"] * len(flow), **{k: list(v) for k, v in columns.items()}}),
        folder / "attention_flow.parquet",
    )
    (folder / "attention_words.json").write_text(json.dumps({"a": ["w", "x"]}))
    (folder / "scores.csv").write_text(
        "task,kind,layer,metric,headline,value,low,high\npope,cliff,2,f1,True,0.5,0.4,0.6\n"
        "pope,baseline,4,f1,True,0.7,0.6,0.8\n"
    )
    CamRecord(
        "m", "p", ("a", " b"), (1, 2), (0,), (0, 1), np.ones((2, 4, 4), np.float32),
        np.zeros((16, 16, 3), np.uint8), "hook", 1, 0.1, 0, np.ones((4, 4)), (0, 0, 8, 8),
    ).save(folder / "cam.npz")  # fmt: skip


def only(name: str) -> Callable[[Path], None]:
    """A folder for `figures` with one kind of file, so that a trial draws one figure."""

    def make(folder: Path) -> None:
        figure_folder(folder)
        for path in folder.iterdir():
            if not path.name.startswith(name):
                path.unlink()

    return make


def pope_data(folder: Path) -> None:
    from tests.eval.demo_pope import write_pope

    write_pope(folder / "data" / "pope", 6)
    names = sorted(p.name for p in (folder / "data" / "pope").glob("*.webp"))[:2]
    files.json_lines(
        folder / "data" / "pope" / "questions.jsonl",
        [{"text": "What is this?", "image": name} for name in names],
    )


def begun(folder: Path) -> None:
    """Data, and a run that the same command begins again."""
    pope_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        no_engines(patch)
        from vllm_flow import cli

        assert cli.main(eval_argv(folder)) == 0


def eval_argv(folder: Path) -> list[str]:
    return [
        "eval", "--model", "demo-small", "--tasks", "pope", "--data", str(folder / "data"),
        "--policies", "baseline,cliff=2", "--out", str(folder / "run"),
    ]  # fmt: skip


def cliff_argv(folder: Path) -> list[str]:
    return [
        "cliff", "--model", "demo-small", "--unlabelled", "--kl-rule", "mean", "--limit", "2",
        "--out", str(folder / "cliff.json"),
        "--data", str(folder / "data" / "pope" / "questions.jsonl"),
    ]  # fmt: skip


def found(folder: Path) -> None:
    """Data, a profile and the answers of a search that the same command does again."""
    pope_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        no_engines(patch)
        from vllm_flow import cli

        assert cli.main(cliff_argv(folder)) == 0


_facts: dict[str, Any] = {}


def no_engines(patch: pytest.MonkeyPatch) -> None:
    """`eval` and `cliff` with a model that is known, and no engine or one that makes its answers up."""
    from tests.eval.fake_cliff import FakeEngine
    from vllm_flow.eval.cliff import figure, find
    from vllm_flow.eval.sweep import model_facts, run

    if not _facts:
        _facts["demo-small"] = model_facts.read_facts("demo-small")
    for module in (run, find):
        patch.setattr(module, "read_facts", lambda *_: _facts["demo-small"])
    no_cluster(patch)

    @contextlib.contextmanager
    def started(args: Any, facts: Any, work: Any) -> Iterator[Any]:
        policies = find.ladder_of(args, facts.num_layers).policies
        yield FakeEngine(work, policies, Path("/dev/null"), -1), None

    patch.setattr(find, "started", started)
    patch.setattr(find, "on_gpu", lambda: False)
    patch.setattr(figure, "draw", lambda *_: [])


def no_cluster(patch: pytest.MonkeyPatch) -> None:
    from vllm_flow.eval.sweep import connection, run

    @contextlib.contextmanager
    def connected(*_: Any) -> Iterator[connection.Pool]:
        yield connection.Pool(1, 0, 1)

    patch.setattr(connection, "connected", connected)
    patch.setattr(connection, "hardware", lambda pool: "none")
    patch.setattr(run, "stream", lambda *_: None)


def no_figures(patch: pytest.MonkeyPatch) -> None:
    from vllm_flow.eval.report import figures

    patch.setattr(figures, "draw_all", lambda *_: {})


def model_folder(folder: Path) -> None:
    from tests.engine import tiny_llava

    built = tiny_llava.build(tiny_llava.Shape(layers=2), folder.parent / "built")
    (folder / "model").mkdir()
    for path in Path(built).iterdir():
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    files.image_file(folder / "picture.png")


def model_and_data(folder: Path) -> None:
    model_folder(folder)
    pope_data(folder)


def no_profile(patch: pytest.MonkeyPatch) -> None:
    """Up to the engines."""
    from vllm_flow.exits import CommandError
    from vllm_flow.profile import engines

    def refuse(*_: Any, **__: Any) -> None:
        raise CommandError("no engine is started here")

    patch.setattr(engines, "open_engine", refuse)


CONFIGS = ("model/*.json",)
LABELS = ("data/pope/*.json*", "data/pope/*0*.webp")

SUBJECTS = (
    Subject("score pope", score_pope, lambda f: ["score", "pope", "--labels", str(f / "labels"), "--answers",
            str(f / "answers.jsonl"), "--json", str(f / "out.json")], weight=15),
    Subject("score scienceqa", score_scienceqa, lambda f: ["score", "scienceqa", "--problems",
            str(f / "problems.json"), "--splits", str(f / "pid_splits.json"), "--answers",
            str(f / "answers.jsonl")], spoilt=("*.json*",), weight=15),
    Subject("score chair", score_chair, lambda f: ["score", "chair", "--annotations", str(f / "coco"),
            "--captions", str(f / "captions.jsonl")], weight=10),
    Subject("report", run_folder, lambda f: ["report", str(f / "run"), "--resamples", "100"],
            no_figures, ("run/**/*",), 8),
    Subject("figures attention", only("attention"), lambda f: ["figures", str(f)], weight=1),
    Subject("figures cam", only("cam"), lambda f: ["figures", str(f)], weight=1),
    Subject("figures scores", only("scores"), lambda f: ["figures", str(f)], weight=2),
    Subject("eval data", pope_data, eval_argv, no_engines, LABELS, 8),
    Subject("eval run", begun, eval_argv, no_engines, ("run/**/*",), 8),
    Subject("cliff data", pope_data, cliff_argv, no_engines, LABELS, 6),
    Subject("cliff run", found, cliff_argv, no_engines, ("cliff.json", "cliff-*/**/*"), 8),
    Subject("eval model", model_and_data, lambda f: [*eval_argv(f), "--model",
            str(f / "model"), "--conversation", "llava-1.5"], no_cluster, CONFIGS, 4),
    Subject("cam", model_folder, lambda f: ["cam", "--model", str(f / "model"), "--image", str(f / "picture.png"),
            "--prompt", "<image> w1", "--answer", " w7", "--samples", "0", "--device", "cpu", "--out",
            str(f / "cam")], lambda patch: patch.setattr("vllm_flow.analysis.cam_command.write", lambda *_: []),
            (*CONFIGS, "picture.png"), 3),
    Subject("profile", model_folder, lambda f: ["profile", "--model", str(f / "model"), "--out", str(f / "profile")],
            no_profile, CONFIGS, 2),
    Subject("doctor", model_folder, lambda f: ["doctor", "--model", str(f / "model")],
            lambda patch: patch.setattr("vllm_flow.engine.diagnosis.check_torchvision", tuple), ("model/config.json",),
            1),
    Subject("models", model_folder, lambda f: ["models", str(f / "model"), "--picture", "64x48"],
            lambda patch: None, CONFIGS, 1),
)  # fmt: skip
