"""Stage 3: LoRA on the frozen decoder's q, k, v, o and the projector, cross entropy on answers only.

Every scene is asked a pack of questions over all tasks. Letters: B scenes, T tokens of the longest
pack, I image tokens, D hidden width.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.training.asks import TASKS, TaskAsk, asks_of
from vllm_flow.demo_model.training.batches import (
    Batch,
    Machine,
    Saver,
    SceneSteps,
    training_palette,
)
from vllm_flow.demo_model.training.budget import CHECK_SEED, LORA_SEED, Budget, trapezoid
from vllm_flow.demo_model.training.files import Log, save
from vllm_flow.demo_model.training.lora import adamw, add_lora, cast_weights, new_llama
from vllm_flow.demo_model.training.packs import IGNORED, PackBatch, Packer, additive_mask
from vllm_flow.demo_model.training.projector_stage import Projector, load_projector
from vllm_flow.demo_model.training.sprites import Assets
from vllm_flow.demo_model.training.vision_stage import ATTENTION, features
from vllm_flow.demo_model.vision import IMAGE_TOKENS

PAGE_SHARE = 0.05
CHECK_SCENES = 32


class Asker:
    """Runs packs through tower, projector and decoder."""

    def __init__(
        self,
        tower: nn.Module,
        projector: Projector,
        llama: nn.Module,
        tokenizer: Any,
        asks: Callable[[Facts, random.Random], list[TaskAsk]] = asks_of,
        image_tokens: int = IMAGE_TOKENS,
    ) -> None:
        self.tower, self.projector, self.llama = tower, projector, llama
        self.asks = asks
        self.packer = Packer(tokenizer, image_tokens)

    def pack(self, asks: Sequence[Sequence[TaskAsk]]) -> PackBatch:
        """The packs' tensors where the decoder is."""
        packs = self.packer.batch(asks)
        device = self.llama.embed_tokens.weight.device
        tensors = {
            field.name: value.to(device)
            for field in fields(packs)
            if isinstance(value := getattr(packs, field.name), torch.Tensor)
        }
        return replace(packs, **tensors)

    def hidden(self, pixels: torch.Tensor, packs: PackBatch) -> torch.Tensor:
        """[B, T, D]: the decoder's normalised output."""
        with torch.no_grad():
            seen = features(self.tower, pixels)[1]
        with torch.autocast(pixels.device.type, torch.bfloat16):
            rows = F.embedding(packs.tokens_BT, self.llama.embed_tokens.weight)
            image = self.projector(seen).to(rows.dtype)
            rows = torch.cat([rows[:, : packs.image.start], image, rows[:, packs.image.stop :]], 1)
            return self.llama(
                inputs_embeds=rows,
                attention_mask=additive_mask(packs.allowed_BTT, rows.dtype),
                position_ids=packs.positions_BT,
                use_cache=False,
            ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[.., vocabulary] float32."""
        with torch.autocast(hidden.device.type, torch.bfloat16):
            return F.linear(hidden, self.llama.embed_tokens.weight).float()

    def loss(self, batch: Batch, rng: random.Random) -> torch.Tensor:
        """Weighted cross entropy over the answers of a fresh set of questions."""
        packs = self.pack([self.asks(facts, rng) for facts in batch["facts"]])
        chosen = packs.targets_BT != IGNORED
        logits = self.logits(self.hidden(batch["pixels"], packs)[chosen])
        losses = F.cross_entropy(logits, packs.targets_BT[chosen], reduction="none")
        weights = packs.weights_BT[chosen]
        return (losses * weights).sum() / weights.sum()

    @torch.no_grad()
    def check(self, batch: Batch, size: int = 8) -> dict[str, float]:
        """Per task, the share of answer tokens that come first given the ones before."""
        right, asked = Counter(), Counter()
        rng = random.Random(0)
        for start in range(0, len(batch["facts"]), size):
            asks = [self.asks(facts, rng) for facts in batch["facts"][start : start + size]]
            packs = self.pack(asks)
            hidden = self.hidden(batch["pixels"][start : start + size], packs)
            for b, pack in enumerate(asks):
                for task, hit, count in self._hits(hidden[b], packs, b, pack):
                    right[task] += hit
                    asked[task] += count
        return {task: right[task] / asked[task] for task in TASKS if asked[task]}

    def _hits(
        self, hidden_TD: torch.Tensor, packs: PackBatch, b: int, pack: Sequence[TaskAsk]
    ) -> list[tuple[str, int, int]]:
        found = []
        for ask, row in zip(pack, packs.first_B[b], strict=True):
            length = len(self.packer.encode(ask.answer))
            said = self.logits(hidden_TD[row : row + length]).argmax(-1)
            hits = int((said == packs.targets_BT[b, row : row + length]).sum())
            found.append((ask.task, hits, length))
        return found


def tuned_decoder(decoder: Any, budget: Budget) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The frozen decoder in bfloat16 with LoRA on it, and LoRA's parameters by name."""
    llama = new_llama(decoder.config, ATTENTION)
    llama.load_state_dict(decoder.weights)
    cast_weights(llama, torch.bfloat16).requires_grad_(False)
    return llama, add_lora(llama, budget.lora_rank, budget.lora_alpha)


def train(
    work: Path,
    assets: Assets,
    tower: nn.Module,
    decoder: Any,
    tokenizer: Any,
    budget: Budget,
    log: Log,
    machine: Machine,
) -> None:
    """Write ``lora.safetensors`` and ``projector_tuned.safetensors``; goes on from ``lora_state.pt``."""
    target, tuned = work / "lora.safetensors", work / "projector_tuned.safetensors"
    if target.exists() and tuned.exists():
        return
    torch.manual_seed(budget.seed + 2)
    llama, adapters = tuned_decoder(decoder, budget)
    llama.to(machine.device)
    projector = load_projector(work / "projector.safetensors").to(machine.device)
    asker = Asker(tower, projector, llama, tokenizer)
    optimizer = adamw(
        [
            {"params": list(adapters.values()), "peak": budget.lora_lr},
            {"params": list(projector.parameters()), "peak": budget.lora_projector_lr},
        ]
    )
    saver, start = Saver(work / "lora_state.pt", budget.checkpoint_every), 0
    if (state := saver.load()) is not None:
        start = state["step"]
        projector.load_state_dict(state["projector"])
        with torch.no_grad():
            for name, tensor in state["adapters"].items():
                adapters[name].copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        log("lora", step=start, resumed=True)
    palette = training_palette(assets)
    held = machine.moved(SceneSteps(palette, CHECK_SEED, CHECK_SCENES, PAGE_SHARE)[0])
    steps = SceneSteps(palette, LORA_SEED, budget.lora_batch, PAGE_SHARE)
    for step, batch in enumerate(steps.steps(start, budget.lora_steps, machine), start=start):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * trapezoid(step, budget.lora_steps, 30, budget.lora_decay)
        loss = asker.loss(batch, random.Random(f"{budget.seed}/{step}"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*adapters.values(), *projector.parameters()], 1.0)
        optimizer.step()
        if step % 10 == 0:
            log("lora", step=step, loss=loss.item())
        if (step + 1) % 100 == 0 or step + 1 == budget.lora_steps:
            log("lora", step=step + 1, **asker.check(held))
        saver.save(
            {
                "step": step + 1,
                "projector": projector.state_dict(),
                "adapters": {name: tensor.detach() for name, tensor in adapters.items()},
                "optimizer": optimizer.state_dict(),
            }
        )
    save(tuned, projector.state_dict())
    save(target, adapters)
    saver.done()
