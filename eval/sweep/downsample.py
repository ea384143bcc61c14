"""Image embeddings of a reduced picture: fewer image tokens in every layer, from the same weights.

The picture is reduced to k x k patches, goes through the model's own vision tower with its position
embeddings interpolated to that grid, and through its projector. vLLM takes the result as
`image_embeds` and prefills k * k image tokens.

Seam: `LLM.apply_model`, and the modules `vision_tower` and `multi_modal_projector` of vLLM's
`LlavaForConditionalGeneration`. A forward hook, removed again, replaces the position embeddings; the live
model's `embed_multimodal` is hidden by one that takes embeddings of several sizes.

Shapes: B pictures, k the side of the grid, W the tower's width, H the decoder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from vllm import LLM


class Downsampler:
    """Embeds pictures at any grid up to the full one."""

    def __init__(self, llm: LLM, image_processor: Any, full_grid: int) -> None:
        self.llm = llm
        self.image_processor = image_processor
        self.full_grid = full_grid
        llm.apply_model(accept_several_sizes)

    def embed(self, pictures: Sequence[Image], side: int) -> list[torch.Tensor]:
        """One (side * side, H) tensor per picture, on the CPU."""
        pixels = self.pixels(pictures, side)
        (embeddings,) = self.llm.apply_model(lambda model: encode(model, pixels, side).cpu())
        return list(embeddings.unbind())

    def pixels(self, pictures: Sequence[Image], side: int) -> torch.Tensor:
        """The pictures as the model's processor makes them, at `side` patches a side; (B, 3, p, p)."""
        processor = self.image_processor
        sizes = {"size": reduced(processor.size, side, self.full_grid)}
        if getattr(processor, "do_center_crop", False):
            sizes["crop_size"] = reduced(processor.crop_size, side, self.full_grid)
        made = processor(images=list(pictures), return_tensors="pt", **sizes)
        return made["pixel_values"]


def reduced(size: Mapping[str, int | None], side: int, full_grid: int) -> dict[str, int]:
    """An image processor's size in pixels, at `side` instead of `full_grid` patches."""
    wanted = {name: value for name, value in dict(size).items() if value is not None}
    if not 1 <= side <= full_grid or any(value % full_grid for value in wanted.values()):
        raise ValueError(f"{wanted} pixels cannot be reduced from {full_grid} to {side} patches")
    return {name: value // full_grid * side for name, value in wanted.items()}


@torch.inference_mode()
def encode(model: Any, pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Embeddings (B, side * side, H) of pixels (B, 3, p, p), by vLLM's model of a LLaVA."""
    tower = model.vision_tower
    weights = next(tower.parameters())
    with interpolated_positions(tower.vision_model.embeddings.position_embedding, side):
        features = tower(
            pixels.to(weights.device, weights.dtype),
            feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    embeddings = model.multi_modal_projector(features)
    if embeddings.shape[1] != side * side:
        raise RuntimeError(
            f"the vision tower gave {embeddings.shape[1]} tokens for {side} x {side} patches"
        )
    return embeddings


def accept_several_sizes(model: Any) -> None:
    """Let vLLM's LLaVA be given, in one step, embeddings of several grids.

    vLLM hands embeddings of one size over as a tensor and of several as a list, and the model's check of its
    inputs knows the tensor only: the list would end the engine. There is nothing more to do to either.
    """
    stock = model.embed_multimodal

    def embed_multimodal(**kwargs: Any) -> Any:
        embeddings = kwargs.get("image_embeds")
        if isinstance(embeddings, (list, tuple)):
            return tuple(embeddings)
        return stock(**kwargs)

    model.embed_multimodal = embed_multimodal


@contextmanager
def interpolated_positions(position_embedding: torch.nn.Module, side: int) -> Iterator[None]:
    """Let a tower's position embeddings be those of a smaller grid."""

    def replace(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return interpolate(output, side)

    handle = position_embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def interpolate(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings (1, n, W) of a square grid at another side, as Hugging Face's CLIP does.

    A row more than a square is the class token's, which comes first and stays.
    """
    count = positions.shape[1]
    grid = int(count**0.5)
    extra = count - grid * grid
    if extra not in (0, 1):
        raise ValueError(f"{count} positions are no square grid")
    if grid == side:
        return positions
    square = positions[:, extra:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        square.float(), size=(side, side), mode="bicubic", align_corners=False
    )
    flat = resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :extra], flat], dim=1)
