"""Puts a Shikra checkpoint together: python -m vllm_flow.models.shikra_convert --help.

What is published is a *delta*: each weight of Shikra less LLaMA-7B's of the same name, and whole what
LLaMA lacks (the projector, rows of further tokens). The CLIP tower is not in it, since it was
frozen. All three are folders in transformers' layout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_flow.exits import Refused, run_module
from vllm_flow.outputs import check_folder

PROJECTOR = "model.mm_projector."
TOKENS = {"image": "<im_patch>", "start": "<im_start>", "end": "<im_end>"}


def added(delta: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """A weight of Shikra from its delta and LLaMA's; where LLaMA has fewer rows, the rest is whole.

    Raises:
        ValueError: the shapes do not fit, so the base is another model's.
    """
    if base is None:
        return delta
    if base.shape[1:] != delta.shape[1:] or base.shape[0] > delta.shape[0]:
        raise ValueError(f"a delta of shape {tuple(delta.shape)} for {tuple(base.shape)}")
    found = delta.clone()
    found[: base.shape[0]] += base.to(delta.dtype)
    return found


def converted_name(name: str) -> str:
    """A name in Shikra's checkpoint -> in the hub's LLaVA layout."""
    if name.startswith(PROJECTOR):
        return "multi_modal_projector.linear." + name.removeprefix(PROJECTOR)
    return f"language_model.{name}"


def weights_of(delta: Path, base: Path, tower: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the whole checkpoint, one at a time.

    Raises:
        ValueError: a weight of the delta does not fit the base.
    """
    base_weights = dict(_read(base))
    for name, value in _read(delta):
        if name.startswith("model.vision_tower") or name.endswith("rotary_emb.inv_freq"):
            continue
        try:
            yield converted_name(name), added(value, base_weights.pop(name, None))
        except ValueError as error:
            raise ValueError(
                f"{name}: {error}; is {base} the LLaMA that Shikra began with?"
            ) from None
    for name, value in _read(tower):
        if name.startswith("vision_model.") and not name.endswith("position_ids"):
            yield f"vision_tower.{name}", value


def config_of(shikra: dict[str, Any], tower: dict[str, Any], image_token: int) -> dict[str, Any]:
    """``config.json`` of the whole checkpoint, from Shikra's and CLIP's."""
    of_tower = ("mm_", "use_mm", "tune_mm", "vision_", "architectures", "model_type", "freeze")
    text = {name: value for name, value in shikra.items() if not name.startswith(of_tower)}
    vision = tower.get("vision_config", tower)
    return {
        "architectures": ["ShikraForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**text, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "image_token_index": image_token,
        "vision_feature_layer": shikra.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "tie_word_embeddings": False,
        "torch_dtype": shikra.get("torch_dtype", "float16"),
    }


def convert(delta: Path, base: Path, tower: Path, out: Path) -> None:
    """Write the whole checkpoint, processor and tokenizer included, to ``out``.

    Raises:
        ValueError: a folder lacks its files, the delta's tokenizer Shikra's tokens, or its weights do not fit
            the base.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    for where in (delta, tower):
        if not (where / "config.json").is_file():
            raise ValueError(f"{where}: there is no config.json in this folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(delta)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"the tokenizer in {delta} cannot be read: {error}") from error
    known = tokenizer.get_vocab()
    missing = [token for token in TOKENS.values() if token not in known]
    if missing:
        raise ValueError(f"the tokenizer in {delta} lacks {', '.join(missing)}; is it Shikra's?")
    read = [json.loads((where / "config.json").read_text()) for where in (delta, tower)]
    config = config_of(*read, known[TOKENS["image"]])
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in weights_of(delta, base, tower)}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))
    LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(tower),
        tokenizer=tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy="default",
        image_token=TOKENS["image"],
        num_additional_image_tokens=1,
    ).save_pretrained(out)


def _read(where: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a folder, of either file format, one file after the other."""
    from safetensors.torch import load_file

    files = sorted(where.glob("*.safetensors"))
    if files:
        for file in files:
            yield from load_file(file).items()
        return
    files = sorted(where.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{where} holds neither *.safetensors nor pytorch_model*.bin")
    for file in files:
        yield from torch.load(file, map_location="cpu", weights_only=True).items()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.models.shikra_convert", description=__doc__
    )
    for name, text in (
        ("delta", "the published delta of Shikra"),
        ("base", "LLaMA-7B, as the delta's authors had it"),
        ("tower", "openai/clip-vit-large-patch14"),
        ("out", "where the whole checkpoint goes"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    args = parser.parse_args(argv)
    check_folder(args.out)
    try:
        convert(args.delta, args.base, args.tower, args.out)
    except ValueError as error:
        raise Refused(str(error)) from error
    return 0


if __name__ == "__main__":
    run_module("vllm_flow.models.shikra_convert", main)
