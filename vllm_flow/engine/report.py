"""Makes the report of a response: what its policy saved, and what its attention log lost.

Seam: the scheduler attaches a report to a finished request as ``kv_transfer_params``, the only
free-form field that vLLM carries from the engine to the client (`report_observer`). Where the front end
ends a request (a stop string, an abort), the engine's last output never arrives: for those, the request's
first output carries an :class:`Outline`, from which the front end makes the same report (`metrics`).
"""

from __future__ import annotations

from typing import Any, TypedDict

from vllm_flow.block_counts import Geometry, evicted_at, predict_blocks, stored_blocks
from vllm_flow.engine.core.footprints import Footprint
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import When

REPORT_KEY = "vllm_flow"
"""Of a response's ``kv_transfer_params``, under which its report is."""
OUTLINE_KEY = "outline"
"""Under :data:`REPORT_KEY` of a request's first output; never leaves the front end."""


class Outline(TypedDict):
    """What the front end must know to report on a request that it ends itself."""

    geometry: list[Any]
    """The fields of :class:`Geometry`, as they travel between processes."""
    evicted: list[tuple[int, int]] | None
    """:meth:`vllm_flow.layout.TokenLayout.evicted_tokens`; None where nothing is evicted."""
    image_tokens: int
    late: bool
    """:attr:`vllm_flow.layout.TokenLayout.late`."""
    logged_layers: int


class StageReport(TypedDict):
    """What was left of a request's images from a layer on."""

    layer: int
    image_tokens_kept: int
    image_tokens_evicted: int


class Report(TypedDict):
    """What a request's policy did; under ``kv_transfer_params["vllm_flow"]`` in its response."""

    when: When
    """Whether image tokens left during the prefill, or before the second token of the answer."""
    cliff: int
    """Layers that saw the image whole; with "decode" in the end, and all layers if it came to none."""
    stages: list[StageReport]
    """By ascending layer."""
    image_tokens_evicted: int
    """Of all images, in the last layer."""
    prefill_rows_saved: int
    """Image rows times the layers they did not run through."""
    kv_blocks: list[int]
    """Blocks held at the end, per storage group, shallowest first; those of refused drafts among them."""
    kv_blocks_saved: int
    """Blocks that the same request without a policy would have held besides."""
    kv_bytes_saved: int


class LogReport(TypedDict):
    """What became of a request's attention log; beside the policy's report, if there is one."""

    attention_rows: int
    """Rows of the request, one per answer token and layer, that were handed to the writer."""
    attention_rows_dropped: int
    """Rows of this request and of others that were dropped since the last such report."""


def log_report(rows: int, dropped: int) -> LogReport:
    """The report of a finished request that logs."""
    return LogReport(attention_rows=rows, attention_rows_dropped=dropped)


def report(footprint: Footprint, geometry: Geometry) -> Report:
    """The report of a finished request that evicted."""
    full = predict_blocks(
        footprint.computed_tokens, None, geometry.group_starts, geometry.block_size
    )
    # A group may hold blocks for drafts that were refused, as it would without a policy.
    saved = sum(max(0, whole - held) for whole, held in zip(full, footprint.blocks, strict=True))
    layers = range(geometry.num_layers)
    return Report(
        when="decode" if footprint.late else "prefill",
        cliff=footprint.cliff,
        stages=[
            StageReport(
                layer=layer,
                image_tokens_kept=footprint.image_tokens - gone,
                image_tokens_evicted=gone,
            )
            for layer, gone in footprint.evicted
        ],
        image_tokens_evicted=evicted_at(footprint.evicted, geometry.num_layers),
        prefill_rows_saved=0
        if footprint.late
        else sum(evicted_at(footprint.evicted, layer) for layer in layers),
        kv_blocks=list(footprint.blocks),
        kv_blocks_saved=saved,
        kv_bytes_saved=saved * geometry.block_bytes,
    )


def outline(
    geometry: Geometry, layout: TokenLayout | None, logged_layers: int
) -> dict[str, Outline]:
    """What goes with the first output of a request that evicts or logs."""
    found = Outline(
        geometry=[
            geometry.num_layers,
            list(geometry.group_starts),
            geometry.block_size,
            geometry.block_bytes,
        ],
        evicted=None if layout is None else list(layout.evicted_tokens()),
        image_tokens=0 if layout is None else layout.spans.total,
        late=layout is not None and layout.late,
        logged_layers=logged_layers,
    )
    return {OUTLINE_KEY: found}


def report_from(outline: Outline, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """The report of a request that the front end ended, as the engine would have made it.

    Args:
        output_tokens: tokens of the answer, at least one. The engine may have computed another one
            before it heard of the end; that is not the answer's.

    Returns:
        A :class:`Report`, a :class:`LogReport`, or both. Rows that the log dropped are reported by
        the next request that ends in the engine.
    """
    found: dict[str, Any] = {}
    num_layers, group_starts, block_size, block_bytes = outline["geometry"]
    geometry = Geometry(num_layers, tuple(group_starts), block_size, block_bytes)
    if outline["evicted"] is not None:
        images = outline["image_tokens"]
        computed, late = prompt_tokens + output_tokens - 1, outline["late"]
        whole = late and output_tokens == 1
        evicted = tuple((layer, 0 if whole else gone) for layer, gone in outline["evicted"])
        cliff = next((layer for layer, gone in evicted if gone), num_layers)
        blocks = stored_blocks(computed, evicted, geometry.group_starts, block_size)
        footprint = Footprint(cliff, prompt_tokens, images, computed, blocks, evicted, late)
        found |= report(footprint, geometry)
    if outline["logged_layers"]:
        found |= log_report(output_tokens * outline["logged_layers"], dropped=0)
    return found
