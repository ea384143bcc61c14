"""TextVQA-style: words on the scenes' signs, ten answers each, and OCR tokens.

Fields are those of TextVQA 0.5.1 (Singh et al., "Towards VQA Models That Can Read", CVPR 2019) and
of its Rosetta OCR file. As with human annotators, some of the ten answers depart from the word, and
as with a real reader some OCR tokens are wrong or missing; both are drawn.

Layout: `TextVQA_0.5.1_val.json`, `TextVQA_Rosetta_OCR_v0.2_val.json`, `train_images/{image_id}.jpg`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.datasets.common import image_id, shuffled, stream, write_jpeg, write_json
from vllm_flow.demo_model.facts import Sign
from vllm_flow.demo_model.heldout import HeldoutScene
from vllm_flow.demo_model.scenes import SIZE

FILE = "TextVQA_0.5.1_val.json"
PER_SIGN = 2


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write two questions about every sign, in so many scenes that there are `items`; returns how many."""
    rng = stream(seed, "textvqa")
    rows: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    for scene in shuffled([scene for scene in scenes if len(scene.facts.signs) == 1], rng):
        if items is not None and len(rows) >= items:
            break
        name = write_picture(scene, out)
        sign = scene.facts.signs[0]
        tokens.append(ocr(name, sign, rng))
        for text in rng.sample(questions.SIGN_QUESTIONS, PER_SIGN):
            if items is None or len(rows) < items:
                rows.append(question(len(rows) + 1, text, name, sign, scene, rng))
    header = {"dataset_type": "val", "dataset_name": "textvqa-style"}
    write_json({**header, "dataset_version": "0.5.1", "data": rows}, out / FILE)
    write_json(
        {**header, "dataset_version": "0.2", "data": tokens},
        out / "TextVQA_Rosetta_OCR_v0.2_val.json",
    )
    return len(rows)


def write_picture(scene: HeldoutScene, out: Path) -> str:
    """Save a scene's picture; returns its id, 16 hexadecimal digits as in OpenImages."""
    name = f"{image_id(scene):016x}"
    with Image.open(scene.image_path) as image:
        write_jpeg(image, out / "train_images" / f"{name}.jpg")
    return name


def question(
    number: int, text: str, name: str, sign: Sign, scene: HeldoutScene, rng: random.Random
) -> dict[str, Any]:
    """One record of the question file."""
    return {
        "question": text,
        "image_id": name,
        "image_classes": [object_.capitalize() for object_ in scene.objects],
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": SIZE,
        "image_height": SIZE,
        "answers": answers(sign.word, rng),
        "question_tokens": text.rstrip("?").split(),
        "question_id": number,
        "set_name": "val",
    }


def answers(word: str, rng: random.Random) -> list[str]:
    """Ten answers: at least six are the word, as written or with capitals or an article."""
    others = [f"the {word}", word.upper(), f"a {word}", "unanswerable", word[:-1], "sign"]
    given = [word] * rng.randint(6, 10)
    given += rng.choices(others, k=10 - len(given))
    rng.shuffle(given)
    return given


def ocr(name: str, sign: Sign, rng: random.Random) -> dict[str, Any]:
    """One record of the OCR file: a reader that often adds words and sometimes misses the right one."""
    left, top, right, bottom = (edge / SIZE for edge in sign.box)
    box = {"x": left, "y": top, "w": right - left, "h": bottom - top}
    return ocr_record(name, [(word, box) for word in questions.ocr_tokens(sign.word, rng)])


def ocr_record(name: str, found: Sequence[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    """The OCR file's record of a picture: words, and where they were found (shares of its sides)."""
    return {
        "image_id": name,
        "ocr_tokens": [word for word, _ in found],
        "ocr_info": [
            {
                "word": word,
                "bounding_box": {
                    "width": box["w"],
                    "height": box["h"],
                    "rotation": 0,
                    "roll": 0,
                    "pitch": 0,
                    "yaw": 0,
                    "top_left_x": box["x"],
                    "top_left_y": box["y"],
                },
            }
            for word, box in found
        ],
    }
