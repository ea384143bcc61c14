"""One engine that several batches keep busy: none of them waits for another one's slowest request.

One thread owns the engine: between two steps it adds what has come meanwhile. A batch's own thread prepares its
requests while the engine computes for the others, hands over each as it is ready, and sleeps until the last of
them is done. The owner lives as long as there is something to do. Knows vLLM's `LLM` and its engine; nothing of
items, policies or rows.

The seam in vLLM: `LLM._preprocess_cmpl_one` and `LLM._render_and_add_requests`, the two halves of
`LLM.enqueue`, taken apart so that pictures are prepared outside of the engine's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

Found = TypeVar("Found")
Job = tuple[Callable[[], None], Callable[[BaseException], None]]
"""What the owner is to do, and what is to be done where there is no owner any more."""

AHEAD = 2
"""Batches whose pictures are read and that are not yet with the engine: one being prepared, one behind it."""


class Batch:
    """The requests of one thread on their way."""

    def __init__(self, size: int) -> None:
        self.ids: dict[int, str] = {}
        """The engine's ids by the requests' numbers in the batch, without those that were refused."""
        self.refused: dict[int, Exception] = {}
        self.done: dict[str, tuple[Any, Any]] = {}
        """(output, footprint) by the engine's id, without those that the engine lost."""
        self.failure: BaseException | None = None
        self.left = set(range(size))
        """Numbers of those that are neither done nor refused."""
        self.ended = threading.Event()


class SharedEngine:
    """What of an `LLM` batches share."""

    def __init__(self, llm: Any, footprint: Callable[[str], Any], room: int) -> None:
        """
        Args:
            footprint: of a request that has just finished, by the engine's id.
            room: requests that are in the engine at most; whoever has more waits.
        """
        self.llm = llm
        self._footprint, self._room = footprint, room
        self._order = threading.Lock()
        """Held while a batch is prepared: vLLM's two picture caches must see pictures in one order."""
        self._ahead = threading.BoundedSemaphore(AHEAD)
        self._changed = threading.Condition()
        """Of what follows; its lock guards all of it."""
        self._jobs: deque[Job] = deque()
        """What the owner does before its next step."""
        self._owned = False
        self._inside: dict[str, tuple[Batch, int, str]] = {}
        """Whose a request is, by the caller's id: its batch, its number in it, and the engine's id."""
        self._open: set[Batch] = set()
        """Batches that have not ended."""
        self._under_way = 0
        """Requests handed over and not done."""
        self._failure: BaseException | None = None

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Hold pictures that are not yet with the engine; at most `AHEAD` batches do at a time."""
        with self._ahead:
            yield

    def between_steps(self, call: Callable[[], Found]) -> Found:
        """The call's result, made by the owner while it does not step."""
        future: Future[Found] = Future()

        def job() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._hand_over((job, future.set_exception))
        return future.result()

    def add(
        self,
        prompts: Sequence[tuple[Any, Any]],
        tokenization_kwargs: dict[str, Any],
        refusals: tuple[type[Exception], ...],
    ) -> Batch:
        """Prepare (prompt, sampling parameters) one by one, and hand each to the engine as it is ready.

        Raises:
            Exception: whatever is none of the `refusals`, or made the engine fail.
        """
        batch = Batch(len(prompts))
        if not prompts:
            return batch
        with self._changed:
            self._open.add(batch)
        try:
            with self._order:
                for number, (prompt, params) in enumerate(prompts):
                    self._add_one(batch, number, prompt, params, tokenization_kwargs, refusals)
        except BaseException:
            with self._changed:
                self._open.discard(batch)  # nobody will wait for it
            raise
        return batch

    def _add_one(
        self,
        batch: Batch,
        number: int,
        prompt: Any,
        params: Any,
        tokenization_kwargs: dict[str, Any],
        refusals: tuple[type[Exception], ...],
    ) -> None:
        try:
            ready = self.llm._preprocess_cmpl_one(prompt, tokenization_kwargs)
        except refusals as error:
            with self._changed:
                self._refuse(batch, number, error)
            return

        def job() -> None:
            try:
                (inner,) = self.llm._render_and_add_requests([ready], [params])
            except refusals as error:
                with self._changed:
                    self._under_way -= 1
                    self._refuse(batch, number, error)
                    self._changed.notify_all()
                return
            with self._changed:
                batch.ids[number] = inner
                # The engine's id is the caller's, a dash and random characters.
                self._inside[inner.rpartition("-")[0]] = (batch, number, inner)

        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._under_way < self._room)
            self._check()
            self._under_way += 1
        self._hand_over((job, lambda error: None))  # the batch is told by itself

    def wait(self, batch: Batch) -> Batch:
        """Sleep until the batch's requests are done, refused, or lost.

        Raises:
            Exception: what a step of the engine raised, for every batch in it.
        """
        if batch.left:
            batch.ended.wait()
        if batch.failure is not None:
            raise batch.failure
        return batch

    def _hand_over(self, job: Job) -> None:
        with self._changed:
            self._check()
            self._jobs.append(job)
            if not self._owned:
                self._owned = True
                threading.Thread(target=self._own, name="engine steps", daemon=True).start()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _own(self) -> None:
        """Add and step until there is nothing left to do."""
        engine = self.llm.llm_engine
        try:
            while True:
                with self._changed:
                    jobs = list(self._jobs)
                    self._jobs.clear()
                    if not jobs and not engine.has_unfinished_requests():
                        self._owned = False
                        self._lose_the_rest()
                        return
                for job, _ in jobs:
                    job()
                if engine.has_unfinished_requests():
                    self._hand_back([one for one in engine.step() if one.finished])
        except BaseException as error:
            self._fail(error)

    def _hand_back(self, outputs: Sequence[Any]) -> None:
        if not outputs:
            return
        with self._changed:
            for output in outputs:
                batch, number, inner = self._inside.pop(output.request_id)
                batch.done[inner] = (output, self._footprint(inner))
                self._under_way -= 1
                self._leave(batch, number)
            self._changed.notify_all()

    def _refuse(self, batch: Batch, number: int, error: Exception) -> None:
        batch.refused[number] = error
        self._leave(batch, number)

    def _leave(self, batch: Batch, number: int) -> None:
        batch.left.discard(number)
        if not batch.left:
            self._open.discard(batch)
            batch.ended.set()

    def _lose_the_rest(self) -> None:
        """What the engine no longer has and never gave back is missing from its batch."""
        for batch, number, _ in self._inside.values():
            self._under_way -= 1
            self._leave(batch, number)
        self._inside.clear()
        self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            for batch in self._open:
                batch.failure = error
                batch.ended.set()
            for _, fail in self._jobs:
                fail(error)
            self._changed.notify_all()


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take; a later vLLM's may derive from less."""
    from vllm.exceptions import VLLMClientError

    return (ValueError, VLLMClientError)


def room_in(llm: Any) -> int:
    """Requests that an engine computes at once at most: what more it is given would wait in it with its picture."""
    return int(llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)
