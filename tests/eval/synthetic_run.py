"""A run directory with made-up answers of known quality, on the demo's data. No model is asked."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo_model.coco_ids import category
from vllm_flow.demo_model.datasets import write_datasets
from vllm_flow.demo_model.datasets.readme import COCO
from vllm_flow.demo_model.questions import listing
from vllm_flow.eval.sweep.budgets import image_rows
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item

LAYERS = 30
IMAGE_TOKENS = 144
BLOCK = 32
LIMIT = 8
"""Tokens of an answer at most: a caption of many things is cut off."""
ACCURACY = {0: 0.5, 4: 0.55, 6: 0.8, 8: 0.9, 10: 0.94, 12: 0.95}
"""Chance of a right answer from a cliff on; 0.95 from 12 on."""
POLICIES = "baseline,cliff=0:30:2,downsample=6:24:6"


def chance(kind: str, cliff: int | None, share: float = 1.0) -> float:
    """Chance of a right answer under a policy; of stages, by the share of image tokens in a layer."""
    if kind == "stages":
        return 0.5 + 0.45 * share**0.5
    if kind == "downsample":
        return 0.6 + 0.3 * (cliff or 0) / LAYERS
    return ACCURACY[max(c for c in ACCURACY if c <= (LAYERS if cliff is None else cliff))]


def answer(task: str, item: Item, right: bool, rng: random.Random) -> Any:
    """A right or a wrong answer."""
    if task == "pope":
        return "Yes" if (item.truth["label"] == "yes") == right else "No"
    if task.startswith("scienceqa"):
        # Two letters are choices of every problem.
        wrong = "B" if item.truth["answer"] == "A" else "A"
        return item.truth["answer"] if right else wrong
    if task.startswith("textvqa"):
        return max(item.truth["answers"], key=item.truth["answers"].count) if right else "a sign"
    shown = [name for name in COCO if category(name) in item.truth["objects"]]
    extra = [] if right else rng.sample([n for n in COCO if n not in shown], rng.randint(1, 2))
    return listing(shown + extra)


def row(task: str, item: Item, policy: Any, rng: random.Random, luck: float) -> dict[str, Any]:
    """An answer with the counts a real run would record."""
    text = 20 + len(item.text) // 5
    image = IMAGE_TOKENS if item.image else 0
    flow = policy.flow()
    if policy.kind == "downsample":
        image = (policy.grid(12, LAYERS) or 0) ** 2 if item.image else 0
        saved = (IMAGE_TOKENS - image) * LAYERS
    elif flow is not None:
        saved = image * LAYERS - image_rows(flow, LAYERS, image)
    else:
        saved = image * (LAYERS - (LAYERS if policy.cliff is None else policy.cliff))
    share = 1 - saved / (IMAGE_TOKENS * LAYERS)
    full, kept = -(-(text + IMAGE_TOKENS) // BLOCK), -(-text // BLOCK)
    seen = LAYERS if policy.cliff is None else policy.cliff
    blocks = full * seen // 2 + kept * (LAYERS - seen) // 2
    said = answer(task, item, luck < chance(policy.kind, policy.cliff, share), rng)
    tokens = 1 + len(said.split())
    return {
        "task": task,
        "item_id": item.id,
        "policy": policy.name,
        "answer": said,
        "error": None,
        "finish_reason": "stop" if tokens < LIMIT else "length",
        "prompt_tokens": text + image,
        "image_tokens": image,
        "output_tokens": min(tokens, LIMIT),
        "kv_blocks": blocks,
        "kv_blocks_baseline": full * LAYERS // 2,
        "kv_bytes_saved": (full * LAYERS // 2 - blocks) * 2 * BLOCK * 3 * 64 * 4,
        "prefill_rows_saved": saved,
        "seconds": rng.uniform(0.9, 1.1) * (0.2 + 0.01 * seen),
        "engine": "synthetic",
    }


def make_run(
    folder: Path,
    tasks: Sequence[str] = ("pope", "scienceqa", "textvqa", "chair"),
    policies: str = POLICIES,
    items: int | None = 60,
    *,
    failures: float = 0.0,
    unfinished: float = 0.0,
    meta: Mapping[str, Any] | None = None,
) -> Run:
    """Write data and a run below `folder`; shares of failed and of not yet asked requests."""
    data = folder / "data"
    write_datasets(data, items, tasks=sorted({task.split("-")[0] for task in tasks}))
    parsed = parse_policies(policies, LAYERS, 12)
    run = Run.create(
        folder / "run",
        {
            "command": "vllm-flow eval --tasks " + ",".join(tasks),
            "model": "synthetic",
            "num_layers": LAYERS,
            "group_layers": 2,
            "block_size": BLOCK,
            "dtype": "float32",
            "data": str(data),
            "seed": 0,
            "engines": 1,
            "tasks": list(tasks),
            "policies": [policy.as_json() for policy in parsed],
            "versions": {"vllm_flow": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0+cpu"},
            "hardware": "no machine: made-up answers",
            **(meta or {}),
        },
    )
    rng = random.Random(0)
    for task in tasks:
        found = get_task(task).read(data / task.split("-")[0])
        run.write_items(task, found)
        rows = []
        for item in found:
            # One stroke of luck per item: answers of neighbouring policies go together.
            ease = rng.random()
            for policy in parsed:
                luck = ease if rng.random() < 0.9 else rng.random()
                one = row(task, item, policy, rng, luck)
                if rng.random() < unfinished:
                    continue
                if rng.random() < failures:
                    one |= {"answer": None, "error": "EngineDeadError: the engine stopped"}
                rows.append(one)
        run.append(rows)
    return run
