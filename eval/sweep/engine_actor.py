"""One vLLM engine that answers batches of work; what Ray Data runs as an actor.

Reads pictures, asks every policy of an item side by side, and returns rows of the records' schema. Several
threads may call it at once: their batches overlap in the engine (`shared_engine`).
What fails for one item becomes its error row; what fails for the engine is raised. Knows nothing of
Ray: the benchmark and the tests run it in a loop of their own. vLLM is imported when an engine is
built, after the environment has been set for it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vllm_flow.eval.sweep.budgets import image_rows
from vllm_flow.eval.sweep.engine_args import EXECUTOR, workers_of
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.pictures import picture_key, read_pictures, unreadable
from vllm_flow.eval.sweep.policies import BASELINE, Policy
from vllm_flow.eval.sweep.schema import answers_table
from vllm_flow.eval.sweep.shared_engine import SharedEngine, refusals, room_in
from vllm_flow.eval.sweep.work import savings

if TYPE_CHECKING:
    from PIL.Image import Image
    from vllm import RequestOutput


@dataclass
class Ask:
    """One request on its way: an item under a policy."""

    item: Mapping[str, Any]
    policy: Policy
    picture: Image | None
    grid: int | None
    """Side of the reduced picture, None for the picture as it is."""

    @property
    def picture_id(self) -> str:
        """Names the picture to vLLM, which then prepares and encodes it once for all requests."""
        whole = f"{self.item['preparation']}:{self.item['reading']}:{self.item['image']}"
        return whole if self.grid is None else f"{whole}:{self.grid}"


class EngineActor:
    """An engine; called with a table of `requests.WORK`, it returns one of `records.ANSWERS`."""

    sampling: Mapping[str, Any] = MappingProxyType({})
    """Further arguments of every request's `SamplingParams`; the benchmark's fixes its lengths with them."""

    def __init__(self, options: EngineOptions, extension: bool = True) -> None:
        """Start the engine.

        Args:
            extension: False starts stock vLLM, which can only answer the baseline; its rows have no
                footprint. For comparisons.
        """
        prepare_process()
        import vllm

        from vllm_flow.demo_model.naming import resolve_model
        from vllm_flow.engine.inspect import scheduler_of
        from vllm_flow.eval.sweep.conversation import Conversation
        from vllm_flow.eval.sweep.model_facts import read_processor

        self.options = options
        self.policies = {policy.name: policy for policy in options.policies}
        model = resolve_model(options.model)
        groups = {} if options.group_layers is None else {"group_layers": options.group_layers}
        flow = {"vllm_flow": {**groups, **options.flow_settings}}
        arguments: dict[str, Any] = {
            "dtype": options.dtype,
            "seed": options.seed,
            "trust_remote_code": options.trust_remote_code,
            "max_model_len": options.max_model_len,
            "kv_cache_memory_bytes": options.kv_cache_bytes,
            "block_size": options.block_size,
            "limit_mm_per_prompt": {"image": 1},
            # So that all policies' answers come from the same kernels.
            "enforce_eager": True,
            # Off, so that what a request takes does not depend on what was asked before it.
            "enable_prefix_caching": False,
            "enable_mm_embeds": options.embeds,
            "use_tqdm_on_load": False,
            "disable_log_stats": False,  # time stamps
            **executor_of(options),
            **options.engine_args,
        }
        self.llm = vllm.LLM(model=model, additional_config=flow if extension else {}, **arguments)
        processor = read_processor(model, options.trust_remote_code)
        self.conversation = Conversation(options.conversation, processor, options.picture_mark)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._scheduler = scheduler_of(self.llm) if extension else None
        self.geometry = self._scheduler.flow_geometry if self._scheduler else None
        self.shared = SharedEngine(self.llm, self._footprint, room_in(self.llm))
        self.downsampler: Any = None
        if options.embeds:
            from vllm_flow.eval.sweep.downsample import Downsampler

            assert options.full_grid is not None, "the driver refuses models without a grid"
            self.downsampler = Downsampler(self.llm, processor.image_processor, options.full_grid)

    def __call__(self, work: pa.Table) -> pa.Table:
        """Answer a batch; every (item, policy) in it gives one row."""
        with ExitStack() as pictures:
            pictures.enter_context(self.shared.ahead())
            asks, rows = self._asks(work.to_pylist())
            rows += self._answer(asks, pictures.close)
        now = datetime.now(timezone.utc)
        return answers_table([{**row, "written_at": now} for row in rows])

    def _asks(self, items: Sequence[Mapping[str, Any]]) -> tuple[list[Ask], list[dict[str, Any]]]:
        """The requests of a batch, and rows for those whose picture cannot be read."""
        asks, rows = [], []
        pictures = read_pictures(items, self.options.background)
        for item in items:
            picture = pictures.get(picture_key(item))
            for name in item["policies"]:
                policy = self.policies.get(name, BASELINE)
                if isinstance(picture, Exception):
                    rows.append(self._failed(item, name, unreadable(item, picture)))
                elif self.geometry is None and policy != BASELINE:
                    raise ValueError(f"stock vLLM cannot answer under the policy {name}")
                else:
                    asks.append(Ask(item, policy, picture, self._grid(policy, picture)))
        return asks, rows

    def _grid(self, policy: Policy, picture: Any) -> int | None:
        if picture is None or self.options.full_grid is None or self.geometry is None:
            return None
        return policy.grid(self.options.full_grid, self.geometry.num_layers)

    def _answer(self, asks: Sequence[Ask], added: Callable[[], None]) -> list[dict[str, Any]]:
        """Hand all requests to the engine, say so, and wait for them."""
        embeddings = self._embeddings(asks)
        prompts = [
            self.request(
                ask,
                ask.policy.request_keys(),
                embeddings.get(ask.picture_id),
                max_tokens=ask.item["max_tokens"],
                **self.sampling,
            )
            for ask in asks
        ]
        batch = self.shared.add(prompts, self._tokenization, refusals())
        # The engine has what it needs of the pictures.
        del prompts, embeddings
        for ask in asks:
            ask.picture = None
        added()
        self.shared.wait(batch)
        rows = []
        for index, ask in enumerate(asks):
            if index in batch.refused:
                reason = f"refused: {batch.refused[index]}"
                rows.append(self._failed(ask.item, ask.policy.name, reason))
            else:
                output, took = batch.done.get(batch.ids[index], (None, None))
                rows.append(self._row(ask, output, took))
        return rows

    @property
    def _tokenization(self) -> dict[str, Any]:
        return {"add_special_tokens": self.conversation.add_special_tokens}

    def enqueue(
        self, ask: Ask, keys: Mapping[str, Any], embedding: Any = None, **sampling: Any
    ) -> list[str]:
        """Hand one greedy request to the engine; its internal id, as the only one of a list. Not while batches
        are answered.

        Args:
            keys: the request's extra arguments, whatever the policy of `ask`.
            sampling: further arguments of `SamplingParams`.
        """
        return self.llm.enqueue(
            *self.request(ask, keys, embedding, **sampling),
            use_tqdm=False,
            tokenization_kwargs=self._tokenization,
        )

    def request(
        self, ask: Ask, keys: Mapping[str, Any], embedding: Any = None, **sampling: Any
    ) -> tuple[dict[str, Any], Any]:
        """A greedy request as vLLM takes it: its prompt and its sampling parameters."""
        from vllm import SamplingParams

        prompt: dict[str, Any] = {
            "prompt": self.conversation.prompt(ask.item["text"], ask.picture is not None)
        }
        if ask.picture is not None:
            picture = ask.picture if embedding is None else embedding[None]
            prompt["multi_modal_data"] = {"image": picture}
            prompt["multi_modal_uuids"] = {"image": [ask.picture_id]}
        # None, not {}: the baseline is a request as stock vLLM knows it.
        params = SamplingParams(temperature=0, extra_args=dict(keys) or None, **sampling)
        return prompt, params

    def _embeddings(self, asks: Sequence[Ask]) -> dict[str, Any]:
        """Embeddings of the reduced pictures, by the ids that name them; one pass of the tower for each grid."""
        wanted: dict[int, dict[str, Any]] = {}
        for ask in asks:
            if ask.grid is not None:
                wanted.setdefault(ask.grid, {})[ask.picture_id] = ask.picture
        made: dict[str, Any] = {}
        for side, pictures in wanted.items():
            embed = partial(self.downsampler.embed, list(pictures.values()), side)
            made.update(zip(pictures, self.shared.between_steps(embed), strict=True))
        return made

    def _row(self, ask: Ask, output: RequestOutput | None, took: Any) -> dict[str, Any]:
        if output is None or output.outputs[0].finish_reason not in ("stop", "length"):
            reason = "nothing came back" if output is None else output.outputs[0].finish_reason
            return self._failed(ask.item, ask.policy.name, f"the engine ended it: {reason}")
        said, times = output.outputs[0], output.metrics
        row = {
            **self._key(ask.item, ask.policy.name),
            "answer": said.text.strip(),
            "finish_reason": said.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids or ()),
            "output_tokens": len(said.token_ids),
            "seconds": times.last_token_ts - times.scheduled_ts if times is not None else None,
        }
        if took is None or self.geometry is None:
            return row
        flow, layers = ask.policy.flow(), self.geometry.num_layers
        rows = took.image_tokens * layers
        if flow is not None:
            rows = image_rows(flow, layers, took.image_tokens)
        full = took.image_tokens
        if ask.grid is not None and self.options.full_grid is not None:
            full = self.options.full_grid**2
        return {
            **row,
            "image_tokens": took.image_tokens,
            **savings(
                self.geometry,
                image_rows=rows,
                image_tokens=took.image_tokens,
                full_image_tokens=full,
                computed_tokens=took.computed_tokens,
                blocks=took.blocks,
            ),
        }

    def _failed(self, item: Mapping[str, Any], policy: str, reason: str) -> dict[str, Any]:
        return {**self._key(item, policy), "error": reason}

    def _key(self, item: Mapping[str, Any], policy: str) -> dict[str, Any]:
        return {
            "task": item["task"],
            "item_id": item["item_id"],
            "policy": policy,
            "engine": self.name,
        }

    def _footprint(self, request_id: str) -> Any:
        return self._scheduler and self._scheduler.flow_footprints.latest.get(request_id)


def executor_of(options: EngineOptions) -> dict[str, str]:
    """How an engine of several workers starts them: as processes beside it, on the GPUs that Ray gave it.

    Left to itself vLLM asks Ray for their GPUs where it finds a placement group, and waits for those that it has.
    """
    return {EXECUTOR: "mp"} if workers_of(options.engine_args) > 1 else {}


def prepare_process() -> None:
    """Set what vLLM and torch read when they are imported, for an engine inside this process."""
    from vllm_flow.engine.process import quieten

    quieten(offline=False)
    # Ray gives an actor its share of the cores (OMP_NUM_THREADS); pinning would put all engines of
    # a machine on the same ones.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
