"""`vllm-flow cliff` from the command line to the file a server reads, with the small demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.fixtures import prepare_process

prepare_process()

from tests.eval.demo_pope import LAYERS, write_pope  # noqa: E402
from vllm_flow import cli  # noqa: E402
from vllm_flow.cliff_file import FORMAT, read_profile, write_profile  # noqa: E402
from vllm_flow.eval.cliff import find  # noqa: E402
from vllm_flow.eval.cliff.engine import CliffEngine  # noqa: E402
from vllm_flow.eval.cliff.find import started  # noqa: E402
from vllm_flow.eval.cliff.questions import make_plan, read_questions  # noqa: E402
from vllm_flow.eval.sweep.engine_actor import EngineActor  # noqa: E402
from vllm_flow.eval.sweep.model_facts import read_facts  # noqa: E402
from vllm_flow.policy_keys import parse_policy  # noqa: E402

pytestmark = pytest.mark.slow

QUESTIONS = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cliff")
    write_pope(folder / "pope", QUESTIONS)
    return folder


def arguments(data: Path, *more: str) -> list[str]:
    return [
        "cliff", "--model", "demo-small", "--data", str(data), "--kv-cache-gib", "0.0625",
        "--max-model-len", "256", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def engine(data: Path) -> Iterator[tuple[CliffEngine, Path]]:
    """The engine as the command starts it without labels, shared by the tests."""
    args = cli.build_parser(["cliff"]).parse_args(arguments(data, "--unlabelled"))
    work, _ = read_questions(args, "chat-template")
    with started(args, read_facts("demo-small"), work) as (engine, folder):
        assert folder is not None
        yield engine, folder


@pytest.fixture
def command(engine: tuple[CliffEngine, Path], data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command on the shared engine."""

    @contextmanager
    def shared(args: Any, facts: Any, work: Any) -> Iterator[Any]:
        yield CliffEngine(engine[0].actor, work, engine[0].policies), engine[1]

    monkeypatch.setattr(find, "started", shared)

    def run(*more: str, data: Path = data) -> int:
        return cli.main(arguments(data, *more))

    return run


