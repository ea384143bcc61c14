"""Clients that leave in the middle of an answer: their blocks are free again, others notice nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai

from tests.server.exact import CLIFFS, EXACT, assert_oracles
from tests.server.requests import chat, chat_body, picture_of, prompt_of, question
from tests.server.serving import NAME, Server

LEAVING = 28
"""Clients that leave: their blocks together would fill the pool."""


def leave(client: openai.OpenAI, index: int, cliff: int | None) -> None:
    """Ask for an answer that takes seconds, and disconnect when it has begun."""
    body = chat_body(index, cliff, max_tokens=900, ignore_eos=True, stream=True)
    stream = chat(client, body)
    next(stream)
    stream.close()


def test_clients_that_leave_free_their_blocks(small: Server, client: openai.OpenAI) -> None:
    before = small.metric("vllm:generation_tokens_total")
    for number in range(LEAVING):
        leave(client, 60, CLIFFS[number % len(CLIFFS)])
    small.wait_until("vllm:num_requests_running", 0)
    generated = small.metric("vllm:generation_tokens_total") - before
    assert generated < LEAVING * 900 / 2, "they were not aborted"
    # Had they kept their blocks, this one could not be scheduled.
    long = client.with_options(timeout=30).completions.create(
        model=NAME, prompt="fish " * 800, max_tokens=1
    )
    assert long.usage.prompt_tokens > 800
    small.wait_until("vllm:kv_cache_usage_perc", 0)


def test_clients_that_leave_while_others_stay(small: Server, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave, client, 64, 1 + number % 5) for number in range(6)]
        staying = pool.submit(chat, client, chat_body(68, 2, **EXACT))
        for one in leaving:
            one.result()
        choice = staying.result().choices[0]
    assert_oracles(small, choice, prompt_of(68), [picture_of(question(68))], 2)
    small.wait_until("vllm:num_requests_running", 0)
    small.wait_until("vllm:kv_cache_usage_perc", 0)
