"""Loads the held-out scenes and questions, and scores answers and captions. Knows no model.

The questions are "POPE-style": POPE's file format and parse rule on composed scenes, not POPE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_flow.demo.classes import ANSWER_SUFFIX, CAPTION_REQUEST, CLASSES
from vllm_flow.demo.prompt import build_prompt

DATA = Path(__file__).parent / "data"
SPLITS = ("seen", "unseen_style", "photo")

__all__ = [
    "ANSWER_SUFFIX", "CAPTION_REQUEST", "CLASSES", "DATA", "SPLITS", "CaptionScore", "HeldoutScene",
    "Question", "build_prompt", "load_boxes", "load_questions", "load_scenes", "parse_yes_no",
    "score_caption",
]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A presence question about a shipped picture."""

    question_id: int
    image_path: Path
    text: str
    """The bare question, which the demo model takes with or without ``ANSWER_SUFFIX``."""
    label: str
    """``yes`` or ``no``."""
    split: str

    @property
    def prompt(self) -> str:
        """The whole prompt in the demo model's format, with one image token and POPE's suffix."""
        return build_prompt(self.text + ANSWER_SUFFIX)


@dataclass(frozen=True)
class HeldoutScene:
    """A shipped picture, what it shows, and the caption the model was taught to give."""

    image_path: Path
    objects: tuple[str, ...]
    caption: str
    split: str

    @property
    def prompt(self) -> str:
        """The prompt that asks for the caption."""
        return build_prompt(CAPTION_REQUEST)


@dataclass(frozen=True)
class CaptionScore:
    """Objects of a caption against the truth, each a set in the vocabulary's order."""

    mentioned: tuple[str, ...]
    hallucinated: tuple[str, ...]
    """Mentioned, but not in the picture."""
    missed: tuple[str, ...]
    """In the picture, but not mentioned."""


def _rows(name: str) -> Iterable[dict]:
    with (DATA / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def load_questions(split: str | None = None) -> list[Question]:
    """All questions, or those of one split; ``ValueError`` for an unknown split."""
    _check_split(split)
    return [
        Question(row["question_id"], DATA / row["image"], row["text"], row["label"], row["split"])
        for row in _rows("questions.jsonl")
        if split in (None, row["split"])
    ]


def load_scenes(split: str | None = None) -> list[HeldoutScene]:
    """All pictures with known objects, or those of one split; photographs are not among them."""
    _check_split(split)
    return [
        HeldoutScene(DATA / row["image"], tuple(row["objects"]), row["caption"], row["split"])
        for row in _rows("scenes.jsonl")
        if split in (None, row["split"])
    ]


def load_boxes() -> dict[Path, dict[str, tuple[int, int, int, int]]]:
    """Picture -> object -> box (left, top, right, bottom in its pixels) of every composed picture."""
    return {
        DATA / row["image"]: {name: tuple(box) for name, box in row["boxes"].items()}
        for row in _rows("boxes.jsonl")
    }


def _check_split(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r}: use one of {', '.join(SPLITS)}, or None for all"
        )


def parse_yes_no(text: str) -> str:
    """``yes`` or ``no`` by POPE's official rule, corner cases included.

    The text before the first full stop, commas deleted, split on the space character: ``no`` if a
    piece is exactly ``No``, ``no`` or ``not``, else ``yes`` (so ``NO``, ``No!`` and nothing are yes).
    """
    pieces = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(pieces) else "yes"


def score_caption(
    text: str, objects: Sequence[str], vocabulary: Sequence[str] = CLASSES
) -> CaptionScore:
    """Compare the vocabulary's words in ``text`` (whole words, plural allowed) with ``objects``.

    After CHAIR: CHAIR_i is hallucinated over mentioned. Here a repeated object counts once.
    """
    words = set(re.findall(r"[a-z]+", text.lower()))
    mentioned = [name for name in vocabulary if words & {name, f"{name}s", f"{name}es"}]
    return CaptionScore(
        tuple(mentioned),
        tuple(name for name in mentioned if name not in objects),
        tuple(name for name in vocabulary if name in objects and name not in mentioned),
    )
