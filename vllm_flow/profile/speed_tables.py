"""The profile as tables for a terminal or a Markdown file; every figure beside its ideal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.table import Table

from vllm_flow.counts import counted
from vllm_flow.profile.findings import LEAST_ROUNDS, Ratio, Results, Spread


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}"


def spread(value: Spread, digits: int = 2) -> str:
    """Median and range; the range is left out of a single round."""
    text = f"{value.median:.{digits}f}"
    if value.rounds > 1:
        text += f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return text


CI = "95 % CI"
"""The column beside each ratio to stock."""


def interval(value: Ratio) -> str:
    """Of a median ratio, a digit finer than the ratio: what is asked for is often 0.99."""
    if value.interval is None:
        return "none"
    return f"{value.interval.low:.3f} to {value.interval.high:.3f}"


def interval_note(rounds: int) -> str:
    """What the columns of intervals say, and what they need where there were too few rounds."""
    what = f"{CI}: of the median ratio, by order statistics, whatever the distribution"
    if rounds < LEAST_ROUNDS:
        few = counted(rounds, "round allows", "rounds allow")
        return f"{what}; {few} none, --rounds {LEAST_ROUNDS} is the fewest that do."
    return f"{what}; of {rounds} rounds."


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def _percent(value: Spread) -> str:
    return spread(Spread(100 * value.median, 100 * value.low, 100 * value.high, value.rounds), 1)


def tables(results: Results, part: str) -> list[Table]:
    """The tables of one part of the profile: a field of :class:`Results` that holds measurements."""
    return [make(results) for make in _MAKERS[part]]


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, box=box.MARKDOWN, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _prefill(results: Results) -> Table:
    batch = results.prefill[0].batch
    table = _table(
        f"Prefill, batch of {batch}, vision features cached",
        (
            *("system", "seconds", "× stock", CI, "rows ideal", "reached", "FLOP ideal", "reached"),
            "whole layers",
            "ranking, %",
        ),
    )
    for row in results.prefill:
        table.add_row(
            row.system,
            spread(row.seconds),
            spread(row.speedup),
            interval(row.speedup),
            times(row.ideal_rows),
            times(row.speedup.over(row.ideal_rows)),
            times(row.ideal_flops),
            times(row.speedup.over(row.ideal_flops)),
            times(row.ideal_whole),
            "" if row.ranking is None else _percent(row.ranking),
        )
    return table


def _load(results: Results) -> Table:
    table = _table(
        "Closed load, vision tower included",
        (
            "system",
            "at once",
            "requests/s",
            "× stock",
            CI,
            "ideal",
            "reached",
            "TTFT ms",
            "p99",
            "TPOT ms",
            "good",
        ),
    )
    for row in results.load:
        table.add_row(
            row.system,
            str(row.concurrency),
            spread(row.requests_per_s),
            spread(row.ratio),
            interval(row.ratio),
            times(row.ideal_ratio),
            times(row.ratio.over(row.ideal_ratio)),
            spread(row.ttft_ms, 0),
            spread(row.ttft_p99_ms, 0),
            spread(row.tpot_ms, 1),
            share(row.good_share.median),
        )
    return table


def _memory(results: Results) -> Table:
    table = _table(
        "The same load: KV blocks and host time",
        (
            "system",
            "at once",
            "blocks each",
            "predicted",
            "exact",
            "peak blocks",
            "peak MiB",
            "ideal MiB",
            "scheduler ms",
            "plan ms",
            "share of step",
        ),
    )
    for row in results.load:
        table.add_row(
            row.system,
            str(row.concurrency),
            str(sum(row.blocks_each)),
            str(sum(row.blocks_predicted)),
            "yes" if row.blocks_exact else "NO",
            str(row.peak_blocks),
            f"{row.peak_kv_mib:.0f}",
            f"{row.ideal_kv_mib:.0f}",
            spread(row.schedule_ms),
            spread(row.plan_ms),
            share(row.host_share.median),
        )
    return table


def _groups(results: Results) -> Table:
    """Blocks by storage group, of the first load: the same under all of them."""
    rows = [row for row in results.load if row.concurrency == results.load[0].concurrency]
    names = [f"group {n}" for n in range(max(len(row.blocks_each) for row in rows))]
    table = _table("KV blocks of a request, by storage group: held (predicted)", ("system", *names))
    for row in rows:
        pairs = zip(row.blocks_each, row.blocks_predicted, strict=True)
        table.add_row(row.system, *(f"{held} ({wanted})" for held, wanted in pairs))
    return table


def _capacity(results: Results) -> Table:
    table = _table(
        f"Requests at once in a pool of {results.capacity[0].pool_mib:.0f} MiB",
        ("system", "running", "ideal", "reached", "× stock", "ideal × (bytes)", "reached"),
    )
    for row in results.capacity:
        table.add_row(
            row.system,
            str(row.running),
            str(row.ideal),
            times(row.running / row.ideal),
            times(row.ratio),
            times(row.ideal_ratio),
            times(row.ratio / row.ideal_ratio),
        )
    return table


def _decode(results: Results) -> Table:
    table = _table(
        "Decode steps",
        ("system", "image tokens", "batch", "step ms", "× stock", CI, "ideal (bytes)", "reached"),
    )
    for row in results.decode:
        table.add_row(
            row.system,
            str(row.image_tokens),
            str(row.batch),
            spread(row.step_ms, 1),
            spread(row.speedup),
            interval(row.speedup),
            times(row.ideal_bytes),
            times(row.speedup.over(row.ideal_bytes)),
        )
    return table


def _peers(results: Results) -> Table:
    table = _table(
        "Peers on the same weights and threads, vision tower left out",
        (
            "system",
            "batch",
            "rows × layers",
            "prefill tokens/s",
            "× unpruned",
            CI,
            "ideal (rows)",
            "decode tokens/s",
            "KV MiB",
            "same outputs",
        ),
    )
    for row in results.peers:
        same = "own" if row.same_as is None else f"{share(row.same_tokens)} of {row.same_as}"
        if row.name.endswith(", none"):
            same = "reference"
        table.add_row(
            row.name,
            str(row.batch),
            share(row.row_share),
            spread(row.prefill_per_s, 0),
            spread(row.prefill_speedup),
            interval(row.prefill_speedup),
            times(1 / row.row_share),
            spread(row.decode_per_s, 1),
            f"{row.kv_mib:.0f}",
            same,
        )
    return table


_MAKERS: dict[str, tuple[Callable[[Results], Table], ...]] = {
    "prefill": (_prefill,),
    "load": (_load, _memory, _groups),
    "capacity": (_capacity,),
    "decode": (_decode,),
    "peers": (_peers,),
}
