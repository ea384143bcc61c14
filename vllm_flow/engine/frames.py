"""How many frames a video was encoded in, for ranks that choose among them.

Seam: the loaded model's ``embed_multimodal``. Its arguments say the number of frames, which is kept as an attribute of
the tensors that it returns, as scores of the vision tower are (`worker/tower/scores`): it goes when they go. In Qwen's
line a frame is two of the video's own frames, which the tower sees together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_flow.engine import obstacles

logger = init_logger("vllm.vllm_flow.frames")

FIELD = "flow_frames"
"""Of an encoded video."""
GRIDS, COUNTS, PIXELS = "video_grid_thw", "video_num_patches", "pixel_values_videos"
"""What says it: Qwen's line, InternVL, and LLaVA's, whose pixels are a video's frames."""
KNOWN = "LLaVA-OneVision, LLaVA-NeXT-Video, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5"


def there(item: Mapping[str, Any]) -> bool:
    """Whether what a model is called with, or a request's item of it, says how many frames there are."""
    return any(name in item for name in (GRIDS, COUNTS, PIXELS))


def counts(videos: Mapping[str, Any]) -> list[int]:
    """Frames of each video of a call, in their order."""
    if GRIDS in videos:
        return [int(grid[0]) for grid in videos[GRIDS]]
    if COUNTS in videos:
        return [int(count) for count in videos[COUNTS]]
    return [len(video) for video in videos[PIXELS]]


def noted(encoded: Any, videos: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """What videos were encoded to, each with its number of frames."""
    found = tuple(encoded)
    for video, frames in zip(found, counts(videos), strict=True):
        setattr(video, FIELD, frames)
    return found


def frame_of_tokens(encoded: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens] frame of each token of a video, -1 of those behind the last frame.

    The front end refuses ranks by frames where a video does not say how many it has. But clients may name their
    videos, and one may have sent other embeddings under the name of another's: then all is one frame.
    """
    frames = getattr(encoded, FIELD, 0)
    if not frames:
        logger.warning_once(
            "A video is to be ranked frame by frame that came under the same name before without saying how many it "
            "has: it is ranked as one frame. Give every video a name (uuid) of its own, or none."
        )
    each = tokens // max(1, frames)
    frame_N = torch.arange(tokens, device=encoded.device) // each
    return frame_N.masked_fill(frame_N >= max(1, frames), -1)


def unknown(model: Any, vllm_config: Any) -> dict[str, str]:
    """Why nobody knows of a video's frames in an engine: obstacle -> reason; empty where they are known."""
    config = vllm_config.model_config
    if type(model) not in _known():
        reason = f"which are known of {KNOWN}, and not of {config.architecture}"
    elif vllm_config.ec_transfer_config is not None:
        reason = "and videos may be encoded in another engine (ec_transfer_config)"
    else:
        return {}
    return {obstacles.FRAMES: reason}


def _known() -> Iterator[type[Any]]:
    from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
    from vllm.model_executor.models.internvl import InternVLChatModel
    from vllm.model_executor.models.llava_next_video import LlavaNextVideoForConditionalGeneration
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_5 import (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5MoeForConditionalGeneration,
    )
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

    yield from (InternVLChatModel, InternS1ForConditionalGeneration)
    yield from (LlavaOnevisionForConditionalGeneration, LlavaNextVideoForConditionalGeneration)
    yield from (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration)
    yield from (Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration)
    yield from (Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration)
