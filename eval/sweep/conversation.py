"""How a question becomes a prompt: LLaVA-1.5's or Qwen-VL's own form, or the model's chat template.

Knows processors of Hugging Face; nothing of tasks or engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Of the conversation that LLaVA-1.5 was trained on and its published scores were obtained with
(`vicuna_v1` in the LLaVA repository). The chat template on the hub leaves it out."""

QWEN_VL_PICTURE = "<img></img>"
"""Of Qwen-VL, which is no chat model: its authors' evaluation asks with the picture, the text and nothing else
(QwenLM/Qwen-VL eval_mm/evaluate_vqa.py)."""

NAMES = ("auto", "llava-1.5", "qwen-vl", "chat-template")


class ConversationError(ValueError):
    """No prompt can be made for this model; the message names the remedy."""


@dataclass(frozen=True)
class Conversation:
    """A prompt format."""

    name: str
    processor: Any
    """Of the model; asked for its chat template."""

    @property
    def add_special_tokens(self) -> bool:
        """Whether the tokenizer adds its begin-of-text token: chat templates write it themselves."""
        return self.name == "llava-1.5"

    def prompt(self, text: str, image: bool) -> str:
        """The whole prompt, with one image placeholder before the text if there is an image."""
        if self.name == "llava-1.5":
            placeholder = "<image>\n" if image else ""
            return f"{LLAVA_SYSTEM} USER: {placeholder}{text} ASSISTANT:"
        if self.name == "qwen-vl":
            return f"{QWEN_VL_PICTURE if image else ''}{text}"
        return _render(self.processor, text, image)


def choose(name: str, model: str, processor: Any) -> Conversation:
    """The conversation of a model; `auto` knows LLaVA-1.5 by its name or by its template's turns, and a Qwen-VL
    that is no chat model by a template without turns.

    Raises:
        ConversationError: the model has no chat template and is not known.
    """
    has_template = bool(getattr(processor, "chat_template", None))
    if name == "auto":
        by_name = "llava-1.5" in model.lower() or "llava-v1.5" in model.lower()
        template = _render(processor, "?", True) if has_template else ""
        vicuna = template.startswith("USER:") and template.rstrip().endswith("ASSISTANT:")
        plain = template == f"Picture 1: {QWEN_VL_PICTURE}\n?"
        name = "llava-1.5" if by_name or vicuna else "qwen-vl" if plain else "chat-template"
    if name == "chat-template" and not has_template:
        raise ConversationError(
            f"{model} has no chat template; give it one (chat_template.jinja beside its "
            "tokenizer), or pass --conversation llava-1.5 if it was trained on that."
        )
    return Conversation(name, processor)


def _render(processor: Any, text: str, image: bool) -> str:
    content = [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    # A processor gives text unless told otherwise; a tokenizer, where a model has no more, gives ids.
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
