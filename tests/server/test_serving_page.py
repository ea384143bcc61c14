"""README.md, and the pages about serving: what they tell people to paste into a shell works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from tests.server.serving import NAME, Server
from vllm_flow.cliff_file import FORMAT
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings

ROOT = Path(__file__).resolve().parents[2]
SERVE = re.compile(r"^vllm serve ", re.MULTILINE)
LAYERS = 32
"""Of the model that the pages serve, LLaVA-1.5-7B."""


def blocks(page: Path) -> list[str]:
    """A page's shell blocks, line ends behind backslashes taken away."""
    found = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [text.replace("\\\n", " ") for text in found]


def block(holds: str) -> str:
    """The README's one shell block that holds these words."""
    (found,) = [text for text in blocks(ROOT / "README.md") if holds in text]
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_request_works_as_pasted(small: Server) -> None:
    """With another server's address, name and number of layers; the text is otherwise the page's."""
    script = block("curl -s localhost")
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


def parsed(words: list[str]) -> Namespace:
    """A server's arguments, by vLLM's parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


def test_the_server_is_started_with_arguments_it_has() -> None:
    """Starting the demo model takes longer than a test should; its arguments are vLLM's parser's to judge."""
    script = block("api_server")
    command = re.search(r"api_server (.*?) > server.log", script, re.DOTALL).group(1)
    words = subprocess.run(
        ["bash", "-c", f"MODEL=somewhere; printf '%s\\n' {command}"], capture_output=True, text=True
    ).stdout.splitlines()
    arguments = parsed(words)
    assert (arguments.model, arguments.served_model_name) == ("somewhere", ["demo"])
    assert arguments.additional_config == {"vllm_flow": {}}


def served() -> list[tuple[str, list[str]]]:
    """(page, words behind it) of every `vllm serve` that a page shows."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for text in blocks(page):
            for words in (shlex.split(text[at.end() :]) for at in SERVE.finditer(text)):
                stop = words.index("vllm-flow") if "vllm-flow" in words else len(words)
                found.append((page.name, words[:stop]))
    return found


def test_every_vllm_serve_has_arguments_and_settings_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings as for a model of 32 layers, the profile as `vllm-flow cliff` might write one."""
    tasks = {"pope": {"flow_cliff": 22}}
    profile = {"format": FORMAT, "model": "m", "num_layers": LAYERS, "tasks": tasks}
    (tmp_path / "cliff.json").write_text(json.dumps(profile))
    monkeypatch.chdir(tmp_path)
    commands = served()
    assert {page for page, _ in commands} >= {"README.md", "serving.md", "rollout.md", "cliff.md"}
    for page, words in commands:
        config = parsed(["--model", *words]).additional_config
        assert list(config) == ["vllm_flow"], page
        FlowSettings.read(
            config["vllm_flow"], EngineFacts(LAYERS)
        )  # raises what a server would not start with
