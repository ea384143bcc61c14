"""Counting, which has no benchmark: in TextVQA's format, ten annotators who agree, and no OCR tokens.

Layout: `TextVQA_0.5.1_val.json`, `train_images/{image_id}.jpg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo import questions
from vllm_flow.demo.datasets.common import shuffled, stream, write_json
from vllm_flow.demo.datasets.textvqa import FILE, write_picture
from vllm_flow.demo.heldout import HeldoutScene


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write at most one question per scene; returns how many."""
    rng = stream(seed, "counting")
    rows: list[dict[str, Any]] = []
    for scene in shuffled(scenes, rng):
        if items is not None and len(rows) >= items:
            break
        name = questions.worth_counting(scene.facts, rng) if scene.objects else None
        if name is None:
            continue
        rows.append(
            {
                "question": questions.how_many(name),
                "image_id": write_picture(scene, out),
                "answers": [str(scene.facts.counts[name])] * 10,
                "question_id": len(rows) + 1,
            }
        )
    write_json({"dataset_version": "0.5.1", "data": rows}, out / FILE)
    return len(rows)
