"""Which towers are looked into, and what is read there."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.pixtral import PixtralHFVisionModel
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionTransformer,
    Qwen2_5_VLForConditionalGeneration,
)
from vllm.model_executor.models.siglip import SiglipVisionModel

from vllm_flow.engine import frames, obstacles
from vllm_flow.engine.worker.tower.attention import class_attention, received_attention
from vllm_flow.engine.worker.tower.intern import InternView
from vllm_flow.engine.worker.tower.llava import LlavaView
from vllm_flow.engine.worker.tower.qwen import QwenView
from vllm_flow.engine.worker.tower.scores import Tower
from vllm_flow.engine.worker.tower.views import tower_of
from vllm_flow.ranks import TowerRows, TowerScore, TowerTiles


def config(**changes: Any) -> Any:
    model = SimpleNamespace(
        architecture="QuiteAnotherModel",
        multimodal_config=SimpleNamespace(
            enable_mm_embeds=True, mm_encoder_tp_mode=changes.pop("mode", "weights")
        ),
    )
    return SimpleNamespace(**{"model_config": model, "ec_transfer_config": None} | changes)


def llava(kind: type[Any], tower: type[Any], strategy: str = "default") -> Any:
    """A model without weights."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.vision_tower = tower.__new__(tower)
    torch.nn.Module.__init__(model.vision_tower)
    model.config = SimpleNamespace(vision_feature_select_strategy=strategy)
    return model


@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_who_is_refused(kind: type[Any]) -> None:
    """Each with a sentence of its own; the families that can are named to all that cannot."""
    both = {obstacles.TOWER, obstacles.RECEIVED}
    clip = with_layers(llava(kind, CLIPVisionModel))
    siglip = with_layers(llava(kind, SiglipVisionModel, "full"))
    full = with_layers(llava(kind, CLIPVisionModel, "full"))
    for model, engine, refused, said in (
        (torch.nn.Linear(1, 1), config(), both, "LLaVA-NeXT, Shikra and InternVL, and not of QuiteAnother"),
        (llava(kind, PixtralHFVisionModel), config(), both, "tower, a PixtralHFVisionModel, has no such token"),
        (siglip, config(), {obstacles.TOWER}, "tower, a SiglipVisionModel, has no such token"),
        (full, config(), {obstacles.TOWER}, "'full' is one of the image's tokens itself"),
        (clip, config(mode="data"), both, "workers encode different pictures (mm_encoder_tp_mode='data')"),
        (clip, config(ec_transfer_config=object()), both, "in another engine (ec_transfer_config)"),
    ):  # fmt: skip
        tower = tower_of(model, engine)
        # Tiles go with the class token; none of these has videos.
        tiles = {obstacles.TILES} if obstacles.TOWER in refused else set()
        assert tower.unreadable.keys() == {*refused, *tiles, obstacles.FRAMES}
        assert said in tower.unreadable[obstacles.TOWER]
        assert tower.readable == (refused != both)
    received = tower_of(torch.nn.Linear(1, 1), config()).unreadable[obstacles.RECEIVED]
    assert "which is known of LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision" in received
    assert tower_of(clip, config()).unreadable.keys() == {obstacles.FRAMES}
    unseen = tower_of(
        with_layers(llava(LlavaOnevisionForConditionalGeneration, SiglipVisionModel)), config()
    )
    assert unseen.unreadable.keys() == {obstacles.TOWER, obstacles.TILES}


def with_layers(model: Any) -> Any:
    """Of whose tower only the last layer's attention is there."""
    layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=n)) for n in range(3)]
    model.vision_tower.vision_model = SimpleNamespace(encoder=SimpleNamespace(layers=layers))
    return model


@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_every_worker_sees_every_picture(kind: type[Any]) -> None:
    """vLLM falls back from ``mm_encoder_tp_mode="data"`` where a model does not share pictures out: these do not."""
    assert not kind.supports_encoder_tp_data


