"""One engine that several threads keep busy: batches overlap in it, and none waits for another's slowest request.

A thread prepares its batch while the engine computes for the others, adds it between two steps, and sleeps until
its last request is done. The steps are made by a thread of their own, which lives as long as there is something
to compute. Knows vLLM's `LLM` and its engine; nothing of items, policies or rows.

The seam in vLLM: `LLM._preprocess_cmpl_one` and `LLM._render_and_add_requests`, the two halves of
`LLM.enqueue`, taken apart so that pictures are prepared outside of the engine's turn.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class Turns:
    """A lock that is handed on in the order in which it was asked for.

    Python's own may be taken again and again by a thread that steps without a pause.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn, and hand it on afterwards."""
        with self._guard:
            mine = threading.Event()
            if self._taken:
                self._waiting.append(mine)
            else:
                self._taken = True
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._guard:
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._taken = False


class SharedEngine:
    """What of an `LLM` batches share."""

    def __init__(self, llm: Any, footprints: Callable[[], Mapping[str, Any]]) -> None:
        """
        Args:
            footprints: of the latest finished requests, by internal id.
        """
        self.llm = llm
        self._footprints = footprints
        self._engine = Turns()
        """Who may touch the engine: whoever adds or steps."""
        self._order = threading.Lock()
        """Held from preparing to adding: vLLM's two picture caches must see pictures in one order."""
        self._changed = threading.Condition()
        """Of what follows; its lock guards all of it."""
        self._done: dict[str, tuple[Any, Any]] = {}
        self._inner: dict[str, str] = {}
        """The engine's id of a request by the caller's: that, a dash and random characters."""
        self._failure: BaseException | None = None
        self._stepping = False
        self._grids: Counter[int] = Counter()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Between two steps: nobody else touches the engine or its model."""
        with self._engine.turn():
            yield

    @contextmanager
    def grid(self, side: int | None) -> Iterator[None]:
        """Keep requests with embeddings of another size out of the engine meanwhile; None has none.

        vLLM's LLaVA stacks the embeddings that it is given in one step, and so takes those of one size only.
        """
        if side is None:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not set(self._grids) - {side})
            self._grids[side] += 1
        try:
            yield
        finally:
            with self._changed:
                self._grids[side] -= 1
                self._grids = +self._grids
                self._changed.notify_all()

    def add(
        self,
        prompts: Sequence[tuple[Any, Any]],
        tokenization_kwargs: dict[str, Any],
        refusals: tuple[type[Exception], ...],
    ) -> list[str | Exception]:
        """Prepare (prompt, sampling parameters) while the engine computes, then add all of them at once.

        Returns:
            For each its internal id, or why it was refused.
        """
        added: list[str | Exception] = []
        with self._order:
            prepared: list[Any] = []
            for prompt, _ in prompts:
                try:
                    prepared.append(self.llm._preprocess_cmpl_one(prompt, tokenization_kwargs))
                except refusals as error:
                    prepared.append(error)
            with self.turn():
                for one, (_, params) in zip(prepared, prompts, strict=True):
                    try:
                        if isinstance(one, Exception):
                            raise one
                        (inner,) = self.llm._render_and_add_requests([one], [params])
                        self._inner[_outer(inner)] = inner
                        added.append(inner)
                    except refusals as error:
                        added.append(error)
        self._step_on()
        return added

    def wait(self, ids: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """Sleep until the requests are done: internal id -> (output, footprint), without those that are lost.

        Raises:
            Exception: what a step of the engine raised, for every batch in it.
        """
        outer = {_outer(one): one for one in ids}
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or not self._stepping or outer.keys() <= self._done.keys()
            )
            if self._failure:
                raise self._failure
            there = outer.keys() & self._done.keys()
            return {outer[one]: self._done.pop(one) for one in there}

    def _step_on(self) -> None:
        """See to it that somebody steps."""
        with self._changed:
            if not self._stepping:
                self._stepping = True
                threading.Thread(target=self._steps, name="engine steps", daemon=True).start()

    def _steps(self) -> None:
        try:
            while True:
                with self.turn():
                    if not self.llm.llm_engine.has_unfinished_requests():
                        # Whoever adds takes a turn, and looks for a stepping thread after it.
                        with self._changed:
                            self._stepping = False
                            self._changed.notify_all()
                        return
                    outputs = [one for one in self.llm.llm_engine.step() if one.finished]
                    took = self._footprints() if outputs else {}
                    inner = [self._inner.pop(output.request_id, "") for output in outputs]
                with self._changed:
                    for output, one in zip(outputs, inner, strict=True):
                        self._done[output.request_id] = (output, took.get(one))
                    if outputs:
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure, self._stepping = error, False
                self._changed.notify_all()


def _outer(inner: str) -> str:
    """The caller's id of a request from the engine's."""
    return inner.rpartition("-")[0]


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take; a later vLLM's may derive from less."""
    from vllm.exceptions import VLLMClientError

    return (ValueError, VLLMClientError)
