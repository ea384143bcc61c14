"""How every engine of a run is started, on whatever machine. Knows neither Ray nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_flow.eval.sweep.pictures import background_of
from vllm_flow.eval.sweep.policies import Policy
from vllm_flow.pictures import Colour


@dataclass(frozen=True)
class EngineOptions:
    """What the driver decided once for all engines."""

    model: str
    """As the user named it; each machine finds its own copy."""
    dtype: str
    group_layers: int | None
    """None leaves it to the engine, which knows what its layers store."""
    block_size: int
    conversation: str
    """`llava-1.5`, `qwen-vl` or `chat-template`, as decided for the run."""
    policies: tuple[Policy, ...]
    full_grid: int | None = None
    """Side of the full square of image tokens; needed by `downsample` only."""
    seed: int = 0
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    picture_mark: str | None = None
    """`Conversation.mark`, as decided for the run."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run, on every machine."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`; they win over this module's."""
    flow_settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the extension, as in `additional_config["vllm_flow"]`."""

    @property
    def background(self) -> Colour:
        """Behind transparent pixels: white, or what `media_io_kwargs` among `engine_args` says to a server.

        ValueError where that is no colour.
        """
        return background_of(self.engine_args)

    @property
    def embeds(self) -> bool:
        """Whether vLLM must accept image embeddings."""
        return any(policy.kind == "downsample" for policy in self.policies)
