"""What the cliff finder asks of an engine: answers at layers, next-token distributions, attention.

One engine, all layers mixed in its batches; what a record holds is not asked again. Knows `engine_actor`
and vLLM's outputs; nothing of statistics or files of results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vllm_flow.eval.cliff.evidence import CliffError
from vllm_flow.eval.sweep.engine_actor import Ask, EngineActor
from vllm_flow.eval.sweep.pictures import read_pictures, unreadable
from vllm_flow.eval.sweep.policy import Policy
from vllm_flow.eval.sweep.shared_engine import refusals
from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work
from vllm_flow.eval.tasks.base import Item
from vllm_flow.log_keys import LOG_KEY

if TYPE_CHECKING:
    from vllm_flow.eval.cliff.record import Record

BATCH_REQUESTS = 128
"""Requests handed to the engine at once: enough to mix layers, few enough for a live bar."""

Array = NDArray[np.float64]


class CliffEngine:
    """An engine and the questions it is asked."""

    def __init__(self, actor: EngineActor, work: TaskWork, policies: Sequence[Policy]) -> None:
        self.actor, self.work, self.policies = actor, work, policies
        self.record: Record | None = None
        """What was asked before, and what is asked now."""
        self.requests = 0
        """Answers, distributions and attention logs used so far, those of the record included."""

    def answers(
        self,
        wanted: Sequence[tuple[int, Sequence[int]]],
        tell: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[str, int, str | None, str | None]]:
        """(item id, layer, answer, error) of every wanted (question, its layers)."""
        layer_of = {policy.name: layer for layer, policy in enumerate(self.policies)}
        rows, known = [], []
        for index, layers in wanted:
            item = self.work.items[index]
            one = replace(self.work, items=[item])
            left = []
            for layer in layers:
                policy = self.policies[layer]
                said = None if self.record is None else self.record.answer(item.id, policy.name)
                if said is None:
                    left.append(policy)
                else:
                    known.append((item.id, layer, said, None))
            rows += plan_work([one], left, set())
        self.requests += len(known)
        tell(len(known))
        yield from known
        for batch in batches_of(rows, BATCH_REQUESTS, BATCH_REQUESTS):
            answered = self.actor(batch)
            if self.record is not None:
                self.record.add(answered)
            table = answered.to_pylist()
            self.requests += len(table)
            tell(len(table))
            # The baseline first: where it fails as well, the question is at fault.
            table.sort(key=lambda row: -layer_of[row["policy"]])
            for row in table:
                yield row["item_id"], layer_of[row["policy"]], row["answer"], row["error"]

    def distributions(self, index: int) -> Array:
        """[layers + 1, vocabulary] log-probabilities of the first answer token, full vocabulary.

        Row n is with the image in the first n layers; the last is the baseline.
        """
        asks = [self._ask(index, policy) for policy in self.policies]
        outputs = self._run(
            [(ask, ask.policy.request_keys()) for ask in asks],
            max_tokens=1,
            logprobs=-1,
            flat_logprobs=True,  # lists of numbers instead of an object per token
            detokenize=False,
        )
        size = self.actor.llm.llm_engine.model_config.get_vocab_size()
        table = np.full((len(asks), size), -np.inf)
        for row, output in zip(table, outputs, strict=True):
            found = output.outputs[0].logprobs
            row[np.asarray(found.token_ids)] = found.logprobs
        return table

    def image_masses(self, indices: Sequence[int], folder: Path) -> Array:
        """[questions, layers] share of attention on the image, of the row that predicts the first token.

        Of the baseline, from the attention log that the engine writes into `folder`.
        """
        from vllm_flow.engine.inspect import attention_log

        asks = [self._ask(index, self.policies[-1]) for index in indices]
        outputs = self._run([(ask, {LOG_KEY: True}) for ask in asks], max_tokens=1)
        if not attention_log(self.actor.llm).flush():
            raise CliffError(f"the attention log in {folder} was not written in time.")
        rows = pq.read_table(folder / "mass", columns=["request_id", "layer", "token", "image"])
        shares = {
            (row["request_id"], row["layer"]): row["image"]
            for row in rows.to_pylist()
            if row["token"] == 0
        }
        layers = range(len(self.policies) - 1)
        return np.array([[shares[out.request_id, layer] for layer in layers] for out in outputs])

    def _ask(self, index: int, policy: Policy) -> Ask:
        item: Item = self.work.items[index]
        row = {
            "item_id": item.id, "text": item.text, "image": item.image,
            "preparation": self.work.preparation, "reading": self.work.reading,
        }  # fmt: skip
        background = self.actor.options.background
        picture = next(iter(read_pictures([row], background).values()), None)
        if isinstance(picture, Exception):
            raise CliffError(f"question {item.id}: {unreadable(row, picture)}")
        return Ask(row, policy, picture, None)

    def _run(self, asks: Sequence[tuple[Ask, dict[str, Any]]], **sampling: Any) -> list[Any]:
        """The outputs of requests, in their order."""
        ids = []
        for ask, keys in asks:
            try:
                (internal,) = self.actor.enqueue(ask, keys, **sampling)
            except refusals() as error:
                raise CliffError(f"question {ask.item['item_id']}: refused: {error}") from None
            ids.append(internal.rpartition("-")[0])
        done = {out.request_id: out for out in self.actor.llm.wait_for_completion(use_tqdm=False)}
        self.requests += len(ids)
        return [done[request_id] for request_id in ids]
