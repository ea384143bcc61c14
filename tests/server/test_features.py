"""What clients do with an OpenAI-compatible server, with policies: the ``openai`` client against the oracle.

The exactness of policies themselves is ``tests/engine``'s; here each feature of the protocol meets one.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from PIL import Image

from tests.server.conftest import IMAGE_TOKENS, LAYERS
from tests.server.exact import CLIFFS, EXACT, assert_oracles
from tests.server.requests import (
    cached,
    chat,
    chat_body,
    data_url,
    different_pictures,
    picture_of,
    prompt_of,
    question,
    report,
)
from tests.server.serving import NAME, Server
from vllm_flow.demo_model.prompt import IMAGE_TOKEN, prompt_head, prompt_tail


@pytest.mark.parametrize("cliff", CLIFFS)
def test_tokens_and_logprobs_are_the_oracles(
    small: Server, client: openai.OpenAI, cliff: int | None
) -> None:
    answer = chat(client, chat_body(4, cliff, **EXACT))
    assert_oracles(small, answer.choices[0], prompt_of(4), [picture_of(question(4))], cliff)
    saved = report(answer)
    assert (saved is None) == (cliff in (None, LAYERS))
    if saved is not None:
        assert (saved["cliff"], saved["image_tokens_evicted"]) == (cliff, IMAGE_TOKENS)
        assert saved["prefill_rows_saved"] == IMAGE_TOKENS * (LAYERS - cliff)


def test_an_image_that_leaves_after_the_prefill(small: Server, client: openai.OpenAI) -> None:
    """The first token is the baseline's, and its prompt is found; no row was saved."""
    body = chat_body(24, 2, **EXACT)
    body["vllm_xargs"]["flow_when"] = "decode"
    counted = ("vllm_flow:requests_total", (("policy", "cliff=2 when=decode"), ("task", "")))
    before = small.samples().get(counted, 0)
    plain, late = (chat(client, sent) for sent in (chat_body(24, None, **EXACT), body))
    first, other = (answer.choices[0].logprobs.content[0] for answer in (plain, late))
    assert first.token == other.token and abs(first.logprob - other.logprob) < 1e-4
    assert late.usage.prompt_tokens_details.cached_tokens >= IMAGE_TOKENS
    saved = report(late)
    assert (saved["when"], saved["image_tokens_evicted"]) == ("decode", IMAGE_TOKENS)
    assert saved["prefill_rows_saved"] == 0 < saved["kv_blocks_saved"]
    assert small.samples()[counted] == before + 1


@pytest.mark.parametrize("cliff", [None, 1, 3])
def test_several_pictures(small: Server, client: openai.OpenAI, cliff: int | None) -> None:
    answer = chat(client, chat_body(8, cliff, pictures=2, **EXACT))
    pictures = different_pictures(8, 2)
    assert_oracles(small, answer.choices[0], prompt_of(8, 2), pictures, cliff)
    if cliff is not None:
        assert report(answer)["image_tokens_evicted"] == 2 * IMAGE_TOKENS


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_pictures_as_data_urls(small: Server, client: openai.OpenAI, format: str) -> None:
    file = io.BytesIO()
    picture_of(question(12)).save(file, format)
    body = chat_body(12, 2, **EXACT)
    parts = body["messages"][0]["content"]
    parts[0]["image_url"]["url"] = data_url(picture_of(question(12)), format)
    answer = chat(client, body)
    assert_oracles(small, answer.choices[0], prompt_of(12), [Image.open(file)], 2)


