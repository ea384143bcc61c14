"""Which models the analysis reads, and how each lays a picture out as image tokens.

Knows transformers' configurations and what its processors return. A family that lays tokens out as
another one does is an entry of `cam_names.READ`, not code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vllm_flow.analysis.cam_names import READ, UNREAD
from vllm_flow.analysis.seen_picture import (
    MergedPatches,
    OneGrid,
    PaddedTiles,
    Part,
    SeenPicture,
    Tiles,
    cells,
    tiled_parts,
)
from vllm_flow.counts import counted
from vllm_flow.engine.families.known import FAMILIES, family_of

DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
)
"""Language models whose layers have the hook points of `cam_names.HOOKS` where the paper has them."""
TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")
"""Of LLaVA-1.5 and its kin."""
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""What a processor returns per token of the prompt."""
NOT_FOR_THE_MODEL = ("num_patches", "rows", "cols")


class Unsupported(ValueError):
    """The model or the request is outside what the analysis does; the text says what is inside."""


def check_architecture(name: str) -> None:
    """Raise `Unsupported` unless the analysis knows this architecture."""
    if name in READ:
        return
    known = family_of(name)
    reason = UNREAD.get(name) or (
        f"{known.name} evicts, but the analysis runs transformers' model, of a layout that it was tested with"
        if known
        else "the analysis was not tested with it"
    )
    names = "; ".join(f.name for f in FAMILIES if READ.keys() & set(f.architectures))
    raise Unsupported(f"{name} is not supported here: {reason}. It reads {names}")


def check_config(config: Any) -> None:
    """Raise `Unsupported` unless the analysis knows this architecture with these parts."""
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    check_architecture(name)
    decoder = config.text_config.model_type
    if decoder not in DECODERS:
        raise Unsupported(
            f"{name} with a {decoder} decoder is not supported: use one with {', '.join(DECODERS)}"
        )
    tower = config.vision_config.model_type
    if name == "LlavaForConditionalGeneration" and tower not in TOWERS:
        raise Unsupported(
            f"LLaVA with a {tower} tower is not supported: use one with {', '.join(TOWERS)}"
        )


@dataclass(frozen=True)
class Given:
    """What a picture is read from."""

    config: Any
    processor: Any
    batch: Mapping[str, Any]
    """The processor's, of one prompt with one picture."""
    size: tuple[int, int]
    """Height and width of the picture before the processor had it."""
    others: Mapping[str, torch.Tensor]
    """The model's inputs about the picture beside its pixels."""
    count: int
    """Image tokens in the prompt."""

    @property
    def vision(self) -> Any:
        """The tower's configuration."""
        return self.config.vision_config


def see(
    config: Any, processor: Any, batch: Mapping[str, Any], size: tuple[int, int]
) -> SeenPicture:
    """The picture in a batch of one prompt with one picture, which had this height and width.

    Raises:
        Unsupported: the prompt has other image tokens than the picture makes.
    """
    apart = (*TEXT, *NOT_FOR_THE_MODEL, "pixel_values")
    others = {name: value for name, value in batch.items() if name not in apart}
    count = int((batch["input_ids"][0] == config.image_token_id).sum())
    kind = KINDS[READ[config.architectures[0]]]
    found = kind(Given(config, processor, batch, size, others, count))
    if found.num_tokens != count:
        raise Unsupported(
            f"the picture became {counted(count, 'image token')}, not {found.num_tokens}: the processor and the "
            "model's tower do not belong together"
        )
    return found


def _llava(given: Given) -> SeenPicture:
    """One square grid, that of the tower's patches; with Pixtral's tower rows of the picture's own size."""
    if given.vision.model_type == "pixtral":
        return _rows(given)
    side = given.vision.image_size // given.vision.patch_size
    pixels = given.batch["pixel_values"][0]
    strategy = given.config.vision_feature_select_strategy
    if given.vision.model_type == "clip_vision_model" and strategy == "full":
        reason = (
            "this model keeps the tower's class token among its image tokens, so they are no grid; "
            "use a checkpoint with vision_feature_select_strategy 'default'"
        )
        return OneGrid(pixels, given.others, (), side * side + 1, reason)
    return OneGrid(pixels, given.others, (cells(side, side),), side * side)


