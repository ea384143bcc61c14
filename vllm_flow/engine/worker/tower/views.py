"""Which models' vision towers are looked into, and how; a model's own reason where nobody looks."""

from __future__ import annotations

from typing import Any

from vllm_flow.engine import frames, obstacles
from vllm_flow.engine.worker.tower.intern import InternView
from vllm_flow.engine.worker.tower.llava import LlavaView
from vllm_flow.engine.worker.tower.qwen import QwenView
from vllm_flow.engine.worker.tower.scores import Tower

OF_CLASS = "LLaVA-1.5, LLaVA-NeXT, Shikra and InternVL"
OF_RECEIVED = "LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Shikra, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5"
OF_TILES = "LLaVA-1.5, LLaVA-NeXT and Shikra"
"""Models whose towers are looked into, for messages."""


def tower_of(model: Any, vllm_config: Any) -> Tower:
    """The tower of a loaded model; see :class:`vllm_flow.engine.worker.tower.scores.Tower`."""
    found, unknown = _tower_of(model, vllm_config), frames.unknown(model, vllm_config)
    found.unreadable = {**found.unreadable, **unknown}
    return found


def _tower_of(model: Any, vllm_config: Any) -> Tower:
    engine, name = _engine_reason(vllm_config), vllm_config.model_config.architecture
    if _is_llava(model):
        return _of_llava(model, engine)
    if _is_qwen(model):
        return _of_qwen(model, engine or _encoder_reason(vllm_config))
    if (attention := _intern_attention(model)) is not None:
        reason = engine or _encoder_reason(vllm_config)
        tiles = {obstacles.TILES: f"which is known of {OF_TILES}, and not of {name}"}
        return _unseen(reason) if reason else Tower(InternView(model, attention), tiles)
    return _unseen(
        engine or f"which is known of {OF_CLASS}, and not of {name}",
        engine or f"which is known of {OF_RECEIVED}, and not of {name}",
    )


def _of_llava(model: Any, engine: str | None) -> Tower:
    layers, kind = _attentions(model), type(model.vision_tower).__name__
    if not layers:
        return _unseen(
            engine or f"and this model's tower, a {kind}, has no such token",
            engine or f"and this model's tower is a {kind}, into which nobody looks",
        )
    no_class = engine or _class_reason(model)
    reasons = {
        obstacles.TOWER: no_class,
        obstacles.RECEIVED: engine,
        obstacles.TILES: no_class,  # of which LLaVA-OneVision has none
    }
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    return Tower(LlavaView(model, layers[-1], layers[0]), found)


def _of_qwen(model: Any, engine: str | None) -> Tower:
    no_class = f"and this model's tower, a {type(model.visual).__name__}, has no such token"
    if engine is not None:
        return _unseen(no_class, engine)
    return Tower(
        QwenView(model.visual), dict.fromkeys((obstacles.TOWER, obstacles.TILES), no_class)
    )


def _unseen(of_class: str, of_received: str | None = None) -> Tower:
    reasons = dict.fromkeys((obstacles.TOWER, obstacles.TILES), of_class)
    return Tower(None, {**reasons, obstacles.RECEIVED: of_received or of_class})


def _is_llava(model: Any) -> bool:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

    kinds = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
    return isinstance(model, kinds) or type(model) is LlavaOnevisionForConditionalGeneration


def _is_qwen(model: Any) -> bool:
    """Whether a model is one of Qwen's own; others have its towers, and do more with what these give."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_5 import (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5MoeForConditionalGeneration,
    )
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

    return type(model) in (
        *(Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration),
        *(Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration),
        *(Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration),
    )


def _intern_attention(model: Any) -> Any:
    """That of the tower's last layer in InternVL's two layouts, OpenGVLab's and transformers'; None elsewhere."""
    from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
    from vllm.model_executor.models.internvl import InternVLChatModel

    if type(model) is InternVLChatModel:
        return model.vision_model.encoder.layers[-1].attn.attn
    if type(model) is InternS1ForConditionalGeneration:
        return model.vision_tower.encoder.layer[-1].attention.attn
    return None


def _attentions(model: Any) -> list[Any]:
    """vLLM's ``MMEncoderAttention`` of each layer up to the one whose output the decoder gets; none in an unknown
    tower."""
    from vllm.model_executor.models.clip import CLIPVisionModel
    from vllm.model_executor.models.siglip import SiglipVisionModel

    if not isinstance(model.vision_tower, (CLIPVisionModel, SiglipVisionModel)):
        return []
    return [layer.self_attn.attn for layer in model.vision_tower.vision_model.encoder.layers]


def _class_reason(model: Any) -> str | None:
    """Why there is no class token to look at; its image tokens are all others, then."""
    from vllm.model_executor.models.clip import CLIPVisionModel

    if not isinstance(model.vision_tower, CLIPVisionModel):
        return f"and this model's tower, a {type(model.vision_tower).__name__}, has no such token"
    strategy = model.config.vision_feature_select_strategy
    if strategy != "default":
        return f"which with vision_feature_select_strategy {strategy!r} is one of the image's tokens itself"
    return None


def _encoder_reason(vllm_config: Any) -> str | None:
    """Why layers of a tower that can be compiled, or captured, are not called one by one."""
    compilation = vllm_config.compilation_config
    if compilation.compile_mm_encoder:
        return "and its layers are compiled (compile_mm_encoder)"
    if compilation.cudagraph_mm_encoder:
        return "and it is captured in CUDA graphs (cudagraph_mm_encoder)"
    return None


def _engine_reason(vllm_config: Any) -> str | None:
    if vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data":
        return "and workers encode different pictures (mm_encoder_tp_mode='data')"
    if vllm_config.ec_transfer_config is not None:
        return "and pictures may be encoded in another engine (ec_transfer_config)"
    return None
