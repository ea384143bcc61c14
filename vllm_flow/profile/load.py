"""Requests and load, by vLLM's own benchmark code.

Requests come from ``vllm.benchmarks.datasets.RandomMultiModalDataset``; arrivals from
``vllm.benchmarks.serve.get_request`` and figures from its ``calculate_metrics``, which
``vllm bench serve`` prints. What is ours is the transport between them: the engine is stepped in
this process instead of being asked over HTTP, so that two engines can alternate and be looked into.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_flow.profile.engines import System

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import BenchmarkMetrics


@dataclass(frozen=True)
class Limits:
    """A request is good within both; milliseconds, None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def as_goodput(self) -> dict[str, float]:
        """As ``calculate_metrics`` takes them."""
        pairs = {"ttft": self.ttft_ms, "tpot": self.tpot_ms}
        return {name: value for name, value in pairs.items() if value is not None}


def sample(
    llm: LLM,
    count: int,
    *,
    text_tokens: int,
    output_tokens: int,
    images: int,
    picture: tuple[int, int],
    seed: int = 0,
) -> list[SampleRequest]:
    """Requests of equal size with random words and random pictures.

    Args:
        picture: width and height of each.
    """
    from vllm.benchmarks.datasets import RandomMultiModalDataset

    width, height = picture
    return RandomMultiModalDataset(random_seed=seed).sample(
        tokenizer=llm.get_tokenizer(),
        num_requests=count,
        input_len=text_tokens,
        output_len=output_tokens,
        base_items_per_request=images,
        limit_mm_per_prompt={"image": images},
        bucket_config={(height, width, 1): 1.0},
    )


def prompt_of(llm: LLM, request: SampleRequest) -> dict[str, Any]:
    """The request as the engine takes it: the model's placeholder per picture, then the words."""
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.multimodal.utils import fetch_image

    fetched = [fetch_image(item["image_url"]["url"]) for item in request.multi_modal_data or ()]
    pictures = [
        getattr(picture, "media", picture) for picture in fetched
    ]  # without its file's bytes
    kind = get_model_cls(llm.model_config)
    config, tokenizer = llm.model_config.hf_config, llm.get_tokenizer()
    marks = [
        own_mark(kind.get_placeholder_str("image", number + 1), config, tokenizer)
        for number in range(len(pictures))
    ]
    # A family whose pictures stand before everything else has no mark.
    prompt: dict[str, Any] = {"prompt": " ".join([*filter(None, marks), request.prompt])}
    if pictures:
        prompt["multi_modal_data"] = {"image": pictures}
    return prompt


def own_mark(mark: str | None, config: Any, tokenizer: Any) -> str | None:
    """What stands for a picture in a text: vLLM's placeholder of the architecture, but the checkpoint's own token
    where the tokenizer does not know that, as the demo model's does not know LLaVA's ``<image>``."""
    index = getattr(config, "image_token_index", None)
    if mark is None or index is None:
        return mark
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return mark if len(ids) == 1 or index in ids else tokenizer.convert_ids_to_tokens(index)


def params_of(system: System, output_tokens: int) -> Any:
    """Greedy, exactly ``output_tokens`` long, with the system's policy."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=system.extra_args,
    )


class _Transport:
    """Sends requests to one engine and steps it while any is unfinished."""

    def __init__(self, llm: LLM, system: System) -> None:
        self._engine, self._system = llm.llm_engine, system
        self._outputs: dict[str, RequestFuncOutput] = {}
        self._done: dict[str, asyncio.Future[None]] = {}
        self._last: dict[str, tuple[float, int]] = {}
        self._count = 0
        self._stepping: asyncio.Task[None] | None = None

    async def ask(self, prompt: dict[str, Any], output_tokens: int) -> RequestFuncOutput:
        """One request from sending to its last token."""
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

        self._count += 1
        request_id = f"{self._system.name}-{self._count}"
        output = RequestFuncOutput(start_time=time.perf_counter())
        self._outputs[request_id] = output
        done = self._done[request_id] = asyncio.get_running_loop().create_future()
        self._engine.add_request(request_id, prompt, params_of(self._system, output_tokens))
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        await done
        return output

    async def _step(self) -> None:
        while self._engine.has_unfinished_requests():
            await asyncio.sleep(0)  # lets every request that can be sent be sent
            for output in self._engine.step():
                self._take(output)
            await asyncio.sleep(0)

    def _take(self, found: Any) -> None:
        now = time.perf_counter()
        record = self._outputs[found.request_id]
        tokens = len(found.outputs[0].token_ids)
        before, known = self._last.get(found.request_id, (record.start_time, 0))
        if tokens > known:
            if known == 0:
                record.ttft = now - before
            else:
                record.itl.append(now - before)
            self._last[found.request_id] = (now, tokens)
        if found.finished:
            record.latency = now - record.start_time
            record.output_tokens = tokens
            record.prompt_len = len(found.prompt_token_ids)
            record.success = True
            self._done[found.request_id].set_result(None)


def run_load(
    llm: LLM,
    system: System,
    requests: Sequence[SampleRequest],
    prompts: Sequence[dict[str, Any]],
    *,
    concurrency: int,
    limits: Limits,
    request_rate: float = float("inf"),
) -> tuple[float, BenchmarkMetrics]:
    """All requests, at most ``concurrency`` at a time; seconds in all, and vLLM's metrics."""
    from vllm.benchmarks.serve import calculate_metrics, get_request

    async def run() -> tuple[float, list[RequestFuncOutput]]:
        transport, gate = _Transport(llm, system), asyncio.Semaphore(concurrency)

        async def one(index: int, request: SampleRequest) -> RequestFuncOutput:
            async with gate:
                return await transport.ask(prompts[index], request.expected_output_len)

        start, tasks = time.perf_counter(), []
        async for request, _ in get_request(list(requests), request_rate):
            tasks.append(asyncio.create_task(one(len(tasks), request)))
        outputs = await asyncio.gather(*tasks)
        return time.perf_counter() - start, outputs

    seconds, outputs = asyncio.run(run())
    with contextlib.redirect_stdout(io.StringIO()):  # it advertises a plotting library
        metrics, _ = calculate_metrics(
            input_requests=list(requests),
            outputs=outputs,
            dur_s=seconds,
            tokenizer=None,
            selected_percentiles=[99.0],
            goodput_config_dict=limits.as_goodput(),
        )
    return seconds, metrics
