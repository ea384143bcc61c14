"""A made-up run of the demo with a known curve, for tests of what shows results."""

from __future__ import annotations

import random
from pathlib import Path

from vllm_flow.plan import TokenLayout, predict_blocks, storage_groups
from vllm_flow.policy import FlowPolicy
from vllm_flow.showcase.records import (
    Answer,
    Caption,
    Engine,
    Question,
    Results,
    Scene,
    ideal_speedup,
    summarise,
)
from vllm_flow.spans import ImageSpans

ENGINE = Engine(
    model="synthetic",
    dtype="float32",
    num_layers=30,
    group_starts=storage_groups(30, 2),
    block_size=32,
    vllm="0",
    torch="0",
    device="none",
)
CHANCE = {"seen": 0.97, "unseen_style": 0.75, "photo": 0.9}


def picture(path: Path, seed: int) -> Path:
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    image = Image.new("RGB", (112, 112), tuple(rng.randrange(150, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, size = rng.randrange(70), rng.randrange(70), rng.randrange(15, 40)
        colour = tuple(rng.randrange(256) for _ in range(3))
        draw.ellipse((x, y, x + size, y + size), fill=colour)
    image.save(path)
    return path


def synthetic_results(
    directory: Path, per_split: int = 40, cliffs: tuple[int, ...] = (*range(0, 30, 2), 30)
) -> Results:
    """Accuracy rises from guessing at cliff 2 to its plateau at cliff 12; blocks as predicted."""
    rng = random.Random(1)
    questions = [
        Question(
            question_id=f"{split}-{number}",
            image_path=picture(directory / f"{split}-{number // 2}.png", number // 2),
            text=f"Is there a {rng.choice(['dog', 'bicycle', 'sunflower'])} in the picture?",
            label=rng.choice(["yes", "no"]),
            split=split,
        )
        for split in CHANCE
        for number in range(per_split)
    ]
    answers = []
    for question in questions:
        luck = rng.random()
        other = {"yes": "no", "no": "yes"}[question.label]
        prompt = 64 + rng.randrange(28, 36)
        spans = ImageSpans.from_ranges([(20, 84)])
        for cliff in cliffs:
            share = min(max((cliff - 2) / 10, 0), 1)
            right = luck < 0.5 + share * (CHANCE[question.split] - 0.5)
            layout = TokenLayout.of(FlowPolicy(cliff), spans) if cliff < 30 else None
            answers.append(
                Answer(
                    question_id=question.question_id,
                    cliff=cliff,
                    said=(question.label if right else other).capitalize(),
                    right=right,
                    prompt_tokens=prompt,
                    image_tokens=64,
                    computed_tokens=prompt + 1,
                    blocks=predict_blocks(
                        prompt + 1, layout, ENGINE.group_starts, ENGINE.block_size
                    ),
                )
            )
    speedups = {
        cliff: [
            1 + (ideal_speedup(30, cliff, answers) - 1) * rng.uniform(0.8, 0.95) for _ in range(5)
        ]
        for cliff in cliffs
    }
    captions = [
        synthetic_caption(Scene(q.image_path, ("dog", "car"), "seen"), cliff)
        for q in questions[:8]
        for cliff in (0, 10, 30)
    ]
    return summarise(ENGINE, questions, answers, speedups, captions)


def synthetic_caption(scene: Scene, cliff: int) -> Caption:
    """Nothing but an invented bus without the image; one object at 10; both at the baseline."""
    if cliff == 0:
        return Caption(scene, cliff, "A bus.", ("bus",), ("bus",), ("dog", "car"))
    if cliff < 30:
        return Caption(scene, cliff, "A dog and a bus.", ("dog", "bus"), ("bus",), ("car",))
    return Caption(scene, cliff, "A dog and a car.", ("dog", "car"), (), ())
