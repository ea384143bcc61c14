"""What eviction saved and logging lost: counters beside vLLM's own, and a report per response.

Seams: the scheduler attaches a report to a finished request as ``kv_transfer_params``, the only
free-form field that vLLM carries from the engine to the client. Where the front end ends a request
(a stop string, an abort), the engine's last output never arrives: for those, the request's first
output carries an :class:`Outline`, from which the front end makes the same report. It counts where
vLLM counts (``patches/output_processor.py``). Names begin with ``vllm_flow:``, since vLLM unregisters
what begins with ``vllm:``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from prometheus_client import Counter

from vllm_flow.block_counts import Geometry, evicted_at, predict_blocks, stored_blocks
from vllm_flow.engine.footprints import Footprint
from vllm_flow.engine.obstacles import Misfit
from vllm_flow.engine.settled import Settled, noted
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import When
from vllm_flow.policy_keys import BASELINE, policy_label

REPORT_KEY = "vllm_flow"
STAGES_SHOWN = 8
KEPT_OR_EVICTED = ("kept", "evicted")
NO_IMAGE = "no-image"
"""In a policy's place: of requests without an image, to which none applies."""
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


class FlowMetrics:
    """The counters of one front-end process."""

    def __init__(self) -> None:
        labels = ["model_name"]
        self._requests = Counter(
            "vllm_flow:requests",
            "Finished requests by policy.",
            [*labels, "policy", "task"],
        )
        self._skipped = Counter(
            "vllm_flow:default_policy_skipped",
            "Finished requests to which the operator's policy does not apply, by reason.",
            [*labels, "reason"],
        )
        self._saved = {
            "image_tokens_evicted": Counter(
                "vllm_flow:image_tokens_evicted", "Image tokens evicted in the last layer.", labels
            ),
            "prefill_rows_saved": Counter(
                "vllm_flow:prefill_rows_saved",
                "Image rows times the layers they did not run through.",
                labels,
            ),
            "kv_blocks_saved": Counter(
                "vllm_flow:kv_blocks_saved", "KV-cache blocks not allocated.", labels
            ),
            "kv_bytes_saved": Counter(
                "vllm_flow:kv_bytes_saved", "Bytes of KV-cache blocks not allocated.", labels
            ),
        }
        self._stages = Counter(
            "vllm_flow:stage_image_tokens",
            "Image tokens of finished requests that evict, kept and evicted from each stage on.",
            [*labels, "stage", "what"],
        )
        self._dropped = Counter(
            "vllm_flow:attention_rows_dropped",
            "Rows that the attention log could not write; reported as logging requests finish.",
            labels,
        )

    def show(self, model_name: str) -> None:
        """Make every counter visible at zero, before the first request ends."""
        for policy in (BASELINE, NO_IMAGE):
            self._requests.labels(model_name, policy, "")
        for counter in (*self._saved.values(), self._dropped):
            counter.labels(model_name)
        for kind in Misfit:
            self._skipped.labels(model_name, kind.value)
        for what in KEPT_OR_EVICTED:
            self._stages.labels(model_name, "1", what)

    def count(
        self, model_name: str, policy: str, settled: Settled, found: Mapping[str, Any]
    ) -> None:
        """Count one finished request with its report, under its policy's label."""
        self._requests.labels(model_name, policy, settled.task).inc()
        if settled.skipped is not None:
            self._skipped.labels(model_name, settled.skipped.value).inc()
        for name, counter in self._saved.items():
            counter.labels(model_name).inc(found.get(name, 0))
        self._dropped.labels(model_name).inc(found.get("attention_rows_dropped", 0))
        for number, stage in enumerate(found.get("stages", ()), start=1):
            # A time series each: the deeper ones of a long policy share the last.
            label = str(min(number, STAGES_SHOWN))
            for what in KEPT_OR_EVICTED:
                tokens = stage[f"image_tokens_{what}"]
                self._stages.labels(model_name, label, what).inc(tokens)


_metrics: FlowMetrics | None = None
_model_name = ""


def enable(model_name: str) -> None:
    """Count from now on in this process; may be called again."""
    global _metrics, _model_name
    if _metrics is None:
        _metrics = FlowMetrics()
    _model_name = model_name
    _metrics.show(model_name)


def begin(state: Any, request: Any) -> None:
    """Note a new request's policy; ``state`` is vLLM's ``RequestState`` of it in the front end."""
    params = request.sampling_params
    state.flow_policy = policy_label(None if params is None else params.extra_args)
    if state.flow_policy == BASELINE and has_no_image(request):
        state.flow_policy = NO_IMAGE
    # What vLLM makes of the parameters for each of several answers has their fields alone.
    parent = state.parent_req
    state.flow_settled = noted(params if parent is None else parent.sampling_params)
    state.flow_outline = None
    state.flow_report = {}


def has_no_image(request: Any) -> bool:
    """Whether nothing of a request's prompt is a picture's; of embeddings nobody knows."""
    from vllm_flow.engine.requests import KEPT_MODALITIES

    kinds = {feature.modality for feature in request.mm_features or ()}
    return request.prompt_embeds is None and kinds <= set(KEPT_MODALITIES)


def take_outlines(states: Mapping[str, Any], outputs: Iterable[Any]) -> None:
    """Keep the outlines among a step's ``EngineCoreOutput`` objects, and take them out of these."""
    for output in outputs:
        carried = output.kv_transfer_params
        if not carried or OUTLINE_KEY not in carried.get(REPORT_KEY, {}):
            continue
        state = states.get(output.request_id)
        if state is not None:
            state.flow_outline = carried[REPORT_KEY][OUTLINE_KEY]
        rest = {key: value for key, value in carried.items() if key != REPORT_KEY}
        output.kv_transfer_params = rest or None


def finish(state: Any, carried: dict[str, Any] | None) -> dict[str, Any] | None:
    """The ``kv_transfer_params`` of a request's last output, with the report if it has one."""
    if carried is None or REPORT_KEY not in carried:
        outline, answered = getattr(state, "flow_outline", None), state.detokenizer
        if outline is None or answered is None:
            return carried
        found = report_from(outline, state.prompt_len, answered.num_output_tokens())
        carried = {**(carried or {}), REPORT_KEY: found}
    state.flow_report = carried[REPORT_KEY]
    return carried


def count(state: Any) -> None:
    """Count a finished request; nothing before :func:`enable`."""
    if _metrics is not None:
        policy = getattr(state, "flow_policy", BASELINE)
        settled = getattr(state, "flow_settled", Settled())
        _metrics.count(_model_name, policy, settled, getattr(state, "flow_report", {}))
