"""AMBER, generative part: which objects does a description invent, and which does it cover? (Wang et al., arXiv
2311.07397)

Rule: junyangwang0410/AMBER 534babf, inference.py. The nouns of a description that are in the benchmark's vocabulary
are looked up among the picture's objects and their associates; those not found there count as invented,
unless spaCy's word vectors (en_core_web_lg) put one of the picture's words within 0.8 of them. To the letter: an
associate of an earlier object takes a mention from a later object, repeated objects are covered once, and the
script's 0.001 under its fractions, lost in its rounding, is left out.

`amber` is that rule and needs spaCy. `amber-words` leaves the vectors out: no near-synonym is found, so
CHAIR and Hal are higher, cover lower. The discriminative part is yes/no questions like POPE's and is not here.

Layout read (there is no hub copy by the authors): `annotations.json`, `relation.json`, `safe_words.txt` and
`query/query_generative.json` in the directory or its `data`; pictures in `image`, `images` or beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, counts_of, ratio
from vllm_flow.eval.tasks.language import nouns, similarity
from vllm_flow.eval.tasks.reading import (
    DataError,
    Row,
    directory,
    few,
    first_directory_with,
    first_file,
    json_rows,
    read_json,
    read_text,
)

NEAR = 0.8
IMAGE_FOLDERS = ("image", "images", "../image", "../images", ".")


@dataclass(frozen=True)
class Words:
    """Objects of a picture, true or expected to be invented, with their associates."""

    objects: tuple[str, ...]
    listed: tuple[tuple[str, int], ...]
    """Words in the order of look-up, and which object each one stands for."""

    @classmethod
    def of(cls, objects: Sequence[str], associates: Mapping[str, Sequence[str]]) -> Words:
        """Associates of every object come before the objects themselves."""
        around = [(word, i) for i, name in enumerate(objects) for word in associates[name]]
        return cls(tuple(objects), (*around, *((name, i) for i, name in enumerate(objects))))

    def exactly(self, word: str) -> int | None:
        """The object that a word stands for; None where it is not listed."""
        return next((i for listed, i in self.listed if listed == word), None)

    def nearly(self, word: str) -> int | None:
        """The first object with a word near it."""
        return next((i for listed, i in self.listed if similarity(word, listed) > NEAR), None)


def judge(
    said: Sequence[str], truth: Words, invented: Words, safe: frozenset[str], near: bool
) -> tuple[list[str], set[int], set[int]]:
    """What a description's vocabulary words say of the picture.

    Returns:
        The words that are invented, the covered objects of `truth`, and those of `invented`.
    """
    wrong: list[str] = []
    covered: set[int] = set()
    expected: set[int] = set()
    for word in said:
        if word in safe:
            continue
        there = truth.exactly(word)
        if there is None:
            expected |= {i for i in [invented.exactly(word)] if i is not None}
            if near:
                expected |= {i for i in [invented.nearly(word)] if i is not None}
                there = truth.nearly(word)
        if there is None:
            wrong.append(word)
        else:
            covered.add(there)
    return wrong, covered, expected


@dataclass(frozen=True)
class Amber(Task):
    """AMBER's descriptions. The headline is its CHAIR, and an item's score 1 less its own."""

    name: str = "amber"
    near: bool = True
    """Whether word vectors find near-synonyms."""

    max_tokens = 512
    headline = "chair"
    higher_is_better = False
    image_preparation = "plain"
    binary = False
    unclear = "name no object of the vocabulary, and so invent none"

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        path = first_file(data, "annotations.json", (".", "data"))
        if path is None:
            raise DataError(f"{data}: no annotations.json (here or in data)")
        base = path.parent
        content = Row(str(base / "relation.json"), read_json(base / "relation.json", dict))
        relations = {name: content.texts(name) for name in content.values}
        # The vocabulary is part of the truth, so that an answer can be scored without the files.
        shared = {
            "vocabulary": sorted({*relations, *(w for words in relations.values() for w in words)}),
            "safe": read_text(base / "safe_words.txt").split("\n"),
        }
        known = {row.identifier("id"): row for row in json_rows(path, read_json(path, list))}
        queries = base / "query/query_generative.json"
        rows = json_rows(queries, read_json(queries, list))
        names = [row.get("image", str) for row in rows]
        folder = first_directory_with(base, names[:50], IMAGE_FOLDERS)
        items = []
        for row, name in zip(rows, names, strict=True):
            number = row.identifier("id")
            if number not in known:
                raise DataError(f"{row.place}: {path} has no annotation {number}")
            truth = _truth(known[number], relations) | {"image_id": name} | shared
            items.append(Item(number, row.get("query", str), str(folder / name), truth))
        return items

    def score(self, item: Item, text: str) -> Scored:
        vocabulary = frozenset(item.truth["vocabulary"])
        said = [noun for noun in nouns(text) if noun in vocabulary]
        if self.near:
            similarity("dog", "cat")  # missing vectors are told before anything counts without them
        truth, invented = (
            Words.of(item.truth[kind], item.truth["associates"]) for kind in ("truth", "hallu")
        )
        safe = frozenset(item.truth["safe"])
        wrong, covered, expected = judge(said, truth, invented, safe, self.near)
        counts = {
            "mentions": float(len(said)),
            "invented": float(len(wrong)),
            "descriptions": 1.0,
            "inventing": float(bool(wrong)),
            "objects": float(len(truth.objects)),
            "covered": float(len(covered)),
            "expected": float(len(invented.objects)),
            "cognitive": float(len(expected)),
        }
        score = 1 - len(wrong) / len(said) if said else 1.0
        parsed = {"mentioned": said, "invented": wrong}
        return Scored(item.id, parsed, score, counts, unclear=not said)

    def metrics(self, totals: Totals) -> Metrics:
        return {name: ratio(*counts_of(totals, *parts)) for name, parts in METRICS.items()}


METRICS = {
    "chair": ("invented", "mentions"),
    "cover": ("covered", "objects"),
    "hal": ("inventing", "descriptions"),
    "cog": ("cognitive", "expected"),
}


def _truth(row: Row, relations: Mapping[str, Any]) -> dict[str, Any]:
    objects = {kind: row.texts(kind) for kind in ("truth", "hallu")}
    named = {name for names in objects.values() for name in names}
    strange = sorted(named - relations.keys())
    if strange:
        raise DataError(f"{row.place}: {few(strange)}: not in relation.json")
    return {**objects, "associates": {name: relations[name] for name in sorted(named)}}


TASK = Amber()
VARIANTS = (Amber(name="amber-words", near=False),)
