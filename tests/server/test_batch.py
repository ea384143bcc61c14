"""``vllm run-batch``: its lines are checked as HTTP bodies are. With vLLM's runner and a handler of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.launchers import run_batch

from tests.server.conftest import LAYERS
from tests.server.requests import CHAT
from vllm_flow.engine import plugin
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end import asked_model
from vllm_flow.engine.front_end.http import refusal_of
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.patches import run_batch as patch

SETTINGS = FlowSettings.read({}, EngineFacts(LAYERS))
BODY = {"model": "model", "messages": [{"role": "user", "content": "hello"}]}
GOOD = {**BODY, "vllm_xargs": {"flow_cliff": 2}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misplaced": ({**BODY, "flow_cliff": 2}, 'into the object "vllm_xargs"'),
    "true": ({**BODY, "vllm_xargs": {"flow_cliff": True}}, "a boolean is not a layer"),
    "beams": ({**GOOD, "use_beam_search": True}, "beam search"),
}


@pytest.fixture
def patched() -> Iterator[None]:
    patch.apply(lambda line: refusal_of(line, SETTINGS), plugin._noting)
    yield
    patch.revert()


def run(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[Any]]:
    """What reaches the handler, and the output's lines."""
    reached: list[Any] = []

    async def handler(request: Any) -> Any:
        await asyncio.sleep(0)
        (request.asked,) = asked_model.names(None, "first")
        reached.append(request)
        raise ValueError("handled")

    async def registry(**_: Any) -> dict[str, Any]:
        matches = {"url_matcher": lambda url: url == CHAT, "handler_getter": lambda: handler}
        return {"completions": {**matches, "wrapper_fn": None}}

    monkeypatch.setattr(run_batch, "build_endpoint_registry", registry)
    (tmp_path / "in").write_text("\n".join(lines))
    paths = {"input_file": str(tmp_path / "in"), "output_file": str(tmp_path / "out")}
    asyncio.run(run_batch.run_batch(None, SimpleNamespace(**paths, output_tmp_dir=None)))
    written = (tmp_path / "out").read_text().splitlines()
    return reached, [json.loads(line) for line in written]


def test_each_line_is_checked_by_itself(
    patched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {"first": GOOD, **{name: body for name, (body, _) in BAD.items()}}
    bodies["last"] = {**GOOD, "model": "other"}
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body})
        for name, body in bodies.items()
    ]
    twice = {"custom_id": "twice", "method": "POST", "url": CHAT, "body": GOOD}
    lines.append(
        json.dumps(twice).replace('{"flow_cliff": 2}', '{"flow_cliff": 1, "flow_cliff": 2}')
    )
    beside = {"custom_id": "beside", "method": "POST", "url": CHAT, "body": BODY}
    lines.append(json.dumps({**beside, "vllm_xargs": {"flow_cliff": 2}}))
    reached, written = run(lines, tmp_path, monkeypatch)
    assert [request.vllm_xargs for request in reached] == [{"flow_cliff": 2}] * 2
    assert [request.asked for request in reached] == ["model", "other"], "each line's own"
    said = {line["custom_id"]: json.dumps(line) for line in written}
    more = {"twice": ({}, "more than once"), "beside": ({}, 'object "vllm_xargs" of "body"')}
    for name, (_, sentence) in {**BAD, **more}.items():
        assert sentence in said[name].replace('\\"', '"') and '"status_code": 400' in said[name]
    assert "handled" in said["first"] and "handled" in said["last"]


def test_without_the_patch_keys_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the patch may go."""
    line = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": BAD["true"][0]})
    reached, _ = run([line], tmp_path, monkeypatch)
    assert [request.vllm_xargs for request in reached] == [{"flow_cliff": 1}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": ' + "9" * 5000 + "}", "a number of more than 4300 digits"),
        ('{"body": ' + "[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_in_a_sentence(line: str, said: str) -> None:
    """vLLM's reader refuses such lines itself; should it take one, this is no traceback."""
    assert (refusal_of(line, SETTINGS) or "").startswith(
        f"this line is no JSON that can be checked: {said}"
    )
