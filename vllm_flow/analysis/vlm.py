"""A Hugging Face vision-language model as the analysis sees it: its layers, one prompt with one picture.

Knows transformers; nothing of CAMs, attention or figures. How a picture becomes image tokens is
`seen_kinds.py`'s; models that it does not know are refused by name.

Shapes: B copies, T prompt tokens (image placeholders expanded), A answer tokens, P image tokens,
H x W pixels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vllm_flow.analysis.maps import check_box
from vllm_flow.analysis.seen_kinds import Unsupported, check_architecture, check_config, see
from vllm_flow.analysis.seen_picture import Part, SeenPicture
from vllm_flow.counts import counted
from vllm_flow.demo_model.naming import resolve_model
from vllm_flow.pictures import as_rgb

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs with a value per token, 0 for text."""


@dataclass(frozen=True)
class Encoded:
    """A prompt with one picture, as the model sees it."""

    ids_T: torch.Tensor
    """int64; every image placeholder expanded, so an index is a row of the decoder."""
    is_image_T: torch.Tensor
    """bool; markers around and within a picture that are tokens of their own are text."""
    picture: SeenPicture
    types: Mapping[str, torch.Tensor]
    """Inputs [1, T] of `TYPES`, where the model takes them."""

    @property
    def image_P(self) -> torch.Tensor:
        """The rows of the image tokens, in order."""
        return self.is_image_T.nonzero()[:, 0]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The picture's views with a grid, the finest first; `Unsupported` where there is none."""
        if not self.picture.parts:
            raise Unsupported(self.picture.placeless)
        return self.picture.parts


class Vlm:
    """A loaded model and its processor. Parameters take no gradients; dropout is off."""

    def __init__(self, model: Any, processor: Any, name: str = "") -> None:
        check_config(model.config)
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name

    @classmethod
    def load(
        cls, name: str, dtype: str = "float32", device: str = "cpu", attention: str | None = None
    ) -> Vlm:
        """Load a folder, a hub name, or the demo model (`demo`).

        `attention` is transformers' implementation; `eager` is the one that returns attention maps.
        """
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            AutoProcessor,
            PretrainedConfig,
        )

        path = resolve_model(name)
        # Before the configuration is made of it: for some, that is code beside the checkpoint.
        read, _ = PretrainedConfig.get_config_dict(path)
        check_architecture((read.get("architectures") or ["a model without architectures"])[0])
        check_config(AutoConfig.from_pretrained(path))
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        return cls(model.to(device), AutoProcessor.from_pretrained(path), name)

    @property
    def decoder(self) -> Any:
        """Transformers' language model, without its head."""
        return self.model.get_decoder()

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        """The decoder layers, in order."""
        layers: Sequence[torch.nn.Module] = self.decoder.layers
        return layers

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
        """Tokenise and preprocess; `Unsupported` unless the picture becomes the tokens that it should."""
        token = self.processor.image_token
        if prompt.count(token) != 1:
            raise Unsupported(
                f"the prompt names {token} {counted(prompt.count(token), 'time')}: name it exactly once, where "
                "the picture goes"
            )
        batch = self._processed(prompt, image)
        ids_T = batch["input_ids"][0]
        return Encoded(
            ids_T,
            ids_T == self.model.config.image_token_id,
            self._seen(batch, image),
            {name: batch[name] for name in TYPES if name in batch},
        )

    def _processed(self, prompt: str, image: Image.Image, **options: Any) -> Mapping[str, Any]:
        try:
            batch: Mapping[str, Any] = self.processor(
                text=prompt, images=as_rgb(image), return_tensors="pt", **options
            )
        # Foreign code, set up by foreign files: a missing patch size is a TypeError to it.
        except Exception as error:
            raise Unsupported(
                f"the processor of {self.name or 'this model'} cannot take this ({error!r})"
            ) from error
        return batch

    def _seen(self, batch: Mapping[str, Any], image: Image.Image) -> SeenPicture:
        pixels = batch["pixel_values"].to(self.model.dtype)
        size = (image.height, image.width)
        return see(self.model.config, self.processor, {**batch, "pixel_values": pixels}, size)

    def forward(
        self,
        encoded: Encoded,
        answer: Sequence[int],
        pixels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The model's output for the prompt with `answer` after it.

        Args:
            pixels: [B, ...] copies of the picture's pixels, each with a prompt of its own; None: the
                picture as it is, B = 1.
        """
        copies = encoded.picture.pixels[None] if pixels is None else pixels
        count, length = len(copies), len(answer)
        tail = torch.tensor(list(answer), dtype=encoded.ids_T.dtype)
        types = {
            name: torch.cat([value, value.new_zeros(1, length)], 1).expand(count, -1)
            for name, value in encoded.types.items()
        }
        inputs = {
            "input_ids": torch.cat([encoded.ids_T, tail])[None].expand(count, -1),
            **encoded.picture.inputs(copies),
            **types,
        }
        placed = {name: value.to(self.device) for name, value in inputs.items()}
        return self.model(**placed, use_cache=False, **options)

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
        ids = encoded.ids_T[None]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **encoded.picture.inputs(encoded.picture.pixels[None]),
            **encoded.types,
        }
        out = self.model.generate(
            **{name: value.to(self.device) for name, value in inputs.items()},
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

    def views(self, encoded: Encoded) -> list[Image.Image]:
        """What the model sees of the picture, per part: resized and cropped, the normalisation undone."""
        side = self.processor.image_processor
        mean, std = np.array(side.image_mean), np.array(side.image_std)
        found = []
        for view in encoded.picture.views(encoded.picture.pixels):
            pixels = view.float().permute(1, 2, 0).numpy() * std + mean
            found.append(Image.fromarray(np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)))
        return found

    def box_in_views(
        self, box: tuple[float, float, float, float], image: Image.Image
    ) -> list[NDArray[np.float64]]:
        """A box in the picture's own pixels as a mask [H, W] of what the model sees in each part, 1 inside.

        The box is drawn and goes through the model's own preprocessing, whatever that is.
        ValueError where it is not inside the picture or nothing of it is left after cropping.
        """
        left, top, right, bottom = box
        check_box(box, image.size)
        mask = Image.new("RGB", image.size)
        x, y = round(left), round(top)
        corners = (x, y, max(x, round(right) - 1), max(y, round(bottom) - 1))  # one pixel at least
        ImageDraw.Draw(mask).rectangle(corners, fill=(255, 255, 255))
        batch = self._processed(self.processor.image_token, mask, do_normalize=False)
        picture = see(self.model.config, self.processor, batch, (mask.height, mask.width))
        found: list[NDArray[np.float64]] = [
            view[0].double().clamp(0, 1).numpy() for view in picture.views(picture.pixels)
        ]
        if not any((channel > 0.5).any() for channel in found):
            raise ValueError("nothing of the box is left in the part of the picture the model sees")
        return found


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
