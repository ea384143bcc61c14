"""Prefill and decode as people run them apart: two servers, and a router that hands on what the first one says.

By a connector of the tests, whose blocks go over as files, and by NIXL where it is installed (on a machine without
CUDA: ``pip install --no-deps nixl nixl-cu12``). Four engines on two cores take minutes to start.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai.types.chat import ChatCompletion

from tests.server.conftest import GROUP_LAYERS, IMAGE_TOKENS, KV_BYTES, LAYERS
from tests.server.exact import CLIFFS, EXACT, assert_oracles
from tests.server.requests import CHAT, chat_body, picture_of, prompt_of, question
from tests.server.serving import Server, free_port, serve
from vllm_flow.demo_model.assemble import assemble_small
from vllm_flow.engine.core.connectors import LAYOUT_KEY
from vllm_flow.profile.dimensions import Workload
from vllm_flow.profile.ideal import kv_blocks

pytestmark = pytest.mark.long

SEND = {"do_remote_decode": True, "do_remote_prefill": False}
STARTS = range(0, LAYERS, GROUP_LAYERS)
BLOCK_SIZE = 32
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For a connector vLLM sets a second core aside, and starts no worker where there is none left."""
NO_NIXL = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="nixl is not installed"
)


@dataclass
class Pair:
    prefill: Server
    decode: Server
    folder: Path | None
    """Of the files, where blocks go over as such."""

    def sent(self, source: str) -> int:
        """Bytes that went over, of request ``source`` or, where they are counted together, of all."""
        if self.folder is None:
            return int(self.decode.metric("vllm:nixl_bytes_transferred_sum"))
        return sum(rows.nbytes for rows in torch.load(self.folder / source).values())


def options(name: str, folder: Path, role: str) -> dict[str, Any]:
    """``kv_transfer_config`` of one of the two servers."""
    if name == "nixl":
        return {
            "kv_connector": "NixlConnector",
            "kv_buffer_device": "cpu",
            "kv_role": role,
        }
    return {
        "kv_connector": "HandingConnector",
        "kv_connector_module_path": "tests.engine.handing_connector",
        "kv_role": role,
        "kv_connector_extra_config": {"folder": str(folder)},
    }


@pytest.fixture(scope="module", params=["files", pytest.param("nixl", marks=NO_NIXL)])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("handed")
    servers = []
    with ExitStack() as stack:
        for role in ("kv_producer", "kv_consumer"):
            arguments = [
                *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(KV_BYTES)),
                *("--additional-config", json.dumps({"vllm_flow": {"group_layers": GROUP_LAYERS}})),
                *("--kv-transfer-config", json.dumps(options(request.param, folder, role))),
            ]
            log = folder.with_name(f"{folder.name}-{role}.log")
            own = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), **UNBOUND}
            servers.append(stack.enter_context(serve(assemble_small(), arguments, log, own)))
        yield Pair(*servers, None if request.param == "nixl" else folder)


def handed(pair: Pair, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a router does: the prefill's ``kv_transfer_params``, and the decode's answer to the same body."""
    once = {**body, "max_tokens": 1, "kv_transfer_params": SEND}
    first = pair.prefill.post(CHAT, once)
    assert first.status_code == 200, first.text
    own = first.json()["kv_transfer_params"]
    second = pair.decode.post(CHAT, {**body, "kv_transfer_params": own})
    assert second.status_code == 200, second.text
    return own, second.json()


def choice_of(answer: dict[str, Any]) -> Any:
    return ChatCompletion.model_validate(answer).choices[0]


def test_the_other_server_goes_on_exactly(pair: Pair) -> None:
    """All cliffs at once; nothing but the last token of a prompt is computed there."""
    asked = [(index, cliff) for index, cliff in zip(range(4, 100, 4), CLIFFS, strict=False)]
    here = ("vllm:prompt_tokens_by_source_total", (("source", "local_compute"),))
    before = pair.decode.samples()[here]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: handed(pair, chat_body(*one, **EXACT)), asked))
    for (index, cliff), (own, answer) in zip(asked, found, strict=True):
        assert (LAYOUT_KEY in own) == (cliff not in (None, LAYERS))
        picture = picture_of(question(index))
        assert_oracles(pair.decode, choice_of(answer), prompt_of(index), [picture], cliff)
    assert pair.decode.samples()[here] - before <= len(asked)


def test_policies_that_keep_tokens(pair: Pair) -> None:
    """The same answers as of the second server alone."""
    for index, stages in ((104, "1:50% uniform, 3:0"), (108, "2:50% diversity, 4:0")):
        body = chat_body(index, **EXACT) | {"vllm_xargs": {"flow_stages": stages}}
        (_, over), alone = handed(pair, body), pair.decode.post(CHAT, body).json()
        one, other = choice_of(over), choice_of(alone)
        assert one.model_extra["token_ids"] == other.model_extra["token_ids"]
        said = [[token.logprob for token in each.logprobs.content] for each in (one, other)]
        assert said[0] == pytest.approx(said[1], abs=1e-4)


def test_what_goes_over_is_what_the_request_stores(pair: Pair) -> None:
    """To the byte: blocks of kept tokens, by storage group."""
    text = json.loads((pair.decode.model_dir / "config.json").read_text())["text_config"]
    token_bytes = 2 * text["num_key_value_heads"] * text["head_dim"] * 4
    for cliff in (None, 1, 2, 4):
        before = 0 if pair.folder else pair.sent("")
        own, answer = handed(pair, chat_body(112, cliff, **EXACT))
        work = Workload(answer["usage"]["prompt_tokens"] - IMAGE_TOKENS, IMAGE_TOKENS, 1)
        blocks = kv_blocks(work, LAYERS if cliff is None else cliff, STARTS, BLOCK_SIZE)
        sent = pair.sent(own["remote_request_id"]) - before
        assert sent == sum(blocks) * GROUP_LAYERS * BLOCK_SIZE * token_bytes


def test_a_prompt_of_another_policy_is_refused(pair: Pair) -> None:
    body = chat_body(116, 2, **EXACT)
    own = pair.prefill.post(CHAT, {**body, "max_tokens": 1, "kv_transfer_params": SEND}).json()
    for cliff in (3, None):
        other = {**chat_body(116, cliff), "kv_transfer_params": own["kv_transfer_params"]}
        answer = pair.decode.post(CHAT, other)
        assert answer.status_code == 400, answer.text
        assert "that policy" in answer.text or "without this policy" in answer.text
    ok = pair.decode.post(CHAT, {**body, "kv_transfer_params": own["kv_transfer_params"]})
    picture = picture_of(question(116))
    assert_oracles(pair.decode, choice_of(ok.json()), prompt_of(116), [picture], 2)
