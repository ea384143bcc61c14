"""Computes what a request must cost at least, from shapes alone: rows, FLOPs, bytes, blocks. Pure integers.

Every measured figure of the profile stands beside one of these. Knows no engine and no clock.

A policy is a cliff (the number of layers that see the image; the number of layers is the baseline), or
anything of the grammar: what counts is how many image tokens each layer keeps.

Conventions. A multiply-add counts as two FLOPs. A prompt has ``text_tokens`` + ``image_tokens``
rows; decoder layers with index < cliff - 1 run all of them, layer cliff - 1 the text rows and the keys
and values of the image's, the others the text rows only; cliff = number of layers is the baseline. Sums
over causal attention count the pairs that exist, i.e. R (R + 1) / 2 for R rows, wherever in the prompt
the image stands; in layer cliff - 1 it stands before the text, as most do. Norms, rotary embeddings and
softmax are left out: they are linear in the rows, below one per cent of the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vllm_flow.block_counts import predict_blocks
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.profile.dimensions import Layered, ModelShape, TowerShape, Workload
from vllm_flow.ranks import RANKS
from vllm_flow.spans import ImageSpans

Policy: TypeAlias = "int | FlowPolicy"
"""A cliff, or a policy of the grammar."""


def row_count_ideal(
    *,
    num_layers: int,
    cliff: int,
    prompt_tokens: int,
    image_tokens: int,
    key_share: float = 1.0,
) -> float:
    """Prefill speed-up if time were proportional to rows x layers.

    Rows of all layers without eviction over rows of all layers with it; the vision tower, the
    output head and the quadratic part of attention are not counted.

    Args:
        key_share: what an image row costs in the last layer before the cliff, which needs its keys and
            values alone, as a part of a layer; 1 where that layer runs whole.
    """
    full = num_layers * prompt_tokens
    paid = image_row_cost(num_layers, cliff, key_share)
    return full / (full - (num_layers - paid) * image_tokens)


def image_row_cost(num_layers: int, cliff: int, key_share: float) -> float:
    """What an image row costs in prefill, in layers; ``key_share`` as in :func:`row_count_ideal`."""
    return cliff - 1 + key_share if 0 < cliff < num_layers else cliff


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs by what they are spent on."""

    linear: int
    """Projections and MLPs of the decoder layers."""
    attention: int
    head: int
    tower: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head + self.tower


def kept_tokens(shape: Layered, work: Workload, policy: Policy) -> tuple[int, ...]:
    """Image tokens that each decoder layer stores, once the prompt is computed and before decoding ends.

    Raises:
        ValueError: a cliff that is not in [0, layers].
    """
    if isinstance(policy, int):
        if not 0 <= policy <= shape.layers:
            raise ValueError(f"cliff={policy}: it must be in 0 ... {shape.layers}.")
        return tuple(work.image_tokens if n < policy else 0 for n in range(shape.layers))
    if policy.when == "decode" and work.output_tokens < 2:  # they leave with the second token
        return (work.image_tokens,) * shape.layers
    return tuple(
        sum(policy.kept(layer, image, size) for image, size in enumerate(_sizes(work)))
        for layer in range(shape.layers)
    )


def _sizes(work: Workload) -> list[int]:
    """Tokens of each image: all alike, but for a remainder."""
    images = max(1, work.images)
    each = work.image_tokens // images
    return [each] * (images - 1) + [work.image_tokens - each * (images - 1)]


def _prefilled(shape: Layered, work: Workload, policy: Policy) -> tuple[int, ...]:
    """Image tokens that each decoder layer needs in prefill."""
    if isinstance(policy, FlowPolicy) and policy.when == "decode":
        return (work.image_tokens,) * shape.layers
    return kept_tokens(shape, work, policy)


def key_rows(shape: Layered, work: Workload, policy: Policy) -> tuple[int, ...]:
    """Prompt rows of which each layer computes and stores the keys and values only: they leave after it.

    Not before a stage that ranks by this layer: who leaves is known only once it has run.
    """
    kept = _prefilled(shape, work, policy)
    ranked: set[int] = set()
    if isinstance(policy, FlowPolicy):
        ranked = {
            stage.layer
            for stages in policy.images
            for stage in stages
            if stage.rank is not None and RANKS[stage.rank].reads_layer
        }
    after = (*kept[1:], kept[-1])
    return tuple(
        0 if layer + 1 in ranked else now - then
        for layer, (now, then) in enumerate(zip(kept, after, strict=True))
    )


def layer_rows(shape: Layered, work: Workload, policy: Policy) -> tuple[int, ...]:
    """Prompt rows that run through each decoder layer; those of which it only stores keys do not.

    Raises:
        ValueError: a cliff that is not in [0, layers].
    """
    kept, keys = _prefilled(shape, work, policy), key_rows(shape, work, policy)
    return tuple(work.text_tokens + n - k for n, k in zip(kept, keys, strict=True))


def rows_ideal(
    shape: Layered, work: Workload | Sequence[Workload], policy: Policy, key_share: float = 1.0
) -> float:
    """:func:`row_count_ideal` of any policy: its rows, stage by stage.

    Args:
        work: a request, or all of a batch.
        key_share: what a row costs of which a layer needs the keys and values alone; 1 where every
            layer runs whole.
    """
    batch = [work] if isinstance(work, Workload) else work
    rows = sum(sum(layer_rows(shape, one, policy)) for one in batch)
    keys = sum(sum(key_rows(shape, one, policy)) for one in batch)
    return shape.layers * sum(one.prompt_tokens for one in batch) / (rows + key_share * keys)


