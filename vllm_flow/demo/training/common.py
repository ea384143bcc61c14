"""What the training stages share: budget, log, pixels, checkpoints. Knows no model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.scenes import Scene, compose
from vllm_flow.demo.training import assets
from vllm_flow.demo.vision import PIXEL_MEAN, PIXEL_STD


@dataclass(frozen=True)
class Budget:
    """Steps and batch sizes of every stage; the defaults are those of the committed weights."""

    vision_steps: tuple[int, int] = (1000, 500)
    """Two rounds: the second starts from the first's tower, with fresh heads and a lower rate."""
    vision_batch: int = 64
    vision_lr: float = 2e-3
    vision_muon_lr: float = 3e-3
    vision_second_round: float = 0.6
    """Factor on both rates in the second round."""
    projector_steps: int = 200
    projector_batch: int = 64
    projector_lr: float = 2e-3
    polish_steps: int = 400
    polish_factor: float = 0.4
    """Factor on both vision rates while polishing."""
    lora_steps: tuple[int, ...] = (160, 80)
    """Before and after the tower is polished; the second round has half the rate."""
    lora_batch: int = 4
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_lr: float = 1.5e-3
    small_steps: int = 400
    small_batch: int = 12
    small_lr: float = 2e-3
    small_muon_lr: float = 2e-3
    seed: int = 7

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Each stage draws its scenes from its own range, all within scenes.TRAIN_SEEDS.
VISION_SEED, PROJECTOR_SEED, LORA_SEED, SMALL_SEED, CHECK_SEED, POLISH_SEED = (
    i * 100_000_000 for i in range(6)
)


class Log:
    """One JSON object per line, to the file and to standard output."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def __call__(self, stage: str, **values: Any) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"stage": stage, "s": round(time.monotonic() - self.start, 1), **rounded})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


class SceneSource:
    """Training scenes by seed: seen drawings and photo cut-outs on procedural or photo backgrounds."""

    def __init__(self, work: Path) -> None:
        drawn, cut = assets.drawings(work, assets.SEEN_SETS), assets.stamps(work)
        self.sprites = {name: drawn[name] + cut[name] for name in CLASSES}
        self.photos = assets.photos()

    def batch(self, first_seed: int, count: int) -> list[Scene]:
        """``count`` scenes from ``first_seed`` on; every second one is laid out like the held-out ones."""
        seeds = range(first_seed, first_seed + count)
        return [compose(s, self.sprites, self.photos, gentle=s % 2 == 0) for s in seeds]


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """[B, 3, 112, 112] float32, as the checkpoint's image processor makes them for 112 px pictures."""
    raw = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255.0
    raw = (raw - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(raw.transpose(0, 3, 1, 2)))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors (contiguous, optionally cast), complete or not at all."""
    out = {k: v.detach().to(dtype or v.dtype).contiguous() for k, v in tensors.items()}
    save_file(out, path.with_suffix(".part"))
    path.with_suffix(".part").chmod(0o644)
    path.with_suffix(".part").rename(path)


def load(path: Path) -> dict[str, torch.Tensor]:
    """Tensors as float32."""
    return {k: v.float() for k, v in load_file(path).items()}
