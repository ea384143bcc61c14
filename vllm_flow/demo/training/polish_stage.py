"""Stage 3b: the tower goes on learning, held in the space that the tuned decoder already reads.

Each class's prototype is the mean of what the tuned projector makes of its patches. The tower learns
to bring patches nearer to their prototype; projector and decoder stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.scenes import BACKGROUND
from vllm_flow.demo.training.common import (
    CHECK_SEED,
    POLISH_SEED,
    Budget,
    Log,
    SceneSource,
    cosine,
    pixels,
    save,
)
from vllm_flow.demo.training.projector_stage import load_projector
from vllm_flow.demo.training.vision_stage import Update, load_tower, patch_features


def polish(work: Path, source: SceneSource, budget: Budget, log: Log) -> Path:
    """Write ``vision_polished.safetensors``."""
    target = work / "vision_polished.safetensors"
    if target.exists():
        return target
    torch.manual_seed(budget.seed + 4)
    tower = load_tower(work / "vision.safetensors")
    projector = load_projector(work / "projector_1.safetensors").requires_grad_(False)

    def forward(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected patches [B * 64, hidden] and their labels [B * 64]."""
        scenes = source.batch(first, count)
        with torch.autocast("cpu", torch.bfloat16):
            features = patch_features(tower, pixels([s.image for s in scenes]))
        labels = torch.stack([torch.from_numpy(s.patches).flatten() for s in scenes])
        return projector(features.float()).flatten(0, 1), labels.flatten()

    def check() -> float:
        """Share of object patches whose nearest prototype is their own."""
        with torch.no_grad():
            out, labels = forward(CHECK_SEED, 256)
        nearest = (F.normalize(out, dim=-1) @ unit.T).argmax(-1)
        return (nearest == labels)[labels != BACKGROUND].float().mean().item()

    sums, counts = 0, torch.zeros(len(CLASSES) + 1)
    with torch.no_grad():
        for part in range(8):
            out, labels = forward(POLISH_SEED + 50_000_000 + part * 64, 64)
            one_hot = F.one_hot(labels, len(CLASSES) + 1).float()
            sums, counts = sums + one_hot.T @ out, counts + one_hot.sum(0)
    prototypes = sums / counts[:, None]  # [classes + 1, hidden]
    unit, spread = F.normalize(prototypes, dim=-1), prototypes.std()
    weights = torch.ones(len(CLASSES) + 1)
    weights[BACKGROUND] = 0.3
    log("polish", step=0, patch_accuracy=check())
    tower.requires_grad_(True)
    update = Update(tower, nn.ModuleList([tower]), budget, budget.polish_factor)
    for step in range(budget.polish_steps):
        out, labels = forward(POLISH_SEED + step * budget.vision_batch, budget.vision_batch)
        contrast = F.cross_entropy(16 * F.normalize(out, dim=-1) @ unit.T, labels, weights)
        distance = F.mse_loss(out / spread, (prototypes / spread)[labels])
        update(contrast + 0.3 * distance, cosine(step, budget.polish_steps, 20))
        if step % 50 == 0:
            log("polish", step=step, contrast=contrast.item(), distance=distance.item())
    log("polish", step=budget.polish_steps, patch_accuracy=check())
    save(target, {k: v for k, v in tower.state_dict().items() if "position_ids" not in k})
    return target
