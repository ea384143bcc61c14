"""Metadata builders of a step's variants, for backends whose builder keeps what it has planned.

What FlashInfer's builder hands out points into memory of its own: the wrapper that prefills are planned in, that of
decodes, the pages of all requests, and for TRT-LLM's prefill kernel the sums of their numbers. What it builds next
overwrites them. The layers of a storage group that a cliff crosses differ in one step, so each variant in it has a
builder of its own beside vLLM's: of the same class, made the same way, kept for the steps to come. There are never more
of them than the group has layers.

All share one buffer for intermediate results, as the builders of vLLM's own groups do: layers run one after the other.

Seams: vLLM's ``AttentionGroup`` and its ``create_metadata_builders``; ``_get_workspace_buffer`` and
``set_workspace_buffer`` of a builder, as ``init_attn_backend`` of ``vllm/v1/worker/gpu/attn_utils.py`` calls them; of
FlashInfer's builder ``enable_cuda_graph``, what says which kernels it takes, and ``global_hyperparameters``, which
``get_per_layer_parameters`` of ``vllm/v1/attention/backends/utils.py`` tells of single layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.v1.attention.backends.utils import get_per_layer_parameters

PLANNING = ("FLASHINFER", "TRITON_FLASHINFER")
"""Backends whose builder keeps one plan; the second of a composite's, FlashInfer's, does."""


class VariantBuilders:
    """Attention groups like a runner's, each with a builder of its own; made when they are first asked for."""

    def __init__(self) -> None:
        self._own: dict[tuple[int, int], Any] = {}

    def of(self, attn_group: Any, number: int) -> Any:
        """The group by which a variant's metadata are built: vLLM's own, where its backend keeps nothing.

        Args:
            attn_group: vLLM's ``AttentionGroup``, which lives as long as this object.
            number: which of the variants that its layers are in, from 0.
        """
        if not plans(attn_group):
            return attn_group
        key = id(attn_group), number
        if key not in self._own:
            self._own[key] = another(attn_group)
        return self._own[key]


def plans(attn_group: Any) -> bool:
    """Whether its builder keeps one plan."""
    return attn_group.backend.get_name() in PLANNING


def another(attn_group: Any, layer_names: list[str] | None = None) -> Any:
    """A group of the same blocks, with another builder, which has its scratch from the first one.

    Args:
        layer_names: some of its layers; all where they are left out.
    """
    stock = attn_group.get_metadata_builder(0)
    names = attn_group.layer_names if layer_names is None else layer_names
    own = replace(attn_group, layer_names=names, metadata_builders=[])
    # Which kernels there are, a builder asks the engine's configuration.
    with set_current_vllm_config(stock.vllm_config):
        own.create_metadata_builders(stock.vllm_config, stock.device)
    share_scratch([stock, own.get_metadata_builder(0)])
    return own


def share_scratch(builders: Iterable[Any]) -> None:
    """Give all builders the first one's buffer for intermediate results; those of other backends have none."""
    scratch = None
    for builder in builders:
        if not hasattr(builder, "set_workspace_buffer"):
            continue
        if scratch is None:
            scratch = builder._get_workspace_buffer()
        builder.set_workspace_buffer(scratch)


def settle(attn_groups: Iterable[list[Any]], full_graphs: bool) -> None:
    """What a runner's groups lack once it has decided on its graphs.

    - Model Runner V1 gives each group scratch of its own, which stock vLLM has once and storage groups would have many
      times.
    - A builder made before vLLM gave full graphs up keeps a wrapper, with the memory of one, for each number of
      requests.
    - A plan is for layers of one sliding window. vLLM stores those of another apart, a storage group does not.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects; where layers differ, more take their place.
        full_graphs: whether decode steps are captured as a whole.
    """
    for of_group in attn_groups:
        found = [
            part for group in of_group for part in (divided(group) if plans(group) else [group])
        ]
        if len(found) > len(of_group):
            of_group[:] = found
    builders = [
        b for groups in attn_groups for g in groups if plans(g) for b in g.metadata_builders
    ]
    share_scratch(builders)
    if not full_graphs:
        for part in (part for builder in builders for part in parts_of(builder)):
            if hasattr(part, "enable_cuda_graph"):
                part.enable_cuda_graph = False


def divided(attn_group: Any) -> list[Any]:
    """A group as groups of layers that can be planned together: of one window, scale and soft cap, sinks or none."""
    builder = attn_group.get_metadata_builder(0)
    known = [getattr(part, "global_hyperparameters", None) for part in parts_of(builder)]
    if all(one is None or one.has_same_all_params for one in known):
        return [attn_group]
    from vllm.v1.attention.backends.flashinfer import FlashInferImpl  # needs FlashInfer

    kinds: dict[Any, list[str]] = {}
    layers = get_per_layer_parameters(builder.vllm_config, attn_group.layer_names, FlashInferImpl)
    for name, own in layers.items():
        kind = own.window_left, own.logits_soft_cap, own.sm_scale, own.has_sinks
        kinds.setdefault(kind, []).append(name)
    return [another(attn_group, names) for names in kinds.values()]


def parts_of(builder: Any) -> Iterator[Any]:
    """A builder, and those that it is composed of."""
    yield builder
    yield from getattr(builder, "_builders", ())


def plans_prompts(attn_group: Any) -> bool:
    """Whether FlashInfer's own kernels take prompts, which are planned; on Blackwell TRT-LLM's do."""
    parts = parts_of(attn_group.get_metadata_builder(0))
    kernels = [getattr(part, "flashinfer_trtllm_api_decode_kernel", None) for part in parts]
    return not any(kernel is not None and kernel.value == "trtllm-gen" for kernel in kernels)


def decodes_without_plan(attn_group: Any) -> bool:
    """Whether FlashInfer's decode steps read lengths and tables from the device, as TRT-LLM's kernels and XQA do.

    Its own kernels are planned on the host, in each step anew.
    """
    parts = parts_of(attn_group.get_metadata_builder(0))
    return any(getattr(part, "use_trtllm_decode_attention", False) for part in parts)
