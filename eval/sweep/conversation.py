"""How a question becomes a prompt: LLaVA-1.5's or Qwen-VL's own form, or the model's chat template.

Knows processors of Hugging Face; nothing of tasks or engines.
"""

from __future__ import annotations

from collections.abc import Callable
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


def add_option(group: Any) -> None:
    """Declare ``--conversation`` in a group of a parser."""
    group.add_argument(
        "--conversation",
        choices=NAMES,
        default="auto",
        help="prompt format (default: LLaVA-1.5's and Qwen-VL's own for these, else the model's chat template, "
        "which is a server's for all)",
    )


class ConversationError(ValueError):
    """No prompt can be made for this model; the message names the remedy."""


@dataclass(frozen=True)
class Conversation:
    """A prompt format."""

    name: str
    processor: Any
    """Of the model; it, or its tokenizer, is asked for its chat template."""
    mark: str | None = None
    """What stands for a picture before the text, where the chat template takes a text and no parts; empty
    where the processor adds the picture by itself."""

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
        if self.mark is None:
            return _render(self.processor, _parts(text, image))
        # As vLLM's server puts them together.
        return _render(self.processor, f"{self.mark}\n{text}" if image and self.mark else text)


def choose(
    name: str, model: str, processor: Any, mark: Callable[[], str | None] | None = None
) -> Conversation:
    """The conversation of a model; `auto` knows LLaVA-1.5 by its name or by its template's turns, and a Qwen-VL
    that is no chat model by a template without turns.

    Args:
        mark: what stands for a picture in a text, asked only where the chat template takes no parts.

    Raises:
        ConversationError: the model has no chat template and is not known.
    """
    has_template = _holder(processor) is not None
    parts = has_template and takes_parts(processor)
    if name == "auto":
        by_name = "llava-1.5" in model.lower() or "llava-v1.5" in model.lower()
        template = _render(processor, _parts("?", True)) if parts else ""
        vicuna = template.startswith("USER:") and template.rstrip().endswith("ASSISTANT:")
        plain = template == f"Picture 1: {QWEN_VL_PICTURE}\n?"
        name = "llava-1.5" if by_name or vicuna else "qwen-vl" if plain else "chat-template"
    if name != "chat-template":
        return Conversation(name, processor)
    if not has_template:
        raise ConversationError(
            f"{model} has no chat template; give it one (chat_template.jinja beside its "
            "tokenizer), or pass --conversation llava-1.5 if it was trained on that."
        )
    return Conversation(name, processor, None if parts or mark is None else mark() or "")


def takes_parts(processor: Any) -> bool:
    """Whether the chat template goes through a message's parts and writes the picture's mark itself.

    One that was written for text joins the list to a string, which fails, or prints it.
    """
    from jinja2 import TemplateError

    try:
        shown = _render(processor, _parts("?", True))
    except (TypeError, TemplateError):
        return False
    return "'type': 'image'" not in shown


def _parts(text: str, image: bool) -> list[dict[str, str]]:
    return [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]


def _holder(processor: Any) -> Any:
    """What has the chat template: the processor, or else its tokenizer, as vLLM looks; None if neither has."""
    for holder in (processor, getattr(processor, "tokenizer", None)):
        if getattr(holder, "chat_template", None):
            return holder
    return None


def _render(processor: Any, content: str | list[dict[str, str]]) -> str:
    messages = [{"role": "user", "content": content}]
    # A processor gives text unless told otherwise; a tokenizer, where a model has no more, gives ids.
    return str(
        _holder(processor).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    )
