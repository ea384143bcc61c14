"""Left and right, which has no benchmark: one label file in POPE's format, as many yes as no.

Layout: `coco_pope_random.json` (JSON lines), `val2014/COCO_val2014_*.jpg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.datasets.common import shuffled, stream, write_json_lines, write_scene
from vllm_flow.demo_model.heldout import HeldoutScene


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write a question and its reverse about one pair of things of each scene; returns how many."""
    rng = stream(seed, "places")
    rows: list[dict[str, Any]] = []
    for scene in shuffled([scene for scene in scenes if scene.facts.beside()], rng):
        if items is not None and len(rows) >= items:
            break
        left, right = rng.choice(scene.facts.beside())
        for one, other, label in ((left, right, "yes"), (right, left, "no")):
            rows.append(
                {
                    "question_id": len(rows) + 1,
                    "image": write_scene(scene, out / "val2014"),
                    "text": questions.is_left(one, other),
                    "label": label,
                }
            )
    write_json_lines(rows, out / "coco_pope_random.json")
    return len(rows)
