"""Pictures whose tokens see one another: the ranges are vLLM's, no step divides one, what cannot do it is refused.

What a model makes of them is compared in ``tests/families`` (``gemma3``), which runs Triton's attention.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.request import Request
from vllm.v1.worker.gpu.attn_utils import compute_mm_prefix_ranges

from tests.engine.bare_prompts import IMAGE, pictures
from tests.engine.bare_requests import Sent
from tests.engine.bare_scheduler import LENGTH, OpenBare
from vllm_flow.engine import mutual_attention
from vllm_flow.engine.mutual_attention import (
    as_vllm,
    check_backends,
    ranges_of,
    reader,
    reason_against,
)
from vllm_flow.engine.worker.passes import last_layer

BUDGET = 40


@st.composite
def features(draw: st.DrawFn) -> list[MultiModalFeatureSpec]:
    """Pictures, films and sounds of a prompt, with text within them."""
    found, offset = [], 0
    for index in range(draw(st.integers(0, 3))):
        offset += draw(st.integers(0, 3))
        shown = draw(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
        place = PlaceholderRange(offset, len(shown), torch.tensor(shown))
        kind = draw(st.sampled_from(["image", "video", "audio"]))
        found.append(MultiModalFeatureSpec(None, kind, str(index), place, ""))
        offset += len(shown)
    return found


@given(features(), st.none() | st.integers(1, 6))
def test_ranges_are_vllms(of_prompt: list[MultiModalFeatureSpec], window: int | None) -> None:
    theirs = compute_mm_prefix_ranges(["a"], {"a": of_prompt}, window)[0]
    ours = ranges_of(reversed(of_prompt), window)
    assert (as_vllm({0: ours}) if ours else {0: []}) == {0: theirs}


def test_no_range_is_no_metadata() -> None:
    assert as_vllm({}) is None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_step_divides_a_picture(
    bare: OpenBare, seed: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests that evict and of others, in steps with room for little more than one picture."""
    engine = bare(2, 8, max_num_batched_tokens=BUDGET, disable_chunked_mm_input=True)
    engine.scheduler.flow_requests._mutual_of = partial(ranges_of, longest=None)
    if late:  # what this memory does not know
        monkeypatch.setattr(engine, "_write", lambda *_: None)
        monkeypatch.setattr(engine, "_check", lambda *_: None)
    rng = np.random.default_rng(seed)
    for index in range(10):
        tokens: list[int] = []
        for _ in range(rng.integers(1, 4)):
            tokens += [5 + int(rng.integers(2))] * rng.integers(0, 30) + [6]
            tokens += [IMAGE] * rng.integers(1, BUDGET - 8)
        keys: dict[str, Any] = {"flow_when": "decode"} if late else {}
        cliff = None if index % 3 == 2 else int(rng.integers(5))
        engine.add(str(index), [*tokens, 7, 8], cliff, **({} if cliff is None else keys))
    assert engine.scheduler.max_num_scheduled_tokens == BUDGET < LENGTH
    schedule, chunks = engine.scheduler.schedule, 0

    def watched() -> Any:
        nonlocal chunks
        output = schedule()
        for name, count in output.num_scheduled_tokens.items():
            request = engine.scheduler.requests[name]
            end = request.num_computed_tokens  # the step's included
            chunks += end < request.num_prompt_tokens
            for start, stop in engine.scheduler.flow_requests.mutual.get(name, ()):
                assert not max(start, end - count) < end < stop, (
                    name,
                    end - count,
                    end,
                    start,
                    stop,
                )
        return output

    with mock.patch.object(engine.scheduler, "schedule", watched):
        engine.drain()
    assert len(engine.answers) == 10 and chunks > 10
    assert not engine.scheduler.flow_requests.mutual, "forgotten with their requests"


