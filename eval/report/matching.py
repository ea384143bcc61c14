"""Whether runs may be compared, and on which questions: the same words about the same truth and the same picture.

What two runs answered can only be paired where they were asked the same. So questions with one id and other data or
other words are refused, with what differs and what to do; questions that only one run has are named and left out.
Scores need no such look: all runs are scored here, by one rule. Knows run directories' contents; no statistics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.sweep.checked import RunError
from vllm_flow.eval.sweep.resuming import preparations
from vllm_flow.eval.tasks.base import Item, Task
from vllm_flow.eval.tasks.pictures import image_file
from vllm_flow.eval.tasks.reading import brief, few
from vllm_flow.outputs import real

NOT_SETTINGS = ("tasks", "policies", "sessions", "version", "created", "command", "data", "engines", "limit",
                "tolerance", "versions", "image_preparation")  # fmt: skip
"""Of `run.json`, what no answer depends on, what the questions themselves show, and what is told part by part."""
SHORT = 12
"""Hexadecimal digits of a digest that a sentence names."""
DATA = "Ask both runs of one copy of the data: give the same --data to `vllm-flow eval` for both, and a new --out"
Files = dict[tuple[str | None, str | None], bool | None]
"""Two pictures of one question -> whether their files have the same bytes, None where that cannot be seen."""
PROMPTS = "Ask both with the same --prompts, by one version of vllm-flow, into a new --out"


@dataclass(frozen=True)
class Side:
    """One of the runs compared, as read from its directory."""

    label: str
    """What the comparison calls it: the end of its path that no other run has."""
    path: Path
    meta: Mapping[str, Any]
    items: Mapping[str, Sequence[Item]]
    tasks: Mapping[str, Task]
    answers: Sequence[Mapping[str, Any]]
    unread: Mapping[str, str] = field(default_factory=dict)
    """Tasks that cannot be had, with the reason."""

    @property
    def policies(self) -> list[str]:
        """Its policies' names in their order, those that only answers name last."""
        listed = [policy["name"] for policy in self.meta.get("policies", [])]
        return list(dict.fromkeys([*listed, *sorted({row["policy"] for row in self.answers})]))


