"""What each policy saved: prefill rows, KV blocks, seconds, against the baseline on the same items. (pure)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Named(Protocol):
    """Anything with a policy's name and kind."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Saving:
    """A policy's requests, over all tasks. None where the run did not record what is needed."""

    policy: str
    requests: int
    """Answered ones."""
    prefill_share: float | None
    """Prefill rows (prompt tokens x layers) computed, of those the baseline computes for the same
    items; needs the baseline's answers."""
    kv_share: float | None
    """KV blocks held when requests ended, of those the same requests hold without the policy."""
    kv_bytes_saved: float | None
    """Mean per request."""
    seconds: float | None
    """Mean per request, from its first step to its last token. Steps are shared with the other
    requests of a batch, so this is no measure of speed."""
    image_tokens: float | None
    """Mean per request, as prefilled."""


def savings(
    policies: Sequence[Named], answers: Sequence[Mapping[str, Any]], num_layers: int | None
) -> tuple[Saving, ...]:
    """One `Saving` per policy that has answers, in the policies' order."""
    baselines = {policy.name for policy in policies if policy.kind == "baseline"}
    rows: dict[str, list[Mapping[str, Any]]] = {}
    full: dict[tuple[str, str], int] = {}
    for row in answers:
        if row["answer"] is None:
            continue
        rows.setdefault(row["policy"], []).append(row)
        if row["policy"] in baselines and row.get("prompt_tokens"):
            full[row["task"], row["item_id"]] = row["prompt_tokens"]
    return tuple(
        _saving(policy.name, rows[policy.name], full, num_layers)
        for policy in policies
        if policy.name in rows
    )


def _saving(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    full: Mapping[tuple[str, str], int],
    num_layers: int | None,
) -> Saving:
    prefill = None
    pairs = [
        (row["prefill_rows_saved"], full[row["task"], row["item_id"]])
        for row in rows
        if row.get("prefill_rows_saved") is not None and (row["task"], row["item_id"]) in full
    ]
    if pairs and num_layers:
        prefill = 1 - sum(saved for saved, _ in pairs) / (num_layers * sum(n for _, n in pairs))
    blocks = [
        (row["kv_blocks"], row["kv_blocks_baseline"])
        for row in rows
        if row.get("kv_blocks") is not None and row.get("kv_blocks_baseline")
    ]
    kv = sum(b for b, _ in blocks) / sum(n for _, n in blocks) if blocks else None
    return Saving(
        name,
        len(rows),
        prefill,
        kv,
        _mean(rows, "kv_bytes_saved"),
        _mean(rows, "seconds"),
        _mean(rows, "image_tokens"),
    )


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    values = [row[column] for row in rows if row.get(column) is not None]
    return sum(values) / len(values) if values else None
