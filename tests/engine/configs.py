"""Configurations as vLLM finishes them at start-up, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs


def config_of(model_dir: Path, options: Any = None, **arguments: Any) -> Any:
    """A finished VllmConfig; ``options`` go under the extension's key unless None."""
    arguments = {"enforce_eager": True, "max_model_len": 512, **arguments}
    if options is not None:
        arguments["additional_config"] = {"vllm_flow": options}
    return EngineArgs(model=str(model_dir), **arguments).create_engine_config()
