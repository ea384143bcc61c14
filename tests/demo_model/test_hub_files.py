"""The demo's questions as the hub's parquet: the same questions as in the official files, read by our own tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vllm_flow.demo_model.datasets import write_datasets
from vllm_flow.demo_model.datasets.__main__ import main
from vllm_flow.demo_model.datasets.hub import FORMS, write_hub
from vllm_flow.eval.tasks import get_task, load_image
from vllm_flow.eval.tasks.base import Item

PLACES = {
    "pope": ("pope", "POPE"),
    "scienceqa": ("scienceqa", "ScienceQA"),
    "scienceqa-full": ("scienceqa", "ScienceQA"),
    "textvqa": ("textvqa", "textvqa"),
}
"""Task -> folder of the official files, the hub's name."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert main(["--out", str(out), "--limit", "12", "--tasks", "pope", "scienceqa", "textvqa",
                 "--hub"]) == 0  # fmt: skip
    return out


def key_of(item: Item) -> tuple[str, ...]:
    return (item.text, *item.truth.get("answers", ()))


@pytest.mark.parametrize("task", PLACES)
def test_the_hubs_rows_are_the_official_questions(written: Path, task: str) -> None:
    folder, name = PLACES[task]
    official = get_task(task).read(written / folder)
    hub = get_task(task).read(written / "hub/lmms-lab-encoder" / name)
    assert len(official) == len(hub) > 10
    by_text = {key_of(item): item for item in hub}
    for number, item in enumerate(official):
        other = by_text[key_of(item)] if task == "textvqa" else hub[number]
        assert other.text == item.text and other.group == item.group
        same = {"answer", "label", "answers", "has_image"}
        assert {key: other.truth[key] for key in same & other.truth.keys()} == {
            key: item.truth[key] for key in same & item.truth.keys()
        }
        if item.image is not None:
            assert load_image(other.image).tobytes() == load_image(item.image).tobytes()


def test_metadata_say_what_a_column_is(written: Path) -> None:
    """The `datasets` package knows a picture by them, and a split by the card."""
    files = sorted((written / "hub").rglob("*.parquet"))
    assert len(files) == 4
    for path in files:
        schema = pq.read_schema(path)
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert list(features) == schema.names and features["image"] == {"_type": "Image"}
        base = next(folder for folder in path.parents if (folder / "README.md").exists())
        card = (base / "README.md").read_text()
        assert base.name in FORMS and f"path: {path.relative_to(base)}" in card


def test_what_has_no_form_on_the_hub_is_left_out(tmp_path: Path) -> None:
    write_datasets(tmp_path, 4, tasks=["chair", "textvqa"])
    assert write_hub(tmp_path, tmp_path / "hub") == {"lmms-lab-encoder/textvqa": 4}
