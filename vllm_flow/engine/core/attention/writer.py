"""The attention log on disk: one thread that turns answer tokens into Parquet files.

Two folders below the operator's directory, each readable as one data set: ``mass`` (request_id,
layer, token, system, image, user, output, images) and ``heat`` (request_id, layer, token, heat).
Serving never waits for it: what does not fit into the queue, on the disk or below the limit is
dropped and counted. Knows nothing of engines; see ``scheduler.py`` for who feeds it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger

from vllm_flow.attention import TokenAttention
from vllm_flow.outputs import OutputError, check_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm_flow.engine.settings import FlowSettings

logger = init_logger("vllm.vllm_flow.attention_log")

QUEUE_BYTES = 64 << 20
"""Arrays that may wait in memory, those being written included."""
PART_BYTES = 4 << 20
"""Arrays that make a part file full."""
LINGER_SECONDS = 5.0
"""How long a token waits at most for others to share its part file."""
ITEM_BYTES = 1024
"""What a waiting token takes besides its arrays, about."""


def check_log(config: Any, settings: FlowSettings) -> None:
    """Refuse at start-up what the log cannot do; makes the directory.

    Raises:
        ValueError: a sentence that names the obstacle and what to do instead.
    """
    if settings.attention_log is None:
        return
    parallel = config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "the attention log averages over the heads of one worker, and sees the layers of one: "
            "set tensor_parallel_size=1 and pipeline_parallel_size=1, or leave out attention_log."
        )
    if not config.model_config.enforce_eager:
        raise ValueError(
            "the attention log looks into layers while they run, which CUDA graphs and "
            "torch.compile do not allow: pass enforce_eager=True, or leave out attention_log."
        )
    if config.speculative_config is not None:
        raise ValueError(
            "the attention log follows one answer token per step, and drafts are several: leave out "
            "speculative_config, or attention_log."
        )
    if settings.engine.quantised_keys:
        raise ValueError(
            "the attention log reads keys as they were computed, and this KV cache rounds them to "
            "eight bits: leave out kv_cache_dtype, or attention_log."
        )
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            "the attention log is written with pyarrow, which is not installed: "
            "pip install 'vllm-flow[log]', or leave out attention_log."
        )
    try:
        check_folder(Path(settings.attention_log), f"attention_log={settings.attention_log!r}")
    except OutputError as error:
        raise ValueError(f"{error}, or leave it out.") from None
    os.makedirs(settings.attention_log, exist_ok=True)


class AttentionLogWriter:
    """Takes tokens without ever blocking or raising, and writes them from a thread of its own.

    Args:
        directory: where ``mass`` and ``heat`` lie; parts of earlier runs stay and count.
        max_bytes: size of all parts together at which the log stops. Nothing is deleted to make
            room: a measurement that is missing and counted is better than one that vanished.
    """

    def __init__(
        self,
        directory: str | Path,
        max_bytes: int,
        *,
        queue_bytes: int = QUEUE_BYTES,
        part_bytes: int = PART_BYTES,
        linger: float = LINGER_SECONDS,
    ) -> None:
        self._directory = Path(directory)
        self._max_bytes, self._queue_bytes = max_bytes, queue_bytes
        self._part_bytes, self._linger = part_bytes, linger
        self._used = sum(part.stat().st_size for part in self._directory.glob("*/*.parquet"))
        # Sorts by time; two engines may share a directory.
        self._run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}-{id(self):x}"
        self._parts = 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[str, TokenAttention]] = []
        self._bytes = 0  # of what waits and of what is being written
        self._waiting_bytes = 0
        self._dropped = 0
        self._hurry = self._closed = False
        self._full = False
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="vllm-flow-attention", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def add(self, request_id: str, token: TokenAttention) -> bool:
        """Hand one answer token over; False if it was dropped instead."""
        size = token.nbytes + ITEM_BYTES
        with self._changed:
            room = not (self._full or self._closed) and self._bytes + size <= self._queue_bytes
            if not room:
                self._dropped += token.num_rows
            else:
                self._waiting.append((request_id, token))
                self._bytes += size
                self._waiting_bytes += size
                if len(self._waiting) == 1 or self._waiting_bytes >= self._part_bytes:
                    self._changed.notify_all()
        if not room and not self._full:
            self._tell("the disk is too slow for it")
        return room

    def take_dropped(self) -> int:
        """Rows dropped since the last call."""
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until what was handed over is written or dropped; False if time ran out before."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._bytes == 0, timeout)
            self._hurry = False
        return done

    def close(self, timeout: float = 30.0) -> None:
        """Write what waits and end the thread; may be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        atexit.unregister(self.close)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._changed.wait_for(self._due, self._linger)
                tokens, self._waiting = self._waiting, []
                size, self._waiting_bytes = self._waiting_bytes, 0
            if not tokens:
                return
            try:
                self._write(tokens)
            except Exception as error:  # whatever it is, it must not end serving
                self._drop(tokens, f"{type(error).__name__}: {error}")
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()

    def _due(self) -> bool:
        return self._hurry or self._closed or self._waiting_bytes >= self._part_bytes

    def _write(self, tokens: Sequence[tuple[str, TokenAttention]]) -> None:
        tables = {"mass": mass_table(tokens)}
        heated = [(request_id, token) for request_id, token in tokens if token.heat is not None]
        if heated:
            tables["heat"] = heat_table(heated)
        self._parts += 1
        drafts: list[tuple[Path, Path]] = []
        try:
            for folder, table in tables.items():
                part = self._directory / folder / f"{self._run}-{self._parts:06}.parquet"
                drafts.append((part.with_name(f".{part.name}.tmp"), part))
                write_table(table, drafts[-1][0])
            size = sum(draft.stat().st_size for draft, _ in drafts)
            if self._used + size > self._max_bytes:
                self._full = True
                self._drop(tokens, f"attention_log_max_bytes={self._max_bytes} is reached")
                return
            for draft, part in drafts:
                os.replace(draft, part)
            self._used += size
        finally:
            for draft, _ in drafts:
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)

    def _drop(self, tokens: Sequence[tuple[str, TokenAttention]], reason: str) -> None:
        with self._changed:
            self._dropped += sum(token.num_rows for _, token in tokens)
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if reason not in self._told and len(self._told) < 10:
            self._told.add(reason)
            logger.warning(
                "The attention log in %s drops rows: %s. Serving goes on; dropped rows are counted "
                "in vllm_flow:attention_rows_dropped_total. Said once.",
                self._directory,
                reason,
            )


