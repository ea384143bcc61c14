"""Makes the committed held-out material: ``python -m vllm_flow.demo.training.heldout_data --work DIR``.

Scenes come from ``HELDOUT_SEEDS``, which training never draws from; drawings only (no GPL stamps)
on procedural backgrounds. Photographs are cropped from samples of scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_flow.demo.classes import CLASSES, caption_of, presence_question
from vllm_flow.demo.heldout import DATA
from vllm_flow.demo.scenes import HELDOUT_SEEDS, compose
from vllm_flow.demo.training import assets

SEEN_SCENES, UNSEEN_SCENES = 120, 40
PHOTO_SIDE = 224

PHOTOS: dict[str, tuple[str, str, tuple[int, int, int], str, str]] = {
    "chelsea": ("skimage", "data/chelsea.png", (75, 0, 300), "cat", "dog rabbit"),
    "coffee": ("skimage", "data/coffee.png", (120, 0, 400), "cup", "flower fish"),
    "rocket": ("skimage", "data/rocket.jpg", (180, 0, 427), "rocket", "airplane boat"),
    "camera": ("skimage", "data/camera.png", (0, 0, 512), "camera", "dog guitar"),
    "astronaut": ("skimage", "data/astronaut.png", (0, 0, 512), "rocket", "cat bus"),
    "flower": ("sklearn", "datasets/images/flower.jpg", (106, 0, 427), "flower", "butterfly apple"),
    "china": ("sklearn", "datasets/images/china.jpg", (106, 0, 427), "tree", "car banana"),
}
"""Name -> package, path, square crop (left, top, side), what is to be seen, two things that are not."""


def _questions(
    image: str, split: str, present: list[str], absent: list[str], rows: list[dict[str, Any]]
) -> None:
    for label, names in (("yes", present), ("no", absent)):
        for name in names:
            rows.append(
                {
                    "question_id": len(rows) + 1,
                    "image": image,
                    "text": presence_question(name),
                    "label": label,
                    "split": split,
                }
            )


def _absent(present: list[str], count: int, uses: dict[str, int], rng: random.Random) -> list[str]:
    """Absent classes, those first that have been asked with "no" least against their "yes"."""
    candidates = [name for name in CLASSES if name not in present]
    rng.shuffle(candidates)
    chosen = sorted(candidates, key=lambda name: uses[name], reverse=True)[:count]
    for name in chosen:
        uses[name] -= 1
    return chosen


def main() -> None:
    """Write pictures, ``questions.jsonl``, ``scenes.jsonl`` and ``boxes.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    assets.fetch(work)
    questions: list[dict[str, Any]] = []
    scenes: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    parts = (
        ("seen", SEEN_SCENES, assets.drawings(work, assets.SEEN_SETS)),
        ("unseen_style", UNSEEN_SCENES, assets.drawings(work, [assets.UNSEEN_SET])),
    )
    seeds = iter(HELDOUT_SEEDS)
    rng = random.Random(HELDOUT_SEEDS.start)
    for split, count, sprites in parts:
        (DATA / split).mkdir(parents=True, exist_ok=True)
        uses = dict.fromkeys(CLASSES, 0)
        for number in range(count):
            scene = compose(next(seeds), sprites, gentle=True)
            image = f"{split}/{number:03d}.png"
            scene.image.save(DATA / image, optimize=True)
            objects = list(scene.objects)
            scenes.append(
                {"image": image, "objects": objects, "caption": caption_of(objects).capitalize(),
                 "split": split}
            )  # fmt: skip
            boxes.append({"image": image, "boxes": scene.boxes})
            present = rng.sample(objects, min(2, len(objects)))
            for name in present:
                uses[name] += 1
            _questions(image, split, present, _absent(objects, len(present), uses, rng), questions)
    (DATA / "photo").mkdir(exist_ok=True)
    for name, (package, path, (left, top, side), present_name, absent) in PHOTOS.items():
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is needed"
        photo = Image.open(Path(spec.origin).parent / path).convert("RGB")
        side = min(side, photo.width - left, photo.height - top)
        crop = photo.crop((left, top, left + side, top + side))
        image = f"photo/{name}.jpg"
        crop.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS).save(
            DATA / image, quality=90
        )
        _questions(image, "photo", [present_name], absent.split()[:1], questions)
    for name, rows in (
        ("questions.jsonl", questions),
        ("scenes.jsonl", scenes),
        ("boxes.jsonl", boxes),
    ):
        (DATA / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(len(questions), "questions,", len(scenes), "scenes")


if __name__ == "__main__":
    main()
