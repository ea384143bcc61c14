"""What a profile found, as plain data: a median with its spread, an ideal, and the ratio between. (pure)"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_flow.eval.statistics.intervals import Interval, median
from vllm_flow.outputs import write_text


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError without a value."""
        found = [float(value) for value in values]
        if not found:
            raise ValueError("no value to summarise")
        return cls(statistics.median(found), min(found), max(found), len(found))

    def over(self, ideal: float) -> float:
        """The median's share of its ideal."""
        return self.median / ideal


@dataclass(frozen=True)
class Ratio(Spread):
    """Ratios taken within a round each, and how far rounds like these leave their median open."""

    interval: Interval | None = None
    """95 % confidence interval of the median; None for fewer than ``LEAST_ROUNDS``."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Ratio:
        """Raises ValueError without a value."""
        found = [float(value) for value in values]
        return cls(**asdict(Spread.of(found)), interval=median(found))


LEAST_ROUNDS = 6
"""With fewer no two of the rounds enclose the median with 95 % confidence: see
:func:`vllm_flow.eval.statistics.intervals.median`."""


def ratios(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """base / other round by round, so that a slow moment of the machine hits both.

    Raises:
        ValueError: not one value of each per round.
    """
    return Ratio.of(b / o for b, o in zip(base, other, strict=True))


@dataclass(frozen=True)
class Prefill:
    """One batch up to its first tokens, vision features cached. Seconds; ratios are stock's over the system's."""

    system: str
    batch: int
    seconds: Spread
    speedup: Ratio
    ideal_rows: float
    """Rows times layers, of the last one with image rows their keys and values alone: see
    :func:`vllm_flow.profile.ideal.row_count_ideal`."""
    ideal_whole: float
    """The same where that layer runs whole."""
    ideal_flops: float
    """As ``ideal_rows``, with the quadratic part of attention and the output head."""
    ranking: Spread | None = None
    """Share of the time in which tokens are ranked (:func:`vllm_flow.profile.watching.ranking_clock`); None where
    nothing is."""


@dataclass(frozen=True)
class Load:
    """A closed load at one concurrency, cold vision tower. Latencies in ms."""

    system: str
    concurrency: int
    requests: int
    requests_per_s: Spread
    ratio: Ratio
    """Requests/s over stock's."""
    ideal_ratio: float
    """Amdahl's: stock's own time, its prefill shrunk by the FLOP ratio, its decode by the bytes'."""
    ttft_ms: Spread
    """Median of a run's requests, as ``tpot_ms`` is."""
    ttft_p99_ms: Spread
    tpot_ms: Spread
    good_share: Spread
    """Share of the requests within the limits."""
    peak_blocks: int
    peak_kv_mib: float
    ideal_kv_mib: float
    """What the requests alive at once hold at their ends, by the shapes, without block rounding."""
    blocks_each: tuple[int, ...]
    blocks_predicted: tuple[int, ...]
    blocks_exact: bool
    """Every request held in every storage group exactly what was predicted."""
    host_share: Spread
    """(Scheduler + step plan) / step time."""
    schedule_ms: Spread
    """Scheduler time per step."""
    plan_ms: Spread
    """Step plan and its attention metadata per step."""


@dataclass(frozen=True)
class Capacity:
    """Requests that run at once in the same pool, when far more are waiting."""

    system: str
    pool_mib: float
    running: int
    ideal: int
    ratio: float
    """Over stock's."""
    ideal_ratio: float


@dataclass(frozen=True)
class Decode:
    """Decode steps of one batch, by context."""

    system: str
    image_tokens: int
    batch: int
    step_ms: Spread
    speedup: Ratio
    ideal_bytes: float
    """Ratio of the bytes a step reads."""


@dataclass(frozen=True)
class Results:
    """One run of ``vllm-flow profile``."""

    command: str
    created: str
    model: str
    shape: dict[str, Any]
    workload: dict[str, Any]
    engine: dict[str, Any]
    limits: dict[str, Any]
    prefill: tuple[Prefill, ...] = ()
    load: tuple[Load, ...] = ()
    capacity: tuple[Capacity, ...] = ()
    decode: tuple[Decode, ...] = ()
    peers: tuple[Any, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def write(self, directory: Path) -> Path:
        """Write ``profile.json``; return its path."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        return write_text(directory / "profile.json", text)
