"""A file of questions without labels, as `vllm-flow cliff --unlabelled --data FILE` reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.eval import files
from vllm_flow.eval.cliff.questions import questions_of
from vllm_flow.eval.tasks.reading import DataError

ROWS = [
    {"text": "Is it\u2028there?", "image": "p/a.png", "id": 7},
    {"text": "B?", "image": "/b.png"},
]


def test_ids_texts_and_pictures_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    first, second = questions_of(path)
    assert (first.id, first.text, first.image) == ("7", ROWS[0]["text"], str(tmp_path / "p/a.png"))
    assert (second.id, second.image) == ("2", "/b.png")
    assert questions_of(files.json_file(tmp_path / "q.json", ROWS)) == [first, second]


def test_a_pipe_names_pictures_from_here() -> None:
    end, start = os.pipe()
    os.write(start, json.dumps(ROWS[0]).encode())
    os.close(start)
    try:
        (item,) = questions_of(Path(f"/dev/fd/{end}"))
    finally:
        os.close(end)
    assert item.image == "p/a.png"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no questions in it"),
        ('{"text": "A?"}', "line 1: no 'image'"),
        ('{"text": 1, "image": "a"}', "line 1: 'text' is 1, not text"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"text": "A?", "image": "a", "id": 2}\n{"text": "A?", "image": "a"}',
            "question 2 comes twice",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        questions_of(path)
