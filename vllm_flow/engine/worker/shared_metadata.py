"""Attention metadata of storage groups that read the same rows: built once, with blocks and slots of each.

A backend's build may launch a kernel that schedules its attention (FlashAttention 3), or plan for each request. Of
storage groups with one set of rows all that is the same.

Seam: ``AttentionGroup.build_metadata``, and ``update_block_table`` of a backend's metadata builder, where it has one.
Model Runner V2 builds group by group. V1 shares by itself among groups whose specifications are equal, and those of
storage groups never are: they name their layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_flow.engine.states import is_state

Made = TypeVar("Made")


def build(
    attn_group: Any, common: CommonAttentionMetadata, built: dict[Any, Any], **arguments: Any
) -> Any:
    """The backend's metadata of a group, from what was built of the same rows before, where the backend can.

    Args:
        attn_group: vLLM's ``AttentionGroup``.
        common: its rows, blocks and slots.
        built: of these rows so far; one dictionary for all groups of a variant, or of a step without variants.
        arguments: what the backend's ``build`` takes beside.
    """
    builder, spec = attn_group.get_metadata_builder(0), attn_group.kv_cache_spec
    if not builder.supports_update_block_table or attn_group.kernel_block_size is not None:
        return attn_group.build_metadata(common, **arguments)
    # A drafter's layers may be stored like the target's and have other heads.
    heads = getattr(builder, "num_heads_q", None)
    kind = (type(builder), heads, getattr(spec, "without_layers", spec))
    if kind in built:
        return builder.update_block_table(
            built[kind], common.block_table_tensor, common.slot_mapping
        )
    built[kind] = metadata = attn_group.build_metadata(common, **arguments)
    return metadata


class SharingGroup:
    """vLLM's ``AttentionGroup`` as a runner is shown it while it builds one step, see :func:`sharing`."""

    def __init__(self, attn_group: Any, built: dict[Any, Any]) -> None:
        self._group, self._built = attn_group, built

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def build_metadata(
        self, common_attn_metadata: CommonAttentionMetadata, ubatch_idx: int = 0, **arguments: Any
    ) -> Any:
        if ubatch_idx or arguments or is_state(self._group.kv_cache_spec):
            return self._group.build_metadata(common_attn_metadata, ubatch_idx, **arguments)
        return build(self._group, common_attn_metadata, self._built)


def sharing(attn_groups: Sequence[Sequence[Any]]) -> list[list[SharingGroup]]:
    """A runner's groups for the metadata of one step, all of whose rows every layer sees.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.
    """
    built: dict[Any, Any] = {}
    return [[SharingGroup(group, built) for group in groups] for groups in attn_groups]


def shown(runner: Any, make: Callable[..., Made], *args: Any, **kwargs: Any) -> Made:
    """What Model Runner V1 makes of some arguments while its groups share; a capture builds each of them by itself."""
    whole, runner.attn_groups = runner.attn_groups, sharing(runner.attn_groups)
    try:
        return make(*args, **kwargs)
    finally:
        runner.attn_groups = whole
