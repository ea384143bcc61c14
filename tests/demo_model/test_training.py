"""The demo model's training: stopped and started again it makes the same weights; its table is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.demo_model.sprites import drawn_assets, drawn_palette  # noqa: E402
from vllm_flow.demo_model.assemble import WEIGHTS  # noqa: E402
from vllm_flow.demo_model.datasets import TASKS, write_datasets  # noqa: E402
from vllm_flow.demo_model.scenes import LABELS, Style, compose  # noqa: E402
from vllm_flow.demo_model.small import SMALL_CONFIG  # noqa: E402
from vllm_flow.demo_model.smollm2 import Decoder  # noqa: E402
from vllm_flow.demo_model.training import (  # noqa: E402
    batches,
    card,
    decoder_stage,
    export,
    heldout_data,
    measure,
    projector_stage,
    run,
    small_stage,
    vision_stage,
)
from vllm_flow.demo_model.training.budget import Budget, trapezoid  # noqa: E402
from vllm_flow.demo_model.training.files import Log, load, log_rows  # noqa: E402
from vllm_flow.demo_model.training.lora import new_llama  # noqa: E402
from vllm_flow.demo_model.training.sprites import Assets  # noqa: E402
from vllm_flow.demo_model.training.towers import new_tower  # noqa: E402
from vllm_flow.demo_model.vision import TOWER_CONFIG  # noqa: E402
from vllm_flow.eval.tasks import get_task  # noqa: E402

BUDGET = replace(
    Budget(),
    vision_steps=4, vision_batch=2, projector_steps=3, projector_batch=2, lora_steps=4, lora_batch=1,
    lora_rank=2, small_steps=3, small_batch=2, checkpoint_every=0.0,
)  # fmt: skip
MACHINE = batches.Machine()


class Stopped(Exception):
    """What a stop at the worst moment looks like: right after a state was written."""


@pytest.fixture(scope="module")
def assets() -> Assets:
    return drawn_assets()


@pytest.fixture()
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_stage, "CHECK_BATCHES", 1)
    monkeypatch.setattr(vision_stage, "CHECK_SIZE", 4)
    for stage in (projector_stage, decoder_stage, small_stage):
        monkeypatch.setattr(stage, "CHECK_SCENES", 2)


def stopped_after(states: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a stage until it has written so many states."""
    written = 0
    save = batches.Saver.save

    def counting(self: batches.Saver, *args: Any, **more: Any) -> None:
        nonlocal written
        save(self, *args, **more)
        written += 1
        if written == states:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(batches.Saver, "save", counting)
        run()


def small_words() -> Any:
    return tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json"))


