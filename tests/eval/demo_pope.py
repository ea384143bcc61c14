"""A tiny data set in POPE's format from the demo's held-out pictures, and the small model's engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_flow.demo_model.heldout import load_questions
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.policies import parse_policies

LAYERS = 6
GRID = 8


def write_pope(folder: Path, count: int) -> dict[str, str]:
    """`count` questions on held-out pictures in `folder`; the label of each question id."""
    folder.mkdir(parents=True)
    labels = {}
    with (folder / "coco_pope_random.json").open("w") as file:
        for question in load_questions("seen")[:count]:
            name = question.image_path.name
            shutil.copy(question.image_path, folder / name)
            row = {
                "question_id": question.question_id,
                "image": name,
                "text": question.text,
                "label": question.label,
            }
            labels[str(question.question_id)] = question.label
            file.write(json.dumps(row) + "\n")
    return labels


def small_options(policies: str, **more: Any) -> EngineOptions:
    """The small model as the driver would start it, with a small pool."""
    settings: dict[str, Any] = dict(
        model="demo-small",
        dtype="float32",
        group_layers=2,
        block_size=32,
        conversation="chat-template",
        policies=parse_policies(policies, LAYERS),
        full_grid=GRID,
        max_model_len=256,
        kv_cache_bytes=64 << 20,
    )
    return EngineOptions(**settings | more)
