"""The extension's scheduler without a model: a memory that remembers which token each slot holds.

What a forward pass would read wrongly is seen here as a token in the wrong slot, in microseconds
instead of seconds. Knows the scheduler's output and the block tables, not how they come about.

Shapes: G layers of a storage group, B blocks, S slots of a block, T tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.engine.bare_prompts import pictures
from tests.engine.bare_requests import Sent, step_result
from tests.engine.harness import BLOCK_SIZE, STOCK, asynchronous_on_cpu
from vllm_flow.engine.core.prefix import policy_salt
from vllm_flow.engine.core.scheduler import FlowAsyncScheduler, FlowScheduler
from vllm_flow.engine.groups import group_specs
from vllm_flow.engine.requests import token_layout
from vllm_flow.engine.settings import FlowSettings

LAYERS = 6
LENGTH = 512
"""Tokens of the greatest request; the smallest pool that vLLM accepts holds just one such."""


class BareScheduler:
    """A scheduler over ``num_blocks`` usable blocks, and what its steps would leave in them.

    Args:
        config: a finished ``VllmConfig``, with the extension's key or without.
        num_blocks: usable blocks; vLLM's null block comes on top.
    """

    def __init__(self, config: Any, num_blocks: int) -> None:
        self.settings = FlowSettings.of(config)
        layers = config.model_config.get_total_num_hidden_layers()
        self.num_layers = layers
        self.block_size = config.cache_config.block_size
        plain = FullAttentionSpec(
            block_size=self.block_size, num_kv_heads=1, head_size=8, dtype=config.model_config.dtype
        )
        names = {f"model.layers.{layer}.attn": plain for layer in range(layers)}
        if self.settings is None:
            groups = [KVCacheGroupSpec(list(names), plain)]
            kinds: tuple[type[Scheduler], type[Scheduler]] = (Scheduler, AsyncScheduler)
        else:
            specs = group_specs(names, self.settings)
            by_spec: dict[Any, list[str]] = {}
            for name, spec in specs.items():
                by_spec.setdefault(spec, []).append(name)
            groups = [KVCacheGroupSpec(held, spec) for spec, held in by_spec.items()]
            kinds = (FlowScheduler, FlowAsyncScheduler)
        config.cache_config.num_gpu_blocks = num_blocks + 1
        cache = KVCacheConfig(
            num_blocks + 1, [], groups, config.cache_config.prefix_cache_retention_interval
        )
        # As the engine core does it, so that what vLLM refuses there is refused here.
        block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, config)
        self._late = int(config.scheduler_config.async_scheduling)
        self._guessed = config.num_speculative_tokens
        self.scheduler: Any = kinds[self._late](
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
            log_stats=True,
        )
        self.group_layers = layers // len(groups)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(hash_block_size, sha256)
        # Blocks of all groups are one pool; a group's layers lie side by side in a block.
        self.memory_GBS = np.zeros(
            (self.group_layers, num_blocks + 1, self.block_size), dtype=np.int64
        )
        self._outputs: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.sent: dict[str, Sent] = {}
        self.answers: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.stats: dict[str, Any] = {}
        """Per request: what vLLM reports with its first token."""
        self.looked_up: Counter[str] = Counter()
        """What vLLM counts of the prefix cache: requests, queries, hits."""

    @property
    def managers(self) -> Any:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    def add(
        self,
        request_id: str,
        tokens: list[int],
        cliff: int | None = None,
        answer: Sequence[int] = (7, 8, 9, 10),
        priority: int = 0,
        **extra_args: Any,
    ) -> Request:
        """Hand one request over; its pictures follow from its tokens."""
        if cliff is not None:
            extra_args["flow_cliff"] = cliff
        params = SamplingParams(
            max_tokens=len(answer), ignore_eos=True, extra_args=extra_args or None
        )
        features = pictures(tokens)
        layout = None
        if self.settings is not None:
            layout = token_layout(params, features, self.num_layers, len(tokens))
        request = Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            sampling_params=params,
            pooling_params=None,
            mm_features=features,
            cache_salt=None if layout is None else policy_salt(None, layout),
            block_hasher=self._hasher,
            priority=priority,
        )
        self.sent[request_id] = Sent(request, layout, answer)
        self.scheduler.add_request(request)
        return request

    def step(self) -> list[str]:
        """One step, whose output an asynchronous scheduler sees a step late; the ids it scheduled.

        Raises:
            AssertionError: a slot that a layer reads holds something else than its token.
        """
        output = self.scheduler.schedule()
        for copy in output.kv_cache_block_copies or ():
            self.memory_GBS[:, copy.dst_block_id] = self.memory_GBS[:, copy.src_block_id]
        sent = [(self.sent[name], count) for name, count in output.num_scheduled_tokens.items()]
        drafted = output.scheduled_spec_decode_tokens
        for one, count in sent:
            one.drafted = drafted.get(one.request.request_id, ())
            self._write(one, count)
        for one, _ in sent:
            self._check(one)
        self._outputs.append((output, step_result([one for one, _ in sent])))
        while len(self._outputs) > self._late:
            self._update(*self._outputs.popleft())
        if self._guessed:
            guesses = [one.guesses(self._guessed) for one, _ in sent]
            names = list(output.num_scheduled_tokens)
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, guesses))
        return list(output.num_scheduled_tokens)

    def _update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(output, result).values():
            if outputs.scheduler_stats is not None:
                counted = outputs.scheduler_stats.prefix_cache_stats
                for figure in ("requests", "queries", "hits"):
                    self.looked_up[figure] += getattr(counted, figure)
            for out in outputs.outputs:
                self.answers.setdefault(out.request_id, []).extend(out.new_token_ids)
                if out.prefill_stats is not None:
                    self.stats[out.request_id] = out.prefill_stats

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.aborted.add(request_id)

    def drain(self, limit: int = 2000) -> int:
        """Step until every request has finished; the number of steps.

        Raises:
            AssertionError: requests are left after ``limit`` steps, or after a step that could do
                nothing for them.
        """
        steps = idle = 0
        while self.scheduler.requests:
            idle = 0 if self.step() else idle + 1
            steps += 1
            left = {name: r.status.name for name, r in self.scheduler.requests.items()}
            assert idle < 3 and steps < limit, f"never end: {left}"
        self.step()  # with which the workers are told who finished
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == len(pool.blocks) - 1, "KV blocks leaked"
        return steps

    def _slots(
        self, sent: Sent, layer: int
    ) -> tuple[np.ndarray, tuple[Any, np.ndarray, np.ndarray]]:
        """Of a request's computed tokens: those a layer keeps, and where (index of the memory)."""
        position_T = np.arange(sent.request.num_computed_tokens)  # the step's tokens included
        kept_T = position_T
        evicted = None if sent.layout is None else sent.layout.evicted(layer)
        if evicted is not None:
            kept_T = position_T[~evicted.is_image(position_T)]
        group, depth = divmod(layer, self.group_layers)
        held = self.managers[group].req_to_blocks[sent.request.request_id]
        block_B = np.array([block.block_id for block in held], dtype=np.int64)
        slot_T = np.arange(len(kept_T))
        return kept_T, (depth, block_B[slot_T // self.block_size], slot_T % self.block_size)

    def _write(self, sent: Sent, count: int) -> None:
        """What a forward pass leaves of a request's scheduled tokens."""
        end = sent.request.num_computed_tokens
        marks_T = sent.marks_T(end)
        for layer in range(self.num_layers):
            kept_T, (depth, block_T, slot_T) = self._slots(sent, layer)
            new_T = kept_T >= end - count
            self.memory_GBS[depth, block_T[new_T], slot_T[new_T]] = marks_T[kept_T[new_T]]

    def _check(self, sent: Sent) -> None:
        """Whether each layer finds all that a request's rows attend to."""
        end = sent.request.num_computed_tokens
        marks_T = sent.marks_T(end)
        for layer in range(self.num_layers):
            kept_T, at = self._slots(sent, layer)
            wrong = np.flatnonzero(self.memory_GBS[at] != marks_T[kept_T])
            assert not len(wrong), (
                f"{sent.request.request_id}, layer {layer}: token {kept_T[wrong[0]]} of {end} is "
                "not where it is read"
            )


OpenBare: TypeAlias = "Callable[..., BareScheduler]"
"""``bare(group_layers, spare, **arguments)``, see :func:`opener`."""


def opener(model: Path) -> OpenBare:
    """Opens schedulers for a checkpoint with :data:`LAYERS` layers.

    Their pools have ``spare`` blocks more than one request of the greatest length needs;
    ``arguments`` are vLLM's, and ``asynchronous``.
    """

    configs: dict[str, Any] = {}

    def config_of(group_layers: int | None, **arguments: Any) -> Any:
        asynchronous = arguments.pop("asynchronous", False)
        defaults: dict[str, Any] = dict(
            enforce_eager=True,
            max_model_len=LENGTH,
            max_num_batched_tokens=LENGTH,
            max_num_seqs=8,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=True,
            async_scheduling=asynchronous,
        )
        if group_layers is not STOCK:
            defaults["additional_config"] = {"vllm_flow": {"group_layers": group_layers}}
        with asynchronous_on_cpu(asynchronous):
            return EngineArgs(model=str(model), **(defaults | arguments)).create_engine_config()

    def bare(group_layers: int | None, spare: int = 0, **arguments: Any) -> BareScheduler:
        groups = 1 if group_layers is STOCK else LAYERS // group_layers
        # A cached config is shared: a scheduler only sets the size of its pool in it.
        key = repr((group_layers, sorted(arguments.items())))
        config = configs[key] if key in configs else config_of(group_layers, **arguments)
        configs[key] = config
        return BareScheduler(config, LENGTH // BLOCK_SIZE * groups + spare)

    return bare
