"""Qwen-VL's tokenizer from its ``qwen.tiktoken``, as a fast tokenizer of transformers.

The published one is code beside the checkpoint. transformers 5 still runs it, where that is allowed and
matplotlib is installed; but its vocabulary is bytes, which structured outputs cannot use, it names no token
that ends an answer, writes a picture's URL into the prompt as tokens, and fails on an ``<img>`` without an end.
This one reads the same file into the same ids, and leaves pictures to the model's processor.

A chat's prompt, and the token that ends an answer, follow ``chat_format`` in ``generation_config.json``:
ChatML for Qwen-VL-Chat, plain text for Qwen-VL.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import TikTokenConverter

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What text is split at before bytes are merged: a digit is a piece of its own."""

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
SPECIALS = (
    *(END_OF_TEXT, "<|im_start|>", END_OF_TURN),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *(IMAGE_START, IMAGE_END, IMAGE_PAD),
)
"""They follow the vocabulary's tokens, in this order."""

TEMPLATES = Path(__file__).with_name("templates")


class QWenTokenizer(TokenizersBackend):
    """Goes by the published class's name: transformers finds it where ``tokenizer_config.json`` says it."""

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Arguments for ``__init__`` from those of ``from_pretrained``, whose files are found already."""
        file = kwargs.get("vocab_file")
        if file is None or kwargs.get("tokenizer_file") is not None:  # written by transformers
            return super().convert_to_native_format(**kwargs)
        found, chat = Path(file), chat_format(Path(file).parent)
        about = found.stat()
        defaults = {
            "tokenizer_object": fast_tokenizer(found, about.st_mtime_ns, about.st_size),
            "eos_token": END_OF_TURN if chat == "chatml" else END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "chat_template": (TEMPLATES / f"qwen_vl_{chat}.jinja").read_text(),
        }
        given = {name: value for name, value in kwargs.items() if value is not None}
        return kwargs | defaults | given


@lru_cache(maxsize=1)
def fast_tokenizer(file: Path, changed: int, size: int) -> Tokenizer:
    """The tokenizer of a ``qwen.tiktoken``, read again only if the file has changed.

    Raises:
        ValueError: the file is no list of tokens and their ranks.
    """
    made = _Converter(str(file), pattern=PATTERN, extra_special_tokens=list(SPECIALS)).converted()
    made.normalizer = normalizers.NFC()
    return made


def read_ranks(file: str) -> dict[bytes, int]:
    """Token -> its rank, which is its id, from lines of base64 and a number.

    Raises:
        ValueError: names the line that is none, or says that ids are missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number}: {line[:40]!r} is not a token in base64 and its rank; is the "
                "file complete?"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{file}: ranks are missing or used twice; is the file complete?")
    return ranks


def chat_format(folder: Path) -> str:
    """``chatml`` or ``raw``: how a checkpoint was trained to be asked; ``chatml`` where it does not say."""
    try:
        found = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        return "chatml"
    return "raw" if isinstance(found, dict) and found.get("chat_format") == "raw" else "chatml"


class _Converter(TikTokenConverter):
    """tiktoken's own reader keeps a copy by path, which would outlive a file that changed."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_ranks(tiktoken_url)
