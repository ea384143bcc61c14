"""The families that were tested, a row each. The table of ``vllm-flow models`` and README is this one.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_flow.engine.families.chatglm import chatglm_decoder
from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.deepstack import deepstack_decoder
from vllm_flow.engine.families.finding import residual_decoder
from vllm_flow.engine.families.transformers_backend import transformers_decoder

TEXT_TYPES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen2_vl_text": "Qwen2Model",
    "qwen2_5_vl_text": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "qwen3_vl_text": "Qwen3LLMModel",
    "qwen3_vl_moe_text": "Qwen3MoeLLMModel",
    "glm4v_text": "Glm4Model",
    "glm4v_moe_text": "Glm4MoeModel",
    "internlm2": "InternLM2Model",
    "chatglm": "GLMTransformer",
}
"""``model_type`` of a language model's configuration -> the class of vLLM that runs its layers."""


@dataclass(frozen=True)
class Family:
    """One row: a kind of model, and what eviction means for it."""

    name: str
    architectures: tuple[str, ...]
    """As vLLM resolves them."""
    decoders: tuple[str, ...]
    """Classes of vLLM that run the layers, as tested; empty where the architecture allows any."""
    layout: str
    """What a picture becomes in the prompt."""
    stays: str
    """What of it is text, and so never leaves."""
    checkpoints: tuple[str, ...]
    """Tiny checkpoints of ``tests/families`` that the row was tested on."""
    compared: str = "transformers' forward"
    """What the answers past a cliff were compared with."""
    beyond: str = ""
    """What else was tried: a real checkpoint, a GPU."""
    own_type: str = ""
    """The ``model_type`` of a configuration that does not say which language model it is for: which one it
    is, is seen when the model is loaded."""
    adapter: Callable[[Any], Decoder] = residual_decoder


