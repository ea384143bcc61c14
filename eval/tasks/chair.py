"""CHAIR: which objects a caption names that are not in the image. (Rohrbach et al., "Object
Hallucination in Image Captioning", EMNLP 2018)

Rules, which differ in how words are brought to their base form:

- `official` (LisaAnne/Hallucination, utils/chair.py): every token is made singular;
- `opera` (OPERA, chair.py, which later papers use): part-of-speech tags, then WordNet lemmas.

Protocol after OPERA: a detailed description of 500 random images of COCO val2014, which are not padded.
OPERA reads pictures as stored, not as a server does (`Task`).

Layouts read:

- official: `{instances,captions}_{val,train}2014.json` (a split needs both files) in the directory or
  in its `annotations`; pictures in `val2014`, `images`, `images/val2014`, or `val2014` beside it. The images
  asked about: those of `chair_images.txt` (an image id per line) where there is one, else 500 of
  val2014 drawn with `seed`;
- hub (tsunghanwu/mscoco_chair): parquet files `test-*.parquet` with the columns question_id (the image's
  id), image, gt_object; its objects are taken as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_flow.eval.tasks import coco
from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, counts_of, ratio
from vllm_flow.eval.tasks.language import singulars, tokenise, wordnet_lemmas
from vllm_flow.eval.tasks.parquet import parquet_files, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.reading import (
    DataError,
    brief,
    directory,
    few,
    first_directory_with,
    read_text,
)
from vllm_flow.user_text import whole_number

Rule = Literal["official", "opera"]
RULES: Mapping[str, Callable[[Sequence[str]], list[str]]] = {
    "official": singulars,
    "opera": wordnet_lemmas,
}

PROMPT = "Please describe this image in detail."
IMAGE_FOLDERS = ("val2014", "images", "images/val2014", ".", "../val2014")
CHOSEN = "chair_images.txt"

DOUBLE_WORDS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball",
    "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone",
    "mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer", "home plate",
    "train track",
)  # fmt: skip
"""Two tokens that are one word. The published list also has `stove top oven`, which two tokens never
make, and `bow tie`, see below."""
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
           "animal", "cub")  # fmt: skip
PAIRS: Mapping[str, str] = {
    **{pair: pair for pair in DOUBLE_WORDS},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}
"""Two successive tokens -> what they count as; `baby cat` is no person."""


@lru_cache(maxsize=1)
def synonyms() -> Mapping[str, str]:
    """Word -> the COCO object it stands for."""
    table: dict[str, str] = {}
    text = (Path(__file__).parent / "chair_synonyms.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            words = line.split("|")
            table |= dict.fromkeys(words, words[0])
    return table


class Words(NamedTuple):
    """What a caption says."""

    objects: list[str]
    """COCO objects, in the order and as often as they are mentioned."""
    length: int
    """Tokens, punctuation included, a double word being one."""


def read_caption(caption: str, rule: Rule) -> Words:
    """The objects a caption mentions."""
    tokens = join_pairs(RULES[rule](tokenise(caption.lower())))
    return Words(objects_among(tokens), len(tokens))


def join_pairs(tokens: Sequence[str]) -> list[str]:
    """Double words joined, from left to right."""
    joined = []
    i = 0
    while i < len(tokens):
        pair = " ".join(tokens[i : i + 2])
        joined.append(PAIRS.get(pair, tokens[i]))
        i += 2 if pair in PAIRS else 1
    return joined


def objects_among(tokens: Sequence[str]) -> list[str]:
    """The COCO objects of joined tokens; a toilet's seat is no chair."""
    skip = "seat" if "toilet" in tokens else None
    table = synonyms()
    return [table[token] for token in tokens if token in table and token != skip]


def coco_truth(data: Path, rule: Rule, images: Collection[int] | None = None) -> coco.Annotations:
    """What is in each image: its instances' categories (crowds too) and the objects its reference
    captions mention; `images` None takes all."""
    return coco.read(data, synonyms(), lambda text: read_caption(text, rule).objects, images)


