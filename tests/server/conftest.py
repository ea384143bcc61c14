"""One server with the small demo model for all tests of this folder that can share it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.serving import Server, serve
from vllm_flow.demo_model.assemble import assemble_small

LAYERS = 6
IMAGE_TOKENS = 64
STRONGEST = 1
"""The operator's bound: cliff 0 is forbidden."""
GROUP_LAYERS = 2
KV_BYTES = 8 << 20
"""256 blocks of 32 tokens and two layers: about 20 requests with a picture and no policy."""
PICTURE_CACHE_GB = 0.001
"""Three pictures: every server's cache is full some day, and this one's is from the start."""
WITHOUT_WHITESPACE = {"backend": "xgrammar", "disable_any_whitespace": True}
"""The small model, held to JSON, would write blank lines for ever."""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The small demo model: six layers, 64 tokens per image, prefix caching, two images at most."""
    settings = {"group_layers": GROUP_LAYERS, "max_policy": {"flow_cliff": STRONGEST}}
    arguments = [
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_BYTES)),
        *("--limit-mm-per-prompt", json.dumps({"image": 2})),
        *("--additional-config", json.dumps({"vllm_flow": settings})),
        *("--structured-outputs-config", json.dumps(WITHOUT_WHITESPACE)),
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
        *("--mm-processor-cache-gb", str(PICTURE_CACHE_GB)),
    ]
    log = tmp_path_factory.mktemp("small") / "server.log"
    with serve(assemble_small(), arguments, log) as running:
        yield running


@pytest.fixture(scope="session")
def client(small: Server) -> openai.OpenAI:
    """The ``openai`` package's client of that server."""
    return openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0)
