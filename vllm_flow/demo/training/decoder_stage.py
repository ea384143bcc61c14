"""Stage 3: LoRA on the frozen decoder's q, k, v, o and the projector, cross entropy on answers only.

Also trains the small decoder from scratch: the same loop with every weight free.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo.scenes import Scene
from vllm_flow.demo.training import projector_stage
from vllm_flow.demo.training.common import (
    CHECK_SEED,
    LORA_SEED,
    SMALL_SEED,
    Budget,
    Log,
    SceneSource,
    cosine,
    load,
    pixels,
    save,
)
from vllm_flow.demo.training.packs import (
    IGNORED,
    Ask,
    Packer,
    additive_mask,
    presence_only,
    questions_of,
)
from vllm_flow.demo.training.projector_stage import Projector, load_projector
from vllm_flow.demo.training.vision_stage import patch_features

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer W plus (alpha / r) B A; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def new_llama(config: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    """An untrained ``LlamaModel`` (no head: embeddings are tied)."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel

    skipped = ("model_type", "architectures", "rope_theta")
    llama_config = LlamaConfig(**{k: v for k, v in config.items() if k not in skipped})
    llama_config._attn_implementation = attention
    return LlamaModel(llama_config)


def add_lora(llama: nn.Module, rank: int, alpha: int) -> dict[str, nn.Parameter]:
    """Put LoRA on every attention projection; returns its parameters by name."""
    found = {}
    for number, layer in enumerate(llama.layers):
        for target in LORA_TARGETS:
            adapter = LoraLinear(getattr(layer.self_attn, target), rank, alpha)
            setattr(layer.self_attn, target, adapter)
            found[f"layers.{number}.self_attn.{target}.lora_a"] = adapter.lora_a
            found[f"layers.{number}.self_attn.{target}.lora_b"] = adapter.lora_b
    return found


class Asker:
    """Runs packs through tower, projector and decoder."""

    def __init__(
        self,
        tower: nn.Module,
        projector: Projector,
        llama: nn.Module,
        tokenizer: Any,
        questions: Callable[[Sequence[str], random.Random], list[Ask]] = questions_of,
    ) -> None:
        self.tower, self.projector, self.llama = tower, projector, llama
        self.questions = questions
        self.packer = Packer(tokenizer)
        self.yes, self.no = (tokenizer.encode(word).ids[0] for word in ("Yes", "No"))

    def hidden(self, scenes: list[Scene], batch: Any) -> torch.Tensor:
        """[B, T, hidden]: the decoder's normalised output."""
        with torch.no_grad():
            features = patch_features(self.tower, pixels([s.image for s in scenes]))
        table = self.llama.embed_tokens.weight
        rows = F.embedding(batch.tokens_BT, table).to(torch.bfloat16)
        image = self.projector(features).to(torch.bfloat16)
        rows = torch.cat([rows[:, : batch.image.start], image, rows[:, batch.image.stop :]], 1)
        return self.llama(
            inputs_embeds=rows,
            attention_mask=additive_mask(batch.allowed_BTT, torch.bfloat16),
            position_ids=batch.positions_BT,
            use_cache=False,
        ).last_hidden_state

    def loss(self, scenes: list[Scene], rng: random.Random) -> torch.Tensor:
        """Weighted cross entropy over the answers of a fresh set of questions."""
        batch = self.packer.batch([self.questions(s.objects, rng) for s in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.hidden(scenes, batch)
            chosen = batch.targets_BT != IGNORED
            logits = F.linear(hidden[chosen], self.llama.embed_tokens.weight)
        losses = F.cross_entropy(logits.float(), batch.targets_BT[chosen], reduction="none")
        weights = batch.weights_BT[chosen]
        return (losses * weights).sum() / weights.sum()

    @torch.no_grad()
    def check(self, scenes: list[Scene], size: int = 8) -> dict[str, float]:
        """Presence accuracy, and teacher-forced accuracy over caption tokens."""
        right = asked = caption_right = caption_tokens = 0
        rng = random.Random(0)
        for start in range(0, len(scenes), size):
            part = scenes[start : start + size]
            packs = [self.questions(s.objects, rng) for s in part]
            batch = self.packer.batch(packs)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.hidden(part, batch)
            for b, pack in enumerate(packs):
                for ask, row in zip(pack, batch.first_B[b], strict=True):
                    if ask.answer in ("Yes", "No"):
                        logits = F.linear(
                            hidden[b, row].float(), self.llama.embed_tokens.weight.float()
                        )
                        said = "Yes" if logits[self.yes] > logits[self.no] else "No"
                        right, asked = right + (said == ask.answer), asked + 1
                    else:
                        rows = slice(row, row + int((batch.targets_BT[b, row:] != IGNORED).sum()))
                        logits = F.linear(
                            hidden[b, rows].float(), self.llama.embed_tokens.weight.float()
                        )
                        caption_right += int((logits.argmax(-1) == batch.targets_BT[b, rows]).sum())
                        caption_tokens += rows.stop - rows.start
        presence = {"presence": right / asked}
        if not caption_tokens:
            return presence
        return {**presence, "caption_tokens": caption_right / caption_tokens}


def _fit(
    asker: Asker,
    source: SceneSource,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    batch: int,
    first_seed: int,
    log: Callable[..., None],
) -> None:
    """Train with cosine decay; each parameter group carries its peak rate as ``peak``."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    rng = random.Random(first_seed)
    for step in range(steps):
        for group in groups:
            group["lr"] = group["peak"] * cosine(step, steps, max(10, steps // 20))
        loss = asker.loss(source.batch(first_seed + step * batch, batch), rng)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 10 == 0:
            log(step=step, loss=loss.item())
        if (step + 1) % max(1, steps // 4) == 0:
            log(step=step + 1, **asker.check(source.batch(CHECK_SEED, 32)))


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without decay over groups that name their peak rate."""
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))


