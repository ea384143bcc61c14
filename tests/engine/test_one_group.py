"""Storage groups let nothing through that stock vLLM, with its one KV-cache group, refuses.

vLLM takes several groups for a hybrid model and then allows, or quietly does, other things. Listed
is every place of vLLM 0.32 that asks for the number of groups and that a setting leads to; what
stock allows must mean the same with groups.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.bare_scheduler import OpenBare
from tests.engine.harness import BLOCK_SIZE, STOCK
from tests.engine.test_cache_counts import ROOM, counts

GROUPS = (1, 2, 3, 6)

REFUSED_BY_STOCK: tuple[tuple[dict[str, Any], str], ...] = (
    # resolve_kv_cache_block_sizes: several groups may hash in finer units than blocks.
    ({"prefix_match_unit": 1}, "prefix_match_unit"),
    ({"prefix_match_unit": BLOCK_SIZE // 2}, "prefix_match_unit"),
    ({"prefix_match_unit": BLOCK_SIZE * 2}, "prefix_match_unit"),
    ({"prefix_match_unit": 16, "block_size": 64}, "prefix_match_unit"),
    # _validate_prefix_cache_retention_interval: a matter of the groups' kinds.
    ({"prefix_cache_retention_interval": BLOCK_SIZE}, "prefix_cache_retention_interval"),
    # VllmConfig's checks, which are over before there are groups.
    ({"mamba_block_size": 64, "enable_prefix_caching": False}, "mamba-block-size"),
    ({"enable_return_routed_experts": True}, "AuxOutput"),
    ({"watermark": -0.5}, "watermark"),
)

REFUSED_WITH_GROUPS: tuple[tuple[dict[str, Any], str], ...] = (
    # get_kv_cache_groups: with a single group for all layers there would be nothing to save.
    ({"disable_hybrid_kv_cache_manager": True}, "leave out disable_hybrid_kv_cache_manager"),
    # request_finished: connectors are told of one group, or of all.
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "'ExampleConnector', which knows one block table per request",
    ),
    # get_kv_cache_groups: no layer, so no group.
    ({"mm_encoder_only": True}, "leave out mm_encoder_only"),
)

MEANS_THE_SAME: tuple[dict[str, Any], ...] = (
    {"prefix_match_unit": BLOCK_SIZE},
    {"block_size": 16},
    {"block_size": 64},
    {"prefix_cache_retention_interval": None},
    {"prefix_cache_retention_interval": 0},
    {"mamba_cache_mode": "align"},
    {"mamba_block_size": 64},
    {"enable_mamba_shared_prefix_checkpoint": True},
    {"kv_cache_dtype_skip_layers": ["0", "3"]},
    {"swa_bounded_replay": False},
    {"watermark": 0.1},
    {"scheduler_reserve_full_isl": False},
    {"disable_chunked_mm_input": True},
    {"disable_hybrid_kv_cache_manager": False},
    {"kv_offloading_size": 0.01},
    {"kv_cache_metrics": True, "kv_cache_metrics_sample": 1.0},
)


def named(value: Any) -> str | None:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("arguments", "message"), REFUSED_BY_STOCK, ids=named)
def test_what_stock_refuses_is_refused(
    bare: OpenBare, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, AssertionError), match=message):
        bare(STOCK, ROOM, **arguments)
    for group_layers in GROUPS:
        with pytest.raises((ValueError, AssertionError), match=message):
            bare(group_layers, ROOM, **arguments)


@pytest.mark.parametrize(("arguments", "message"), REFUSED_WITH_GROUPS, ids=named)
def test_what_groups_cannot_do_is_refused_with_a_remedy(
    bare: OpenBare, arguments: dict[str, Any], message: str
) -> None:
    for group_layers in GROUPS:
        with pytest.raises(ValueError, match=message):
            bare(group_layers, ROOM, **arguments)


@pytest.mark.parametrize("arguments", MEANS_THE_SAME, ids=named)
def test_what_stock_accepts_means_the_same(bare: OpenBare, arguments: dict[str, Any]) -> None:
    stock = bare(STOCK, ROOM, **arguments)
    expected = counts(stock, None)
    for group_layers in (1, 3):
        engine = bare(group_layers, ROOM, **arguments)
        sizes = [
            (one.scheduler.block_size, one.scheduler.hash_block_size) for one in (engine, stock)
        ]
        assert sizes[0] == sizes[1]
        assert counts(engine, None) == expected
        engine = bare(group_layers, ROOM, **arguments)
        assert counts(engine, 0) == expected


def test_hashes_in_other_units_do_no_harm_where_nothing_is_looked_up(bare: OpenBare) -> None:
    arguments = {"prefix_match_unit": 16, "enable_prefix_caching": False}
    for group_layers in (STOCK, 2):
        assert set(counts(bare(group_layers, ROOM, **arguments), None).values()) == {(0, 0)}


def test_the_scheduler_refuses_a_block_size_that_changed_since_start_up(bare: OpenBare) -> None:
    """An attention backend may choose a block size after the configuration was checked."""
    from vllm_flow.engine.support import check_hash_unit

    check_hash_unit(32, [32, 32])
    with pytest.raises(ValueError, match="prefix_match_unit, or set it to 64"):
        check_hash_unit(32, [64, 64])
