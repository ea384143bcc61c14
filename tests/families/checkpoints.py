"""Every tiny checkpoint by name; ``vllm_flow/engine/families/known.py`` names them in its rows."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.families import (
    aria,
    backend_kin,
    blip,
    cohere,
    cohere_compass,
    cosmos,
    cosmos_edge,
    deepseek_vl,
    dots,
    ernie,
    exaone,
    gemma,
    gemma4,
    glm,
    glm4v,
    granite,
    idefics,
    intern_s1_pro,
    intern_s2,
    internvl,
    internvl_chat,
    internvl_kin,
    isaac,
    kanana,
    keye,
    kimi,
    lfm2,
    llama4,
    llava,
    llava_kin,
    llava_onevision2,
    mimo,
    minicpm,
    minicpm_qwen3_5,
    mistral_format,
    molmo,
    molmo2,
    muse,
    nemotron_h,
    omni,
    opencua,
    openvla,
    ovis,
    paddle,
    pangu,
    paper,
    phi,
    phi4_siglip,
    qwen,
    qwen_vl,
    step,
    step3,
    step3_7,
)
from tests.families.making import Checkpoint, save


def _backend(builder: Callable[[], Checkpoint]) -> Callable[[], Checkpoint]:
    """The same checkpoint in vLLM's Transformers modelling backend."""

    def build_for_backend() -> Checkpoint:
        made = builder()
        return replace(made, options={**made.options, "model_impl": "transformers"})

    return build_for_backend


def _film(
    builder: Callable[[], Checkpoint], mark: str, token: str, together: int = 1
) -> Callable[[], Checkpoint]:
    """The same checkpoint asked about videos, from vLLM's embeddings on.

    transformers' processor normalises a video's pixels, vLLM's does so in the tower, and the two
    towers are not compared here.
    """

    def build_for_film() -> Checkpoint:
        made = builder()
        saved = made.processor
        ids = (*made.image_ids, made.vocab[token])
        return replace(
            made, processor=None, saved=saved, video=mark, image_ids=ids, seen_together=together
        )

    return build_for_film


