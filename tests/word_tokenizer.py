"""The tokenizer of every made-up checkpoint of the tests: a token per word, split at blanks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(
    vocab: Mapping[str, int], specials: Iterable[str], named: Mapping[str, str], **more: Any
) -> PreTrainedTokenizerFast:
    """A fast tokenizer over ``vocab``, which has ``<unk>``, ``<s>`` and ``</s>``.

    Args:
        specials: words that are special tokens, found also where no blank parts them from others.
        named: attribute of the tokenizer -> its token, as processors ask for it.
        more: further arguments of the tokenizer.
    """
    backend = Tokenizer(models.WordLevel(dict(vocab), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(named),
        **more,
    )
