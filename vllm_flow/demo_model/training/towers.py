"""A CLIP vision tower for training from scratch, and how its weights are updated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_flow.demo_model.training.budget import Budget
from vllm_flow.demo_model.vision import TOWER_CONFIG


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


class Update:
    """Muon on the encoder's matrices, AdamW on the rest.

    In a short trial Muon took about half the steps of AdamW alone.
    """

    def __init__(self, tower: nn.Module, modules: nn.Module, budget: Budget) -> None:
        matrices = [p for n, p in tower.named_parameters() if "encoder" in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in modules.parameters() if id(p) not in chosen]
        self.parameters = matrices + others
        self.peaks = (budget.vision_muon_lr, budget.vision_lr)
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
