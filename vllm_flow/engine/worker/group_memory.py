"""Device memory that storage groups take beside their keys and values, and that vLLM allocates after it has measured.

vLLM gives the KV cache what its profile leaves of the device. Block tables, and what attention backends keep for a
group of layers, come after that: of one group in stock vLLM, of several here.

Seam: ``determine_available_memory`` of vLLM's GPU worker, and what it says of it when it has started:
``total_consumed``, ``available_kv_cache_memory_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.mem_utils import format_gib
from vllm.v1.worker.block_table import get_block_table_width

from vllm_flow.engine.worker.variant_builders import parts_of, plans, plans_prompts

logger = init_logger("vllm.vllm_flow.group_memory")


PLANS = 2 * (8 << 20)
"""Bytes that FlashInfer's two wrappers of one builder keep plans in, from the first plan on."""


def scratch_of(attn_groups: Sequence[Sequence[Any]]) -> list[int]:
    """Bytes on the device that the metadata builders of each group keep; ``attn_groups`` are vLLM's.

    What several of them share counts once, with the first.
    """
    seen: set[int] = set()
    return [
        sum(
            _bytes_of(builder, seen)
            for attn_group in of_group
            for builder in attn_group.metadata_builders
        )
        for of_group in attn_groups
    ]


def scratch_of_variants(attn_groups: Iterable[Iterable[Any]]) -> int:
    """Bytes on the device that builders of variants take at most, see :mod:`vllm_flow.engine.worker.variant_builders`.

    They are made while the engine serves; a group has one for each of its layers if as many policies meet in a step.
    """
    found = 0
    for attn_group in (group for of_group in attn_groups for group in of_group if plans(group)):
        builder = attn_group.get_metadata_builder(0)
        shared = {id(builder._get_workspace_buffer())}
        one = _bytes_of(builder, shared) + PLANS * plans_prompts(attn_group)
        found += len(attn_group.layer_names) * one
    return found


def _bytes_of(builder: Any, seen: set[int]) -> int:
    """What a builder keeps on the device and is not among the tensors ``seen`` yet; it is then."""
    found = 0
    for tensor in _tensors(builder):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found += tensor.untyped_storage().nbytes()
    return found


def _tensors(builder: Any) -> Iterator[torch.Tensor]:
    for part in parts_of(builder):
        for value in vars(part).values():
            # vLLM has pairs of a tensor on the host and one on the device.
            value = getattr(value, "gpu", value)
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                yield value


def tables_of(specs: Iterable[Any], runner: Any, per_group: int) -> list[int]:
    """Bytes of the block tables and slots of each storage group.

    Args:
        specs: of all layers that store anything; those of one group are equal.
        runner: how many requests and tokens a step may have, and how long a request may be.
        per_group: block tables on the device for each.
    """
    found = []
    for spec in dict.fromkeys(specs):
        width = get_block_table_width(
            spec.max_num_blocks_per_req(runner.vllm_config, runner.max_model_len),
            spec.block_size,
            token_alignment=spec.block_table_token_alignment,
        )
        blocks = torch.int32.itemsize * runner.max_num_reqs * width
        found.append(per_group * blocks + torch.int64.itemsize * runner.max_num_tokens)
    return found


def beyond_one(of_groups: Sequence[int]) -> int:
    """Bytes of all groups but the largest, which stock vLLM has, too."""
    return sum(of_groups) - max(of_groups, default=0)


def less(worker: Any, available: int) -> int:
    """What is left for the KV cache of a GPU worker's ``available`` bytes; all of it where the operator has said how
    much that is."""
    if worker.cache_config.kv_cache_memory_bytes:
        return available
    runner = worker.model_runner
    specs = runner.get_kv_cache_spec().values()
    # Model Runner V2 has the tables that a step reads beside those that it keeps.
    tables = tables_of(specs, runner, 2 if worker.use_v2_model_runner else 1)
    taken = beyond_one(tables) + beyond_one(runner.flow_scratch) + runner.flow_variants_scratch
    logger.info_once(
        "Block tables and buffers of storage groups beyond one take %s GiB, which the KV cache does not get.",
        format_gib(taken),
    )
    worker.total_consumed += taken
    worker.available_kv_cache_memory_bytes -= taken
    return available - taken
