"""Qwen-VL's tower beside the one that its report describes, each of its constants included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.families import qwen_vl
from tests.families.making import fill
from tests.families.qwen_vl_reference import Tower

VISUAL = qwen_vl.config_of(0)["visual"]
FAINT = (
    *("conv1.", "positional_embedding", "ln_pre.", "c_proj.", "out_proj.", "attn_pool.query"),
    "attn_pool.kv_proj",
)
"""What the norms' inputs come from: with these a thousandth, inputs are as small as the norms' epsilon."""
PIXELS = torch.randn(2, 3, qwen_vl.SIDE, qwen_vl.SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Any]]:
    """Ours and the reference with one set of weights, 24 x 24 patches on 16 x 16 learned positions, two heads in
    the tower and two in the resampler; once with weights such that every norm's input is next to nothing."""
    from vllm.distributed import parallel_state

    from vllm_flow.models.qwen_vl_tower import QwenVLTower

    # vLLM's linear layers ask which of the workers they are on.
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    made = {}
    for kind, parts in (("plain", ()), ("faint", FAINT)):
        reference, tower = Tower(VISUAL, 256), QwenVLTower(**VISUAL)
        fill(reference, 1)
        with torch.no_grad():
            for name, weight in reference.named_parameters():
                if any(part in name for part in parts):
                    weight *= 1e-3
        tower.load_state_dict(reference.state_dict())
        projection = tower.attn_pool.kv_proj
        projection.quant_method.process_weights_after_loading(projection)
        made[kind] = (tower, reference)
    return made


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Rounding alone is less than a tenth of this."""
    return torch.allclose(found, expected, atol=3e-5)


@torch.inference_mode()
def test_the_tower_is_the_published_one(towers: dict[str, tuple[Any, Any]]) -> None:
    for tower, reference in towers.values():
        found, expected = tower(PIXELS), reference(PIXELS)
        assert found.shape == (2, 256, 256)
        assert float(expected.std()) > 0.1
        assert same(found, expected)


@torch.inference_mode()
def test_another_epsilon_of_any_norm_would_be_seen(towers: dict[str, tuple[Any, Any]]) -> None:
    expected = {kind: reference(PIXELS) for kind, (_, reference) in towers.items()}
    norms = [
        name
        for name, module in towers["plain"][0].named_modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    assert len(norms) == 4 + 2 * VISUAL["layers"]
    for name in norms:
        seen = []
        for kind, (tower, _) in towers.items():
            norm = tower.get_submodule(name)
            norm.eps *= 10
            seen.append(not same(tower(PIXELS), expected[kind]))
            norm.eps /= 10
        assert any(seen), name
