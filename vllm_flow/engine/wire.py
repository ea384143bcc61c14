"""Fields of ours on vLLM's objects that travel between processes: from the scheduler to the workers, and back.

Seams: ``SchedulerOutput`` and ``ModelRunnerOutput``, which vLLM sends as they are, attributes of others
included. Each side imports this module and nothing of the other. A response's report goes the same way in a
field that vLLM has for it (`report`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_flow.attention import TokenAttention
from vllm_flow.rewriting import Rewrite

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput

Rewrites = Mapping[str, Mapping[int, Rewrite]]
"""Request id -> storage group -> which of its rows move."""
Pictures = Mapping[str, Mapping[int, "MultiModalFeatureSpec"]]
"""Request id -> index of the picture -> the picture with its data."""

REWRITES_FIELD = "flow_rewrites"
"""On a scheduler's output: :data:`Rewrites`, see `moving`."""
PICTURES_FIELD = "flow_pictures"
"""On a scheduler's output: :data:`Pictures` that the workers lack, see `encoder_cache`."""
ATTENTION_FIELD = "flow_attention"
"""On a model runner's output: request id -> :class:`TokenAttention`, see `worker/attention/tap`."""


def rewrites_of(output: SchedulerOutput) -> Rewrites:
    """What the step's requests move before it; empty in most steps."""
    return getattr(output, REWRITES_FIELD, {})


def pictures_of(output: SchedulerOutput) -> Pictures:
    """Pictures that the step encodes and that the workers were never sent; empty in most steps."""
    return getattr(output, PICTURES_FIELD, {})


def attention_of(output: Any) -> Mapping[str, TokenAttention]:
    """What the step's logging requests attended to, of a ``ModelRunnerOutput``; empty if none logs."""
    return getattr(output, ATTENTION_FIELD, {})
