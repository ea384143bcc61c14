"""Rows of the registry: families in layouts of their own, most with code, which transformers has no class for.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_flow.engine.families.family import FROM_EMBEDDINGS, Family

OWN_LAYOUTS = (
    Family(
        "MiniCPM-V 2.6, 4.0, 4.5",
        ("MiniCPMV",),
        ("Qwen2Model", "LlamaModel", "Qwen3Model"),
        "the picture whole, then its slices, a fixed number of tokens each",
        "the markers around each slice, and the picture's number",
        ("minicpm_v_2_6", "minicpm_v_4_0", "minicpm_v_4_5"),
        compared=FROM_EMBEDDINGS,
        beyond="on CPU vLLM 0.32 asks torch about CUDA, which the test answers",
        own_type="minicpmv",
    ),
    Family(
        "MiniCPM-o 2.6, 4.5",
        ("MiniCPMO",),
        ("Qwen2Model", "Qwen3Model"),
        "the picture whole, then its slices, a fixed number of tokens each",
        "the markers around each slice, and the picture's number; speech",
        ("minicpm_o_2_6", "minicpm_o_4_5"),
        compared=FROM_EMBEDDINGS,
        beyond="without speech in the prompt; on CPU vLLM 0.32 asks torch about CUDA, which the test answers",
        own_type="minicpmo",
    ),
    Family(
        "Phi-3-vision, Phi-3.5-vision",
        ("Phi3VForCausalLM",),
        ("LlamaModel",),
        "tiles of 336 x 336 pixels, 144 tokens each, then the picture whole, with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("phi3v",),
        compared=FROM_EMBEDDINGS,
        beyond="the tower, whose size vLLM fixes, made small",
    ),
    Family(
        "Phi-4-multimodal",
        ("Phi4MMForCausalLM",),
        ("LlamaModel",),
        "tiles of 448 x 448 pixels without their padding, then the picture whole, with an embedding per row break",
        "nothing: row breaks are embeddings, and leave",
        ("phi4mm",),
        compared=FROM_EMBEDDINGS,
        beyond="the tower, whose size vLLM fixes, made small; without its adapters, and without speech",
    ),
    Family(
        "Molmo",
        ("MolmoForCausalLM",),
        ("MolmoModel",),
        "the picture whole, then its tiles, before the text",
        "<im_start>, <im_end>, <im_col> at the end of a row",
        ("molmo_qwen2", "molmo_olmo"),
        compared=FROM_EMBEDDINGS,
        beyond="the tower, whose size vLLM fixes, made small",
    ),
    Family(
        "Ovis 1.6, Ovis 2",
        ("Ovis",),
        ("LlamaModel", "Qwen2Model"),
        "the picture whole, then its tiles, a fixed number of tokens each, with an embedding per break",
        "nothing: start, breaks and end are embeddings, and leave",
        ("ovis1_6", "ovis2"),
        compared=FROM_EMBEDDINGS,
    ),
    Family(
        "Ovis 2.5, Ovis 2.6",
        ("Ovis2_5", "Ovis2_6ForCausalLM", "Ovis2_6_MoeForCausalLM"),
        ("Qwen3Model", "Qwen3MoeModel"),
        "one token per 32 x 32 pixels, between two embeddings",
        "nothing: start and end of the picture are embeddings, and leave",
        ("ovis2_5", "ovis2_6_moe"),
        compared=FROM_EMBEDDINGS,
    ),
    Family(
        "Step3-VL-10B",
        ("StepVLForConditionalGeneration",),
        ("Qwen3Model",),
        "crops of a long or large picture, 81 tokens each, then the picture whole, 169 tokens",
        "the markers around each crop, at the end of a row, and around the picture",
        ("step3_vl",),
        compared=FROM_EMBEDDINGS,
        beyond="the picture, whose size vLLM fixes, made small; on CPU vLLM 0.32 multiplies a view that it cannot, "
        "of which the test makes a copy",
    ),
    Family(
        "Pixtral, Mistral Small 3.1 and later, in Mistral's format",
        ("PixtralForConditionalGeneration",),
        ("MistralModel",),
        "rows of the picture's own size",
        "[IMG_BREAK], [IMG_END]",
        ("pixtral_mistral",),
        compared=FROM_EMBEDDINGS,
        own_type="transformer",
    ),
)
