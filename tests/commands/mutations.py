"""Spoils valid files: bytes, encodings, numbers, nesting, types of values, kinds of files.

Everything is drawn from a `random.Random`, so that a seed repeats it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 2**63, 1.5, float("nan"), float("inf"), "", "x", "²", "٣", "\ud800", "\x00",
    "a" * 5000, "../../..", "/dev/null", [], {}, [[]], {"a": 1}, [None], "9" * 30,
)  # fmt: skip
HUGE = (b"9" * 5000, b"1e999", b"-0", b"NaN", b"Infinity", b"18446744073709551616")


def flipped(data: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        if spoilt:
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    return bytes(spoilt)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def doubled(data: bytes, rng: random.Random) -> bytes:
    return data * 2


def spliced(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:]


def inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    some = (b"\x00", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 20_000, b"\n" * 50, b'"', b"," * 9)
    return data[:at] + rng.choice(some) + data[at:]


def recoded(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("latin-1") + rng.choice(("", "é", "\u2028"))
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037", "utf-7")), "replace")


def numbers(data: bytes, rng: random.Random) -> bytes:
    """A run of digits becomes another number."""
    starts = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not starts:
        return data + rng.choice(HUGE)
    start = end = rng.choice(starts)
    while end < len(data) and chr(data[end]) in "0123456789":
        end += 1
    return data[:start] + rng.choice(HUGE) + data[end:]


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def retyped(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file, or of a line of it, becomes another, disappears or moves."""
    lines = data.split(b"\n")
    at = 0 if len(lines) < 2 else rng.randrange(len(lines) - 1)
    for part in (data, lines[at]):
        try:
            value = json.loads(part)
        except ValueError:
            continue
        text = json.dumps(altered(value, rng)).encode()
        return text if part is data else b"\n".join([*lines[:at], text, *lines[at + 1 :]])
    return flipped(data, rng)


def altered(value: Any, rng: random.Random) -> Any:
    """A JSON value with one node of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: altered(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], altered(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD_VALUES)


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flipped, truncated, doubled, spliced, inserted, recoded, numbers, empty, retyped, retyped, retyped, flipped,
)  # fmt: skip


def spoil_table(path: Path, rng: random.Random) -> str:
    """A column of a Parquet file is dropped, emptied, or of another type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    at = table.column_names.index(name)
    what = rng.choice(("dropped", "null", "no rows", "text", "numbers", "lists", "twice", "nan"))
    fill = {
        "null": [None], "text": ["x" * 50], "numbers": [2**62], "lists": [[1, 2]], "nan": [float("nan")],
    }  # fmt: skip
    if what == "dropped":
        table = table.drop_columns([name])
    elif what == "no rows":
        table = table.slice(0, 0)
    elif what == "twice":
        table = pa.concat_tables([table, table])
    else:
        table = table.set_column(at, name, pa.array(fill[what] * table.num_rows))
    pq.write_table(table, path)
    return f"{name}: {what}"


def spoil_arrays(path: Path, rng: random.Random) -> str:
    """An array of an NPZ file is dropped, or of another shape or type."""
    import numpy as np

    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    what = rng.choice(("dropped", "empty", "scalar", "text", "nan", "flat", "huge"))
    if what != "dropped":
        arrays[name] = {
            "empty": array[..., :0] if array.ndim else np.zeros(0),
            "scalar": np.asarray(3.5),
            "text": np.asarray(["x", "y"]),
            "nan": np.full(array.shape, np.nan),
            "flat": array.reshape(-1),
            "huge": np.full(array.shape, 1e300),
        }[what]
    np.savez(path, **arrays)
    return f"{name}: {what}"


KINDS_OF_FILES = ("missing", "folder", "device", "pipe", "loop", "unreadable", "link")


def replace_kind(path: Path, kind: str) -> threading.Thread | None:
    """Put something else in the place of a file: the writer into a pipe, if it is one."""
    data = path.read_bytes()
    if kind == "unreadable":
        path.chmod(0)
        return None
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link":
        path.symlink_to("/nowhere/at/all")
    elif kind == "pipe":
        os.mkfifo(path)
        writer = threading.Thread(target=feed, args=(path, data), daemon=True)
        writer.start()
        return writer
    return None


def feed(path: Path, data: bytes) -> None:
    """Write into a pipe for whoever reads it first, if anybody does."""
    with contextlib.suppress(OSError), path.open("wb") as pipe:
        pipe.write(data)


def release(path: Path) -> None:
    """Let the writer into a pipe end where nobody read it."""
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def spoil(path: Path, rng: random.Random) -> str:
    """Spoil a file in place; what was done."""
    if rng.random() < 0.6 and path.suffix in (".parquet", ".npz"):
        try:
            return (spoil_table if path.suffix == ".parquet" else spoil_arrays)(path, rng)
        except Exception as error:  # some combinations cannot be written
            return f"nothing ({error})"
    if rng.random() < 0.15:
        kind = rng.choice(KINDS_OF_FILES)
        replace_kind(path, kind)
        return kind
    mutation = rng.choice(BYTES)
    path.write_bytes(mutation(path.read_bytes(), rng))
    return mutation.__name__


def fresh_copy(source: Path, target: Path) -> None:
    """`target` becomes a copy of the folder `source`, whatever it was."""
    if target.exists():
        for path in target.rglob("*"):
            if path.is_fifo():
                release(path)
        shutil.rmtree(target)
    shutil.copytree(source, target)