def test_a_stream_says_the_same_and_has_no_place_for_the_report(
    small: Server, client: openai.OpenAI
) -> None:
    """If this fails because a chunk carries the report: good news for the README."""
    body = chat_body(16, 2, max_tokens=12, ignore_eos=True)
    whole = chat(client, body)
    before = small.metric("vllm_flow:image_tokens_evicted_total")
    options = {"stream_options": {"include_usage": True}}
    chunks = list(chat(client, {**body, "stream": True, **options}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    assert not any("vllm_flow" in chunk.model_dump_json() for chunk in chunks)
    assert small.metric("vllm_flow:image_tokens_evicted_total") == before + IMAGE_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_the_responses_endpoint_reports_streamed_or_not(
    client: openai.OpenAI, stream: bool
) -> None:
    content = [
        {"type": "input_image", "image_url": data_url(picture_of(question(20))), "detail": "auto"},
        {"type": "input_text", "text": question(20).text},
    ]
    answer = client.responses.create(
        model=NAME,
        input=[{"role": "user", "content": content}],
        max_output_tokens=4,
        temperature=0,
        stream=stream,
        extra_body={"vllm_xargs": {"flow_cliff": 2}},
    )
    if stream:
        answer = list(answer)[-1].response
    assert (
        answer.output_text
        == chat(client, chat_body(20, 2, max_tokens=4)).choices[0].message.content
    )
    assert report(answer)["cliff"] == 2


def test_an_answer_that_a_stop_string_ends_is_reported(client: openai.OpenAI) -> None:
    """vLLM's front end ends it, and never hears the engine's report."""
    body = chat_body(20, 2, max_tokens=12, ignore_eos=True, return_token_ids=True)
    stop = chat(client, body).choices[0].message.content[2:4]
    stopped = chat(client, {**body, "stop": [stop]})
    assert stopped.choices[0].model_extra["stop_reason"] == stop
    length = len(stopped.choices[0].model_extra["token_ids"])
    ended = chat(client, {**body, "max_tokens": length})
    assert report(stopped) == report(ended) and report(stopped)["cliff"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_a_stop_string_ends_is_reported(
    client: openai.OpenAI, stream: bool
) -> None:
    content = [
        {"type": "input_image", "image_url": data_url(picture_of(question(20))), "detail": "auto"},
        {"type": "input_text", "text": question(20).text},
    ]
    ask = {"model": NAME, "input": [{"role": "user", "content": content}], "temperature": 0}
    keys = {"vllm_xargs": {"flow_cliff": 2}}
    said = client.responses.create(**ask, extra_body=keys).output_text
    answer = client.responses.create(**ask, stream=stream, extra_body={**keys, "stop": [said[1:3]]})
    if stream:
        answer = list(answer)[-1].response
    assert said.startswith(answer.output_text) and answer.output_text != said
    assert report(answer)["cliff"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_text_alone_is_answered_as_without_a_policy(
    small: Server, client: openai.OpenAI, stream: bool
) -> None:
    def answers(**xargs: int) -> tuple[str, list[float]]:
        answer = client.completions.create(
            model=NAME,
            prompt=prompt_head() + prompt_tail("Is there a fish?"),
            max_tokens=12,
            temperature=0,
            logprobs=1,
            stream=stream,
            extra_body={"ignore_eos": True, "vllm_xargs": xargs},
        )
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        said = "".join(choice.text for choice in choices)
        return said, [value for choice in choices for value in choice.logprobs.token_logprobs]

    before = small.metric("vllm_flow:image_tokens_evicted_total")
    plain, with_policy = answers(), answers(flow_cliff=1)
    assert plain[0] == with_policy[0]
    assert plain[1] == pytest.approx(with_policy[1], abs=1e-6)
    assert small.metric("vllm_flow:image_tokens_evicted_total") == before


def test_several_greedy_choices_are_equal(small: Server, client: openai.OpenAI) -> None:
    """vLLM refuses n > 1 at temperature 0; sampling among one token is greedy too."""
    answer = chat(client, {**chat_body(24, 2, n=3, top_k=1, **EXACT), "temperature": 1})
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert_oracles(small, choice, prompt_of(24), [picture_of(question(24))], 2)
    assert report(answer)["cliff"] == 2


def test_sampled_choices_follow_their_seed(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        body = chat_body(28, 2, n=3, max_tokens=32, seed=seed, ignore_eos=True)
        answer = chat(client, {**body, "temperature": 2})
        return [choice.message.content for choice in answer.choices]

    first = texts(1)
    assert len(set(first)) == 3
    assert texts(1) == first != texts(2)


def test_json_schema(client: openai.OpenAI) -> None:
    values = ["yes", "no"]
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": values}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = chat(client, chat_body(32, 2, max_tokens=60, response_format=form))
    assert json.loads(answer.choices[0].message.content)["answer"] in values
    assert report(answer)["cliff"] == 2


def test_structured_choice(client: openai.OpenAI) -> None:
    words = ["elephant", "bicycle"]
    body = chat_body(32, 2, max_tokens=20, structured_outputs={"choice": words})
    answer = chat(client, body)
    assert answer.choices[0].message.content in words
    assert report(answer)["cliff"] == 2


def test_prefixes_are_shared_within_a_policy_only(client: openai.OpenAI) -> None:
    def hits(cliff: int | None) -> int:
        return cached(chat(client, chat_body(36, cliff)))

    prompt = chat(client, chat_body(36)).usage.prompt_tokens
    full = prompt // 32 * 32
    assert hits(None) == full
    for cliff in (2, 3):
        assert hits(cliff) == 0
        assert full - 32 <= hits(cliff) <= full
    assert full - 32 <= hits(2) <= full
    assert hits(None) == full


@pytest.mark.parametrize("cliff", [None, 2])
def test_a_second_turn_finds_the_first(
    small: Server, client: openai.OpenAI, cliff: int | None
) -> None:
    body = chat_body(40, cliff, **EXACT)
    first = chat(client, body)
    turn = prompt_tail(question(40).text)
    said = first.choices[0].message.content
    body["messages"] += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": question(41).text},
    ]
    second = chat(client, body)
    assert cached(second) >= first.usage.prompt_tokens // 32 * 32 - 32 > 0
    prompt = (
        f"{prompt_head()}{IMAGE_TOKEN}{turn}{said}<|im_end|>\n<|im_start|>user\n"
        f"{prompt_tail(question(41).text)}"
    )
    assert_oracles(small, second.choices[0], prompt, [picture_of(question(40))], cliff)


def test_policies_mixed_in_one_batch(small: Server, client: openai.OpenAI) -> None:
    asked = [(44 + 4 * round, cliff) for round in range(4) for cliff in CLIFFS]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(
            pool.map(lambda one: chat(client, chat_body(one[0], one[1], **EXACT)), asked)
        )
    for (index, cliff), answer in zip(asked, answers, strict=True):
        picture = [picture_of(question(index))]
        assert_oracles(small, answer.choices[0], prompt_of(index), picture, cliff)