FAMILIES = (
    Family(
        "LLaVA-1.5, Pixtral",
        ("LlavaForConditionalGeneration",),
        ("LlamaModel", "MistralModel", "Qwen2Model"),
        "one token per patch (Pixtral: rows of the picture's own size)",
        "Pixtral's [IMG_BREAK] and [IMG_END]",
        ("llava", "pixtral"),
        beyond="the demo model, a trained checkpoint",
    ),
    Family(
        "LLaVA-NeXT (1.6)",
        ("LlavaNextForConditionalGeneration",),
        ("LlamaModel", "MistralModel", "Qwen2Model"),
        "the picture whole, then its tiles with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("llava_next",),
    ),
    Family(
        "LLaVA-OneVision",
        ("LlavaOnevisionForConditionalGeneration",),
        ("Qwen2Model",),
        "the picture whole, then its tiles with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("llava_onevision", "llava_onevision_video"),
        beyond="videos, from vLLM's embeddings on",
    ),
    Family(
        "Qwen2-VL",
        ("Qwen2VLForConditionalGeneration",),
        ("Qwen2Model",),
        "one token per 28 x 28 pixels, M-RoPE",
        "<|vision_start|>, <|vision_end|>",
        ("qwen2_vl", "qwen2_vl_video"),
        beyond="videos, from vLLM's embeddings on",
    ),
    Family(
        "Qwen2.5-VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        ("Qwen2Model",),
        "one token per 28 x 28 pixels, M-RoPE",
        "<|vision_start|>, <|vision_end|>",
        ("qwen2_5_vl", "qwen2_5_vl_video"),
        beyond="videos, from vLLM's embeddings on",
    ),
    Family(
        "Qwen3-VL",
        ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        ("Qwen3LLMModel", "Qwen3MoeLLMModel"),
        "one token per 32 x 32 pixels, M-RoPE; deeper features are added between layers up to the cliff",
        "<|vision_start|>, <|vision_end|>, a video's timestamps",
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_vl_video"),
        beyond="videos, from vLLM's embeddings on",
        adapter=deepstack_decoder,
    ),
    Family(
        "InternVL",
        ("InternVLForConditionalGeneration", "InternS1ForConditionalGeneration"),
        ("Qwen2Model", "Qwen3Model"),
        "tiles of 448 x 448 pixels and a thumbnail, 256 tokens each",
        "<img>, </img>, the number of a video's frame",
        ("internvl", "internvl_qwen3", "internvl_video"),
        beyond="videos, from vLLM's embeddings on",
    ),
    Family(
        "InternVL, OpenGVLab's layout",
        ("InternVLChatModel",),
        ("Qwen2Model", "Qwen3Model", "LlamaModel", "InternLM2Model"),
        "tiles of 448 x 448 pixels and a thumbnail, 256 tokens each",
        "<img>, </img>",
        (
            "internvl_chat_qwen2",
            "internvl_chat_qwen3",
            "internvl_chat_llama",
            "internvl_chat_internlm2",
        ),
        compared="transformers' language model, from vLLM's embeddings",
    ),
    Family(
        "Idefics3, SmolVLM",
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        ("LlamaModel",),
        "tiles and a thumbnail, a fixed number of tokens each",
        "the markers around each tile",
        ("idefics3", "smolvlm"),
    ),
    Family(
        "Mistral 3",
        ("Mistral3ForConditionalGeneration",),
        ("MistralModel",),
        "rows of the picture's own size, 28 x 28 pixels a token",
        "[IMG_BREAK], [IMG_END]",
        ("mistral3",),
    ),
    Family(
        "GLM-4.1V, GLM-4.5V",
        ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration"),
        ("Glm4Model", "Glm4MoeModel"),
        "one token per 28 x 28 pixels, M-RoPE",
        "<|begin_of_image|>, <|end_of_image|>",
        ("glm4_1v", "glm4_5v"),
    ),
    Family(
        "GLM-4V",
        ("GLM4VForCausalLM",),
        ("GLMTransformer",),
        "one token per 28 x 28 pixels of the picture at the tower's own size, between two embeddings",
        "nothing: start and end of the picture are embeddings, and leave",
        ("glm4v",),
        compared="transformers' language model, from vLLM's embeddings",
        adapter=chatglm_decoder,
    ),
    Family(
        "MiniCPM-V 2.6, 4.0, 4.5",
        ("MiniCPMV",),
        ("Qwen2Model", "LlamaModel", "Qwen3Model"),
        "the picture whole, then its slices, a fixed number of tokens each",
        "the markers around each slice, and the picture's number",
        ("minicpm_v_2_6", "minicpm_v_4_0", "minicpm_v_4_5"),
        compared="transformers' language model, from vLLM's embeddings",
        beyond="on CPU vLLM 0.32 asks torch about CUDA, which the test answers",
        own_type="minicpmv",
    ),
    Family(
        "InstructBLIP (a model class of vLLM-Flow)",
        ("InstructBlipForConditionalGeneration",),
        ("LlamaModel",),
        "32 tokens before everything else, which depend on the instruction",
        "nothing",
        ("instructblip",),
    ),
    Family(
        "Shikra (a model class of vLLM-Flow)",
        ("ShikraForConditionalGeneration",),
        ("LlamaModel",),
        "256 tokens, one per patch",
        "<im_start>, <im_end>",
        ("shikra",),
        compared="transformers' LLaVA with Shikra's projector",
        beyond="the checkpoint went through the converter of the published delta",
    ),
    Family(
        "Qwen-VL (a model class of vLLM-Flow)",
        ("QWenLMHeadModel", "QwenVLForConditionalGeneration"),
        ("Qwen2Model",),
        "256 tokens by cross-attention to the patches of the picture at 448 x 448 pixels",
        "<img>, </img>",
        ("qwen_vl",),
        compared="a forward in plain torch, written from the published description",
        beyond="the published layout, with a tokenizer of vLLM-Flow for its qwen.tiktoken",
    ),
    Family(
        "any, in vLLM's Transformers backend",
        ("TransformersMultiModalForCausalLM",),
        (),
        "as in its own row",
        "as in its own row",
        ("internvl_backend", "idefics3_backend", "qwen2_vl_backend"),
        adapter=transformers_decoder,
    ),
)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def family_of(architecture: str) -> Family | None:
    """The tested family of an architecture, None if there is none."""
    return _BY_ARCHITECTURE.get(architecture)
