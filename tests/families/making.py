"""What the tiny checkpoints of all families share: vocabulary, random weights, pictures, saving.

Each is built offline from its family's real configuration, model and processor classes. Weights are
drawn at a gain relative to their fan-in, not at transformers' 0.02, where attention is uniform and an
image hardly matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.word_tokenizer import word_tokenizer

BASE = ("<unk>", "<s>", "</s>", "<pad>")
WORDS = tuple(f"w{i}" for i in range(120))
MAX_POSITIONS = 2048
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "c_attn": 1.5, "lm_head": 4.0, "embed_tokens": 1.0}


@dataclass(frozen=True)
class Checkpoint:
    """A tiny model on disk, and Hugging Face's own in memory."""

    model: nn.Module
    """Float32, eager attention, with the weights that are on disk."""
    processor: Any
    """Transformers' processor; None where it has no tower for the family (``model`` is the language
    model alone then) or prepares its input otherwise: the reference begins at the embeddings that
    vLLM made."""
    vocab: Mapping[str, int]
    image: str
    """What stands for a picture in a prompt."""
    image_ids: tuple[int, ...]
    """Token ids that are a picture's, as the processor writes them."""
    sizes: tuple[tuple[int, int], tuple[int, int]]
    """Heights and widths of the pictures asked about: the second prompt's second one differs."""
    decoder: Callable[[Any], nn.Module]
    """Where transformers keeps the module with ``layers``."""
    where: Path = Path()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``LLM`` that the family needs."""
    unused: Sequence[str] = ()
    """Outputs of the processor that are not for the model."""
    saved: Any = None
    """The processor to save where it is not the reference's."""
    video: str = ""
    """What stands for a video in a prompt, where videos are asked about."""
    seen_together: int = 0
    """How many of a video's frames the model sees as one, and ranks do; 0 where nobody knows."""
    second: str = ""
    """What stands for the second picture of a prompt, where pictures are numbered."""
    single: bool = False
    """Whether a prompt holds one picture only."""
    shrunk: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """What vLLM's own code fixes and no configuration says: "module.name" below vLLM's models -> what makes
    of it the same in small, for the rest of the process."""
    windows: Mapping[int, int] = field(default_factory=dict)
    """Layer -> how many tokens a row sees there, its own included: past the cliff, of those that are left."""
    local: Mapping[int, int] = field(default_factory=dict)
    """Layer -> how many tokens a chunk has there, of which a row sees its own: past the cliff, of those that are
    left."""
    write_ids: Callable[[str, Sequence[Image.Image]], list[int]] | None = None
    """A prompt as ids, where vLLM takes no text about pictures."""
    nested: bool = False
    """Whether the processor takes a list of pictures per prompt."""
    rename: Callable[[str], str] | None = None
    """Name of a weight as saved by transformers 5 -> as the hub and vLLM have it."""
    experts_transposed: bool = False
    """Whether the hub has the experts' matrices the other way round than transformers 5 keeps them."""
    write: Callable[[Any, Path], None] | None = None
    """Writes the whole checkpoint around the filled model, where transformers does not know the layout."""
    attention: str = ""
    """The attention backend that the family needs, where that is none of a CPU's: it runs there through Triton's
    interpreter."""
    mutual: Callable[[Sequence[int]], list[tuple[int, int]]] | None = None
    """Ranges of a prompt's ids that see themselves in both directions, where the reference must be told."""
    chunks: bool = False
    """Whether pictures are of the modality "vision_chunk"."""
    views: bool = False
    """Whether the tower multiplies a view, which vLLM 0.32 cannot on a CPU: the test makes a copy of it."""
    latent: bool = False
    """Whether latent vectors are stored: vLLM then does without chunks and prefix caching on a CPU, where the
    tests have it do with them, as on CUDA."""
    group_layers: int = 2
    """Layers per storage group, where some share one."""
    recurrent: bool = False
    """Whether some layers keep a state per request in the place of keys and values."""
    perceptron_last: bool = False
    """Whether the last layer attends to nothing: a cliff there changes no answer."""
    unit_offset: bool = False
    """Whether the decoder's norms add one to their weights (Gemma)."""
    embeddings: float = GAINS["embed_tokens"]
    """Gain of the words' embeddings."""

    @property
    def num_layers(self) -> int:
        return len(self.decoder(self.model).layers)

    @property
    def word_ids(self) -> list[int]:
        """Ids an answer may consist of: no special token, above all no image token."""
        return [self.vocab[word] for word in WORDS]


