"""Stage 2: the projector, fitted so that a patch of a dog looks like the word `` dog`` to the decoder.

Without it the later stage does not find the image within its budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.training.common import (
    CHECK_SEED,
    PROJECTOR_SEED,
    Budget,
    Log,
    SceneSource,
    cosine,
    load,
    pixels,
    save,
)
from vllm_flow.demo.training.vision_stage import patch_features
from vllm_flow.demo.vision import TOWER_CONFIG

BACKGROUND_WORD = " background"


class Projector(nn.Module):
    """LLaVA's projector: linear, GELU, linear; [.., width] -> [.., hidden]."""

    def __init__(self, hidden: int, width: int = TOWER_CONFIG["hidden_size"]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


def load_projector(path: Path) -> Projector:
    """The saved projector, at whatever widths it has."""
    tensors = load(path)
    projector = Projector(*tensors["linear_1.weight"].shape)
    projector.load_state_dict(tensors)
    return projector


def train(
    target: Path,
    source: SceneSource,
    tower: nn.Module,
    embeddings: torch.Tensor,
    tokenizer: Any,
    budget: Budget,
    log: Log,
) -> Path:
    """Write ``target``. ``embeddings``: the decoder's [vocab, hidden] table."""
    if target.exists():
        return target
    torch.manual_seed(budget.seed + 1)
    words = [f" {name}" for name in CLASSES] + [BACKGROUND_WORD]
    rows = [torch.tensor(tokenizer.encode(word).ids) for word in words]
    goal = torch.stack([embeddings[ids].mean(0) for ids in rows])  # [classes + 1, hidden]
    spread = goal.std()
    projector = Projector(embeddings.shape[1])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=budget.projector_lr, weight_decay=0.0)

    def forward(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = source.batch(first, count)
        with torch.no_grad():
            features = patch_features(tower, pixels([s.image for s in scenes]))
        labels = torch.stack([torch.from_numpy(s.patches).flatten() for s in scenes])
        return projector(features), labels

    for step in range(budget.projector_steps):
        out, labels = forward(
            PROJECTOR_SEED + step * budget.projector_batch, budget.projector_batch
        )
        distance = F.mse_loss(out / spread, (goal / spread)[labels])
        logits = F.normalize(out, dim=-1) @ F.normalize(goal, dim=-1).T * 16
        contrast = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        for group in optimizer.param_groups:
            group["lr"] = budget.projector_lr * cosine(step, budget.projector_steps, 20)
        optimizer.zero_grad(set_to_none=True)
        (distance + 0.5 * contrast).backward()
        optimizer.step()
        if step % 50 == 0 or step + 1 == budget.projector_steps:
            log("projector", step=step, distance=distance.item(), contrast=contrast.item())
    with torch.no_grad():
        out, labels = forward(CHECK_SEED, 128)
        nearest = (F.normalize(out, dim=-1) @ F.normalize(goal, dim=-1).T).argmax(-1)
        log("projector", nearest_word_accuracy=(nearest == labels).float().mean().item())
    save(target, projector.state_dict())
    return target
