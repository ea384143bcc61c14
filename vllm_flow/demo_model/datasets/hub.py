"""The written POPE, ScienceQA and TextVQA files once more as the hub holds the benchmarks: parquet with pictures.

A harness that loads `lmms-lab-encoder/POPE` by that name, as lmms-eval 0.7 does, finds the folder of that name
where it is started, and asks its own task's questions without a download. Columns and their types are those that
harnesses read, the splits are named as on the hub, and the rows are those of the official files, in their order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ORGANISATION = "lmms-lab-encoder"

TEXT, NUMBER = {"dtype": "string", "_type": "Value"}, {"dtype": "int64", "_type": "Value"}
TEXTS = {"feature": TEXT, "_type": "List"}
PICTURE = {"_type": "Image"}

CARD = """---
configs:
{configs}
---

# {name}-style questions on vLLM-Flow's demo pictures

Only the file format is that of the benchmark; see the README of the folder that this was written from.
"""

Rows = list[dict[str, Any]]


def write_hub(data: Path, out: Path) -> dict[str, int]:
    """Write what `write_datasets` wrote into `data` below `out`; returns rows by the hub's name.

    Args:
        data: the official files of some of the tasks; tasks without a form on the hub are left out.
        out: gets `lmms-lab-encoder/NAME`; files of the same names are overwritten.
    """
    counts = {}
    for name, (folder, split, columns, rows_of) in FORMS.items():
        if not (data / folder).is_dir():
            continue
        base = out / ORGANISATION / name
        configs = []
        for config, rows in rows_of(data / folder).items():
            place = f"{config if config != 'default' else 'data'}/{split}-00000-of-00001.parquet"
            _write(base / place, rows, columns)
            configs.append(
                f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {place}"
            )
            counts[f"{ORGANISATION}/{name}"] = len(rows)
        card = CARD.format(configs="\n".join(configs), name=name)
        (base / "README.md").write_text(card, encoding="utf-8")
    return counts


def _write(path: Path, rows: Rows, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """One parquet file; its metadata say what a column is to the `datasets` package, pictures above all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "Image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "List": pa.list_(pa.string()),
        "string": pa.string(),
        "int64": pa.int64(),
    }
    fields = [
        (name, kinds[column["dtype"] if column["_type"] == "Value" else column["_type"]])
        for name, column in columns.items()
    ]
    features = {"info": {"features": dict(columns)}}
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=100)


def _pope(data: Path) -> dict[str, Rows]:
    rows: Rows = []
    for category in ("adversarial", "popular", "random"):  # the hub's order
        for row in _lines(data / f"coco_pope_{category}.json"):
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(row["question_id"]),
                    "question": row["text"],
                    "answer": row["label"],
                    "image_source": row["image"].removesuffix(".jpg"),
                    "image": _picture(data / "val2014" / row["image"]),
                    "category": category,
                }
            )
    return {"default": rows}


def _scienceqa(data: Path) -> dict[str, Rows]:
    problems = json.loads((data / "problems.json").read_text(encoding="utf-8"))
    chosen = json.loads((data / "pid_splits.json").read_text(encoding="utf-8"))["test"]
    kept = ("question", "choices", "answer", "hint", "task", "grade", "subject", "topic",
            "category", "skill", "lecture", "solution")  # fmt: skip
    rows: Rows = []
    for number in chosen:
        problem = problems[number]
        picture = problem["image"] and data / "images" / "test" / number / problem["image"]
        rows.append(
            {key: problem[key] for key in kept} | {"image": _picture(picture) if picture else None}
        )
    with_picture = [row for row in rows if row["image"] is not None]
    return {"ScienceQA-IMG": with_picture, "ScienceQA-FULL": rows}


def _textvqa(data: Path) -> dict[str, Rows]:
    def records(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((data / name).read_text(encoding="utf-8"))["data"]
        return found

    tokens = {
        row["image_id"]: row["ocr_tokens"] for row in records("TextVQA_Rosetta_OCR_v0.2_val.json")
    }
    return {
        "default": [
            {
                "image_id": row["image_id"],
                "question_id": row["question_id"],
                "question": row["question"],
                "answers": row["answers"],
                "image": _picture(data / "train_images" / f"{row['image_id']}.jpg"),
                "ocr_tokens": tokens[row["image_id"]],
            }
            for row in records("TextVQA_0.5.1_val.json")
        ]
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _picture(path: Path) -> dict[str, Any]:
    """A picture's cell, as the hub has it: the file's bytes and its name."""
    return {"bytes": path.read_bytes(), "path": path.name}


def _columns(texts: Sequence[str], **others: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {**dict.fromkeys(texts, TEXT), **others}


FORMS: Mapping[
    str, tuple[str, str, Mapping[str, Mapping[str, Any]], Callable[[Path], dict[str, Rows]]]
] = {
    "POPE": (
        "pope",
        "test",
        _columns(
            ("id", "question_id", "question", "answer", "image_source", "category"), image=PICTURE
        ),
        _pope,
    ),
    "ScienceQA": (
        "scienceqa",
        "test",
        _columns(
            ("question", "hint", "task", "grade", "subject", "topic", "category", "skill",
             "lecture", "solution"),
            image=PICTURE, choices=TEXTS, answer=NUMBER,
        ),
        _scienceqa,
    ),
    "textvqa": (
        "textvqa",
        "validation",
        _columns(
            ("image_id", "question"), question_id=NUMBER, answers=TEXTS, image=PICTURE,
            ocr_tokens=TEXTS,
        ),
        _textvqa,
    ),
}  # fmt: skip
"""The hub's name -> folder and split of the files, columns, and the rows of each configuration."""
