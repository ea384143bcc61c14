"""Opens vLLM engines on tiny checkpoints, runs batches and compares them with the oracle.

The only test module that calls vLLM. Knows nothing of which model runner is active.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from vllm import LLM, RequestOutput, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine import kept_oracle, oracle, two_workers, v2_cpu
from tests.engine.cases import MAX_MODEL_LEN, Ask
from tests.engine.starting import quickly
from tests.engine.tiny_llava import Shape, build, picture

BLOCK_SIZE = 32
LOGPROB_TOLERANCE = 1e-4
TIE = 5 * LOGPROB_TOLERANCE
"""Two tokens whose logprobs are closer than this count as tied."""
RANK_TIE = 1e-4
"""Two image tokens whose scores differ by less than this part of them rank alike: float error may swap them."""
STOCK = None
"""`group_layers` of an engine without the extension."""


def params_of(ask: Ask, **extra: Any) -> SamplingParams:
    """Greedy, end-of-text ignored, with the policy's keys."""
    # vLLM refuses several greedy samples; sampling from the best token alone is the same thing.
    several: dict[str, Any] = {
        "temperature": 1,
        "top_k": 1,
        "n": ask.samples,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    return SamplingParams(
        **({"temperature": 0} if ask.samples == 1 else several),
        max_tokens=ask.max_tokens,
        logprobs=1,
        ignore_eos=True,
        allowed_token_ids=list(ask.allowed) if ask.allowed else None,
        extra_args=ask.extra_args,
        **extra,
    )


@contextmanager
def asynchronous_on_cpu(wanted: bool) -> Iterator[None]:
    """Let asynchronous scheduling stand, which vLLM's CPU platform always turns off.

    It gains nothing there, but scheduler and runners work: step N + 1 is scheduled before the
    tokens of step N are known.
    """
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = wanted

    with mock.patch.object(platform, "check_and_update_config", staticmethod(check_and_keep)):
        yield


class Engine:
    """An engine in this process with its checkpoint."""

    def __init__(self, shape: Shape, root: Path, group_layers: int | None, **options: Any) -> None:
        self.shape = shape
        self.model_dir = build(shape, root)
        self.group_layers = group_layers
        settings: dict[str, Any] = dict(
            dtype="float32",
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_MODEL_LEN * 8,
            max_num_seqs=32,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=24 << 20,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 2},
        )
        if v2_cpu.wanted():
            # vLLM 0.33 would run every kernel once, slowly under an interpreter.
            settings["kernel_config"] = {"enable_jit_warmup": False}
        if group_layers is not STOCK:
            settings["additional_config"] = {"vllm_flow": {"group_layers": group_layers}}
        asynchronous = bool(options.get("async_scheduling"))
        with asynchronous_on_cpu(asynchronous), quickly():
            self.llm = LLM(model=str(self.model_dir), **(settings | options))
        # numba's, if vLLM drafts with it: an object whose "__dict__" is none, and the next engine of the
        # process would look into all modules for their objects' when it starts.
        sys.modules.pop("llvmlite.binding.ffi", None)
        # A test that asked for asynchronous scheduling and did not get it would prove nothing.
        assert isinstance(self.scheduler, AsyncScheduler) == asynchronous

    def prompt(self, ask: Ask) -> dict[str, Any]:
        """What `LLM.generate` and `LLMEngine.add_request` take."""
        pictures = [picture(self.shape, seed) for seed in ask.images]
        return {
            "prompt": ask.prompt,
            **({"multi_modal_data": {"image": pictures}} if pictures else {}),
        }

    def run(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """All requests in one call."""
        return self.llm.generate(
            [self.prompt(ask) for ask in asks], [params_of(ask) for ask in asks], use_tqdm=False
        )

    def add(self, request_id: str, ask: Ask, priority: int = 0) -> None:
        """Hand one request to the engine without stepping it."""
        self.llm.llm_engine.add_request(
            request_id, self.prompt(ask), params_of(ask), priority=priority
        )

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache, whatever runs; what runs starts anew."""
        return self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    def step(self) -> dict[str, RequestOutput]:
        """One step; what it returned, by request id."""
        return {out.request_id: out for out in self.llm.llm_engine.step()}

    def drain(self, limit: int = 1000) -> dict[str, RequestOutput]:
        """Step until nothing is left; the last output of each request."""
        last: dict[str, RequestOutput] = {}
        for _ in range(limit):
            if not self.llm.llm_engine.has_unfinished_requests():
                return last
            last |= self.step()
        raise AssertionError(
            f"requests are left after {limit} steps: {list(self.scheduler.requests)}"
        )

    def run_joining(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """Each request joins a running batch two steps after the one before."""
        outputs: dict[str, RequestOutput] = {}
        for index, ask in enumerate(asks):
            self.add(str(index), ask)
            for _ in range(2):
                outputs |= self.step()
        outputs |= self.drain()
        return [outputs[str(index)] for index in range(len(asks))]

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @contextmanager
    def count_preemptions(self) -> Iterator[list[str]]:
        """Ids of the requests preempted meanwhile, once per preemption."""
        scheduler, seen = self.scheduler, []
        original = scheduler._preempt_request

        def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(request.request_id)
            original(request, *args, **kwargs)

        scheduler._preempt_request = preempt
        try:
            yield seen
        finally:
            del scheduler._preempt_request

    def check_blocks(self) -> None:
        """The extension's own check of the block pool; may run between any two steps."""
        if self.group_layers is not STOCK:
            importlib.import_module("vllm_flow.engine.inspect").check_integrity(self.llm)

    def check_idle(self) -> None:
        """No request left, every block back in the pool, and the extension's own check."""
        self.drain()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert not self.scheduler.requests, sorted(self.scheduler.requests)
        # One block is vLLM's null block.
        assert pool.get_num_free_blocks() == len(pool.blocks) - 1, "KV blocks leaked"
        self.check_blocks()


def tokens_of(output: RequestOutput) -> tuple[int, ...]:
    return tuple(output.outputs[0].token_ids)


def logprobs_of(output: RequestOutput, sample: int = 0) -> tuple[float, ...]:
    """The logprob of each token of one of the request's answers."""
    answer = output.outputs[sample]
    assert answer.logprobs is not None
    pairs = zip(answer.logprobs, answer.token_ids, strict=True)
    return tuple(row[token].logprob for row, token in pairs)


def assert_exact(
    engine: Engine, asks: Sequence[Ask], outputs: Sequence[RequestOutput], ties: bool = False
) -> int:
    """Every answer is complete and is the oracle's: tokens equal, logprobs within the tolerance.

    Where the oracle's two best tokens all but tie, or two image tokens of which one stays, the
    comparison would be a matter of luck. That is an error in the choice of prompts, or, with `ties`,
    where the comparison of an answer may end.

    Returns:
        Answers that were compared to their ends.
    """
    wrong, complete = [], 0
    answers = [
        (ask, output, sample)
        for ask, output in zip(asks, outputs, strict=True)
        for sample in range(ask.samples)
    ]
    for index, (ask, output, sample) in enumerate(answers):
        found = tuple(output.outputs[sample].token_ids)
        pictures = [picture(engine.shape, seed) for seed in ask.images]
        policy = f"cliff {ask.cliff}"
        if ask.stages or ask.late:
            stages = ask.stages or f"{ask.cliff}:0"
            expected, kept = kept_oracle.check_greedy(
                engine.model_dir,
                ask.prompt,
                pictures,
                stages,
                ask.seed,
                found,
                ask.allowed,
                ask.late,
            )
            policy = f"{stages!r} seed {ask.seed}{' late' * ask.late}"
            if kept.gap < RANK_TIE:
                assert ties, (
                    f"answer {index} ({policy}): choose another seed, two tokens rank alike"
                )
                continue
        else:
            expected = oracle.check_greedy(
                engine.model_dir, ask.prompt, pictures, ask.cliff, found, ask.allowed
            )
        assert tuple(output.prompt_token_ids or ()) == expected.prompt_token_ids
        assert len(found) == ask.max_tokens
        clear = [gap > TIE for gap in expected.gaps]
        assert ties or all(clear), f"answer {index}: choose another seed"
        complete += all(clear)
        count = len(expected.token_ids)
        if found != expected.token_ids:
            count -= 1
            if clear[count]:
                wrong.append(f"answer {index} ({policy}): token {count} differs")
        pairs = zip(logprobs_of(output, sample)[:count], expected.logprobs, strict=False)
        error = max((abs(a - b) if math.isfinite(a) else math.inf for a, b in pairs), default=0)
        if error > LOGPROB_TOLERANCE:
            wrong.append(f"answer {index} ({policy}): logprobs differ by {error:.1e}")
    assert not wrong, "\n".join(wrong)
    return complete


def differ(output: RequestOutput, other: RequestOutput) -> bool:
    """Whether two answers to one prompt cannot both be the oracle's to the tolerance; its best tokens do not tie."""
    moved = (abs(a - b) for a, b in zip(logprobs_of(output), logprobs_of(other), strict=True))
    return tokens_of(output) != tokens_of(other) or max(moved) > 2 * LOGPROB_TOLERANCE


def assert_same(outputs: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> None:
    """Two engines' answers: equal tokens, logprobs equal to the last bits."""
    assert [tokens_of(out) for out in outputs] == [tokens_of(out) for out in others]
    for out, other in zip(outputs, others, strict=True):
        pairs = zip(logprobs_of(out), logprobs_of(other), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-6


class Engines:
    """Opens engines on demand and keeps them, so that tests share their start-up.

    None whose worker is this process is closed before the end: that destroys the process groups that all of them share.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, Engine] = {}

    def get(self, shape: Shape, group_layers: int | None, **options: Any) -> Engine:
        """The engine for these settings; `group_layers` STOCK means without the extension."""
        key = repr((shape, group_layers, sorted(options.items())))
        if key not in self._open or two_workers.is_shut(self._open[key].llm):
            self._open[key] = Engine(shape, self.root, group_layers, **options)
            two_workers.keep_few_open(self._open[key].llm)
        return self._open[key]

    def close(self) -> None:
        # Each shutdown collects garbage three times, seconds per engine in a process that is about to end.
        with mock.patch("gc.collect"):
            for engine in self._open.values():
                engine.llm.llm_engine.engine_core.shutdown()
        self._open.clear()
