"""Molmo: a picture whole and its tiles before the text, around Qwen2's language model or OLMo's.

transformers has no class for the layout: tower and pooling are drawn here under the checkpoint's names, and the
language model alone is the reference, from the embeddings that vLLM made. Such a checkpoint brings its
configuration, processor and image processor as code; these are ours, as small as vLLM allows. vLLM fixes the
tower's sizes, which are made small.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import decoders

from tests.families.making import (
    BASE,
    MAX_POSITIONS,
    WORDS,
    Checkpoint,
    drawn,
    linear,
    norm,
    text_settings,
    write_weights,
)
from tests.word_tokenizer import word_tokenizer

WIDTH, PATCH, SIDE, LAYERS, HIDDEN, FEED = 64, 14, 56, 9, 128, 256
START = "<|endoftext|>"
MARKS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")
MORE = 128
"""Rows of a second table of embeddings, for tokens that are never answered."""

TOWER = dict(
    image_default_input_size=(SIDE, SIDE),
    image_patch_size=PATCH,
    image_pos_patch_size=PATCH,
    image_emb_dim=WIDTH,
    image_num_heads=2,
    image_num_key_value_heads=2,
    image_num_layers=LAYERS,
    image_mlp_dim=2 * WIDTH,
    image_num_pos=(SIDE // PATCH) ** 2 + 1,
)
"""Layers 2 and 9 from the end are read."""

CONFIGURATION = '''
from transformers import PretrainedConfig


class MolmoConfig(PretrainedConfig):
    """Whatever is in the file."""

    model_type = "molmo"
    keys_to_ignore_at_inference = ["past_key_values"]
'''

PROCESSING = '''
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from vllm.model_executor.models.molmo import select_tiling


class MolmoImageProcessor(BaseImageProcessor):
    """Tiles that do not overlap, 4 x 4 patches each, of which 2 x 2 become a token."""

    model_input_names = ["images"]
    max_crops = 2
    overlap_margins = (0, 0)
    base_image_input_size = (56, 56)
    image_patch_size = 14
    image_token_length_w = image_token_length_h = 2

    def _patches(self, image):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        size = self.image_patch_size
        return torch.nn.functional.unfold(pixels[None], size, stride=size)[0].T

    def preprocess(self, images, **others):
        side = self.base_image_input_size[0]
        crops, places = [], []
        for image in images:
            image = image.convert("RGB")
            rows, columns = select_tiling(
                height=image.height, width=image.width, patch_size=side, max_num_patches=2
            )
            crops.append(self._patches(image.resize((side, side))))
            places.append(torch.arange(4))
            whole = image.resize((int(columns) * side, int(rows) * side))
            for row in range(rows):
                for column in range(columns):
                    left, top = side * column, side * row
                    crops.append(self._patches(whole.crop((left, top, left + side, top + side))))
                    first = 4 + 4 * row * columns + 2 * column
                    places.append(
                        torch.tensor([first, first + 1, first + 2 * columns, first + 2 * columns + 1])
                    )
        masks = torch.ones(len(crops), len(crops[0]))
        return dict(images=torch.stack(crops), image_masks=masks, image_input_idx=torch.stack(places))


class MolmoProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)

    def get_tokens_input(self, text, message_format=None, always_start_with_space=False):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def process(self, text=None, images=None, tokens=None, **others):
        start = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        found = {"input_ids": torch.tensor([start, *(tokens or ())])}
        if images is not None:
            found |= self.image_processor.preprocess(images)
        return BatchFeature(found)
'''


def _tower() -> dict[str, torch.Tensor]:
    """Tower, pooling and projector, under the names of the layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "pad_embed": (2, 2 * WIDTH),
        "image_vit.class_embedding": (WIDTH,),
        "image_vit.positional_embedding": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "image_vit.patch_embedding.weight": (WIDTH, 3 * PATCH**2),
        **norm("image_vit.pre_ln", WIDTH),
        **linear("image_projector.w1", FEED, WIDTH, bias=False),
        **linear("image_projector.w3", FEED, WIDTH, bias=False),
        **linear("image_projector.w2", HIDDEN, FEED, bias=False),
    }
    attentions = {f"image_vit.transformer.resblocks.{n}.attention": WIDTH for n in range(LAYERS)}
    for name, columns in {**attentions, "image_pooling_2d": 2 * WIDTH}.items():
        for part in ("wq", "wk", "wv"):
            shapes |= linear(f"{name}.{part}", WIDTH, columns)
        shapes |= linear(f"{name}.wo", WIDTH, WIDTH)
    for layer in range(LAYERS):
        name = f"image_vit.transformer.resblocks.{layer}."
        shapes |= linear(f"{name}feed_forward.w1", 2 * WIDTH, WIDTH)
        shapes |= linear(f"{name}feed_forward.w2", WIDTH, 2 * WIDTH)
        shapes |= norm(f"{name}attention_norm", WIDTH) | norm(f"{name}ffn_norm", WIDTH)
    return {f"model.vision_backbone.{name}": value for name, value in drawn(shapes, 3).items()}