def train_lora(
    work: Path,
    source: SceneSource,
    tower: nn.Module,
    decoder: Any,
    tokenizer: Any,
    budget: Budget,
    number: int,
    log: Log,
) -> None:
    """Write ``lora_1`` and ``projector_1``; later rounds (``number`` > 0) go on from the one before."""
    target, tuned = (work / f"{name}_{number + 1}.safetensors" for name in ("lora", "projector"))
    if target.exists() and tuned.exists():
        return
    torch.manual_seed(budget.seed + 2 + 100 * number)
    llama = new_llama(decoder.config)
    llama.load_state_dict(decoder.weights)
    llama.to(torch.bfloat16).requires_grad_(False)
    adapters = add_lora(llama, budget.lora_rank, budget.lora_alpha)
    projector = load_projector(
        work / (f"projector_{number}.safetensors" if number else "projector.safetensors")
    )
    if number:
        with torch.no_grad():
            for name, tensor in load(work / f"lora_{number}.safetensors").items():
                adapters[name].copy_(tensor)
    asker = Asker(tower, projector, llama, tokenizer)
    rate = budget.lora_lr if number == 0 else budget.lora_lr / 2
    groups = [
        {"params": list(adapters.values()), "peak": rate},
        {"params": list(projector.parameters()), "peak": rate / 2},
    ]
    first_seed = LORA_SEED + number * 50_000_000
    steps = budget.lora_steps[number]
    _fit(asker, source, [adamw(groups)], steps, budget.lora_batch, first_seed, partial(log, "lora"))
    save(tuned, projector.state_dict())
    save(target, adapters)


def help_matching(llama: nn.Module, projector: Projector) -> None:
    """Start the small decoder where a word attends to the patches that look like it.

    From random weights, presence stayed at chance while captions were learnt. So queries start equal
    to their group's keys, strongly enough to matter, and image rows carry a mark that tells them
    from the words whose embedding they resemble.
    """
    config = llama.config
    group = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in llama.layers:
            keys = layer.self_attn.k_proj.weight.mul_(3.0)
            per_head = keys.view(config.num_key_value_heads, config.head_dim, -1)
            layer.self_attn.q_proj.weight.copy_(per_head.repeat_interleave(group, 0).flatten(0, 1))
        projector.linear_2.bias.add_(0.15 * torch.randn_like(projector.linear_2.bias))


def train_small(
    work: Path, source: SceneSource, tower: nn.Module, config: dict[str, Any], tokenizer: Any,
    budget: Budget, log: Log,
) -> tuple[Path, Path]:  # fmt: skip
    """Write ``small_decoder.safetensors`` and ``small_projector.safetensors``."""
    target, projected = work / "small_decoder.safetensors", work / "small_projector.safetensors"
    if target.exists() and projected.exists():
        return target, projected
    torch.manual_seed(budget.seed + 3)
    llama, fitted = new_llama(config), work / "small_fitted.safetensors"
    nn.init.normal_(llama.embed_tokens.weight, std=0.15)
    table = llama.embed_tokens.weight.detach().clone()
    projector_stage.train(fitted, source, tower, table, tokenizer, budget, log)
    projector = load_projector(fitted)
    help_matching(llama, projector)
    asker = Asker(tower, projector, llama, tokenizer, presence_only)
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    others = [*llama.embed_tokens.parameters(), *projector.parameters()]
    others += [p for p in llama.parameters() if p.ndim == 1]
    optimizers = [
        torch.optim.Muon(
            [{"params": matrices, "peak": budget.small_muon_lr}],
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw([{"params": others, "peak": budget.small_lr}]),
    ]
    steps, batch = budget.small_steps, budget.small_batch
    _fit(asker, source, optimizers, steps, batch, SMALL_SEED, partial(log, "small"))
    save(projected, projector.state_dict())
    save(target, llama.state_dict())
    return target, projected
