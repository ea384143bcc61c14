"""What eviction saved and logging lost: counters beside vLLM's own, and a report per response.

Seams: the scheduler attaches a report to a finished request as ``kv_transfer_params``, the only
free-form field that vLLM carries from the engine to the client; the front end counts it on its way
(``patches/output_processor.py``). Names begin with ``vllm_flow:``, since vLLM unregisters what
begins with ``vllm:``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from prometheus_client import Counter

from vllm_flow.engine.inspect import Footprint
from vllm_flow.layout import predict_blocks

REPORT_KEY = "vllm_flow"


class Report(TypedDict):
    """What a request's policy did; under ``kv_transfer_params["vllm_flow"]`` in its response."""

    cliff: int
    image_tokens_evicted: int
    prefill_rows_saved: int
    """Image rows times the layers they did not run through."""
    kv_blocks: list[int]
    """Blocks held at the end, per storage group, shallowest first."""
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


def report(
    footprint: Footprint,
    group_starts: Sequence[int],
    num_layers: int,
    block_size: int,
    block_bytes: int,
) -> Report:
    """The report of a finished request that evicted.

    Args:
        footprint: what it took.
        block_size: tokens per block.
        block_bytes: bytes per block, all layers of its storage group and all workers together.
    """
    full = predict_blocks(footprint.computed_tokens, None, group_starts, block_size)
    saved = sum(full) - sum(footprint.blocks)
    return Report(
        cliff=footprint.cliff,
        image_tokens_evicted=footprint.image_tokens,
        prefill_rows_saved=footprint.image_tokens * (num_layers - footprint.cliff),
        kv_blocks=list(footprint.blocks),
        kv_blocks_saved=saved,
        kv_bytes_saved=saved * block_bytes,
    )


class FlowMetrics:
    """The counters of one front-end process."""

    def __init__(self) -> None:
        labels = ["model_name"]
        self._requests = Counter(
            "vllm_flow:requests",
            "Finished requests by policy.",
            [*labels, "policy"],
        )
        self._saved = {
            "image_tokens_evicted": Counter(
                "vllm_flow:image_tokens_evicted", "Image tokens evicted at a cliff.", labels
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
        self._dropped = Counter(
            "vllm_flow:attention_rows_dropped",
            "Rows that the attention log could not write; reported as logging requests finish.",
            labels,
        )

    def show(self, model_name: str) -> None:
        """Make every counter visible at zero, before the first request ends."""
        self._requests.labels(model_name, "baseline")
        for counter in (*self._saved.values(), self._dropped):
            counter.labels(model_name)

    def observe(self, model_name: str, outputs: Iterable[Any]) -> None:
        """Count the finished requests among one step's ``EngineCoreOutput`` objects."""
        for output in outputs:
            if output.finish_reason is None:
                continue
            found = (output.kv_transfer_params or {}).get(REPORT_KEY, {})
            policy = f"cliff={found['cliff']}" if "cliff" in found else "baseline"
            self._requests.labels(model_name, policy).inc()
            for name, counter in self._saved.items():
                counter.labels(model_name).inc(found.get(name, 0))
            self._dropped.labels(model_name).inc(found.get("attention_rows_dropped", 0))


_metrics: FlowMetrics | None = None
_model_name = ""


def enable(model_name: str) -> None:
    """Count from now on in this process; may be called again."""
    global _metrics, _model_name
    if _metrics is None:
        _metrics = FlowMetrics()
    _model_name = model_name
    _metrics.show(model_name)


def observe(outputs: Iterable[Any]) -> None:
    """Count one step's outputs; nothing before :func:`enable`."""
    if _metrics is not None:
        _metrics.observe(_model_name, outputs)
