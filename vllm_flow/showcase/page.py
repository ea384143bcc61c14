"""The demo's page: table, figure and example pictures in one HTML file without outside parts.

Chooses the examples and computes what the template shows; the template holds the words.
"""

from __future__ import annotations

import base64
import io
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_flow.showcase.records import (
    SPLIT_TITLES,
    Answer,
    Caption,
    Question,
    Results,
    Scene,
    equal_from,
)
from vllm_flow.showcase.table import cells, headings, notes

if TYPE_CHECKING:
    from markupsafe import Markup

EXAMPLES = 12
"""Pictures shown per split, drawn at random with a fixed seed: no choosing of nice ones."""

SPOKEN = 5
"""Cliffs at which the answer is spelled out below a picture, spread over the range."""


LISTED = 6
"""Pictures shown with the model's lists of objects."""


@dataclass(frozen=True)
class Card:
    """One picture with its question and the answers at every cliff."""

    picture: str
    """A data URI."""
    question: Question
    strip: list[Answer]
    """By ascending cliff; the last is the baseline."""
    spoken: list[Answer]


def data_uri(path: Path) -> str:
    """A picture as a data URI: SVG as it is, everything else re-encoded to a small JPEG."""
    if path.suffix == ".svg":
        kind, data = "svg+xml", path.read_bytes()
    else:
        from PIL import Image

        buffer = io.BytesIO()
        with Image.open(path) as image:
            picture = image.convert("RGB")
            picture.thumbnail((448, 448))
            picture.save(buffer, "JPEG", quality=88)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def choose(questions: list[Question], count: int) -> list[Question]:
    """At most `count` questions, pictures not repeated while there are fresh ones."""
    shuffled = list(questions)
    random.Random(0).shuffle(shuffled)
    seen: set[Path] = set()
    fresh, again = [], []
    for question in shuffled:
        (again if question.image_path in seen else fresh).append(question)
        seen.add(question.image_path)
    return (fresh + again)[:count]


def spread_over(cliffs: list[int], count: int) -> list[int]:
    """`count` of the cliffs, first and last among them, evenly spread."""
    if len(cliffs) <= count:
        return cliffs
    return [cliffs[round(i * (len(cliffs) - 1) / (count - 1))] for i in range(count)]


def cards(results: Results, split: str, count: int = EXAMPLES) -> list[Card]:
    """The example pictures of one split."""
    given = {(answer.question_id, answer.cliff): answer for answer in results.answers}
    cliffs = [row.cliff for row in results.rows]
    spoken = spread_over(cliffs, SPOKEN)
    questions = choose([q for q in results.questions if q.split == split], count)
    return [
        Card(
            picture=data_uri(question.image_path),
            question=question,
            strip=[given[question.question_id, cliff] for cliff in cliffs],
            spoken=[given[question.question_id, cliff] for cliff in spoken],
        )
        for question in questions
    ]


def marked(caption: Caption) -> Markup:
    """The caption with the words marked that name things not in the picture."""
    from markupsafe import Markup, escape

    text = str(escape(caption.said or "(nothing)"))
    for name in caption.hallucinated:
        text = re.sub(
            rf"\b({name}(?:e?s)?)\b", r'<span class="invented">\1</span>', text, flags=re.I
        )
    return Markup(text)


@dataclass(frozen=True)
class ListRow:
    """All lists at one cliff, counted."""

    cliff: int
    shown: int
    """Objects in the pictures."""
    found: int
    """Of these, named."""
    hallucinated: int
    """Named, but not in the picture."""


def list_rows(results: Results) -> list[ListRow]:
    """One row per cliff at which objects were listed."""
    rows = []
    for cliff in sorted({caption.cliff for caption in results.captions}):
        at_cliff = [caption for caption in results.captions if caption.cliff == cliff]
        shown = sum(len(caption.scene.objects) for caption in at_cliff)
        missed = sum(len(caption.missed) for caption in at_cliff)
        hallucinated = sum(len(caption.hallucinated) for caption in at_cliff)
        rows.append(ListRow(cliff, shown, shown - missed, hallucinated))
    return rows


def list_cards(results: Results, count: int = LISTED) -> list[tuple[str, list[Caption]]]:
    """The first pictures whose objects were listed, each with its lists by ascending cliff."""
    by_scene: dict[Scene, list[Caption]] = {}
    for caption in sorted(results.captions, key=lambda c: (str(c.scene.image_path), c.cliff)):
        by_scene.setdefault(caption.scene, []).append(caption)
    chosen = random.Random(0).sample(list(by_scene), min(count, len(by_scene)))
    return [(data_uri(scene.image_path), by_scene[scene]) for scene in chosen]


def write_page(results: Results, figure: Path, path: Path) -> None:
    """Write the page; `figure` is the SVG of `vllm_flow.showcase.figure`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vllm_flow.showcase", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["marked"] = marked
    splits = results.splits
    answered = {s: sum(q.split == s for q in results.questions) for s in splits}
    text = environment.get_template("page.html.j2").render(
        results=results,
        engine=results.engine,
        headings=headings(results),
        rows=[cells(row, results) for row in results.rows],
        notes=notes(results),
        figure=data_uri(figure),
        sections=[
            {
                "title": SPLIT_TITLES.get(split, split).capitalize(),
                "cards": cards(results, split),
                "asked": answered[split],
                "correct": results.baseline.scores[split].correct,
            }
            for split in splits
        ],
        list_rows=list_rows(results),
        list_cards=list_cards(results),
        equal_from=equal_from(results, splits[0]),
        shallowest=results.rows[0],
        baseline=results.baseline,
        headline=splits[0],
        layers=results.engine.num_layers,
    )
    path.write_text(text)
