"""Requests for the small demo model: questions about shipped pictures, with and without a policy."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from tests.server.serving import NAME
from vllm_flow.demo_model.heldout import Question, load_questions
from vllm_flow.demo_model.prompt import IMAGE_TOKEN, prompt_head, prompt_tail

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def data_url(image: Image.Image, format: str = "PNG") -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def questions() -> list[Question]:
    """The shipped questions on scenes in a style that the model knows."""
    return load_questions("seen")


def question(index: int) -> Question:
    """One of them; several in a row may be about one picture."""
    return questions()[index]


def different_pictures(index: int, count: int) -> list[Image.Image]:
    """The picture of question ``index`` and the next ones that differ from it and each other."""
    paths = dict.fromkeys(asked.image_path for asked in questions()[index:])
    return [picture_of(path) for path in list(paths)[:count]]


def picture_of(asked: Question | Path) -> Image.Image:
    return Image.open(asked if isinstance(asked, Path) else asked.image_path).convert("RGB")


def chat_body(
    index: int, cliff: Any = None, *, pictures: int = 1, max_tokens: int = 6, **more: Any
) -> dict[str, Any]:
    """A chat request about ``pictures`` pictures, the first being question ``index``'s."""
    images = different_pictures(index, pictures)
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": question(index).text}]
    return with_policy(
        {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **more,
        },
        cliff,
    )


def text_body(words: str, cliff: Any = None, **more: Any) -> dict[str, Any]:
    """A completion request: no picture, which the endpoint cannot carry."""
    body = {"model": NAME, "prompt": words, "max_tokens": 6, "temperature": 0, **more}
    return with_policy(body, cliff)


def with_policy(body: dict[str, Any], cliff: Any) -> dict[str, Any]:
    return body if cliff is None else {**body, "vllm_xargs": {"flow_cliff": cliff}}


def chat(client: openai.OpenAI, body: dict[str, Any]) -> Any:
    """A chat request by the client: vLLM's own fields go where it takes them."""
    own = ("model", "messages", "max_tokens", "temperature", "logprobs", "top_logprobs", "n")
    own += ("seed", "stream", "stream_options", "response_format")
    known = {key: value for key, value in body.items() if key in own}
    extra = {key: value for key, value in body.items() if key not in own}
    return client.chat.completions.create(**known, extra_body=extra)


def report(answer: Any) -> dict[str, Any] | None:
    """The extension's report in a response of the client."""
    return (answer.model_extra["kv_transfer_params"] or {}).get("vllm_flow")


def cached(answer: Any) -> int:
    """Tokens of the prompt that were found in the prefix cache."""
    return answer.usage.prompt_tokens_details.cached_tokens


def prompt_of(index: int, pictures: int = 1) -> str:
    """The text of question ``index``'s prompt, as the chat template writes it."""
    return prompt_head() + IMAGE_TOKEN * pictures + prompt_tail(question(index).text)
