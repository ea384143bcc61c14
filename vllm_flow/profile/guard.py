"""Says where a profile shows a gross regression: by ratio, with margins that a busy machine does not use up. (pure)

Not a measurement: half of an ideal is no goal. It catches what turns the savings into their opposite, such as
rows that are computed after all, or a copy per layer.
"""

from __future__ import annotations

from vllm_flow.counts import counted
from vllm_flow.profile.findings import Results

MARGIN = 0.5
"""Least share of the ideal ratio that a median may reach."""


def regressions(results: Results) -> list[str]:
    """A sentence per figure that is grossly below its ideal, or a count that is not what was predicted."""
    found = []

    def check(what: str, reached: float, ideal: float) -> None:
        if reached < MARGIN * ideal:
            found.append(
                f"{what}: {reached:.2f} of stock, less than {MARGIN:g} of the ideal {ideal:.2f}"
            )

    for prefill in results.prefill:
        check(f"prefill, {prefill.system}", prefill.speedup.median, prefill.ideal_rows)
    for load in results.load:
        check(
            f"load, {load.concurrency} at once, {load.system}", load.ratio.median, load.ideal_ratio
        )
        if not load.blocks_exact:
            found.append(
                f"load, {load.concurrency} at once, {load.system}: KV blocks {load.blocks_each}, "
                f"predicted {load.blocks_predicted}"
            )
    for capacity in results.capacity:
        if capacity.running != capacity.ideal:
            found.append(
                f"capacity, {capacity.system}: {counted(capacity.running, 'request')} at once, "
                f"predicted {capacity.ideal}"
            )
    for decode in results.decode:
        # Of a small model's step the host's part is large; what counts is that it is not lost.
        check(f"decode, {decode.image_tokens} image tokens, {decode.system}",
              decode.speedup.median, 1.0)  # fmt: skip
    return found
