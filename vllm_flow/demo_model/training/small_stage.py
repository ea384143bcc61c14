"""Stage 4: the small decoder for fast tests, from scratch, on the same tower at two thirds of the size.

It is asked for presence alone. Captions would take most of the loss, and presence would not come off.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.small import POSITIONS, SMALL_CONFIG, SMALL_IMAGE_TOKENS, small_tower
from vllm_flow.demo_model.training import projector_stage
from vllm_flow.demo_model.training.asks import TaskAsk
from vllm_flow.demo_model.training.batches import Batch, Machine, SceneSteps, training_palette
from vllm_flow.demo_model.training.budget import CHECK_SEED, SMALL_SEED, Budget, trapezoid
from vllm_flow.demo_model.training.decoder_stage import Asker
from vllm_flow.demo_model.training.files import Log, load, save
from vllm_flow.demo_model.training.lora import adamw, new_llama
from vllm_flow.demo_model.training.projector_stage import Projector, load_projector
from vllm_flow.demo_model.training.sprites import Assets
from vllm_flow.demo_model.training.towers import new_tower
from vllm_flow.demo_model.training.vision_stage import ATTENTION
from vllm_flow.demo_model.vocabulary import CLASSES

CHECK_SCENES = 64


def presence_asks(facts: Facts, rng: random.Random) -> list[TaskAsk]:
    """Every kind of thing there, with and without the suffix, and as many that are not there.

    The name's own last token is asked for the answer, too: to find a thing and to read off the answer
    at the end are two steps, and together they are not found from random weights in a short training.
    """

    def ask(name: str, suffix: str, answer: str) -> TaskAsk:
        text = questions.presence(name)
        early = text.removesuffix(" in the image?")
        return TaskAsk(text + suffix, answer, early, task="presence")

    suffixes = ("", questions.ANSWER_SUFFIX)
    missing = [name for name in CLASSES if name not in facts.objects]
    absent = rng.sample(missing, 2 * len(facts.objects))
    asks = [ask(name, suffix, "Yes") for name in facts.objects for suffix in suffixes]
    return asks + [ask(name, rng.choice(suffixes), "No") for name in absent]


def reduced(batch: Batch) -> Batch:
    """The batch as the small model sees it: [B, 3, 112, 112] pixels, labels of 8 x 8 patches.

    Scenes without things are left out.
    """
    kept = [number for number, facts in enumerate(batch["facts"]) if facts.objects]
    side = len(POSITIONS) * 14
    pixels = F.interpolate(
        batch["pixels"][kept].float(), (side, side), mode="bicubic", antialias=True
    )
    out: Batch = {
        "pixels": pixels.round().clamp(0, 255),
        "facts": [batch["facts"][number] for number in kept],
    }
    chosen = list(POSITIONS)
    for name in ("patches", "centres"):
        grid = batch[name][kept].unflatten(1, (12, 12))
        out[name] = grid[:, chosen][:, :, chosen].flatten(1)
    return out


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


def optimizers_for(llama: nn.Module, projector: Projector, budget: Budget) -> list[Any]:
    """Muon on the layers' matrices, AdamW on the rest; each group carries its peak rate."""
    matrices = [p for p in llama.layers.parameters() if p.ndim == 2]
    others = [*llama.embed_tokens.parameters(), *projector.parameters()]
    others += [p for p in llama.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(
            [{"params": matrices, "peak": budget.small_muon_lr}],
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw([{"params": others, "peak": budget.small_lr}]),
    ]


def train(
    work: Path, assets: Assets, tokenizer: Any, budget: Budget, log: Log, machine: Machine
) -> None:
    """Write ``small_decoder.safetensors`` and ``small_projector.safetensors``."""
    target, projected = work / "small_decoder.safetensors", work / "small_projector.safetensors"
    if target.exists() and projected.exists():
        return
    torch.manual_seed(budget.seed + 3)
    config, weights = small_tower(load(work / "vision.safetensors"))
    tower = new_tower(config, ATTENTION)
    tower.load_state_dict(weights, strict=False)
    tower.eval().requires_grad_(False).to(machine.device)
    llama = new_llama(SMALL_CONFIG, ATTENTION)
    nn.init.normal_(llama.embed_tokens.weight, std=0.15)
    projector = load_projector(
        projector_stage.train(
            work / "small_fitted.safetensors",
            assets,
            tower,
            llama.embed_tokens.weight.detach().clone(),
            tokenizer,
            budget,
            lambda stage, **values: log(f"small_{stage}", **values),
            machine,
            reduced,
        )
    )
    help_matching(llama, projector)
    llama.to(machine.device)
    projector.to(machine.device)
    asker = Asker(tower, projector, llama, tokenizer, presence_asks, SMALL_IMAGE_TOKENS)
    optimizers = optimizers_for(llama, projector, budget)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    palette = training_palette(assets)
    held = reduced(machine.moved(SceneSteps(palette, CHECK_SEED, CHECK_SCENES, 0.0)[0]))
    steps = SceneSteps(palette, SMALL_SEED, budget.small_batch, 0.0)
    for step, batch in enumerate(steps.steps(0, budget.small_steps, machine)):
        for group in groups:
            group["lr"] = group["peak"] * trapezoid(
                step, budget.small_steps, 20, budget.small_decay
            )
        loss = asker.loss(reduced(batch), random.Random(f"small/{budget.seed}/{step}"))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 10 == 0:
            log("small", step=step, loss=loss.item())
        if (step + 1) % 100 == 0 or step + 1 == budget.small_steps:
            log("small", step=step + 1, **asker.check(held))
    save(projected, projector.state_dict())
    save(target, llama.state_dict())
