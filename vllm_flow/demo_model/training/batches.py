"""Scenes as tensors, composed by step in a process of their own, and states that survive a stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vllm_flow.demo_model.scenes import LABELS, Palette, Scene, Style, compose
from vllm_flow.demo_model.training.sprites import Assets
from vllm_flow.demo_model.vision import PIXEL_MEAN, PIXEL_STD
from vllm_flow.demo_model.vocabulary import CLASSES, INDEX, WORD_INDEX

Batch = dict[str, Any]
"""``pixels`` [B, 3, 168, 168] uint8; ``patches``, ``letters`` [B, 144] int64; ``centres`` [B, 144] and
``present`` [B, labels] float32; ``facts``: one ``Facts`` per scene."""


@dataclass(frozen=True)
class Machine:
    """Where training runs."""

    device: str = "cpu"
    """As torch names it."""
    workers: int = 1
    """Processes that compose scenes; on one core one is enough, a GPU waits for a dozen."""

    def moved(self, batch: Batch) -> Batch:
        """The batch with its tensors on the device."""
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def training_palette(assets: Assets) -> Palette:
    """Seen drawings, further drawings and photo cut-outs, photos often; photo backgrounds in a third.

    Photo cut-outs are few, so each is taken three times as often as a drawing.
    """
    sprites = {
        name: assets.drawings[name] + assets.extra[name] + 3 * assets.photos[name]
        for name in CLASSES
    }
    return Palette(sprites, assets.backgrounds, photo_share=0.35)


class SceneSteps(Dataset[Batch]):
    """Step -> the batch of scenes with seeds ``first + step * size`` and on.

    Every second scene is laid out like the held-out ones; the others are rough.
    """

    def __init__(self, palette: Palette, first: int, size: int, page_share: float) -> None:
        self.palette, self.first, self.size = palette, first, size
        self.styles = (
            Style(page_share=page_share),
            Style(page_share=page_share, rough=True),
        )

    def __getitem__(self, step: int) -> Batch:
        seeds = range(self.first + step * self.size, self.first + (step + 1) * self.size)
        return collate([compose(seed, self.palette, self.styles[seed % 2]) for seed in seeds])

    def steps(self, start: int, stop: int, machine: Machine) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``stop`` - 1, composed ahead in other processes."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=machine.workers,
            prefetch_factor=6,
        )
        return (machine.moved(batch) for batch in loader)


def collate(scenes: list[Scene]) -> Batch:
    """A batch of scenes; see ``Batch``."""
    present = torch.zeros(len(scenes), len(LABELS))
    for row, scene in enumerate(scenes):
        present[row, [INDEX[name] for name in scene.facts.objects]] = 1
        present[row, [len(CLASSES) + WORD_INDEX[sign.word] for sign in scene.facts.signs]] = 1

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(scene, name).reshape(-1) for scene in scenes]))

    images = np.stack([np.asarray(scene.image) for scene in scenes]).transpose(0, 3, 1, 2)
    return {
        "pixels": torch.from_numpy(np.ascontiguousarray(images)),
        "patches": stacked("patches").long(),
        "letters": stacked("letters").long(),
        "centres": stacked("centres").float(),
        "present": present,
        "facts": [scene.facts for scene in scenes],
    }


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] uint8 -> float32 as the checkpoint's image processor makes them."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
        for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return (pixels.float() / 255.0 - mean) / std


class Saver:
    """Keeps a stage's state in a file, written at most every so many seconds."""

    def __init__(self, path: Path, every: float) -> None:
        self.path, self.every, self.last = path, every, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last state, or None."""
        if not self.path.exists():
            return None
        return dict(torch.load(self.path, map_location="cpu", weights_only=True))

    def save(self, state: dict[str, Any], force: bool = False) -> None:
        """Write ``state``, complete or not at all, if it is time (or ``force``)."""
        if not force and time.monotonic() - self.last < self.every:
            return
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.rename(self.path)
        self.last = time.monotonic()

    def done(self) -> None:
        """The stage's result is written: its state is of no more use."""
        self.path.unlink(missing_ok=True)
