"""Tokens and lemmas of English sentences, as the CHAIR and AMBER rules need them. Knows nothing of objects.

Most resources are data that nltk does not carry; where one is missing, a
`MissingLanguageData` says how to get it. Nothing is ever replaced by another splitter, tagger or
lemmatiser: the scores would silently be others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm_flow.eval.tasks.reading import DataError

if TYPE_CHECKING:
    from nltk.stem import WordNetLemmatizer


class MissingLanguageData(DataError):
    """Data that nltk needs is not on this machine; the message says how to get it."""


def _missing(what: str, package: str, by_setup: bool = False) -> MissingLanguageData:
    setup = "run `python -m vllm_flow.setup_env`, or " if by_setup else ""
    return MissingLanguageData(
        f"{what} is not installed: {setup}with a network connection "
        f"`python -m nltk.downloader {package}`, or unpack nltk's data package {package!r} into a "
        "directory that NLTK_DATA names"
    )


def tokenise(text: str) -> list[str]:
    """nltk's word_tokenize: sentences first (Punkt, English), then Penn Treebank tokens."""
    return list(_tokens(text))


@lru_cache(maxsize=1 << 14)
def _tokens(text: str) -> tuple[str, ...]:
    """Remembered, since policies that agree describe a picture in the same words."""
    import nltk

    try:
        return tuple(nltk.word_tokenize(text))
    except LookupError:
        raise _missing("nltk's sentence splitter", "punkt_tab", by_setup=True) from None


def singulars(tokens: Sequence[str]) -> list[str]:
    """Every token made singular, whatever its part of speech, as pattern 3.6 does it.

    `bus` becomes `bu` and `glass` becomes `glas`: that is the published rule.
    """
    return [_singular(token) for token in tokens]


@lru_cache(maxsize=65536)
def _singular(token: str) -> str:
    from textblob.en.inflect import singularize

    # textblob has pattern's rules. Of half a million word forms these are all that the two bring to
    # different words of which one counts for CHAIR.
    if token in ("collies", "doggies"):
        return token
    if token.endswith("buses") and token != "buses":
        return token[:-2]
    return str(singularize(token))


def wordnet_lemmas(tokens: Sequence[str]) -> list[str]:
    """Every token's WordNet lemma for the part of speech nltk's tagger gives it, noun by default.

    The tokens are tagged in one sequence, so a token's lemma depends on its neighbours.
    """
    return _lemmas((word, PARTS.get(tag[:1], "n")) for word, tag in _tagged(tokens))


def nouns(text: str) -> list[str]:
    """WordNet's lemmas of a text's nouns, by nltk's tokens and tags, in their order; case is kept."""
    return _lemmas((word, "n") for word, tag in _tagged(tokenise(text)) if tag.startswith("NN"))


def _tagged(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Tokens with the parts of speech that nltk's tagger gives them."""
    import nltk

    try:
        return list(nltk.pos_tag(list(tokens)))
    except LookupError:
        raise _missing("nltk's tagger", "averaged_perceptron_tagger_eng") from None


def _lemmas(words: Iterable[tuple[str, str]]) -> list[str]:
    """WordNet's lemmas of words as certain parts of speech."""
    lemmatiser = _lemmatiser()
    try:
        return [lemmatiser.lemmatize(word, part) for word, part in words]
    except LookupError:
        raise _missing("WordNet", "wordnet") from None


@lru_cache(maxsize=1 << 18)
def similarity(one: str, other: str) -> float:
    """Cosine of two words' vectors in spaCy's en_core_web_lg."""
    pipeline = _vectors()
    return float(pipeline(one).similarity(pipeline(other)))


@lru_cache(maxsize=1)
def _vectors() -> Any:
    try:
        import spacy

        return spacy.load("en_core_web_lg")
    except (ImportError, OSError):
        raise MissingLanguageData(
            "spaCy's word vectors are not installed: `pip install spacy` and `python -m spacy download "
            "en_core_web_lg`, or use amber-words, which does without them"
        ) from None


PARTS = {"J": "a", "V": "v", "N": "n", "R": "r"}
"""First letter of a Penn Treebank tag -> WordNet's part of speech."""


@lru_cache(maxsize=1)
def _lemmatiser() -> WordNetLemmatizer:
    from nltk.stem import WordNetLemmatizer

    return WordNetLemmatizer()
