"""What the demo model scores, and the card that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


from tests.demo_model.test_training import BUDGET  # noqa: E402
from vllm_flow.demo_model.datasets import TASKS, write_datasets  # noqa: E402
from vllm_flow.demo_model.training import (  # noqa: E402
    card,
    heldout_data,
    measure,
)
from vllm_flow.demo_model.training.files import Log  # noqa: E402
from vllm_flow.demo_model.training.sprites import Assets  # noqa: E402
from vllm_flow.eval.tasks import get_task  # noqa: E402


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
