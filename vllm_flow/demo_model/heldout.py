"""Loads the held-out scenes and asks about them; reads answers and scores captions. Knows no model.

The questions are "POPE-style": POPE's wording and parse rule on composed scenes, not POPE. Other
kinds of questions about the same scenes: `vllm_flow.demo_model.datasets`.

A folder of scenes holds ``{split}/{number}.webp`` and ``scenes.jsonl``, a line per picture with its
facts. Two of the splits are shipped; `training.heldout_data` makes any of them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.facts import Box, Facts
from vllm_flow.demo_model.prompt import build_prompt
from vllm_flow.demo_model.questions import ANSWER_SUFFIX, CAPTION_REQUEST
from vllm_flow.demo_model.vocabulary import CLASSES, plural

DATA = Path(__file__).parent / "data"
SPLITS = ("seen", "unseen_style", "unseen_photos", "unseen_backgrounds")
SHIPPED = ("seen", "unseen_style")
"""Splits whose pictures come with the package; the others hold pictures that may not be passed on."""

__all__ = [
    "ANSWER_SUFFIX", "CAPTION_REQUEST", "CLASSES", "DATA", "SHIPPED", "SPLITS", "CaptionScore",
    "HeldoutScene", "Question", "build_prompt", "load_questions", "load_scenes", "parse_yes_no",
    "score_caption",
]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A presence question about a picture."""

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
    """A picture and what is known about it."""

    image_path: Path
    facts: Facts
    split: str

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Distinct class names, in the vocabulary's order."""
        return self.facts.objects

    @property
    def caption(self) -> str:
        """The list of objects that the model was taught to give."""
        return questions.listing(self.objects)

    @property
    def prompt(self) -> str:
        """The prompt that asks for that list."""
        return build_prompt(CAPTION_REQUEST)

    @property
    def boxes(self) -> dict[str, Box]:
        """Class name -> its box, of the things that come once."""
        counts = self.facts.counts
        return {thing.name: thing.box for thing in self.facts.things if counts[thing.name] == 1}


@dataclass(frozen=True)
class CaptionScore:
    """Objects of a caption against the truth, each a set in the vocabulary's order."""

    mentioned: tuple[str, ...]
    hallucinated: tuple[str, ...]
    """Mentioned, but not in the picture."""
    missed: tuple[str, ...]
    """In the picture, but not mentioned."""


def load_scenes(split: str | None = None, folder: Path = DATA) -> list[HeldoutScene]:
    """The scenes of a folder, all or those of one split, in the order of their numbers.

    Raises ValueError for an unknown split, FileNotFoundError where the folder has no ``scenes.jsonl``.
    """
    _check_split(split)
    path = folder / "scenes.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; make scenes with python -m vllm_flow.demo_model.training.heldout_data"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        HeldoutScene(folder / row["image"], Facts.from_json(row), row["split"])
        for row in rows
        if split in (None, row["split"])
    ]


def load_questions(split: str | None = None) -> list[Question]:
    """Presence questions about the shipped scenes, all or those of one split: the same in every call.

    Up to two things of each scene that are there, and as many that are not; these are drawn among
    the things that were asked about least with the answer no, so that a question alone tells nothing.

    Raises ValueError for an unknown split.
    """
    _check_split(split)
    chosen: list[Question] = []
    for name in SHIPPED:
        rng = random.Random(f"questions/{name}")
        scenes = [scene for scene in load_scenes(name) if scene.objects]
        shown = [other for other in CLASSES if any(other in scene.objects for scene in scenes)]
        surplus = dict.fromkeys(shown, 0)  # questions with yes that none with no stands against
        for scene in scenes:
            there = rng.sample(scene.objects, min(2, len(scene.objects)))
            missing = [other for other in shown if other not in scene.objects]
            rng.shuffle(missing)
            for object_ in there:
                surplus[object_] += 1
            missing.sort(key=lambda other: -surplus[other])
            for object_ in missing[: len(there)]:
                surplus[object_] -= 1
            for label, names in (("yes", there), ("no", missing[: len(there)])):
                for object_ in names:
                    text = questions.presence(object_)
                    chosen.append(Question(len(chosen) + 1, scene.image_path, text, label, name))
    return [question for question in chosen if split in (None, question.split)]


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
    """Compare the things that ``text`` names (whole words, singular or plural) with ``objects``.

    After CHAIR: CHAIR_i is hallucinated over mentioned. Here a repeated object counts once, and of
    names within names the longest counts: a hot dog is no dog.
    """
    name_of = {form: name for name in vocabulary for form in (name, plural(name))}
    longest_first = sorted(name_of, key=len, reverse=True)
    pattern = rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"
    found = {name_of[match] for match in re.findall(pattern, text.lower())}
    mentioned = [name for name in vocabulary if name in found]
    return CaptionScore(
        tuple(mentioned),
        tuple(name for name in mentioned if name not in objects),
        tuple(name for name in vocabulary if name in objects and name not in mentioned),
    )