NAMES = {
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.down_proj": "ff_out",
    "model.layers.": "model.transformer.blocks.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
}
NORMS = {
    False: {"input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"},
    True: {"post_attention_layernorm": "attn_norm", "post_feedforward_layernorm": "ff_norm"},
}
"""Whether norms come after attention and MLP -> names of the reference and of the layout."""


def as_molmo(model: Any, norm_after: bool) -> dict[str, torch.Tensor]:
    """The reference's weights in Molmo's layout: queries, keys and values in one matrix, up before gate."""
    state = model.state_dict()
    found = {}
    for name, value in state.items():
        if any(f".{part}_proj." in name for part in ("k", "v", "gate")):
            continue
        if ".q_proj." in name:
            value = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "att_proj")
        elif ".up_proj." in name:
            value = torch.cat([value, state[name.replace("up_proj", "gate_proj")]])
            name = name.replace("mlp.up_proj", "ff_proj")
        elif name == "model.embed_tokens.weight":
            found["model.transformer.wte.new_embedding"] = value[-MORE:]
            name, value = "model.transformer.wte.embedding", value[:-MORE]
        for theirs, ours in (NAMES | NORMS[norm_after]).items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def _write(made: Any, words: int, norm_after: bool, model: Any, where: Path) -> None:
    text = model.config
    weights = as_molmo(model, norm_after) | _tower()
    write_weights(weights, where / "model.safetensors")
    config = dict(
        architectures=["MolmoForCausalLM"],
        model_type="molmo",
        auto_map={"AutoConfig": "configuration_molmo.MolmoConfig"},
        vocab_size=words,
        embedding_size=words,
        hidden_size=text.hidden_size,
        intermediate_size=2 * text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        max_position_embeddings=MAX_POSITIONS,
        layer_norm_type="rms",
        layer_norm_eps=text.rms_norm_eps,
        norm_after=norm_after,
        attention_layer_norm=norm_after,
        qkv_bias=not norm_after,
        rope_theta=10000.0,
        weight_tying=False,
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    write_with_code("Molmo", made, config, (CONFIGURATION, PROCESSING), where)


def write_with_code(
    name: str, made: Any, config: dict[str, Any], code: tuple[str, str], where: Path
) -> None:
    """A checkpoint's tokenizer and configuration, with the code of configuration and processors that it brings."""
    kind = name.lower()
    configuration, processing = code
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / f"configuration_{kind}.py").write_text(configuration)
    (where / f"processing_{kind}.py").write_text(processing)
    made.save_pretrained(where)
    image = dict(
        image_processor_type=f"{name}ImageProcessor",
        processor_class=f"{name}Processor",
        auto_map={
            "AutoProcessor": f"processing_{kind}.{name}Processor",
            "AutoImageProcessor": f"processing_{kind}.{name}ImageProcessor",
        },
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def _molmo(kind: str, norm_after: bool) -> Checkpoint:
    """The picture's tokens stand in the second table of embeddings, which the output layer has no rows for."""
    known = (*BASE, START, *WORDS)
    vocab = {word: index for index, word in enumerate((*known, *MARKS))}
    made = word_tokenizer(
        vocab, (*BASE, START, *MARKS), {}, pad_token="<pad>", model_max_length=MAX_POSITIONS
    )
    # The prompt goes through the tokenizer and back, so words must stay apart.
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    settings = text_settings(vocab, vocab_size=len(known) + MORE, rms_norm_eps=1e-5)
    model = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**settings))
    model.lm_head = torch.nn.Linear(HIDDEN, len(known), bias=False)
    return Checkpoint(
        model=model,
        processor=None,
        vocab=vocab,
        image="",
        image_ids=(vocab["<im_patch>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, len(known), norm_after),
        shrunk={"molmo.VisionBackboneConfig": lambda stock: partial(stock, **TOWER)},
    )


def molmo_qwen2() -> Checkpoint:
    """Molmo-7B-D and 72B."""
    return _molmo("Qwen2", norm_after=False)


def molmo_olmo() -> Checkpoint:
    """Molmo-7B-O: norms after attention and MLP, and of queries and keys; layers without a residual."""
    return _molmo("Olmo2", norm_after=True)
