"""What is profiled: a model's shape, and what one picture of the requests is to it.

A LLaVA of one square grid is read from its config. Of any other family the extension knows, vLLM's own
processor is asked what a picture of the requests' size becomes; its vision tower is not counted. Loads no
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flow.counts import counted
from vllm_flow.model_names import why_unread
from vllm_flow.profile.dimensions import ModelShape

PICTURE = (640, 480)
"""Width and height of a request's pictures, where neither the model nor the user says: what COCO's mostly are."""


@dataclass(frozen=True)
class Subject:
    """A model, and one picture of its requests."""

    shape: ModelShape
    picture: tuple[int, int]
    """Width and height in pixels."""
    image_tokens: int
    """Tokens of one picture, which a policy can evict."""

    def images_of(self, tokens: int) -> int:
        """How many pictures have so many tokens.

        Raises:
            ValueError: no whole number of pictures has.
        """
        if tokens % self.image_tokens:
            raise ValueError(
                f"{counted(tokens, 'image token')}: one image has {self.image_tokens}; use a multiple."
            )
        return tokens // self.image_tokens


def subject_of(
    model: str,
    dtype: str,
    picture: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Look at a model.

    Args:
        model: a folder, or a name of the hub.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        picture: the requests' pictures, (width, height); None: as the model's tower takes them, or
            :data:`PICTURE`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: there is no such model, or it cannot be profiled; names the reason.
    """
    from transformers import AutoConfig, PreTrainedConfig

    from vllm_flow.profile.shape import shape_of

    try:
        told, _ = PreTrainedConfig.get_config_dict(model)
        tower = told.get("vision_config") or {}
        if told.get("model_type") == "llava" and tower.get("model_type") != "pixtral":
            config = AutoConfig.from_pretrained(model)
            shape, side = shape_of(config, dtype), config.vision_config.image_size
            assert shape.tower is not None
            return Subject(shape, picture or (side, side), shape.tower.tokens)
    # Of foreign files, which may lack anything or hold it in any type.
    except Exception as error:
        raise ValueError(f"no model at {model!r}: {why_unread(model, error)}") from error
    return _as_vllm_sees_it(model, dtype, picture or PICTURE, trust_remote_code)


def _as_vllm_sees_it(
    model: str, dtype: str, picture: tuple[int, int], trust_remote_code: bool
) -> Subject:
    from vllm_flow.engine import families
    from vllm_flow.profile.picture_cost import decoder_shape, picture_tokens, read_config, uncounted

    config = read_config(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if not config.is_multimodal_model:
        raise ValueError(f"{model} takes no pictures; profile a vision-language model.")
    families.check_supported(config)
    shape = decoder_shape(config)
    if shape is None:
        raise ValueError(f"{model} {uncounted(config)}.")
    return Subject(shape, picture, picture_tokens(config, *picture).evicted)
