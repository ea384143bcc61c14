"""A server of the tiny LLaVA with two names, an adapter, tasks, an attention log and a package of ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq

from tests.engine import oracle
from tests.engine.lora import write_adapter
from tests.engine.tiny_llava import SPECIALS, WORDS, Shape, build, picture, words
from tests.plugins.installing import RANK_PACKAGE, lay_out
from tests.server.requests import data_url
from tests.server.serving import NAME, Server, serve
from vllm_flow.cliff_file import FORMAT, write_profile

SHAPE = Shape(layers=4, grid=8)
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %} {% endfor %}{% endfor %}"
)
ALIAS, ADAPTER = "model-fast", "adapter"
MODELS = {ALIAS: 2, ADAPTER: 1}
"""Cliffs of requests that ask for another served name, and for an adapter; those that ask for `NAME` have none."""
TASKS = {"yes-no": 1, "reading": 3, "everything": SHAPE.layers}
"""Cliffs of the operator's profile, which has no default: requests that name no task get none."""
WORD_IDS = list(range(len(SPECIALS), len(SPECIALS) + len(WORDS)))


@dataclass(frozen=True)
class Tiny:
    """The running server, and requests for its model."""

    running: Server
    log: Path

    def body(self, seed: int, xargs: Any = None, **more: Any) -> dict[str, Any]:
        """A chat request: words, a picture as data URL, words."""
        content = [
            {"type": "text", "text": words(5, seed)},
            {"type": "image_url", "image_url": {"url": data_url(picture(SHAPE, seed))}},
            {"type": "text", "text": words(7, seed + 1)},
        ]
        return {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 12,
            "temperature": 0,
            "allowed_token_ids": WORD_IDS,
            "return_token_ids": True,
            "add_special_tokens": True,
            **({} if xargs is None else {"vllm_xargs": xargs}),
            **more,
        }

    @property
    def merged(self) -> Path:
        """The checkpoint with the adapter in its weights."""
        return write_adapter(self.running.model_dir, self.running.model_dir.parent / "lora", 1)[1]

    def chat(self, body: dict[str, Any]) -> httpx.Response:
        return self.running.post("/v1/chat/completions", body)

    def expected(self, seed: int, cliff: int, model_dir: Path | None = None) -> list[int]:
        prompt = f"{words(5, seed)} <image> {words(7, seed + 1)} "
        found = oracle.generate(
            model_dir or self.running.model_dir,
            prompt,
            [picture(SHAPE, seed)],
            cliff,
            12,
            tuple(WORD_IDS),
        )
        return list(found.token_ids)


def write_tasks(path: Path) -> None:
    tasks = {task: {"flow_cliff": cliff, "evidence": {}} for task, cliff in TASKS.items()}
    content = {"format": FORMAT, "model": NAME, "num_layers": SHAPE.layers, "tasks": tasks}
    write_profile(path, content)


@contextmanager
def serve_tiny(root: Path) -> Iterator[Tiny]:
    """The server as long as the context is open; all of its files are in `root`."""
    (root / "template.jinja").write_text(TEMPLATE)
    write_tasks(root / "cliff.json")
    flow = {
        "group_layers": 2,
        "attention_log": str(root / "attention"),
        "default_policy": {"profile": str(root / "cliff.json")},
        "model_policies": {name: {"flow_cliff": cliff} for name, cliff in MODELS.items()},
    }
    model_dir = build(SHAPE, root)
    adapter, _ = write_adapter(model_dir, model_dir.parent / "lora", 1)
    arguments = [
        *("--max-model-len", "256", "--kv-cache-memory-bytes", str(16 << 20)),
        *("--chat-template", str(root / "template.jinja")),
        *("--additional-config", json.dumps({"vllm_flow": flow})),
        *("--served-model-name", NAME, ALIAS),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={adapter}"),
    ]
    # As users' processes find packages: the server's own, its engine's and whatever these start.
    paths = [str(lay_out(RANK_PACKAGE, root / "site")), os.environ.get("PYTHONPATH", "")]
    more = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with serve(model_dir, arguments, root / "server.log", more) as running:
        yield Tiny(running, root / "attention")


def logged(server: Tiny, request_id: str, rows: int, kind: str = "mass") -> list[dict[str, Any]]:
    """Rows of a request, once that many have been written."""
    end = time.monotonic() + 30
    found: list[dict[str, Any]] = []
    while time.monotonic() < end and len(found) < rows:
        time.sleep(0.2)
        if (server.log / kind).exists():
            table = pq.read_table(server.log / kind)
            found = [row for row in table.to_pylist() if row["request_id"] == request_id]
    return found


def metrics(server: Tiny) -> dict[str, float]:
    """The extension's counters by name and the values of their labels."""
    return {
        ":".join((name, *(value for _, value in labels if value))): number
        for (name, labels), number in server.running.samples().items()
        if name.startswith("vllm_flow:") and "_created" not in name
    }
