"""How questions are put: LLaVA-1.5's wording, and what other families' authors published.

- `llava`: haotian-liu/LLaVA c121f04, docs/Evaluation.md and llava/eval/model_vqa_mmbench.py;
- `qwen2-vl` (Qwen2-VL, Qwen2.5-VL): open-compass/VLMEvalKit e8e78f05, vlmeval/vlm/qwen2_vl/prompt.py, which
  their authors contributed. Chinese questions have prompts of their own there, which are not here;
- `qwen-vl` (Qwen-VL, which is no chat model): QwenLM/Qwen-VL eval_mm/evaluate_vqa.py and
  eval_mm/evaluate_multiple_choice.py. There the options' likelihoods choose the letter; here it is an answer.

A task with the field `prompts` can be asked in each of these styles (`vllm-flow eval --prompts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STYLES = ("llava", "qwen2-vl", "qwen-vl")

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

_SHORT: Mapping[str, str] = {
    "llava": SHORT,
    "qwen2-vl": "\nPlease try to answer the question with short words or phrases if possible.",
    "qwen-vl": " Answer:",
}


def short_answer(question: str, style: str = "llava") -> str:
    """A question to be answered in a word or a phrase."""
    return question + _SHORT[style]


def choose(question: str, options: Sequence[str], hint: str = "", style: str = "llava") -> str:
    """A question with options A, B, ... to be answered by a letter."""
    listed = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    if style == "qwen2-vl":
        head = [f"Hint: {hint}"] if hint else []
        lines = [*head, f"Question: {question}", "Options:", *listed]
        return "\n".join([*lines, "Please select the correct answer from the options above."])
    if style == "qwen-vl":
        options_of = "\n".join(listed)
        return f"Context: {hint or 'N/A'}\nQuestion: {question}\nOptions: {options_of}\nAnswer:"
    return "\n".join([*([hint] if hint else []), question, *listed]) + LETTER
