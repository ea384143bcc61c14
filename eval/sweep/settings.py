"""What a command's arguments say of its engines and of its run, with every default made explicit.

For commands that ask engines, `vllm-flow eval` and `vllm-flow cliff`. No Ray and no vLLM in here.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_flow.demo_model.naming import DEMO_MODELS
from vllm_flow.eval.sweep.engine_args import DRAFTER, PIPELINE_PARALLEL
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.model_facts import ModelFacts
from vllm_flow.eval.sweep.policies import Policy
from vllm_flow.eval.sweep.versions import brought, versions
from vllm_flow.eval.sweep.work import TaskWork
from vllm_flow.grouping import DecoderLayers
from vllm_flow.outputs import real

DEMO_CONTEXT = 2048
"""Tokens of the demo models' longest request: ScienceQA's 1024 answer tokens, and a prompt."""
DEMO_POOL = 1 << 28
"""KV-cache pool of an engine with a demo model, bytes; vLLM would take most of the memory."""


def run_settings(
    args: Namespace,
    facts: ModelFacts,
    tasks: Sequence[TaskWork],
    policies: Sequence[Policy],
    *,
    on_gpu: bool,
    limit: int | None,
    engines: int,
) -> dict[str, Any]:
    """What `run.json` says of a command that asks engines, `vllm-flow eval` or `vllm-flow cliff`."""
    return {
        "command": ["vllm-flow", *sys.argv[1:]],
        **engine_settings(args, facts, on_gpu),
        "prompt": facts.conversation.prompt("{text}", True),
        "image_preparation": {work.task: work.preparation for work in tasks},
        "image_reading": args.image_reading,
        "data": str(real(args.data)),
        "limit": limit,
        "engines": engines,
        "versions": versions() | brought(policies, [work.task for work in tasks]),
        "tasks": [],
        "policies": [],
    }


def engine_settings(args: Namespace, facts: ModelFacts, on_gpu: bool) -> dict[str, Any]:
    """What of `run.json` decides how engines compute, with every default made explicit, but for two that each engine
    has of its model: `group_layers` and `max_model_len`."""
    demo = args.model in DEMO_MODELS
    return {
        "model": args.model,
        "num_layers": facts.num_layers,
        "group_layers": args.group_layers,
        "block_size": args.block_size or (16 if on_gpu else 32),  # vLLM's smallest
        "dtype": args.dtype or ("float32" if demo else facts.dtype),
        "seed": args.seed,
        "max_model_len": args.max_model_len or (DEMO_CONTEXT if demo else None),
        "conversation": facts.conversation.name,
        "trust_remote_code": args.trust_remote_code,
        "engine_args": dict(args.engine_args),
    }


def check_groups(args: Namespace, facts: ModelFacts) -> None:
    """Refuse storage groups that no engine would start with, before one is started.

    Those of layers that keep states, of a pipeline or with a drafter the engine knows.

    Raises:
        ValueError: names the sizes that there can be.
    """
    others = {PIPELINE_PARALLEL, DRAFTER} & args.engine_args.keys()
    if args.group_layers is not None and facts.all_attend and not others:
        DecoderLayers(facts.num_layers).groups(args.group_layers)


def engine_options(
    args: Namespace, facts: ModelFacts, settings: Mapping[str, Any], policies: tuple[Policy, ...]
) -> EngineOptions:
    """How a command's engines are started; ``settings`` are those of :func:`engine_settings`."""
    return EngineOptions(
        model=args.model,
        dtype=settings["dtype"],
        group_layers=settings["group_layers"],
        block_size=settings["block_size"],
        conversation=settings["conversation"],
        policies=policies,
        full_grid=facts.full_grid,
        seed=args.seed,
        max_model_len=settings["max_model_len"],
        kv_cache_bytes=pool_bytes(args),
        picture_mark=facts.conversation.mark,
        trust_remote_code=args.trust_remote_code,
        engine_args=args.engine_args,
    )


def pool_bytes(args: Namespace) -> int | None:
    """Bytes of each engine's KV-cache pool, None to leave it to vLLM."""
    if args.kv_cache_gib is not None:
        return int(args.kv_cache_gib * 2**30)
    return DEMO_POOL if args.model in DEMO_MODELS else None
