"""Counters of what eviction saved and logging lost, beside vLLM's own.

Seam: the front end's ``RequestState``, on which a request's :class:`Counted` is kept; it counts where
vLLM counts (``patches/output_processor.py``). Names begin with ``vllm_flow:``, since vLLM unregisters
what begins with ``vllm:``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter

from vllm_flow.engine.front_end.settled import Settled, noted
from vllm_flow.engine.obstacles import Misfit
from vllm_flow.engine.report import OUTLINE_KEY, REPORT_KEY, Outline, report_from
from vllm_flow.policy_keys import BASELINE, policy_label

STAGES_SHOWN = 8
KEPT_OR_EVICTED = ("kept", "evicted")
IMAGE_OR_TEXT = ("image", "text")
NO_IMAGE = "no-image"
"""In a policy's place: of requests without an image, to which none applies."""


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
        self._rows = Counter(
            "vllm_flow:prefill_rows",
            "Rows of prompts times layers, as they are without a policy: what is saved is a share of these.",
            [*labels, "what"],
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
        for what in IMAGE_OR_TEXT:
            self._rows.labels(model_name, what)
        for kind in Misfit:
            self._skipped.labels(model_name, kind.value)
        for what in KEPT_OR_EVICTED:
            self._stages.labels(model_name, "1", what)

    def count(self, model_name: str, counted: Counted, text_rows: int, image_rows: int) -> None:
        """Count one finished request with its report, under its policy's label.

        Args:
            text_rows, image_rows: tokens of its prompt times the model's layers.
        """
        settled, found = counted.settled, counted.report
        self._requests.labels(model_name, counted.policy, settled.task).inc()
        if settled.skipped is not None:
            self._skipped.labels(model_name, settled.skipped.value).inc()
        for what, rows in zip(IMAGE_OR_TEXT, (image_rows, text_rows), strict=True):
            self._rows.labels(model_name, what).inc(rows)
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
_num_layers = 0


def enable(model_name: str, num_layers: int) -> None:
    """Count from now on in this process, requests to a model of so many layers; may be called again."""
    global _metrics, _model_name, _num_layers
    if _metrics is None:
        _metrics = FlowMetrics()
    _model_name, _num_layers = model_name, num_layers
    _metrics.show(model_name)


@dataclass
class Counted:
    """A request's policy and report, kept as ``flow`` on its ``RequestState`` till it is counted."""

    policy: str = BASELINE
    """:func:`vllm_flow.policy_keys.policy_label`, or :data:`NO_IMAGE`."""
    settled: Settled = field(default_factory=Settled)
    image_tokens: int = 0
    """Of its prompt."""
    outline: Outline | None = None
    """Of its first output, where it evicts or logs."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Of its last output; empty before that, and where there is nothing to report."""


def _counted(state: Any) -> Counted:
    """What is kept of a request; of one that was never told to :func:`begin`, a baseline's."""
    if not hasattr(state, "flow"):
        state.flow = Counted()
    found: Counted = state.flow
    return found


def begin(state: Any, request: Any) -> None:
    """Note a new request's policy; ``state`` is vLLM's ``RequestState`` of it in the front end."""
    params = request.sampling_params
    policy = policy_label(None if params is None else params.extra_args)
    if policy == BASELINE and has_no_image(request):
        policy = NO_IMAGE
    # What vLLM makes of the parameters for each of several answers has their fields alone.
    parent = state.parent_req
    settled = noted(params if parent is None else parent.sampling_params)
    state.flow = Counted(policy, settled, image_tokens(request))


def image_tokens(request: Any) -> int:
    """Image tokens of a request's prompt; of embeddings nobody knows."""
    from vllm_flow.engine.requests import evictable

    images = evictable(request.mm_features or ())
    return sum(image.mm_position.get_num_embeds() for image in images)


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
            _counted(state).outline = carried[REPORT_KEY][OUTLINE_KEY]
        rest = {key: value for key, value in carried.items() if key != REPORT_KEY}
        output.kv_transfer_params = rest or None


def finish(state: Any, carried: dict[str, Any] | None) -> dict[str, Any] | None:
    """The ``kv_transfer_params`` of a request's last output, with the report if it has one."""
    counted, answered = _counted(state), state.detokenizer
    if carried is None or REPORT_KEY not in carried:
        if counted.outline is None or answered is None:
            return carried
        found = report_from(counted.outline, state.prompt_len, answered.num_output_tokens())
        carried = {**(carried or {}), REPORT_KEY: found}
    counted.report = carried[REPORT_KEY]
    return carried


def count(state: Any) -> None:
    """Count a finished request; nothing before :func:`enable`."""
    if _metrics is not None:
        counted = _counted(state)
        images = counted.image_tokens * _num_layers
        _metrics.count(_model_name, counted, state.prompt_len * _num_layers - images, images)
