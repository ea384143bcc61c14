"""Stage 1: the vision tower from scratch.

It is told what every patch shows (a class, a sign's word, or nothing), which letter is there, where
things have their middles, and what the whole picture holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo_model.scenes import BACKGROUND, LABELS, NO_LETTER
from vllm_flow.demo_model.training.batches import (
    Batch,
    Machine,
    Saver,
    SceneSteps,
    normalised,
    training_palette,
)
from vllm_flow.demo_model.training.budget import CHECK_SEED, VISION_SEED, Budget, trapezoid
from vllm_flow.demo_model.training.files import Log, load, save
from vllm_flow.demo_model.training.sprites import Assets
from vllm_flow.demo_model.training.towers import Update, new_tower
from vllm_flow.demo_model.vision import TOWER_CONFIG
from vllm_flow.demo_model.vocabulary import CLASSES

LETTER_LAYER = 3
"""Letters are asked for after this layer, so that the later ones can put words together."""
CHECK_BATCHES, CHECK_SIZE = 4, 64
ATTENTION = "eager"
"""On CPU the backward pass of torch's fused attention took 40 % of a step; plain products take less."""


class Heads(nn.Module):
    """What the tower's features are asked; thrown away after the stage."""

    def __init__(self) -> None:
        super().__init__()
        width = TOWER_CONFIG["hidden_size"]
        self.patch = nn.Linear(width, len(LABELS) + 1)
        self.picture = nn.Linear(width, len(LABELS))
        self.letter = nn.Linear(width, NO_LETTER + 1)
        self.centre = nn.Linear(width, 1)


def features(
    tower: nn.Module, pixels: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 144, 192] twice: after ``LETTER_LAYER``, and what LLaVA takes (class token dropped).

    Products are taken in ``dtype``; what comes out is float32.
    """
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = tower(normalised(pixels), output_hidden_states=True).hidden_states
    return states[LETTER_LAYER][:, 1:].float(), states[-1][:, 1:].float()


def load_tower(path: Path) -> nn.Module:
    """The trained tower, frozen."""
    tower = new_tower(TOWER_CONFIG, ATTENTION)
    tower.load_state_dict(load(path), strict=False)
    return tower.eval().requires_grad_(False)


def losses(tower: nn.Module, heads: Heads, batch: Batch) -> dict[str, torch.Tensor]:
    """The four losses of a batch, unweighted."""
    early, late = features(tower, batch["pixels"])
    weights = torch.ones(len(LABELS) + 1, device=late.device)
    weights[BACKGROUND] = 0.3
    on_sign = (batch["patches"] >= len(CLASSES)) & (batch["patches"] < BACKGROUND)
    letters = heads.letter(early[on_sign])
    picture = heads.picture(late).logsumexp(1) - 5.0
    return {
        "patch": F.cross_entropy(
            heads.patch(late).flatten(0, 1), batch["patches"].flatten(), weights
        ),
        "picture": F.binary_cross_entropy_with_logits(picture, batch["present"]),
        "letter": F.cross_entropy(letters, batch["letters"][on_sign])
        if len(letters)
        else letters.sum(),
        "centre": F.binary_cross_entropy_with_logits(
            heads.centre(late)[..., 0], batch["centres"], pos_weight=late.new_tensor(4.0)
        ),
    }


WEIGHTS = {"patch": 1.0, "picture": 5.0, "letter": 0.3, "centre": 0.5}


@torch.no_grad()
def check(tower: nn.Module, heads: Heads, batches: list[Batch]) -> dict[str, float]:
    """Shares of patches told right, by what they show, and wrong picture labels per scene."""
    right = {"thing": [], "word": [], "letter": []}
    wrong = scenes = 0
    for batch in batches:
        early, late = features(tower, batch["pixels"])
        said = heads.patch(late).argmax(-1)
        picture = heads.picture(late).logsumexp(1) - 5.0
        thing = batch["patches"] < len(CLASSES)
        word = ~thing & (batch["patches"] < BACKGROUND)
        there = batch["letters"] < NO_LETTER
        hit = said == batch["patches"]
        right["thing"].append(hit[thing])
        right["word"].append(hit[word])
        letters = heads.letter(early).argmax(-1)
        right["letter"].append((letters == batch["letters"])[there])
        wrong += int(((picture > 0) != batch["present"].bool()).sum())
        scenes += len(said)
    shares = {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}
    return {f"{name}_accuracy": v for name, v in shares.items()} | {
        "wrong_labels_per_scene": wrong / scenes
    }


def train(work: Path, assets: Assets, budget: Budget, log: Log, machine: Machine) -> Path:
    """Write ``vision.safetensors``; goes on from ``vision_state.pt`` where that is."""
    target = work / "vision.safetensors"
    if target.exists():
        return target
    torch.manual_seed(budget.seed)
    tower, heads = new_tower(TOWER_CONFIG, ATTENTION), Heads()
    modules = nn.ModuleList([tower, heads]).to(machine.device)
    update = Update(tower, modules, budget)
    saver = Saver(work / "vision_state.pt", budget.checkpoint_every)
    start = 0
    if (state := saver.load()) is not None:
        start = state["step"]
        modules.load_state_dict(state["modules"])
        update.load_state_dict(state["update"])
        log("vision", step=start, resumed=True)
    palette = training_palette(assets)
    held = SceneSteps(palette, CHECK_SEED, CHECK_SIZE, page_share=0.15)
    held_batches = [machine.moved(held[number]) for number in range(CHECK_BATCHES)]
    steps = SceneSteps(palette, VISION_SEED, budget.vision_batch, page_share=0.25)
    for step, batch in enumerate(steps.steps(start, budget.vision_steps, machine), start=start):
        parts = losses(tower, heads, batch)
        total = sum(WEIGHTS[name] * loss for name, loss in parts.items())
        update(total, trapezoid(step, budget.vision_steps, 40, budget.vision_decay))
        if step % 50 == 0:
            log("vision", step=step, **{name: loss.item() for name, loss in parts.items()})
        if (step + 1) % 250 == 0 or step + 1 == budget.vision_steps:
            log("vision", step=step + 1, **check(tower, heads, held_batches))
        saver.save(_state(step + 1, modules, update))
    save(target, {k: v for k, v in tower.state_dict().items() if "position_ids" not in k})
    saver.done()
    return target


def _state(step: int, modules: nn.Module, update: Update) -> dict[str, Any]:
    return {"step": step, "modules": modules.state_dict(), "update": update.state_dict()}
