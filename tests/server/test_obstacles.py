"""Over HTTP, what the engine's workers cannot do is 400 with a sentence, and the server lives on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.server import serving
from tests.server.conftest import GROUP_LAYERS, KV_BYTES
from tests.server.requests import CHAT, chat_body
from vllm_flow.demo_model.assemble import assemble_small

BOOT = """
import runpy, sys
from vllm_flow.engine.attention import keys
keys.READERS = ()  # in the engine's process, too: a fork
if __name__ == "__main__":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_whose_scores_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boot.py").write_text(BOOT)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "boot.py"}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(serving.sys, "executable", str(python))
    arguments = [
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_BYTES)),
        *("--additional-config", json.dumps({"vllm_flow": {"group_layers": GROUP_LAYERS}})),
    ]
    with serving.serve(assemble_small(), arguments, tmp_path / "server.log") as server:
        for path_keys in ({"flow_preset": "fastv"}, {"flow_stages": "2:9 last_image"}):
            body = chat_body(1, 2)
            body["vllm_xargs"] = path_keys
            answer = server.post(CHAT, body)
            assert answer.status_code == 400, answer.text
            said = answer.json()["error"]["message"]
            assert "reads keys from this engine's KV cache" in said and "CPU_ATTN" in said
        body["vllm_xargs"] = {"flow_stages": "2:9 uniform"}
        assert server.post(CHAT, body).status_code == 200
