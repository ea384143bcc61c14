"""Refuses attention backends that cannot have two metadata in one step, when the model is loaded.

A step with eviction has metadata for the layers past each stage beside vLLM's own. Some builders write what they made
into memory of their own, which every metadata they hand out points into: the one made last would be what all layers
read, and answers would be wrong without a word. FlashInfer's has others beside it (`variant_builders`). FlexAttention's
would take memory by the number of blocks in the cache each, and vLLM chooses it where no other backend is left.

Seam: ``build`` of the metadata builders in ``vllm/v1/attention/backends``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

TESTED_LATENT = ("CPU_MLA",)
"""Backends of latent attention that eviction was shown to be exact with."""

ONE_AT_A_TIME = {
    "FLEX_ATTENTION": "keeps lengths and block tables of every step in one buffer",
}
"""Backend -> what of it there is once."""


def used(attn_groups: Iterable[Iterable[Any]]) -> list[Any]:
    """vLLM's backend classes in these groups, each once.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.
    """
    return list({group.backend: None for of_group in attn_groups for group in of_group})


def untested_latent(backend: Any) -> str | None:
    """A sentence about a backend of latent attention that nobody has tested; None of others."""
    name = backend.get_name()
    if not backend.is_mla() or name in TESTED_LATENT:
        return None
    return (
        f"vLLM-Flow evicts from latent attention with {' and '.join(TESTED_LATENT)}, the backend that it was tested "
        f"with, on a CPU, but this engine has {name}: set untested_models of additional_config['vllm_flow'] to "
        "true to try it, or leave out additional_config['vllm_flow']."
    )


def check(attn_groups: Iterable[Iterable[Any]], untested: bool = False) -> None:
    """Refuse them, and those of latent attention that nobody has tested.

    Args:
        untested: the setting ``untested_models``.

    Of each storage group, vLLM keeps in one buffer the table of the smaller blocks that some kernels take.

    Raises:
        ValueError: names the backend and others, or the block size.
    """
    attn_groups = [list(groups) for groups in attn_groups]
    for group in (group for groups in attn_groups for group in groups):
        if group.kernel_block_size is not None:
            raise ValueError(
                f"vLLM-Flow does not support the attention backend {group.backend.get_name()} where its "
                f"kernels divide blocks: start with --block-size {group.kernel_block_size}, or leave out "
                "additional_config['vllm_flow']."
            )
    for backend in used(attn_groups):
        name = backend.get_name()
        if not untested and (reason := untested_latent(backend)) is not None:
            raise ValueError(reason)
        if name in ONE_AT_A_TIME:
            raise ValueError(
                f"vLLM-Flow does not support the attention backend {name}, which {ONE_AT_A_TIME[name]}, where "
                "layers before and past a cliff differ: start with --attention-backend FLASH_ATTN or "
                "TRITON_ATTN, or leave out additional_config['vllm_flow']."
            )
