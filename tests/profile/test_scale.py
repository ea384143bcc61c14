"""The fleet's arithmetic: directions that must hold, and the identities between its columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.profile import scale
from vllm_flow.profile.dimensions import Workload
from vllm_flow.profile.scale import MODELS, Assumptions, fleet_row

SHAPE = MODELS["llava-1.5-7b"]


@given(st.integers(0, 31), st.integers(1, 18), st.integers(2, 400))
def test_a_lower_cliff_never_costs_more(cliff: int, images: int, out: int) -> None:
    work, given_ = Workload(64, 576 * images, out, images), Assumptions()
    low, high = (fleet_row(SHAPE, work, c, given_) for c in (cliff, cliff + 1))
    assert low.prefill_ms < high.prefill_ms
    assert low.kv_mib < high.kv_mib
    assert low.resident >= high.resident
    assert low.transfer_ms < high.transfer_ms
    assert low.dollars_per_million < high.dollars_per_million


@given(st.integers(0, 32), st.integers(1, 5))
def test_columns_agree(cliff: int, images: int) -> None:
    work, given_ = Workload(64, 576 * images, 64, images), Assumptions(dollars_per_hour=3.6)
    row = fleet_row(SHAPE, work, cliff, given_)
    # A prefill GPU sends one prompt per prefill.
    assert row.prefill_gbs * row.prefill_ms == pytest.approx(row.transfer_ms * given_.network_gbs)
    # One GPU's time goes to prefill and decode in the ratio of a fleet's GPUs.
    assert 1e3 / row.requests_per_s == pytest.approx(row.prefill_ms * (1 + row.decode_per_prefill))
    assert row.dollars_per_million * row.requests_per_s == pytest.approx(1e3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        fleet_row(SHAPE, Workload(64, 576, 64), 32, Assumptions(memory_gb=12))
    with pytest.raises(ValueError, match="batch=0"):
        Assumptions(batch=0)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "qwen2.5-vl-7b", "--images", "1"],
        ["--model", "internvl3-8b", "--images", "1"],
    ],
)
def test_the_document_has_the_commands_table(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/scale.md shows what the command prints, character by character."""
    assert scale.main(arguments) == 0
    document = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    missing = [line for line in printed if line not in document]
    assert not missing, f"docs/scale.md is out of date; it lacks: {missing[:2]}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cliffs", "22,x"], "'x' is no whole number"),
        (
            ["--cliffs", "33"],
            "--cliffs 33: llava-1.5-7b has 32 decoder layers; write numbers from 0 to 32",
        ),
        (["--images", "0"], "whole numbers above 0"),
        (["--tflops", "nan"], "'nan' is no number above 0"),
        (["--batch", "1_0"], "'1_0' is no whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scale.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def matrices(module: Any) -> int:
    """Weights of a module's linear layers and of its convolutions."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


def test_towers_hold_the_weights_of_transformers_own() -> None:
    """Matrices of every layer, of the patches' embedding and of the projector."""
    import torch
    from transformers import InternVLConfig, InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import (
        InternVLMultiModalProjector,
        InternVLVisionModel,
    )
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    qwen = Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=3584)
    intern = InternVLVisionConfig(image_size=[448, 448])
    with torch.device("meta"):
        parts = {
            "qwen2.5-vl-7b": [Qwen2_5_VisionTransformerPretrainedModel(qwen)],
            "internvl3-8b": [
                InternVLVisionModel(intern),
                InternVLMultiModalProjector(
                    InternVLConfig(vision_config=intern, text_config={"hidden_size": 3584})
                ),
            ],
        }
    assert (qwen.depth - len(qwen.fullatt_block_indexes), qwen.window_size // qwen.patch_size) == (
        28,
        8,
    )
    for name, modules in parts.items():
        shape = MODELS[name]
        tower = shape.tower
        assert tower is not None
        layers = tower.layers * (4 * tower.hidden**2 + (2 + tower.gated) * tower.hidden * tower.mlp)
        between = tower.projector or shape.hidden
        project = tower.merged * tower.hidden * between + between * shape.hidden
        counted = layers + tower.patch_values * tower.hidden + project
        assert counted == sum(map(matrices, modules)), name


def test_pictures_become_as_many_tokens_as_the_processors_make_of_them() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from vllm.transformers_utils.processors import internvl

    width, height = scale.PICTURE
    rows, columns = (side // 28 for side in smart_resize(height, width, factor=28))
    assert MODELS["qwen2.5-vl-7b"].tower.tokens == rows * columns
    ratios = internvl.get_internvl_target_ratios(1, 12)
    tiles, *_ = internvl.calculate_internvl_targets(
        orig_width=width,
        orig_height=height,
        target_ratios=ratios,
        image_size=448,
        use_thumbnail=True,
    )
    assert MODELS["internvl3-8b"].tower.tokens == tiles * 256