def write_table(table: pa.Table, path: Path) -> None:
    """Write one file, in a folder that may not be there yet."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def mass_table(tokens: Sequence[tuple[str, TokenAttention]]) -> pa.Table:
    """One row per token and layer: how its attention is shared out, and each image's part."""
    import pyarrow as pa

    shares = np.concatenate([token.shares for _, token in tokens])
    columns = {name: shares[:, i] for i, name in enumerate(("system", "image", "user", "output"))}
    images = _lists([token.images for _, token in tokens])
    return pa.table({**_keys(tokens), **columns, "images": images})


def heat_table(tokens: Sequence[tuple[str, TokenAttention]]) -> pa.Table:
    """One row per token and layer: the part of every image token."""
    import pyarrow as pa

    return pa.table({**_keys(tokens), "heat": _lists([token.heat for _, token in tokens])})


def _keys(tokens: Sequence[tuple[str, TokenAttention]]) -> dict[str, Any]:
    rows = [token.num_rows for _, token in tokens]
    return {
        "request_id": np.repeat([request_id for request_id, _ in tokens], rows),
        "layer": np.concatenate([token.layers for _, token in tokens]).astype(np.int32),
        "token": np.repeat([token.token for _, token in tokens], rows).astype(np.int32),
    }


def _lists(blocks: Sequence[Any]) -> pa.ListArray:
    """Rows of matrices of different widths as one column of lists."""
    import pyarrow as pa

    widths = np.concatenate([np.full(len(block), block.shape[1]) for block in blocks])
    values = np.concatenate([block.ravel() for block in blocks]).astype(np.float32)
    offsets = np.concatenate(([0], np.cumsum(widths))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values)