@dataclass(frozen=True)
class Chair(Task):
    """CHAIR on COCO val2014. The headline is CHAIR_i, and an item's score 1 less its own CHAIR_i."""

    name: str = "chair"
    rule: Rule = "official"
    sample: int = 500
    """Images drawn where the data directory names none."""
    seed: int = 0

    max_tokens = 512
    headline = "chair_i"
    unclear = "name no object, and so invent none"
    higher_is_better = False
    image_preparation = "plain"
    binary = False

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        files = parquet_files(data, "test-*.parquet")
        if files and not coco.is_here(data):
            return self._hub(files)
        chosen = chosen_images(data) if (data / CHOSEN).is_file() else self._draw(data)
        found = coco_truth(data, self.rule, set(chosen))
        unknown = [image for image in chosen if image not in found.objects]
        if unknown:
            raise DataError(f"{data / CHOSEN}: not in COCO's annotations: {few(unknown)}")
        names = [found.files[image] for image in chosen]
        folder = first_directory_with(data, names[:50], IMAGE_FOLDERS)
        return [
            self.item(image, found.objects[image], str(folder / name))
            for image, name in zip(chosen, names, strict=True)
        ]

    def _draw(self, data: Path) -> list[int]:
        """Images of val2014 at random, the same ones for the same seed."""
        images = coco.image_ids(data, "val")
        return sorted(random.Random(self.seed).sample(images, min(self.sample, len(images))))

    def _hub(self, files: list[Path]) -> list[Item]:
        table = synonyms()
        items = []
        for path in files:
            for number, row in enumerate(parquet_rows(path, ("question_id", "gt_object"))):
                names = row.texts("gt_object")
                strange = [name for name in names if table.get(name) != name]
                if strange:
                    raise DataError(f"{row.place}: {few(strange)}: no COCO object")
                identifier = row.number("question_id", "a COCO image id")
                items.append(self.item(identifier, names, parquet_image(path, number)))
        return items

    def item(self, image_id: int, objects: Collection[str], image: str | None) -> Item:
        """The item of an image that shows `objects`."""
        truth = {"image_id": image_id, "objects": sorted(objects)}
        return Item(str(image_id), PROMPT, image, truth)

    def score(self, item: Item, text: str) -> Scored:
        shown = set(item.truth["objects"])
        mentioned, length = read_caption(text, self.rule)
        wrong = [name for name in mentioned if name not in shown]
        counts = {
            "captions": 1.0,
            "hallucinating": float(bool(wrong)),
            "mentions": float(len(mentioned)),
            "hallucinated": float(len(wrong)),
            "objects": float(len(shown)),
            "recalled": float(len(shown & set(mentioned))),
            "tokens": float(length),
        }
        score = 1.0 - len(wrong) / len(mentioned) if mentioned else 1.0
        parsed = {"mentioned": mentioned, "hallucinated": wrong}
        return Scored(item.id, parsed, score, counts, unclear=not mentioned)

    def metrics(self, totals: Totals) -> Metrics:
        """Shares; `len` in tokens."""
        return {
            metric: ratio(*counts_of(totals, part, whole))
            for metric, (part, whole) in METRICS.items()
        }


METRICS = {
    "chair_s": ("hallucinating", "captions"),
    "chair_i": ("hallucinated", "mentions"),
    "recall": ("recalled", "objects"),
    "len": ("tokens", "captions"),
}


def truth_of(data: Path, task: Chair, images: Collection[int]) -> Mapping[int, Collection[str]]:
    """The objects of images by id, from COCO's annotations or the hub's parquet, of those that are there."""
    files = parquet_files(data, "test-*.parquet")
    if files and not coco.is_here(data):
        return {item.truth["image_id"]: item.truth["objects"] for item in task.read(data)}
    return coco_truth(data, task.rule, images).objects


def chosen_images(data: Path) -> list[int]:
    """The image ids of a saved list, in its order."""
    path = data / CHOSEN
    images = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            image = whole_number(line.strip())
            if image is None:
                raise DataError(f"{path}, line {number}: {brief(line.strip())} is no image id")
            images.append(image)
    if not images or len(set(images)) != len(images):
        raise DataError(f"{path}: image ids must be there, and each once")
    return images


TASK = Chair()
VARIANTS = (Chair(name="chair-opera", rule="opera"),)
