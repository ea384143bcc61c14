"""Chat templates for tiny checkpoints of families whose code comes with the model, and what is asked in them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

STRING = (
    "{% for message in messages %}{{ 'w1 ' + message['role'] + ' w2 ' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' w3' }}{% endif %}"
)
"""Of a message's text, as InternVL, MiniCPM-V, Molmo and Phi-3-vision publish theirs: a list would fail."""
PRINTED = "{% for message in messages %}w1 {{ message.content }} w2{% endfor %}"
"""Of a text, too, though a list is printed as Python writes it."""
PARTS = (
    "{% for message in messages %}w1 {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}"
    "{% endfor %} w2{% endfor %}"
)
"""Of parts, as transformers' own processors bring it."""


def give_template(folder: Path, template: str) -> None:
    """A checkpoint's chat template, where transformers looks for it."""
    (folder / "chat_template.jinja").write_text(template)


def asked(text: str, picture: Image.Image) -> list[dict[str, Any]]:
    """A chat about a picture, as clients send it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]
