"""TextVQA-style: words on signs that are drawn onto scenes, ten answers each, and OCR tokens.

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

from PIL import Image, ImageDraw, ImageFont

from vllm_flow.demo.classes import with_article
from vllm_flow.demo.datasets.common import image_id, shuffled, stream, write_jpeg, write_json
from vllm_flow.demo.heldout import HeldoutScene

SIDE = 336
"""Pixels: scenes are enlarged threefold, so that the letters are legible."""

WORDS = (
    "bakery", "bank", "bridge", "cinema", "closed", "coffee", "danger", "east", "enter", "exit",
    "garage", "garden", "harbor", "hotel", "library", "market", "museum", "north", "office", "open",
    "orange", "park", "police", "radio", "school", "silver", "south", "station", "stop", "sugar",
    "taxi", "theater", "ticket", "tunnel", "video", "west", "winter", "12", "25", "47", "60", "99",
)  # fmt: skip

COLOURS = {
    "red": (190, 25, 30),
    "blue": (15, 80, 180),
    "green": (0, 110, 60),
    "black": (15, 15, 15),
}
"""Signs: white letters on one of these."""


def write(scenes: Sequence[HeldoutScene], out: Path, items: int | None, seed: int) -> int:
    """Write questions, OCR tokens and pictures; returns the number of questions.

    Every other picture has two signs and two questions. By default each scene is used once.
    """
    rng = stream(seed, "textvqa")
    questions: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    order = shuffled(scenes, rng)
    used = 0
    while used < len(order) if items is None else len(questions) < items:
        scene = order[used % len(order)]
        # 16 hexadecimal digits as in OpenImages; a scene that is used again gets another id.
        name = f"{(used // len(order) + 1) << 32 | image_id(scene):016x}"
        picture, signs = with_signs(scene, 1 + used % 2, rng)
        write_jpeg(picture, out / "train_images" / f"{name}.jpg")
        tokens.append(ocr(name, signs, rng))
        for sign in signs:
            if items is None or len(questions) < items:
                number = len(questions) + 1
                questions.append(question(number, name, sign, len(signs), scene, rng))
        used += 1
    header = {"dataset_type": "val", "dataset_name": "textvqa-style", "dataset_version": "0.5.1"}
    write_json({**header, "data": questions}, out / "TextVQA_0.5.1_val.json")
    header["dataset_version"] = "0.2"
    write_json({**header, "data": tokens}, out / "TextVQA_Rosetta_OCR_v0.2_val.json")
    return len(questions)


def with_signs(
    scene: HeldoutScene, count: int, rng: random.Random
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """The enlarged scene with one sign, or one above and one below; and what the signs say where."""
    with Image.open(scene.image_path) as opened:
        picture = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    signs = []
    rows = (rng.random() < 0.5,) if count == 1 else (False, True)
    for below, word, colour in zip(
        rows, rng.sample(WORDS, count), rng.sample(list(COLOURS), count), strict=True
    ):
        font = sign_font(rng.randint(36, 48))
        left, top, right, bottom = font.getbbox(word)
        width, height = int(right - left) + 24, int(bottom - top) + 20
        x = rng.randint(6, SIDE - width - 6)
        y = rng.randint(SIDE - height - 24, SIDE - height - 6) if below else rng.randint(6, 24)
        draw.rounded_rectangle((x, y, x + width, y + height), 8, COLOURS[colour], "white", 3)
        draw.text((x + 12 - left, y + 10 - top), word, "white", font)
        box = {"x": x / SIDE, "y": y / SIDE, "w": width / SIDE, "h": height / SIDE}
        signs.append({"word": word, "colour": colour, "box": box})
    return picture, signs


def sign_font(size: int) -> Any:
    """DejaVu Sans Bold as matplotlib carries it: the same on every machine."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), size)


def question(
    number: int,
    name: str,
    sign: dict[str, Any],
    signs: int,
    scene: HeldoutScene,
    rng: random.Random,
) -> dict[str, Any]:
    """One record of the question file."""
    thing = "number" if sign["word"].isdigit() else "word"
    which = f"{sign['colour']} sign" if signs > 1 else "sign"
    text = rng.choice((f"what {thing} is on the {which}?", f"what does the {which} say?"))
    return {
        "question": text,
        "image_id": name,
        "image_classes": [object_.capitalize() for object_ in scene.objects],
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": SIDE,
        "image_height": SIDE,
        "answers": answers(sign["word"], rng),
        "question_tokens": text.rstrip("?").split(),
        "question_id": number,
        "set_name": "val",
    }


def answers(word: str, rng: random.Random) -> list[str]:
    """Ten answers: at least six are the word, as written or with capitals or an article."""
    others = [f"the {word}", word.upper(), with_article(word), "unanswerable", word[:-1], "sign"]
    given = [word] * rng.randint(6, 10)
    given += rng.choices(others, k=10 - len(given))
    rng.shuffle(given)
    return given


def ocr(name: str, signs: Sequence[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """One record of the OCR file: one sign in twelve is not found, one in twelve misread."""
    found = []
    for sign in signs:
        luck = rng.random()
        if luck > 1 / 12:
            misread = luck < 2 / 12 and len(sign["word"]) > 2
            found.append((sign["word"][:-1] if misread else sign["word"], sign["box"]))
    return ocr_record(name, found)


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
