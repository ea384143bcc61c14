"""Which option an answer chooses, without a judge: the rule-based part of VLMEvalKit's matching.

Source: open-compass/VLMEvalKit e8e78f05, vlmeval/utils/matching_util.py (`can_infer`), whose authors are
MMBench's. Where it finds nothing, the toolkit asks a language model; under its policy `exact_matching`, which
is the one here, the answer counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_OPTION = "Z"
"""What stands for an answer that declines to choose."""
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
TAIL = 5
"""A letter counts among the last so many words."""
SENTENCE = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
NO_ANSWER = "Failed to obtain answer via API"


def infer(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, `Z` where it declines, None where the rule cannot tell.

    Args:
        options: letter -> text of the options that there are.
    """
    return infer_letter(text, options) or infer_text(text, options)


def infer_letter(text: str, options: Mapping[str, str]) -> str | None:
    """By the letter.

    The only option's letter that stands alone (punctuation aside), among the last five words; else what
    follows `answer is`. So `A cat` chooses A, and `a` nothing.
    """
    if NO_ANSWER in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return NO_OPTION
    words = text.translate(MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - TAIL:
        return named[0]
    if not named and NO_OPTION in words:
        return NO_OPTION
    found = SENTENCE.search(text)
    letter = found[1].upper() if found else None
    return letter if letter in options else None


def infer_text(text: str, options: Mapping[str, str]) -> str | None:
    """By the option's text: the only one that the answer has in it, unless it is twice as long as all."""
    text = text.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text]
    return named[0] if len(named) == 1 else None
