"""The families that the analysis reads, by their tiny checkpoints of tests/families."""

from __future__ import annotations

from collections.abc import Callable

from tests.families import oracle
from tests.families.making import Checkpoint, picture
from vllm_flow.analysis.vlm import Encoded, Vlm

ONE_OF_A_KIND = ("qwen2_5_vl", "internvl", "llava_next", "idefics3", "mistral3")
NAMES = (
    "llava",
    "pixtral",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
    "internvl_qwen3",
    "idefics3",
    "smolvlm",
    "mistral3",
    "glm4_1v",
    "glm4_5v",
    "glm_ocr",
)
ANSWER = ("w7", "w9", "w40")
LAYERS = (0, 1, 2)
Given = Callable[[str], tuple[Checkpoint, Vlm]]


def asked(checkpoint: Checkpoint, vlm: Vlm, size: int = 0) -> tuple[str, Encoded, oracle.Prompt]:
    """A prompt with one picture, as the analysis encodes it and as the processor alone does."""
    prompt = f"w1 w2 {checkpoint.image} w3 w4 w5"
    image = picture(1, (*checkpoint.sizes, (128, 128))[size])
    return prompt, vlm.encode(prompt, image), oracle.encode(checkpoint, prompt, (image,))
