"""The one prompt format of the demo model, the same in training and in use. Knows no tokenizer. (pure)

SmolLM2's own chat template, with the image token right before the question in the user turn.
The processor repeats the image token once per image feature (144 times; 64 for the small model).
"""

from __future__ import annotations

IMAGE_TOKEN = "<empty_output>"
"""A token of SmolLM2's vocabulary that its instruct training did not use."""

IMAGE_TOKEN_ID = 16

SYSTEM_TEXT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""SmolLM2's default system turn, which its template adds when the messages have none."""

ANSWER_END = "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM_TEXT + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] in ('image', 'image_url') %}"
    "{{ '" + IMAGE_TOKEN + "' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Jinja template of the checkpoint; images come first, so it renders what ``build_prompt`` does."""


def prompt_head() -> str:
    """What precedes the image token: the system turn and the opening of the user turn."""
    return f"<|im_start|>system\n{SYSTEM_TEXT}<|im_end|>\n<|im_start|>user\n"


def prompt_tail(text: str) -> str:
    """What follows the image token: the text and the opening of the assistant's turn."""
    return f"{text}<|im_end|>\n<|im_start|>assistant\n"


def build_prompt(text: str) -> str:
    """The whole prompt, with one image token, for a text such as a presence question.

    Pass it with one image to ``LlavaProcessor`` or to vLLM (``{"prompt": ..., "multi_modal_data":
    {"image": ...}}``); both expand the image token once per image feature.
    """
    return prompt_head() + IMAGE_TOKEN + prompt_tail(text)
