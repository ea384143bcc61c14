"""Whole tokens moved within the paged cache, in every way of storing them, and between groups that share memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.engine.test_keys import (
    BLOCKS,
    FLOAT,
    HEADS,
    SIZE,
    SLOTS,
    WAYS,
    layer_writing,
    slot_writer,
    strided,
)
from vllm_flow.engine.worker.moving import RowMover
from vllm_flow.engine.worker.slots import token_places
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.rewriting import Rewrite
from vllm_flow.spans import ImageSpans


@pytest.mark.parametrize(("write", "cache"), [way[:2] for way in WAYS.values()], ids=WAYS)
def test_a_token_that_was_moved_is_as_if_written_there(write: Any, cache: torch.Tensor) -> None:
    if current_platform.is_cpu():
        current_platform.import_kernels()
    cache = cache.clone(memory_format=torch.preserve_format)
    layer = layer_writing(write, cache)
    try:
        places = token_places(layer)
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" not in str(error):
            raise
        pytest.skip(f"vLLM has no such kernel for this processor: {error}")
    assert not cache.any(), "the block that was tried must be as it was"
    random = torch.manual_seed(1)
    keys, values = torch.randn(2, BLOCKS * SLOTS, HEADS, SIZE, generator=random).to(cache.dtype)
    everywhere = torch.arange(BLOCKS * SLOTS)
    write(layer, keys, values, cache, everywhere)
    order = torch.randperm(BLOCKS * SLOTS, generator=random)
    source, target = order[:40], order[30:70]  # some are read and written
    places.put(cache, target, places.take(cache, source))
    moved = everywhere.clone()
    moved[target] = source
    expected = torch.zeros_like(cache)
    write(layer_writing(write, expected), keys[moved], values[moved], expected, everywhere)
    assert torch.equal(cache, expected)


def test_values_narrower_than_keys_move_with_them() -> None:
    """MiMo-V2; of token-major layouts, the only ones that have such."""
    cache = strided(KVCacheLayout.LBNHC, FLOAT, (BLOCKS, HEADS, SLOTS, SIZE + SIZE // 2))
    layer = layer_writing(slot_writer, cache)
    layer.head_size_v = SIZE // 2
    assert token_places(layer).slot_NC is None
    layer.head_size_v = SIZE
    with pytest.raises(ValueError, match="stores more than a key and a value"):
        token_places(layer)


def rounding(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    slot_writer(layer, key.div(2).round(), value, cache, slots)


def heads_apart(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    turned = torch.stack([key[:, 0], *key[:, 1:].flip(-1).unbind(1)], 1)
    slot_writer(layer, turned, value, cache, slots)


@pytest.mark.parametrize("write", [rounding, heads_apart])
def test_what_does_not_keep_tokens_as_they_are_is_refused(write: Any) -> None:
    cache = strided(KVCacheLayout.LBHNC, FLOAT)
    with pytest.raises(ValueError, match="SOME_BACKEND"):
        token_places(layer_writing(write, cache))
    assert not cache.any()


def test_a_quantised_cache_is_refused() -> None:
    layer = layer_writing(slot_writer, strided(KVCacheLayout.LBHNC, torch.uint8))
    layer.dtype = FLOAT
    with pytest.raises(ValueError, match="stored as torch.uint8"):
        token_places(layer)


def test_a_cache_with_room_for_more_is_refused() -> None:
    cache = strided(KVCacheLayout.LBHNC, FLOAT, (BLOCKS, HEADS, SLOTS, 2 * SIZE + 1))
    with pytest.raises(ValueError, match="SOME_BACKEND stores more"):
        token_places(layer_writing(slot_writer, cache))


class Backend:
    """Hashable, as backends are."""

    get_name = staticmethod(lambda: "SOME_BACKEND")


def test_blocks_that_go_round_between_requests_and_groups() -> None:
    """A full pool: what one gives back, another takes in the same step, in memory that both share."""
    cache = strided(KVCacheLayout.LBHNC, FLOAT)
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(2)]
    layers = {name: layer_writing(slot_writer, cache) for name in names}
    for layer in layers.values():
        layer.attn_backend = Backend
    spec = SimpleNamespace(block_size=SLOTS)
    groups = [SimpleNamespace(layer_names=[name], kv_cache_spec=spec) for name in names]
    config: Any = SimpleNamespace(kv_cache_groups=groups, needs_kv_cache_zeroing=False)
    mover = RowMover(config, layers)
    assert mover.unmovable is None
    # Thirty tokens of image between text, then the prompt ends in its second block.
    policy = FlowPolicy(((Stage(0),),), when="decode")
    layout = TokenLayout.of(policy, ImageSpans(((2, 32),)), prompt_tokens=SLOTS + 8)
    blocks = {0: (1, 2), 1: (3, 4)}
    keys = torch.randn(BLOCKS * SLOTS, HEADS, SIZE)
    slot_writer(None, keys, -keys, cache, torch.arange(BLOCKS * SLOTS))
    rewrites = {
        "a": {0: Rewrite(0, blocks[0], (3,)), 1: Rewrite(0, blocks[1], (2,))},
    }
    mover.move(rewrites, {"a": layout})
    kept = [0, 1, *range(32, SLOTS + 8)]
    for group, new in ((0, 3), (1, 2)):
        old = torch.tensor(blocks[group])
        slots = (old[:, None] * SLOTS + torch.arange(SLOTS)).flatten()[kept]
        assert torch.equal(cache[new, :, : len(kept), :SIZE], keys[slots].transpose(0, 1))
        assert torch.equal(cache[new, :, : len(kept), SIZE:], -keys[slots].transpose(0, 1))
    untouched = torch.arange(SLOTS)
    assert torch.equal(cache[0, :, :, :SIZE], keys[untouched].transpose(0, 1))


def test_nothing_is_moved_into_blocks_that_vllm_empties_afterwards() -> None:
    """It is told of a step's new blocks, some of which another request of that step may have taken since."""
    config: Any = SimpleNamespace(kv_cache_groups=[], needs_kv_cache_zeroing=True)
    mover = RowMover(config, {})
    assert mover.unmovable is not None and "empties" in mover.unmovable
    with pytest.raises(RuntimeError, match="empties"):
        mover.move({}, {})