@dataclass(frozen=True)
class Questions:
    """The questions of one task that two runs share, and those that they do not."""

    items: tuple[Item, ...]
    """In the order of the reference; a picture is named where its file is."""
    only_reference: tuple[str, ...]
    only_other: tuple[str, ...]
    unseen: int = 0
    """Of `items`, those whose pictures' bytes could not be compared, since a file is not on this machine."""


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, all of one depth.

    Raises:
        RunError: two paths are one directory.
    """
    parts = [real(path).parts for path in paths]
    for index, own in enumerate(parts):
        if own in parts[:index]:
            raise RunError(f"{paths[index]} is given twice; name different runs.")
    for depth in range(1, max(map(len, parts)) + 1):
        tails = ["/".join(own[-depth:]).replace("//", "/") for own in parts]
        if len(set(tails)) == len(tails):
            break
    return tails


def digest(items: Iterable[Item]) -> str:
    """SHA-256 of questions as they were asked: ids, words, truths, groups and pictures' names, in the order of ids."""
    value = hashlib.sha256()
    for item in sorted(items, key=lambda one: one.id):
        line = (item.id, item.text, dict(item.truth), item.group, item.image is None)
        value.update(json.dumps(line, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return value.hexdigest()


def shared_questions(reference: Side, other: Side) -> dict[str, Questions]:
    """Per task that both runs have, what of it can be paired.

    Raises:
        RunError: there is no such task, or no question; or a question has one id and is not the same in both.
    """
    common = [task for task in reference.items if task in other.items]
    if not common:
        raise RunError(_no_task(reference, other))
    found = {}
    for task in common:
        theirs = {item.id: item for item in other.items[task]}
        ours = {item.id for item in reference.items[task]}
        pairs = [(i, theirs[i.id]) for i in reference.items[task] if i.id in theirs]
        _refuse_others(task, pairs, reference, other)
        files: Files = {
            (a.image, b.image): _same_picture(a.image, b.image)
            for a, b in pairs
            if a.image is not None and b.image is not None
        }
        _refuse_pictures(task, pairs, files, reference, other)
        found[task] = Questions(
            tuple(_with_picture(a, b) for a, b in pairs),
            tuple(i.id for i in reference.items[task] if i.id not in theirs),
            tuple(name for name in theirs if name not in ours),
            sum(files.get((a.image, b.image), True) is None for a, b in pairs),
        )
    if not any(one.items for one in found.values()):
        told = "; ".join(
            f"{task}: {few(one.only_reference, 2)} there, {few(one.only_other, 2)} here"
            for task, one in found.items()
        )
        raise RunError(
            f"{reference.label} and {other.label} have no question in common ({told}). {DATA}, with the same --seed."
        )
    return found


def _no_task(reference: Side, other: Side) -> str:
    a, b = (sorted({*side.items, *side.unread}) for side in (reference, other))
    text = (
        f"{reference.label} and {other.label} have no task in common that can be read here: {', '.join(a) or 'none'}, "
        f"and {', '.join(b) or 'none'}"
    )
    stems = {name.partition("-")[0] for name in a} & {name.partition("-")[0] for name in b}
    if stems and not set(a) & set(b):
        text += f" (variants of {', '.join(sorted(stems))} differ in their prompts or in how they are scored)"
    unread = [f"{task}: {why}" for side in (reference, other) for task, why in side.unread.items()]
    if unread:
        text += f"; {few(unread, 2)}"
    return f"{text}. Ask both with the same --tasks."


def _refuse_others(
    task: str, pairs: Sequence[tuple[Item, Item]], reference: Side, other: Side
) -> None:
    """RunError where questions of one id are not the same, data before words."""
    names = f"{task}: {reference.label} and {other.label}"
    of = counted(len(pairs), "common question")
    data = [(a, b) for a, b in pairs if _data_of(a) != _data_of(b)]
    if data:
        a, b = data[0]
        sums = ", ".join(digest(item[at] for item in pairs)[:SHORT] for at in (0, 1))
        raise RunError(
            f"{names} were asked different data: {len(data)} of {of} differ, first {a.id}: {_differing(a, b)} "
            f"(SHA-256 of these questions: {sums}). {DATA}."
        )
    words = [(a, b) for a, b in pairs if a.text != b.text]
    if words:
        a, b = words[0]
        styles = [side.meta.get("prompts", "llava") for side in (reference, other)]
        why = f"--prompts {styles[0]} there, {styles[1]} here; " if styles[0] != styles[1] else ""
        raise RunError(
            f"{names} were asked in different words: {len(words)} of {of}, first {a.id}: {why}"
            f"{_apart(a.text, b.text)}. {PROMPTS}."
        )


def _data_of(item: Item) -> dict[str, Any]:
    """What of a question is data and not wording."""
    return {
        **item.truth,
        "its group": item.group,
        "whether it has a picture": item.image is not None,
    }


def _differing(a: Item, b: Item) -> str:
    ours, theirs = _data_of(a), _data_of(b)
    name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
    return f"{name} is {brief(ours.get(name))} there, {brief(theirs.get(name))} here"


def _apart(a: str, b: str) -> str:
    """Two texts from a little before they part."""
    same = next((at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
    start = max((min(len(a), len(b)) if same is None else same) - 12, 0)
    lead = "..." if start else ""
    return f"{brief(lead + a[start:])} there, {brief(lead + b[start:])} here"


def _same_picture(ours: str, theirs: str) -> bool | None:
    """Whether two picture files have the same bytes; None where one is not on this machine.

    A picture inside a file of many (parquet, base64) is known by the digest in its question's truth.
    """
    a, b = image_file(ours), image_file(theirs)
    if real(a) == real(b) or str(a) != ours or str(b) != theirs:
        return True
    try:
        return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()
    except OSError:
        return None


def _refuse_pictures(
    task: str,
    pairs: Sequence[tuple[Item, Item]],
    files: Files,
    reference: Side,
    other: Side,
) -> None:
    strange = [(a, b) for a, b in pairs if files.get((a.image, b.image)) is False]
    if strange:
        a, b = strange[0]
        raise RunError(
            f"{task}: {reference.label} and {other.label} were asked about different pictures: the files of "
            f"{len(strange)} of {counted(len(pairs), 'common question')} have other bytes, first {a.id}: {a.image} "
            f"there, {b.image} here. {DATA}."
        )


def _with_picture(ours: Item, theirs: Item) -> Item:
    """The reference's question, with the other run's picture where its own is not on this machine."""
    if ours.image and theirs.image and not image_file(ours.image).exists():
        return replace(ours, image=theirs.image)
    return ours


def settings_that_differ(metas: Sequence[Mapping[str, Any]]) -> dict[str, tuple[object, ...]]:
    """What of several `run.json` is not the same in all, versions one by one; None where a run does not say."""
    prepared = [preparations(meta) for meta in metas]
    everywhere = [task for task in prepared[0] if all(task in one for one in prepared)]
    flat = [
        {
            **{name: value for name, value in meta.items() if name not in NOT_SETTINGS},
            **{f"pictures of {task}": own[task] for task in everywhere},
            **{f"version of {name}": value for name, value in meta.get("versions", {}).items()},
        }
        for meta, own in zip(metas, prepared, strict=True)
    ]
    names = dict.fromkeys(name for one in flat for name in one)
    values = {name: tuple(one.get(name) for one in flat) for name in names}
    return {name: own for name, own in values.items() if any(one != own[0] for one in own)}
