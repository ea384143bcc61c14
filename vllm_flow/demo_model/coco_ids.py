"""COCO's categories that are among the demo model's classes. A table of facts. (pure)"""

from __future__ import annotations

CATEGORIES: dict[str, tuple[int, str]] = {
    "bicycle": (2, "vehicle"), "car": (3, "vehicle"), "motorcycle": (4, "vehicle"),
    "airplane": (5, "vehicle"), "bus": (6, "vehicle"), "train": (7, "vehicle"),
    "truck": (8, "vehicle"), "boat": (9, "vehicle"), "traffic light": (10, "outdoor"),
    "bird": (16, "animal"), "cat": (17, "animal"), "dog": (18, "animal"), "horse": (19, "animal"),
    "sheep": (20, "animal"), "cow": (21, "animal"), "elephant": (22, "animal"),
    "bear": (23, "animal"), "zebra": (24, "animal"), "giraffe": (25, "animal"),
    "backpack": (27, "accessory"), "umbrella": (28, "accessory"), "handbag": (31, "accessory"),
    "tie": (32, "accessory"), "sports ball": (37, "sports"), "kite": (38, "sports"),
    "skateboard": (41, "sports"), "bottle": (44, "kitchen"), "wine glass": (46, "kitchen"),
    "cup": (47, "kitchen"), "knife": (49, "kitchen"), "spoon": (50, "kitchen"),
    "banana": (52, "food"), "apple": (53, "food"), "sandwich": (54, "food"), "orange": (55, "food"),
    "broccoli": (56, "food"), "carrot": (57, "food"), "hot dog": (58, "food"), "pizza": (59, "food"),
    "donut": (60, "food"), "cake": (61, "food"), "chair": (62, "furniture"),
    "couch": (63, "furniture"), "potted plant": (64, "furniture"), "bed": (65, "furniture"),
    "toilet": (70, "furniture"), "tv": (72, "electronic"), "laptop": (73, "electronic"),
    "mouse": (74, "electronic"), "keyboard": (76, "electronic"), "cell phone": (77, "electronic"),
    "book": (84, "indoor"), "clock": (85, "indoor"), "scissors": (87, "indoor"),
    "teddy bear": (88, "indoor"), "toothbrush": (90, "indoor"),
}  # fmt: skip
"""COCO's name -> its id and supercategory there."""

NAMES: dict[str, str] = {"ball": "sports ball"}
"""Class -> COCO's name where the two differ."""


def category(name: str) -> str | None:
    """COCO's name for a class, None where COCO has none."""
    found = NAMES.get(name, name)
    return found if found in CATEGORIES else None
