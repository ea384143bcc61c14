"""The ledger's targets as data: what each patch of vLLM replaces, and whether it is still there.

The reasons are in README.md. Imports vLLM only when asked to.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from vllm_flow.patches import source


@dataclass(frozen=True)
class Target:
    """One function of vLLM that a patch wraps."""

    patch: str
    """The patch's module in this package."""
    module: str
    name: str
    """Dotted, within the module."""
    parameters: tuple[str, ...]
    """Parameters that the patch passes on by name or place."""

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def find(self) -> Any:
        """The function as it is now. Raises ImportError or AttributeError where it is gone."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found

    def problem(self, *, imported: bool = True) -> str | None:
        """Why the patch would not apply, None if it would.

        Args:
            imported: import the target and look at it; False reads its source only.
        """
        try:
            expected = (
                tuple(inspect.signature(self.find()).parameters)
                if imported
                else source.parameters(self.module, self.name)
            )
        except (ImportError, AttributeError, source.Missing) as error:
            return f"{self.path} is not there ({error})"
        missing = [name for name in self.parameters if name not in expected]
        if missing:
            return f"{self.path} has no parameter {', '.join(missing)}"
        return None


TARGETS = (
    Target("vllm_config", "vllm.config", "VllmConfig.__post_init__", ("self",)),
    Target(
        "input_processor",
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
    ),
    Target(
        "output_processor",
        "vllm.v1.engine.output_processor",
        "OutputProcessor.add_request",
        ("self", "request"),
    ),
    Target(
        "output_processor",
        "vllm.v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        ("self", "engine_core_outputs"),
    ),
    Target(
        "output_processor",
        "vllm.v1.engine.output_processor",
        "OutputProcessor._update_stats_from_finished",
        ("self", "req_state"),
    ),
    Target(
        "output_processor",
        "vllm.v1.engine.output_processor",
        "RequestState.make_request_output",
        ("new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params"),
    ),
    Target(
        "logprobs",
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor._update_prompt_logprobs",
        ("self", "prompt_logprobs_tensors"),
    ),
    Target(
        "pieces",
        "vllm.compilation.backends",
        "wrap_with_cudagraph_if_needed",
        ("piecewise_backend",),
    ),
    Target("endpoint_plugins", "vllm.plugins", "load_endpoint_plugins", ("supported_tasks",)),
    Target("renderer", "vllm.renderers.base", "processor_cache_from_config", ("vllm_config",)),
    Target(
        "core_client",
        "vllm.v1.engine.core_client",
        "EngineCoreClient.make_client",
        ("vllm_config", "renderer"),
    ),
    Target(
        "core_client",
        "vllm.v1.engine.core_client",
        "EngineCoreClient.make_async_mp_client",
        ("vllm_config", "renderer"),
    ),
    Target(
        "run_batch",
        "vllm.entrypoints.launchers.run_batch",
        "BatchRequestInput.model_validate_json",
        ("json_data",),
    ),
    Target(
        "run_batch",
        "vllm.entrypoints.launchers.run_batch",
        "handle_endpoint_request",
        ("request",),
    ),
)
"""Every function of vLLM that is replaced. torchvision's shim is no replacement: setup_env knows it."""