def _rows(given: Given) -> SeenPicture:
    """One grid in the picture's own proportions; a break after each row is text."""
    unit = given.vision.patch_size * getattr(given.config, "spatial_merge_size", 1)
    high, wide = (int(edge) for edge in given.batch["image_sizes"][0])
    part = cells(high // unit, wide // unit)
    return OneGrid(given.batch["pixel_values"][0], given.others, (part,), part.places.size)


def _patches(given: Given) -> SeenPicture:
    """One grid in the picture's own proportions, each cell several patches; the text between is none."""
    frames, high, wide = (int(edge) for edge in given.batch["image_grid_thw"][0])
    assert frames == 1, "a picture is no video"
    patch, merge = given.vision.patch_size, given.vision.spatial_merge_size
    part = cells(high // merge, wide // merge)
    shape = (patch, merge, given.vision.temporal_patch_size)
    pixels = MergedPatches.pixels_of(given.batch["pixel_values"], *part.places.shape, *shape)
    return MergedPatches(pixels, given.others, (part,), part.places.size, "", *shape)


def _canvas(given: Given) -> SeenPicture:
    """Tiles in as many rows and columns as fit the picture's proportions, then a thumbnail."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    pixels, made = given.batch["pixel_values"], given.processor.image_processor
    tile = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    columns, rows = (
        get_optimal_tiled_canvas(given.size, tile, made.min_patches, made.max_patches)
        if len(pixels) > 1
        else (1, 1)
    )
    return _tiles(given, pixels, rows, columns)


def _splits(given: Given) -> SeenPicture:
    """Tiles of the picture in its own proportions, then the picture whole, text between all of them."""
    pixels = given.batch["pixel_values"][0]
    rows = columns = 1
    if (
        len(pixels) > 1
    ):  # only the image processor says how it cuts, and only where it is asked itself
        blank = Image.new("RGB", given.size[::-1])
        found = given.processor.image_processor(
            blank, return_row_col_info=True, return_tensors="pt"
        )
        rows, columns = int(found["rows"][0][0]), int(found["cols"][0][0])
    return _tiles(given, pixels, rows, columns, nested=True)


def _tiles(
    given: Given, pixels: torch.Tensor, rows: int, columns: int, nested: bool = False
) -> Tiles:
    side = math.isqrt(given.count // len(pixels))
    parts = tiled_parts(rows, columns, side)
    num_tokens = sum(part.places.size for part in parts)
    return Tiles(pixels, given.others, parts, num_tokens, "", rows, columns, nested)


def _anyres(given: Given) -> SeenPicture:
    """The picture whole, then tiles of it at one of some resolutions, without their padding."""
    from transformers.models.llava_onevision import modeling_llava_onevision as modelling

    pixels, edge = given.batch["pixel_values"][0], given.vision.image_size
    patch = given.vision.patch_size
    side = edge // patch
    whole = cells(side, side, 0, "whole")
    rows, columns = modelling.get_anyres_image_grid_shape(
        given.size, given.config.image_grid_pinpoints, edge
    )
    canvas = torch.arange(rows * columns * side**2).reshape(1, rows * side, columns * side)
    left = modelling.unpad_image(canvas, given.size)[0]
    top, start = divmod(int(left[0, 0]), columns * side)
    high, wide = left.shape
    crop = tuple(slice(at * patch, (at + n) * patch) for at, n in ((top, high), (start, wide)))
    size = None
    most = getattr(given.config, "vision_aspect_ratio", "")
    if most.startswith("anyres_max_"):
        ratio = math.sqrt(high * wide / (int(most.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:  # as in transformers: cells are merged until there are about so many
            high, wide = int(high // ratio), int(wide // ratio)
            size = (high * patch, wide * patch)
    # A row ends in an embedding that is no cell.
    fine = Part(cells(high, wide + 1, side * side).places[:, :-1])
    num_tokens = side * side + high * (wide + 1)
    return PaddedTiles(
        pixels, given.others, (fine, whole), num_tokens, "", rows, columns, side * patch, crop, size
    )


KINDS: Mapping[str, Callable[[Given], SeenPicture]] = {
    "llava": _llava,
    "rows": _rows,
    "patches": _patches,
    "canvas": _canvas,
    "splits": _splits,
    "anyres": _anyres,
}
"""By the names that `cam_names.READ` has."""
