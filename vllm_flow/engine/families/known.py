"""The families that were tested, a row each. ``vllm-flow models`` prints them, as in docs/models.md.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.both_ways import BOTH_WAYS
from vllm_flow.engine.families.decoders import (
    aria_decoder,
    chatglm_decoder,
    deepstack_decoder,
    ernie_decoder,
    granite_decoder,
    named_decoder,
    opt_decoder,
)
from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family
from vllm_flow.engine.families.llava_line import LLAVA_LINE
from vllm_flow.engine.families.on_deepseek import ON_DEEPSEEK
from vllm_flow.engine.families.on_qwen3_5 import ON_QWEN3_5
from vllm_flow.engine.families.own_layouts import OWN_LAYOUTS
from vllm_flow.engine.families.transformers_backend import transformers_decoder
from vllm_flow.engine.families.windowed import WINDOWED
from vllm_flow.engine.families.with_states import WITH_STATES

FAMILIES = (
    *LLAVA_LINE,
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
        "Cosmos3",
        ("Cosmos3ForConditionalGeneration",),
        ("Qwen3LLMModel",),
        "one token per 32 x 32 pixels, M-RoPE; deeper features are added between layers up to the cliff",
        "<|vision_start|>, <|vision_end|>, a video's timestamps",
        ("cosmos3",),
        beyond="without videos; what generates pictures is not served, as in vLLM",
        adapter=deepstack_decoder,
    ),
    Family(
        "Qwen3.5",
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        ("Qwen3_5Model",),
        "one token per 32 x 32 pixels, M-RoPE; layers of linear attention take in what is left",
        "<|vision_start|>, <|vision_end|>, a video's timestamps",
        ("qwen3_5", "qwen3_5_moe", "qwen3_5_video"),
        beyond="videos, from vLLM's embeddings on",
        adapter=named_decoder,
    ),
    *ON_QWEN3_5,
    *WITH_STATES,
    Family(
        "Qwen2.5-Omni",
        ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel"),
        ("Qwen2Model",),
        "one token per 28 x 28 pixels, M-RoPE",
        "<|vision_bos|>, <|vision_eos|>; sound",
        ("qwen2_5_omni",),
        beyond="without sound in the prompt, and without videos",
    ),
    Family(
        "Qwen3-Omni",
        ("Qwen3OmniMoeForConditionalGeneration",),
        ("Qwen3MoeLLMModel",),
        "one token per 32 x 32 pixels, M-RoPE; deeper features are added between layers up to the cliff",
        "<|vision_start|>, <|vision_end|>; sound",
        ("qwen3_omni",),
        beyond="without sound in the prompt, and without videos",
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
        "InternVL, OpenGVLab's layout, Skywork-R1V, Eagle 2.5, Qianfan-OCR",
        (
            "InternVLChatModel",
            "SkyworkR1VChatModel",
            "Eagle2_5_VLForConditionalGeneration",
            "QianfanOCRForConditionalGeneration",
        ),
        ("Qwen2Model", "Qwen3Model", "LlamaModel", "InternLM2Model"),
        "tiles of 448 x 448 pixels and a thumbnail, 256 tokens each",
        "<img>, </img>",
        (
            "internvl_chat_qwen2",
            "internvl_chat_qwen3",
            "internvl_chat_llama",
            "internvl_chat_internlm2",
            "skywork_r1v",
            "eagle2_5",
            "qianfan_ocr",
        ),
        compared=FROM_EMBEDDINGS,
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
    *WINDOWED,
    *BOTH_WAYS,
    Family(
        "LightOnOCR",
        ("LightOnOCRForConditionalGeneration",),
        ("Qwen3Model",),
        "rows of the picture's own size, 28 x 28 pixels a token",
        "nothing",
        ("lighton_ocr",),
    ),
    Family(
        "PaddleOCR-VL",
        ("PaddleOCRVLForConditionalGeneration",),
        ("LlamaModel",),
        "one token per 28 x 28 pixels, M-RoPE",
        "<|IMAGE_START|>, <|IMAGE_END|>",
        ("paddleocr_vl",),
        compared=FROM_EMBEDDINGS,
    ),
    Family(
        "ERNIE 4.5-VL",
        ("Ernie4_5_VLMoeForConditionalGeneration",),
        ("Ernie4_5_VLMoeModel",),
        "one token per 28 x 28 pixels, M-RoPE, with experts of its own",
        "<|IMAGE_START|>, <|IMAGE_END|>, which go to the picture's experts, too",
        ("ernie4_5_vl",),
        beyond="on CPU vLLM 0.32 leaves out what corrects the experts' choice, and calls the rotary embedding "
        "wrongly: the test has no correction, and calls it rightly; a marker in a step without a picture goes to "
        "the text's experts, as in stock vLLM",
        adapter=ernie_decoder,
    ),
    Family(
        "Aria",
        ("AriaForConditionalGeneration",),
        ("AriaTextModel",),
        "256 tokens, or 128 where pictures are made smaller, by cross-attention to the patches",
        "nothing",
        ("aria",),
        compared=FROM_EMBEDDINGS,
        beyond="pictures that are not split",
        adapter=aria_decoder,
    ),
    Family(
        "Granite 4 Vision",
        ("Granite4VisionForConditionalGeneration",),
        ("Granite4VisionLLMModel",),
        "the picture whole, then its tiles with an embedding per row break; features are added before layers up "
        "to the cliff",
        "nothing: row breaks are embeddings, and leave",
        ("granite4_vision",),
        adapter=granite_decoder,
    ),
    Family(
        "dots.ocr",
        ("DotsOCRForCausalLM",),
        ("Qwen2Model",),
        "one token per 28 x 28 pixels",
        "<|img|>, <|endofimg|>",
        ("dots_ocr",),
        compared=FROM_EMBEDDINGS,
    ),
    Family(
        "GLM-4.1V, GLM-4.5V, GLM-OCR",
        (
            "Glm4vForConditionalGeneration",
            "Glm4vMoeForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
        ),
        ("Glm4Model", "Glm4MoeModel"),
        "one token per 28 x 28 pixels, M-RoPE",
        "<|begin_of_image|>, <|end_of_image|>",
        ("glm4_1v", "glm4_5v", "glm_ocr"),
    ),
    Family(
        "GLM-4V",
        ("GLM4VForCausalLM",),
        ("GLMTransformer",),
        "one token per 28 x 28 pixels of the picture at the tower's own size, between two embeddings",
        "nothing: start and end of the picture are embeddings, and leave",
        ("glm4v",),
        compared=FROM_EMBEDDINGS,
        adapter=chatglm_decoder,
    ),
    *OWN_LAYOUTS,
    *ON_DEEPSEEK,
    Family(
        "BLIP-2",
        ("Blip2ForConditionalGeneration",),
        ("OPTDecoder",),
        "32 tokens before everything else",
        "nothing",
        ("blip2",),
        adapter=opt_decoder,
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
        "HunyuanOCR (in vLLM's Transformers backend)",
        ("HunYuanVLForConditionalGeneration",),
        ("HunYuanVLTextModel",),
        "one token per 32 x 32 pixels, with an embedding per row break, between two embeddings, M-RoPE of four axes",
        "the markers around the picture; its start, breaks and end are embeddings, and leave",
        ("hunyuan_vl",),
        beyond="one picture: vLLM 0.32 mixes up the tokens of two that it encodes at once; on CPU it multiplies a view "
        "that it cannot, of which the test makes a copy",
        own_type="hunyuan_vl",
        adapter=transformers_decoder,
    ),
    Family(
        "any, in vLLM's Transformers backend: Aya Vision, HyperCLOVA X Vision",
        ("TransformersMultiModalForCausalLM", "TransformersMultiModalMoEForCausalLM"),
        (),
        "as in its own row",
        "as in its own row",
        (
            "internvl_backend",
            "idefics3_backend",
            "qwen2_vl_backend",
            "glm4_5v_backend",
            "hyperclovax_vision",
            "aya_vision",
        ),
        adapter=transformers_decoder,
    ),
)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}


def family_of(architecture: str) -> Family | None:
    """The tested family of an architecture, None if there is none."""
    return _BY_ARCHITECTURE.get(architecture)