def tiny_decoder() -> Decoder:
    """Two layers in SmolLM2's place, with the same weights in every call."""
    config = {**SMALL_CONFIG, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return Decoder(config, dict(new_llama(config).state_dict()))


def same(one: Path, other: Path) -> bool:
    left, right = load(one), load(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_the_vision_stage_goes_on_exactly_where_it_was_stopped(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch, quick_checks: None
) -> None:
    def run(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        log = Log(tmp_path / name / "log.jsonl")
        return vision_stage.train(tmp_path / name, assets, BUDGET, log, MACHINE)

    whole = run("whole")
    stopped_after(2, lambda: run("twice"), monkeypatch)
    assert not (tmp_path / "twice" / "vision.safetensors").exists()
    assert same(whole, run("twice"))
    assert not (tmp_path / "twice" / "vision_state.pt").exists()
    assert [row["step"] for row in log_rows(tmp_path / "twice") if row.get("resumed")] == [2]
    torch.manual_seed(BUDGET.seed)
    fresh = new_tower(TOWER_CONFIG).state_dict()
    assert all(not torch.equal(fresh[k], v) for k, v in load(whole).items() if v.ndim == 2)


def test_the_later_stages_go_on_exactly_where_they_were_stopped(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch, quick_checks: None
) -> None:
    tokenizer, decoder = small_words(), tiny_decoder()
    torch.manual_seed(0)
    tower = new_tower(TOWER_CONFIG).eval().requires_grad_(False)

    def run(name: str) -> Path:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        log = Log(work / "log.jsonl")
        table = decoder.weights["embed_tokens.weight"]
        fitted = work / "projector.safetensors"
        projector_stage.train(fitted, assets, tower, table, tokenizer, BUDGET, log, MACHINE)
        decoder_stage.train(work, assets, tower, decoder, tokenizer, BUDGET, log, MACHINE)
        return work

    whole = run("whole")
    stopped_after(2, lambda: run("twice"), monkeypatch)
    twice = run("twice")
    for name in ("projector", "lora", "projector_tuned"):
        assert same(whole / f"{name}.safetensors", twice / f"{name}.safetensors"), name
    assert not same(whole / "projector.safetensors", whole / "projector_tuned.safetensors")
    assert any(v.abs().max() > 0 for k, v in load(whole / "lora.safetensors").items() if "_b" in k)
    log = (whole / "log.jsonl").read_text()
    assert all(f'"{task}"' in log for task in ("presence", "choice", "word", "caption"))


def test_the_command_runs_every_stage_once_and_always_to_the_same_weights(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch, quick_checks: None
) -> None:
    tiny = make_dataclass(
        "Tiny",
        [(name, type(value), field(default=value)) for name, value in BUDGET.as_dict().items()],
        bases=(Budget,),
        frozen=True,
    )
    monkeypatch.setattr(run, "Budget", tiny)
    monkeypatch.setattr(run, "load_assets", lambda work: assets)
    monkeypatch.setattr(run, "read_decoder", tiny_decoder)
    monkeypatch.setattr(run, "read_tokenizer", small_words)
    monkeypatch.setattr(run, "small_tokenizer", small_words)

    def train(name: str) -> Path:
        work = tmp_path / name
        monkeypatch.setattr("sys.argv", ["run", "--work", str(work), "--lora-steps", "2"])
        run.main()
        return work

    work = train("one")
    made = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert set(made) >= {*export.COMMITTED.values(), "projector.safetensors"}
    assert not list(work.glob("*.pt")) and not list(work.glob("*.part"))
    rows = log_rows(work)
    assert [row["stage"] for row in rows if row["stage"] in ("start", "done")] == ["start", "done"]
    assert rows[0]["lora_steps"] == 2 and rows[0]["vision_steps"] == BUDGET.vision_steps
    checked = [row["stage"] for row in rows if any(name in row for name in export.CHECKS)]
    assert checked == ["vision", "projector", "lora", "small_projector", "small"]

    train("one")  # nothing is left to do
    assert {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")} == made
    other = train("other")
    assert all(same(work / name, other / name) for name in made)

    small = load(work / "small_decoder.safetensors")
    assert small["embed_tokens.weight"].shape == (992, 192)
    assert not any(name.startswith("layers.6") for name in small)
    fitted, tuned = work / "small_fitted.safetensors", work / "small_projector.safetensors"
    assert not same(fitted, tuned)


def test_batches_are_the_scenes_of_their_step(assets: Assets) -> None:
    steps = batches.SceneSteps(batches.training_palette(assets), 1000, 3, page_share=0.2)
    ahead = list(steps.steps(5, 7, MACHINE))
    assert len(ahead) == 2
    for number, batch in zip((5, 6), ahead, strict=True):
        assert torch.equal(batch["pixels"], steps[number]["pixels"])
        assert batch["facts"] == steps[number]["facts"]
        present = [{LABELS[i] for i in row.nonzero()[:, 0]} for row in batch["present"]]
        assert present == [{*f.objects, *(s.word for s in f.signs)} for f in batch["facts"]]


def test_a_patch_is_to_look_like_its_word() -> None:
    tokenizer = small_words()
    table = torch.randn(SMALL_CONFIG["vocab_size"], 64, generator=torch.Generator().manual_seed(0))
    goal = projector_stage.Goal(table, tokenizer)
    scenes = [compose(seed, drawn_palette(), Style()) for seed in range(4)]
    batch = batches.collate(scenes)
    target = goal.of(batch)
    nearest = goal.nearest(target).argmax(-1)
    # Words of one spelling in this small vocabulary may be cut alike; nearly all are their own.
    assert (nearest == batch["patches"]).float().mean() > 0.9
    left, right = target[:, 0], target[:, 11]
    assert not torch.allclose(left, right)


@given(st.integers(1, 10_000), st.integers(1, 100), st.floats(0.05, 0.9))
def test_the_rate_rises_stays_and_falls(steps: int, warmup: int, decay: float) -> None:
    factors = [
        trapezoid(step, steps, warmup, decay) for step in range(0, steps, max(1, steps // 50))
    ]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert (
        trapezoid(steps - 1, steps, 1, decay) <= max(0.02 + 1 / (steps * decay), 0.05) or steps < 30
    )
    for step in range(warmup, int(steps * (1 - decay))):
        assert trapezoid(step, steps, warmup, decay) == 1.0


class Knowing:
    """Answers at cliff 30 what is right, at cliff 0 always the same."""

    layers = 30

    def __init__(self, folder: Path) -> None:
        self.right: dict[str, dict[str, str]] = {}
        self.asked = 0
        for job in measure.JOBS.values():
            for item in get_task(job.task).read(folder / job.folder):
                truth = item.truth
                answer = (
                    truth["label"].capitalize() if "label" in truth
                    else truth["answer"] if "answer" in truth
                    else max(truth["answers"], key=truth["answers"].count) if "answers" in truth
                    else "The image shows " + ", ".join(f"a {o}" for o in truth["objects"]) + "."
                )  # fmt: skip
                picture = measure.pixels_of(item.image)
                self.right.setdefault(picture.numpy().tobytes(), {})[item.text] = answer

    def answers(
        self, pixels: torch.Tensor, texts: list[str], cliffs: list[int], tokens: int
    ) -> dict[int, list[str]]:
        self.asked += 1
        known = self.right[pixels.numpy().tobytes()]
        return {
            cliff: [known[text] if cliff == 30 else "Yes" for text in texts] for cliff in cliffs
        }


def test_the_table_reports_what_was_answered(tmp_path: Path, assets: Assets) -> None:
    heldout_data.write_scenes(assets, tmp_path / "pictures", {"seen": 12})
    data = tmp_path / "data"
    write_datasets(data / "seen", tasks=list(TASKS), pictures=tmp_path / "pictures")
    reader = Knowing(data / "seen")
    for name, job in measure.JOBS.items():
        answers = measure.Answers(tmp_path / "answers", "seen", name)
        measure.ask(reader, data / "seen" / job.folder, job, answers, [0, 30], 8)
    asked = reader.asked
    text = measure.table(tmp_path / "answers", data, 30)
    rows = {tuple(c.strip() for c in line.split("|")[1:4]): line for line in text.splitlines()[2:]}
    assert len(rows) == sum(len(job.metrics) for job in measure.JOBS.values())
    assert "| 100.0 (" in rows["seen", "pope", "f1"] and "reached" in rows["seen", "pope", "f1"]
    assert "| 66.7 (" in rows["seen", "pope", "f1"]  # always yes: precision 1/2, recall 1
    assert "| 0.0 (" in rows["seen", "scienceqa", "img_accuracy"]
    assert "at most 10: reached" in rows["seen", "captions", "chair_i"]
    for name, job in measure.JOBS.items():  # nothing is asked twice
        answers = measure.Answers(tmp_path / "answers", "seen", name)
        measure.ask(reader, data / "seen" / job.folder, job, answers, [0, 30], 8)
    assert reader.asked == asked
    assert measure.table(tmp_path / "answers", data, 30) == text
    curve = measure.curve(tmp_path / "answers", data, "seen", [0, 30], 30)
    assert "| 67 (" in curve and "| 100 (" in curve


def test_the_card_takes_its_figures_from_the_work_folder(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log("start", **BUDGET.as_dict())
    log("vision", step=2, thing_accuracy=0.5)
    log("vision", step=4, thing_accuracy=0.75)
    text = card.card(tmp_path, tmp_path / "answers", tmp_path / "data")
    assert "{" not in text
    assert "thing_accuracy 0.75" in text and "thing_accuracy 0.5," not in text
    assert f"{BUDGET.vision_steps * BUDGET.vision_batch} scenes" in text
    assert "piece of furniture: chair, couch, bed and toilet" in text


@pytest.mark.parametrize(
    ("split", "metric", "target", "value", "seen", "said"),
    [
        ("seen", "f1", 0.95, 0.95, None, "at least 95: reached"),
        ("seen", "f1", 0.95, 0.94, None, "at least 95: missed"),
        ("seen", "chair_i", 0.1, 0.08, None, "at most 10: reached"),
        ("seen", "chair_i", 0.1, 0.12, None, "at most 10: missed"),
        ("unseen_photos", "f1", 0.95, 0.88, 0.97, "within 10 points of seen: reached"),
        ("unseen_photos", "f1", 0.95, 0.86, 0.97, "within 10 points of seen: missed"),
        ("unseen_photos", "chair_i", 0.1, 0.17, 0.08, "within 10 points of seen: reached"),
        ("unseen_photos", "chair_i", 0.1, 0.19, 0.08, "within 10 points of seen: missed"),
        ("unseen_photos", "f1", 0.95, 0.86, None, ""),
        ("unseen_style", "f1", 0.95, 0.86, 0.97, ""),
        ("seen", "accuracy", None, 0.5, None, ""),
    ],
)
def test_targets_are_judged_in_the_metrics_direction(
    split: str, metric: str, target: float | None, value: float, seen: float | None, said: str
) -> None:
    assert measure.goal_text(split, metric, target, value, seen) == said
