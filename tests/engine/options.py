"""One engine with what operators turn on beside the extension; starting one takes longer than its tests."""

from __future__ import annotations

import tempfile
from typing import Any

from tests.engine import v2_cpu

ADAPTERS = (1, 2)
_FOLDER = tempfile.TemporaryDirectory(prefix="vllm-flow-blocks-")
"""Of the connector's files, until the process ends."""

TOGETHER: dict[str, Any] = {
    "enable_lora": True,
    # vLLM's CPU kernels send rows without an adapter through the last slot, which must stay empty.
    "max_loras": len(ADAPTERS) + 1,
    "max_lora_rank": 8,
    # Model Runner V2 knows none.
    "enable_prompt_embeds": not v2_cpu.wanted(),
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 200,
    "kv_transfer_config": {
        "kv_connector": "FileConnector",
        "kv_connector_module_path": "tests.engine.file_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": _FOLDER.name},
    },
}

DRAFTS: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
"""Speculative decoding from the text itself; an engine of its own, as vLLM fails at top-k with it on a CPU."""

workers_half: Any = None
"""Of this engine's connector, once it has started; see the fixture ``together``."""
