"""A task of one's own: which letter is on the picture, scored by the answer's first letter.

Layout read: ``letters.jsonl`` with the fields id, image (a path from the folder) and letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, counts_of, ratio
from vllm_flow.eval.tasks.reading import directory, read_records


@dataclass(frozen=True)
class Capitals(Task):
    """One capital letter a picture."""

    name = "capitals"
    max_tokens = 4
    headline = "accuracy"

    def read(self, data: Path) -> list[Item]:
        folder = directory(data)
        items = []
        for row in read_records(folder / "letters.jsonl"):
            image = str(folder / row.get("image", str))
            truth = {"letter": row.get("letter", str), "image_id": image}
            items.append(Item(row.identifier("id"), "Which letter is this?", image, truth))
        return items

    def score(self, item: Item, text: str) -> Scored:
        said = text.strip()[:1].upper()
        right = float(said == item.truth["letter"])
        return Scored(item.id, said, right, {"asked": 1.0, "right": right})

    def metrics(self, totals: Totals) -> Metrics:
        right, asked = counts_of(totals, "right", "asked")
        return {"accuracy": ratio(right, asked)}


TASK = Capitals()
