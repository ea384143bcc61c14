"""What the workers of an engine cannot do is refused by its front end, and does not end the engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine.core_client import AsyncMPClient

from tests.engine.cases import GQA, one_image, text_only
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from vllm_flow.engine import obstacles
from vllm_flow.engine.front_end import default_policies
from vllm_flow.engine.worker import moving
from vllm_flow.engine.worker.attention import keys
from vllm_flow.engine.worker.choosing import layer_ranks


def test_what_a_cache_does_not_allow_is_refused(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose keys nobody can read, and whose rows nobody can move."""

    def unmovable(attention: Any) -> Any:
        raise ValueError("how attention backend CPU_ATTN stores keys and values is not known")

    with monkeypatch.context() as patched:
        patched.setattr(keys, "READERS", ())
        patched.setattr(moving, "token_places", unmovable)
        engine = open_engine(GQA, 2, seed=71)
    for ask, said in (
        (
            replace(one_image(1), stages="2:30% last_image"),
            r"flow_stages.*'last_image' reads keys .*CPU_ATTN stores keys \(torch.float32, blocks of 32\) is not "
            r"known; rank by 'uniform' or 'random' or 'diversity' or 'cls_attention' or 'cls_diverse' or "
            "'received_attention' or 'scope' or 'holov' or 'holov_received' or 'hired', or have the server started "
            "with another",
        ),
        (replace(one_image(1), stages="1:50% uniform, 2:30% last_prompt"), "'last_prompt' reads keys"),
        (
            replace(one_image(1, 2), late=True),
            "flow_when='decode'.* cannot be moved .*CPU_ATTN.*; leave out flow_when, or have",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            engine.run([ask])
        engine.check_idle()
    fine = [
        one_image(2, 2),
        replace(one_image(3), stages="1:50% diversity, 2:30% random"),
        replace(text_only(4), stages="2:30% last_prompt"),
        replace(one_image(5, GQA.layers), late=True),
    ]
    assert_exact(engine, fine, engine.run(fine))


def test_what_a_model_does_not_show_is_refused(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of whose layers nobody knows where they turn queries, and whose keys are no keys of heads."""
    with monkeypatch.context() as patched:
        patched.setattr(layer_ranks, "ROTATING", ())
        patched.setattr(layer_ranks, "is_latent", lambda attention: True)
        engine = open_engine(GQA, 2, seed=73)
    others = "rank by 'uniform' or 'random' or 'diversity'"
    for rank, said in (
        ("unrotated", "where LlamaDecoderLayer turns its queries and keys is not known"),
        ("feather", "where LlamaDecoderLayer turns"),
        ("dart", "latent vectors in the place of keys"),
    ):
        with pytest.raises(ValueError, match=f"'{rank}' looks into the layers .*{said}.*{others}"):
            engine.run([replace(one_image(7), stages=f"2:30% {rank}")])
        engine.check_idle()
    fine = [
        replace(one_image(8), stages="1:50% diversity, 2:30% question"),
        replace(text_only(9), stages="2:30% dart"),
    ]
    assert_exact(engine, fine, engine.run(fine))


def test_an_operators_policy_stays_away_from_what_cannot_be_done(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = {"flow_cliff": 2, "flow_keep": "30%", "flow_rank": "last_image"}
    flow = {"group_layers": 2, "default_policy": default}
    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(keys, "READERS", ())
        patched.setattr(
            default_policies.logger, "warning", lambda text, *values: said.append(text % values)
        )
        engine = open_engine(GQA, 2, additional_config={"vllm_flow": flow}, seed=72)
    [line] = said
    assert "'last_image' reads keys" in line and "cannot be applied by this engine" in line
    ask = one_image(6)
    outputs = engine.llm.generate(
        engine.prompt(ask),
        SamplingParams(temperature=0, max_tokens=ask.max_tokens, logprobs=1, ignore_eos=True),
        use_tqdm=False,
    )
    assert_exact(engine, [ask], outputs)


class Client(AsyncMPClient):
    """Answers without an engine behind it."""

    def __init__(self, answers: list[dict[str, str]]) -> None:
        self.answers, self.asked = answers, 0

    def __del__(self) -> None:
        pass

    async def collective_rpc_async(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        assert method == obstacles.METHOD
        self.asked += 1
        return self.answers

    async def get_supported_tasks_async(self) -> Any:
        return ("generate",)


def test_an_asynchronous_client_asks_before_the_first_request() -> None:
    config = SimpleNamespace()
    client = Client([{}, {obstacles.RANKS: "second"}, {obstacles.RANKS: "third"}])
    heard: list[Any] = []
    for _ in range(2):  # vLLM's factories call each other
        obstacles.ask(client, config, lambda: heard.append(config))
    assert obstacles.known(config) == {} and not client.asked
    assert asyncio.run(client.get_supported_tasks_async()) == ("generate",) and heard == [config]
    assert obstacles.known(config) == {obstacles.RANKS: "second"}
    asyncio.run(client.get_supported_tasks_async())
    assert client.asked == 1 and len(heard) == 1