def test_pictures_of_later_input_are_where_they_stand_in_the_whole_prompt(bare: OpenBare) -> None:
    """Of a streaming session: each input says where its pictures are from its own first token on."""
    engine = bare(2, 8, max_num_batched_tokens=BUDGET, disable_chunked_mm_input=True)
    book = engine.scheduler.flow_requests
    book._mutual_of = partial(ranges_of, longest=None)

    def streamed(tokens: list[int], more: bool = True) -> Request:
        return Request(
            request_id="session",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=1, ignore_eos=True),
            pooling_params=None,
            mm_features=pictures(tokens),
            block_hasher=engine._hasher,
            resumable=more,
        )

    first = streamed([5, *[IMAGE] * 9, 7])
    engine.sent["session"] = Sent(first, None, (7,))
    engine.scheduler.add_request(first)
    assert book.mutual["session"] == ((1, 10),)
    # While the first is computed, and once it waits for more.
    engine.scheduler.add_request(streamed([5, 5, *[IMAGE] * 12, 7]))
    assert book.mutual["session"] == ((1, 10),)
    engine._write = engine._check = lambda *_: None  # a memory of one prompt
    while engine.step():
        pass
    assert book.mutual["session"] == ((1, 10), (13, 25))
    engine.scheduler.add_request(streamed([*[IMAGE] * 8, 7]))
    assert book.mutual["session"] == ((1, 10), (13, 25), (26, 34))
    while engine.step():
        pass
    engine.abort("session")
    assert not book.mutual


def config(**scheduler: Any) -> Any:
    """As much of an engine's configuration as is read."""
    usual = {"disable_chunked_mm_input": True, "long_prefill_token_threshold": 0}
    model = SimpleNamespace(is_mm_prefix_lm=True, get_head_size=lambda: 32, dtype=torch.float32)
    return SimpleNamespace(
        model_config=model,
        scheduler_config=SimpleNamespace(**(usual | scheduler)),
        attention_config=SimpleNamespace(backend=None),
    )


@pytest.mark.parametrize(
    ("kind", "v2", "found"),
    [
        ("gemma3_text", False, ((40, 60),)),
        ("gemma4_text", True, ((40, 60),)),
        ("gemma4_text", False, ((3, 36), (40, 60))),
    ],
)
def test_a_picture_wider_than_a_window_is_mutual_where_vllm_has_it_so(
    kind: str, v2: bool, found: tuple[tuple[int, int], ...]
) -> None:
    """Model Runner V1 keeps Gemma 4's, and the kernel heeds the window."""
    asked = config()
    asked.use_v2_model_runner = v2
    asked.model_config.hf_text_config = SimpleNamespace(model_type=kind)
    asked.model_config.get_sliding_window = lambda: 32
    pictures: Any = [
        SimpleNamespace(
            modality="image",
            mm_position=SimpleNamespace(extract_embeds_range=lambda at=at: [at]),
        )
        for at in ((3, 35), (40, 59))
    ]
    ranges_of = reader(asked)
    assert ranges_of is not None and ranges_of(pictures) == found


def test_a_cpu_is_refused_with_the_remedy() -> None:
    assert "on a CPU, where vLLM's attention is causal: serve it on a CUDA" in str(
        reason_against(config())
    )


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({}, None),
        ({"disable_chunked_mm_input": False}, "set disable_chunked_mm_input"),
        ({"long_prefill_token_threshold": 64}, "leave out long_prefill_token_threshold"),
    ],
)
def test_where_the_attention_can_parts_are_refused(
    scheduler: dict[str, Any], said: str | None
) -> None:
    with mock.patch.object(mutual_attention, "_causal_platform", lambda _config: False):
        reason = reason_against(config(**scheduler))
    assert reason is None if said is None else said in str(reason)


def group(backend: Any) -> list[list[Any]]:
    return [[SimpleNamespace(backend=backend)]]


@pytest.mark.parametrize("backend", [CPUAttentionBackend, FlashAttentionBackend])
def test_other_backends_are_refused_with_the_remedy(backend: Any) -> None:
    """FlashAttention 4 takes ranges, but writes those of all layers of a step into one buffer."""
    with pytest.raises(ValueError, match=rf"{backend.get_name()}: start with .* TRITON_ATTN"):
        check_backends(SimpleNamespace(is_mm_prefix_lm=True), group(backend))
    check_backends(SimpleNamespace(is_mm_prefix_lm=False), group(backend))


@pytest.mark.parametrize("name", mutual_attention.BACKENDS)
def test_the_backends_are_vllms(name: str) -> None:
    assert name in AttentionBackendEnum.__members__
    taken = type("Backend", (), {"get_name": staticmethod(lambda: name)})
    check_backends(SimpleNamespace(is_mm_prefix_lm=True), group(taken))


def test_a_picture_runs_through_the_whole_of_its_last_layer() -> None:
    """A run of text is causal, which a picture is not."""
    decoder = SimpleNamespace(model=torch.nn.Identity(), layers=[], call="residual")
    assert last_layer.reason_against(decoder, []) is None  # type: ignore[arg-type]
    assert "both directions" in str(last_layer.reason_against(decoder, [], mutual=True))  # type: ignore[arg-type]
