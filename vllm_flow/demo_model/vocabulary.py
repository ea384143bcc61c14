"""The closed vocabulary of the demo model: objects by kind, and the words on its signs. (pure)

Where COCO has a category for a thing, the class bears COCO's name, so that CHAIR's word list reads it.
"""

from __future__ import annotations

from collections.abc import Iterable

KINDS: dict[str, tuple[str, ...]] = {
    "animal": (
        "dog", "cat", "bird", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
        "rabbit", "fish", "butterfly", "frog", "turtle", "pig",
    ),
    "vehicle": (
        "car", "bus", "train", "truck", "boat", "bicycle", "motorcycle", "airplane", "helicopter",
        "rocket",
    ),
    "food": (
        "apple", "banana", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
        "sandwich", "strawberry", "pineapple", "tomato", "mushroom",
    ),
    "kitchen tool": ("bottle", "wine glass", "cup", "knife", "spoon"),
    "piece of furniture": ("chair", "couch", "bed", "toilet"),
    "device": ("tv", "laptop", "keyboard", "mouse", "cell phone", "camera", "clock"),
    "toy": ("ball", "kite", "skateboard", "teddy bear"),
    "plant": ("tree", "flower", "potted plant"),
    "thing to carry": ("umbrella", "backpack", "handbag", "tie", "book", "key"),
    "other thing": ("scissors", "toothbrush", "traffic light", "guitar"),
}  # fmt: skip
"""Kind -> its classes. A kind's name stands after "a" or "an" in questions."""

CLASSES: tuple[str, ...] = tuple(name for names in KINDS.values() for name in names)
"""Order matters: a class's index is its label, and captions name objects in this order."""

INDEX: dict[str, int] = {name: number for number, name in enumerate(CLASSES)}
KIND_OF: dict[str, str] = {name: kind for kind, names in KINDS.items() for name in names}

WORDS: tuple[str, ...] = (
    "open", "stop", "exit", "shop", "bank", "park", "school", "market", "north", "south", "east",
    "west", "sale", "free", "post", "music", "radio", "video", "water", "milk", "sugar", "salt",
    "river", "lake", "city", "road", "bridge", "farm", "home", "love", "happy", "hello", "closed",
    "push", "pull", "start", "win", "game", "gold", "summer", "winter", "moon", "sun", "star",
    "king", "magic", "fire", "snow", "rain", "wind", "museum", "office", "club", "fresh", "bread",
    "menu", "news", "help", "photo", "paper",
)  # fmt: skip
"""What signs say. Each is one token of the decoder, and none is a class or one of CHAIR's words."""

WORD_INDEX: dict[str, int] = {word: number for number, word in enumerate(WORDS)}

NUMBERS = ("one", "two", "three", "four", "five")
"""``NUMBERS[n - 1]`` is n in letters."""

PLURALS = {
    "sheep": "sheep", "fish": "fish", "butterfly": "butterflies", "bus": "buses", "knife": "knives",
    "couch": "couches", "strawberry": "strawberries", "tomato": "tomatoes", "sandwich": "sandwiches",
    "wine glass": "wine glasses", "scissors": "scissors", "toothbrush": "toothbrushes",
    "mouse": "mice", "piece of furniture": "pieces of furniture", "thing to carry": "things to carry",
    "food": "foods",
}  # fmt: skip
"""Plurals that are not the singular with an s."""

MASS = ("broccoli", "scissors")
"""Named without an article: ``broccoli``, ``scissors``."""


def plural(name: str) -> str:
    """``dog`` -> ``dogs``."""
    return PLURALS.get(name, f"{name}s")


def with_article(name: str) -> str:
    """``dog`` -> ``a dog``, ``elephant`` -> ``an elephant``; ``scissors`` stays as it is."""
    if name in MASS:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def counted(name: str, count: int) -> str:
    """``dog``, 2 -> ``two dogs``; one thing has its article."""
    return with_article(name) if count == 1 else f"{NUMBERS[count - 1]} {plural(name)}"


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct class names in the order of ``CLASSES``; ``KeyError`` for an unknown one."""
    return sorted(set(names), key=INDEX.__getitem__)


def listed(parts: list[str]) -> str:
    """``a dog, a car and a tree``; ``nothing`` for an empty list."""
    if not parts:
        return "nothing"
    return (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1]