def tower_flops(tower: TowerShape | None, images: int, hidden: int) -> int:
    """FLOPs of the vision tower and the projector into the decoder's width ``hidden``."""
    if tower is None:
        return 0
    rows = tower.patches + tower.class_rows
    weights = 4 * tower.hidden**2 + (3 if tower.gated else 2) * tower.hidden * tower.mlp
    windowed = 0 if tower.window is None else tower.layers - tower.whole_layers
    seen = (tower.layers - windowed) * rows + windowed * min(tower.window or rows, rows)
    layers = 2 * rows * tower.layers * weights + 4 * tower.hidden * rows * seen
    embed = 2 * tower.patches * tower.patch_values * tower.hidden
    enters, between = tower.merged * tower.hidden, tower.projector or hidden
    project = 2 * (tower.patches // tower.merged) * (enters * between + between * hidden)
    return images * tower.passes * (layers + embed + project)


def prefill_flops(
    shape: ModelShape, work: Workload, policy: Policy, *, with_tower: bool = True
) -> Flops:
    """FLOPs of one request's prefill up to its first token.

    Args:
        with_tower: False where the image's features are in the encoder cache.
    """
    rows, keys = layer_rows(shape, work, policy), key_rows(shape, work, policy)
    # The text attends to all of them, and of the image's own rows each to half, wherever they lie.
    seen = sum(
        k * (work.text_tokens + (r - work.text_tokens) // 2)
        for r, k in zip(rows, keys, strict=True)
    )
    pairs = sum(r * (r + 1) // 2 for r in rows) + seen
    return Flops(
        linear=2 * (shape.layer_parameters * sum(rows) + shape.key_parameters * sum(keys)),
        attention=4 * shape.heads * shape.head_dim * pairs,
        head=2 * shape.head_parameters,
        tower=tower_flops(shape.tower, work.images, shape.hidden) if with_tower else 0,
    )


def prefill_ratio(
    shape: ModelShape, work: Workload, policy: Policy, *, with_tower: bool = True
) -> float:
    """The baseline's prefill FLOPs over the policy's: the speed-up of a FLOP-bound prefill."""
    full = prefill_flops(shape, work, shape.layers, with_tower=with_tower)
    return full.total / prefill_flops(shape, work, policy, with_tower=with_tower).total


def stored_tokens(shape: ModelShape, work: Workload, policy: Policy, context: int) -> int:
    """Keys that one decoded row reads in all layers together, at ``context`` tokens so far."""
    gone = shape.layers * work.image_tokens - sum(kept_tokens(shape, work, policy))
    return shape.layers * context - gone


def decode_step_bytes(shape: ModelShape, work: Workload, policy: Policy, batch: float) -> float:
    """Bytes a decode step reads, averaged over a request: weights once, each request's keys and values."""
    weights = (shape.layers * shape.layer_parameters + shape.head_parameters) * shape.value_bytes
    context = work.prompt_tokens + work.output_tokens / 2
    gone = shape.layers * work.image_tokens - sum(kept_tokens(shape, work, policy))
    tokens = shape.layers * context - gone
    return weights + batch * tokens * shape.token_bytes


def decode_ratio(shape: ModelShape, work: Workload, policy: Policy, batch: float) -> float:
    """The baseline's bytes per decode step over the policy's: the speed-up of a memory-bound decode."""
    full = decode_step_bytes(shape, work, shape.layers, batch)
    return full / decode_step_bytes(shape, work, policy, batch)


def kv_bytes(shape: ModelShape, work: Workload, policy: Policy) -> int:
    """Bytes of one request's keys and values at its end, without the rounding to blocks."""
    return stored_tokens(shape, work, policy, work.computed_tokens) * shape.token_bytes


def layout(work: Workload, policy: Policy) -> TokenLayout | None:
    """A layout with this many image tokens, None where nothing is evicted; where the images stand does not
    matter once all is computed."""
    flow = FlowPolicy.withdrawal(policy) if isinstance(policy, int) else policy
    ends = list(itertools.accumulate(_sizes(work), initial=0))
    images = [ImageSpans.from_ranges([pair]) for pair in itertools.pairwise(ends)]
    return TokenLayout.of(flow, images, work.prompt_tokens)


def kv_blocks(
    work: Workload, policy: Policy, group_starts: Sequence[int], block_size: int
) -> tuple[int, ...]:
    """KV blocks one request holds at its end, per storage group."""
    plan = layout(work, policy) if work.image_tokens else None
    return predict_blocks(work.computed_tokens, plan, group_starts, block_size)


def concurrent_requests(pool_blocks: int, blocks_each: int) -> int:
    """Requests that a pool holds to their ends without preemption."""
    return pool_blocks // blocks_each


def end_to_end_ratio(
    total_seconds: float,
    parts: Iterable[tuple[float, float]],
) -> float:
    """Amdahl's law: stock's time over what is left of it when parts of it shrink.

    Args:
        total_seconds: stock's time for a load.
        parts: (seconds, ratio) of disjoint parts of it, each with its own ideal speed-up. What is in
            no part (front end, host) is taken as it is.

    Raises:
        ValueError: the parts are longer than the whole, or one is negative.
    """
    parts = list(parts)
    inside = sum(seconds for seconds, _ in parts)
    if inside > total_seconds or any(seconds < 0 for seconds, _ in parts):
        raise ValueError(f"parts of {[s for s, _ in parts]} s of {total_seconds} s in all")
    return total_seconds / (total_seconds - sum(s * (1 - 1 / ratio) for s, ratio in parts))