def test_labelled_it_agrees_with_the_sweep_and_a_server_reads_it(
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "cliff.json"
    again = ("--tolerance", "9%", "--out", str(out), "--exhaustive")
    assert command(*again) == 0
    content = json.loads(out.read_text())
    entry = content["tasks"]["pope"]
    evidence = entry["evidence"]
    assert content["num_layers"] == LAYERS and evidence["items"] == QUESTIONS
    assert entry["flow_cliff"] == evidence["sweep"]["flow_cliff"]
    assert 0 < entry["flow_cliff"] < LAYERS, "this model needs its image, but not in every layer"
    assert evidence["interval"][1] <= 0.09
    assert evidence["requests"] < evidence["requests_of_a_sweep"]
    # What the search saw at a layer with all questions is what the sweep saw.
    swept = {row["layer"]: row for row in evidence["sweep"]["curve"]}
    full = [row for row in evidence["curve"] if row["items"] == QUESTIONS]
    assert full and all(row == swept[row["layer"]] for row in full)
    assert {entry["flow_cliff"], entry["flow_cliff"] - 1} <= {row["layer"] for row in full}
    assert len(evidence["attention"]["image_mass"]) == LAYERS
    expected = parse_policy({"flow_cliff": entry["flow_cliff"]}, LAYERS)
    assert read_profile(str(out), LAYERS).of_task("pope") == expected
    said = capsys.readouterr().out
    assert f"flow_cliff {entry['flow_cliff']} of {LAYERS}" in said
    assert "smallest tolerance that can be shown" in said and "Not causal" in said
    for ending in (".png", ".svg"):
        assert out.with_name(f"cliff-pope{ending}").stat().st_size > 10_000
    # Every answer and measurement was kept: the same command has nothing left to ask.
    monkeypatch.setattr(EngineActor, "enqueue", None)
    assert command(*again) == 0
    assert json.loads(out.read_text())["tasks"]["pope"] == entry


def test_unlabelled_joins_the_file_under_its_own_tag(
    command: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cliff.json"
    before = {"format": FORMAT, "model": "demo-small", "num_layers": LAYERS}
    write_profile(out, {**before, "tasks": {"pope": {"flow_cliff": 2}}})
    rows = [json.loads(line) for line in (data / "pope/coco_pope_random.json").open()][::20]
    file = data / "pope" / "questions.jsonl"
    file.write_text(
        "".join(json.dumps({"text": r["text"], "image": r["image"]}) + "\n" for r in rows)
    )
    assert command("--unlabelled", "--task", "mine", "--out", str(out), data=file) == 0
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks.keys() == {"pope", "mine"} and tasks["pope"]["flow_cliff"] == 2
    curve = tasks["mine"]["evidence"]["curve"]
    kl = [row["kl"]["value"] for row in curve]
    assert len(kl) == LAYERS and tasks["mine"]["evidence"]["items"] == 10
    assert kl[0] > 10 * kl[-1] >= 0, "what the last layer adds is little beside the whole image"
    cliff = tasks["mine"]["flow_cliff"]
    assert all(row["kl"]["high"] <= 0.003 for row in curve[cliff:])
    assert "KL over the whole vocabulary" in capsys.readouterr().out


def test_distributions_are_whole_and_those_of_the_answers(engine: tuple[CliffEngine, Path]) -> None:
    cliffs, _ = engine
    table = cliffs.distributions(0)
    assert table.shape[0] == LAYERS + 1
    seen = table > -np.inf
    # Every token of the vocabulary, once.
    assert seen.sum(axis=1).min() == table.shape[1]
    np.testing.assert_allclose(np.exp(table).sum(axis=1), 1, atol=1e-4)
    tokenizer = cliffs.actor.llm.get_tokenizer()
    wanted = [(0, range(LAYERS + 1))]
    for _, layer, text, error in cliffs.answers(wanted):
        assert error is None
        first = tokenizer.decode([int(table[layer].argmax())]).strip()
        assert text is not None and text.startswith(first)


def test_attention_on_the_image_is_a_share(engine: tuple[CliffEngine, Path]) -> None:
    cliffs, folder = engine
    masses = cliffs.image_masses([0, 1, 2], folder)
    assert masses.shape == (3, LAYERS)
    assert (masses > 0).all() and (masses < 1).all()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tolerance", "0.5%"), "the smallest tolerance that can be shown is"),
        (("--task", "pop"), "pop"),
        (("--data", "nowhere"), "nowhere"),
        (("--default", "gqa"), "--default 'gqa': the profile will have no such task"),
    ],
)
def test_what_cannot_begin_is_refused_before_an_engine_starts(
    data: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(find, "started", None)
    assert cli.main(arguments(data, "--out", str(tmp_path / "c.json"), *more)) == 2
    assert says in capsys.readouterr().err


def test_the_number_of_questions_that_it_names_is_enough(data: Path) -> None:
    parser = cli.build_parser(["cliff"])
    args = parser.parse_args(arguments(data, "--tolerance", "9%"))
    work, _ = read_questions(args, "chat-template")
    assert make_plan(args, work.items, LAYERS).tolerance == pytest.approx(0.09)


def test_a_file_of_another_model_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before an engine starts, and without a word of answers that nobody has asked for yet."""
    monkeypatch.setattr(find, "started", None)
    out = tmp_path / "cliff.json"
    (tmp_path / "cliff-pope-unlabelled-run").mkdir()
    (tmp_path / "cliff-pope-unlabelled-run" / "run.json").write_text("{}")
    profile = {"format": FORMAT, "model": "demo-small", "num_layers": LAYERS, "tasks": {}}
    for there, says in (
        ({**profile, "model": "other"}, "another model: model is 'other'"),
        ({**profile, "num_layers": 32}, "another model: num_layers is 32"),
        ({**profile, "tasks": ["pope"]}, '"tasks" must be an object'),
        ({}, "no profile"),
    ):
        out.write_text(json.dumps(there))
        argv = arguments(data, "--unlabelled", "--limit", "2", "--out", str(out))
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert says in said and "goes on" not in said
        assert json.loads(out.read_text()) == there


def test_a_file_that_is_not_there_is_no_task_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tmp_path / "questions.jsonl", "--unlabelled", "--task", "mine")
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert "questions.jsonl: there is no such file or folder" in said and "no task" not in said


def test_an_interval_of_few_pictures_decides_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resampling one picture varies nothing: an interval of no width would have passed any threshold."""
    monkeypatch.setattr(find, "started", None)
    row = json.loads((data / "pope/coco_pope_random.json").open().readline())
    file = data / "pope" / "one_picture.jsonl"
    lines = [{"text": f"{row['text']} {n}", "image": row["image"]} for n in range(9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = arguments(file, "--unlabelled", "--task", "mine", "--out", str(tmp_path / "c.json"))
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert "are about 1 picture," in said and "at least 5" in said and "--kl-rule mean" in said


@pytest.mark.parametrize("option", ["--confidence=100%", "--confidence=40%", "--confidence=x"])
def test_a_confidence_gets_examples_of_its_own(
    data: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments(data, option))
    told = capsys.readouterr().err
    assert "is no confidence between 50% and 100%" in told and "write 95% or 0.95" in told
    assert "0.5%" not in told.rpartition("--confidence")[2]


@pytest.mark.parametrize(
    "option",
    [
        "--tolerance=0",
        "--tolerance=0.01",
        "--tolerance=x",
        "--confidence=40%",
        "--kl-threshold=0",
        "--kl-rule=x",
    ],
)
def test_bad_options_are_refused(data: Path, option: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments(data, option))
