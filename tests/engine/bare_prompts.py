"""Prompts as token ids, with pictures that nobody has to look at."""

from __future__ import annotations

from itertools import groupby

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

IMAGE = 0
"""The token in an image's positions; words are 1 and up."""
NEXT = -2
"""The same, of an image right behind another one."""


def prompt(before: int, image: int, after: int, word: int = 6) -> list[int]:
    """Text, a picture, text."""
    return [5] * before + [IMAGE] * image + [word] * after


def pictures(tokens: list[int]) -> list[MultiModalFeatureSpec]:
    """A picture per run of :data:`IMAGE` or :data:`NEXT`, named by its place among them and its size."""
    found: list[MultiModalFeatureSpec] = []
    start = 0
    for token, run in groupby(tokens):
        size = len([*run])
        if token in (IMAGE, NEXT):
            name = f"picture-{len(found)}-{size}"
            at = PlaceholderRange(start, size)
            found.append(MultiModalFeatureSpec(None, "image", name, at, name))
        start += size
    return found
