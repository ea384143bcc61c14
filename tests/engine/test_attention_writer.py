"""The log's writer: what it writes, and that neither a bad disk nor a full one reaches who hands over."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vllm_flow.attention import TokenAttention
from vllm_flow.engine.core.attention import writer as attention_log
from vllm_flow.engine.core.attention.writer import ITEM_BYTES, AttentionLogWriter

LAYERS = 3
GENEROUS = 1 << 30


def token(index: int, images: int = 1, heat: int | None = None) -> TokenAttention:
    rng = np.random.default_rng(index)
    return TokenAttention(
        token=index,
        layers=np.array([0, 2, 5], dtype=np.int32),
        shares=rng.random((LAYERS, 4), dtype=np.float32),
        images=rng.random((LAYERS, images), dtype=np.float32),
        heat=None if heat is None else rng.random((LAYERS, heat), dtype=np.float32),
    )


def test_rows_come_back_as_they_were_handed_over(tmp_path: Path) -> None:
    writer = AttentionLogWriter(tmp_path, GENEROUS)
    handed = [("a", token(0, 2)), ("b", token(0, 0)), ("a", token(1, 2, heat=4))]
    assert all(writer.add(*item) for item in handed)
    assert writer.flush()
    table = pq.read_table(tmp_path / "mass")
    assert table.schema.to_string() == (
        "request_id: string\nlayer: int32\ntoken: int32\nsystem: float\nimage: float\n"
        "user: float\noutput: float\nimages: list<element: float>\n  child 0, element: float"
    )
    rows = iter(table.to_pylist())
    for request_id, item in handed:
        for i, layer in enumerate((0, 2, 5)):
            row = next(rows)
            assert (row["request_id"], row["layer"], row["token"]) == (
                request_id,
                layer,
                item.token,
            )
            shares = [row[name] for name in ("system", "image", "user", "output")]
            assert shares == item.shares[i].tolist()
            assert row["images"] == item.images[i].tolist()
    heat = pq.read_table(tmp_path / "heat")
    assert heat.schema.names == ["request_id", "layer", "token", "heat"]
    assert heat["heat"].to_pylist() == handed[2][1].heat.tolist()
    assert writer.take_dropped() == 0
    writer.close()


def test_parts_rotate_and_nothing_waits_for_ever(tmp_path: Path) -> None:
    size = token(0).nbytes + ITEM_BYTES
    writer = AttentionLogWriter(tmp_path, GENEROUS, part_bytes=3 * size, linger=0.05)
    for index in range(10):
        assert writer.add("a", token(index))
        time.sleep(0.002)
    end = time.monotonic() + 10
    while time.monotonic() < end and pq_rows(tmp_path) < 10 * LAYERS:
        time.sleep(0.02)
    assert pq_rows(tmp_path) == 10 * LAYERS
    parts = sorted((tmp_path / "mass").iterdir())
    assert len(parts) >= 3
    writer.close()


def pq_rows(directory: Path) -> int:
    parts = sorted(directory.glob("mass/*.parquet"))
    return sum(pq.read_metadata(part).num_rows for part in parts)


def test_closing_writes_what_waits(tmp_path: Path) -> None:
    writer = AttentionLogWriter(tmp_path, GENEROUS, linger=1000)
    writer.add("a", token(0))
    writer.close()
    assert pq_rows(tmp_path) == LAYERS
    assert not writer.add("a", token(1))
    assert writer.take_dropped() == LAYERS
    writer.close()


@pytest.mark.parametrize("fail", ["cannot create", "cannot write", "half written"])
def test_a_disk_that_fails_costs_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    warnings: list[Any] = []
    monkeypatch.setattr(attention_log.logger, "warning", lambda *args: warnings.append(args))
    write_table = attention_log.write_table

    def broken(table: Any, path: Path) -> None:
        if fail == "half written":
            write_table(table, path)
        raise OSError(28, "No space left on device")

    blocker = tmp_path / "mass"
    if fail == "cannot create":
        blocker.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(attention_log, "write_table", broken)
    writer = AttentionLogWriter(tmp_path, GENEROUS, linger=0)
    for index in range(3):
        assert writer.add("a", token(index))
        assert writer.flush()
    assert writer.take_dropped() == 3 * LAYERS
    assert writer.take_dropped() == 0
    assert len(warnings) == 1, "said once"
    # The disk recovers, and so does the log; nothing half written is left.
    monkeypatch.setattr(attention_log, "write_table", write_table)
    if fail == "cannot create":
        blocker.unlink()
    assert writer.add("a", token(3)) and writer.flush()
    assert pq_rows(tmp_path) == LAYERS and writer.take_dropped() == 0
    assert [part.suffix for part in (tmp_path / "mass").iterdir()] == [".parquet"]
    writer.close()


def test_a_disk_that_hangs_stalls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    write_table = attention_log.write_table

    def slow(table: Any, path: Path) -> None:
        go.wait(30)
        write_table(table, path)

    monkeypatch.setattr(attention_log, "write_table", slow)
    size = token(0).nbytes + ITEM_BYTES
    writer = AttentionLogWriter(tmp_path, GENEROUS, queue_bytes=4 * size, linger=0)
    start = time.monotonic()
    taken = [writer.add("a", token(index)) for index in range(50)]
    assert time.monotonic() - start < 5
    assert taken == [True] * 4 + [False] * 46
    assert writer.take_dropped() == 46 * LAYERS
    go.set()
    assert writer.flush()
    assert pq_rows(tmp_path) == 4 * LAYERS
    writer.close()


def test_the_log_stops_at_its_limit_and_deletes_nothing(tmp_path: Path) -> None:
    def size() -> int:
        return sum(part.stat().st_size for part in tmp_path.glob("*/*.parquet"))

    first = AttentionLogWriter(tmp_path, GENEROUS)
    first.add("earlier", token(0, heat=4))
    first.close()
    limit = 3 * size()
    writer = AttentionLogWriter(tmp_path, limit, linger=0)
    for index in range(8):
        writer.add("a", token(index, heat=4))
        assert writer.flush()
    assert size() <= limit
    kept = pq.read_table(tmp_path / "mass").to_pylist()
    # Parts of an earlier run count, and stay.
    assert sum(row["request_id"] == "earlier" for row in kept) == LAYERS
    assert LAYERS < len(kept) < 9 * LAYERS
    assert len(kept) + writer.take_dropped() == 9 * LAYERS
    assert not writer.add("a", token(8)), "it has stopped, and does not even try"
    assert pq.read_table(tmp_path / "heat").num_rows == len(kept)
    writer.close()
