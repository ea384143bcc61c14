"""README.md and docs/serving.md: what they tell people to paste into a shell works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.serving import NAME, Server

ROOT = Path(__file__).resolve().parents[2]


PAGES = pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])


def block(page: str, holds: str) -> str:
    """The one shell block of the page that holds these words."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = [text for text in blocks if holds in text]
    return found


@PAGES
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_request_works_as_pasted(small: Server, page: str) -> None:
    """With another server's address, name and number of layers; the text is otherwise the page's."""
    script = block(page, "curl -s localhost")
    for written, here in (
        ("localhost:8000", small.url.removeprefix("http://")),
        ('"model": "demo"', f'"model": "{NAME}"'),
        ('"flow_cliff": 16', '"flow_cliff": 2'),
    ):
        assert written in script
        script = script.replace(written, here)
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == "Yes"
    assert answer["kv_transfer_params"]["vllm_flow"]["image_tokens_evicted"] == 64


@PAGES
def test_the_server_is_started_with_arguments_it_has(page: str) -> None:
    """Starting the demo model takes longer than a test should; its arguments are vLLM's parser's to judge."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    script = block(page, "api_server")
    command = re.search(r"api_server (.*?) > server.log", script, re.DOTALL).group(1)
    words = subprocess.run(
        ["bash", "-c", f"MODEL=somewhere; printf '%s\\n' {command}"], capture_output=True, text=True
    ).stdout.splitlines()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert (arguments.model, arguments.served_model_name) == ("somewhere", ["demo"])
    assert arguments.additional_config == {"vllm_flow": {}}