BUILDERS: dict[str, Callable[[], Checkpoint]] = {
    "llava": llava.llava,
    "llava_next": llava.llava_next,
    "llava_next_video": llava_kin.llava_next_video,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "opencua": opencua.opencua,
    "qwen3_vl": qwen.qwen3_vl,
    "qwen3_vl_moe": qwen.qwen3_vl_moe,
    "cosmos3": cosmos.cosmos3,
    "cosmos3_edge": cosmos_edge.cosmos3_edge,
    "qwen3_5": qwen.qwen3_5,
    "qwen3_5_moe": qwen.qwen3_5_moe,
    "interns1_pro": intern_s1_pro.interns1_pro,
    "interns2_preview": intern_s2.interns2_preview,
    "interns2_mobius": intern_s2.interns2_mobius,
    "lfm2_vl": lfm2.lfm2_vl,
    "nemotron_nano_v2_vl": nemotron_h.nemotron_nano_v2_vl,
    "nemotron_3_omni": nemotron_h.nemotron_3_omni,
    "qwen2_5_omni": omni.qwen2_5_omni,
    "qwen3_omni": omni.qwen3_omni,
    "internvl": internvl.internvl,
    "internvl_qwen3": internvl.internvl_qwen3,
    "internvl_chat_qwen2": internvl_chat.internvl_chat_qwen2,
    "internvl_chat_qwen3": internvl_chat.internvl_chat_qwen3,
    "internvl_chat_llama": internvl_chat.internvl_chat_llama,
    "internvl_chat_internlm2": internvl_chat.internvl_chat_internlm2,
    "h2ovl": internvl_kin.h2ovl,
    "nvlm_d": internvl_kin.nvlm_d,
    "nemotron_nano_vl": internvl_kin.nemotron_nano_vl,
    "llava_onevision": llava.llava_onevision,
    "llava_onevision2": llava_onevision2.llava_onevision2,
    "mistral3": llava.mistral3,
    "pixtral": llava.pixtral,
    "idefics3": idefics.idefics3,
    "smolvlm": idefics.smolvlm,
    "glm4_1v": glm.glm4_1v,
    "glm4_5v": glm.glm4_5v,
    "glm4v": glm4v.glm4v,
    "mimo_v2_omni": mimo.mimo_v2_omni,
    "mimo_v2_omni_narrow": mimo.mimo_v2_omni_narrow,
    "minicpm_v_2_6": minicpm.minicpm_v_2_6,
    "minicpm_v_4_0": minicpm.minicpm_v_4_0,
    "minicpm_v_4_5": minicpm.minicpm_v_4_5,
    "minicpm_o_2_6": minicpm.minicpm_o_2_6,
    "minicpm_o_4_5": minicpm.minicpm_o_4_5,
    "minicpm_v_4_6": minicpm_qwen3_5.minicpm_v_4_6,
    "minicpm_v_4_7": minicpm_qwen3_5.minicpm_v_4_7,
    "molmo_qwen2": molmo.molmo_qwen2,
    "molmo_olmo": molmo.molmo_olmo,
    "molmo2_qwen3": molmo2.molmo2_qwen3,
    "molmo2_olmo3": molmo2.molmo2_olmo3,
    "molmo2_video": molmo2.molmo2_video,
    "muse_glimmer": muse.muse_glimmer,
    "ovis1_6": ovis.ovis1_6,
    "ovis2": ovis.ovis2,
    "ovis2_5": ovis.ovis2_5,
    "ovis2_6_moe": ovis.ovis2_6_moe,
    "phi3v": phi.phi3v,
    "phi4mm": phi.phi4mm,
    "phi4_reasoning_vision": phi4_siglip.phi4_reasoning_vision,
    "aria": aria.aria,
    "cohere2_vision": cohere.cohere2_vision,
    "cohere_compass": cohere_compass.cohere_compass,
    "gemma3": gemma.gemma3,
    "gemma4": gemma4.gemma4,
    "gemma4_moe": gemma4.gemma4_moe,
    "gemma4_unified": gemma4.gemma4_unified,
    "dots_ocr": dots.dots_ocr,
    "ernie4_5_vl": ernie.ernie4_5_vl,
    "exaone4_5": exaone.exaone4_5,
    "granite4_vision": granite.granite4_vision,
    "lighton_ocr": llava.lighton_ocr,
    "glm_ocr": glm.glm_ocr,
    "paddleocr_vl": paddle.paddleocr_vl,
    "skywork_r1v": internvl_chat.skywork_r1v,
    "eagle2_5": internvl_chat.eagle2_5,
    "qianfan_ocr": internvl_chat.qianfan_ocr,
    "step3_vl": step.step3_vl,
    "step3": step3.step3_321b,
    "step3_7": step3_7.step3_7,
    "pixtral_mistral": mistral_format.pixtral_mistral,
    "isaac": isaac.isaac,
    "llama4": llama4.llama4,
    "keye_vl": keye.keye_vl,
    "keye_vl_1_5": keye.keye_vl_1_5,
    "r_4b": llava_kin.r_4b,
    "bee": llava_kin.bee,
    "kimi_vl": kimi.kimi_vl,
    "kimi_k2_5": kimi.kimi_k2_5,
    "deepseek_vl2": deepseek_vl.deepseek_vl2,
    "deepseek_vl2_tiny": deepseek_vl.deepseek_vl2_tiny,
    "deepseek_ocr": deepseek_vl.deepseek_ocr,
    "deepseek_ocr2": deepseek_vl.deepseek_ocr2,
    "openpangu_vl": pangu.openpangu_vl,
    "openvla": openvla.openvla,
    "kanana_v": kanana.kanana_v,
    "blip2": blip.blip2,
    "instructblip": paper.instructblip,
    "shikra": paper.shikra,
    "qwen_vl": qwen_vl.qwen_vl,
    "qwen2_vl_video": _film(qwen.qwen2_vl, qwen.VIDEO, "<|video_pad|>", 2),
    "qwen2_5_vl_video": _film(qwen.qwen2_5_vl, qwen.VIDEO, "<|video_pad|>", 2),
    "qwen3_vl_video": _film(qwen.qwen3_vl, qwen.VIDEO, "<|video_pad|>", 2),
    "qwen3_5_video": _film(qwen.qwen3_5, qwen.VIDEO, "<|video_pad|>", 2),
    "internvl_video": _film(internvl.internvl, "<video>", "<video>"),
    "llava_onevision_video": _film(llava.llava_onevision, "<video>", "<video>"),
    # Last: the backend decorates transformers' classes for the rest of the process.
    "internvl_backend": _backend(internvl.internvl),
    "idefics3_backend": _backend(idefics.idefics3),
    "hunyuan_vl": backend_kin.hunyuan_vl,
    "hyperclovax_vision": backend_kin.hyperclovax_vision,
    "aya_vision": backend_kin.aya_vision,
    "qwen2_vl_backend": _backend(qwen.qwen2_vl),
    "glm4_5v_backend": _backend(glm.glm4_5v),
}


CHOICE = "VLLM_FLOW_FAMILIES"


def chosen() -> tuple[str, ...]:
    """The checkpoints that the environment asks for, "all" or names with commas between them; none where it does not.

    Raises:
        pytest.UsageError: a name that is none.
    """
    choice = os.environ.get(CHOICE, "")
    names = tuple(BUILDERS) if choice == "all" else tuple(filter(None, choice.split(",")))
    for name in names:
        if name not in BUILDERS:
            close = difflib.get_close_matches(name, BUILDERS, n=1)
            raise pytest.UsageError(
                f"{CHOICE}: {name!r} is no checkpoint; "
                + (
                    f"did you mean {close[0]!r}?"
                    if close
                    else "python -m tests.families lists them."
                )
            )
    return names


def build(name: str, root: Path) -> Checkpoint:
    """Build a checkpoint under ``root``; equal names have equal weights."""
    with _quiet():
        return save(BUILDERS[name](), root / name)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws progress bars for weights of a few hundred kilobytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    yield
