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

from vllm_flow.demo.kinds import HEADLINE, Kind
from vllm_flow.demo.measurements import Answer, Question, Results, Row
from vllm_flow.demo.results_table import cells, headings, notes, percent
from vllm_flow.demo.rows import enough, equal_from
from vllm_flow.outputs import write_text

if TYPE_CHECKING:
    from markupsafe import Markup

EXAMPLES = 8
"""Pictures shown per kind, drawn at random with a fixed seed: no choosing of nice ones."""

SPOKEN = 5
"""Cliffs at which the answer is spelled out below a picture, spread over the range."""

CAPTIONED = 6
"""Pictures shown with captions."""


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
    """At most `count` questions, drawn."""
    return random.Random(1).sample(questions, min(count, len(questions)))


def spread_over(cliffs: list[int], count: int) -> list[int]:
    """`count` of the cliffs, first and last among them, evenly spread."""
    if len(cliffs) <= count:
        return cliffs
    return [cliffs[round(i * (len(cliffs) - 1) / (count - 1))] for i in range(count)]


def cards(results: Results, kind: Kind) -> list[Card]:
    """The example pictures of one kind."""
    given = {(answer.question_id, answer.cliff): answer for answer in results.answers}
    cliffs = results.cliffs_of(kind.key)
    captions = kind.key == "captions"
    spoken = cliffs if captions else spread_over(cliffs, SPOKEN)
    return [
        Card(
            picture=data_uri(question.picture),
            question=question,
            strip=[given[question.id, cliff] for cliff in cliffs],
            spoken=[given[question.id, cliff] for cliff in spoken],
        )
        for question in choose(results.of_kind(kind.key), CAPTIONED if captions else EXAMPLES)
    ]


def marked(answer: Answer) -> Markup:
    """A caption with the words marked that name things not in the picture."""
    from markupsafe import Markup

    from vllm_flow.demo_model.vocabulary import plural

    if not answer.said:
        return Markup("(nothing)")
    forms = {form: name for name in answer.reading.named for form in (name, plural(name))}
    # All that were found, longest first, as in scoring: in "a hot dog" there is no dog to mark.
    any_form = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    pieces = re.split(rf"\b({any_form})\b", answer.said, flags=re.I) if forms else [answer.said]
    out = Markup()
    for number, piece in enumerate(pieces):
        # The pieces take turns: what is between the names, a name.
        wrong = number % 2 == 1 and forms[piece.lower()] in answer.reading.invented
        out += Markup('<span class="invented">{}</span>').format(piece) if wrong else piece
    return out


def class_of(answer: Answer) -> str:
    """`right`, `wrong`, or `part` for a score between them."""
    score = answer.reading.score
    return "right" if score >= 1 else "wrong" if score <= 0 else "part"


def mark_of(answer: Answer) -> str:
    """One character for the same."""
    return {"right": "✓", "wrong": "✗", "part": "~"}[class_of(answer)]


@dataclass(frozen=True)
class Fact:
    """What the page says of a kind at first sight."""

    big: str
    small: str


def facts(results: Results) -> list[Fact]:
    """Per kind: from which cliff on no difference can be told, and between which values that lies."""
    return [fact(results, kind) for kind in results.kinds]


def fact(results: Results, kind: Kind) -> Fact:
    """One kind's."""
    level = equal_from(results, kind.key)
    blind, full = results.rows[0], results.baseline
    values = f"{value_text(full, kind)} with the whole image, {value_text(blind, kind)} at "
    values += f"cliff {blind.cliff}"
    count = len(results.of_kind(kind.key))
    if level is not None:
        told = f"from here on no difference to the baseline can be told on {count} {kind.what}"
        return Fact(f"{kind.short}: cliff {level}", f"{told}; {values}")
    if enough(results, kind.key):
        told = "even the last cliff before the baseline differs from it"
        return Fact(f"{kind.short}: all layers", f"{told}, on {count} {kind.what}; {values}")
    return Fact(
        f"{kind.short}: {percent(score_of(full, kind))} %",
        f"{values}; {count} {kind.what} are too few to say where it levels off",
    )


def score_of(row: Row, kind: Kind) -> float:
    """The first measure of a kind at a cliff where it was asked."""
    return row.scores[kind.key][kind.measures[0]].value.value


def value_text(row: Row, kind: Kind) -> str:
    """The first measure of a kind at a cliff, with its name."""
    score = row.score(kind.key)
    return "not asked" if score is None else f"{percent(score.value.value)} % {kind.measures[0]}"


def write_page(results: Results, figure: Path, path: Path) -> None:
    """Write the page; `figure` is the SVG of `vllm_flow.demo.results_figure`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vllm_flow.demo", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"marked": marked, "class_of": class_of, "mark_of": mark_of}
    text = environment.get_template("page.html.j2").render(
        results=results,
        engine=results.engine,
        headings=headings(results),
        rows=[
            (cells(row, results), row is results.baseline)
            for row in (*results.rows, *results.policies)
        ],
        notes=notes(results),
        figure=data_uri(figure),
        facts=facts(results),
        sections=[
            {
                "kind": kind,
                "cards": cards(results, kind),
                "asked": len(results.of_kind(kind.key)),
                "chance": results.chance(kind.key),
                "baseline": results.baseline.scores[kind.key],
            }
            for kind in results.kinds
        ],
        headline=HEADLINE,
        layers=results.engine.num_layers,
    )
    write_text(path, text)
