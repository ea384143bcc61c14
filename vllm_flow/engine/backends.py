"""Refuses, when the model is loaded, attention backends of which one step cannot have two sets of metadata.

In a step with eviction, layers past a stage need metadata of their own beside vLLM's. Some metadata builders write into
one buffer and return pointers into it. Metadata built second would overwrite those built first, all layers would read
the last, and answers would be wrong without an error. For FlashInfer each variant therefore has a builder of its own
(`variant_builders`). FlexAttention is refused: each further builder would take memory in proportion to the blocks of
the cache, and vLLM chooses this backend only where no other one fits.

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
