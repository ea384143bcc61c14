"""Steps, batch sizes, rates and seed ranges of the demo model's training. (pure)"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """What every stage spends."""

    vision_steps: int = 8400
    vision_batch: int = 32
    vision_lr: float = 2e-3
    vision_muon_lr: float = 3e-3
    vision_decay: float = 0.35
    """Share of the steps in which the rates fall to nothing; before, they stay: so the number of
    steps may be changed until the fall begins."""
    projector_steps: int = 250
    projector_batch: int = 48
    projector_lr: float = 1e-2
    """Muon's rate for both matrices (and AdamW's for the biases)."""
    lora_steps: int = 540
    lora_batch: int = 4
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_lr: float = 1.5e-3
    lora_projector_lr: float = 2e-4
    """The projector's rate while LoRA is trained; the tower's features are large (norm about 50)."""
    lora_decay: float = 0.4
    small_steps: int = 500
    small_batch: int = 12
    small_lr: float = 2e-3
    small_muon_lr: float = 2e-3
    small_decay: float = 0.5
    checkpoint_every: float = 300.0
    """Seconds."""
    seed: int = 11

    def as_dict(self) -> dict[str, Any]:
        """For the log and the manifest."""
        return asdict(self)


# Each stage draws its scenes from its own range, all within scenes.TRAIN_SEEDS.
VISION_SEED, PROJECTOR_SEED, LORA_SEED, CHECK_SEED, SMALL_SEED = (i * 400_000_000 for i in range(5))


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor on the rate: linear warm-up, constant, linear fall to 2 % over the last ``decay`` share."""
    start = steps * (1 - decay)
    rising = min(1.0, (step + 1) / warmup)
    falling = 1.0 if step < start else 1 - 0.98 * (step - start) / max(1.0, steps - start)
    return min(rising, falling)
