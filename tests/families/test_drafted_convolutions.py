"""What vLLM's own function for a CPU makes of states with drafts, and why they are refused there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.engine import v2_cpu
from tests.families.drafted_states import GUESSES

pytestmark = pytest.mark.skipif(v2_cpu.wanted(), reason="drafts beside states run under V1")


@pytest.mark.parametrize("drafts", [(3, 3), (1, 3), (0, 2)])
def test_vllms_own_function_loses_what_a_convolution_needs(
    drafts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a CPU is refused; put right in vLLM 0.33, of which there is no build for one."""
    import vllm
    from packaging.version import Version
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    from tests.families import gated_delta

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(gdn_attention, "ops", gated_delta._Kernels)
    width, channels, heads, size, kept = 4, 12, 1, 4, 3 + GUESSES
    layer = SimpleNamespace(
        conv1d=SimpleNamespace(weight=torch.randn(channels, 1, width), bias=None),
        activation="silu",
        A_log=torch.zeros(heads),
        dt_bias=torch.zeros(heads),
        rearrange_mixed_qkv=lambda mixed: [
            part.reshape(1, len(mixed), heads, size) for part in mixed.split(size, -1)
        ],
    )
    results = []
    for forward in (gated_delta.STOCK, gated_delta._check_drafts):
        generator = torch.Generator().manual_seed(7)
        windows = torch.randn(2, channels, kept, generator=generator)
        memory = torch.zeros(2 + GUESSES, heads, size, size)
        found = []
        for accepted, count in zip((2, 1), drafts, strict=True):
            metadata = SimpleNamespace(
                num_spec_decodes=1,
                spec_state_indices_tensor=torch.arange(1, 2 + GUESSES)[None],
                spec_query_start_loc=torch.tensor([0, 1 + count]),
                num_accepted_tokens=torch.tensor([accepted]),
            )
            mixed = torch.randn(1 + count, channels, generator=generator)
            gates = torch.zeros(1 + count, heads)
            try:
                found.append(
                    forward(layer, metadata, mixed, gates, gates, windows, memory, width, kept)
                )
            except RuntimeError as error:
                assert "must match the size" in str(error)
                found.append(torch.full((1 + count, heads, size), torch.nan))
        results.append(torch.cat(found))
    right = drafts[0] == GUESSES or Version(vllm.__version__) >= Version("0.33")
    assert torch.allclose(*results, atol=1e-5) == right
