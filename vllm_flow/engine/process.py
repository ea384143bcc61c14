"""A process that runs an engine by itself: its environment, what it computes on, and its engine's clock.

For commands that print their own results. Imports neither torch nor vLLM before it is called.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

from vllm_flow.counts import counted


def hush() -> None:
    """Let vLLM log errors only, unless the user says otherwise; before vLLM is imported, which reads the level."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # for what vLLM says before it reads the level


def quieten(offline: bool) -> None:
    """Set vLLM's environment for a readable run in one process; before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # footprints are read from the scheduler
    hush()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # vLLM keeps a core for its front end, which here shares the engine's process.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def device_name() -> str:
    """The processor or graphics card that computes, as it calls itself."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
            name = next(names, "CPU")
    except OSError:
        name = "CPU"
    return f"{name}, {counted(os.cpu_count() or 1, 'core')}"


def engine_seconds(outputs: Sequence[Any]) -> float:
    """Seconds from the first request scheduled to the last first token, by the engine's own clock.

    Tokenising and preparing pictures are left out: they do not depend on the policy.

    Args:
        outputs: vLLM's ``RequestOutput`` of each request of a batch, with ``metrics``.
    """
    metrics = [output.metrics for output in outputs]
    return max(m.first_token_ts for m in metrics) - min(m.scheduled_ts for m in metrics)