def layer(heads: int, rows: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys [2, L, Q, 8], and probabilities [2, Q, L, L] by another formula."""
    generator = torch.Generator().manual_seed(heads)
    query, key = torch.randn(2, 2, rows, heads, 8, generator=generator).double()
    return query, key, (0.3 * torch.einsum("plhd,pmhd->phlm", query, key)).softmax(-1)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_class_tokens_attention_is_the_softmax_of_its_row(heads: int) -> None:
    """And the mean of workers with some of the heads each is that of all heads."""
    query, key, weights = layer(heads)
    found = class_attention(query, key, 0.3)
    torch.testing.assert_close(found, weights.mean(1)[:, 0, 1:].float(), atol=1e-6, rtol=1e-5)
    parts = [class_attention(query[:, :, [n]], key[:, :, [n]], 0.3) for n in range(heads)]
    torch.testing.assert_close(torch.stack(parts).mean(0), found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 21, 50, 10_000])
@pytest.mark.parametrize("first", [0, 1])
def test_what_patches_receive_is_the_mean_of_columns(first: int, at_once: int) -> None:
    """However many logits are held at once: a row of one picture, some rows, one picture, both."""
    query, key, weights = layer(heads=3)
    found = received_attention(query, key, 0.3, first, at_once)
    expected = weights[:, :, first:, first:].mean((1, 2))
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)


WINDOW, MERGED, PATCH = 56, 2, 14
"""Pixels of a window's side, patches of a token's side, pixels of a patch's: a window is two by two tokens."""
GRIDS = ((1, 6, 10), (2, 4, 4), (1, 4, 6))


def places(grid: tuple[int, int, int]) -> torch.Tensor:
    """[rows, 3] frame, row and column of the token that each of the tower's rows is a part of, in reading order."""
    frames, height, width = grid
    tokens = torch.cartesian_prod(*map(torch.arange, (frames, height // MERGED, width // MERGED)))
    return tokens.repeat_interleave(MERGED**2, 0)


@pytest.mark.parametrize("full", [None, [1], [0]], ids=["no windows", "whole", "windows"])
def test_tokens_of_qwens_towers_have_the_mean_of_their_patches(full: list[int] | None) -> None:
    """Of several pictures in one call, whichever the order of rows, and whichever rows a row attends to."""
    generator = torch.Generator().manual_seed(5)
    heads, size, scale = 2, 8, 0.3
    queries, keys, expected, expected_keys = [], [], [], []
    attention = SimpleNamespace(head_size=size, scale=scale, forward=lambda query, key: None)
    tower = SimpleNamespace(
        blocks=[None, SimpleNamespace(attn=SimpleNamespace(attn=attention))],
        spatial_merge_size=MERGED, spatial_merge_unit=MERGED**2, window_size=WINDOW, patch_size=PATCH,
    )  # fmt: skip
    if full is not None:
        tower.fullatt_block_indexes = full
        tower.get_window_index_thw = partial(Qwen2_5_VisionTransformer.get_window_index_thw, tower)
    for grid in GRIDS:
        place = places(grid)
        query, key = torch.randn(2, len(place), heads, size, generator=generator)
        window = place // torch.tensor([1, 2, 2]) if full == [0] else place[:, :1]
        apart = (window[:, None] != window[None]).any(-1)
        logits = scale * torch.einsum("lhd,mhd->hlm", query, key)
        weights_HLL = logits.masked_fill(apart, -torch.inf).softmax(-1)
        rows_of_part = (~apart).sum(1)
        expected.append((weights_HLL.mean(0).sum(0) / rows_of_part).view(-1, MERGED**2).mean(1))
        expected_keys.append(key.mean(1).view(-1, MERGED**2, size).mean(1))
        order = torch.arange(len(place)).view(-1, MERGED**2)
        if full is not None:
            order = order[tower.get_window_index_thw(*grid)[0]]
        queries.append(query[order.flatten()])
        keys.append(key[order.flatten()])

    def encode(pixels: Any, grid_thw: Any) -> Any:
        return attention.forward(query=torch.cat(queries)[None], key=torch.cat(keys)[None])

    tower.forward = encode
    with QwenView(tower).looking([TowerScore.RECEIVED, *TowerTiles, *TowerRows]) as scores:
        tower.forward(None, grid_thw=torch.tensor(GRIDS))
    found = scores()
    assert found.keys() == {TowerScore.RECEIVED, TowerRows.KEYS}
    torch.testing.assert_close(
        found[TowerScore.RECEIVED][:, 0], torch.cat(expected), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(found[TowerRows.KEYS], torch.cat(expected_keys))
    assert tower.forward is encode


@pytest.mark.parametrize("shuffle", [InternVLChatModel, InternS1ForConditionalGeneration])
def test_tokens_of_interns_tower_have_the_mean_of_their_patches(shuffle: type[Any]) -> None:
    """Tile by tile, two by two patches, in reading order."""
    generator = torch.Generator().manual_seed(6)
    query, key = torch.randn(2, 3, 1 + 36, 2 * 8, generator=generator)
    attention = SimpleNamespace(head_size=8, scale=0.3, forward=lambda query, key: None)
    model = SimpleNamespace(ps_version="v2", downsample_ratio=0.5)
    model.pixel_shuffle = partial(shuffle.pixel_shuffle, model)
    with InternView(model, attention).looking([*TowerScore, *TowerTiles, *TowerRows]) as scores:
        attention.forward(query, key)
    heads = [rows.unflatten(-1, (2, 8)) for rows in (query, key)]
    for kind, patches in (
        (TowerScore.CLASS, class_attention(*heads, 0.3)),
        (TowerScore.RECEIVED, received_attention(*heads, 0.3, 1)),
    ):
        expected = patches.view(3, 3, 2, 3, 2).mean((2, 4))
        torch.testing.assert_close(scores()[kind][..., 0], expected)
    patches = heads[1][:, 1:].mean(2).view(3, 3, 2, 3, 2, 8)
    torch.testing.assert_close(scores()[TowerRows.KEYS], patches.mean((2, 4)))
    assert scores().keys() == {*TowerScore, TowerRows.KEYS}


def test_what_is_no_picture_has_no_scores() -> None:
    """Where no pixels of pictures are given, or the model makes nothing of them, nothing is read."""
    attention, early = (SimpleNamespace(forward=None, head_size=4, scale=1) for _ in range(2))
    model = SimpleNamespace(config=SimpleNamespace(vision_feature_select_strategy="default"))
    tower = Tower(LlavaView(model, attention, early), {obstacles.FRAMES: "for a reason"})

    def embed(**pictures: Any) -> list[Any]:
        for one in (attention, early):
            assert (one.forward is not None) == ("pixel_values" in pictures)
        return []

    for pictures in ({}, {"pixel_values": 1}, {"pixel_values_videos": 1}, {"image_embeds": 1}):
        assert not tower.encode(embed, pictures)
        assert vars(attention)["forward"] is None and vars(early)["forward"] is None


def test_videos_have_their_number_of_frames() -> None:
    """As each model says it; a tower that nobody looks into hinders nobody."""
    tower = Tower(None, dict.fromkeys((obstacles.TOWER, obstacles.RECEIVED, obstacles.TILES), "x"))
    assert tower.readable
    for item, expected in (
        ({"video_grid_thw": torch.tensor([[3, 4, 4], [2, 2, 2]])}, [3, 2]),
        ({"video_num_patches": torch.tensor([3, 2]), "pixel_values_videos": torch.zeros(5)}, [3, 2]),
        ({"pixel_values_videos": torch.zeros(2, 3, 1, 1, 1)}, [3, 3]),
        ({"pixel_values_videos": [torch.zeros(3, 1), torch.zeros(2, 1)]}, [3, 2]),
    ):  # fmt: skip
        one, other = tower.encode(lambda **_: [torch.zeros(13, 2), torch.zeros(8, 2)], item)
        assert [one.flow_frames, other.flow_frames] == expected
    assert frames.frame_of_tokens(one, 13).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1]
    assert frames.frame_of_tokens(other, 8).tolist() == [0] * 4 + [1] * 4
    assert frames.frame_of_tokens(torch.zeros(3, 2), 3).tolist() == [0] * 3, "of an unknown number"


def test_whose_frames_are_known() -> None:
    qwen = Qwen2_5_VLForConditionalGeneration.__new__(Qwen2_5_VLForConditionalGeneration)
    assert not frames.unknown(qwen, config())
    assert "which are known of LLaVA-OneVision" in frames.unknown(object(), config())["frames"]
    elsewhere = frames.unknown(qwen, config(ec_transfer_config=object()))
    assert "in another engine (ec_transfer_config)" in elsewhere["frames"]
