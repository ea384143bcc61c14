"""Stage 1: the vision tower from scratch, told what every patch shows and what the picture holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.scenes import BACKGROUND, Scene
from vllm_flow.demo.training.common import (
    CHECK_SEED,
    VISION_SEED,
    Budget,
    Log,
    SceneSource,
    cosine,
    load,
    pixels,
    save,
)
from vllm_flow.demo.vision import TOWER_CONFIG


def new_tower(sizes: Mapping[str, Any] = TOWER_CONFIG, attention: str = "sdpa") -> nn.Module:
    """An untrained CLIP vision tower, by default of the demo model's size."""
    from transformers.models.clip.modeling_clip import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**{k: v for k, v in sizes.items() if k != "model_type"})
    config._attn_implementation = attention
    tower = CLIPVisionModel(config)
    start_positions(tower)
    return tower


def start_positions(tower: nn.Module) -> None:
    """Start the position embeddings as 2-D sines and cosines, strong enough to be seen.

    CLIP's start (deviation 0.02) drowns in the patch embedding; patches then take long to find
    their neighbours. The embeddings stay trainable.
    """
    table = next(p for n, p in tower.named_parameters() if n.endswith("position_embedding.weight"))
    quarter = table.shape[1] // 4
    rates = 100.0 ** -(torch.arange(quarter) / quarter)
    places = torch.arange(math.isqrt(len(table)))  # the table's first row is the class token's
    yy, xx = torch.meshgrid(places, places, indexing="ij")
    waves = [f(v.flatten()[:, None] * rates) for v in (xx, yy) for f in (torch.sin, torch.cos)]
    with torch.no_grad():
        table[0] = 0
        table[1:] = 0.5 * torch.cat(waves, dim=1)


def patch_features(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """[B, 64, 192]: what LLaVA takes from the tower (last layer, class token dropped)."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


def load_tower(path: Path) -> nn.Module:
    """The trained tower, frozen."""
    tower = new_tower()
    missing, unexpected = tower.load_state_dict(load(path), strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    return tower.eval().requires_grad_(False)


def _targets(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch labels [B, 64] and picture labels [B, classes] of a batch."""
    patches = torch.stack([torch.from_numpy(s.patches).flatten() for s in scenes])
    present = torch.zeros(len(scenes), len(CLASSES))
    for row, scene in enumerate(scenes):
        present[row, [CLASSES.index(name) for name in scene.objects]] = 1
    return patches, present


class Update:
    """Muon on the encoder's matrices, AdamW on the rest.

    In a short trial Muon took about half the steps of AdamW alone.
    """

    def __init__(self, tower: nn.Module, modules: nn.Module, budget: Budget, scale: float) -> None:
        matrices = [p for n, p in tower.named_parameters() if "encoder" in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in modules.parameters() if id(p) not in chosen]
        self.parameters = matrices + others
        self.peaks = (budget.vision_muon_lr * scale, budget.vision_lr * scale)
        self.optimizers = (
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
        )

    def __call__(self, loss: torch.Tensor, factor: float) -> None:
        """One step at ``factor`` times the peak rates."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """Both optimizers' states."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from ``state_dict``."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def train(work: Path, source: SceneSource, budget: Budget, log: Log) -> Path:
    """Write ``vision_1.safetensors``, then ``vision.safetensors``, one per round."""
    target = work / "vision.safetensors"
    for number, file in enumerate((work / "vision_1.safetensors", target)):
        if not file.exists():
            torch.manual_seed(budget.seed + 100 * number)
            tower = new_tower()
            if number:
                tower.load_state_dict(load(work / "vision_1.safetensors"), strict=False)
            _round(tower, source, budget, number, log)
            save(file, {k: v for k, v in tower.state_dict().items() if "position_ids" not in k})
    return target


def _round(tower: nn.Module, source: SceneSource, budget: Budget, number: int, log: Log) -> None:
    """One round over fresh scenes; the loss is per-patch cross entropy plus multilabel."""
    steps, first = budget.vision_steps[number], sum(budget.vision_steps[:number])
    width = TOWER_CONFIG["hidden_size"]
    patch_head, picture_head = nn.Linear(width, len(CLASSES) + 1), nn.Linear(width, len(CLASSES))
    modules = nn.ModuleList([tower, patch_head, picture_head])
    update = Update(tower, modules, budget, budget.vision_second_round if number else 1.0)
    weights = torch.ones(len(CLASSES) + 1)
    weights[BACKGROUND] = 0.3

    def forward(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            features = patch_features(tower, pixels([s.image for s in scenes]))
        features = features.float()
        return patch_head(features), picture_head(features).logsumexp(1)

    for step in range(steps):
        scenes = source.batch(
            VISION_SEED + (first + step) * budget.vision_batch, budget.vision_batch
        )
        patches, present = _targets(scenes)
        patch_logits, picture_logits = forward(scenes)
        patch_loss = F.cross_entropy(patch_logits.flatten(0, 1), patches.flatten(), weights)
        picture_loss = F.binary_cross_entropy_with_logits(picture_logits - 4.0, present)
        update(patch_loss + 3 * picture_loss, cosine(step, steps, 40))
        if step % 50 == 0:
            log("vision", step=step, patch=patch_loss.item(), picture=picture_loss.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            with torch.no_grad():
                check = source.batch(CHECK_SEED, 256)
                patches, present = _targets(check)
                patch_logits, picture_logits = forward(check)
            covered = patches != BACKGROUND
            hit = (patch_logits.argmax(-1) == patches)[covered].float().mean().item()
            wrong = (((picture_logits - 4.0) > 0) != present.bool()).float().sum(1).mean().item()
            log("vision", step=step + 1, patch_accuracy=hit, wrong_labels_per_scene=wrong)