def tokenizer(
    specials: Sequence[str], named: Mapping[str, str] | None = None
) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """One token per word and per special; ``named`` are attributes that processors ask for."""
    vocab = {word: index for index, word in enumerate((*BASE, *specials, *WORDS))}
    made = word_tokenizer(
        vocab, (*BASE, *specials), named or {}, pad_token="<pad>", model_max_length=MAX_POSITIONS
    )
    return made, vocab


def text_settings(vocab: Mapping[str, int], **changes: Any) -> dict[str, Any]:
    """Arguments of a language model's configuration: 4 layers, 128 wide, grouped queries."""
    return dict(
        vocab_size=len(vocab),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    ) | dict(changes)


UNUSUAL = dict(rms_norm_eps=0.05, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
"""Of a language model's configuration: one that nobody reads is seen in the answers."""


def tower_settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a vision tower's configuration: 2 layers, 64 wide."""
    return dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    ) | dict(changes)


def fill(
    model: nn.Module,
    seed: int,
    unit_offset: bool = False,
    embeddings: float = GAINS["embed_tokens"],
) -> None:
    """Draw every parameter anew, in the order of sorted names."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        key = name.split(".")[-2] if "." in name else name
        if weight.dim() == 1 and name.endswith("weight"):
            plain = any(part in name for part in ("vision", "visual", "linear_attn.norm"))
            noise = noise * 0.1 + (0.0 if unit_offset and not plain else 1.0)
        elif weight.dim() == 1:
            noise = noise * 0.3
        elif key in ("embed_tokens", "wte", "embeddings"):
            noise = noise * embeddings
        elif weight.dim() == 3 and "experts" in name:  # one matrix per expert
            noise = noise / weight.shape[-1] ** 0.5
        else:
            noise = noise * GAINS.get(key, 1.0) / weight[0].numel() ** 0.5
        weight.data.copy_(noise)


def drawn(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """Weights by name and shape, drawn as :func:`fill` does: of a tower that transformers does not have."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(tuple(shape), generator=generator)
        if len(shape) > 1:
            found[name] = noise / noise[0].numel() ** 0.5
        else:
            found[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.3 * noise
    return found


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of a linear layer's weights."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return shapes | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer norm's weights."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def save(checkpoint: Checkpoint, where: Path) -> Checkpoint:
    """Draw the weights and write the checkpoint to ``where``."""
    model = checkpoint.model.float()  # which leaves complex numbers alone
    for module in model.modules():
        # vLLM's Transformers backend decorates their classes, also those of this model, for torch.compile.
        module.do_not_compile = True
    fill(model, 1, checkpoint.unit_offset, checkpoint.embeddings)
    if checkpoint.write is not None:
        where.mkdir(parents=True, exist_ok=True)
        checkpoint.write(model, where)
        model.set_attn_implementation("eager")
        return replace(checkpoint, model=model.eval(), where=where)
    model.config.architectures = model.config.architectures or [type(model).__name__]
    model.config.dtype = torch.float32
    model.save_pretrained(where)
    (checkpoint.processor or checkpoint.saved).save_pretrained(where)
    if checkpoint.rename is not None or checkpoint.experts_transposed:
        file = where / "model.safetensors"
        rename = checkpoint.rename or (lambda name: name)
        weights = {rename(name): value for name, value in load_file(file).items()}
        if checkpoint.experts_transposed:
            for name in [name for name in weights if ".experts." in name]:
                weights[name] = weights[name].transpose(1, 2).contiguous()
        save_file(weights, file, metadata={"format": "pt"})
    written = json.loads((where / "config.json").read_text())
    assert written["architectures"], "vLLM goes by this"
    model.set_attn_implementation("eager")
    return replace(checkpoint, model=model.eval(), where=where)


def matrix_per_expert(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights with a matrix per expert and projection, where transformers has one of all experts."""
    found = {}
    for name, value in model.state_dict().items():
        front, experts, part = name.partition(".experts.")
        if not experts:
            found[name] = value
            continue
        names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        for number, matrices in enumerate(value):
            for own, matrix in zip(names, matrices.chunk(len(names)), strict=True):
                found[f"{front}.experts.{number}.{own}.weight"] = matrix
    return found


def write_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """As safetensors; tensors may share memory, or lie in it in any order."""
    copies = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    save_file(copies, file, metadata={"format": "pt"})


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A random RGB image, height x width."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(seed: int, size: tuple[int, int], frames: int = 4) -> tuple[np.ndarray, dict[str, Any]]:
    """A random video, frames x height x width x 3, at two frames a second, with its metadata."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    metadata = dict(
        total_num_frames=frames,
        fps=2.0,
        duration=frames / 2,
        video_backend="opencv",
        frames_indices=list(range(frames)),
        do_sample_frames=False,
    )
    return pixels, metadata


def words(count: int, seed: int) -> str:
    """``count`` random words, one token each."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))
