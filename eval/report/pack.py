"""`vllm-flow report --pack`: what a paper's appendix needs of a run, in one folder.

    settings.json   what the run was made with: command, settings, versions, hardware, sessions; the report's options
    questions.jsonl every question asked, as it was asked, with its truth
    items.csv       every answer under every policy, with its score; scores.csv, savings.csv, errors.csv beside it
    data.sha256     checksums of the data files and of the pictures asked about, as `sha256sum -c` reads them
    README.md       what is here, and the command that makes the run again
    pack.sha256     checksums of the files above

Pictures are not copied: licences differ. What of the data is not there any more is named in README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.report.results import Options, Summary
from vllm_flow.eval.report.tables import write_tables
from vllm_flow.eval.tasks.base import Item
from vllm_flow.eval.tasks.pictures import image_file
from vllm_flow.outputs import write_text

LABELS = {".csv", ".json", ".jsonl", ".p", ".parquet", ".tsv", ".txt"}
"""Endings of data files; every file with one in a task's folder is taken for a part of the data."""
BLOCK = 1 << 20


def write_pack(
    folder: Path,
    meta: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    summary: Summary,
    answers: Sequence[Mapping[str, Any]],
    options: Options,
) -> list[Path]:
    """Write the pack into `folder`; its files."""
    files = [folder / "settings.json", folder / "questions.jsonl"]
    settings = {"run": dict(meta), "report": asdict(options)}
    write_text(files[0], json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    write_text(files[1], "".join(f"{line}\n" for line in question_lines(items)))
    files += write_tables(summary, answers, folder).values()
    data = Path(str(meta.get("data", "")))
    found, missing = checksums(data_files(data, items), data)
    files.append(folder / "data.sha256")
    write_text(files[-1], "".join(f"{value}  {name}\n" for name, value in found.items()))
    files.append(folder / "README.md")
    write_text(files[-1], readme(meta, summary, found, missing))
    own, _ = checksums(files, folder)
    files.append(folder / "pack.sha256")
    write_text(files[-1], "".join(f"{value}  {name}\n" for name, value in own.items()))
    return files


def question_lines(items: Mapping[str, Sequence[Item]]) -> Iterable[str]:
    """A JSON object per question."""
    for task, questions in items.items():
        for item in questions:
            record = {"task": task, **asdict(item), "picture": item.picture_of}
            yield json.dumps(record, ensure_ascii=False, sort_keys=True)


def data_files(data: Path, items: Mapping[str, Sequence[Item]]) -> list[Path]:
    """The files behind the questions: a task folder's data files, and the pictures asked about."""
    found: set[Path] = set()
    for task, questions in items.items():
        for name in dict.fromkeys((task, task.partition("-")[0])):
            folder = data / name
            if folder.is_dir():
                found |= {p for p in folder.rglob("*") if p.suffix in LABELS and p.is_file()}
                break
        else:
            found.add(data / task)  # not there: named as missing
        found |= {image_file(item.image) for item in questions if item.image is not None}
    return sorted(found)


def checksums(files: Iterable[Path], base: Path) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of files by their path from `base`, and the names of those that cannot be read."""
    found, missing = {}, []
    for path in files:
        inside = os.path.relpath(path, base)
        name = str(path) if inside.startswith(os.pardir) else inside
        try:
            with path.open("rb") as file:
                value = hashlib.sha256()
                while block := file.read(BLOCK):
                    value.update(block)
        except OSError:
            missing.append(name)
        else:
            found[name] = value.hexdigest()
    return found, missing


def commands(meta: Mapping[str, Any]) -> list[str]:
    """The commands that asked, in their order, as a shell takes them."""
    given = [meta.get("command"), *(one.get("command") for one in meta.get("sessions", []))]
    told = [one if isinstance(one, str) else shlex.join(map(str, one)) for one in given if one]
    return list(dict.fromkeys(told))


def readme(
    meta: Mapping[str, Any], summary: Summary, found: Mapping[str, str], missing: Sequence[str]
) -> str:
    """The pack's own description."""
    versions = ", ".join(f"{name} {value}" for name, value in meta.get("versions", {}).items())
    lines = [
        f"# Results of {meta.get('model', 'a model')}",
        "",
        f"Made on {meta.get('hardware', 'hardware that was not recorded')}; {versions or 'no versions recorded'}, by",
        "",
        *(f"    {command}" for command in commands(meta) or ["(a command that was not recorded)"]),
        "",
        "| task | questions | pictures | policies | answers | errors |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for task in summary.tasks:
        answered = sum(result.answered for result in task.policies)
        failed = sum(result.failed for result in task.policies)
        lines.append(
            f"| {task.name} | {task.items} | {task.pictures} | {len(task.policies)} | {answered} | {failed} |"
        )
    lines += [
        "",
        "`settings.json`: everything the answers depend on. `questions.jsonl`: what was asked. `items.csv`: every "
        "answer with its score. `scores.csv`: every number of the report, unrounded.",
        f"`data.sha256`: {counted(len(found), 'data file')} and pictures, by their paths from the folder of the data; "
        "`pack.sha256`: the files here. To check both, in this folder:",
        "",
        "    sha256sum -c pack.sha256",
        f'    list=$PWD/data.sha256; (cd {shlex.quote(str(meta.get("data", "DATA")))} && sha256sum -c "$list")',
    ]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if missing[10:] else "")
        lines += [
            "",
            f"Not there any more when this was written, and so without a checksum: {shown}.",
        ]
    return "\n".join(lines) + "\n"
