"""MMStar: 1500 multiple-choice questions that need the image. (Chen et al., "Are We on the Right Way for
Evaluating Large Vision-Language Models?", NeurIPS 2024)

Rule: MMStar-Benchmark/MMStar, eval/vlmeval/evaluate/mmstar.py. The question text carries its options;
the suffix is LLaVA's for multiple choice.

Layout read: the hub's (Lin-Chen/MMStar), a parquet file `mmstar.parquet` or `val-*.parquet` with the
columns index, question, image, answer, category.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vllm_flow.eval.tasks.base import (
    Item,
    Metrics,
    Scored,
    Task,
    Totals,
    counts_of,
    ratio,
)
from vllm_flow.eval.tasks.cells import rows_and_pictures
from vllm_flow.eval.tasks.parquet import parquet_files
from vllm_flow.eval.tasks.reading import DataError, brief, directory

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
OPTIONS = ("a", "b", "c", "d")
LEADS = ("(", "option ", "the answer is ")


def parse_choice(text: str) -> str:
    """The character that stands for the choice, lower-case; empty where the answer ends before it.

    The first one of the answer, or the one after `(`, `option ` or `the answer is `. So `A cat` chooses
    a, and `Answer: B` too.
    """
    text = text.lower().strip().replace("\n", " ")
    lead = next((lead for lead in LEADS if text.startswith(lead)), "")
    return text[len(lead) : len(lead) + 1]


def metric_name(category: str) -> str:
    """A category's metric: `accuracy_science_technology`."""
    return "accuracy_" + category.replace(" & ", "_").replace("-", "_").replace(" ", "_")


@dataclass(frozen=True)
class MMStar(Task):
    """MMStar; an item's group is its category."""

    name = "mmstar"
    max_tokens = 128
    headline = "accuracy"
    parts = MappingProxyType({metric_name(category): (category,) for category in CATEGORIES})
    unclear = "choose none of A to D where the official rule looks (`B`, `(B)`, `option B`) and count as wrong"

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        files = parquet_files(data, "mmstar.parquet", "val-*.parquet")
        if not files:
            raise DataError(f"{data}: neither mmstar.parquet nor val-*.parquet of Lin-Chen/MMStar")
        items = []
        for path in files:
            columns = ("index", "question", "answer", "category")
            for row, image, picture in rows_and_pictures(path, columns):
                category = row.get("category", str)
                if category not in CATEGORIES:
                    raise DataError(f"{row.place}: unknown category {brief(category)}")
                truth = {"answer": row.get("answer", str), "image_id": picture}
                text = row.get("question", str).strip() + SUFFIX
                items.append(Item(row.identifier("index"), text, image, truth, category))
        return items

    def score(self, item: Item, text: str) -> Scored:
        choice = parse_choice(text)
        right = float(bool(choice) and choice == item.truth["answer"].lower().strip())
        counts = {f"asked_{item.group}": 1.0, f"right_{item.group}": right}
        return Scored(item.id, choice, right, counts, item.group, choice not in OPTIONS)

    def metrics(self, totals: Totals) -> Metrics:
        right = counts_of(totals, *(f"right_{category}" for category in CATEGORIES))
        asked = counts_of(totals, *(f"asked_{category}" for category in CATEGORIES))
        metrics: Metrics = {"accuracy": ratio(sum(right), sum(asked))}
        for category, part, whole in zip(CATEGORIES, right, asked, strict=True):
            metrics[metric_name(category)] = ratio(part, whole)
        return metrics


TASK = MMStar()
