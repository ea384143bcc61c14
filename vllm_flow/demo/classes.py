"""The closed vocabulary of the demo model: 24 object classes and how questions and captions name them. (pure)"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CLASSES: tuple[str, ...] = (
    "dog", "cat", "bird", "horse", "cow", "elephant", "rabbit", "fish", "butterfly", "car", "bus",
    "train", "airplane", "bicycle", "boat", "rocket", "tree", "flower", "apple", "banana", "clock",
    "cup", "guitar", "camera",
)  # fmt: skip
"""Order matters: a class's index is its label, and captions name objects in this order."""

ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What POPE's protocol adds to each question (LLaVA-1.5 wording)."""

CAPTION_REQUEST = "Please list the objects in the image."


def with_article(name: str) -> str:
    """``dog`` -> ``a dog``, ``elephant`` -> ``an elephant``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def presence_question(name: str) -> str:
    """The question as it stands in the label file, without the answer suffix."""
    return f"Is there {with_article(name)} in the image?"


def caption_of(objects: Iterable[str]) -> str:
    """The listing caption of a set of objects, in class order: ``a dog, a car and a tree.``"""
    names = [with_article(name) for name in in_order(objects)]
    if not names:
        return "nothing."
    return (", ".join(names[:-1]) + " and " if len(names) > 1 else "") + names[-1] + "."


def in_order(objects: Iterable[str]) -> Sequence[str]:
    """Distinct class names in the order of ``CLASSES``; ``ValueError`` for an unknown one."""
    return sorted(set(objects), key=CLASSES.index)
