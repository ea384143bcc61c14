"""Counting, which has no benchmark: in TextVQA's format, ten annotators who agree, and no OCR tokens.

Layout: `TextVQA_0.5.1_val.json`, `train_images/{image_id}.jpg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.datasets.common import shuffled, stream, write_json
from vllm_flow.demo_model.datasets.textvqa import FILE, write_picture
from vllm_flow.demo_model.heldout import HeldoutScene

TRIES = 3
"""Draws of a thing to count per scene; one or two different ones come of them, or none."""


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write questions about the things of each scene that are worth counting; returns how many.

    "1" is never the answer of more than half of them.
    """
    rng = stream(seed, "counting")
    rows: list[dict[str, Any]] = []
    ones = 0
    for scene in shuffled([scene for scene in scenes if scene.objects], rng):
        drawn = [questions.worth_counting(scene.facts, rng) for _ in range(TRIES)]
        for name in dict.fromkeys(name for name in drawn if name is not None):
            if items is not None and len(rows) >= items:
                break
            single = scene.facts.counts[name] == 1
            if single and ones >= len(rows) - ones:
                continue
            ones += single
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
