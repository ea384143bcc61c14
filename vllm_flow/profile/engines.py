"""The engines of a profile, side by side: what is compared, and how each is started.

One process holds a stock engine (extension off) and one with the extension. They share threads,
allocator and machine, so that rounds can alternate between them; only one computes at a time.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_flow.layout import default_group_layers
from vllm_flow.user_text import whole_number

if TYPE_CHECKING:
    from vllm import LLM

STOCK = "stock"
EXECUTIONS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "default": {},
}
"""How steps run: all as they come; decode steps as CUDA graphs (a CUDA device, model runner V2) and the
others as they come; or as vLLM does without any flag, compiled and with all its graphs."""


@dataclass(frozen=True)
class EngineOptions:
    """How both engines are started; None leaves the choice to vLLM."""

    model: str
    dtype: str
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    group_layers: int | None = None
    images: int = 1
    execution: str = "eager"
    """One of :data:`EXECUTIONS`."""
    stock_execution: str = "same"
    """``same``, or ``default``: stock vLLM as it starts without any flag, compiled where it can."""


@dataclass(frozen=True)
class System:
    """What is measured: an engine and the cliff its requests carry."""

    name: str
    extension: bool
    cliff: int | None = None
    """None: requests without a policy."""

    @property
    def extra_args(self) -> dict[str, int] | None:
        return None if self.cliff is None else {"flow_cliff": self.cliff}

    def layers_seen(self, num_layers: int) -> int:
        """Layers that see the image."""
        return num_layers if self.cliff is None else self.cliff


def parse_systems(text: str, num_layers: int) -> list[System]:
    """``baseline,cliff=2,cliff=L/4`` -> stock vLLM first, then the extension with each policy.

    ``baseline`` is a request without a policy, with the extension on. ``L`` is the number of layers.

    Raises:
        ValueError: names the policy that cannot be read, or the cliff that is no layer.
    """
    systems = [System(STOCK, extension=False)]
    for policy in filter(None, (part.strip() for part in text.split(","))):
        kind, _, value = policy.partition("=")
        if policy == "baseline":
            system = System("baseline", extension=True)
        elif kind == "cliff" and value:
            cliff = _cliff(policy, value, num_layers)
            system = System(f"cliff={cliff}", extension=True, cliff=cliff)
        else:
            raise ValueError(f"policy {policy!r}: write baseline, cliff=8 or cliff=L/4.")
        if system not in systems:
            systems.append(system)
    return systems


def _cliff(policy: str, value: str, num_layers: int) -> int:
    whole, slash, part = value.partition("/")
    layers = num_layers if whole == "L" else whole_number(whole)
    parts = whole_number(part) if slash else 1
    if layers is None or not parts:
        raise ValueError(f"policy {policy!r}: write cliff=8 or cliff=L/4.")
    cliff = layers // parts
    if cliff > num_layers:
        raise ValueError(f"policy {policy!r}: the model has layers 0 ... {num_layers}.")
    return cliff


def prepare_process() -> None:
    """Set vLLM's environment for engines in this process; before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # both engines here, open to inspection
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # vLLM keeps a core for its front end, which here shares the engine's process.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def open_engine(options: EngineOptions, *, extension: bool, num_layers: int) -> LLM:
    """Start one engine; both are started alike but for the extension's key, and ``stock_execution``."""
    import vllm

    groups = options.group_layers or default_group_layers(num_layers)
    plain = not extension and options.stock_execution == "default"
    flow = {"additional_config": {"vllm_flow": {"group_layers": groups}}}
    return vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        load_format=options.load_format,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        block_size=options.block_size,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        limit_mm_per_prompt={"image": options.images},
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        disable_log_stats=False,  # per-request time stamps
        **({} if plain else EXECUTIONS[options.execution]),
        **(flow if extension else {}),
    )
