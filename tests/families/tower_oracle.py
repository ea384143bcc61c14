"""What transformers' vision towers give each token of a picture, for ranks that look inside the tower, and its keys.

Of one picture. Eager attention, float32; knows nothing of vLLM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from transformers import vision_utils

Scores = dict[str, list[float]]
"""Rank -> per token of the picture what it was given."""
Rows = dict[str, torch.Tensor]
"""Per token of the picture its keys, averaged over heads, and "features" where a projector makes it of one row."""


@contextmanager
def looked_into(model: Any, scores: Scores, rows: Rows) -> Iterator[None]:
    """While the model runs, note what its tower gives in the layer whose output the decoder gets."""
    inside = _qwen if hasattr(model.model, "visual") else _llava
    if model.config.model_type == "internvl":
        inside = _intern
    with inside(model, scores, rows):
        yield


@contextmanager
def _llava(model: Any, scores: Scores, rows: Rows) -> Iterator[None]:
    """Of the only tile, or of all tiles, put together as their features are, ends of rows before all else."""
    config, inner = model.config, model.model
    first = int(config.vision_feature_select_strategy == "default")
    pack = getattr(inner, "pack_image_features", None)
    tiles: dict[str, torch.Tensor] = {}
    seen: Rows = {}

    def note(_module: Any, _args: Any, result: Any) -> None:
        assert result[1] is not None, "attention must be eager"
        weights_THLL = result[1]
        tiles["cls_attention"] = weights_THLL[:, :, 0, first:].mean(1)
        tiles["received_attention"] = weights_THLL[:, :, first:, first:].mean((1, 2))
        if pack is None:
            scores.update({rank: tile[0].tolist() for rank, tile in tiles.items()})

    def packing(features: Any, sizes: Any, image_newline: Any = None, **more: Any) -> Any:
        for rank, tile in tiles.items():
            ends = torch.tensor([torch.inf])
            packed, _ = pack([tile[..., None]], sizes, image_newline=ends, **more)
            scores[rank] = packed[0][:, 0].tolist()
        for name, tile in seen.items():
            ends = torch.zeros(tile.shape[-1])
            rows[name] = pack([tile], sizes, image_newline=ends, **more)[0][0]
        return pack(features, sizes, image_newline=image_newline, **more)

    def note_keys(_module: Any, _args: Any, result: torch.Tensor) -> None:
        seen["keys"] = result.unflatten(-1, (attention.num_heads, -1)).mean(-2)[:, first:]

    def note_features(_module: Any, args: Any) -> None:
        seen["features"] = args[0]
        if pack is None:
            rows.update({name: tile[0] for name, tile in seen.items()})

    attention = inner.vision_tower.encoder.layers[config.vision_feature_layer].self_attn
    hooks = [
        attention.register_forward_hook(note),
        attention.k_proj.register_forward_hook(note_keys),
        inner.multi_modal_projector.register_forward_pre_hook(note_features),
    ]
    try:
        with mock.patch.object(inner, "pack_image_features", packing) if pack else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _qwen(model: Any, scores: Scores, rows: Rows) -> Iterator[None]:
    """Its attention keeps no weights, so they are taken from the function that makes them, part by part."""
    tower = model.model.visual
    last, module = tower.blocks[-1].attn, sys.modules[type(tower).__module__]
    eager, parts, keys = module.eager_attention_forward, [], []

    def noting(attention: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights_1HLL = eager(attention, query, key, *args, **kwargs)
        if attention is last:
            parts.append(weights_1HLL[0].mean((0, 1)))
            keys.append(key[0].mean(0))
        return output, weights_1HLL

    def note(_tower: Any, _args: Any, kwargs: Any, _result: Any) -> None:
        square = tower.spatial_merge_size**2
        received_N = torch.cat(parts).view(-1, square).mean(1)
        key_ND = torch.cat(keys).unflatten(0, (-1, square)).mean(1)
        if hasattr(tower, "fullatt_block_indexes"):
            order, _ = vision_utils.get_vision_window_index(
                kwargs["grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
            received_N, key_ND = received_N[order.argsort()], key_ND[order.argsort()]
        scores["received_attention"] = received_N.tolist()
        rows["keys"] = key_ND
        parts.clear(), keys.clear()

    hook = tower.register_forward_hook(note, with_kwargs=True)
    try:
        with mock.patch.object(module, "eager_attention_forward", noting):
            yield
    finally:
        hook.remove()


@contextmanager
def _intern(model: Any, scores: Scores, rows: Rows) -> Iterator[None]:
    """A token is two by two patches of a tile; tile by tile."""
    last = model.model.vision_tower.encoder.layer[-1].attention
    module = sys.modules[type(last).__module__]
    eager = module.eager_attention_forward

    def noting(attention: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        if attention is last:
            patches = key.mean(1)[:, 1:]
            side = int(patches.shape[1] ** 0.5)
            squares = patches.unflatten(1, (side // 2, 2, side // 2, 2))
            rows["keys"] = squares.mean((2, 4)).flatten(0, 2)
        return eager(attention, query, key, *args, **kwargs)

    def note(_module: Any, _args: Any, result: Any) -> None:
        assert result[1] is not None, "attention must be eager"
        weights_THLL = result[1]
        side = int((weights_THLL.shape[-1] - 1) ** 0.5)
        for rank, patches in (
            ("cls_attention", weights_THLL[:, :, 0, 1:].mean(1)),
            ("received_attention", weights_THLL[:, :, 1:, 1:].mean((1, 2))),
        ):
            squares = patches.view(-1, side // 2, 2, side // 2, 2)
            scores[rank] = squares.mean((2, 4)).flatten().tolist()

    hook = last.register_forward_hook(note)
    try:
        with mock.patch.object(module, "eager_attention_forward", noting):
            yield
    finally:
        hook.remove()
