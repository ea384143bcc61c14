"""Data parallelism: one server, two engines, each with blocks and layouts of its own.

Tensor parallelism is tested in tests/engine/test_parallel.py.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import GROUP_LAYERS, KV_BYTES, LAYERS
from tests.server.requests import CHAT, chat_body
from tests.server.serving import Server, serve
from vllm_flow.demo_model.assemble import assemble_small


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two engines need two cores")
def test_two_engines_answer_as_one(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core for each
    arguments = [
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_BYTES)),
        *("--additional-config", json.dumps({"vllm_flow": {"group_layers": GROUP_LAYERS}})),
        *("--data-parallel-size", "2"),
    ]
    bodies = [chat_body(index, 1 + index % LAYERS) for index in range(16)]
    with (
        serve(assemble_small(), arguments, tmp_path / "server.log") as both,
        ThreadPoolExecutor(8) as clients,
    ):
        answers = list(clients.map(lambda body: both.post(CHAT, body).json(), bodies))
        finished = {
            sample.labels["engine"]: sample.value
            for family in text_string_to_metric_families(both.client.get("/metrics").text)
            for sample in family.samples
            if sample.name == "vllm:generation_tokens_total"
        }
    assert len(finished) == 2 and all(finished.values()), "one engine did all the work"
    for body, answer in zip(bodies, answers, strict=True):
        alone = small.post(CHAT, body).json()
        assert answer["choices"][0]["message"] == alone["choices"][0]["message"]
        assert answer["kv_transfer_params"] == alone["kv_transfer_params"]
