"""One picture as a processor made it for a model: its pixels, and which image token is where.

A class per way of laying image tokens out, not per family; which family lays out which way is said in
`seen_kinds.py`. Knows tensors; nothing of models, CAMs or figures.

Shapes: B copies, P image tokens, n tiles, C x H x W pixels; cells count from the top left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


@dataclass(frozen=True)
class Part:
    """One view of the picture, cut into a grid of cells of one image token each."""

    places: NDArray[np.int64]
    """[rows, columns]: which of the P image tokens a cell is."""
    name: str = ""
    """Empty for the picture as fine as the model sees it; `whole` for a thumbnail beside tiles."""

    def map(self, values_P: NDArray[Any]) -> NDArray[Any]:
        """Values per image token [..., P] as maps [..., rows, columns]."""
        return values_P[..., self.places]

    def shares(self, mask_HW: NDArray[np.float64]) -> NDArray[np.float64]:
        """[rows, columns]: the mean of a view's pixels in each cell; pixels past the last cell do not count."""
        rows, columns = self.places.shape
        high, wide = mask_HW.shape[0] // rows, mask_HW.shape[1] // columns
        used = mask_HW[: high * rows, : wide * columns]
        found: NDArray[np.float64] = used.reshape(rows, high, columns, wide).mean((1, 3))
        return found


def cells(rows: int, columns: int, first: int = 0, name: str = "") -> Part:
    """Tokens in reading order, from the `first` on."""
    count = np.arange(rows * columns, dtype=np.int64)
    return Part(first + count.reshape(rows, columns), name)


@dataclass(frozen=True)
class SeenPicture(ABC):
    """What is common: the pixels that copies differ in, and what else the model is given with them."""

    pixels: torch.Tensor
    """Preprocessed (resized, cropped, normalised); a noisy copy has this shape too."""
    others: Mapping[str, torch.Tensor]
    """The model's further inputs about the picture, first dimension 1: sizes, masks."""
    parts: tuple[Part, ...]
    """Views with a grid, the finest first; empty where image tokens have no place in the picture."""
    num_tokens: int
    """P, as the parts and what is between them add up."""
    placeless: str = ""
    """Why there are no parts."""

    def inputs(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's keyword arguments for copies [B, ...] of the pixels, one prompt each."""
        copies = len(pixels)
        others = {
            name: value.repeat(copies, *[1] * (value.dim() - 1))
            for name, value in self.others.items()
        }
        return {"pixel_values": self._given(pixels), **others}

    def _given(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixel_values` of copies [B, ...]."""
        return pixels

    @abstractmethod
    def views(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """[C, H, W] for each part, out of one copy's pixels."""


class OneGrid(SeenPicture):
    """Pixels [C, H, W], one grid of cells over all of them."""

    def views(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels for _ in self.parts]


@dataclass(frozen=True)
class MergedPatches(SeenPicture):
    """Pixels [C, H, W] that the model takes as a list of flat patches, each cell's patches together.

    The pixels are kept as a picture, not as patches, since a still picture fills a patch's several
    frames: noise is the same in all of them.
    """

    patch: int = 14
    merge: int = 2
    frames: int = 2

    def _given(self, pixels: torch.Tensor) -> torch.Tensor:
        copies, channels, height, width = pixels.shape
        unit = self.patch * self.merge
        cut = pixels.reshape(
            copies, channels, height // unit, self.merge, self.patch, width // unit, self.merge, self.patch
        )  # fmt: skip
        ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        filled = ordered.expand(*[-1] * 6, self.frames, -1, -1)
        return filled.reshape(-1, channels * self.frames * self.patch**2)

    @staticmethod
    def pixels_of(
        patches: torch.Tensor, rows: int, columns: int, patch: int, merge: int, frames: int
    ) -> torch.Tensor:
        """[C, H, W] from flat patches of `rows` x `columns` cells; the first of a patch's frames."""
        cut = patches.reshape(rows, columns, merge, merge, -1, frames, patch, patch)
        picture = cut[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
        unit = patch * merge
        return picture.reshape(-1, rows * unit, columns * unit)

    def views(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels for _ in self.parts]


@dataclass(frozen=True)
class Tiles(SeenPicture):
    """Pixels [n, C, h, w]: tiles row by row, and where there are several a thumbnail behind them."""

    rows: int = 1
    columns: int = 1
    nested: bool = False
    """Whether the model takes tiles per prompt [B, n, ...], or all in one row [B x n, ...]."""

    def _given(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels if self.nested else pixels.flatten(0, 1)

    def views(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        tiles = stitched(pixels[: self.rows * self.columns], self.rows, self.columns)
        return [tiles, pixels[-1]][: len(self.parts)]


@dataclass(frozen=True)
class PaddedTiles(SeenPicture):
    """Pixels [n, C, h, w]: the picture whole, then tiles of it on a padded canvas, a break after each row.

    Tokens are those of the whole picture, then the cells of the canvas that are not padding, row by
    row with a token for each row's end, which is no cell.
    """

    rows: int = 1
    columns: int = 1
    edge: int = 0
    """Pixels of a tile's side that patches cover: what is left over, nobody sees."""
    crop: tuple[slice, ...] = (slice(None), slice(None))
    """The canvas' pixels that are not padding."""
    size: tuple[int, int] | None = None
    """Height and width to show these in, where the model has merged cells to have fewer."""

    def views(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        tiles = pixels[1:, :, : self.edge, : self.edge]
        canvas = stitched(tiles, self.rows, self.columns)[:, self.crop[0], self.crop[1]]
        if self.size is not None:
            canvas = functional.interpolate(canvas[None].float(), self.size, mode="area")[0]
        return [canvas, pixels[0]]


def stitched(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[C, rows x h, columns x w] from tiles [rows x columns, C, h, w]."""
    _, channels, height, width = tiles.shape
    canvas = tiles.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return canvas.reshape(channels, rows * height, columns * width)


def tiled_parts(rows: int, columns: int, side: int) -> tuple[Part, ...]:
    """Tiles of side x side cells row by row; behind several of them a thumbnail of as many."""
    each = np.arange(rows * columns * side * side, dtype=np.int64).reshape(
        rows, columns, side, side
    )
    fine = Part(each.transpose(0, 2, 1, 3).reshape(rows * side, columns * side))
    return (fine, cells(side, side, each.size, "whole")) if rows * columns > 1 else (fine,)
