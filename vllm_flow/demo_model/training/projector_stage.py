"""Stage 2: the projector, fitted so that a patch of a dog looks like the word `` dog`` to the decoder.

A patch of a sign looks like the sign's word. Two marks are added, which the words do not have: how far
to the right the patch is, and whether a thing has its middle there. Without this stage the decoder
does not find the image within its budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo_model.scenes import BACKGROUND, LABELS
from vllm_flow.demo_model.training.batches import Batch, Machine, SceneSteps, training_palette
from vllm_flow.demo_model.training.budget import CHECK_SEED, PROJECTOR_SEED, Budget, trapezoid
from vllm_flow.demo_model.training.files import load, save
from vllm_flow.demo_model.training.sprites import Assets
from vllm_flow.demo_model.training.vision_stage import features
from vllm_flow.demo_model.vision import TOWER_CONFIG

PLACE_MARK, MIDDLE_MARK = 0.4, 0.5
"""Strength of the marks; 1 would add a whole word's embedding."""

BACKGROUND_WORD = " background"
CHECK_SCENES = 128


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


class Goal:
    """What the projector should make of patches."""

    def __init__(self, embeddings: torch.Tensor, tokenizer: Any) -> None:

        def word(text: str) -> torch.Tensor:
            return embeddings[torch.tensor(tokenizer.encode(text).ids)].mean(0)

        self.words = torch.stack([word(f" {name}") for name in LABELS] + [word(BACKGROUND_WORD)])
        """[labels + 1, hidden]"""
        self.spread = self.words.std()
        self.right = PLACE_MARK / 2 * (word(" right") - word(" left"))
        self.middle = MIDDLE_MARK * (word(" one") - word(BACKGROUND_WORD))

    def of(self, batch: Batch) -> torch.Tensor:
        """[B, patches, hidden]"""
        count = batch["patches"].shape[1]
        side = math.isqrt(count)
        columns = torch.arange(count, device=self.words.device) % side
        across = (2 * columns / (side - 1) - 1)[:, None]  # -1 at the left edge, 1 at the right
        marks = across * self.right + batch["centres"][..., None] * self.middle
        return self.words[batch["patches"]] + marks

    def nearest(self, out: torch.Tensor) -> torch.Tensor:
        """[.., labels + 1]: cosine with every word, both without what all words share.

        Half of an embedding's length is the same in all words, and the cosine of two words is about 0.3.
        """
        shared = self.words.mean(0)
        return F.normalize(out - shared, dim=-1) @ F.normalize(self.words - shared, dim=-1).T


def optimizers_for(projector: Projector, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices: a few of the tower's features are far larger than the others, and AdamW
    reached 14 % nearest words in the steps in which Muon reached 58 %."""
    layers = (projector.linear_1, projector.linear_2)
    return [
        torch.optim.Muon(
            [layer.weight for layer in layers],
            lr=rate,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([layer.bias for layer in layers], lr=rate, weight_decay=0.0),
    ]


def train(
    target: Path,
    assets: Assets,
    tower: nn.Module,
    embeddings: torch.Tensor,
    tokenizer: Any,
    budget: Budget,
    log: Callable[..., None],
    machine: Machine,
    prepared: Callable[[Batch], Batch] = lambda batch: batch,
) -> Path:
    """Write ``target``. ``embeddings``: the decoder's [vocab, hidden] table; ``prepared`` makes a batch of
    scenes into what the tower takes."""
    if target.exists():
        return target
    torch.manual_seed(budget.seed + 1)
    goal = Goal(embeddings.to(machine.device), tokenizer)
    projector = Projector(embeddings.shape[1], TOWER_CONFIG["hidden_size"]).to(machine.device)
    optimizers = optimizers_for(projector, budget.projector_lr)
    weights = torch.ones(len(LABELS) + 1, device=machine.device)
    weights[BACKGROUND] = 0.3

    def forward(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            late = features(tower, batch["pixels"])[1]
        return projector(late)

    steps = SceneSteps(
        training_palette(assets), PROJECTOR_SEED, budget.projector_batch, page_share=0.1
    )
    for step, batch in enumerate(map(prepared, steps.steps(0, budget.projector_steps, machine))):
        out = forward(batch)
        distance = F.mse_loss(out / goal.spread, goal.of(batch) / goal.spread)
        logits = 16 * goal.nearest(out).flatten(0, 1)
        contrast = F.cross_entropy(logits, batch["patches"].flatten(), weights)
        rate = budget.projector_lr * trapezoid(step, budget.projector_steps, 20, 0.6)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        (distance + 0.5 * contrast).backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step + 1 == budget.projector_steps:
            log("projector", step=step, distance=distance.item(), contrast=contrast.item())
    held = SceneSteps(training_palette(assets), CHECK_SEED, CHECK_SCENES, page_share=0.1)[0]
    held = prepared(machine.moved(held))
    with torch.no_grad():
        hit = goal.nearest(forward(held)).argmax(-1) == held["patches"]
    covered = held["patches"] != BACKGROUND
    log("projector", nearest_word_accuracy=hit[covered].float().mean().item())
    save(target, projector.state_dict())
    return target
