"""The engines of a profile, side by side: what is compared, and how each is started.

One process holds a stock engine (extension off) and one with the extension. They share threads,
allocator and machine, so that rounds can alternate between them; only one computes at a time.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.policy import Policy, presets_of
from vllm_flow.grouping import DecoderLayers
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_keys import request_keys
from vllm_flow.profile.presets import POLICIES
from vllm_flow.ranks import RANKS, PositionRank
from vllm_flow.user_text import whole_number

if TYPE_CHECKING:
    from vllm import LLM

STOCK = "stock"
AGAIN = "stock again"
"""A control's second engine."""
EXECUTIONS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "default": {},
}
"""How steps run: all as they come; decode steps as CUDA graphs (a CUDA device, model runner V2) and the
others as they come; or as vLLM does without any flag, compiled and with all its graphs."""


_FREE_AT_START = 0.1
"""Share of a device that vLLM wants to be free before it starts; it sizes nothing by it where the pool is given.
What its default wants is no longer free when the second engine starts."""


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
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    prefix_caching: bool = False
    """Whether blocks are kept to be found, as vLLM does without any flag."""


@dataclass(frozen=True)
class System:
    """What is measured: an engine and the cliff its requests carry."""

    name: str
    extension: bool
    """Whether the second of the two engines does the work: the one with the extension, but for a control."""
    cliff: int | None = None
    """None: requests without a cliff."""
    policy: FlowPolicy | None = None
    """Anything else of the grammar; None: requests without one."""

    @property
    def extra_args(self) -> dict[str, Any] | None:
        if self.policy is not None:
            return request_keys(self.policy)
        return None if self.cliff is None else {"flow_cliff": self.cliff}

    def seen(self, num_layers: int) -> int | FlowPolicy:
        """What the ideals count by: the policy, or the layers that see the image."""
        return self.layers_seen(num_layers) if self.policy is None else self.policy

    @property
    def ranks(self) -> bool:
        """Whether the device has to rank: embeddings or attention are looked at, not places alone."""
        return self.policy is not None and any(ranks_rows(rank) for rank in self.policy.ranks)

    def layers_seen(self, num_layers: int) -> int:
        """Layers that see the image."""
        return num_layers if self.cliff is None else self.cliff


def parse_systems(text: str, num_layers: int) -> list[System]:
    """``baseline,cliff=2,cliff=L/4,fastv`` -> stock vLLM first, then the extension with each policy.

    ``baseline`` is a request without a policy, with the extension on; in ``cliff=L/4`` ``L`` is the number of
    layers; everything else is read as `vllm-flow eval` reads it.

    Raises:
        ValueError: names the policy that cannot be read, or the cliff that is no layer.
    """
    systems = [System(STOCK, extension=False)]
    for policy in filter(None, (part.strip() for part in text.split(","))):
        kind, _, value = policy.partition("=")
        if kind == "cliff" and value and " " not in value and ":" not in value:
            cliff = _cliff(policy, value, num_layers)
            found = [System(f"cliff={cliff}", extension=True, cliff=cliff)]
        else:
            found = [_system(one, num_layers) for one in parse_policies(policy, num_layers)]
        systems += [system for system in found if system not in systems]
    return systems


def peer_cliff(text: str, num_layers: int) -> System:
    """The one cliff of mask, VTW and ours among the peers.

    Raises:
        ValueError: none, several, or another policy.
    """
    found = parse_systems(text, num_layers)[1:]
    if len(found) != 1 or found[0].cliff is None:
        raise ValueError(
            f"--peer-cliff {text!r}: peers are compared at one cliff, such as cliff=8 or cliff=L/4."
        )
    return found[0]


def control_systems(text: str, parts: Sequence[str]) -> list[System]:
    """Stock vLLM, and stock vLLM again in the extension's place.

    Raises:
        ValueError: policies or parts that only the extension has.
    """
    if text != POLICIES:
        raise ValueError(
            "--control compares stock vLLM with itself, without policies: leave out --policies."
        )
    others = [part for part in parts if part not in ("prefill", "decode")]
    if others:
        raise ValueError(
            f"--control measures prefill and decode, not {others[0]}: name them with --parts."
        )
    return [System(STOCK, extension=False), System(AGAIN, extension=True)]


def _system(policy: Policy, num_layers: int) -> System:
    flow = policy.flow()
    if policy.kind == "downsample":
        raise ValueError(
            f"policy {policy.name!r}: requests are measured with pictures as they are."
        )
    if flow is None:
        return System("baseline", extension=True)
    if policy.stages is None:
        return System(policy.name, extension=True, cliff=policy.cliff)
    names = presets_of(flow, num_layers)
    return System(names[0] if names else policy.name, extension=True, policy=flow)


def ranks_rows(rank: str) -> bool:
    """Whether a rank looks at what it ranks."""
    return not isinstance(RANKS[rank], PositionRank)


def _cliff(policy: str, value: str, num_layers: int) -> int:
    whole, slash, part = value.partition("/")
    layers = num_layers if whole == "L" else whole_number(whole)
    parts = whole_number(part) if slash else 1
    if layers is None or not parts:
        raise ValueError(f"policy {policy!r}: write cliff=8 or cliff=L/4.")
    cliff = layers // parts
    if cliff > num_layers:
        raise ValueError(
            f"policy {policy!r}: the model has {num_layers} decoder layers; write a cliff from 0 to {num_layers}."
        )
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
    warnings.filterwarnings("ignore", category=FutureWarning)


def open_engine(options: EngineOptions, *, extension: bool, num_layers: int) -> LLM:
    """Start one engine; both are started alike but for the extension's key, and ``stock_execution``."""
    import vllm

    groups = options.group_layers or DecoderLayers(num_layers).default_group_layers()
    plain = not extension and options.stock_execution == "default"
    flow = {"additional_config": {"vllm_flow": {"group_layers": groups}}}
    return vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        load_format=options.load_format,
        trust_remote_code=options.trust_remote_code,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        block_size=options.block_size,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        gpu_memory_utilization=_FREE_AT_START,
        limit_mm_per_prompt={"image": options.images},
        enable_prefix_caching=options.prefix_caching,
        use_tqdm_on_load=False,
        disable_log_stats=False,  # per-request time stamps
        **({} if plain else EXECUTIONS[options.execution]),
        **(flow if extension else {}),
    )
