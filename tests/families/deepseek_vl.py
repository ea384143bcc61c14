"""DeepSeek-VL2, DeepSeek-OCR and DeepSeek-OCR-2: a picture whole and its tiles, around DeepSeek's language models.

Towers and projector are drawn here under the checkpoint's names, and the language model alone is the reference,
from the embeddings that vLLM made. vLLM fixes the towers and their sizes, which are made small: one linear
layer per patch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import decoders
from torch import nn

from tests.families import deepseek
from tests.families.making import Checkpoint, drawn, linear, tokenizer, write_weights

WIDTH, HIDDEN = 64, 128
MARK = "<image>"
SPECIALS = (
    MARK,
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
)


class Patches(nn.Module):
    """[N, 3, S, S] -> [N, WIDTH, S / size, S / size]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, size, size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.proj(pixels)
        return found

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, patches, WIDTH], as timm's towers do."""
        return flat(self(pixels))


class Second(nn.Module):
    """What DeepSeek-OCR's second tower makes of the first one's output, behind a token of its own."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, _: torch.Tensor, first_NWHW: torch.Tensor) -> torch.Tensor:
        rows = flat(first_NWHW) * self.scale
        return torch.cat([rows[:, :1], rows], 1)


class Third(nn.Module):
    """What DeepSeek-OCR-2's second tower makes of the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, first_NWHW: torch.Tensor) -> torch.Tensor:
        return flat(first_NWHW) * self.scale


def flat(grid_NWHW: torch.Tensor) -> torch.Tensor:
    """[N, W, h, w] -> [N, h x w, W]."""
    return grid_NWHW.flatten(2).transpose(1, 2)


def _with_tower(size: int) -> Callable[[Any], Any]:
    """Of vLLM's class: the same with a small tower, and without timm."""

    def shrink(stock: Any) -> Any:
        stock._init_vision_module = lambda *_args, **_kwargs: Patches(size)
        return stock

    return shrink


def _write(
    architecture: str,
    prefixes: tuple[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Any],
    made: Any,
    model: Any,
    where: Path,
) -> None:
    """Args:
    prefixes: before the language model's names and before the other parts'.
    """
    text, other = prefixes
    weights = {f"{text}{name}": value for name, value in deepseek.published(model).items()}
    weights |= {f"{other}{name}": value for name, value in drawn(shapes, 3).items()}
    write_weights(weights, where / "model.safetensors")
    config = dict(
        architectures=[architecture],
        model_type="deepseek_vl_v2",
        tile_tag="2D",
        global_view_pos="head",
        language_config=deepseek.settings_of(model),
        torch_dtype="float32",
        **settings,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    made.save_pretrained(where)
    processor = dict(
        processor_class="DeepseekVLV2Processor",
        candidate_resolutions=settings.get("candidate_resolutions"),
        patch_size=14,
        downsample_ratio=2,
        image_token=MARK,
        pad_token="<pad>",
    )
    (where / "processor_config.json").write_text(json.dumps(processor, indent=1))


def _checkpoint(
    model_of: Callable[[Mapping[str, int]], Any], write: Callable[..., Any], **others: Any
) -> Checkpoint:
    made, vocab = tokenizer(SPECIALS)
    # The prompt goes through the tokenizer and back, so words must stay apart.
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return Checkpoint(
        model=model_of(vocab),
        processor=None,
        vocab=vocab,
        image=MARK,
        image_ids=(vocab[MARK],),
        decoder=lambda model: model.model,
        write=partial(write, made),
        **others,
    )


def _vl2(model_of: Callable[[Mapping[str, int]], Any], **others: Any) -> Checkpoint:
    """Tiles of 56 x 56 pixels, 4 x 4 patches each, of which 2 x 2 become a token."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision.proj.weight": (WIDTH, 3, 14, 14),
        "vision.proj.bias": (WIDTH,),
        "image_newline": (HIDDEN,),
        "view_seperator": (HIDDEN,),
        **linear("projector.layers.0", HIDDEN, 4 * WIDTH),
        **linear("projector.layers.2", HIDDEN, HIDDEN),
    }
    settings = dict(
        candidate_resolutions=[[56, 56], [112, 56], [56, 112]],
        vision_config=dict(model_type="vision", image_size=56, patch_size=14, width=WIDTH),
        projector_config=dict(model_type="mlp_projector", input_dim=WIDTH, n_embed=HIDDEN),
    )
    write = partial(_write, "DeepseekVLV2ForCausalLM", ("language.", ""), shapes, settings)
    return _checkpoint(
        model_of,
        write,
        sizes=((56, 112), (56, 56)),
        shrunk={"deepseek_vl2.DeepseekVLV2ForCausalLM": _with_tower(14)},
        **others,
    )


def deepseek_vl2() -> Checkpoint:
    """DeepSeek-VL2-small and the larger one, which store latent attention."""
    return _vl2(
        lambda vocab: hf.DeepseekV2ForCausalLM(deepseek.v2(vocab)),
        options=deepseek.ON_CPU,
        latent=True,
    )


def deepseek_vl2_tiny() -> Checkpoint:
    """DeepSeek-VL2-tiny, which stores keys and values."""
    return _vl2(deepseek.Plain)


def _ocr(
    architecture: str, second: str, width: int, sizes: Any, shrunk: Mapping[str, Any]
) -> Checkpoint:
    """Tokens of 64 x 64 pixels."""
    shapes: dict[str, tuple[int, ...]] = {
        "sam_model.proj.weight": (WIDTH, 3, 64, 64),
        "sam_model.proj.bias": (WIDTH,),
        f"{second}.scale": (WIDTH,),
        "view_seperator": (HIDDEN,),
        **linear("projector.layers", HIDDEN, width),
    }
    if architecture == "DeepseekOCRForCausalLM":
        shapes["image_newline"] = (HIDDEN,)
    projector = dict(
        model_type="mlp_projector", projector_type="linear", input_dim=width, n_embed=HIDDEN
    )
    settings = dict(
        vision_config=dict(model_type="vision", image_size=256), projector_config=projector
    )
    write = partial(_write, architecture, ("", "model."), shapes, settings)
    return _checkpoint(deepseek.Plain, write, sizes=sizes, shrunk=shrunk)


def deepseek_ocr() -> Checkpoint:
    """A picture of up to 64 x 64 pixels whole, a larger one in tiles of that size, too."""
    return _ocr(
        "DeepseekOCRForCausalLM",
        "vision_model",
        2 * WIDTH,
        ((64, 128), (64, 64)),
        {
            "deepseek_ocr.IMAGE_SIZE": lambda _: 64,
            "deepseek_ocr.BASE_SIZE": lambda _: 256,
            "deepseek_ocr.build_sam_vit_b": lambda _: partial(Patches, 64),
            "deepseek_ocr.DeepCLIPVisionTransformer": lambda _: Second,
        },
    )


def deepseek_ocr2() -> Checkpoint:
    """Pictures whole."""
    return _ocr(
        "DeepseekOCR2ForCausalLM",
        "qwen2_model",
        WIDTH,
        ((60, 40), (40, 60)),
        {
            "deepseek_ocr2.IMAGE_SIZE": lambda _: 64,
            "deepseek_ocr2.BASE_SIZE": lambda _: 256,
            "deepseek_ocr2.ImageEncoderViT": lambda _: lambda **_others: Patches(64),
            "deepseek_ocr2.build_qwen2_decoder_as_encoder": lambda _: Third,
        },
    )
