"""A Hugging Face LLaVA as the analysis sees it: its layers, its grid, one prompt with one picture.

Knows transformers; nothing of CAMs, attention or figures. Models whose image tokens are not one
square grid of patches are refused by name.

Shapes: T prompt tokens (image placeholders expanded), P image tokens, H x W pixels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vllm_flow.analysis.maps import check_box
from vllm_flow.engine.families.known import family_of
from vllm_flow.pictures import as_rgb

ARCHITECTURE = "LlavaForConditionalGeneration"
DECODERS = ("llama", "mistral", "qwen2")
TOWERS = ("clip_vision_model", "siglip_vision_model")
DEMO = "demo"
"""Stands for the embedded demo model wherever a model is named."""


class Unsupported(ValueError):
    """The model or the request is outside what the analysis does; the text says what is inside."""


@dataclass(frozen=True)
class Encoded:
    """A prompt with one picture, as the model sees it."""

    ids_T: torch.Tensor
    """int64; every image placeholder expanded, so an index is a row of the decoder."""
    is_image_T: torch.Tensor
    """bool."""
    pixels_CHW: torch.Tensor
    """Preprocessed: resized, cropped, normalised."""

    @property
    def image(self) -> slice:
        """Where the image tokens are: one contiguous span."""
        at = self.is_image_T.nonzero()[:, 0]
        return slice(int(at[0]), int(at[-1]) + 1)


def check_config(config: Any) -> None:
    """Raise `Unsupported` unless the analysis knows this architecture."""
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if name != ARCHITECTURE:
        known = family_of(name)
        family = f"{known.name} evicts, but {name} is" if known else f"{name} is"
        raise Unsupported(
            f"{family} not supported here: the analysis reads {ARCHITECTURE} (LLaVA-1.5 and kin), whose "
            "image tokens are one grid of patches"
        )
    decoder, tower = config.text_config.model_type, config.vision_config.model_type
    if decoder not in DECODERS:
        raise Unsupported(
            f"LLaVA with a {decoder} decoder is not supported: use one with {', '.join(DECODERS)}"
        )
    if tower not in TOWERS:
        raise Unsupported(
            f"LLaVA with a {tower} tower is not supported: use one with {', '.join(TOWERS)}"
        )


class Llava:
    """A loaded model and its processor. Parameters take no gradients; dropout is off."""

    def __init__(self, model: Any, processor: Any, name: str = "") -> None:
        check_config(model.config)
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name

    @classmethod
    def load(
        cls, name: str, dtype: str = "float32", device: str = "cpu", attention: str | None = None
    ) -> Llava:
        """Load a folder, a hub name, or the demo model (`demo`).

        `attention` is transformers' implementation; `eager` is the one that returns attention maps.
        """
        from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

        from vllm_flow.models import register_with_transformers

        register_with_transformers()  # so that such a model is refused by name
        path = name
        if name == DEMO:
            from vllm_flow.demo_model.assemble import assemble

            path = str(assemble())
        check_config(AutoConfig.from_pretrained(path))
        model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        return cls(model.to(device), AutoProcessor.from_pretrained(path), name)

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        """The decoder layers, in order."""
        return self.model.model.language_model.layers

    @property
    def grid(self) -> int:
        """Patches per side of the picture; `Unsupported` where image tokens are not that grid."""
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        extra = (
            config.vision_config.model_type == "clip_vision_model"
            and config.vision_feature_select_strategy == "full"
        )
        if extra:
            raise Unsupported(
                "this model keeps the tower's class token among its image tokens, so they are no "
                "grid; use a checkpoint with vision_feature_select_strategy 'default'"
            )
        return side

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prompt(self, text: str) -> str:
        """`text` in the model's conversation format, or unchanged where it names the image token."""
        if self.processor.image_token in text:
            return text
        content = [{"type": "image"}, {"type": "text", "text": text}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except ValueError:
            raise Unsupported(
                f"{self.name or 'this model'} has no chat template: give the whole prompt, with "
                f"{self.processor.image_token} where the picture goes"
            ) from None

    def encode(self, prompt: str, image: Image.Image) -> Encoded:
        """Tokenise and preprocess; `Unsupported` unless the picture is one span of grid x grid tokens."""
        token = self.processor.image_token
        if prompt.count(token) != 1:
            raise Unsupported(
                f"the prompt names {token} {prompt.count(token)} times: name it exactly once, where "
                "the picture goes"
            )
        try:
            batch = self.processor(text=prompt, images=as_rgb(image), return_tensors="pt")
        # Foreign code, set up by foreign files: a missing patch size is a TypeError to it.
        except Exception as error:
            raise Unsupported(
                f"the processor of {self.name or 'this model'} cannot take this ({error!r})"
            ) from error
        ids_T = batch["input_ids"][0]
        encoded = Encoded(
            ids_T,
            ids_T == self.model.config.image_token_id,
            batch["pixel_values"][0].to(self.model.dtype),
        )
        count = int(encoded.is_image_T.sum())
        if count != self.grid**2 or encoded.image.stop - encoded.image.start != count:
            raise Unsupported(
                f"the picture became {count} image tokens, not {self.grid} x {self.grid} in a row: "
                "the processor and the model's tower do not belong together"
            )
        return encoded

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """The token ids of `answer` as they follow the prompt.

        Tokenised together with it, since some tokenizers treat the start of a text specially.
        """
        tokenizer = self.processor.tokenizer
        head = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + answer)["input_ids"]
        if whole[: len(head)] != head:  # the answer's first letters merged with the prompt's last
            whole = head + tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = whole[len(head) :]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            raise ValueError("the answer is empty: give some text, or none for the model's own")
        return ids

    @torch.inference_mode()
    def generate(self, encoded: Encoded, max_tokens: int = 32) -> list[int]:
        """The model's greedy answer, without the token that ends it."""
        ids = encoded.ids_T[None].to(self.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=encoded.pixels_CHW[None].to(self.device),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        tokens = out[0, ids.shape[1] :].tolist()
        special = set(self.processor.tokenizer.all_special_ids)
        while tokens and tokens[-1] in special:
            tokens.pop()
        return tokens

    def words(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, the space before it kept."""
        tokenizer = self.processor.tokenizer
        texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
        return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]

    def view(self, encoded: Encoded) -> Image.Image:
        """What the model sees of the picture: resized and cropped, the normalisation undone."""
        side = self.processor.image_processor
        mean, std = np.array(side.image_mean), np.array(side.image_std)
        pixels = encoded.pixels_CHW.float().permute(1, 2, 0).numpy() * std + mean
        return Image.fromarray(np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8))

    def box_in_view(
        self, box: tuple[float, float, float, float], image: Image.Image
    ) -> NDArray[np.float64]:
        """A box in the picture's own pixels as a mask [H, W] of what the model sees, 1 inside.

        The box is drawn and goes through the model's own preprocessing, whatever that is.
        ValueError where it is not inside the picture or nothing of it is left after cropping.
        """
        left, top, right, bottom = box
        check_box(box, image.size)
        mask = Image.new("RGB", image.size)
        x, y = round(left), round(top)
        corners = (x, y, max(x, round(right) - 1), max(y, round(bottom) - 1))  # one pixel at least
        ImageDraw.Draw(mask).rectangle(corners, fill=(255, 255, 255))
        pixels = self.processor.image_processor(mask, do_normalize=False, return_tensors="pt")
        channel: NDArray[np.float64] = pixels["pixel_values"][0, 0].double().clamp(0, 1).numpy()
        if not (channel > 0.5).any():
            raise ValueError("nothing of the box is left in the part of the picture the model sees")
        return channel

    def coverage(
        self, box: tuple[float, float, float, float], image: Image.Image
    ) -> NDArray[np.float64]:
        """Share of each patch, [grid, grid], that a box in the picture's own pixels covers."""
        mask = self.box_in_view(box, image)
        side = mask.shape[0] // self.grid
        used = mask[: side * self.grid, : side * self.grid]
        shares: NDArray[np.float64] = used.reshape(self.grid, side, self.grid, side).mean((1, 3))
        return shares


def tokens_of(words: Sequence[str], wanted: str) -> list[int]:
    """Indices of the tokens that spell the first whole-word occurrence of `wanted`, case ignored.

    ValueError where the answer does not contain it.
    """
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", "".join(words), re.IGNORECASE)
    if found is None:
        raise ValueError(f"the answer {''.join(words)!r} does not contain the word {wanted!r}")
    ends = list(itertools.accumulate(map(len, words)))
    starts = [0, *ends[:-1]]
    return [
        token
        for token, (start, end) in enumerate(zip(starts, ends, strict=True))
        if start < found.end() and end > found.start()
    ]
