"""Prompts as token ids, with pictures that nobody has to look at."""

from __future__ import annotations

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

IMAGE = 0
"""The token in an image's positions; words are 1 and up."""


def prompt(before: int, image: int, after: int, word: int = 6) -> list[int]:
    """Text, a picture, text."""
    return [5] * before + [IMAGE] * image + [word] * after


def pictures(tokens: list[int]) -> list[MultiModalFeatureSpec]:
    """A picture per run of :data:`IMAGE`, named by its place among them and its size."""
    found: list[MultiModalFeatureSpec] = []
    start = None
    for index, token in enumerate([*tokens, -1]):
        if token == IMAGE and start is None:
            start = index
        elif token != IMAGE and start is not None:
            name = f"picture-{len(found)}-{index - start}"
            found.append(
                MultiModalFeatureSpec(
                    None, "image", name, PlaceholderRange(start, index - start), name
                )
            )
            start = None
    return found
