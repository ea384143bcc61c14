"""Which class of vLLM runs a language model's layers, by the type that its configuration names.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

TEXT_TYPES = {
    "llama": "LlamaModel",
    "llama4_text": "Llama4Model",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen2_vl_text": "Qwen2Model",
    "qwen2_5_vl_text": "Qwen2Model",
    "qwen2_5_omni_text": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "qwen3_moe": "Qwen3MoeModel",
    "qwen3_vl_text": "Qwen3LLMModel",
    "qwen3_vl_moe_text": "Qwen3MoeLLMModel",
    "qwen3_omni_moe_text": "Qwen3MoeLLMModel",
    "qwen3_5_text": "Qwen3_5Model",
    "qwen3_5_moe_text": "Qwen3_5Model",
    "interns1_pro_text": "InternS1ProMoeLLMModel",
    "interns2_mobius_text": "InternS2MobiusModel",  # by the habit of the others; no configuration was seen
    "glm4v_text": "Glm4Model",
    "glm4v_moe_text": "Glm4MoeModel",
    "glm_ocr_text": "Glm4Model",
    "paddleocr_vl_text": "LlamaModel",
    "opt": "OPTDecoder",
    "internlm2": "InternLM2Model",
    "chatglm": "GLMTransformer",
    "cosmos3_edge_text": "Cosmos3EdgeTextModel",
    "cohere2": "CohereModel",
    "cohere_compass_text": "CohereCompassTextModel",
    "deepseek_v2": "DeepseekV2Model",
    "deepseek_v3": "DeepseekV2Model",
    "dots_ocr": "Qwen2Model",
    "ernie4_5_moe_vl": "Ernie4_5_VLMoeModel",
    "granite4_vision_text": "Granite4VisionLLMModel",
    "exaone4": "Exaone4Model",
    "gemma3_text": "Gemma3Model",
    "gemma4_text": "Gemma4Model",
    "gemma4_unified_text": "Gemma4Model",
    "aria_text": "AriaTextModel",
    "molmo": "MolmoModel",
    "molmo2_text": "Molmo2TextModel",
    "step3_text": "Step3TextModel",
    "step3p5": "Step3p5Model",
    "hunyuan_vl_text": "HunYuanVLTextModel",
    "lfm2": "Lfm2Model",
    "nemotron_h": "NemotronHModel",
    "muse_glimmer_text": "MuseGlimmerModel",
    "mimo_v2": "MiMoV2Model",
    "mimo_v2_flash": "MiMoV2Model",
    "openpangu_vl": "OpenPanguModel",
    "phi3_v": "LlamaModel",
    "phi4mm": "LlamaModel",
}
"""``model_type`` of a language model's configuration -> the class of vLLM that runs its layers."""
